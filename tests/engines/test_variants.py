"""Variants that `flashhead convert --quantize` writes, served by plain `vllm serve FOLDER`."""

import pytest

pytest.importorskip("vllm")

import variants
from compare import UNSET, options, require_equal, require_searched

from flashhead.integrations.vllm.serving import Server


@pytest.mark.parametrize("name", variants.SOURCES)
def test_variant_is_made_verified_and_served(name, generate, tmp_path):
    """Catches a packed body that vLLM does not take, a head that it leaves dense, and a server that
    says something else than the engine."""
    source, out = variants.source_of(name), tmp_path / "variant-W4A16"
    variants.make(source, out)
    variants.require_verified(out, source)
    variants.require_chats(out)
    engine = {"model": str(out), "quantization": None}
    flash = generate({**engine, **options()})
    require_searched(flash)
    require_equal(flash, generate(engine, dense=True))
    with Server(
        out,
        *("--served-model-name", "variant", "--enforce-eager", "--max-model-len", "512"),
        log=tmp_path / "server.log",
        environment=dict.fromkeys(UNSET),
    ) as server:
        body = {"model": "variant", "max_tokens": 16, "temperature": 0, "repetition_penalty": 1.0}
        asked = {"messages": [{"role": "user", "content": variants.QUESTION}], **body}
        answer = server.post("/v1/chat/completions", asked)
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert [head["kind"] for head in server.statistics()] == ["codes"]

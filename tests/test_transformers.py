"""FlashHead inside transformers:
every generate mode, attach and detach, load and convert, on a tiny real architecture.
"""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import flashhead
from flashhead.convert.head import convert
from flashhead.errors import FlashHeadError
from flashhead.index.store import INDEX_FILE
from flashhead.integrations.transformers import attach, head_of, load_dense, logit_postprocess
from flashhead.nn.head import FlashHead

PROMPTS = torch.tensor([[1, 5, 9, 30, 7], [1, 8, 100, 400, 3]])
MODES = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "batch": {
        "do_sample": False,
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    },
    "penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "assisted": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.fixture
def exact(tiny_model):  # type: ignore[no-untyped-def]
    """The model with a codes head that really searches, whatever this machine's crossover."""
    with attach(
        tiny_model, "codes", progress=False, calibration_tokens=256, kl_budget=1e-6
    ) as attachment:
        attachment.head.crossover_rows = 64
        yield tiny_model


@pytest.mark.parametrize("mode", MODES)
def test_generate_modes_equal_dense(tiny_model, mode: str) -> None:  # type: ignore[no-untyped-def]
    """Catches a mode that loses rows, positions or the dtype of the logits on the way."""
    prompts = PROMPTS[:1] if mode == "assisted" else PROMPTS
    settings = {"max_new_tokens": 12, "pad_token_id": 0, **MODES[mode]}
    wanted = tiny_model.generate(prompts, **settings)
    with attach(
        tiny_model, "codes", progress=False, calibration_tokens=256, kl_budget=1e-6
    ) as attachment:
        attachment.head.crossover_rows = 64
        got = tiny_model.generate(prompts, **settings)
        stats = attachment.head.stats
        assert stats.rows > stats.dense_rows, "the search never ran"
    assert torch.equal(got, wanted)


def test_logits_are_complete_and_close(exact) -> None:  # type: ignore[no-untyped-def]
    """Catches -inf for tokens that lost, and logits that are not float32."""
    got = exact.generate(
        PROMPTS,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    for step in got.logits:
        assert step.shape == (2, 515)
        assert step.dtype == torch.float32
        assert torch.isfinite(step).all()


def test_sampling_follows_the_dense_distribution(tiny_model) -> None:  # type: ignore[no-untyped-def]
    """Catches estimates that shift the distribution:
    same seed, same uniform draws, (nearly) the same samples.
    """
    settings = {
        "max_new_tokens": 16,
        "do_sample": True,
        "top_k": 0,
        "pad_token_id": 0,
        "num_return_sequences": 4,
    }
    torch.manual_seed(3)
    wanted = tiny_model.generate(PROMPTS, **settings)
    with attach(
        tiny_model, "codes", progress=False, calibration_tokens=256, kl_budget=1e-6
    ) as attachment:
        attachment.head.crossover_rows = 64
        torch.manual_seed(3)
        got = tiny_model.generate(PROMPTS, **settings)
    assert (got == wanted).float().mean() > 0.9


def test_prefill_asks_for_one_position(exact) -> None:  # type: ignore[no-untyped-def]
    """Catches a prefill that multiplies every position: the head sees one row a sequence a step."""
    head = head_of(exact)
    head.stats.reset()
    exact.generate(PROMPTS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert head.stats.rows == 2 * 3


def test_gradients_take_the_dense_product(exact) -> None:  # type: ignore[no-untyped-def]
    """Catches a training step through a search that has no gradient."""
    exact.train()
    try:
        loss = exact(input_ids=PROMPTS, labels=PROMPTS).loss
        loss.backward()
    finally:
        exact.eval()
    assert exact.get_output_embeddings().weight.grad.abs().sum() > 0
    exact.zero_grad()


def test_non_finite_states_stay_non_finite(exact) -> None:  # type: ignore[no-untyped-def]
    """Catches a NaN hidden state that comes back as a confident token."""
    head = head_of(exact)
    hidden = torch.randn(1, 48)
    hidden[0, 3] = float("nan")
    assert head(hidden).isnan().all()
    with pytest.raises(FlashHeadError, match="NaN"):
        head.search(hidden)


def test_attach_and_detach_leave_no_trace(tiny_model) -> None:  # type: ignore[no-untyped-def]
    """Catches a head that stays, a second attach on top,
    and weights that came apart from the embedding.
    """
    before = tiny_model.get_output_embeddings()
    attachment = attach(tiny_model, "codes", progress=False, calibration_tokens=64)
    head = head_of(tiny_model)
    assert head.weight is tiny_model.get_input_embeddings().weight
    with pytest.raises(FlashHeadError, match="already"):
        attach(tiny_model, "codes", progress=False)
    attachment.detach()
    attachment.detach()
    assert tiny_model.get_output_embeddings() is before
    with pytest.raises(FlashHeadError, match="no FlashHead"):
        head_of(tiny_model)


def test_changed_weights_are_noticed() -> None:
    """Catches a stale index after training or resizing."""
    linear = nn.Linear(16, 40, bias=False)
    from flashhead.index.build_codes import build_codes

    head = FlashHead(linear, build_codes(linear.weight, flashhead.CodesOptions()))
    with torch.no_grad():
        linear.weight.add_(1.0)
    with pytest.raises(FlashHeadError, match="changed"):
        head.search(torch.randn(1, 16))


def test_bias_and_untied_heads() -> None:
    """Catches a bias that is dropped by the scan or by the rescoring."""
    from flashhead.index.build_codes import build_codes

    torch.manual_seed(0)
    linear = nn.Linear(32, 300)
    with torch.no_grad():
        linear.bias.normal_(std=3)
    hidden = torch.randn(20, 32)
    head = FlashHead(linear, build_codes(linear.weight, flashhead.CodesOptions(), hidden))
    output = head.search(hidden)
    assert torch.equal(output.logits.argmax(1), linear(hidden).argmax(1))
    assert head.search(hidden[:0]).logits.shape == (0, 300)


@pytest.mark.parametrize("head", ["codes", "clusters"])
def test_convert_and_load(tiny_folder, tmp_path, head: str) -> None:  # type: ignore[no-untyped-def]
    """Catches a folder that plain transformers cannot read,
    or an index that is not the one that was saved.
    """
    out = tmp_path / "converted"
    report = convert(tiny_folder, out, head=head, progress=False, calibration_tokens=64)
    assert report["index_bytes"] == (out / INDEX_FILE).stat().st_size
    assert sorted(tmp_path.iterdir()) == [out]
    loaded = flashhead.load(str(out), dtype=torch.float32, progress=False)
    assert head_of(loaded).kind == head
    plain = load_dense(str(out), dtype=torch.float32)
    assert type(plain.get_output_embeddings()) is nn.Linear
    hidden = torch.randn(4, 48)
    assert torch.equal(plain.lm_head(hidden), head_of(loaded).dense(hidden))
    with pytest.raises(FlashHeadError, match="exists"):
        convert(tiny_folder, out, progress=False)


@pytest.mark.parametrize(
    "damage", ["truncated", "altered", "version", "weights", "missing", "shape"]
)
def test_damaged_folders_are_refused(tiny_folder, tmp_path, damage: str) -> None:  # type: ignore[no-untyped-def]
    """Catches an index that loads although it is cut short, altered, newer, or of other weights."""
    out = tmp_path / "converted"
    convert(tiny_folder, out, progress=False, calibration_tokens=64)
    index, config = out / INDEX_FILE, json.loads((out / "config.json").read_text())
    data = index.read_bytes()
    if damage == "truncated":
        index.write_bytes(data[:-100])
    elif damage == "altered":
        index.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        index.unlink()
    else:
        key, value = {
            "version": ("format_version", 99),
            "weights": ("head_sha256", "0" * 64),
            "shape": ("vocab_size", 7),
        }[damage]
        config["flashhead"][key] = value
        (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlashHeadError) as error:
        flashhead.load(str(out), progress=False)
    assert "\n" not in str(error.value)
    assert "convert the model again" in str(error.value)


def test_interrupted_convert_leaves_nothing(tiny_folder, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Catches a half folder after Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashhead.convert.head.save_index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_folder, tmp_path / "out", progress=False, calibration_tokens=64)
    assert list(tmp_path.iterdir()) == []


def test_saved_index_refuses_other_build_options(tiny_folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Catches an option that is silently ignored."""
    out = tmp_path / "converted"
    convert(tiny_folder, out, progress=False, calibration_tokens=64)
    head = head_of(flashhead.load(str(out), progress=False, failure_probability=1e-9))
    assert head.index.options.failure_probability == 1e-9
    other = 1.0 if head.index.options.bits != 1.0 else 2.0
    with pytest.raises(FlashHeadError, match=f"bits={other}"):
        flashhead.load(str(out), progress=False, bits=other)
    with pytest.raises(FlashHeadError, match="unknown option 'speed'"):
        flashhead.load(str(out), progress=False, speed=11)
    with pytest.raises(FlashHeadError, match="takes no options"):
        flashhead.load(str(out), "dense", progress=False, failure_probability=1e-9)


def test_logits_are_capped_and_scaled_after_the_head() -> None:
    """Catches a Gemma 2 or Granite whose head was compared before its soft cap or its scale."""
    from transformers import Gemma2Config, GraniteConfig, LlamaConfig

    logits = torch.tensor([[60.0, -5.0]])
    capped = logit_postprocess(Gemma2Config(final_logit_softcapping=30.0))(logits)
    assert torch.allclose(capped, 30 * torch.tanh(logits / 30))
    assert torch.allclose(logit_postprocess(GraniteConfig(logits_scaling=4.0))(logits), logits / 4)
    assert torch.equal(logit_postprocess(LlamaConfig())(logits), logits)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_soft_caps_and_scales_survive(family: str) -> None:
    """Catches a replaced head that bypasses what the model does to its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 301,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
    }
    special = {
        "gemma2": {"final_logit_softcapping": 0.5},
        "granite": {"logits_scaling": 8.0},
        "cohere": {"logit_scale": 0.1},
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes, **special[family])
    ).eval()
    ids = torch.tensor([[1, 4, 9]])
    with torch.no_grad():
        wanted = model(input_ids=ids, logits_to_keep=1).logits
        with attach(
            model, "codes", progress=False, calibration_tokens=64, kl_budget=1e-6
        ) as attachment:
            attachment.head.crossover_rows = 8
            got = model(input_ids=ids, logits_to_keep=1).logits
            assert attachment.head.stats.dense_rows == 0
    assert (
        got - wanted
    ).std() <= 0.02 * wanted.std()  # a missing cap or scale changes the size, not the noise
    assert got.argmax() == wanted.argmax()


def test_import_needs_torch_only() -> None:
    """Catches an import of transformers or numba at the top,
    and a side effect on torch's settings.
    """
    code = (
        "import sys, torch; before = (torch.get_num_threads(), torch.is_grad_enabled());"
        "import flashhead;"
        "bad = {'transformers', 'numba', 'safetensors', 'vllm', 'llvmlite'} & set(sys.modules);"
        "assert not bad, bad;"
        "assert before == (torch.get_num_threads(), torch.is_grad_enabled())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

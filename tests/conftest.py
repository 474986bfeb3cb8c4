"""Small models and heads, built here; nothing is downloaded."""

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # two thread pools share the cores of a test machine
os.environ["FLASHHEAD_TUNE_CACHE"] = "0"  # the user's tune.json is neither read nor written

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

IMPLS = ("reference", "cpu")


def clustered_head(
    rows: int, d: int, seed: int = 0, states: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """A head and hidden states with what real ones have: a common row, a steep spectrum, a mean
    hidden state.

    Returns:
        weight `bfloat16[rows, d]`, hidden `float32[states, d]`.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, d + 1).float().rsqrt()
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    weight = torch.randn(rows, d, generator=generator) * spectrum @ basis + torch.randn(
        d, generator=generator
    )
    hidden = torch.randn(states, d, generator=generator) * spectrum @ basis + torch.randn(
        d, generator=generator
    )
    return weight.bfloat16(), 4 * hidden


@pytest.fixture(scope="session")
def tiny_model():  # type: ignore[no-untyped-def]
    """A Llama of 2 layers with a tied head of 515 x 48, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=515,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory):  # type: ignore[no-untyped-def]
    """The tiny model as a Hugging Face folder with a tokenizer of 515 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 515)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def decoder(tiny_model, tiny_folder):  # type: ignore[no-untyped-def]
    """Both heads of the tiny model, in float32, whose dense argmax has no ties of rounding; nothing
    ends its texts.
    """
    from flashhead.cli.session import encode
    from flashhead.integrations.transformers import attach, load_tokenizer
    from flashhead.playground.decode import SideBySide

    dtype, ends = tiny_model.dtype, tiny_model.generation_config.eos_token_id
    tiny_model.float()
    tokenizer = load_tokenizer(tiny_folder)
    with attach(tiny_model, "codes", progress=False, calibration_tokens=256) as attachment:
        attachment.head.crossover_rows = attachment.head.token_crossover_rows = 1
        made = SideBySide(tiny_model, tokenizer, encode)
        made.ends = frozenset()
        yield made
    tiny_model.to(dtype)
    assert tiny_model.generation_config.eos_token_id == ends

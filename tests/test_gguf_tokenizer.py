"""Tokenizers made of tiny GGUF files, right ones and such as old versions of transformers made."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flashhead import models as embedded
from flashhead.errors import FlashHeadError
from flashhead.integrations import gguf_tokenizer
from flashhead.integrations import transformers as integration

SPECIALS = ["<unk>", "<s>", "</s>"]
TEXT = [
    "the quick brown fox jumps over the lazy dog 1 2 3",
    "a fox and a dog jump over the fox",
] * 9
KINDS = {"gpt2": "llama", "llama": "gemma3"}
"""`tokenizer.ggml.model` -> architecture: merges in the file, or made up from its vocabulary."""


def trained(kind: str) -> dict:
    """Vocabulary and merges of a BPE that was trained on `TEXT`."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "gpt2" else []
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "gpt2"
        else pre_tokenizers.Metaspace(prepend_scheme="never")
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return json.loads(tokenizer.to_str())["model"]


def write_gguf(file: Path, kind: str, add_bos: bool) -> None:
    """A model of one layer, hidden size 32, whose tensors are noise."""
    model = trained(kind)
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = GGUFWriter(file, KINDS[kind])
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    if kind == "gpt2":
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    else:
        writer.add_token_scores([float(-i) for i in range(len(tokens))])
        writer.add_add_space_prefix(False)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (32, 32)
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    if KINDS[kind] == "gemma3":
        shapes |= {"blk.0.attn_q_norm": (16,), "blk.0.attn_k_norm": (16,)}
        shapes |= {"blk.0.post_attention_norm": (32,), "blk.0.post_ffw_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=[("gpt2", False), ("gpt2", True), ("llama", True)])
def gguf(request, tmp_path_factory) -> Path:
    """A tiny GGUF file."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, *request.param)
    return file


def rebuilt(tokenizer, change, **names) -> PreTrainedTokenizerFast:
    """The same tokenizer after a change of its tokenizer.json or of the names of its tokens."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **names)


def without_merges(parts: dict) -> None:
    """What transformers 5.17 makes of Gemma 3."""
    parts["model"]["merges"] = []


def shifted(parts: dict) -> None:
    """Words whose ids went to their neighbours."""
    vocabulary = parts["model"]["vocab"]
    words = [entry for entry in vocabulary if len(entry) > 3 and entry not in SPECIALS]
    ids = [vocabulary[entry] for entry in words]
    vocabulary.update(zip(words, ids[1:] + ids[:1], strict=True))


def other_bos(parts: dict) -> None:
    """BOS where the file wants none, or the other way round: 5.18 to 5.22 with Gemma 3."""
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    old = parts["post_processor"] or {"single": []}
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [text] if bos in old["single"] else [bos, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


def broken_decoder(parts: dict) -> None:
    """Text that comes back with its blanks' marks."""
    parts["decoder"] = {"type": "Fuse"}


def unchanged(parts: dict) -> None:
    """The right tokenizer."""


FAULTS = [
    (without_merges, {}, "words of its vocabulary fall to pieces"),
    (shifted, {}, "wanted "),
    (other_bos, {}, "BOS is (left out|added) against the file"),
    (broken_decoder, {}, "text does not come back"),
    (unchanged, {"eos_token": "<s>"}, "EOS is token 1, wanted 2"),  # 5.17 with SmolLM2
]


def test_right_tokenizers_pass(gguf, tmp_path):
    """A proof that refuses what is right, from the file or from the folder made of it."""
    tokenizer = integration.load_tokenizer(str(gguf))
    words = gguf_tokenizer._words(gguf_tokenizer.read_metadata(gguf))
    assert {"quick", "brown", "fox"} <= {entry[1:] for entry in words.values()}
    integration.gguf_to_folder(gguf, tmp_path)
    assert not gguf_tokenizer.in_doubt(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT[0])["input_ids"] == tokenizer(TEXT[0])["input_ids"]
    gguf_tokenizer.prove_tokenizer(rebuilt(tokenizer, unchanged), gguf)


@pytest.mark.parametrize(("change", "names", "message"), FAULTS)
def test_broken_tokenizers_are_refused(gguf, tmp_path, monkeypatch, change, names, message):
    """A model with the perplexity of noise, and no error: perplexity 7,117 for 46."""
    broken = rebuilt(integration.load_tokenizer(str(gguf)), change, **names)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: broken)
    for action in (
        lambda: integration.load_tokenizer(str(gguf)),
        lambda: integration.gguf_to_folder(gguf, tmp_path),
    ):
        with pytest.raises(FlashHeadError, match=message) as caught:
            action()
        assert not (tmp_path / gguf_tokenizer.PROOF).exists()
        assert "pip install 'transformers==5.23.0'" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_ends_are_asked_for(gguf, monkeypatch):
    """Versions 5.18 to 5.22, which do not read the file's flag themselves."""
    asked, right = {}, integration.load_tokenizer(str(gguf))
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda source, **where: asked.update(where) or right
    )
    integration.load_tokenizer(str(gguf))
    assert asked["add_bos_token"] == (right("a")["input_ids"][0] == 1)


def test_folder_is_proved_and_not_only_the_file(gguf, tmp_path, monkeypatch):
    """A tokenizer that is right in memory and wrong once it was saved."""
    right = integration.load_tokenizer(str(gguf))
    broken = rebuilt(right, without_merges)
    monkeypatch.setattr(
        AutoTokenizer,
        "from_pretrained",
        lambda source, **where: right if "gguf_file" in where else broken,
    )
    with pytest.raises(FlashHeadError, match="fall to pieces"):
        integration.gguf_to_folder(gguf, tmp_path)


@pytest.mark.parametrize("old", ["5.0.0", "5.9.0", "5.17.0"])
def test_old_transformers_is_refused(gguf, tmp_path, monkeypatch, old):
    """Minutes of downloads before the error, or none at all."""
    monkeypatch.setattr(gguf_tokenizer, "version", lambda _: old)
    monkeypatch.setattr(embedded, "_download", pytest.fail)
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path))
    for action in (
        lambda: integration.load(str(gguf)),
        lambda: integration.load_tokenizer(str(gguf)),
        lambda: embedded.embedded_folder("gemma-3-270m"),
    ):
        with pytest.raises(FlashHeadError, match=f"transformers {old} makes wrong") as caught:
            action()
        assert "pip install 'transformers>=5.18'" in str(caught.value)


def test_new_versions_are_not_old(monkeypatch):
    """5.100 below 5.18 as text, or a development version refused."""
    for new in ("5.18.0", "5.18.0.dev0", "5.100.0", "6.0"):
        monkeypatch.setattr(gguf_tokenizer, "version", lambda _, new=new: new)
        gguf_tokenizer.require_transformers()


def test_metadata_is_what_the_reader_of_gguf_says(gguf):
    """A value read at the wrong place."""
    ours = gguf_tokenizer.read_metadata(gguf)
    fields = {
        name: field.contents()
        for name, field in GGUFReader(gguf).fields.items()
        if not name.startswith("GGUF.")
    }
    assert ours == fields


def test_damaged_files_give_one_line(gguf, tmp_path):
    """struct.error in the user's face."""
    whole = gguf.read_bytes()
    file = tmp_path / "x.gguf"
    for content in (b"", b"PK" + whole[2:], whole[:100], whole[:2000]):
        file.write_bytes(content)
        with pytest.raises(FlashHeadError, match="GGUF"):
            gguf_tokenizer.read_metadata(file)


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IQ", 8, 1 << 62),  # a string
        struct.pack("<IIQ", 9, 5, 1 << 61),  # an array of numbers
        struct.pack("<IIQ", 9, 8, 1 << 62),  # of strings
        struct.pack("<IIQ", 9, 9, 1) * 3000,  # of arrays of arrays
        struct.pack("<I", 77),  # of no type
    ],
)
def test_lengths_beyond_the_file_are_damage(value, tmp_path):
    """Catches memory that is asked for before a size is checked, and endless nesting."""
    file = tmp_path / "m.gguf"
    file.write_bytes(struct.pack("<4sIQQQ1s", b"GGUF", 3, 0, 1, 1, b"k") + value)
    with pytest.raises(FlashHeadError, match="metadata of this GGUF file is damaged"):
        gguf_tokenizer.read_metadata(file)


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.ggml.tokens": 7},
        {"tokenizer.ggml.tokens": ["a", 7]},
        {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1]},
    ],
)
def test_vocabularies_of_another_form_are_refused(metadata):
    with pytest.raises(FlashHeadError, match="wanted"):
        gguf_tokenizer._words(metadata)

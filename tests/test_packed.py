"""Linear layers that stay packed on a CPU: the same layer, fewer bytes, nothing unpacked unsaid."""

import logging

import pytest
import torch
from compressed_tensors.quantization import disable_quantization
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from flashhead.convert.quantize import Quantized
from flashhead.errors import FlashHeadError
from flashhead.integrations.transformers import load, load_dense
from flashhead.nn.packed import Int4Linear, Int8Linear, int4_suits


def tiny(hidden: int = 64, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=515,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=bias,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if bias:
        for layer in model.model.layers:
            nn.init.normal_(layer.self_attn.q_proj.bias)
    return model


@pytest.fixture
def folder(tmp_path, request):
    Quantized(tiny(bias=True), request.param, progress=False).save(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "group"), [(48, 96, 32), (64, 640, 128), (16, 64, 64)])
@pytest.mark.parametrize("tokens", [1, 3, 17, 130])
def test_the_products_are_those_of_the_unpacked_weight(dtype, rows, columns, group, tokens):
    """Catches swapped nibbles, scales of the wrong group, a zero point that is off."""
    torch.manual_seed(rows + tokens)
    x = torch.randn(2, tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype)
    scales = (torch.rand(rows, columns // group) + 0.5).bfloat16()
    four = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    eight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    cases = [
        (Int4Linear(four, scales, bias), four, scales),
        (Int8Linear(eight, scales[:, 0], bias), eight, scales[:, :1]),
    ]
    for layer, codes, wide in cases:
        weight = (codes.view(rows, wide.shape[1], -1).double() * wide[..., None].double()).flatten(
            1
        )
        truth = x.double() @ weight.T + bias.double()
        mass = x.double().abs() @ weight.abs().T + bias.double().abs()
        # forward error of a float32 sum in any order, and of roundings of weights, sum and result
        bound = columns * 2**-23 * mass + torch.finfo(dtype).eps * (mass + 2 * truth.abs())
        found = layer(x)
        assert (found.shape, found.dtype) == ((2, tokens, rows), dtype)
        assert bool(((found.double() - truth).abs() <= bound).all())


@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_tensors_that_are_not_aligned(tokens):
    """torch's 8-bit product reads aligned addresses: a mapped file or a slice crashed it."""
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (48 * 64 + 1,), dtype=torch.int8)[1:].view(48, 64)
    scales, x = torch.rand(49).bfloat16()[1:], torch.randn(tokens * 64 + 3).bfloat16()[3:]
    layer, x = Int8Linear(codes, scales, None), x.view(tokens, 64)
    truth = x.double() @ codes.double().T * scales.double()
    assert (layer(x).double() - truth).abs().max() <= 2**-7 * truth.abs().max()
    four = Int4Linear(codes.clamp(-8, 7), torch.ones(48, 2).bfloat16(), None)
    truth = x.double() @ codes.clamp(-8, 7).double().T
    assert (four(x).double() - truth).abs().max() <= 2**-7 * truth.abs().max()


def test_shapes_without_a_product_are_an_error():
    assert int4_suits(16, 64, 1)
    assert not int4_suits(24, 64, 1)
    assert not int4_suits(16, 96, 2)
    with pytest.raises(ValueError, match="rows in multiples of 16"):
        Int4Linear(torch.zeros(24, 64, dtype=torch.int8), torch.ones(24, 1), None)


@pytest.mark.parametrize(
    ("folder", "kind"), [("w4a16", Int4Linear), ("w8a8-int8", Int8Linear)], indirect=["folder"]
)
def test_a_checkpoint_stays_packed_and_says_the_same(folder, kind):
    """Every layer but the head, biases too; logits those of the unpacked model but for rounding."""
    unpacked = load_dense(folder, dtype=torch.float32)
    packed = load_dense(folder, dtype=torch.float32, packed=True)
    kinds = [type(m) for m in packed.modules() if isinstance(m, (kind, nn.Linear))]
    assert kinds.count(kind) == 14
    assert kinds.count(nn.Linear) == 1  # the head
    for module in unpacked.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            disable_quantization(module)  # of activations, which stay exact in packed layers
    tokens = torch.randint(0, 515, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = unpacked(tokens).logits, packed(tokens).logits
    assert (wanted - found).abs().max() <= 1e-4 * wanted.abs().max()
    stored = sum(t.nbytes for m in packed.modules() if isinstance(m, kind) for t in m.buffers())
    assert stored < 0.6 * sum(
        m.weight.nbytes / 2 for m in unpacked.modules() if isinstance(m, nn.Linear)
    )


@pytest.mark.parametrize("folder", ["w4a16"], indirect=True)
def test_load_leaves_it_packed_and_says_so(folder, caplog):
    """generate() runs on the packed layers by default, on a CPU."""
    with caplog.at_level(logging.INFO, logger="flashhead"):
        model = load(folder, "dense", progress=False)
    assert any("14 linear layers stay packed" in record.message for record in caplog.records)
    assert isinstance(model.model.layers[0].mlp.up_proj, Int4Linear)
    out = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=5, min_new_tokens=5)
    assert out.shape == (1, 8)
    unpacked = load(folder, "dense", packed=False, progress=False)
    assert isinstance(unpacked.model.layers[0].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("folder", ["fp8"], indirect=True)
def test_what_has_no_product_is_unpacked_or_refused(folder, caplog):
    with caplog.at_level(logging.INFO, logger="flashhead"):
        model = load(folder, "dense", progress=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert any("14 of 14 packed layers are unpacked" in r.message for r in caplog.records)
    with pytest.raises(FlashHeadError, match=r"packed=True: model\.layers\.0\.self_attn\.q_proj"):
        load(folder, "dense", packed=True, progress=False)


def test_a_plain_checkpoint_has_nothing_packed(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert isinstance(load(str(tmp_path), "dense", progress=False).lm_head, nn.Linear)
    with pytest.raises(FlashHeadError, match="no packed linear layers"):
        load(str(tmp_path), "dense", packed=True, progress=False)

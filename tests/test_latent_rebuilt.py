"""Latent decode with rebuilt keys: against float64, and against attention over the keys."""

import pytest
import torch

pytest.importorskip("triton")

from test_latent_decode import DEVICE, HALF, IMPLS, in_pages, ints, normal, problem

from flashhead.errors import FlashHeadError
from flashhead.nn.rotary import RotaryTable
from flashhead.ops.latent_decode import reference
from flashhead.ops.latent_decode.blocks import Blocks
from flashhead.ops.latent_decode.rebuilt import latent_decode_rebuilt
from flashhead.ops.latent_decode.reference import KeyUp
from flashhead.ops.latent_decode.rows import KINDS

SPLITS = Blocks(tokens=16, splits=3, stages=1)


def make_up(kv_heads, head_dim, rank, turned, constant=True, dtype=HALF):
    table = RotaryTable.of_base(2 * turned) if turned else RotaryTable(torch.empty(0))
    cos, sin = table.at(0, 256, torch.empty(0, device=DEVICE))
    weight = normal(kv_heads * head_dim, rank, seed=7, dtype=dtype) / rank**0.5
    added = normal(kv_heads * head_dim, seed=8, dtype=dtype) if constant else None
    return KeyUp(weight, kv_heads, cos.contiguous(), sin.contiguous(), added)


def check(query, latent, up, lengths, impl, first_index=0, blocks=SPLITS, **seen):
    """Run, compare with float64: as exact as a few times eager torch in the same dtype."""
    given = {"scale": 0.2, "first_index": first_index, "impl": impl, **seen}
    blocks = blocks if impl == "triton" else None
    out, lse = latent_decode_rebuilt(query, latent, up, lengths, **given, blocks=blocks)
    rest = [seen.get(name) for name in ("table", "starts", "bias")]
    right, rough = (
        reference.latent_decode_rebuilt(query, latent, up, first_index, lengths, *rest, 0.2, dtype)
        for dtype in (torch.float64, query.dtype)
    )
    # codes are widened to 16 bits whatever the query's dtype
    unit = 0 if latent.scale is None else torch.finfo(torch.bfloat16).eps
    unit = max(unit, torch.finfo(query.dtype).eps)
    limit = 3 * (rough[0].double() - right[0]).abs().max() + 8 * unit * right[0].abs().max()
    assert ((out.double() - right[0]).abs() <= limit).all()
    finite = right[1] > -torch.inf
    assert torch.equal(finite, lse > -torch.inf)
    limit = 3 * (rough[1].double() - right[1])[finite].abs().max() + 16 * unit
    assert ((lse - right[1]).abs() <= limit)[finite].all()
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rank", "turned"),
    [(4, 2, 32, 64, 16), (9, 3, 24, 40, 4), (6, 1, 40, 96, 20), (3, 3, 16, 32, 0)],
)
def test_shapes_and_formats(heads, kv_heads, head_dim, rank, turned, kind, impl):
    """A key of another head, halves that turn the wrong way, coordinates that turn and should not,
    an even coordinate where an odd one belongs.
    """
    _, latent, _, lengths = problem([70, 0, 33], heads, rank, 0, kind)
    query = normal(3, heads, head_dim, seed=3, dtype=HALF)
    out = check(query, latent, make_up(kv_heads, head_dim, rank, turned), lengths, impl, 5)
    assert not out[1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_seen(impl):
    """A mask, a window or a block of another row; no constant."""
    query, latent, rotary, lengths = problem([70, 0, 33], 4, 64, 16)
    paged, table = in_pages(latent, rotary, lengths, 16)
    bias = normal(3, 4, table.shape[1] * 16, seed=5)
    bias[..., ::7] = -torch.inf
    query = normal(3, 4, 32, seed=3, dtype=HALF)
    up = make_up(2, 32, 64, 16, constant=False)
    seen = {"bias": bias, "starts": ints([33, 0, 2])}
    a = check(query, latent, up, lengths, impl, **seen)
    b = check(query, paged[0], up, lengths, impl, table=table, **seen)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_attention_over_keys(impl):
    """A specification that is wrong itself: here keys are made by hand, one after the other."""
    _, latent, _, lengths = problem([20], 4, 24, 0, dtype=torch.float32)
    up = make_up(2, 8, 24, 3, dtype=torch.float32)
    query = normal(1, 4, 8, seed=3)
    out, _ = latent_decode_rebuilt(query, latent, up, lengths, scale=0.5, first_index=9, impl=impl)
    for head in range(4):
        scores = []
        for token in range(20):
            key = up.weight.view(2, 8, 24)[head // 2] @ latent.codes[0, token]
            key = key + up.constant.view(2, 8)[head // 2]
            angles = torch.complex(up.cos[9 + token], up.sin[9 + token])
            turned = torch.complex(key[:3], key[3:6]) * angles
            key = torch.cat((turned.real, turned.imag, key[6:]))
            scores.append(query[0, head] @ key * 0.5)
        wanted = torch.stack(scores).softmax(0) @ latent.codes[0]
        torch.testing.assert_close(out[0, head], wanted, rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    """A kernel run on memory that is not what it takes it for."""
    _, latent, _, lengths = problem([4, 4], 2, 32, 0)
    query, up = normal(2, 4, 16, dtype=HALF), make_up(2, 16, 32, 8)
    good = {"query": query, "latent": latent, "up": up, "lengths": lengths, "scale": 1.0}
    change = lambda **values: KeyUp(**{**vars(up), **values})  # noqa: E731
    for name, value, word in (
        ("query", query[:, :3], "KV heads"),
        ("up", change(weight=up.weight[1:]), "weight"),
        ("up", change(constant=up.weight), "constant"),
        ("up", change(cos=up.cos.double()), "cos"),
        ("up", change(sin=up.sin[:, 1:]), "sin"),
        ("first_index", 253, "angles"),
        ("blocks", Blocks(hopper=True), "blocks"),
        ("impl", "fast", "impl"),
    ):
        with pytest.raises(FlashHeadError, match=word):
            latent_decode_rebuilt(**(good | {"impl": "triton"} | {name: value}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_cuda_graph(kind):
    """A wait for the host or a grid that depends on lengths, at the size of a real model."""
    lengths = [4096, 1, 65, 2048]
    _, latent, _, held = problem(lengths, 9, 192, 0, kind, group=64)
    cos, sin = RotaryTable.of_base(64).at(0, 4096, torch.empty(0, device=DEVICE))
    up = make_up(3, 64, 192, 32)
    up = KeyUp(up.weight, 3, cos.contiguous(), sin.contiguous(), up.constant)
    query = normal(4, 9, 64, seed=3, dtype=HALF)

    def attend():
        return latent_decode_rebuilt(query, latent, up, held, scale=0.2)[0]

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    held.copy_(ints([100, 1, 64, 2000]))
    graph.replay()
    assert torch.equal(out, check(query, latent, up, held, "triton", blocks=None))

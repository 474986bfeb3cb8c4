"""Latent decode against float64: reference, CPU, and the Triton kernels (interpreted, or on a GPU).

An implementation may be a few times as wrong as eager torch in the same dtype, never more.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from flashhead.errors import FlashHeadError
from flashhead.ops.latent_decode import api, reference, triton_launch
from flashhead.ops.latent_decode.blocks import MOST_SPLITS, Blocks, choose_splits
from flashhead.ops.latent_decode.rows import KINDS, Rows

DEVICE = "cpu" if triton_launch.IS_INTERPRETED else "cuda"
IMPLS = ["triton"] if DEVICE == "cuda" else ["reference", "cpu", "triton"]
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16
SPLITS = Blocks(tokens=16, splits=3, stages=1)


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def problem(lengths, heads, rank, rope, kind="bf16", rotary_kind="bf16", dtype=HALF, group=32):
    """Query, latent, rotary, lengths; what lies beyond a row's length is NaN where it can be."""
    batch, tokens = len(lengths), max(*lengths, 1)
    latent = normal(batch, tokens, rank, seed=1, dtype=dtype)
    rotary = normal(batch, tokens, rope, seed=2, dtype=dtype) if rope else None
    latent = Rows.of(latent, kind, group)
    if rope:
        rotary = Rows.of(rotary, rotary_kind, group)
    for rows in (latent, rotary):
        if rows is None:
            continue
        poisoned = rows.codes if rows.scale is None else rows.scale
        for row, length in enumerate(lengths):
            poisoned[row, length:] = torch.nan
    query = normal(batch, heads, rank + rope, seed=3, dtype=dtype)
    return query, latent, rotary, ints(lengths)


def eager(query, latent, rotary, lengths, scale, **seen):
    """Plain attention in the query's dtype, without ranges or splits."""
    return truth(query, latent, rotary, lengths, scale, **seen, dtype=query.dtype)


def truth(
    query, latent, rotary, lengths, scale, table=None, starts=None, bias=None, dtype=torch.float64
):
    return reference.latent_decode(
        query, latent, rotary, lengths, table, starts, bias, scale, dtype
    )


def check(query, latent, rotary, lengths, scale, impl, blocks=None, **seen):
    """Run, compare with float64, return what came out."""
    blocks = blocks if impl == "triton" else None
    out, lse = api.latent_decode(
        query, latent, lengths, scale=scale, rotary=rotary, impl=impl, blocks=blocks, **seen
    )
    right, right_lse = truth(query, latent, rotary, lengths, scale, **seen)
    rough, _ = eager(query, latent, rotary, lengths, scale, **seen)
    coded = latent.scale is not None or (rotary is not None and rotary.scale is not None)
    # codes are widened to 16 bits whatever the query's dtype
    unit = torch.finfo(torch.float16 if impl == "triton" else torch.bfloat16).eps if coded else 0
    unit = max(unit, torch.finfo(query.dtype).eps)
    size = right.abs().amax(-1, keepdim=True)
    error = (rough.double() - right).abs().amax()
    assert ((out.double() - right).abs() <= 3 * error + 4 * unit * size).all()
    finite = right_lse > -torch.inf
    assert torch.equal(finite, lse > -torch.inf)
    # a score is a sum of rank products, each rounded once
    reach = (query.double() * scale).norm(dim=-1) * 1.5 * latent.width**0.5
    limit = unit * (4 * right_lse.abs() + reach)
    assert ((lse - right_lse).abs() <= limit)[finite].all()
    return out, lse


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("heads", "rank", "rope"), [(4, 64, 16), (5, 96, 0), (20, 100, 24), (33, 192, 64), (1, 16, 2)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_formats_and_shapes(kind, heads, rank, rope, impl):
    """A nibble or scale of another place, padding that counts, rows that see each other's tokens,
    a row without tokens that is not 0.
    """
    given = problem([70, 0, 33], heads, rank, rope, kind)
    out, lse = check(*given, 0.2, impl, SPLITS)
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rotary_kind", ["fp8", "int8", "int4"])
def test_rotary_in_few_bits(rotary_kind, impl):
    """Scales of the latent used for the rotary key, or the reverse."""
    check(*problem([40, 17], 6, 64, 24, "int4", rotary_kind), 0.2, impl, SPLITS)
    check(*problem([40, 17], 6, 64, 24, "bf16", rotary_kind), 0.2, impl, SPLITS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [1, 63, 64, 65])
@pytest.mark.parametrize("splits", [1, 4])
def test_lengths_around_a_tile(length, splits, impl):
    """A token too many or too few where a tile or a split ends."""
    blocks = Blocks(tokens=64, splits=splits)
    check(*problem([length, 130], 4, 32, 16), 0.3, impl, blocks)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "triton" or DEVICE == "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows(kind, impl):
    """Sums that lose precision, or offsets that overflow, over 32,769 tokens."""
    check(*problem([32_769, 5], 4, 64, 16, kind), 0.2, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_softmax_extremes(impl):
    """exp of what is too large, inf - inf, a division by a sum of 0."""
    query, latent, rotary, lengths = problem([65, 65, 65, 65], 3, 32, 0)
    query[0] *= 30
    latent.codes[0, 40] = query[0, 0] / 8  # one huge score
    query[1] = 0  # all equal
    query[2] *= -1e-3
    bias = torch.zeros(4, 1, 65, device=DEVICE)
    bias[2, :, 5:] = -torch.inf
    bias[3] = -torch.inf  # sees nothing
    out, lse = check(query, latent, rotary, lengths, 1.0, impl, SPLITS, bias=bias)
    assert not out[3].any()
    assert (lse[3] == -torch.inf).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (3, 1), (1, 5), (3, 5)])
def test_bias(rows, heads, impl):
    """A bias of another row, head or token."""
    given = problem([37, 20, 64], 5, 32, 16)
    bias = 2 * normal(rows, heads, 64, seed=5)
    bias[..., ::7] = -torch.inf
    check(*given, 0.2, impl, SPLITS, bias=bias)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_sliding_window(kind, impl):
    """Tokens before the window read, NaN among them, or a tile skipped too many."""
    query, latent, rotary, lengths = problem([70, 41, 9], 4, 64, 16, kind)
    starts = ints([33, 0, 9])
    poisoned = latent.codes if latent.scale is None else latent.scale
    poisoned[0, :33] = torch.nan
    out, _ = check(query, latent, rotary, lengths, 0.2, impl, SPLITS, starts=starts)
    assert not out[2].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 16, 24, 64])
def test_pages(kind, size, impl):
    """A block of another row, or a place in it that is not the token's; the latent and the rotary
    key are views of one cache.
    """
    query, latent, rotary, lengths = problem([70, 0, 33], 4, 64, 16, kind)
    paged, table = in_pages(latent, rotary, lengths, size)
    wanted = api.latent_decode(query, latent, lengths, scale=0.2, rotary=rotary, impl="reference")
    _, lse = check(query, *paged, lengths, 0.2, impl, SPLITS, table=table)
    torch.testing.assert_close(lse, wanted[1], rtol=2e-2, atol=2e-2)


def in_pages(latent, rotary, lengths, size):
    """The same rows in shuffled blocks; entries of the table that no row reads are nonsense."""
    most = -(-int(lengths.max()) // size)
    needed = [-(-n // size) for n in lengths.tolist()]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(4)).tolist()
    table = torch.full((len(lengths), most), 1 << 30, dtype=torch.int32)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    paged = []
    for rows in (latent, rotary):
        parts = [rows.codes] if rows.scale is None else [rows.codes, rows.scale]
        stored = []
        for part in parts:
            wide = torch.zeros(sum(needed), size, part.shape[2] + 16, dtype=part.dtype)
            wide = wide.to(DEVICE)
            blocks = wide[..., : part.shape[2]]  # a view with other strides
            for row, length in enumerate(lengths.tolist()):
                for token in range(length):
                    block = table[row, token // size]
                    blocks[block, token % size] = part[row, token]
            stored.append(blocks)
        paged.append(Rows(stored[0], rows.width, rows.kind, *stored[1:]))
    return paged, table.to(DEVICE)


@pytest.mark.parametrize("blocks", [
    Blocks(tokens=tokens, heads=heads, splits=splits)
    for tokens, heads, splits in itertools.product((16, 64), (16, 32), (1, 2, 7))
])  # fmt: skip
def test_every_cut_gives_the_same(blocks):
    """Splits that overlap or leave out tokens; empty splits whose memory is read."""
    check(*problem([100, 3, 0], 20, 64, 16), 0.2, "triton", blocks)


@settings(max_examples=25, deadline=None)
@given(
    programs=st.integers(1, 600), tiles=st.integers(1, 2000), multiprocessors=st.integers(1, 200)
)
def test_choice_of_splits(programs, tiles, multiprocessors):
    """A card that stands still although there is work; splits without tokens."""
    splits = choose_splits(programs, tiles, multiprocessors)
    assert 1 <= splits <= min(tiles, MOST_SPLITS)
    rounds = -(-programs * splits // multiprocessors)
    assert rounds * (-(-tiles // splits) + 2) <= -(-programs // multiprocessors) * (tiles + 2)


def test_no_rows():
    """A grid of nothing."""
    query, latent, _, _ = problem([4], 2, 32, 0)
    none = Rows(latent.codes[:0], 32)
    for impl in IMPLS:
        out, lse = api.latent_decode(query[:0], none, ints([]), scale=1.0, impl=impl)
        assert (out.shape, lse.shape) == ((0, 2, 32), (0, 2))


def test_bad_arguments():
    """A kernel run on memory that is not what it takes it for."""
    query, latent, rotary, lengths = problem([4, 4], 2, 32, 16, "int4")
    good = {"query": query, "latent": latent, "rotary": rotary, "lengths": lengths, "scale": 1.0}
    for change, word in (
        ({"query": query[..., 1:]}, "query"),
        ({"lengths": lengths.long()}, "lengths .* int32"),
        ({"lengths": lengths[:1]}, "lengths"),
        ({"table": lengths}, "table"),
        ({"rotary": None}, "query"),
        ({"starts": lengths[:1]}, "starts"),
        ({"bias": torch.zeros(2, 1, 3)}, "bias"),
        ({"longest": 5}, "longest"),
        ({"impl": "fast"}, "impl"),
        ({"impl": "reference", "blocks": Blocks()}, "blocks"),
    ):
        with pytest.raises(FlashHeadError, match=word):
            api.latent_decode(**(good | change))
    wide = Rows(normal(2, 4, 1025), 1025)
    with pytest.raises(FlashHeadError, match="rank"):
        api.latent_decode(normal(2, 2, 1025), wide, lengths, scale=1.0)
    for codes, width, kind, scale in (
        (latent.codes, 32, "bf16", None),
        (latent.codes, 32, "int4", None),
        (latent.codes, 40, "int4", latent.scale),
        (latent.codes, 32, "int8", latent.scale),
        (latent.codes, 32, "int4", latent.scale.float()),
        (latent.codes.mT, 32, "int4", latent.scale),
        (latent.codes, 32, "int3", latent.scale),
    ):
        with pytest.raises(FlashHeadError):
            Rows(codes, width, kind, scale)


def test_groups_that_no_kernel_has():
    """A scale of the wrong group where groups are not a power of two."""
    query, latent, rotary, lengths = problem([4], 2, 96, 0, "int8", group=24)
    with pytest.raises(FlashHeadError, match="groups of 24"):
        api.latent_decode(query, latent, lengths, scale=1.0, rotary=rotary, impl="triton")


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "rank", "rope"), [(4, 64, 16), (20, 192, 0), (32, 1024, 64), (128, 512, 128)]
)
@pytest.mark.parametrize("splits", [1, 3])
def test_hopper(kind, heads, rank, rope, splits):
    """A word or scale of another place, a buffer overwritten while it is read, a chunk's padding
    that counts; one row's NaN in another.
    """
    given = problem([700, 0, 33, 64, 65, 1], heads, rank, rope, kind, dtype=HALF, group=64)
    check(*given, rank**-0.5, "triton", Blocks(hopper=True, splits=splits))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 24, 64])
def test_hopper_sees_what_it_should(kind, size):
    """Blocks of another row, a window's or a mask's tokens read, a bias of another head."""
    query, latent, rotary, lengths = problem([300, 0, 33], 20, 256, 64, kind, group=64)
    paged, table = in_pages(latent, rotary, lengths, size)
    bias = normal(3, 20, table.shape[1] * size, seed=5)
    bias[..., ::7] = -torch.inf
    seen = {"table": table, "bias": bias, "starts": ints([129, 0, 5])}
    check(query, *paged, lengths, 0.06, "triton", Blocks(hopper=True, splits=2), **seen)


@pytest.mark.gpu
@needs_hopper
def test_hopper_is_the_same_every_time():
    """A race: the same numbers, another result."""
    given = problem([8192, 4000], 32, 1024, 64)
    call = {"scale": 0.03, "rotary": given[2], "blocks": Blocks(hopper=True)}
    first = api.latent_decode(given[0], given[1], given[3], **call)[0]
    for _ in range(50):
        assert torch.equal(first, api.latent_decode(given[0], given[1], given[3], **call)[0])


def test_hopper_where_it_cannot_run():
    """Another kernel instead of the one asked for."""
    query, latent, rotary, lengths = problem([4], 2, 32, 16, "int8", "int8")
    with pytest.raises(FlashHeadError, match=r"blocks\.hopper"):
        api.latent_decode(query, latent, lengths, scale=1.0, rotary=rotary, impl="triton",
                          blocks=Blocks(hopper=True))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "heads", "rank", "rope"), [(8, 32, 1024, 64), (3, 128, 512, 64)])
def test_in_a_cuda_graph(kind, batch, heads, rank, rope):
    """A wait for the host, a grid that depends on lengths, state left from the last replay; at
    sizes of real models.
    """
    lengths = [4096, 1, 63, 64, 65, 4001, 0, 2048][:batch]
    query, latent, rotary, held = problem(lengths, heads, rank, rope, kind, group=64)

    def attend():
        return api.latent_decode(query, latent, held, scale=0.02, rotary=rotary)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend()
    for shift in range(3):
        new = lengths[shift:] + lengths[:shift]
        new = [min(a, b) for a, b in zip(new, lengths, strict=True)]  # beyond it there is NaN
        held.copy_(ints(new))
        graph.replay()
        wanted = check(query, latent, rotary, held, 0.02, "triton")
        assert torch.equal(out, wanted[0])
        assert torch.equal(lse, wanted[1])

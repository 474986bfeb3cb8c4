"""Latent decode with keys rebuilt where they are read, on a GPU.

One program has a KV head, and a range of one row's tokens, tile by tile:

    keys[tokens, d] = turn(tile[tokens, r] @ up[r, d] + constant, index of the token)
    scores[tokens, heads] = keys @ query[d, heads]
    sums[r, heads] += tile.T @ weights[tokens, heads]

A key's coordinates come in three blocks, the first and second halves that turn together and those
that do not turn, each with products of its own, so nothing is taken apart in registers. KV heads
read the same tile one after the other: from the L2 cache but for the first. Splits, their merge and
widened codes are those of `triton`.
"""

import triton
import triton.language as tl

from flashhead.ops.latent_decode.triton import _place, _tile


@triton.jit
def _up(up_ptr, r, d, WIDTH: tl.constexpr, RANK: tl.constexpr, dtype):
    """Columns `[r, d]` of the key projection, which is stored `[d, r]`; d of WIDTH are real."""
    mask = (r < RANK)[:, None] & (d < WIDTH)[None, :]
    return tl.load(up_ptr + d[None, :] * RANK + r[:, None], mask=mask, other=0).to(dtype)


@triton.jit
def _constant(constant_ptr, d, WIDTH: tl.constexpr, HAS_CONSTANT: tl.constexpr):
    """Numbers d of the constant key, float32."""
    if HAS_CONSTANT:
        constant = tl.load(constant_ptr + d, mask=d < WIDTH, other=0).to(tl.float32)
    else:
        constant = tl.zeros_like(d).to(tl.float32)
    return constant


@triton.jit
def _queries(query_ptr, d, head, is_head, stride_qh, WIDTH: tl.constexpr):
    """Numbers d of the queries: `[d, heads]`."""
    mask = (d < WIDTH)[:, None] & is_head[None, :]
    return tl.load(query_ptr + head[None, :] * stride_qh + d[:, None], mask=mask, other=0)


@triton.jit
def _product(tile, tile_odd, up, up_odd, constant, KIND: tl.constexpr):
    """A block of keys before they turn, float32."""
    keys = tl.dot(tile, up, input_precision="ieee")
    if KIND == "int4":
        keys = tl.dot(tile_odd, up_odd, keys, input_precision="ieee")
    return keys + constant[None, :]


@triton.jit(
    do_not_specialize=[
        "splits",
        "first_index",
        "stride_lsb",
        "stride_bb",
        "stride_bh",
        "stride_table",
    ]
)
def _rebuilt_kernel(
    query_ptr,
    latent_ptr,
    latent_scale_ptr,
    up_ptr,
    constant_ptr,
    cos_ptr,
    sin_ptr,
    table_ptr,
    lengths_ptr,
    starts_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    scale,
    heads,
    stride_qb,
    stride_qh,
    stride_lb,
    stride_lsb,
    stride_bb,
    stride_bh,
    stride_table,
    splits,
    first_index,
    stride_lt: tl.constexpr,
    stride_lst: tl.constexpr,
    SHARE: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    FIXED: tl.constexpr,
    RANK: tl.constexpr,
    KIND: tl.constexpr,
    CODES: tl.constexpr,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FAST: tl.constexpr,
):
    """One KV head of one row over one of `splits` ranges of its tokens; TURNED pairs of HEAD_DIM
    coordinates turn, in blocks of PAIRS and FIXED.
    """
    group = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    own = tl.arange(0, BLOCK_H)
    head = group * SHARE + own
    is_head = own < SHARE
    length = tl.load(lengths_ptr + row)
    start = tl.load(starts_ptr + row) if HAS_STARTS else 0
    first = start // BLOCK_N
    tiles = tl.maximum(tl.cdiv(length, BLOCK_N) - first, 0)
    each = tl.cdiv(tiles, splits)
    begin = (first + split * each) * BLOCK_N
    end = tl.minimum(begin + each * BLOCK_N, length)
    lse_ptr += (row * splits + split) * heads + head
    out_ptr += (row * splits + split) * heads * RANK
    if (begin >= end) & (splits > 1):  # what nobody reads is not written
        tl.store(lse_ptr, tl.full([BLOCK_H], float("-inf"), tl.float32), mask=is_head)
        return
    exact: tl.constexpr = latent_ptr.dtype.element_ty if KIND == "bf16" else tl.float16
    STEP: tl.constexpr = 2 if KIND == "int4" else 1
    query_ptr += row * stride_qb
    up_ptr += group * HEAD_DIM * RANK
    constant_ptr += group * HEAD_DIM
    r = STEP * tl.arange(0, W)
    pair = tl.arange(0, PAIRS)
    # what is not a pair lies beyond HEAD_DIM, and reads as 0
    second = tl.where(pair < TURNED, TURNED + pair, HEAD_DIM)
    pair = tl.where(pair < TURNED, pair, HEAD_DIM)
    if TURNED > 0:
        up_re = _up(up_ptr, r, pair, HEAD_DIM, RANK, exact)
        up_im = _up(up_ptr, r, second, HEAD_DIM, RANK, exact)
        up_re_odd, up_im_odd = up_re, up_im
        if KIND == "int4":
            up_re_odd = _up(up_ptr, r + 1, pair, HEAD_DIM, RANK, exact)
            up_im_odd = _up(up_ptr, r + 1, second, HEAD_DIM, RANK, exact)
        constant_re = _constant(constant_ptr, pair, HEAD_DIM, HAS_CONSTANT)
        constant_im = _constant(constant_ptr, second, HEAD_DIM, HAS_CONSTANT)
        query_re = _queries(query_ptr, pair, head, is_head, stride_qh, HEAD_DIM)
        query_im = _queries(query_ptr, second, head, is_head, stride_qh, HEAD_DIM)
    if FIXED > 0:
        rest = 2 * TURNED + tl.arange(0, FIXED)
        up_rest = _up(up_ptr, r, rest, HEAD_DIM, RANK, exact)
        up_rest_odd = up_rest
        if KIND == "int4":
            up_rest_odd = _up(up_ptr, r + 1, rest, HEAD_DIM, RANK, exact)
        constant_rest = _constant(constant_ptr, rest, HEAD_DIM, HAS_CONSTANT)
        query_rest = _queries(query_ptr, rest, head, is_head, stride_qh, HEAD_DIM)
    factor = scale * 1.4426950408889634
    most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    sums = tl.zeros([W, BLOCK_H], tl.float32)
    if KIND == "int4":
        sums_odd = tl.zeros([W, BLOCK_H], tl.float32)
    if PAGE == 0:
        latent_ptr += row * stride_lb
        latent_scale_ptr += row * stride_lsb
    table_ptr += row * stride_table
    bias_ptr += row * stride_bb
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        token = n + tl.arange(0, BLOCK_N)
        inside = token < end
        if HAS_STARTS:
            inside = inside & (token >= start)
        block, place = _place(token, inside, table_ptr, PAGE)
        tile, tile_odd = _tile(
            latent_ptr,
            latent_scale_ptr,
            block * stride_lb + place * stride_lt,
            block * stride_lsb + place * stride_lst,
            inside,
            KIND,
            CODES,
            W,
            GROUPS,
            G,
            FAST,
        )
        scores = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        if TURNED > 0:
            real = _product(tile, tile_odd, up_re, up_re_odd, constant_re, KIND)
            imaginary = _product(tile, tile_odd, up_im, up_im_odd, constant_im, KIND)
            angle = (first_index + token)[:, None] * TURNED + pair[None, :]
            mask = inside[:, None] & (pair < TURNED)[None, :]
            cos = tl.load(cos_ptr + angle, mask=mask, other=0)
            sin = tl.load(sin_ptr + angle, mask=mask, other=0)
            turned = (real * cos - imaginary * sin).to(query_re.dtype)
            scores = tl.dot(turned, query_re, scores, input_precision="ieee")
            turned = (imaginary * cos + real * sin).to(query_re.dtype)
            scores = tl.dot(turned, query_im, scores, input_precision="ieee")
        if FIXED > 0:
            keys = _product(tile, tile_odd, up_rest, up_rest_odd, constant_rest, KIND)
            keys = keys.to(query_rest.dtype)
            scores = tl.dot(keys, query_rest, scores, input_precision="ieee")
        scores *= factor
        if HAS_BIAS:
            mask = inside[:, None] & is_head[None, :]
            own_ptr = bias_ptr + token[:, None] + head[None, :] * stride_bh
            scores += tl.load(own_ptr, mask=mask, other=0).to(tl.float32) * 1.4426950408889634
        scores = tl.where(inside[:, None], scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: no inf - inf
        weights = tl.exp2(scores - shift[None, :])
        fade = tl.exp2(most - shift)
        total = total * fade + tl.sum(weights, 0)
        weights = weights.to(exact)
        sums = tl.dot(tl.trans(tile), weights, sums * fade[None, :], input_precision="ieee")
        if KIND == "int4":
            sums_odd = tl.dot(
                tl.trans(tile_odd), weights, sums_odd * fade[None, :], input_precision="ieee"
            )
        most = new
    reciprocal = tl.where(total == 0, 0.0, 1.0 / total)
    tl.store(lse_ptr, (most + tl.log2(total)) * 0.6931471805599453, mask=is_head)
    own_ptr = out_ptr + head[None, :] * RANK + r[:, None]
    mask = is_head[None, :] & (r < RANK)[:, None]
    tl.store(own_ptr, (sums * reciprocal[None, :]).to(out_ptr.dtype.element_ty), mask=mask)
    if KIND == "int4":
        mask = is_head[None, :] & (r + 1 < RANK)[:, None]
        sums_odd *= reciprocal[None, :]
        tl.store(own_ptr + 1, sums_odd.to(out_ptr.dtype.element_ty), mask=mask)

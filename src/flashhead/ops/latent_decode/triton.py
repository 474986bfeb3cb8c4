"""Latent decode on a GPU: one read of a tile of latents gives its scores and its values.

    split     a range of one row's tokens, BLOCK_H heads    partial[batch, splits, heads, r], lse
    merge     the splits of a row and head, by their lse    out[batch, heads, r], lse

Tokens come first in both products, so that few heads fill the tensor cores' smallest tile as the
narrow side, and the tile in shared memory serves as it is and transposed:

    scores[tokens, heads] = tile[tokens, r] @ query[r, heads]
    sums[r, heads]       += tile[tokens, r].T @ weights[tokens, heads]

The grid depends on what the host knows (batch, heads, longest row); a program that finds nothing to
do in its split says so with lse = -inf. Codes are widened to float16 (exact but for the product
with the scale); queries are divided by their largest number, so that they fit float16 too.
The softmax is that of arXiv 1805.02867, its merge that of arXiv 2205.14135.
"""

import triton
import triton.language as tl


@triton.jit
def _place(token, inside, table_ptr, PAGE: tl.constexpr):
    """Block and place in it of tokens of a row; without pages the row is one block."""
    if PAGE == 0:
        block, place = tl.zeros_like(token).to(tl.int64), token
    else:
        block = tl.load(table_ptr + token // PAGE, mask=inside, other=0).to(tl.int64)
        place = token % PAGE
    return block, place


@triton.jit
def _largest(query_ptr, head, is_head, stride_qh, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Largest magnitude of each head's query, 1 where all are 0: `[heads]`."""
    found = tl.zeros([head.shape[0], BLOCK], tl.float32)
    for first in tl.range(0, WIDTH, BLOCK):
        k = first + tl.arange(0, BLOCK)
        mask = is_head[:, None] & (k < WIDTH)[None, :]
        part = tl.load(query_ptr + head[:, None] * stride_qh + k[None, :], mask=mask, other=0)
        found = tl.maximum(found, tl.abs(part.to(tl.float32)))
    largest = tl.max(found, 1)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit
def _query(
    query_ptr,
    head,
    is_head,
    stride_qh,
    largest,
    WIDTH,
    W: tl.constexpr,
    KIND: tl.constexpr,
    DIVIDED: tl.constexpr,
    dtype,
):
    """WIDTH numbers of each query over its largest: `[W, heads]`; int4: even and odd ones, else
    twice the same.
    """
    R: tl.constexpr = 2 * W if KIND == "int4" else W
    k = tl.arange(0, R)
    mask = is_head[:, None] & (k < WIDTH)[None, :]
    query = tl.load(query_ptr + head[:, None] * stride_qh + k[None, :], mask=mask, other=0)
    if DIVIDED:
        query = query.to(tl.float32) / largest[:, None]
    query = query.to(dtype)
    if KIND == "int4":
        even, odd = tl.split(query.reshape(query.shape[0], W, 2))
        even, odd = tl.trans(even), tl.trans(odd)
    else:
        even = tl.trans(query)
        odd = even
    return even, odd


@triton.jit
def _scaled(values, scale_ptr, row, inside, GROUPS: tl.constexpr, G: tl.constexpr):
    """Values `[tokens, W]` times their group's scale; G groups, GROUPS of them real."""
    g = tl.arange(0, G)
    mask = inside[:, None] & (g < GROUPS)[None, :]
    scale = tl.load(scale_ptr + row[:, None] + g[None, :], mask=mask, other=0)
    grouped = values.reshape(values.shape[0], G, values.shape[1] // G)
    return (grouped * scale[:, :, None]).reshape(values.shape[0], values.shape[1])


@triton.jit
def _nibbles(codes, FAST: tl.constexpr):
    """Low and high halves of bytes, each less 8, as float16."""
    if FAST:
        # 0x64nn is 1024 + nn in float16, 0x64n0 is 1024 + 16 n; four bytes at once
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c;
            prmt.b32 a, $4, 0x64646464, 0x4140;
            prmt.b32 b, $4, 0x64646464, 0x4342;
            lop3.b32 $0, a, 0xff0fff0f, 0, 0xc0;
            lop3.b32 $1, b, 0xff0fff0f, 0, 0xc0;
            lop3.b32 $2, a, 0xfff0fff0, 0, 0xc0;
            lop3.b32 $3, b, 0xfff0fff0, 0, 0xc0;
            mov.b32 c, 0x64086408;
            sub.f16x2 $0, $0, c;
            sub.f16x2 $1, $1, c;
            mov.b32 a, 0x2c002c00;
            mov.b32 b, 0xd480d480;
            fma.rn.f16x2 $2, $2, a, b;
            fma.rn.f16x2 $3, $3, a, b;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        low = (codes & 15).to(tl.float16) - 8
        high = (codes >> 4).to(tl.float16) - 8
    return low, high


@triton.jit
def _tile(
    codes_ptr,
    scale_ptr,
    row,
    scale_row,
    inside,
    KIND: tl.constexpr,
    CODES: tl.constexpr,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """A tile of vectors `[tokens, W]`; int4: even and odd coordinates, else twice the same."""
    k = tl.arange(0, W)
    mask = inside[:, None] if CODES == W else inside[:, None] & (k < CODES)[None, :]
    codes = tl.load(codes_ptr + row[:, None] + k[None, :], mask=mask, other=0)
    if KIND == "bf16":
        low, high = codes, codes
    elif KIND == "int4":
        low, high = _nibbles(codes, FAST)
        low = _scaled(low, scale_ptr, scale_row, inside, GROUPS, G)
        high = _scaled(high, scale_ptr, scale_row, inside, GROUPS, G)
    else:
        if KIND == "fp8":
            codes = codes.to(tl.float8e4nv, bitcast=True)
        low = _scaled(codes.to(tl.float16), scale_ptr, scale_row, inside, GROUPS, G)
        high = low
    return low, high


@triton.jit(do_not_specialize=["splits", "stride_bb", "stride_bh", "stride_table"])
def _split_kernel(
    query_ptr,
    latent_ptr,
    latent_scale_ptr,
    rotary_ptr,
    rotary_scale_ptr,
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
    stride_rb,
    stride_rsb,
    stride_bb,
    stride_bh,
    stride_table,
    splits,
    stride_lt: tl.constexpr,
    stride_lst: tl.constexpr,
    stride_rt: tl.constexpr,
    stride_rst: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    KIND: tl.constexpr,
    CODES: tl.constexpr,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    G: tl.constexpr,
    ROTARY: tl.constexpr,
    ROTARY_KIND: tl.constexpr,
    ROTARY_CODES: tl.constexpr,
    ROTARY_W: tl.constexpr,
    ROTARY_GROUPS: tl.constexpr,
    ROTARY_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FAST: tl.constexpr,
):
    """BLOCK_H heads of one row over one of `splits` ranges of its tokens."""
    row = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < heads
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
    PAIRED: tl.constexpr = KIND == "int4"
    STEP: tl.constexpr = 2 if PAIRED else 1
    query_ptr += row * stride_qb
    exact: tl.constexpr = latent_ptr.dtype.element_ty if KIND == "bf16" else tl.float16
    turning: tl.constexpr = rotary_ptr.dtype.element_ty if ROTARY_KIND == "bf16" else tl.float16
    largest = tl.full([BLOCK_H], 1.0, tl.float32)
    DIVIDED: tl.constexpr = (KIND != "bf16") | (ROTARY_KIND != "bf16")
    if DIVIDED:
        largest = _largest(query_ptr, head, is_head, stride_qh, RANK + ROTARY, 64)
    query, query_odd = _query(
        query_ptr, head, is_head, stride_qh, largest, RANK, W, KIND, DIVIDED, exact
    )
    if ROTARY:
        turned, turned_odd = _query(
            query_ptr + RANK,
            head,
            is_head,
            stride_qh,
            largest,
            ROTARY,
            ROTARY_W,
            ROTARY_KIND,
            DIVIDED,
            turning,
        )
    factor = largest * (scale * 1.4426950408889634)
    most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    sums = tl.zeros([W, BLOCK_H], tl.float32)
    if PAIRED:
        sums_odd = tl.zeros([W, BLOCK_H], tl.float32)
    if PAGE == 0:
        latent_ptr += row * stride_lb
        latent_scale_ptr += row * stride_lsb
        rotary_ptr += row * stride_rb
        rotary_scale_ptr += row * stride_rsb
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
        scores = tl.dot(tile, query, input_precision="ieee")
        if PAIRED:
            scores = tl.dot(tile_odd, query_odd, scores, input_precision="ieee")
        if ROTARY:
            keys, keys_odd = _tile(
                rotary_ptr,
                rotary_scale_ptr,
                block * stride_rb + place * stride_rt,
                block * stride_rsb + place * stride_rst,
                inside,
                ROTARY_KIND,
                ROTARY_CODES,
                ROTARY_W,
                ROTARY_GROUPS,
                ROTARY_G,
                FAST,
            )
            scores = tl.dot(keys, turned, scores, input_precision="ieee")
            if ROTARY_KIND == "int4":
                scores = tl.dot(keys_odd, turned_odd, scores, input_precision="ieee")
        scores *= factor[None, :]
        if HAS_BIAS:
            mask = inside[:, None] & is_head[None, :]
            own_ptr = bias_ptr + token[:, None] + head[None, :] * stride_bh
            scores += tl.load(own_ptr, mask=mask, other=0) * 1.4426950408889634
        scores = tl.where(inside[:, None], scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: no inf - inf
        weights = tl.exp2(scores - shift[None, :])
        fade = tl.exp2(most - shift)
        total = total * fade + tl.sum(weights, 0)
        weights = weights.to(exact)
        sums = tl.dot(tl.trans(tile), weights, sums * fade[None, :], input_precision="ieee")
        if PAIRED:
            sums_odd = tl.dot(
                tl.trans(tile_odd), weights, sums_odd * fade[None, :], input_precision="ieee"
            )
        most = new
    reciprocal = tl.where(total == 0, 0.0, 1.0 / total)
    tl.store(lse_ptr, (most + tl.log2(total)) * 0.6931471805599453, mask=is_head)
    k = STEP * tl.arange(0, W)
    own_ptr = out_ptr + head[None, :] * RANK + k[:, None]
    mask = is_head[None, :] & (k < RANK)[:, None]
    tl.store(own_ptr, (sums * reciprocal[None, :]).to(out_ptr.dtype.element_ty), mask=mask)
    if PAIRED:
        mask = is_head[None, :] & (k + 1 < RANK)[:, None]
        sums_odd *= reciprocal[None, :]
        tl.store(own_ptr + 1, sums_odd.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    heads,
    splits,
    RANK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R numbers of one row and head: the mean of its splits, weighted by exp(lse)."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    most = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    sums = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        place = (row * splits + split) * heads + head
        lse = tl.load(partial_lse_ptr + place, mask=split < splits, other=float("-inf"))
        some = lse != float("-inf")
        own_ptr = partial_ptr + place[:, None] * RANK + k[None, :]
        mask = some[:, None] & (k < RANK)[None, :]
        values = tl.load(own_ptr, mask=mask, other=0).to(tl.float32)
        new = tl.maximum(most, lse)
        shift = tl.where(new == float("-inf"), 0.0, new)
        fade, weight = tl.exp(most - shift), tl.exp(lse - shift)
        total = total * fade + weight
        sums = sums * fade[:, None] + values * weight[:, None]
        most = new
    highest = tl.max(most, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    fade = tl.exp(most - shift)
    total = tl.sum(total * fade, 0)
    mean = tl.sum(sums * fade[:, None], 0) * tl.where(total == 0, 0.0, 1.0 / total)
    own_ptr = out_ptr + (row * heads + head) * RANK + k
    tl.store(own_ptr, mean.to(out_ptr.dtype.element_ty), mask=k < RANK)
    if tl.program_id(0) == 0:
        tl.store(lse_ptr + row * heads + head, highest + tl.log(total))

"""Latent decode on Hopper, in Gluon: a tile of 64 latents stays in shared memory for both products.

The products are those of `triton`, in chunks of 128 coordinates, each chunk in a buffer of its own:

    scores[64, heads] += chunk_c[64, 128] @ query_c[128, heads]           for every c
    sums_c[128, heads] = fade * sums_c + chunk_c.T @ weights[64, heads]   for every c

As soon as chunk c has been multiplied with the weights its buffer is filled with the next tile's,
so memory is read while the tensor cores work, although a tile of 1,024 coordinates leaves no room
for a second one. A barrier goes before each: the compiler does not see that the other warp group
may still read. Codes come through registers: the next tile's words are loaded before this one's
products and widened to float16 after them. Layouts must be what the tensor cores want, which is why
this is Gluon and not Triton. No lane waits for another program.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

TOKENS = gl.constexpr(64)
CHUNK = gl.constexpr(128)
GROUP = gl.constexpr(64)


@gluon.jit
def _rows(
    n,
    start,
    end,
    table_ptr,
    stride_b,
    stride_t: gl.constexpr,
    PAGE: gl.constexpr,
    layout: gl.constexpr,
):
    """Offset of each token of a tile, and whether it is read."""
    token = n + gl.arange(0, TOKENS, layout)
    inside = (token < end) & (token >= start)
    if PAGE == 0:
        offset = token.to(gl.int64) * stride_t
    else:
        block = gl.load(table_ptr + token // PAGE, mask=inside, other=0).to(gl.int64)
        offset = block * stride_b + (token % PAGE) * stride_t
    return offset, inside


@gluon.jit
def _copy(
    buffer,
    pointer,
    offset,
    inside,
    first,
    WIDTH: gl.constexpr,
    W: gl.constexpr,
    layout: gl.constexpr,
):
    """Start copying coordinates [first, first + W) of a tile; what is not read becomes 0."""
    k = first + gl.arange(0, W, gl.SliceLayout(0, layout))
    mask = inside[:, None] & (k < WIDTH)[None, :]
    async_copy.async_copy_global_to_shared(buffer, pointer + offset[:, None] + k[None, :], mask)
    async_copy.commit_group()


@gluon.jit
def _widen(words, scale, KIND: gl.constexpr):
    """Words of codes times scale (twice the same float16): float16 pairs, as many as there are."""
    if KIND == "int4":
        a, b, c, d = gl.inline_asm_elementwise(
            """{
            .reg .b32 m, k, z;
            mov.b32 m, 0x2c003c00;
            mov.b32 k, 0xd480e408;
            mov.b32 z, 0;
            prmt.b32 $0, $4, z, 0x4040;
            prmt.b32 $1, $4, z, 0x4141;
            prmt.b32 $2, $4, z, 0x4242;
            prmt.b32 $3, $4, z, 0x4343;
            lop3.b32 $0, $0, 0x00f0000f, 0x64006400, 0xea;
            lop3.b32 $1, $1, 0x00f0000f, 0x64006400, 0xea;
            lop3.b32 $2, $2, 0x00f0000f, 0x64006400, 0xea;
            lop3.b32 $3, $3, 0x00f0000f, 0x64006400, 0xea;
            fma.rn.f16x2 $0, $0, m, k;
            fma.rn.f16x2 $1, $1, m, k;
            fma.rn.f16x2 $2, $2, m, k;
            fma.rn.f16x2 $3, $3, m, k;
            mul.rn.f16x2 $0, $0, $5;
            mul.rn.f16x2 $1, $1, $5;
            mul.rn.f16x2 $2, $2, $5;
            mul.rn.f16x2 $3, $3, $5;
            }""",
            "=&r,=&r,=&r,=&r,r,r",
            [words, scale],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
        pairs = gl.join(gl.join(a, c), gl.join(b, d))
    else:
        if KIND == "int8":
            a, b = gl.inline_asm_elementwise(
                """{
                .reg .b32 x, y, k;
                xor.b32 x, $2, 0x80808080;
                mov.b32 y, 0x64646464;
                mov.b32 k, 0x64806480;
                prmt.b32 $0, x, y, 0x4140;
                prmt.b32 $1, x, y, 0x4342;
                sub.rn.f16x2 $0, $0, k;
                sub.rn.f16x2 $1, $1, k;
                mul.rn.f16x2 $0, $0, $3;
                mul.rn.f16x2 $1, $1, $3;
                }""",
                "=&r,=&r,r,r",
                [words, scale],
                dtype=(gl.int32, gl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            a, b = gl.inline_asm_elementwise(
                """{
                .reg .b16 x, y;
                mov.b32 {x, y}, $2;
                cvt.rn.f16x2.e4m3x2 $0, x;
                cvt.rn.f16x2.e4m3x2 $1, y;
                mul.rn.f16x2 $0, $0, $3;
                mul.rn.f16x2 $1, $1, $3;
                }""",
                "=&r,=&r,r,r",
                [words, scale],
                dtype=(gl.int32, gl.int32),
                is_pure=True,
                pack=1,
            )
        pairs = gl.join(a, b)
    return pairs


@gluon.jit
def _load_codes(
    codes_ptr,
    scale_ptr,
    offset,
    scale_offset,
    inside,
    c,
    WORDS: gl.constexpr,
    GROUPS: gl.constexpr,
    COUNT: gl.constexpr,
    layout: gl.constexpr,
):
    """Words `[64, 2, COUNT]` of chunk c, and their groups' scales, twice in 32 bits: `[64, 2]`."""
    g = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]
    w = gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, :]
    word = 2 * c * COUNT + (g * COUNT)[:, :, None] + w[:, None, :]
    mask = inside[:, None][:, :, None] & (word < WORDS)
    words = gl.load(codes_ptr + offset[:, None][:, :, None] + word, mask=mask, other=0)
    mask = inside[:, None] & (2 * c + g < GROUPS)
    scale = gl.load(scale_ptr + scale_offset[:, None] + 2 * c + g, mask=mask, other=0)
    scale = scale.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return words, scale | (scale << 16)


@gluon.jit
def _store_codes(
    buffer, words, scale, KIND: gl.constexpr, PAIRS: gl.constexpr, SHARED: gl.constexpr
):
    """Widen a chunk into its buffer."""
    wide, _ = gl.broadcast(scale[:, :, None], words)
    pairs = _widen(words, wide, KIND).reshape([TOKENS, PAIRS])
    buffer._reinterpret(gl.int32, [TOKENS, PAIRS], SHARED).store(pairs)


@gluon.jit
def _query(
    query_ptr,
    first,
    head,
    is_head,
    stride_qh,
    WIDTH: gl.constexpr,
    W: gl.constexpr,
    layout: gl.constexpr,
):
    """Numbers [first, first + W) of each query, float32 `[heads, W]`."""
    k = first + gl.arange(0, W, gl.SliceLayout(0, layout))
    mask = is_head[:, None] & (k < WIDTH)[None, :]
    part = gl.load(query_ptr + head[:, None] * stride_qh + k[None, :], mask=mask, other=0)
    return part.to(gl.float32)


@gluon.jit(do_not_specialize=["splits", "stride_bb", "stride_bh", "stride_table"])
def _hopper_kernel(
    query_ptr,
    latent_ptr,
    latent_scale_ptr,
    rotary_ptr,
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
    stride_bb,
    stride_bh,
    stride_table,
    splits,
    stride_lt: gl.constexpr,
    stride_lst: gl.constexpr,
    stride_rt: gl.constexpr,
    PAGE: gl.constexpr,
    HAS_STARTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    RANK: gl.constexpr,
    KIND: gl.constexpr,
    WORDS: gl.constexpr,
    GROUPS: gl.constexpr,
    ROTARY: gl.constexpr,
    ROTARY_W: gl.constexpr,
    BLOCK_H: gl.constexpr,
):
    """BLOCK_H heads of one row over one of `splits` ranges of its tokens; arguments as in
    `triton._split_kernel`, but that codes come as int32 words.
    """
    gl.static_assert(gl.num_warps() == 8, "two warp groups")
    CHUNKS: gl.constexpr = (RANK + CHUNK - 1) // CHUNK
    COUNT: gl.constexpr = 8 if KIND == "int4" else 16
    PAIRS: gl.constexpr = CHUNK // 2
    exact: gl.constexpr = latent_ptr.dtype.element_ty if KIND == "bf16" else gl.float16
    turning: gl.constexpr = rotary_ptr.dtype.element_ty
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    COPY_R: gl.constexpr = (
        COPY if ROTARY_W == 128 else gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    )
    CODED: gl.constexpr = gl.BlockedLayout(
        [1, 1, 4], [8, 2, 2] if KIND == "int4" else [4, 2, 4], [8, 1, 1], [2, 1, 0]
    )
    CODED_ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, CODED))
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, CHUNK], exact)
    SHARED_W: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, PAIRS], gl.int32)
    SHARED_R: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, ROTARY_W], turning)
    SHARED_Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, CHUNK], exact)
    SHARED_QR: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, ROTARY_W], turning)
    SHARED_P: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, BLOCK_H], exact)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_H // 2, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_H, 16])
    OF_SCORES: gl.constexpr = gl.SliceLayout(0, SCORES)
    OF_SUMS: gl.constexpr = gl.SliceLayout(0, SUMS)

    row = gl.program_id(2).to(gl.int64)
    split = gl.program_id(1)
    first_head = gl.program_id(0) * BLOCK_H
    length = gl.load(lengths_ptr + row)
    start = 0
    if HAS_STARTS:
        start = gl.load(starts_ptr + row)
    first = start // TOKENS
    tiles = gl.maximum(gl.cdiv(length, TOKENS) - first, 0)
    each = gl.cdiv(tiles, splits)
    begin = (first + split * each) * TOKENS
    end = gl.minimum(begin + each * TOKENS, length)
    place = (row * splits + split) * heads
    head = first_head + gl.arange(0, BLOCK_H, OF_SCORES)
    if (begin >= end) & (splits > 1):
        nothing = gl.full([BLOCK_H], float("-inf"), gl.float32, OF_SCORES)
        gl.store(lse_ptr + place + head, nothing, mask=head < heads)
        return
    query_ptr += row * stride_qb
    table_ptr += row * stride_table
    bias_ptr += row * stride_bb
    if PAGE == 0:
        latent_ptr += row * stride_lb
        latent_scale_ptr += row * stride_lsb
        rotary_ptr += row * stride_rb

    buffers = ()
    for _c in gl.static_range(CHUNKS):
        buffers = buffers + (gl.allocate_shared_memory(exact, [TOKENS, CHUNK], SHARED),)
    if ROTARY > 0:
        turned_buffer = gl.allocate_shared_memory(turning, [TOKENS, ROTARY_W], SHARED_R)
    weights_buffer = gl.allocate_shared_memory(exact, [TOKENS, BLOCK_H], SHARED_P)

    # the first tile is on its way while the queries are prepared
    words = ()
    scales = ()
    if KIND == "bf16":
        offset, inside = _rows(
            begin, start, end, table_ptr, stride_lb, stride_lt, PAGE, gl.SliceLayout(1, COPY)
        )
    else:
        offset, inside = _rows(begin, start, end, table_ptr, stride_lb, stride_lt, PAGE, CODED_ROWS)
        scale_offset, _ = _rows(
            begin, start, end, table_ptr, stride_lsb, stride_lst, PAGE, CODED_ROWS
        )
    if ROTARY > 0:
        turned_offset, turned_inside = _rows(
            begin, start, end, table_ptr, stride_rb, stride_rt, PAGE, gl.SliceLayout(1, COPY_R)
        )
        _copy(turned_buffer, rotary_ptr, turned_offset, turned_inside, 0, ROTARY, ROTARY_W, COPY_R)
    for c in gl.static_range(CHUNKS):
        if KIND == "bf16":
            _copy(buffers[c], latent_ptr, offset, inside, c * CHUNK, RANK, CHUNK, COPY)
        else:
            w, s = _load_codes(
                latent_ptr,
                latent_scale_ptr,
                offset,
                scale_offset,
                inside,
                c,
                WORDS,
                GROUPS,
                COUNT,
                CODED,
            )
            words = words + (w,)
            scales = scales + (s,)

    of_query: gl.constexpr = gl.SliceLayout(1, COPY)
    of_turned: gl.constexpr = gl.SliceLayout(1, COPY_R)
    query_head = first_head + gl.arange(0, BLOCK_H, of_query)
    turned_head = first_head + gl.arange(0, BLOCK_H, of_turned)
    largest = gl.full([BLOCK_H], 1.0, gl.float32, of_query)
    if KIND != "bf16":
        largest = gl.full([BLOCK_H], 0.0, gl.float32, of_query)
        for k in range(0, RANK + ROTARY, CHUNK):
            part = _query(
                query_ptr, k, query_head, query_head < heads, stride_qh, RANK + ROTARY, CHUNK, COPY
            )
            largest = gl.maximum(largest, gl.max(gl.abs(part), 1))
        largest = gl.where(largest > 0, largest, 1.0)
    queries = ()
    for c in gl.static_range(CHUNKS):
        part = _query(
            query_ptr, c * CHUNK, query_head, query_head < heads, stride_qh, RANK, CHUNK, COPY
        )
        part = (part / largest[:, None]).to(exact)
        queries = queries + (gl.allocate_shared_memory(exact, [BLOCK_H, CHUNK], SHARED_Q, part),)
    if ROTARY > 0:
        part = _query(
            query_ptr + RANK,
            0,
            turned_head,
            turned_head < heads,
            stride_qh,
            ROTARY,
            ROTARY_W,
            COPY_R,
        )
        part = (part / gl.convert_layout(largest, of_turned)[:, None]).to(turning)
        turned_query = gl.allocate_shared_memory(turning, [BLOCK_H, ROTARY_W], SHARED_QR, part)
    factor = gl.convert_layout(largest, OF_SCORES) * (scale * 1.4426950408889634)

    most = gl.full([BLOCK_H], float("-inf"), gl.float32, OF_SCORES)
    total = gl.zeros([BLOCK_H], gl.float32, OF_SCORES)
    sums = ()
    for _c in gl.static_range(CHUNKS):
        sums = sums + (gl.zeros([CHUNK, BLOCK_H], gl.float32, SUMS),)
    of_token: gl.constexpr = gl.SliceLayout(1, SCORES)
    for n in range(begin, end, TOKENS):
        if KIND == "bf16":
            offset, inside = _rows(
                n + TOKENS,
                start,
                end,
                table_ptr,
                stride_lb,
                stride_lt,
                PAGE,
                gl.SliceLayout(1, COPY),
            )
        else:
            offset, inside = _rows(
                n + TOKENS, start, end, table_ptr, stride_lb, stride_lt, PAGE, CODED_ROWS
            )
            scale_offset, _ = _rows(
                n + TOKENS, start, end, table_ptr, stride_lsb, stride_lst, PAGE, CODED_ROWS
            )
            next_words = ()
            next_scales = ()
            for c in gl.static_range(CHUNKS):
                _store_codes(buffers[c], words[c], scales[c], KIND, PAIRS, SHARED_W)
                w, s = _load_codes(
                    latent_ptr,
                    latent_scale_ptr,
                    offset,
                    scale_offset,
                    inside,
                    c,
                    WORDS,
                    GROUPS,
                    COUNT,
                    CODED,
                )
                next_words = next_words + (w,)
                next_scales = next_scales + (s,)
            words = next_words
            scales = next_scales
            if ROTARY > 0:
                async_copy.wait_group(0)
            fence_async_shared()
        scores = gl.zeros([TOKENS, BLOCK_H], gl.float32, SCORES)
        if ROTARY > 0:
            if KIND == "bf16":
                async_copy.wait_group(CHUNKS)
                fence_async_shared()
            scores = warpgroup_mma(
                turned_buffer, turned_query.permute((1, 0)), scores, is_async=True
            )
        for c in gl.static_range(CHUNKS):
            if KIND == "bf16":
                async_copy.wait_group(CHUNKS - 1 - c)
                fence_async_shared()
            scores = warpgroup_mma(buffers[c], queries[c].permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        if ROTARY > 0:
            gl.thread_barrier()  # the other warp group may still be reading what is copied over
            turned_offset, turned_inside = _rows(
                n + TOKENS,
                start,
                end,
                table_ptr,
                stride_rb,
                stride_rt,
                PAGE,
                gl.SliceLayout(1, COPY_R),
            )
            _copy(
                turned_buffer, rotary_ptr, turned_offset, turned_inside, 0, ROTARY, ROTARY_W, COPY_R
            )
        scores = scores * factor[None, :]
        token = n + gl.arange(0, TOKENS, of_token)
        seen = (token < end) & (token >= start)
        if HAS_BIAS:
            own_ptr = bias_ptr + token[:, None] + head[None, :] * stride_bh
            bias = gl.load(own_ptr, mask=seen[:, None] & (head < heads)[None, :], other=0)
            scores += bias.to(gl.float32) * 1.4426950408889634
        scores = gl.where(seen[:, None], scores, float("-inf"))
        new = gl.maximum(most, gl.max(scores, 0))
        shift = gl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: no inf - inf
        weights = gl.exp2(scores - shift[None, :])
        fade = gl.exp2(most - shift)
        total = total * fade + gl.sum(weights, 0)
        most = new
        weights_buffer.store(weights.to(exact))
        fade = gl.convert_layout(fade, OF_SUMS)
        fence_async_shared()
        running = ()
        for c in gl.static_range(CHUNKS):
            faded = sums[c] * fade[None, :]
            running = running + (
                warpgroup_mma(buffers[c].permute((1, 0)), weights_buffer, faded, is_async=True),
            )
        sums = ()
        for c in gl.static_range(CHUNKS):
            done = warpgroup_mma_wait(CHUNKS - 1 - c, deps=[running[c]])
            sums = sums + (done,)
            if KIND == "bf16":
                gl.thread_barrier()
                _copy(buffers[c], latent_ptr, offset, inside, c * CHUNK, RANK, CHUNK, COPY)
        if KIND != "bf16":
            gl.thread_barrier()
    async_copy.wait_group(0)

    reciprocal = gl.where(total == 0, 0.0, 1.0 / total)
    lse = (most + gl.log2(total)) * 0.6931471805599453
    gl.store(lse_ptr + place + head, lse, mask=head < heads)
    reciprocal = gl.convert_layout(reciprocal, OF_SUMS)
    own_head = first_head + gl.arange(0, BLOCK_H, OF_SUMS)
    for c in gl.static_range(CHUNKS):
        k = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, SUMS))
        own_ptr = out_ptr + place * RANK + own_head[None, :] * RANK + k[:, None]
        mask = (own_head < heads)[None, :] & (k < RANK)[:, None]
        mean = sums[c] * reciprocal[None, :]
        gl.store(own_ptr, mean.to(out_ptr.dtype.element_ty), mask=mask)

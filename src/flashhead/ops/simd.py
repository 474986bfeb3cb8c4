"""What Numba lacks: bfloat16 as bits, a vectorisable exp, and the dot product of packed codes.

`vpdpbusd` multiplies 4 unsigned by 4 signed bytes and adds the sum to an int32 lane. Two kinds of
intrinsic build the inner loops of scan and refine around it; they are emitted only where
`has_vnni()` says that the processor has AVX-512 VNNI.
"""

import functools
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

FASTMATH = {"reassoc", "contract", "nsz"}
"""Reordering of sums only: NaN and infinity keep their meaning."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FIELD_MASKS = {1: 0x01010101, 2: 0x03030303}


@functools.cache
def has_vnni() -> bool:
    """Whether this processor has AVX-512 VNNI (and VL)."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512vl"))


def bits16(tensor: Tensor) -> np.ndarray:
    """A contiguous bfloat16 tensor as uint16, sharing memory."""
    return tensor.view(torch.int16).numpy().view(np.uint16)


def optional(tensor: Tensor | None) -> np.ndarray:
    """A float32 tensor as an array; an empty array stands for None."""
    return np.empty(0, np.float32) if tensor is None else tensor.numpy()


@numba.njit(inline="always")
def bf16(bits):  # type: ignore[no-untyped-def]
    """The float32 value of bfloat16 bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@numba.njit(inline="always")
def fast_exp(x):  # type: ignore[no-untyped-def]
    """e^x for x <= 80, float32, relative error below 4e-6, in operations that LLVM vectorises; below
    -85 it stays at e^-85.
    """
    scaled = max(x, np.float32(-85.0)) * np.float32(1.4426950408889634)
    whole = np.int32(scaled + np.float32(128)) - np.int32(128)  # truncated: the floor
    part = scaled - np.float32(whole)
    power = np.float32(1.8964611454333148e-3)
    power = power * part + np.float32(8.9428289841091295e-3)
    power = power * part + np.float32(5.5866246304520701e-2)
    power = power * part + np.float32(2.4013971109076948e-1)
    power = power * part + np.float32(6.9315475247516736e-1)
    power = power * part + np.float32(9.9999989311082668e-1)
    bits = np.int32(whole + np.int32(127)) << np.int32(23)
    return power * np.int32(bits).view(np.float32)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    single = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(single, undefined, zeros)


def _vpdpbusd(module: Any, lanes: int) -> Any:
    name = f"llvm.x86.avx512.vpdpbusd.{lanes * 32}"
    for function in module.functions:
        if function.name == name:
            return function
    vector = ir.VectorType(_I32, lanes)
    return ir.Function(module, ir.FunctionType(vector, [vector] * 3), name)


def _emit_dot(
    builder: Any,
    codes: Any,
    queries: list[Any],
    count: Any,
    lanes: int,
    width: int,
    broadcast: bool,
) -> list[Any]:
    """Loop over `count` vectors of packed words; returns the int32 lanes' sums for each query.

    A word holds 8 / width fields of 4 codes. With `broadcast` each vector holds one word of `lanes`
    rows and the query's 4 bytes are broadcast; without, it holds `lanes` words of one row and the
    query has as many.
    """
    vector, fields = ir.VectorType(_I32, lanes), 8 // width
    product = _vpdpbusd(builder.module, lanes)
    constant = lambda value: ir.Constant(vector, [value] * lanes)  # noqa: E731
    words = builder.inttoptr(codes, vector.as_pointer())
    element = _I32 if broadcast else vector
    numbers = [builder.inttoptr(query, element.as_pointer()) for query in queries]
    chains = max(1, 4 // len(queries))  # independent sums, to hide the latency
    before = builder.block
    loop, after = builder.append_basic_block("dot"), builder.append_basic_block("dot.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(ir.Constant(_I64, 0), before)
    sums = [[builder.phi(vector) for _ in range(chains)] for _ in queries]
    for total in (total for phis in sums for total in phis):
        total.add_incoming(constant(0), before)
    results = [list(chain) for chain in sums]
    word = builder.load(builder.gep(words, [step]))
    word.align = 4
    start = builder.mul(step, ir.Constant(_I64, fields))
    mask = constant(_FIELD_MASKS[width])
    for field in range(fields):
        code = builder.and_(builder.lshr(word, constant(width * field)), mask)
        place = builder.add(start, ir.Constant(_I64, field))
        for q, query in enumerate(numbers):
            number = builder.load(builder.gep(query, [place]))
            number.align = 4
            factor = _splat(builder, number, lanes) if broadcast else number
            chain = field % chains
            results[q][chain] = builder.call(product, [results[q][chain], code, factor])
    following = builder.add(step, ir.Constant(_I64, 1))
    step.add_incoming(following, loop)
    for phis, ends in zip(sums, results, strict=True):
        for total, end in zip(phis, ends, strict=True):
            total.add_incoming(end, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return [functools.reduce(builder.add, ends) for ends in results]


def _make_dot16(width: int, queries: int) -> Any:
    """Intrinsic for the 16 rows of a block: for each of `queries` query vectors
    `out[query, row] += factor[query] * (codes . query)`.

    Its arguments are addresses: codes, first query, bytes between queries, words (>= 1), first
    factor, bytes between factors, first output (float32[16]), bytes between outputs.
    """

    def dot16(_context, codes, query, stride, words, factor, factor_stride, out, out_stride):  # type: ignore[no-untyped-def]
        signature = types.void(*(types.int64 for _ in range(8)))

        def emit(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
            codes, query, stride, words, factor, factor_stride, out, out_stride = arguments
            floats = ir.VectorType(ir.FloatType(), 16)
            at = lambda base, step, q: builder.add(  # noqa: E731
                base, builder.mul(step, ir.Constant(_I64, q))
            )
            starts = [at(query, stride, q) for q in range(queries)]
            sums = _emit_dot(builder, codes, starts, words, 16, width, True)
            for q, total in enumerate(sums):
                single = builder.inttoptr(at(factor, factor_stride, q), ir.FloatType().as_pointer())
                gain = _splat(builder, builder.load(single), 16)
                place = builder.inttoptr(at(out, out_stride, q), floats.as_pointer())
                old = builder.load(place)
                old.align = 4
                value = builder.fadd(old, builder.fmul(builder.sitofp(total, floats), gain))
                builder.store(value, place).align = 4
            return context.get_dummy_value()

        return signature, emit

    dot16.__name__ = f"dot16_{width}bit_{queries}"
    return intrinsic(dot16)


dot16_1bit_1, dot16_1bit_4 = _make_dot16(1, 1), _make_dot16(1, 4)
dot16_2bit_1, dot16_2bit_4 = _make_dot16(2, 1), _make_dot16(2, 4)


@intrinsic
def dot_row_vnni(_context, codes, query, chunks):  # type: ignore[no-untyped-def]
    """`codes . query` of one row of `chunks` times 4 words of 2-bit fields: int32;
    addresses are int64, chunks >= 1.
    """
    signature = types.int32(types.int64, types.int64, types.int64)

    def emit(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        codes, query, chunks = arguments
        sums = _emit_dot(builder, codes, [query], chunks, 4, 2, False)[0]
        lanes = [builder.extract_element(sums, ir.Constant(_I32, lane)) for lane in range(4)]
        return builder.add(builder.add(lanes[0], lanes[1]), builder.add(lanes[2], lanes[3]))

    return signature, emit


@intrinsic
def prefetch(_context, address):  # type: ignore[no-untyped-def]
    """Ask for the cache line at an int64 address; a hint, never a fault."""
    signature = types.void(types.int64)

    def emit(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        name = "llvm.prefetch.p0"
        known = [function for function in builder.module.functions if function.name == name]
        kinds = [pointer.type, _I32, _I32, _I32]
        function = (
            known[0]
            if known
            else ir.Function(builder.module, ir.FunctionType(ir.VoidType(), kinds), name)
        )
        read, keep, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
        builder.call(function, [pointer, read, keep, data])
        return context.get_dummy_value()

    return signature, emit


@numba.njit(inline="always")
def prefetch_row(address, size):  # type: ignore[no-untyped-def]
    """Ask for all cache lines of a row of `size` bytes."""
    for offset in range(0, size, 64):
        prefetch(address + offset)

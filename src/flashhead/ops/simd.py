"""What Numba lacks: bfloat16 as bits, and the dot-product instruction for packed 2-bit codes.

`vpdpbusd` multiplies 4 unsigned by 4 signed bytes and adds the sum to an int32 lane. Two intrinsics
build the inner loops of scan and refine around it; they are emitted only where `has_vnni()` says
that the processor has AVX-512 VNNI.
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
_FIELD_MASK = 0x03030303


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


def _emit_dot(builder: Any, codes: Any, query: Any, count: Any, lanes: int, broadcast: bool) -> Any:
    """Loop over `count` vectors of packed words; returns the int32 lanes' sums.

    With `broadcast` each vector holds one word of `lanes` rows and the query's 4 bytes are
    broadcast; without, it holds `lanes` words of one row and the query has as many.
    """
    vector = ir.VectorType(_I32, lanes)
    product = _vpdpbusd(builder.module, lanes)
    constant = lambda value: ir.Constant(vector, [value] * lanes)  # noqa: E731
    words = builder.inttoptr(codes, vector.as_pointer())
    numbers = builder.inttoptr(query, (_I32 if broadcast else vector).as_pointer())
    before = builder.block
    loop, after = builder.append_basic_block("dot"), builder.append_basic_block("dot.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(ir.Constant(_I64, 0), before)
    sums = [builder.phi(vector) for _ in range(4)]
    word = builder.load(builder.gep(words, [step]))
    word.align = 4
    results = []
    for field, total in enumerate(sums):
        total.add_incoming(constant(0), before)
        place = builder.add(builder.mul(step, ir.Constant(_I64, 4)), ir.Constant(_I64, field))
        number = builder.load(builder.gep(numbers, [place]))
        number.align = 4
        factor = _splat(builder, number, lanes) if broadcast else number
        code = builder.and_(builder.lshr(word, constant(2 * field)), constant(_FIELD_MASK))
        results.append(builder.call(product, [total, code, factor]))
    following = builder.add(step, ir.Constant(_I64, 1))
    step.add_incoming(following, loop)
    for total, result in zip(sums, results, strict=True):
        total.add_incoming(result, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return builder.add(builder.add(results[0], results[1]), builder.add(results[2], results[3]))


@intrinsic
def dot16_vnni(_context, codes, query, words, factor, out):  # type: ignore[no-untyped-def]
    """`out[row] += factor * (codes . query)` for the 16 rows of a block;
    addresses are int64, words >= 1.
    """
    signature = types.void(types.int64, types.int64, types.int64, types.float32, types.int64)

    def emit(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        codes, query, words, factor, out = arguments
        floats = ir.VectorType(ir.FloatType(), 16)
        sums = builder.sitofp(_emit_dot(builder, codes, query, words, 16, True), floats)
        place = builder.inttoptr(out, floats.as_pointer())
        old = builder.load(place)
        old.align = 4
        builder.store(
            builder.fadd(old, builder.fmul(sums, _splat(builder, factor, 16))), place
        ).align = 4
        return context.get_dummy_value()

    return signature, emit


@intrinsic
def dot_row_vnni(_context, codes, query, chunks):  # type: ignore[no-untyped-def]
    """`codes . query` of one row of `chunks` times 4 words: int32;
    addresses are int64, chunks >= 1.
    """
    signature = types.int32(types.int64, types.int64, types.int64)

    def emit(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        codes, query, chunks = arguments
        sums = _emit_dot(builder, codes, query, chunks, 4, False)
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
        read, keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
        builder.call(function, [pointer, read, keep, data])
        return context.get_dummy_value()

    return signature, emit


@numba.njit(inline="always")
def prefetch_row(address, size):  # type: ignore[no-untyped-def]
    """Ask for all cache lines of a row of `size` bytes."""
    for offset in range(0, size, 64):
        prefetch(address + offset)

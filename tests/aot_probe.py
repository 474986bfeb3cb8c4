"""Compile every kernel of the probe ahead of time: python tests/aot_probe.py 80 90 100.

One line a kernel and compute capability. It needs no GPU, and TRITON_INTERPRET must not be set.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashhead.ops.probe import triton as probe_kernels
from flashhead.ops.probe import triton_search as search_kernels

TYPES = {
    "hidden_ptr": "*bf16",
    "bias_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "offset_ptr": "*fp32",
    "common_ptr": "*fp32",
    "scores_ptr": "*fp32",
    "logits_ptr": "*fp32",
    "estimate_scale_ptr": "*fp32",
    "estimate_offset_ptr": "*fp32",
    "estimated_ptr": "*i32",
    "clusters_ptr": "*i32",
    "cluster_of_ptr": "*i32",
    "members_ptr": "*i32",
    "always_ptr": "*i32",
    "done_ptr": "*i32",
    "best_ptr": "*i64",
    "tokens_ptr": "*i64",
    "n": "i32",
    "P": "i32",
}
"""Type of an argument of any kernel; `centroids_ptr` and `weight_ptr` come from the case."""

score, select = probe_kernels._score_kernel, probe_kernels._select_kernel
estimate, exact = search_kernels._estimate_kernel, search_kernels._exact_kernel
tile = {"BLOCK_N": 4, "BLOCK_C": 32, "BLOCK_D": 128}
qwen = {"V": 151936, "d": 896, "SIZE": 16, "BLOCK_R": 16, "BLOCK_D": 128}

CASES = [
    (score, {"centroids_ptr": "*i8"}, {"C": 9496, "d": 896, "PACKED": False, **tile}, 8),
    (score, {"centroids_ptr": "*u8"}, {"C": 9496, "d": 575, "PACKED": True, **tile}, 8),
    (score, {"centroids_ptr": "*bf16"}, {"C": 37, "d": 576, "PACKED": False, **tile}, 8),
    (select, {}, {"C": 37, "WINNER": True, "BLOCK_C": 64}, 4),
    (select, {}, {"C": 9496, "WINNER": True, "BLOCK_C": 16384}, 32),
    (select, {}, {"C": 40000, "WINNER": False, "BLOCK_C": 16384}, 32),
    (estimate, {}, {"V": 151936, "C": 9496, "BLOCK_V": 1024}, 4),
    (
        exact,
        {"weight_ptr": "*bf16"},
        {"ALWAYS": 0, "HAS_BIAS": False, "HAS_LOGITS": False, **qwen},
        8,
    ),
    (
        exact,
        {"weight_ptr": "*fp16"},
        {"ALWAYS": 3, "HAS_BIAS": True, "HAS_LOGITS": True, **qwen},
        8,
    ),
    (
        exact,
        {"weight_ptr": "*fp32"},
        {"ALWAYS": 0, "HAS_BIAS": True, "HAS_LOGITS": False, **qwen},
        8,
    ),
]
"""Kernel, types that differ between its cases, constants, warps."""


def compile_case(kernel, types, constants, warps, capability):  # type: ignore[no-untyped-def]
    """Compile one case for one compute capability as the launcher would."""
    known = TYPES | types | dict.fromkeys(constants, "constexpr")
    signature = {name: known[name] for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for kernel, types, constants, warps in CASES:
            compiled = compile_case(kernel, types, constants, warps, capability)
            size = len(compiled.asm["cubin"])
            print(f"sm_{capability} {kernel.__name__} {types} {size} bytes", flush=True)

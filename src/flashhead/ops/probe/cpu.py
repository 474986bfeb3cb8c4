"""Probe on the CPU: one pass over the stored bytes of the centroids, accumulated in float32.

Scoring is bandwidth-bound, so the kernels widen int4, int8 or bf16 values in registers; nothing is
dequantised in memory. torch's own `_weight_int8pack_mm` is as fast only with bf16 hidden states and
then returns bf16 scores, whose rounding would reorder clusters; in float32 it is several times
slower (measured with torch 2.13, see docs/log.md).
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor


@njit(parallel=True, fastmath={"reassoc", "contract", "nsz"}, cache=True)
def _score_int8(
    centroids: Any, hidden: Any, scale: Any, offset: Any, shared: Any, scores: Any
) -> None:
    for j in prange(centroids.shape[0]):
        for i in range(hidden.shape[0]):
            total = np.float32(0)
            for k in range(hidden.shape[1]):
                total += np.float32(centroids[j, k]) * hidden[i, k]
            scores[i, j] = total * scale[j] + offset[j] + shared[i]


@njit(parallel=True, fastmath={"reassoc", "contract", "nsz"}, cache=True)
def _score_int4(
    centroids: Any, hidden: Any, scale: Any, offset: Any, shared: Any, scores: Any
) -> None:
    half, d = centroids.shape[1], hidden.shape[1]
    for j in prange(centroids.shape[0]):
        for i in range(hidden.shape[0]):
            total = np.float32(0)
            for k in range(d - half):
                low = np.int32(centroids[j, k] & 15) - np.int32(8)
                high = np.int32(centroids[j, k] >> 4) - np.int32(8)
                total += np.float32(low) * hidden[i, k] + np.float32(high) * hidden[i, half + k]
            if 2 * half > d:
                last = np.int32(centroids[j, half - 1] & 15) - np.int32(8)
                total += np.float32(last) * hidden[i, half - 1]
            scores[i, j] = total * scale[j] + offset[j] + shared[i]


@njit(parallel=True, fastmath={"reassoc", "contract", "nsz"}, cache=True)
def _score_bf16(
    centroids: Any, hidden: Any, scale: Any, offset: Any, shared: Any, scores: Any
) -> None:
    for j in prange(centroids.shape[0]):
        for i in range(hidden.shape[0]):
            total = np.float32(0)
            for k in range(hidden.shape[1]):
                bits = np.uint32(centroids[j, k]) << np.uint32(16)
                total += np.uint32(bits).view(np.float32) * hidden[i, k]
            scores[i, j] = total * scale[j] + offset[j] + shared[i]


def cluster_scores(
    hidden: Tensor, centroids: Tensor, scale: Tensor, offset: Tensor, common: Tensor
) -> Tensor:
    """h.common + scale_j * (h.centroids_j) + offset_j: float32[n, C] of hidden float32[n, d]."""
    scores = torch.empty(len(hidden), len(centroids), dtype=torch.float32)
    shared = hidden @ common
    if centroids.dtype == torch.int8:
        kernel, stored = _score_int8, centroids
    elif centroids.dtype == torch.uint8:
        kernel, stored = _score_int4, centroids
    else:
        kernel, stored = _score_bf16, centroids.view(torch.uint16)
    tensors = (stored, hidden.detach(), scale, offset, shared.detach(), scores)
    kernel(*(tensor.contiguous().numpy() for tensor in tensors))
    return scores

"""Which cached tokens a query should read: a scan of all keys in few bits.

    estimate_t = scale * query.code_t + bias_t                       for every head
    mass_block = mean over heads of softmax(estimate) in the block
    selected   = the first and last tokens and the blocks of most mass, in order

What follows is exact attention over the selected tokens, so a step reads `dim * bits / 8 + 2` bytes
a token and group of heads, and whole latents only of the selected. One choice serves all heads:
latents are shared by them, so a token that is read is read for all. This is the search of the
vocabulary (`ops.scan`) applied to the context; blocks by bounds of their keys are Quest
(arXiv 2406.10774), tokens by a small indexer DeepSeek-V3.2.

`impl="reference"` is eager torch and the specification; `impl="cpu"` scans with Numba,
`impl="triton"` on a GPU. The choice itself is torch's top-k everywhere.
"""

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.ops.dispatch import resolve_impl
from flashhead.ops.latent_decode.api import check_seen
from flashhead.ops.latent_select import reference
from flashhead.ops.latent_select.codes import KeyCodes
from flashhead.ops.latent_select.options import SelectOptions


def latent_select(
    query: Tensor,
    keys: KeyCodes,
    lengths: Tensor,
    *,
    scale: float,
    options: SelectOptions,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose tokens of each row.

    Args:
        query: floating `[batch, heads, dim]`; heads h * share and on belong to group h of the keys.
        keys: codes of `tokens` keys of each row.
        lengths: `int32[batch]`, tokens of each row.
        scale: of the scores.
        options: how many are chosen.
        starts: `int32[batch]`: tokens before it are not seen. None: 0.
        bias: floating `[1 or batch, 1 or heads, tokens]`, added to scores; -inf hides a token.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        index `int32[batch, n]`, ascending, -1 where a row or its last block has no token; n is
        `options.tokens`, or all tokens in whole blocks where there are fewer. And
        `float32[batch]`: the share of attention that they hold by the estimates, mean over heads.

    Raises:
        FlashHeadError: shapes, dtypes or devices do not fit, or `impl` cannot run here.
    """
    _check(query, keys, lengths)
    check_seen(query, lengths, starts, bias, keys.codes.shape[1])
    scores = estimate(query, keys, scale=scale, impl=impl)
    return reference.choose(scores, lengths, starts, bias, options)


def estimate(query: Tensor, keys: KeyCodes, *, scale: float, impl: str = "auto") -> Tensor:
    """Estimated scores of all tokens: float32 `[batch, heads, tokens]`; arguments as above."""
    chosen = resolve_impl(impl, query.device)
    if chosen == "cpu":
        from flashhead.ops.latent_select import cpu

        return cpu.estimate(query, keys, scale)
    if chosen == "triton":
        from flashhead.ops.latent_select import triton

        return triton.estimate(query, keys, scale)
    return reference.estimate(query, keys, scale)


def _check(query: Tensor, keys: KeyCodes, lengths: Tensor) -> None:
    batch, tokens, groups = keys.codes.shape[:3]
    fits = query.dim() == 3 and query.is_floating_point()
    if not fits or query.shape[0] != batch or query.shape[2] != keys.dim or query.shape[1] % groups:
        raise FlashHeadError(
            f"query is {query.dtype}{list(query.shape)}, wanted floating [{batch}, a multiple of "
            f"{groups} heads, {keys.dim}]"
        )
    if tokens < 1:
        raise FlashHeadError("keys of no token: wanted one or more")
    if lengths.shape != (batch,) or lengths.dtype != torch.int32:
        raise FlashHeadError(
            f"lengths is {lengths.dtype}{list(lengths.shape)}, wanted int32[{batch}]"
        )

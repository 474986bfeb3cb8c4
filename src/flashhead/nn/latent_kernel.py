"""Decode steps of `nn.latent` through `ops.latent_decode`: nothing is widened or gathered.

The cache is read as it is kept, one run after the other (exact first tokens, codes, exact last
ones); runs are merged by their log-sum-exp.
"""

import functools
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.ops.latent_decode.api import MOST_HEADS, MOST_RANK, MOST_ROTARY, latent_decode
from flashhead.ops.latent_decode.rebuilt import latent_decode_rebuilt
from flashhead.ops.latent_decode.reference import KeyUp
from flashhead.ops.latent_decode.rows import KINDS, Rows

if TYPE_CHECKING:
    from flashhead.nn.latent import LatentAttention

Run = tuple[Rows, Rows | None]
_log = logging.getLogger("flashhead")


def wanted(module: "LatentAttention", cache: object, tokens: int, device: torch.device) -> bool:
    """Whether a call goes through the kernels; with mode "auto" on a GPU, where they take it.

    Raises:
        FlashHeadError: mode "kernel", and they do not.
    """
    if module.mode not in ("auto", "kernel") or tokens != 1 or cache is None:
        return False
    if module.mode == "kernel":
        reason = _cache_unfit(cache) or unfit(module, device)
        if reason:
            raise FlashHeadError(f"mode='kernel': {reason}")
        return True
    if module.training or device.type != "cuda" or not hasattr(cache, "append_rows"):
        return False
    reason = _cache_unfit(cache) or unfit(module, device)
    if not reason and module.shape.rotary == "rebuilt":
        reason = "the kernel that rebuilds keys has not run on a card yet: mode='kernel' takes it"
    _say(reason)
    return not reason


def _cache_unfit(cache: object) -> str:
    if not hasattr(cache, "append_rows"):
        return f"a {type(cache).__name__}, wanted a LatentCache"
    kind = cache.options.kind if hasattr(cache, "options") else ""
    return "" if kind in KINDS else f"latents kept as {kind!r}: wanted one of {', '.join(KINDS)}"


def unfit(module: "LatentAttention", device: torch.device) -> str:
    """Why the kernels cannot take this attention; "" where they can."""
    shape = module.shape
    limits = (
        ("rank", shape.rank, MOST_RANK),
        ("rotary_width", shape.rotary_width, MOST_ROTARY),
        ("heads", shape.heads, MOST_HEADS),
    )
    for name, value, most in limits:
        if value > most:
            return f"{name} is {value}: wanted {most} at most"
    if shape.rotary == "rebuilt" and device.type == "cuda":
        return _rebuilt_unfit(shape.rank, shape.head_dim, shape.heads // shape.kv_heads, device)
    return ""


@functools.cache
def _rebuilt_unfit(rank: int, head_dim: int, share: int, device: torch.device) -> str:
    from flashhead.ops.latent_decode import triton_launch

    return triton_launch.rebuilt_unfit(rank, head_dim, share, device)


@functools.cache
def _say(reason: str) -> None:
    """Once a process."""
    if reason:
        _log.warning("latent attention: mode='auto' decodes eagerly (slow): %s", reason)
    else:
        _log.info("latent attention: mode='auto' decodes through ops.latent_decode, on a GPU")


def attend(
    module: "LatentAttention", query: Tensor, runs: list[Run], mask: Tensor | None, start: int
) -> Tensor:
    """Attention of one token a row: `[batch, heads, 1, value_dim]`.

    Args:
        module: whose projections are taken.
        query: turned, `[batch, heads, 1, head_dim]`.
        runs: of the cache.
        mask: bool (True: seen) or additive `[1 or batch, 1, 1, cached]`, or None.
        start: index of the first cached token.
    """
    shape = module.shape
    held = sum(latent.codes.shape[1] for latent, _ in runs)
    bias = None if mask is None else bias_of(mask[:, 0, :, mask.shape[-1] - held :])
    query = query.squeeze(2)
    up = None
    if shape.rotary == "rebuilt":
        cos, sin = module.table.at(0, start + held, query.float())
        up = KeyUp(module.key_up, shape.kv_heads, cos, sin, module.key_constant)
    else:
        if module.key_constant is not None:
            angles = module.table.at(start, start + held, query.float())
            added = constant_scores(module, query, *angles)
            bias = added if bias is None else bias + added
        query = absorbed_query(module, query)
    parts, done = [], 0
    for latent, rotary in runs:
        tokens = latent.codes.shape[1]
        lengths = torch.full((len(query),), tokens, dtype=torch.int32, device=query.device)
        own = None if bias is None else bias[..., done : done + tokens]
        if up is None:
            found = latent_decode(
                query, latent, lengths, scale=shape.scale, rotary=rotary, bias=own
            )
        else:
            found = latent_decode_rebuilt(
                query, latent, up, lengths, scale=shape.scale, first_index=start + done, bias=own
            )
        parts.append(found)
        done += tokens
    return values_of(module, merge(parts))


def values_of(module: "LatentAttention", mixed: Tensor) -> Tensor:
    """Values of mixed latents `[batch, heads, r]`: `[batch, heads, 1, value_dim]`."""
    shape = module.shape
    mixed = mixed.unflatten(1, (shape.kv_heads, -1))
    value_up = module.value_up.unflatten(0, (shape.kv_heads, -1))
    values = mixed @ value_up.mT + module.value_constant.unflatten(0, (shape.kv_heads, 1, -1))
    return values.flatten(1, 2).unsqueeze(2)


def absorbed_query(module: "LatentAttention", query: Tensor) -> Tensor:
    """The query against latent and rotary key: `[batch, heads, r + rotary_width]`."""
    shape = module.shape
    grouped = query.unflatten(1, (shape.kv_heads, -1))
    turning, fixed = grouped.split((shape.rotary_dim, shape.fixed_dim), -1)
    parts = [fixed @ module.key_up.unflatten(0, (shape.kv_heads, -1))]
    if shape.rotary_width:
        parts.append(turning @ module.mixes().mT)
    return torch.cat(parts, -1).flatten(1, 2)


def constant_scores(module: "LatentAttention", query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the constant key adds to scores: float32 `[batch, heads, cached]`.

    Args:
        module: whose constant is taken.
        query: turned, `[batch, heads, head_dim]`.
        cos: float32 `[cached, pairs]`.
        sin: likewise.

    q . turn(k, t) = a cos t + b sin t + c: a product of a few numbers a head with the angles, and
    no turned key exists.
    """
    shape = module.shape
    assert module.key_constant is not None
    constant = module.key_constant.float().unflatten(0, (shape.kv_heads, 1, -1))
    grouped = query.float().unflatten(1, (shape.kv_heads, -1))
    pairs = cos.shape[1]
    sizes = (pairs, pairs, shape.head_dim - 2 * pairs)
    (q_re, q_im, q_rest), (k_re, k_im, k_rest) = (x.split(sizes, -1) for x in (grouped, constant))
    scores = (q_re * k_re + q_im * k_im) @ cos.T + (q_im * k_re - q_re * k_im) @ sin.T
    scores = scores + (q_rest * k_rest).sum(-1, keepdim=True)
    return shape.scale * scores.flatten(1, 2)


def merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One answer of several runs' `out [batch, heads, r]` and `lse [batch, heads]`."""
    if len(parts) == 1:
        return parts[0][0]
    lse = torch.stack([part[1] for part in parts])
    weights = (lse - lse.amax(0).clamp_min(torch.finfo(lse.dtype).min)).exp()
    total = weights.sum(0)
    weights = weights / total.masked_fill(total == 0, 1)
    outs = torch.stack([part[0] for part in parts])
    return (weights[..., None] * outs.float()).sum(0).to(outs.dtype)


def bias_of(mask: Tensor) -> Tensor:
    """What a mask, bool (True: seen) or additive, adds to scores."""
    if mask.dtype != torch.bool:
        return mask.float()
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_fill(~mask, -torch.inf)

"""One query token a row attends over cached latents, from which turning keys are rebuilt.

    key_t = turn(up @ latent_t + constant, first_index + t)     one for each KV head
    scores_t = scale * query.key_t + bias_t
    out = softmax(scores) @ latent,    lse = logsumexp(scores)

A key that turns with its position cannot be absorbed into the query; here it exists only where it
is read. Values are absorbed as in `api`. Costs r * kv_heads * head_dim products a token.
"""

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.ops.latent_decode import cpu, reference
from flashhead.ops.latent_decode.api import check_rows, check_seen, resolve_impl
from flashhead.ops.latent_decode.blocks import Blocks
from flashhead.ops.latent_decode.reference import KeyUp
from flashhead.ops.latent_decode.rows import Rows


def latent_decode_rebuilt(
    query: Tensor,
    latent: Rows,
    up: KeyUp,
    lengths: Tensor,
    *,
    scale: float,
    first_index: int = 0,
    table: Tensor | None = None,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
    longest: int | None = None,
    impl: str = "auto",
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over the first `lengths` tokens of each row.

    Equals, without a table, and with what is not seen at -inf,
        keys = up.keys(latent, first_index)
        scores = (query.unflatten(1, (kv_heads, -1)) @ keys.mT).flatten(1, 2) * scale + bias
        out, lse = scores.softmax(-1) @ latent, scores.logsumexp(-1)

    Args:
        query: floating `[batch, heads, head_dim]`, turned; heads h * share and on belong to KV
            head h.
        latent: as in `api.latent_decode`.
        up: the key projection, its constant and the angles.
        lengths: `int32[batch]`, tokens of each row; 0: out is 0 and lse is -inf.
        scale: of the scores.
        first_index: index of token 0 of all rows, by which its key turns.
        table: as in `api.latent_decode`.
        starts: likewise.
        bias: likewise.
        longest: likewise.
        impl: "auto", "reference", "cpu" or "triton".
        blocks: how "triton" cuts up the work; None: chosen from the shape.

    Returns:
        out `[batch, heads, r]` in the query's dtype, and lse `float32[batch, heads]`.

    Raises:
        FlashHeadError: shapes, dtypes or devices do not fit, or `impl` cannot run here.
    """
    _check_up(query, latent, up)
    room = check_rows(query, latent, lengths, table)
    check_seen(query, lengths, starts, bias, room)
    if longest is not None and not 0 <= longest <= room:
        raise FlashHeadError(f"longest={longest}: wanted 0 to {room}, what the cache has room for")
    most = room if longest is None else longest
    if first_index < 0 or first_index + most > len(up.cos):
        raise FlashHeadError(
            f"angles of {len(up.cos)} indexes: wanted {first_index} + {most} or more"
        )
    chosen = resolve_impl(impl, query.device)
    if blocks is not None and chosen != "triton":
        raise FlashHeadError(f"blocks are for impl='triton', got impl={chosen!r}")
    seen = (first_index, lengths, table, starts, bias, scale)
    if chosen == "triton":
        from flashhead.ops.latent_decode import triton_launch

        given = (query, latent, up, *seen, most, blocks or Blocks())
        return triton_launch.latent_decode_rebuilt(*given)
    if chosen == "cpu":
        return cpu.latent_decode_rebuilt(query, latent, up, *seen)
    out, lse = reference.latent_decode_rebuilt(query, latent, up, *seen, torch.float32)
    return out.to(query.dtype), lse


def _check_up(query: Tensor, latent: Rows, up: KeyUp) -> None:
    if query.dim() != 3 or not query.is_floating_point() or query.stride(2) != 1:
        got = f"{query.dtype}{list(query.shape)}"
        raise FlashHeadError(f"query is {got}, wanted floating [batch, heads, head_dim]")
    heads, head_dim = query.shape[1:]
    if up.kv_heads < 1 or heads % up.kv_heads:
        raise FlashHeadError(f"{heads} heads, {up.kv_heads} KV heads: wanted a divisor")
    shape = (up.kv_heads * head_dim, latent.width)
    if tuple(up.weight.shape) != shape or not up.weight.is_contiguous():
        raise FlashHeadError(
            f"up.weight is {list(up.weight.shape)}, wanted contiguous {list(shape)}"
        )
    if up.constant is not None and tuple(up.constant.shape) != shape[:1]:
        raise FlashHeadError(f"up.constant is {list(up.constant.shape)}, wanted {list(shape[:1])}")
    for name, angles in (("cos", up.cos), ("sin", up.sin)):
        fits = angles.dim() == 2 and angles.dtype == torch.float32 and angles.is_contiguous()
        if not fits or angles.shape != up.cos.shape or 2 * angles.shape[1] > head_dim:
            got = f"{angles.dtype}{list(angles.shape)}"
            raise FlashHeadError(
                f"up.{name} is {got}, wanted contiguous float32 [indexes, {head_dim // 2} at most]"
            )

"""One query token a row attends over cached latents, read by all heads.

    scores_t = scale * (query[:r].latent_t + query[r:].rotary_t) + bias_t
    out      = softmax(scores) @ latent,    lse = logsumexp(scores)

The key projection has been absorbed into the query and the value projection is to be absorbed into
what comes out, so a cached token is read once and serves as key and value of every head
(arXiv 2405.04434). `rows.Rows` says how vectors are kept; latent and rotary may be two views of one
cache `[.., .., r + rope]`, its first r and its last rope numbers.

`impl="reference"` is eager torch in float32 and the specification; `impl="cpu"` works in the
cache's dtype, range by range; `impl="triton"` runs on a GPU. An implementation that cannot run is
an error.
"""

import logging

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.ops.latent_decode import cpu, reference
from flashhead.ops.latent_decode.blocks import Blocks
from flashhead.ops.latent_decode.rows import Rows

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
MOST_RANK, MOST_ROTARY, MOST_HEADS = 1024, 128, 256
_log = logging.getLogger("flashhead")
_said: set[str] = set()


def latent_decode(
    query: Tensor,
    latent: Rows,
    lengths: Tensor,
    *,
    scale: float,
    rotary: Rows | None = None,
    table: Tensor | None = None,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
    longest: int | None = None,
    impl: str = "auto",
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over the first `lengths` tokens of each row.

    Equals, without a table, and with what is not seen at -inf,
        keys = cat([latent, rotary], -1)
        scores = (query @ keys.mT) * scale + bias
        out, lse = scores.softmax(-1) @ latent, scores.logsumexp(-1)

    Args:
        query: floating `[batch, heads, r + rope]`, the latent part first.
        latent: of width r, 1024 at most: `[batch, tokens, ...]`; with a table
            `[blocks, block_size, ...]`.
        lengths: `int32[batch]`, tokens of each row; 0: out is 0 and lse is -inf.
        scale: of the scores.
        rotary: of width rope, 128 at most, laid out as `latent`. None: rope is 0.
        table: `int32[batch, most_blocks]`: blocks of each row, in order; what is beyond a row's
            length is not read.
        starts: `int32[batch]`: tokens before it are not seen (a sliding window). None: 0.
        bias: floating `[1 or batch, 1 or heads, tokens]`, added to scores; -inf hides a token.
        longest: no row is longer, as the host knows it. None: all that the cache has room for.
        impl: "auto", "reference", "cpu" or "triton".
        blocks: how "triton" cuts up the work; None: chosen from the shape.

    Returns:
        out `[batch, heads, r]` in the query's dtype, and lse `float32[batch, heads]`.

    Raises:
        FlashHeadError: shapes, dtypes or devices do not fit, or `impl` cannot run here.
    """
    room = _check(query, latent, rotary, lengths, table)
    _check_seen(query, lengths, starts, bias, room)
    if longest is not None and not 0 <= longest <= room:
        raise FlashHeadError(f"longest={longest}: wanted 0 to {room}, what the cache has room for")
    chosen = resolve_impl(impl, query.device)
    if blocks is not None and chosen != "triton":
        raise FlashHeadError(f"blocks are for impl='triton', got impl={chosen!r}")
    if chosen == "triton":
        from flashhead.ops.latent_decode import triton_launch

        return triton_launch.latent_decode(
            query,
            latent,
            rotary,
            lengths,
            table,
            starts,
            bias,
            scale,
            room if longest is None else longest,
            blocks or Blocks(),
        )
    if chosen == "cpu":
        return cpu.latent_decode(query, latent, rotary, lengths, table, starts, bias, scale)
    out, lse = reference.latent_decode(
        query, latent, rotary, lengths, table, starts, bias, scale, torch.float32
    )
    return out.to(query.dtype), lse


def resolve_impl(impl: str, device: torch.device) -> str:
    """Name of the implementation that runs on `device`; "auto" says once in the log which.

    Raises:
        FlashHeadError: unknown name, or triton is missing.
    """
    if impl not in IMPLEMENTATIONS:
        raise FlashHeadError(f"impl={impl!r}: wanted one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "cpu" and device.type != "cpu":
        raise FlashHeadError(f"impl='cpu': tensors are on {device}, wanted cpu")
    chosen = impl
    if impl == "auto":
        chosen = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
        if chosen not in _said:
            _said.add(chosen)
            _log.info("latent decode: impl='auto' chose %r on %s", chosen, device.type)
    if chosen == "triton":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise FlashHeadError(
                f"impl='triton' needs triton ({error}): pip install triton"
            ) from error
    return chosen


def _check(
    query: Tensor, latent: Rows, rotary: Rows | None, lengths: Tensor, table: Tensor | None
) -> int:
    """Tokens of a row that the cache has room for."""
    rope = 0 if rotary is None else rotary.width
    width = latent.width + rope
    if query.dim() != 3 or query.shape[2] != width or not query.is_floating_point():
        got = f"{query.dtype}{list(query.shape)}"
        raise FlashHeadError(f"query is {got}, wanted floating [batch, heads, {width}]")
    batch, heads = query.shape[:2]
    if query.stride(2) != 1:
        raise FlashHeadError("query: wanted its last axis contiguous")
    limits = {"rank": (latent.width, MOST_RANK), "rotary": (rope, MOST_ROTARY)}
    for name, (value, most) in {**limits, "heads": (heads, MOST_HEADS)}.items():
        if value > most:
            raise FlashHeadError(f"{name} is {value}: wanted {most} at most")
    if rotary is not None and rotary.codes.shape[:2] != latent.codes.shape[:2]:
        raise FlashHeadError(
            f"rotary is {list(rotary.codes.shape)}, latent {list(latent.codes.shape)}: wanted equal"
        )
    _require_int32("lengths", lengths, (batch,))
    if table is None:
        if latent.codes.shape[0] != batch:
            raise FlashHeadError(f"latent has {latent.codes.shape[0]} rows, wanted {batch}")
        return latent.codes.shape[1]
    if table.dim() != 2 or table.stride(1) != 1:
        raise FlashHeadError(f"table is {list(table.shape)}, wanted [{batch}, most_blocks]")
    _require_int32("table", table, (batch, table.shape[1]))
    return table.shape[1] * latent.codes.shape[1]


def _check_seen(
    query: Tensor, lengths: Tensor, starts: Tensor | None, bias: Tensor | None, room: int
) -> None:
    if starts is not None:
        _require_int32("starts", starts, tuple(lengths.shape))
    if bias is None:
        return
    batch, heads = query.shape[:2]
    fits = (
        bias.dim() == 3
        and bias.shape[0] in (1, batch)
        and bias.shape[1] in (1, heads)
        and bias.shape[2] >= room
        and bias.stride(2) == 1
        and bias.is_floating_point()
    )
    if not fits:
        got = f"{bias.dtype}{list(bias.shape)}"
        raise FlashHeadError(
            f"bias is {got}, wanted floating [1 or {batch}, 1 or {heads}, {room}], last contiguous"
        )


def _require_int32(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.int32:
        got = f"{tensor.dtype}{list(tensor.shape)}"
        raise FlashHeadError(f"{name} is {got}, wanted int32{list(shape)}")

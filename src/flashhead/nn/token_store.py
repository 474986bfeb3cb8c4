"""Vectors of tokens, kept in few bits: what a cache is made of.

How a vector is coded says `ops.latent_decode.rows`; "mixed" is for latents made for it: 8,
4 and 2 bits a coordinate and one scale a token (`mixed_bits.py`). The first and the last tokens can
stay exact: attention sinks and the latest tokens are read most. Bytes a token of width w: bf16 2w;
int8 and fp8 (e4m3) w + 2 a group; int4 w / 2 + 2 a group; mixed what its widths take, + 2.
"""

import dataclasses
import math

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.nn import mixed_bits
from flashhead.nn.mixed_bits import Counts
from flashhead.ops.latent_decode.rows import KINDS as CODED
from flashhead.ops.latent_decode.rows import Rows, dequantize, quantize

KINDS = (*CODED, "mixed")


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """How tokens are kept.

    Args:
        kind: "bf16" (the dtype that comes in), "fp8", "int8", "int4" or "mixed".
        group: coordinates that share a scale, 2 or more, even.
        exact_first: tokens at the start that stay in the dtype that came in.
        exact_last: tokens at the end that do.

    Raises:
        FlashHeadError: a value out of range.
    """

    kind: str = "bf16"
    group: int = 64
    exact_first: int = 0
    exact_last: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FlashHeadError(f"kv_dtype={self.kind!r}: wanted one of {', '.join(KINDS)}")
        if type(self.group) is not int or self.group < 2 or self.group % 2:
            raise FlashHeadError(f"group={self.group!r}: wanted an even number, 2 or more")
        for name in ("exact_first", "exact_last"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise FlashHeadError(f"{name}={value!r}: wanted 0 or a positive integer")


def encode(x: Tensor, options: StoreOptions, counts: Counts | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of floating `[..., width]`: `ops.latent_decode.rows.quantize`, or
    `mixed_bits.encode` with the counts of its widths.
    """
    if options.kind == "mixed":
        assert counts is not None
        return mixed_bits.encode(x, counts)
    return quantize(x, options.kind, options.group)


def decode(
    codes: Tensor,
    scale: Tensor,
    width: int,
    kind: str,
    dtype: torch.dtype,
    counts: Counts | None = None,
) -> Tensor:
    """The way back: `[..., width]`."""
    if kind == "mixed":
        assert counts is not None
        return mixed_bits.decode(codes, scale, counts, dtype)
    return dequantize(codes, scale, width, kind, dtype)


def round_through(x: Tensor, options: StoreOptions, counts: Counts | None = None) -> Tensor:
    """What a store would give back, with the gradient of the identity (the straight-through
    estimator, arXiv 1308.3432), for training.

    Args:
        x: floating `[batch, tokens, width]`, whole texts.
        options: how tokens are kept; `exact_last` counts for nothing.
        counts: as in `encode`.
    """
    if options.kind == "bf16":
        return x
    with torch.no_grad():
        codes, scale = encode(x, options, counts)
        off = decode(codes, scale, x.shape[-1], options.kind, x.dtype, counts) - x
        off[:, : options.exact_first] = 0
    return x + off


class TokenStore:
    """Growing `[batch, tokens, width]`: exact first tokens, codes, exact last tokens.

    Args:
        options: how tokens are kept.
        counts: coordinates in 8, 4 and 2 bits, for the kind mixed.
        reserve: tokens that there is room for whenever memory is taken, so that not every token
            copies all before it; counted in `bytes_held`.

    Raises:
        FlashHeadError: the kind mixed without counts.
    """

    def __init__(
        self, options: StoreOptions, counts: Counts | None = None, reserve: int = 0
    ) -> None:
        if options.kind == "mixed" and counts is None:
            raise FlashHeadError("kv_dtype='mixed': wanted latents that were converted for it")
        self.options, self.counts, self.reserve = options, counts, reserve
        self._rooms: dict[str, Tensor] = {}
        self.parts: dict[str, Tensor] = {}
        """"first" and "last" (exact) `[batch, n, width]`, "codes" and "scale" between them."""
        self.width = 0

    def append(self, x: Tensor) -> None:
        """Add tokens at the end.

        Args:
            x: floating `[batch, tokens, width]`.
        """
        if not self.parts:
            self._start(x)
        room = max(0, self.options.exact_first - self.parts["first"].shape[1])
        if room and not self.parts["codes"].shape[1]:
            self._extend("first", x[:, :room])
            x = x[:, room:]
        self._extend("last", x)
        full = self.parts["last"].shape[1] - self.options.exact_last
        if self.options.kind != "bf16" and full > 0:
            last = self.parts["last"]
            self._code(last[:, :full])
            self._set("last", last[:, full:].clone())

    def read(self) -> Tensor:
        """All tokens: `[batch, tokens, width]` in the dtype that came in."""
        parts = [self.parts["first"], self.parts["last"]]
        if self.parts["codes"].shape[1]:
            middle = decode(
                self.parts["codes"],
                self.parts["scale"],
                self.width,
                self.options.kind,
                parts[0].dtype,
                self.counts,
            )
            parts.insert(1, middle)
        parts = [part for part in parts if part.shape[1]] or parts[:1]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def take(self, index: Tensor) -> Tensor:
        """Some tokens of each row: `[batch, n, width]` in the dtype that came in; only they are
        decoded.

        Args:
            index: int64 `[batch, n]`, of tokens that are there.
        """
        kind, dtype, at, found = self.options.kind, self.parts["first"].dtype, 0, None
        rows = torch.arange(len(index), device=index.device)[:, None]
        for names in (("first",), ("codes", "scale"), ("last",)):
            length = self.parts[names[0]].shape[1]
            if not length:
                continue
            own = (index - at).clamp(0, length - 1)
            vectors, *scale = (self.parts[name][rows, own] for name in names)
            if scale:
                vectors = decode(vectors, scale[0], self.width, kind, dtype, self.counts)
            found = vectors if found is None else torch.where(index[..., None] < at, found, vectors)
            at += length
        assert found is not None, "a store without tokens"
        return found

    def rows(self) -> list[Rows]:
        """All tokens as they are kept: one run of `[batch, tokens, ...]` after the other."""
        kind, parts = self.options.kind, self.parts
        first, last = (Rows(parts[name], self.width) for name in ("first", "last"))
        runs = [first, last]
        if parts["codes"].shape[1]:
            runs.insert(1, Rows(parts["codes"], self.width, kind, parts["scale"]))
        return [run for run in runs if run.codes.shape[1]]

    def __len__(self) -> int:
        if not self.parts:
            return 0
        return sum(self.parts[name].shape[1] for name in ("first", "codes", "last"))

    def keep(self, start: int, stop: int) -> None:
        """Drop all tokens but [start, stop)."""
        at = 0
        for names in (("first",), ("codes", "scale"), ("last",)):
            length = self.parts[names[0]].shape[1]
            low, high = (min(max(edge - at, 0), length) for edge in (start, stop))
            for name in names:
                # a view would keep the memory of what was dropped
                if (low, high) != (0, length):
                    self._set(name, self.parts[name][:, low:high].clone())
            at += length

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order.

        Args:
            rows: int64[any].
        """
        rows = rows.to(self.parts["first"].device)
        for name, part in self.parts.items():
            self._set(name, part.index_select(0, rows))

    def bytes_held(self) -> int:
        """Bytes of all storage behind it."""
        return sum(part.untyped_storage().nbytes() for part in self.parts.values())

    def load(self, parts: dict[str, Tensor], width: int) -> None:
        """Take what `parts` of another store of the same options held.

        Raises:
            FlashHeadError: parts that do not belong together.
        """
        if set(parts) != {"first", "codes", "scale", "last"}:
            raise FlashHeadError(f"cache: a store's parts: {sorted(parts)}")
        kind = self.options.kind
        group = min(self.options.group, width + width % 2)
        padded = width + -width % group
        wanted = {"first": width, "last": width, "codes": padded, "scale": padded // group}
        wanted["codes"] = padded // 2 if kind == "int4" else 0 if kind == "bf16" else padded
        wanted["scale"] = 0 if kind == "bf16" else padded // group
        if self.counts is not None:
            wanted["codes"], wanted["scale"] = mixed_bits.code_bytes(self.counts), 1
        for name, part in parts.items():
            if part.dim() != 3 or part.shape[2] != wanted[name]:
                raise FlashHeadError(
                    f"cache: {name} of {list(part.shape)}: wanted width {wanted[name]}"
                )
        self.parts, self.width, self._rooms = dict(parts), width, {}

    def _start(self, x: Tensor) -> None:
        empty = x[:, :0].clone()
        codes, scale = empty[..., :0], empty[..., :0]
        if self.options.kind != "bf16":
            codes, scale = encode(empty, self.options, self.counts)
        self.parts = {"first": empty, "codes": codes, "scale": scale, "last": empty}
        self.width = x.shape[-1]

    def _code(self, x: Tensor) -> None:
        coded = encode(x, self.options, self.counts)
        for name, new in zip(("codes", "scale"), coded, strict=True):
            self._extend(name, new)

    def _extend(self, name: str, new: Tensor) -> None:
        """Add tokens at the end of a part, in place where there is room."""
        held = self.parts[name]
        if not self.reserve:
            self.parts[name] = torch.cat((held, new), 1)
            return
        before, total = held.shape[1], held.shape[1] + new.shape[1]
        room = self._rooms.get(name)
        if room is None or room.shape[1] < total:
            room = held.new_empty(held.shape[0], total + self.reserve, held.shape[2])
            room[:, :before] = held
            self._rooms[name] = room
        room[:, before:total] = new
        self.parts[name] = room[:, :total]

    def _set(self, name: str, part: Tensor) -> None:
        """Replace a part."""
        self.parts[name] = part
        self._rooms.pop(name, None)


def bytes_per_token(width: int, options: StoreOptions, counts: Counts | None = None) -> float:
    """Bytes that one token of `width` numbers takes, exact ones aside; bf16 counts 2 a number."""
    if counts is not None and options.kind == "mixed":
        return mixed_bits.code_bytes(counts) + 2.0
    if options.kind == "bf16":
        return 2.0 * width
    group = min(options.group, width + width % 2)
    groups = math.ceil(width / group)
    return groups * (group / (2 if options.kind == "int4" else 1) + 2)

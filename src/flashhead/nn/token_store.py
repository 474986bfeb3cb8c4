"""Vectors of tokens, kept in few bits: what a cache is made of.

How a vector is coded says `ops.latent_decode.rows`. The first and the last tokens can stay exact:
attention sinks and the latest tokens are read most. Bytes a token of width w: bf16 2w; int8 and fp8
(e4m3) w + 2 a group; int4 w / 2 + 2 a group.
"""

import dataclasses
import math

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.ops.latent_decode.rows import KINDS, Rows, dequantize, quantize


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """How tokens are kept.

    Args:
        kind: "bf16" (the dtype that comes in), "fp8", "int8" or "int4".
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


class TokenStore:
    """Growing `[batch, tokens, width]`: exact first tokens, codes, exact last tokens.

    Args:
        options: how tokens are kept.
        reserve: tokens that there is room for whenever memory is taken, so that not every token
            copies all before it; counted in `bytes_held`.
    """

    def __init__(self, options: StoreOptions, reserve: int = 0) -> None:
        self.options, self.reserve = options, reserve
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
            middle = dequantize(
                self.parts["codes"],
                self.parts["scale"],
                self.width,
                self.options.kind,
                parts[0].dtype,
            )
            parts.insert(1, middle)
        parts = [part for part in parts if part.shape[1]] or parts[:1]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

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
            codes, scale = quantize(empty, self.options.kind, self.options.group)
        self.parts = {"first": empty, "codes": codes, "scale": scale, "last": empty}
        self.width = x.shape[-1]

    def _code(self, x: Tensor) -> None:
        coded = quantize(x, self.options.kind, self.options.group)
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


def bytes_per_token(width: int, options: StoreOptions) -> float:
    """Bytes that one token of `width` numbers takes, exact ones aside; bf16 counts 2 a number."""
    if options.kind == "bf16":
        return 2.0 * width
    group = min(options.group, width + width % 2)
    groups = math.ceil(width / group)
    return groups * (group / (2 if options.kind == "int4" else 1) + 2)

"""Vectors of tokens in rooms of fixed size, written at a place that the host or the device names.

What `token_store` keeps in parts that grow is kept here in tensors that never move, so a CUDA graph
can write and read them. Kinds and codes are the same; exact last tokens are not offered, since what
lies where would depend on the length.
"""

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.nn import mixed_bits
from flashhead.nn.mixed_bits import Counts
from flashhead.nn.token_store import StoreOptions, decode, encode
from flashhead.ops.latent_decode.rows import Rows

ALIGNED_TOKENS = 64
"""Rooms are whole multiples of it: rows then start where every kernel can load."""


def require_fixed(options: StoreOptions) -> None:
    """Raise FlashHeadError if rooms of fixed size cannot keep tokens so."""
    if options.exact_last:
        raise FlashHeadError(
            f"exact_last={options.exact_last}: a static latent cache has no exact last tokens, "
            "wanted 0"
        )


class TokenRooms:
    """Room for `[batch, tokens, width]`.

    Args:
        options: how tokens are kept; the first `exact_first` in their own dtype.
        tokens: there is room for; rounded up to whole `ALIGNED_TOKENS`.
        like: floating `[batch, any, width]`, whose dtype and device are taken.
        counts: coordinates in 8, 4 and 2 bits, for the kind mixed.

    Raises:
        FlashHeadError: options that need rooms that move, or the kind mixed without counts.
    """

    def __init__(
        self, options: StoreOptions, tokens: int, like: Tensor, counts: Counts | None = None
    ) -> None:
        require_fixed(options)
        if options.kind == "mixed" and counts is None:
            raise FlashHeadError("kv_dtype='mixed': wanted latents that were converted for it")
        self.options, self.counts = options, counts
        self.width, self.dtype = like.shape[-1], like.dtype
        coded = options.kind != "bf16"
        self.first = options.exact_first if coded else 0
        """Exact tokens at the start."""
        room, batch = -(-tokens // ALIGNED_TOKENS) * ALIGNED_TOKENS, like.shape[0]
        self.parts: dict[str, Tensor] = {}
        """"codes" and "scale" `[batch, room, ...]`, "first" `[batch, more than first, width]`: its
        token number `first` is written to when a place lies behind it."""
        # a cache outlives the inference mode that it was made in
        with torch.inference_mode(False), torch.no_grad():
            empty = torch.empty(batch, 0, self.width, dtype=like.dtype, device=like.device)
            shapes = {"codes": empty}
            if coded:
                shapes = dict(zip(("codes", "scale"), encode(empty, options, counts), strict=True))
            for name, part in shapes.items():
                self.parts[name] = part.new_zeros(batch, room, part.shape[2])
            if self.first:
                own = -(-(self.first + 1) // 16) * 16
                self.parts["first"] = empty.new_zeros(batch, own, self.width)

    @property
    def room(self) -> int:
        """Tokens that fit."""
        return self.first + self.parts["codes"].shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rooms are."""
        return self.parts["codes"].device

    def write(self, start: int, x: Tensor) -> None:
        """Put tokens at a place that the host knows.

        Args:
            start: index of the first of them.
            x: floating `[batch, tokens, width]`.
        """
        x, exact = x.detach(), min(max(0, self.first - start), x.shape[1])
        if exact:
            self.parts["first"][:, start : start + exact] = x[:, :exact]
        if exact == x.shape[1]:
            return
        start = start + exact - self.first
        for name, part in self._encoded(x[:, exact:]).items():
            self.parts[name][:, start : start + part.shape[1]] = part

    def write_at(self, place: Tensor, x: Tensor) -> None:
        """Put one token a row at a place that the device knows.

        Args:
            place: int64[1], the same for all rows.
            x: floating `[batch, 1, width]`.
        """
        if self.first:
            self.parts["first"].index_copy_(1, place.clamp_max(self.first), x)
            place = (place - self.first).clamp_min(0)
        for name, part in self._encoded(x).items():
            self.parts[name].index_copy_(1, place, part)

    def read(self, begin: int, end: int) -> Tensor:
        """Tokens [begin, end): `[batch, end - begin, width]` in the dtype that came in."""
        exact = min(end, self.first)
        found = [self.parts["first"][:, begin:exact]] if begin < exact else []
        low, high = max(begin, self.first) - self.first, end - self.first
        if low < high or not found:
            found.append(self._decoded(low, max(low, high)))
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def runs(self) -> list[tuple[int, Rows]]:
        """Index of its first token and all the room of each run, as kernels read them.

        The kind mixed is unpacked: no kernel reads it.
        """
        kind = self.options.kind
        if kind == "bf16":
            return [(0, Rows(self.parts["codes"], self.width))]
        if kind == "mixed":
            coded = Rows(self._decoded(0, self.room - self.first), self.width)
        else:
            coded = Rows(self.parts["codes"], self.width, kind, self.parts["scale"])
        exact = [(0, Rows(self.parts["first"][:, : self.first], self.width))] if self.first else []
        return [*exact, (self.first, coded)]

    def reorder(self, rows: Tensor) -> None:
        """Rows of the batch in another order, without moving the rooms; int64[batch]."""
        for part in self.parts.values():
            part.copy_(part.index_select(0, rows.to(part.device)))

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in rooms of their own; int64[any]."""
        with torch.inference_mode(False):
            for name, part in self.parts.items():
                self.parts[name] = part.index_select(0, rows.to(part.device))

    def bytes_held(self) -> int:
        """Bytes of all rooms."""
        return sum(part.untyped_storage().nbytes() for part in self.parts.values())

    def _encoded(self, x: Tensor) -> dict[str, Tensor]:
        if self.options.kind == "bf16":
            return {"codes": x}
        codes, scale = encode(x, self.options, self.counts)
        return {"codes": codes, "scale": scale}

    def _decoded(self, begin: int, end: int) -> Tensor:
        codes = self.parts["codes"][:, begin:end]
        if self.options.kind == "bf16":
            return codes
        scale = self.parts["scale"][:, begin:end]
        if self.options.kind == "mixed":
            assert self.counts is not None
            return mixed_bits.decode(codes, scale, self.counts, self.dtype)
        return decode(codes, scale, self.width, self.options.kind, self.dtype)

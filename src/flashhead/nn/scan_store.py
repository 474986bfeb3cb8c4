"""Codes of cached keys, token by token: what a selection scans (`ops.latent_select`)."""

from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.ops.latent_select.codes import KeyCodes, encode


class ScanStore:
    """Growing codes of keys; tokens and rows come and go as in a `TokenStore`.

    Args:
        bits: of a number of a key.
        reserve: tokens that there is room for whenever memory is taken; counted in `bytes_held`.
    """

    def __init__(self, bits: int, reserve: int = 0) -> None:
        self.bits, self.reserve, self.width = bits, reserve, 0
        self.parts: dict[str, Tensor] = {}
        """"codes" uint8 `[batch, tokens, groups, bytes]`, "scale" float16 `[batch, tokens,
        groups]`."""
        self._rooms: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self.parts["codes"].shape[1] if self.parts else 0

    def append(self, keys: Tensor) -> None:
        """Code more tokens.

        Args:
            keys: floating `[batch, tokens, groups, dim]`.
        """
        codes, scale = encode(keys, self.bits)
        before, self.width = len(self), keys.shape[-1]
        for name, new in (("codes", codes), ("scale", scale)):
            total, room = before + new.shape[1], self._rooms.get(name)
            if room is None or room.shape[1] < total:
                room = new.new_empty(new.shape[0], total + self.reserve, *new.shape[2:])
                if before:
                    room[:, :before] = self.parts[name]
                self._rooms[name] = room
            room[:, before:total] = new
            self.parts[name] = room[:, :total]

    def keys(self) -> KeyCodes:
        """All that is held."""
        return KeyCodes(self.parts["codes"], self.parts["scale"], self.width, self.bits)

    def keep(self, start: int, stop: int) -> None:
        """Drop all tokens but [start, stop)."""
        if (start, stop) != (0, len(self)):
            self._replace({name: part[:, start:stop].clone() for name, part in self.parts.items()})

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order.

        Args:
            rows: int64[any].
        """
        rows = rows.to(self.parts["codes"].device)
        self._replace({name: part.index_select(0, rows) for name, part in self.parts.items()})

    def bytes_held(self) -> int:
        """Bytes of all storage behind it."""
        return sum(part.untyped_storage().nbytes() for part in self.parts.values())

    def load(self, parts: dict[str, Tensor], width: int) -> None:
        """Take what `parts` of another store of the same bits held.

        Raises:
            FlashHeadError: parts that do not belong together.
        """
        if set(parts) != {"codes", "scale"}:
            raise FlashHeadError(f"cache: a scan's parts: {sorted(parts)}")
        KeyCodes(parts["codes"], parts["scale"], width, self.bits)
        self.width = width
        self._replace(dict(parts))

    def _replace(self, parts: dict[str, Tensor]) -> None:
        self.parts, self._rooms = parts, {}

"""A layer of `LatentCache` whose decode steps read a selection of their tokens."""

from typing import Any

from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import StoredLayer
from flashhead.nn.mixed_bits import Counts
from flashhead.nn.scan_store import ScanStore
from flashhead.nn.token_store import StoreOptions, TokenStore
from flashhead.ops.latent_select.codes import KeyCodes
from flashhead.ops.latent_select.options import SelectOptions


class SelectingLayer(StoredLayer):
    """Latents, and beside them codes of the keys of all tokens.

    Args:
        options: how latents are kept.
        counts: of the latent's coordinates in 8, 4 and 2 bits, for the kind mixed.
        reserve: tokens that there is room for whenever memory is taken.
        select: how tokens are chosen.
    """

    def __init__(
        self, options: StoreOptions, counts: Counts | None, reserve: int, select: SelectOptions
    ) -> None:
        self.select = select
        self.scan = ScanStore(select.bits, reserve)
        super().__init__(options, None, counts, reserve)

    def streams(self) -> tuple[TokenStore | ScanStore, ...]:
        """The two streams, and the codes."""
        return (*self.stores, self.scan)

    def append_keys(self, keys: Tensor) -> None:
        """Code the keys of tokens that are about to be appended.

        Args:
            keys: floating `[batch, tokens, groups, dim]`.
        """
        self.scan.append(keys)

    def update(
        self, key_states: Tensor, value_states: Tensor, *more: Any, **others: Any
    ) -> tuple[Tensor, Tensor]:
        """As `StoredLayer.update`, after `append_keys`."""
        self._require_keys(key_states.shape[2])
        return super().update(key_states, value_states, *more, **others)

    def append_tokens(self, latent: Tensor, rotary: Tensor) -> int:
        """Append `[batch, tokens, width]` of both streams; how many tokens are held."""
        self._require_keys(latent.shape[1])
        return self._append(latent.unsqueeze(1), rotary.unsqueeze(1))

    def scanned(self) -> KeyCodes:
        """Codes of all tokens held."""
        return self.scan.keys()

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and rotary keys of some tokens.

        Args:
            index: int64 `[batch, n]`.
        """
        latent, rotary = self.stores
        taken = latent.take(index)
        return taken, rotary.take(index) if rotary.parts else taken[..., :0]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.scan = ScanStore(self.select.bits, self.reserve)

    def _require_keys(self, new: int) -> None:
        if len(self.scan) != len(self.stores[0]) + new:
            raise FlashHeadError(
                f"a cache that selects: codes of {len(self.scan)} keys for "
                f"{len(self.stores[0]) + new} tokens; wanted latent attention that codes them"
            )

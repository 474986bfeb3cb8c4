"""One layer of a `StaticLatentCache`: rooms of fixed size, counted on the host."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from flashhead.errors import FlashHeadError
from flashhead.nn.latent_step import Rooms
from flashhead.nn.mixed_bits import Counts
from flashhead.nn.token_rooms import TokenRooms
from flashhead.nn.token_store import StoreOptions


class StaticLatentLayer(CacheLayerMixin):
    """One layer's rooms.

    Args:
        options: how tokens are kept.
        tokens: there is room for.
        window: tokens that a query sees; None: all.
        counts: of the latent's coordinates in 8, 4 and 2 bits, for the kind mixed.
    """

    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(
        self, options: StoreOptions, tokens: int, window: int | None, counts: Counts | None
    ) -> None:
        super().__init__()
        self.options, self.max_cache_len, self.counts = options, tokens, counts
        self.window, self.is_sliding = window, window is not None
        self.rooms: Rooms | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory: all of it, once."""
        given = (self.options, self.max_cache_len)
        latents = TokenRooms(*given, key_states.squeeze(1), self.counts)
        rotary = TokenRooms(*given, value_states.squeeze(1)) if value_states.shape[-1] else None
        self.rooms, self.is_initialized = (latents, rotary), True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return everything that the window's queries may see.

        Args:
            key_states: latents, floating `[batch, 1, tokens, r]`.
            value_states: rotary keys, `[batch, 1, tokens, rotary_width]`; 0 is allowed.
        """
        if self.rooms is None:
            self.lazy_initialization(key_states, value_states)
        assert self.rooms is not None
        stop = self.seen + key_states.shape[2]
        begin = 0 if self.window is None else max(0, self.seen - self.window + 1)
        read = []
        for rooms, x in zip(self.rooms, (key_states, value_states), strict=True):
            if rooms is None:
                read.append(x.new_empty(x.shape[0], 1, stop - begin, 0))
                continue
            rooms.write(self.seen, x.squeeze(1))
            read.append(rooms.read(begin, stop).unsqueeze(1))
        self.seen = stop
        return read[0], read[1]

    def filled(self) -> list[TokenRooms]:
        """Rooms that there are."""
        return [rooms for rooms in self.rooms or () if rooms is not None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next `update` returns."""
        held = self.seen if self.window is None else min(self.seen, self.window - 1)
        return held + query_length, self.seen - held

    def get_seq_length(self) -> int:
        """Tokens seen, as the host counts them."""
        return self.seen

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.max_cache_len

    def activate_past_recording(self) -> None:
        """Nothing to do: rooms forget nothing."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, given as a negative number.

        Raises:
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): wanted minus the tokens to remove")
        self.seen = max(0, self.seen + tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens, keep the rooms."""
        self.seen = 0

    def offload(self) -> None:
        """Not offered."""
        raise FlashHeadError("offloading: a latent cache stays on its device")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order, as beam search wants them."""
        for rooms in self.filled():
            rooms.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        for rooms in self.filled():
            rooms.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first token."""
        return -1 if self.rooms is None else self.rooms[0].parts["codes"].shape[0]

"""A cache of latents of fixed size: what `generate(cache_implementation="static")` uses.

    cache = StaticLatentCache(model, 4096)
    model.generate(**prompt, past_key_values=cache, max_new_tokens=64)

Prompts go the ordinary way and are written into the rooms. A step of one token then runs through
`nn.latent_step`, which asks nothing of the host, on a GPU as one CUDA graph (`latent_graph`). All
layers have room for all tokens, those with a window too: a window is a start, not a ring.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_static_layer import StaticLatentLayer
from flashhead.nn import latent_kernel
from flashhead.nn.graphs import GraphCache
from flashhead.nn.latent import LatentAttention
from flashhead.nn.latent_step import Angles, LatentStep
from flashhead.nn.rotary import RotaryTable
from flashhead.nn.token_rooms import require_fixed
from flashhead.nn.token_store import StoreOptions

_log = logging.getLogger("flashhead")
_said: set[str] = set()


class StaticLatentCache(Cache):
    """A cache of fixed size for a model with latent attention.

    One that was filled may be used again after `reset()`. Its graphs hold the model's weights by
    their addresses: weights may change in place while it lives.

    Args:
        model: whose attention modules are `LatentAttention`, loaded by flashhead.
        tokens: of a row, prompt and padding included, that there is room for.
        options: how latents are kept; None: as the model's folder says, else bf16.

    Raises:
        FlashHeadError: no latent attention, or options that need rooms that move.
    """

    def __init__(
        self, model: PreTrainedModel, tokens: int, options: StoreOptions | None = None
    ) -> None:
        found = [m for m in model.modules() if isinstance(m, LatentAttention)]
        if not found:
            raise FlashHeadError("the model has no latent attention: flashhead convert makes one")
        if not hasattr(model, "latent_store"):
            raise FlashHeadError("StaticLatentCache: wanted a model that flashhead.load returned")
        if type(tokens) is not int or tokens < 1:
            raise FlashHeadError(f"tokens={tokens!r}: wanted a positive integer")
        self.options: StoreOptions = options or model.latent_store
        require_fixed(self.options)
        self.modules = sorted(found, key=lambda module: module.layer_idx)
        shapes = [module.shape for module in self.modules]
        layers = [StaticLatentLayer(self.options, tokens, s.window, s.counts) for s in shapes]
        super().__init__(layers=layers)
        self.tokens = tokens
        self.step: LatentStep | None = None
        """Of the call that runs now; None: a prompt, or no call."""
        self.graphs = GraphCache()
        self._padding = self._place = torch.empty(0)
        self._angles: dict[RotaryTable, Angles] = {}

    def before_call(self, tokens: int, batch: int, mask: Any) -> bool:
        """Prepare for a call of so many new tokens; whether it is a step on the device.

        Args:
            tokens: of each row.
            batch: rows.
            mask: what the call got, bool or integer `[batch, seen + tokens]`, or None.

        Raises:
            FlashHeadError: no room, another batch, a mask that is not left padding, or
                mode="kernel" where the kernels cannot run.
        """
        seen = self.get_seq_length()
        if seen + tokens > self.tokens:
            raise FlashHeadError(
                f"StaticLatentCache: {seen} + {tokens} tokens, room for {self.tokens}"
            )
        weight, held = self.modules[0].key_up, self.layers[0].filled()
        if held and (self.layers[0].batch_size, held[0].device) != (batch, weight.device):
            if seen:
                raise FlashHeadError(
                    f"StaticLatentCache: {batch} rows on {weight.device}, it holds "
                    f"{self.layers[0].batch_size} on {held[0].device}"
                )
            self._forget_rooms()
        elif held and not seen and held[0].dtype != weight.dtype:
            self._forget_rooms()
        self._make_padding(batch, weight.device)
        if tokens == 1 and seen and self._takes_steps():
            return True
        self._note(mask, batch, seen + tokens)
        return False

    def begin_step(self) -> LatentStep:
        """Angles, lengths and starts of the step that the device's place names."""
        rooms = [layer.rooms for layer in self.layers]
        step = LatentStep(self._place, self._padding, rooms, self._angles)
        self.step = step
        return step

    def place(self) -> Tensor:
        """int64[1], the new token's index, set to what the host has counted."""
        device = self.modules[0].key_up.device
        if self._place.device != device or not len(self._place):
            self._make_device_state(device)
        return self._place.fill_(self.get_seq_length())

    def end_step(self) -> None:
        """Count the token that a step has written."""
        for layer in self.layers:
            layer.seen += 1

    def reset(self) -> None:
        """Forget all tokens; rooms and graphs stay."""
        super().reset()
        if len(self._padding):
            self._padding.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order, as beam search wants them."""
        super().reorder_cache(beam_idx)
        if len(self._padding):
            self._padding.copy_(self._padding.index_select(0, beam_idx.to(self._padding.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in new rooms."""
        super().batch_select_indices(indices)
        with torch.inference_mode(False):
            if len(self._padding):
                indices = indices.to(self._padding.device)
                self._padding = self._padding.index_select(0, indices)
        self.graphs.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times, in new rooms."""
        self.batch_select_indices(
            torch.arange(self.layers[0].batch_size).repeat_interleave(repeats)
        )

    def bytes_held(self) -> int:
        """Bytes of all rooms, filled or not."""
        return sum(rooms.bytes_held() for layer in self.layers for rooms in layer.filled())

    def _takes_steps(self) -> bool:
        modes = {module.mode for module in self.modules}
        device = self.modules[0].key_up.device
        reason = next(filter(None, (latent_kernel.unfit(m, device) for m in self.modules)), "")
        if reason and "kernel" in modes:
            raise FlashHeadError(f"mode='kernel': {reason}")
        if not reason and not modes <= {"auto", "kernel"}:
            reason = f"mode={min(modes - {'auto', 'kernel'})!r}"
        if not reason and any(module.training for module in self.modules):
            reason = "the model is in training mode"
        if reason and reason not in _said:
            _said.add(reason)
            _log.warning("static latent cache: decodes eagerly, without graphs: %s", reason)
        return not reason

    def _make_padding(self, batch: int, device: torch.device) -> None:
        if len(self._padding) != batch or self._padding.device != device:
            with torch.inference_mode(False):
                self._padding = torch.zeros(batch, dtype=torch.int32, device=device)
            self.graphs.clear()

    def _note(self, mask: Any, batch: int, total: int) -> None:
        """Remember how much of each row is padding."""
        if mask is None:
            return
        if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, total):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise FlashHeadError(
                f"attention_mask of {got}: a static latent cache wants [{batch}, {total}]"
            )
        seen = mask.bool()
        hidden = (~seen).sum(1)
        places = torch.arange(total, device=mask.device)
        if not bool((seen == (places >= hidden[:, None])).all()):
            raise FlashHeadError(
                "attention_mask: a static latent cache wants left padding, got tokens hidden "
                "behind others"
            )
        self._padding.copy_(hidden)

    def _make_device_state(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._place = torch.zeros(1, dtype=torch.int64, device=device)
            room = max(rooms.room for layer in self.layers for rooms in layer.filled())
            like = torch.empty(0, device=device)
            self._angles = {m.table: m.table.at(0, room, like) for m in self.modules}
        self.graphs.clear()

    def _forget_rooms(self) -> None:
        for layer in self.layers:
            layer.rooms, layer.is_initialized = None, False
        self.graphs.clear()

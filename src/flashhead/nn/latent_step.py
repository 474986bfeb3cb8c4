"""A decode step of `nn.latent` over rooms of fixed size: everything that grows is on the device.

The place of the new token is one number on the device; lengths, window starts and angles follow
from it there. Left padding is a start of each row, so no mask is read. The host decides nothing by
the length, so the same launches serve every step, and a CUDA graph of them serves all.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashhead.nn import latent_kernel
from flashhead.nn.rotary import RotaryTable
from flashhead.nn.token_rooms import TokenRooms
from flashhead.ops.latent_decode.api import latent_decode
from flashhead.ops.latent_decode.rebuilt import latent_decode_rebuilt
from flashhead.ops.latent_decode.reference import KeyUp
from flashhead.ops.latent_decode.rows import Rows

if TYPE_CHECKING:
    from flashhead.nn.latent import LatentAttention

Angles = tuple[Tensor, Tensor]
Rooms = tuple[TokenRooms, TokenRooms | None]
"""Of a layer's latents, and of its rotary keys where there are any."""


class LatentStep:
    """One token a row, for all layers.

    Args:
        place: int64[1], index of the new token.
        padding: int32[batch], tokens at the start of each row that are not seen.
        rooms: of each layer.
        angles: cosines and sines, float32 `[room, pairs]`, of each table.
    """

    def __init__(
        self,
        place: Tensor,
        padding: Tensor,
        rooms: list[Rooms],
        angles: dict[RotaryTable, Angles],
    ) -> None:
        self.place, self.padding, self.rooms, self._angles = place, padding, rooms, angles
        self.length = (place + 1).int()
        self._starts: dict[int, Tensor] = {}

    def starts(self, window: int | None) -> Tensor:
        """First token that each row sees: int32[batch]."""
        if window is None:
            return self.padding
        if window not in self._starts:
            self._starts[window] = torch.maximum(self.padding, self.length - window)
        return self._starts[window]

    def all_angles(self, table: RotaryTable) -> Angles:
        """Of every index that there is room for."""
        return self._angles[table]

    def angles(self, table: RotaryTable, like: Tensor) -> Angles:
        """Of the new token: two of `[1, pairs]` in the dtype of `like`."""
        cos, sin = (x.index_select(0, self.place).to(like.dtype) for x in self._angles[table])
        return cos, sin


def decode(module: "LatentAttention", hidden_states: Tensor, step: LatentStep) -> Tensor:
    """Write the new token's latent, attend over what its row sees.

    Args:
        module: whose projections are taken.
        hidden_states: floating `[batch, 1, d]`.
        step: of all layers.

    Returns:
        floating `[batch, 1, d]`.
    """
    shape, rooms = module.shape, step.rooms[module.layer_idx]
    cos, sin = step.angles(module.table, hidden_states)
    latent, rotary = module.turned(module.compress(hidden_states), cos, sin)
    rooms[0].write_at(step.place, latent)
    if rooms[1] is not None:
        rooms[1].write_at(step.place, rotary)
    query = module.query(hidden_states, cos, sin).squeeze(2)
    up = bias = None
    cos, sin = step.all_angles(module.table)
    if shape.rotary == "rebuilt":
        up = KeyUp(module.key_up, shape.kv_heads, cos, sin, module.key_constant)
    else:
        if module.key_constant is not None:
            bias = latent_kernel.constant_scores(module, query, cos, sin)
        query = latent_kernel.absorbed_query(module, query)
    others = rooms[1].runs() if rooms[1] is not None else [(0, None)] * 2
    parts = [
        _attend(module, query, first, own, other, up, bias, step)
        for (first, own), (_, other) in zip(rooms[0].runs(), others, strict=False)
    ]
    mixed = latent_kernel.values_of(module, latent_kernel.merge(parts))
    return module.o_proj(mixed.transpose(1, 2).flatten(2))


def _attend(
    module: "LatentAttention",
    query: Tensor,
    first: int,
    latent: Rows,
    rotary: Rows | None,
    up: KeyUp | None,
    bias: Tensor | None,
    step: LatentStep,
) -> tuple[Tensor, Tensor]:
    """Over one run, whose first token has index `first`."""
    room, scale = latent.codes.shape[1], module.shape.scale
    starts = step.starts(module.shape.window)
    lengths = (step.length - first).clamp(0, room).expand(len(query)).contiguous()
    starts = (starts - first).clamp_min(0) if first else starts
    if up is not None:
        return latent_decode_rebuilt(
            query, latent, up, lengths, scale=scale, first_index=first, starts=starts
        )
    own = None if bias is None else bias[..., first : first + room]
    return latent_decode(
        query, latent, lengths, scale=scale, rotary=rotary, starts=starts, bias=own
    )

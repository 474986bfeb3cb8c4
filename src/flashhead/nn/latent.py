"""Attention over one latent a token, read by all heads through their own projections.

A token leaves behind c = E y (r numbers) instead of keys and values of all heads. Head h of group g
reads key U_g c + k0 and value V_g c + v0. At decode the value projection is absorbed into the
output: sum_s p_s v_s = V_g (sum_s p_s c_s) + v0, so values are never rebuilt. Keys turn with their
position, which a fixed projection of the query cannot follow. Two ways out (`LatentShape.rotary`):

- "rebuilt": turning keys are rebuilt from the latent where they are read, once for each KV head.
  All of r is shared by keys and values. Costs r * kv_heads * head_dim products a cached token.
- "decoupled" (DeepSeek-V2, arXiv 2405.04434): a rotary key z is kept beside c. Seen as complex
  numbers, any complex mix across KV heads commutes with the rotation, so pair f keeps
  z_f = U_f^H k_f, and a query meets it as conj-mixed U_f^H q_f: nothing is rebuilt. Rotary energy
  that is not kept is lost.

A constant key k0 (a bias, a mean) is turned by its index and costs no cache. With as many numbers
as keys and values have, both are exact.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashhead.errors import FlashHeadError
from flashhead.nn import latent_kernel, latent_select, latent_step
from flashhead.nn.latent_pairs import Pairs
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.rotary import RotaryTable, rotate
from flashhead.nn.token_store import StoreOptions, round_through

ABSORBED_QUERIES = 8
"""Up to how many queries a row the absorbed form is taken, where a cache is read."""
MATERIALISED_BYTES = 2**30
"""Of keys and values that exist at once, unless one row has more."""


class TokenCache(Protocol):
    """What is asked of a cache: `transformers.Cache` and `LatentCache` have it."""

    def update(self, latent: Tensor, rotary: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append a layer's tokens, return all it holds."""
        ...

    def get_seq_length(self, layer_idx: int) -> int:
        """Tokens seen so far."""
        ...


class LatentAttention(nn.Module):
    """Causal attention that caches a latent. Takes the place of a transformers attention module.

    Args:
        shape: sizes and switches.
        table: angles of the rotated coordinates; may be shared between layers. None: set later.
        layer_idx: of this layer in the cache.
        query_norm: applied to queries `[..., heads, head_dim]` before they turn.
        key_norm: with `encoder="keys"`: applied to keys `[..., kv_heads, head_dim]`.
    """

    def __init__(
        self,
        shape: LatentShape,
        table: RotaryTable | None,
        layer_idx: int = 0,
        *,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.shape, self._table, self.layer_idx = shape, table, layer_idx
        self.mode = "auto"
        """"absorbed" or "materialised" (eager, the specification), "kernel" (decode steps through
        `ops.latent_decode`), or "auto": "kernel" on a GPU for decoupled
        keys, else absorbed for few queries.
        """
        self.rounding: StoreOptions | None = None
        """Without a cache: round latents as a cache of this kind would (training)."""
        d, width = shape.hidden_size, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(d, shape.heads * shape.head_dim, bias=shape.query_bias)
        self.o_proj = nn.Linear(shape.heads * shape.value_dim, d, bias=shape.output_bias)
        self.q_norm = query_norm
        if shape.encoder == "keys":
            self.k_proj = nn.Linear(d, width)
            self.v_proj = nn.Linear(d, shape.kv_heads * shape.value_dim)
            self.k_norm = key_norm
        self.encode = nn.Linear(shape.kv_width if shape.encoder == "keys" else d, shape.width)
        self.latent_norm = nn.RMSNorm(shape.rank, eps=1e-6) if shape.norm else None
        up = 1 / math.sqrt(shape.rank)
        self.key_up = nn.Parameter(torch.randn(shape.kv_heads * shape.fixed_dim, shape.rank) * up)
        self.value_up = nn.Parameter(torch.randn(shape.kv_heads * shape.value_dim, shape.rank) * up)
        self.value_constant = nn.Parameter(torch.zeros(shape.kv_heads * shape.value_dim))
        self.key_constant = nn.Parameter(torch.zeros(width)) if shape.key_constant else None
        self._pairs = pairs = Pairs(shape.components)
        self.mix = nn.Parameter(torch.randn(shape.kv_heads, len(pairs), 2)) if len(pairs) else None
        self.is_causal, self.scaling, self.sliding_window = True, shape.scale, shape.window

    @property
    def table(self) -> RotaryTable:
        """Angles of the rotated coordinates."""
        assert self._table is not None, "a latent attention without its angles"
        return self._table

    @table.setter
    def table(self, table: RotaryTable) -> None:
        self._table = table

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,  # noqa: ARG002  indexes stand for positions: nn/rotary.py
        attention_mask: Tensor | None = None,
        past_key_values: TokenCache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            hidden_states: floating `[batch, tokens, d]`.
            position_embeddings: not read.
            attention_mask: bool (True: seen) or additive `[batch, 1, tokens, cached]`, or None.
            past_key_values: where latents go and come from; None: these tokens alone.

        Returns:
            `[batch, tokens, d]`, and None in the place of attention weights.

        Raises:
            FlashHeadError: a cache of fixed size that is not a StaticLatentCache, or a mask of
                another kind.
        """
        step = getattr(past_key_values, "step", None)
        if step is not None:
            return latent_step.decode(self, hidden_states, step), None
        tokens, start = hidden_states.shape[1], 0
        if past_key_values is not None:
            start = past_key_values.get_seq_length(self.layer_idx)
        cos, sin = self.table.at(start, start + tokens, hidden_states)
        latent, rotary = self.turned(self.compress(hidden_states), cos, sin)
        layer = latent_select.layer_of(self, past_key_values)
        if layer is not None:
            layer.append_keys(latent_select.scan_keys(self, latent, rotary, start))
            if tokens == 1 and start >= layer.select.tokens:
                query = self.query(hidden_states, cos, sin)
                mask = self._mask(attention_mask, 1, start + 1, hidden_states.device, True)
                mixed = latent_select.attend(self, query, latent, rotary, mask, layer)
                return self.o_proj(mixed.transpose(1, 2).flatten(2)), None
        if latent_kernel.wanted(self, past_key_values, tokens, hidden_states.device):
            query = self.query(hidden_states, cos, sin)
            return self._decode(query, latent, rotary, attention_mask, past_key_values), None
        if past_key_values is None and self.rounding is not None:
            latent = round_through(latent, self.rounding, self.shape.counts)
            rotary = round_through(rotary, self.rounding) if rotary.shape[-1] else rotary
        if past_key_values is not None:
            latent, rotary = (
                held.squeeze(1)
                for held in past_key_values.update(
                    latent.unsqueeze(1), rotary.unsqueeze(1), self.layer_idx
                )
            )
        held, total = latent.shape[1], start + tokens
        if held > total:
            raise FlashHeadError(
                "latent attention: wanted a LatentCache, StaticLatentCache or DynamicCache, "
                "got another of fixed size"
            )
        query = self.query(hidden_states, cos, sin)
        absorbed = self._absorbs(past_key_values, tokens)
        mask = self._mask(attention_mask, tokens, held, hidden_states.device, absorbed)
        if absorbed:
            mixed = self._attend_absorbed(query, latent, rotary, mask, total - held)
        else:
            mixed = self.attend_materialised(query, latent, rotary, mask, total - held)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None

    def _decode(
        self, query: Tensor, latent: Tensor, rotary: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """A decode step through `ops.latent_decode`."""
        start = cache.get_seq_length(self.layer_idx)
        runs = cache.append_rows(latent, rotary, self.layer_idx)
        held = sum(own.codes.shape[1] for own, _ in runs)
        mask = self._mask(mask, 1, held, latent.device, True)
        mixed = latent_kernel.attend(self, query, runs, mask, start + 1 - held)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def compress(self, hidden_states: Tensor) -> Tensor:
        """What a token leaves behind, before it turns: `[batch, tokens, rotary_width + rank]`."""
        if self.shape.encoder == "hidden":
            return self.encode(hidden_states)
        keys = self.k_proj(hidden_states)
        if self.k_norm is not None:
            keys = self.k_norm(keys.unflatten(-1, (self.shape.kv_heads, -1))).flatten(2)
        return self.encode(torch.cat((keys, self.v_proj(hidden_states)), -1))

    def turned(self, latent: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Latent `[batch, tokens, r]` and the rotary key, turned.

        Args:
            latent: of `compress`.
            cos: of each token, `[tokens, pairs]`.
            sin: likewise.
        """
        rotary, latent = latent.split((self.shape.rotary_width, self.shape.rank), -1)
        if self.latent_norm is not None:
            # under autocast its weight stays float32, and the fused norm wants one dtype
            latent = self.latent_norm(latent.to(self.latent_norm.weight.dtype))
        if self.mix is not None:
            pairs = self._pairs.index(latent.device)
            cos, sin = (x.to(latent.dtype).index_select(1, pairs) for x in (cos, sin))
            rotary = rotate(rotary, cos, sin)
        return latent, rotary

    def query(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turned queries: `[batch, heads, tokens, head_dim]`."""
        query = self.q_proj(hidden_states).unflatten(-1, (self.shape.heads, -1))
        if self.q_norm is not None:
            query = self.q_norm(query)
        return rotate(query.transpose(1, 2), cos.to(query.dtype), sin.to(query.dtype))

    def materialise(self, latent: Tensor, rotary: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all KV heads.

        Args:
            latent: `[batch, cached, r]`.
            rotary: `[batch, cached, rotary_width]`, turned.
            start: index of the first of them.

        Returns:
            two of `[batch, kv_heads, cached, head_dim or value_dim]`.
        """
        values = functional.linear(latent, self.value_up, self.value_constant)
        return self._keys(latent, rotary, start), self._per_head(values)

    def _keys(self, latent: Tensor, rotary: Tensor, start: int) -> Tensor:
        if self.shape.rotary == "rebuilt":
            keys = self._per_head(functional.linear(latent, self.key_up, self.key_constant))
            return rotate(keys, *self.table.at(start, start + latent.shape[1], keys))
        fixed = self._per_head(functional.linear(latent, self.key_up))
        # one product for all heads: a product a head would copy the rotary key for each
        turning = self._per_head(rotary @ self.mixes().transpose(0, 1).flatten(1))
        keys = torch.cat((turning, fixed), -1)
        return keys if self.key_constant is None else keys + self._constants(keys, start)

    def _constants(self, like: Tensor, start: int) -> Tensor:
        """The constant key, turned by each index: `[kv_heads, cached, head_dim]`."""
        assert self.key_constant is not None
        cos, sin = self.table.at(start, start + like.shape[-2], like)
        constant = self.key_constant.unflatten(0, (self.shape.kv_heads, 1, -1))
        return rotate(constant.expand(-1, len(cos), -1), cos, sin)

    def mixes(self) -> Tensor:
        """From kept components to turning coordinates: `[kv_heads, rotary_width, rotary_dim]`."""
        heads, pairs = self.shape.kv_heads, self.shape.rotary_dim // 2
        if self.mix is None:
            return self.key_up.new_zeros(heads, 0, 2 * pairs)
        place = self._pairs.place(self.mix)
        real, imaginary = (self.mix[..., i, None] * place for i in range(2))
        return torch.cat((torch.cat((real, imaginary), -1), torch.cat((-imaginary, real), -1)), 1)

    def attend_materialised(
        self, query: Tensor, latent: Tensor, rotary: Tensor, mask: Tensor | None, start: int
    ) -> Tensor:
        """Through torch's attention, so many rows at once as `MATERIALISED_BYTES` hold:
        `[batch, heads, tokens, value_dim]`.
        """
        shape, tokens = self.shape, query.shape[2]
        share = shape.heads // shape.kv_heads
        # with a mask, torch's kernels that need no matrix of scores take no groups
        repeated = share > 1 and mask is not None and query.is_cuda
        row_bytes = latent.shape[1] * shape.kv_width * latent.element_size()
        rows = max(1, MATERIALISED_BYTES // (row_bytes * (share if repeated else 1)))
        # fused kernels want keys and values of one width: zeros change nothing
        wider = max(0, shape.head_dim - shape.value_dim)
        parts = []
        for i in range(0, len(latent), rows):
            own = slice(i, i + rows)
            keys, values = self.materialise(latent[own], rotary[own], start)
            if wider:
                values = functional.pad(values, (0, wider))
            if repeated:
                keys, values = (x.repeat_interleave(share, 1) for x in (keys, values))
            found = functional.scaled_dot_product_attention(
                query[own],
                keys,
                values,
                attn_mask=mask if mask is None or len(mask) == 1 else mask[own],
                is_causal=mask is None and tokens > 1,
                scale=shape.scale,
                enable_gqa=share > 1 and not repeated,
            )
            parts.append(found[..., : shape.value_dim])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_absorbed(
        self, query: Tensor, latent: Tensor, rotary: Tensor, mask: Tensor | None, start: int
    ) -> Tensor:
        """Values absorbed, and decoupled keys too: `[batch, heads, tokens, value_dim]`."""
        shape, groups = self.shape, (self.shape.kv_heads, -1)
        query = query.unflatten(1, groups)  # [batch, kv_heads, heads of one, tokens, head_dim]
        if shape.rotary == "rebuilt":
            scores = query @ self._keys(latent, rotary, start).unsqueeze(2).mT
        else:
            turning, fixed = query.split((shape.rotary_dim, shape.fixed_dim), -1)
            key_up = self.key_up.unflatten(0, groups).unsqueeze(1)
            scores = turning @ self.mixes().unsqueeze(1).mT @ rotary[:, None, None].mT
            scores = scores + fixed @ key_up @ latent[:, None, None].mT
            if self.key_constant is not None:
                scores = scores + query @ self._constants(latent, start).unsqueeze(1).mT
        scores = scores.float() * shape.scale
        if mask is not None:
            seen, lowest = mask.unsqueeze(2), torch.finfo(scores.dtype).min
            # never -inf: a padded row that sees nothing must not become NaN
            scores = (
                scores.masked_fill(~seen, lowest) if seen.dtype == torch.bool else scores + seen
            )
        weights = scores.softmax(-1).to(latent.dtype)
        mixed = weights @ latent[:, None, None]  # [batch, kv_heads, heads of one, tokens, r]
        value_up = self.value_up.unflatten(0, groups).unsqueeze(1)
        constant = self.value_constant.unflatten(0, (shape.kv_heads, 1, 1, -1))
        return (mixed @ value_up.mT + constant).flatten(1, 2)

    def _absorbs(self, cache: TokenCache | None, tokens: int) -> bool:
        if self.mode in ("auto", "kernel"):
            return cache is not None and tokens <= ABSORBED_QUERIES and not self.training
        if self.mode not in ("absorbed", "materialised"):
            raise FlashHeadError(
                f"mode={self.mode!r}: wanted auto, kernel, absorbed or materialised"
            )
        return self.mode == "absorbed"

    def _mask(
        self, mask: Tensor | None, tokens: int, held: int, device: torch.device, absorbed: bool
    ) -> Tensor | None:
        """Bool or additive `[batch or 1, 1, tokens, held]`; None: all, or SDPA's causal mask."""
        if mask is not None:
            if mask.dim() != 4 or mask.shape[-2:] != (tokens, held):
                raise FlashHeadError(
                    f"attention_mask of {list(mask.shape)}: wanted [batch, 1, {tokens}, {held}]"
                )
            return mask
        window = self.shape.window
        inside = window is None or held <= window
        if inside and (tokens == 1 or (tokens == held and not absorbed)):
            return None
        places = torch.arange(held, device=device)
        distance = places[held - tokens :, None] - places
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return seen[None, None]

    def _per_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.shape.kv_heads, -1)).transpose(1, 2)

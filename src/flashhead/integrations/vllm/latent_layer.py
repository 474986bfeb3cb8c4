"""An attention layer of vLLM whose blocks hold one latent a token, and the backend behind it.

To vLLM it is a layer with one KV head and no values (`MLAAttentionSpec`): its blocks take `r +
rotary_width` numbers a token, so as many more tokens fit as the folder's `--kv-ratio` says. Layers
may differ in width. The products are `nn.latent_paged`'s; vLLM's kernels are not used.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils import torch_utils
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from flashhead.nn.latent import LatentAttention
from flashhead.nn.latent_paged import PagedBatch, paged_attention
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.rotary import RotaryTable


class LatentMetadataBuilder(AttentionMetadataBuilder):
    """Makes a `PagedBatch` of what vLLM knows of a step."""

    reorder_batch_threshold = 1
    """Rows of one query token come first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def build(
        self,
        common_prefix_len: int,  # noqa: ARG002  vLLM gives 0
        common_attn_metadata: Any,
        fast_build: bool = False,  # noqa: ARG002
    ) -> PagedBatch:
        """The rows of a step; those that only pad a batch (no query token) are left out."""
        given = common_attn_metadata
        counts = given.query_start_loc_cpu.diff().tolist()
        counts = counts[: next((i for i, count in enumerate(counts) if not count), len(counts))]
        return PagedBatch.of_rows(
            counts,
            given.seq_lens[: len(counts)].int(),
            given.block_table_tensor[: len(counts)],
            given.slot_mapping[: sum(counts)].long(),
            int(given.max_seq_len),
        )


class LatentBackend(AttentionBackend):
    """Names the builder and the implementation."""

    @staticmethod
    def get_name() -> str:
        """For vLLM's log."""
        return "FLASHHEAD_LATENT"

    @staticmethod
    def get_impl_cls() -> type["LatentImplementation"]:
        """What attends."""
        return LatentImplementation

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        """What prepares a step."""
        return LatentMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *_: Any, **__: Any
    ) -> tuple[int, ...]:
        """Of versions of vLLM that ask for it (0.25): no axis of heads."""
        assert num_kv_heads == 1
        return (num_blocks, block_size, head_size)


class LatentImplementation(AttentionImpl):
    """What vLLM's attention operator calls; the layer has the weights.

    Args:
        shape: of the layer.
    """

    def __init__(self, shape: LatentShape) -> None:
        self.num_heads, self.head_size, self.scale = shape.heads, shape.head_dim, shape.scale

    def forward(
        self,
        layer: "ServedLatentAttention",
        query: Tensor,
        key: Tensor,
        value: Tensor,  # noqa: ARG002  a latent is both
        kv_cache: Tensor,
        attn_metadata: PagedBatch | None,
        output: Tensor,
        **_: Any,
    ) -> Tensor:
        """Keep the latents of a step and attend.

        Args:
            layer: the layer.
            query: `[tokens, heads, head_dim]`, not turned; more tokens than the batch has pad it.
            key: `[tokens, rotary_width + r]`.
            value: not read.
            kv_cache: `[blocks, (1,) block_size, width]`.
            attn_metadata: the rows; None: vLLM measures memory, nothing is kept.
            output: `[tokens, heads, value_dim]`, written to.
        """
        if attn_metadata is None:
            return output.zero_()
        tokens = len(attn_metadata.slots)
        cache = kv_cache.squeeze(1) if kv_cache.dim() == 4 else kv_cache
        output[:tokens] = paged_attention(layer, query[:tokens], key[:tokens], cache, attn_metadata)
        return output


class ServedLatentAttention(LatentAttention, AttentionLayerBase):
    """`LatentAttention` in vLLM: takes the place of a model's attention module.

    Args:
        shape: sizes and switches.
        table: angles.
        layer_idx: of this layer.
        layer_name: in vLLM's tables.
        engine: vLLM's config.
        query_norm: of the model's module, or None.
        key_norm: likewise.
    """

    supports_dcp = False

    def __init__(
        self,
        shape: LatentShape,
        table: RotaryTable,
        layer_idx: int,
        layer_name: str,
        engine: VllmConfig,
        *,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
    ) -> None:
        super().__init__(shape, table, layer_idx, query_norm=query_norm, key_norm=key_norm)
        self.layer_name, self.kept_dtype = layer_name, engine.model_config.dtype
        self.impl = LatentImplementation(shape)
        self.kv_cache = torch.tensor([])
        engine.compilation_config.static_forward_context[layer_name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Ours."""
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MLAAttentionSpec:
        """One latent a token, in the model's dtype; layers with a window keep all tokens."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.shape.width,
            dtype=self.kept_dtype,
        )

    def forward(  # type: ignore[override]
        self,
        positions: Tensor,  # noqa: ARG002  known from the step's rows
        hidden_states: Tensor,
        **_: Any,
    ) -> Tensor:
        """Attend: `[tokens, d]` to `[tokens, d]`, all rows of a step behind each other."""
        shape = self.shape
        query = self.q_proj(hidden_states).unflatten(-1, (shape.heads, shape.head_dim))
        if self.q_norm is not None:
            query = self.q_norm(query)
        latent = self.compress(hidden_states[None])[0]
        mixed = hidden_states.new_empty(len(hidden_states), shape.heads, shape.value_dim)
        name = getattr(torch_utils, "_encode_layer_name", str)(self.layer_name)
        torch.ops.vllm.unified_attention_with_output(query, latent, latent, mixed, name)
        return self.o_proj(mixed.flatten(1))

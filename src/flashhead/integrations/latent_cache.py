"""Caches for transformers that hold latents, or keys and values, in few bits.

`LatentCache` is what `generate()` uses on a model with latent attention. `RoundedCache` keeps the
ordinary keys and values of any model in fp8, int8 or int4: the baseline that costs no conversion.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from flashhead.errors import FlashHeadError
from flashhead.nn.latent import LatentAttention
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.mixed_bits import Counts
from flashhead.nn.scan_store import ScanStore
from flashhead.nn.token_store import StoreOptions, TokenStore
from flashhead.ops.latent_decode.rows import Rows
from flashhead.ops.latent_select.options import SelectOptions

SLIDING = "sliding_attention"
"""As transformers' configs name a layer with a window."""


class StoredLayer(CacheLayerMixin):
    """One layer's two streams of vectors, each in a `TokenStore`, heads side by side.

    Args:
        options: how tokens are kept.
        window: tokens that a query sees; None: all.
        counts: of the first stream's coordinates in 8, 4 and 2 bits, for the kind mixed.
        reserve: tokens that there is room for whenever memory is taken.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        options: StoreOptions,
        window: int | None = None,
        counts: Counts | None = None,
        reserve: int = 0,
    ) -> None:
        super().__init__()
        self.options, self.window, self.is_sliding = options, window, window is not None
        self.counts, self.reserve = counts, reserve
        self.stores = self._empty()
        self.heads = (1, 1)
        self.seen, self.record_past = 0, False

    def _empty(self) -> tuple[TokenStore, TokenStore]:
        first, second = (TokenStore(self.options, self.counts, self.reserve) for _ in range(2))
        return first, second

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember how heads are laid out."""
        self.heads = (key_states.shape[1], value_states.shape[1])
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return everything that the window's queries may see.

        Args:
            key_states: floating `[batch, heads, tokens, width]`.
            value_states: likewise, of another width; 0 is allowed.
        """
        visible = self._append(key_states, value_states)
        given = (key_states, value_states)
        read = [
            self._read(store, heads, visible, x)
            for store, heads, x in zip(self.stores, self.heads, given, strict=True)
        ]
        if not self.record_past:
            self._trim()
        return read[0], read[1]

    def append_rows(self, first: Tensor, second: Tensor) -> list[tuple[Rows, Rows | None]]:
        """Append one vector of each stream a token, and return as they are kept all that the
        window's query may see, one run after the other.

        Args:
            first: floating `[batch, tokens, width]`.
            second: likewise, of another width; 0: the stream stays empty, and is None in each run.
        """
        held = self._append(first.unsqueeze(1), second.unsqueeze(1))
        skip, found = len(self.stores[0]) - held, []
        ones = self.stores[0].rows()
        others = self.stores[1].rows() if second.shape[-1] else [None] * len(ones)
        for own, other in zip(ones, others, strict=True):
            tokens = own.codes.shape[1]
            begin, skip = min(skip, tokens), max(0, skip - tokens)
            if begin < tokens:
                turned = None if other is None else other.between(begin, tokens)
                found.append((own.between(begin, tokens), turned))
        if not self.record_past:
            self._trim()
        return found

    def _append(self, key_states: Tensor, value_states: Tensor) -> int:
        """Append; how many of the last tokens the window's queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self.seen += new
        for store, x in zip(self.stores, (key_states, value_states), strict=True):
            if x.shape[-1]:
                store.append(x.transpose(1, 2).flatten(2))
        held = len(self.stores[0])
        return held if self.window is None else min(held, self.window - 1 + new)

    def _read(self, store: TokenStore, heads: int, visible: int, like: Tensor) -> Tensor:
        if not like.shape[-1]:
            return like.new_empty(like.shape[0], heads, visible, 0)
        tokens = store.read()
        tokens = tokens[:, tokens.shape[1] - visible :]
        return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _trim(self, dropped: int = 0) -> None:
        """Drop the last `dropped` tokens and what the window has left behind."""
        stop = len(self.stores[0]) - dropped
        start = 0 if self.window is None else max(0, stop - self.window + 1)
        for store in self._filled():
            store.keep(start, stop)

    def streams(self) -> tuple[TokenStore | ScanStore, ...]:
        """All that is kept of tokens."""
        return self.stores

    def _filled(self) -> list[TokenStore | ScanStore]:
        return [store for store in self.streams() if store.parts]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next `update` returns."""
        held = self.seen if self.window is None else min(self.seen, self.window - 1)
        return held + query_length, self.seen - held

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """The window, or -1 for no limit."""
        return -1 if self.window is None else self.window

    def activate_past_recording(self) -> None:
        """Keep what the window leaves behind until the next `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, given as a negative number.

        Raises:
            ValueError: a positive number.
            RuntimeError: the window has already left tokens behind that are needed again.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): wanted minus the tokens to remove")
        dropped = min(-tokens_to_remove, self.seen)
        lost = self.seen - len(self.stores[0])
        needed = 0 if self.window is None else max(0, self.seen - dropped - self.window + 1)
        if dropped and lost > needed:
            raise RuntimeError("crop: the window has left these tokens behind")
        if self.is_initialized:
            self._trim(dropped)
            self.seen -= dropped

    def reset(self) -> None:
        """Forget everything."""
        self.stores = self._empty()
        self.seen, self.is_initialized = 0, False

    def offload(self) -> None:
        """Not offered."""
        raise FlashHeadError("offloading: a latent cache stays on its device")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order, as beam search wants them."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        for store in self._filled():
            store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        for store in self._filled():
            rows = torch.arange(len(next(iter(store.parts.values())))).repeat_interleave(repeats)
            store.select(rows)

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first token."""
        return self.stores[0].parts["first"].shape[0] if self.stores[0].parts else -1


class StoredCache(Cache):
    """A cache of `StoredLayer`s that can be counted, saved and restored.

    Args:
        options: how tokens are kept.
        layers: window (None: none) and counts of bits (None: not mixed) of each.
        reserve: tokens that there is room for whenever memory is taken.
    """

    def __init__(
        self,
        options: StoreOptions,
        layers: list[tuple[int | None, Counts | None]],
        reserve: int = 0,
    ) -> None:
        super().__init__(layers=[StoredLayer(options, *layer, reserve) for layer in layers])
        self.options = options

    def bytes_held(self) -> int:
        """Bytes of the storage of all layers."""
        return sum(store.bytes_held() for layer in self.layers for store in layer.streams())

    def _kept_as(self) -> str:
        return str(self.options)

    def save(self, path: Path) -> None:
        """Write all tokens to a safetensors file."""
        tensors = {
            f"{i}.{j}.{name}": part.contiguous()
            for i, layer in enumerate(self.layers)
            for j, store in enumerate(layer.streams())
            for name, part in store.parts.items()
        }
        about = {"seen": ",".join(str(layer.seen) for layer in self.layers)}
        about["heads"] = ",".join(f"{layer.heads[0]}/{layer.heads[1]}" for layer in self.layers)
        about["widths"] = ",".join("/".join(str(s.width) for s in r.streams()) for r in self.layers)
        about["options"] = self._kept_as()
        partial = path.with_name(f".{path.name}.partial")
        save_file(tensors, partial, metadata=about)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        """Take the tokens of a cache of the same model and options from a file that `save` wrote.

        Raises:
            FlashHeadError: not such a file, or of other options or layers.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("options") != self._kept_as():
                    raise FlashHeadError(
                        f"cache {path}: kept as {about.get('options')}, wanted {self._kept_as()}"
                    )
                seen = about["seen"].split(",")
                if len(seen) != len(self.layers):
                    raise FlashHeadError(
                        f"cache {path}: {len(seen)} layers, wanted {len(self.layers)}"
                    )
                names = set(file.keys())
                for i, layer in enumerate(self.layers):
                    heads = about["heads"].split(",")[i].split("/")
                    widths = about["widths"].split(",")[i].split("/")
                    layer.seen, layer.heads = int(seen[i]), (int(heads[0]), int(heads[1]))
                    layer.is_initialized = layer.seen > 0
                    for j, store in enumerate(layer.streams()):
                        prefix = f"{i}.{j}."
                        own = [name for name in names if name.startswith(prefix)]
                        if own:
                            parts = {n.removeprefix(prefix): file.get_tensor(n) for n in own}
                            store.load(parts, int(widths[j]))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            if isinstance(error, FlashHeadError):
                raise
            raise FlashHeadError(f"cache {path}: not readable ({error})") from error


class LatentCache(StoredCache):
    """The cache of a model with latent attention.

    Args:
        model: whose attention modules are `LatentAttention`.
        options: how latents are kept; None: as the model's folder says, else bf16.
        reserve: tokens that there is room for whenever memory is taken; None: 256 on a GPU, where
            kernels read what is kept as it is, and where tokens are selected, else 0.
        select: decode steps read a selection of their tokens (`nn.latent_select`), in layers
            without a window; None: as `model.latent_select` says, else all.

    Raises:
        FlashHeadError: the model has no latent attention, or no layer to select in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: StoreOptions | None = None,
        reserve: int | None = None,
        select: SelectOptions | None = None,
    ) -> None:
        modules = [m for m in model.modules() if isinstance(m, LatentAttention)]
        if not modules:
            raise FlashHeadError("the model has no latent attention: flashhead convert makes one")
        modules.sort(key=lambda module: module.layer_idx)
        chosen = options or getattr(model, "latent_store", None) or StoreOptions()
        self.select = select or getattr(model, "latent_select", None)
        if reserve is None:
            reserve = 256 if modules[0].key_up.is_cuda or self.select is not None else 0
        shapes = [module.shape for module in modules]
        super().__init__(chosen, [(shape.window, shape.counts) for shape in shapes], reserve)
        if self.select is not None:
            self._select_in(shapes, self.select, reserve)

    def _select_in(self, shapes: list[LatentShape], select: SelectOptions, reserve: int) -> None:
        from flashhead.integrations.selecting_layer import SelectingLayer

        whole = [i for i, shape in enumerate(shapes) if shape.window is None]
        if not whole:
            raise FlashHeadError("select: every layer has a window, which is read whole")
        for i in whole:
            self.layers[i] = SelectingLayer(self.options, shapes[i].counts, reserve, select)

    def _kept_as(self) -> str:
        return str(self.options) if self.select is None else f"{self.options}, {self.select}"

    def append_rows(
        self, latent: Tensor, rotary: Tensor, layer_idx: int
    ) -> list[tuple[Rows, Rows | None]]:
        """Append a layer's tokens; all its query may see, as it is kept, one run after the other.

        Args:
            latent: floating `[batch, tokens, r]`.
            rotary: floating `[batch, tokens, rotary_width]`, turned; its width may be 0.
            layer_idx: of the layer.
        """
        found: list[tuple[Rows, Rows | None]] = self.layers[layer_idx].append_rows(latent, rotary)
        return found


class RoundedCache(StoredCache):
    """Keys and values as they are, in few bits.

    Args:
        config: of the model.
        options: how keys and values are kept.
        reserve: tokens that there is room for whenever memory is taken.
    """

    def __init__(self, config: Any, options: StoreOptions, reserve: int = 0) -> None:
        text = config.get_text_config(decoder=True)
        window = getattr(text, "sliding_window", None)
        kinds = getattr(text, "layer_types", None)
        if kinds is None:
            kinds = ["full_attention" if window is None else SLIDING] * text.num_hidden_layers
        windows = [window if kind == SLIDING else None for kind in kinds]
        super().__init__(options, [(one, None) for one in windows], reserve)

"""Decode steps over a `StaticLatentCache`: on a GPU one replay of a CUDA graph each.

The decoder (all but the output embedding, which has graphs of its own) is asked with one token a
row; what it returns is what it would have returned. `generate()`, `generate_certified` and calls of
the model all go this way. On a CPU the same step runs without a graph.
"""

import inspect
import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from flashhead.integrations.latent_static import StaticLatentCache

_PLAIN = {"input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values"}
"""What a graph takes care of; anything else that is asked for runs the step without one."""
_HARMLESS = {"use_cache", "return_dict", "cache_position"}
"""What a step has in any case, or what nothing of it reads."""


def serve_steps(model: PreTrainedModel) -> None:
    """Calls of the model's decoder with a `StaticLatentCache` take steps from now on."""
    decoder = model.get_decoder()
    # a bound method: a copy of the model has the copy's own
    decoder.forward = types.MethodType(_forward, decoder)


def _forward(decoder: Any, *args: Any, **kwargs: Any) -> Any:
    original = type(decoder).forward
    if args:
        names = list(inspect.signature(original).parameters)[1:]
        kwargs |= dict(zip(names, args, strict=False))
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, StaticLatentCache):
        return original(decoder, **kwargs)
    name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
    batch, tokens = kwargs[name].shape[:2]
    if not cache.before_call(tokens, batch, kwargs.get("attention_mask")):
        return original(decoder, **kwargs)
    # a cache outlives the inference mode that it is used in
    with torch.inference_mode(False), torch.no_grad():
        output = _step(decoder, cache, name, kwargs)
    cache.end_step()
    return output


def _step(decoder: Any, cache: StaticLatentCache, name: str, kwargs: dict[str, Any]) -> Any:
    """One token a row, by a replay where that gives all that is asked for."""
    place, positions = cache.place(), kwargs.get("position_ids")
    given = kwargs[name].to(place.device)
    positions = (place[None] if positions is None else positions).to(place.device)
    more = {key: value for key, value in kwargs.items() if key not in _PLAIN}
    asked = [value for key, value in more.items() if key not in _HARMLESS]
    if any(value is not None and value is not False for value in asked):
        return _run(decoder, cache, {**more, name: given, "position_ids": positions})

    def hidden_of(given: Tensor, positions: Tensor) -> tuple[Tensor]:
        settings = {name: given, "position_ids": positions, "use_cache": True}
        return (_run(decoder, cache, settings).last_hidden_state,)

    first, last = cache.modules[0], cache.modules[-1]
    weights = (first.key_up.data_ptr(), last.key_up.data_ptr(), first.key_up.dtype)
    kind = (name, tuple(given.shape), tuple(positions.shape), weights)
    (hidden,) = cache.graphs(kind, hidden_of, (given, positions))
    return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


def _run(decoder: Any, cache: StaticLatentCache, settings: dict[str, Any]) -> Any:
    """The decoder's own code, its attention through `nn.latent_step`."""
    cache.begin_step()
    try:
        # no mask is read; one that is ready made keeps transformers from building one
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=cache.modules[0].key_up.device)
        return type(decoder).forward(
            decoder, **settings, attention_mask=mask, past_key_values=cache
        )
    finally:
        cache.step = None

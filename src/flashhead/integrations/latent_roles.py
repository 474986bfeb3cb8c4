"""Attention modules of a transformers model: found by what they own, checked by what they do.

An attention module is one with q_proj, k_proj, v_proj and an output projection. Its rotary angles,
norms, window and scale are read off; whether it computes what these say is then tried
(`require_equal`), so an architecture that does something else is refused, not converted wrongly.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashhead.errors import FlashHeadError
from flashhead.nn.latent import LatentAttention
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.rotary import RotaryTable

FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotary types whose angles do not depend on the length of the text."""
TOLERANCE = 1e-3
"""Largest difference of the trial's outputs, in units of their largest; 1e-6 is usual."""


@dataclasses.dataclass
class Roles:
    """One attention module and its parts.

    Args:
        name: its path in the model.
        module: itself.
        output: its output projection.
        query_norm: of each query head, or None.
        key_norm: of each key head, or None.
        kind: of its layer ("full_attention", "sliding_attention"), or None.
        table: its rotary angles.
        exact: the shape that holds all of its keys and values.
    """

    name: str
    module: Any
    output: nn.Linear
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    kind: str | None
    table: RotaryTable
    exact: LatentShape

    @property
    def keys(self) -> nn.Module:
        """The module that gives keys before they turn."""
        return self.module.k_proj if self.key_norm is None else self.key_norm


def find_attention(model: PreTrainedModel) -> list[Roles]:
    """All attention modules, by layer.

    Raises:
        FlashHeadError: there are none, they are latent already, or of a kind that is not supported.
    """
    if any(isinstance(module, LatentAttention) for module in model.modules()):
        raise FlashHeadError("the model has latent attention already")
    config, tables, found = model.config.get_text_config(), {}, []
    for name, module in model.named_modules():
        output = _first(module, "o_proj", "dense", "out_proj")
        if not (all(hasattr(module, f"{x}_proj") for x in "qkv") and output is not None):
            continue
        kind = getattr(module, "layer_type", None)
        if kind not in tables:
            tables[kind] = rotary_table(model, kind)
        found.append(_roles(config, name, module, output, kind, tables[kind]))
    if not found:
        raise FlashHeadError(
            f"{type(model).__name__}: no attention with q_proj, k_proj and v_proj to convert"
        )
    return sorted(found, key=lambda roles: roles.module.layer_idx)


def rotary_table(model: PreTrainedModel, kind: str | None) -> RotaryTable:
    """Rotary angles of the layers of a kind.

    Raises:
        FlashHeadError: no rotary embedding, or angles that change with the length of the text.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    rope = parameters.get(kind, parameters) if kind is not None else parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type not in FIXED_ROPE:
        raise FlashHeadError(
            f"rotary type {rope_type!r}: its angles change with the length of the text; "
            f"wanted one of {', '.join(FIXED_ROPE)}"
        )
    for module in model.modules():
        prefix = f"{kind}_" if hasattr(module, f"{kind}_inv_freq") else ""
        frequencies = getattr(module, f"{prefix}inv_freq", None)
        if isinstance(frequencies, Tensor):
            return RotaryTable(frequencies, getattr(module, f"{prefix}attention_scaling", 1.0))
    raise FlashHeadError(f"{type(model).__name__}: no rotary embedding (inv_freq) was found")


def _roles(
    config: Any, name: str, module: Any, output: Any, kind: str | None, table: RotaryTable
) -> Roles:
    for part, linear in (
        *((f"{x}_proj", getattr(module, f"{x}_proj")) for x in "qkv"),
        ("", output),
    ):
        if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
            raise FlashHeadError(f"{name}.{part or 'output'}: wanted a floating nn.Linear")
    cap = getattr(module, "attn_logit_softcapping", None)
    if cap is not None or getattr(module, "sinks", None) is not None:
        raise FlashHeadError(f"{name}: soft-capped scores and learned sinks are not supported")
    head_dim = int(module.head_dim)
    norms = (_first(module, "q_norm", "q_layernorm"), _first(module, "k_norm", "k_layernorm"))
    for norm in norms:
        if norm is not None and norm.weight.numel() != head_dim:
            raise FlashHeadError(f"{name}: norms over all heads together are not supported")
    window = getattr(module, "sliding_window", None)
    if window is None and kind is None:
        window = getattr(config, "sliding_window", None)
    heads = module.q_proj.out_features // head_dim
    kv_heads = module.k_proj.out_features // head_dim
    value_dim = module.v_proj.out_features // kv_heads
    exact = LatentShape(
        hidden_size=module.q_proj.in_features,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        rank=kv_heads * (head_dim + value_dim),
        rotary_dim=2 * len(table.frequencies),
        scale=float(module.scaling),
        window=None if window is None else int(window),
        query_bias=module.q_proj.bias is not None,
        output_bias=output.bias is not None,
        encoder="hidden" if norms[1] is None else "keys",
    )
    return Roles(name, module, output, *norms, kind, table, exact)


@torch.no_grad()
def require_equal(model: PreTrainedModel, roles: Roles, latent: LatentAttention) -> None:
    """Try that a latent attention of full rank gives what the module gives, in float32.

    Raises:
        FlashHeadError: it does not.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 24, roles.exact.hidden_size, generator=generator)
    x = x.to(roles.module.q_proj.weight)
    seen = torch.ones(24, 24, dtype=torch.bool, device=x.device).tril()
    if roles.exact.window is not None:
        seen = seen.triu(1 - roles.exact.window)
    mask = torch.zeros(24, 24).to(x).masked_fill(~seen, torch.finfo(x.dtype).min)[None, None]
    positions = torch.arange(24, device=x.device)[None]
    rotary = next(m for m in model.modules() if _has_frequencies(m, roles.kind))
    nested = hasattr(rotary, f"{roles.kind}_inv_freq")
    embeddings = rotary(x, positions, *((roles.kind,) if nested else ()))
    want = roles.module(
        hidden_states=x, position_embeddings=embeddings, attention_mask=mask, past_key_values=None
    )[0]
    got = latent(x, attention_mask=mask)[0]
    error = float((got - want).abs().max() / want.abs().max())
    if not error <= TOLERANCE:
        raise FlashHeadError(
            f"{roles.name}: {type(roles.module).__name__} computes something else than rotary "
            f"attention as known here (difference {error:.1e}): not supported"
        )


def _has_frequencies(module: nn.Module, kind: str | None) -> bool:
    return hasattr(module, f"{kind}_inv_freq") or hasattr(module, "inv_freq")


def _first(module: nn.Module, *names: str) -> Any:
    return next((getattr(module, n) for n in names if getattr(module, n, None) is not None), None)

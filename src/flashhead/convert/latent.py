"""Make a model's attention latent, in closed form: statistics, directions, new projections.

Nothing is trained. At kv_ratio 1 the model computes what it computed, up to rounding.
"""

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashhead.convert.latent_bits import choose_bits, lost_nats
from flashhead.convert.latent_factors import Maps, Piece, choose, maps, pieces, whole
from flashhead.convert.latent_statistics import Statistics, collect
from flashhead.errors import FlashHeadError
from flashhead.nn.latent import LatentAttention
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.mixed_bits import Counts
from flashhead.nn.token_store import StoreOptions, bytes_per_token
from flashhead.options_latent import LatentOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashhead.integrations.latent_roles import Roles


def make_latent(
    model: "PreTrainedModel",
    options: LatentOptions,
    windows: list[Tensor],
    *,
    statistics: list[Statistics] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Replace all attention modules of a model, in place.

    Args:
        model: a causal LM in any floating dtype; the new projections come in the same.
        options: what is kept.
        windows: int64[tokens] each, calibration text.
        statistics: of this model and text, if they are there already (`statistics_of`).
        progress: progress bar on stderr.

    Returns:
        JSON-able: `kv_ratio` (of numbers) and `bytes_ratio` (of a bf16 cache's bytes, exact tokens
        aside) as reached, `kv_dtype`, `rotary`, `widths` and `expected_kl` (nats a token, of the
        text's statistics; with the kind mixed rounding is in it) a layer, `calibration_tokens`.

    Raises:
        FlashHeadError: an architecture that is not supported, too little text, a ratio too large.
    """
    from flashhead.integrations.latent_model import install
    from flashhead.integrations.latent_roles import find_attention, require_equal

    model.set_attn_implementation("sdpa")
    # statistics need float32 gradients; the caller's model keeps its dtype
    home = model.device
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    found = find_attention(exact)
    for roles in found:
        identity = maps(_no_statistics(roles.exact), whole(roles.exact), roles.exact)
        require_equal(exact, roles, build(roles, identity))
    if statistics is None:
        exact.to(options.device)
        statistics = statistics_of(exact, found, windows, options.seed, progress)
        exact.to(home)
    shapes = [_shape(roles.exact, options.rotary) for roles in found]
    candidates = [pieces(layer, shape) for layer, shape in zip(statistics, shapes, strict=True)]
    kept = _choose(candidates, shapes, options)
    for roles, layer, options_of, (count, bits), shape in zip(
        found, statistics, candidates, kept, shapes, strict=True
    ):
        attention = build(roles, maps(layer, options_of[:count], shape, bits))
        install(model, roles.name, attention.to(model.device, model.dtype))
    return _report(found, candidates, kept, options, windows)


def _choose(
    candidates: list[list[Piece]], shapes: list[LatentShape], options: LatentOptions
) -> list[tuple[int, Counts | None]]:
    """Pieces that each layer keeps, and how many of them in 8, 4 and 2 bits."""
    step = _step(shapes)
    if options.kv_dtype == "mixed":
        budgets = [int(16 * shape.kv_width / options.kv_ratio) for shape in shapes]
        bits = choose_bits(candidates, budgets, options.ranks, max(step, 4))
        return [(sum(counts), counts) for counts in bits]
    widths = [int(shape.kv_width / options.kv_ratio) for shape in shapes]
    return [(count, None) for count in choose(candidates, widths, options.ranks, step)]


def statistics_of(
    model: "PreTrainedModel",
    found: "list[Roles]",
    windows: list[Tensor],
    seed: int = 0,
    progress: bool = True,
) -> list[Statistics]:
    """Statistics of a float32 model's attention modules: `convert.latent_statistics.collect`."""
    streams = [(roles.keys, roles.module.v_proj) for roles in found]
    return collect(model, streams, windows, seed=seed, progress=progress)


def build(roles: "Roles", kept: Maps) -> LatentAttention:
    """A latent attention that takes the place of a module.

    Args:
        roles: the module, in float32 or more.
        kept: what its latent keeps.
    """
    source, shape = roles.module, kept.shape
    attention = LatentAttention(
        shape,
        roles.table,
        source.layer_idx,
        query_norm=copy.deepcopy(roles.query_norm),
        key_norm=copy.deepcopy(roles.key_norm),
    ).eval()
    with torch.no_grad():
        attention.q_proj.load_state_dict(source.q_proj.state_dict())
        attention.o_proj.load_state_dict(roles.output.state_dict())
        offset = -kept.read @ kept.mean
        weight = kept.read
        if shape.encoder == "keys":
            for name in ("k_proj", "v_proj"):
                projection, linear = getattr(source, name), getattr(attention, name)
                linear.weight.copy_(projection.weight)
                linear.bias.copy_(_bias(projection))
        else:
            linears = (source.k_proj, source.v_proj)
            offset = offset + kept.read @ torch.cat([_bias(linear) for linear in linears]).double()
            weight = weight @ torch.cat([linear.weight for linear in linears]).double()
        attention.encode.weight.copy_(weight)
        attention.encode.bias.copy_(offset)
        attention.key_up.copy_(kept.key_up)
        attention.value_up.copy_(kept.value_up)
        split = shape.kv_heads * shape.head_dim
        attention.value_constant.copy_(kept.mean[split:])
        if attention.key_constant is not None:
            attention.key_constant.copy_(kept.mean[:split])
        if attention.mix is not None:
            attention.mix.copy_(kept.mix)
    return attention


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _shape(exact: LatentShape, rotary: str) -> LatentShape:
    components: tuple[int, ...] = ()
    if rotary == "decoupled":
        components = (exact.kv_heads,) * (exact.rotary_dim // 2)
    return dataclasses.replace(exact, rotary=rotary, components=components)


def _step(shapes: list[LatentShape]) -> int:
    """Latents are multiples of 8 numbers where that is possible."""
    plain = all(shape.rotary == "rebuilt" and shape.kv_width % 8 == 0 for shape in shapes)
    return 8 if plain and min(shape.kv_width for shape in shapes) >= 128 else 1


def _no_statistics(shape: LatentShape) -> Statistics:
    n = shape.kv_width
    eye = torch.eye(n, dtype=torch.float64)
    return Statistics(torch.zeros(n, dtype=torch.float64), eye, eye)


def _report(
    found: "list[Roles]",
    candidates: list[Any],
    kept: list[tuple[int, Counts | None]],
    options: LatentOptions,
    windows: list[Tensor],
) -> dict[str, Any]:
    if not kept:
        raise FlashHeadError("the model has no attention layers")
    widths, lost = [], []
    for layer, (count, bits) in zip(candidates, kept, strict=True):
        widths.append(sum(piece.cost for piece in layer[:count]))
        dropped = sum(piece.gain for piece in layer[count:])
        lost.append(dropped if bits is None else lost_nats(layer, bits))
    before = sum(roles.exact.kv_width for roles in found)
    bytes_kept = [
        bytes_per_token(width, StoreOptions(options.kv_dtype), bits)
        for width, (_, bits) in zip(widths, kept, strict=True)
    ]
    return {
        "kv_ratio": before / sum(widths),
        "bytes_ratio": 2 * before / sum(bytes_kept),
        "kv_dtype": options.kv_dtype,
        "rotary": options.rotary,
        "ranks": options.ranks,
        "widths": widths,
        "expected_kl": lost,
        "calibration_tokens": sum(len(window) for window in windows),
    }

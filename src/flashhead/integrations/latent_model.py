"""Models with latent attention in transformers: install, write down, load strictly, generate.

A folder's config.json has a `flashhead_latent` section with each layer's shape, and a `model_type`
that plain transformers does not know: it would load such a folder with random keys and values.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_graph import serve_steps
from flashhead.integrations.latent_roles import find_attention
from flashhead.integrations.latent_static import StaticLatentCache
from flashhead.nn.latent import LatentAttention
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.token_store import StoreOptions

SECTION = "flashhead_latent"
VERSION = 2
MODEL_TYPE = "flashhead_latent"
EXACT_FIRST = 1
"""Tokens at the start that the kind mixed leaves as they are: the first is no Gaussian."""
_FIELDS = {"version", "model_type", "kv_dtype", "layers"}


def install(model: PreTrainedModel, name: str, attention: LatentAttention) -> None:
    """Put a latent attention in the place of the module of this name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, attention)


def latent_modules(model: nn.Module) -> dict[str, LatentAttention]:
    """Latent attention modules by name, in the order of their layers."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, LatentAttention)}
    return dict(sorted(found.items(), key=lambda item: item[1].layer_idx))


def section_of(model: PreTrainedModel, kv_dtype: str) -> dict[str, Any]:
    """The `flashhead_latent` section of a model in memory, JSON-able."""
    return {
        "version": VERSION,
        "model_type": model.config.model_type,
        "kv_dtype": kv_dtype,
        "layers": {name: m.shape.to_json() for name, m in latent_modules(model).items()},
    }


def mark_folder(folder: Path, section: dict[str, Any]) -> None:
    """Write the section into a saved folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": MODEL_TYPE, SECTION: section}, indent=2))


def read_section(source: str) -> dict[str, Any] | None:
    """The section of a folder; None: it has none.

    Raises:
        FlashHeadError: one that this version does not understand.
    """
    path = Path(source) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError:
        return None  # whoever loads the folder says so
    section = config.get(SECTION) if isinstance(config, dict) else None
    if section is None:
        return None
    check_section(section, source)
    return section


def check_section(section: Any, source: str) -> None:
    """Check a folder's section.

    Args:
        section: as config.json has it.
        source: the folder, for the message.

    Raises:
        FlashHeadError: one that this version does not understand.
    """
    if not isinstance(section, dict) or section.get("version") != VERSION:
        version = section.get("version") if isinstance(section, dict) else section
        raise FlashHeadError(
            f"{source}: {SECTION} version {version!r}, this flashhead reads {VERSION}: upgrade it"
        )
    if set(section) != _FIELDS or section["model_type"] not in CONFIG_MAPPING:
        raise FlashHeadError(
            f"{source}: {SECTION}: wanted {', '.join(sorted(_FIELDS))} of a known model type"
        )
    StoreOptions(section["kv_dtype"])
    if not isinstance(section["layers"], dict):
        raise FlashHeadError(f"{source}: {SECTION}: layers: wanted names and shapes")


def load_latent(source: str, section: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Load a folder with latent attention.

    Args:
        source: the folder.
        section: of it, as `read_section` returned it.
        dtype: of the weights.

    Raises:
        FlashHeadError: shapes that do not fit the model or the file, missing or unknown tensors.
    """
    values = json.loads((Path(source) / "config.json").read_text())
    values = {k: v for k, v in values.items() if k not in (SECTION, "model_type")}
    quantization = values.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "flashhead":
        del values["quantization_config"]
    config = CONFIG_MAPPING[section["model_type"]].from_dict(values)
    made = latent_class_of(config, section)
    with torch.device("meta"):
        expected = made(config)
    require_tensors(Path(source), expected, quantization is not None)
    model, info = made.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        output_loading_info=True,
    )
    bad = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if bad:
        raise FlashHeadError(f"{source}: {len(bad)} tensors missing or not known, such as {bad[0]}")
    give_angles(model)
    serve_latents(model, store_of(section["kv_dtype"]))
    return model


def latent_class_of(config: Any, section: dict[str, Any]) -> Any:
    """The model class of a folder, whose `__init__` takes `config` and puts latents in place.

    Args:
        config: of the model before it was converted.
        section: of the folder, checked.

    Raises:
        FlashHeadError: a layer's shape that cannot be; from `__init__`: one that does not fit.
    """
    shapes = {name: LatentShape.from_json(layer) for name, layer in section["layers"].items()}
    return _latent_class(AutoModelForCausalLM._model_mapping[type(config)], shapes)


def store_of(kv_dtype: str) -> StoreOptions:
    """How a folder's cache keeps tokens; in few bits, attention sinks stay as they are."""
    return StoreOptions(kv_dtype, exact_first=EXACT_FIRST if kv_dtype == "mixed" else 0)


def _latent_class(cls: type[PreTrainedModel], shapes: dict[str, LatentShape]) -> Any:
    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        found = {roles.name: roles for roles in find_attention(self)}
        if set(found) != set(shapes):
            raise FlashHeadError(
                f"{SECTION}: {len(shapes)} layers, the model has {len(found)} of other names"
            )
        for name, shape in shapes.items():
            roles = found[name]
            free = {"rank", "rotary", "components", "norm", "key_constant", "bits"}
            if shape.rotary == "decoupled" and roles.query_norm is None:
                # the config's head_dim says what turns, as in DeepSeek-V3; weights say the rest
                free |= {"head_dim", "value_dim", "scale"}
            for field in LatentShape.__dataclass_fields__:
                want, got = getattr(roles.exact, field), getattr(shape, field)
                if field not in free and got != want:
                    raise FlashHeadError(f"{SECTION}: {name}: {field}={got!r}, wanted {want!r}")
            norms = {"query_norm": roles.query_norm, "key_norm": roles.key_norm}
            install(self, name, LatentAttention(shape, None, roles.module.layer_idx, **norms))

    return type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__})


def require_tensors(folder: Path, expected: PreTrainedModel, packed: bool) -> None:
    """Compare the files' headers with what the model wants, before any weight is read."""
    wanted = {
        f"{name}.{own}": list(parameter.shape)
        for name, module in latent_modules(expected).items()
        for own, parameter in module.named_parameters()
    }
    found: dict[str, list[int]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FlashHeadError(f"{folder}: damaged weights ({error})") from error
    for name, shape in wanted.items():
        if name not in found:
            if packed and f"{name}_packed" in found:
                continue
            raise FlashHeadError(f"{folder}: no tensor {name}: the folder is not whole")
        if found[name] != shape and not packed:
            raise FlashHeadError(f"{folder}: {name} is {found[name]}, wanted {shape}")


def give_angles(model: PreTrainedModel) -> None:
    """Rotary angles are no weights: they come from the config, by way of the model's own module."""
    from flashhead.integrations.latent_roles import rotary_table

    types = getattr(model.config.get_text_config(), "layer_types", None)
    nested = any(hasattr(m, f"{t}_inv_freq") for t in set(types or ()) for m in model.modules())
    tables: dict[str | None, Any] = {}
    for module in latent_modules(model).values():
        kind = types[module.layer_idx] if types and nested else None
        if kind not in tables:
            tables[kind] = rotary_table(model, kind)
        module.table = tables[kind]


def serve_latents(model: PreTrainedModel, options: StoreOptions) -> None:
    """`generate()` and calls without a cache of their own use a `LatentCache` from now on, and
    `generate(cache_implementation="static")` a `StaticLatentCache`.
    """
    model.latent_store = options
    serve_steps(model)
    prepare = model._prepare_cache_for_generation

    def prepared(generation: Any, kwargs: dict[str, Any], *args: Any, **more: Any) -> Any:
        wanted = generation.use_cache is not False and kwargs.get("past_key_values") is None
        if wanted and generation.cache_implementation == "static":
            most = more["max_cache_length"] if "max_cache_length" in more else args[-1]
            kwargs["past_key_values"] = _static_cache(model, generation, most)
            return None
        if wanted and generation.cache_implementation is None:
            kwargs["past_key_values"] = LatentCache(model)
            if generation.is_assistant:
                kwargs["past_key_values"].activate_past_recording()
            return None
        return prepare(generation, kwargs, *args, **more)

    def give_cache(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        wanted = kwargs.get("use_cache")
        wanted = module.config.use_cache if wanted is None else wanted
        if wanted and kwargs.get("past_key_values") is None and not module.training:
            kwargs["past_key_values"] = LatentCache(model)
        return args, kwargs

    model._prepare_cache_for_generation = prepared
    model.register_forward_pre_hook(give_cache, with_kwargs=True)


def _static_cache(model: PreTrainedModel, generation: Any, most: int) -> StaticLatentCache:
    """A cache with room for so many tokens: the last one again where it has, as with transformers'
    own, so that its graphs are captured once.
    """
    most = max(most, getattr(generation, "max_cache_len", None) or 0)
    held = getattr(model, "latent_static", None)
    if held is None or held.tokens < most or held.options != model.latent_store:
        model.latent_static = held = StaticLatentCache(model, most)
    held.reset()
    return held

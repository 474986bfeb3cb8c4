"""Folders with latent attention made known to vLLM: their `model_type` and their model classes.

Such a folder names a `model_type` that nobody else knows. For vLLM it is the model that it was
before it was converted, under an architecture of our own: `FlashHeadLatent` + the original name.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_model import MODEL_TYPE, SECTION, check_section

PREFIX = "FlashHeadLatent"
BASES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
"""Architectures that are served with latents, and their modules in `vllm.model_executor.models`."""


class LatentConfig(PretrainedConfig):
    """Reads the config of a folder with latent attention as vLLM wants it."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that the model had, with its latents' section and our architecture.

        Raises:
            FlashHeadError: a folder that vLLM does not serve.
        """
        section = config_dict.get(SECTION)
        check_section(section, "config.json")
        assert section is not None
        values = {name: value for name, value in config_dict.items() if name != "model_type"}
        values["architectures"] = [served_architecture(config_dict, section)]
        return CONFIG_MAPPING[section["model_type"]].from_dict(values, **kwargs)


def served_architecture(config: dict[str, Any], section: dict[str, Any]) -> str:
    """The name of our model class.

    Args:
        config: config.json.
        section: of it, checked.

    Raises:
        FlashHeadError: an architecture, a body or latents that are not served.
    """
    names = config.get("architectures") or [None]
    if names[0] not in BASES:
        raise FlashHeadError(
            f"vLLM with latent attention: {names[0]}: wanted one of {', '.join(BASES)}"
        )
    if section["kv_dtype"] != "bf16":
        raise FlashHeadError(
            f"vLLM with latent attention: kv_dtype {section['kv_dtype']!r}: its blocks keep "
            "latents in the model's dtype: convert with --kv-dtype bf16"
        )
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method not in (None, "flashhead") or quantization.get("inner"):
        raise FlashHeadError(
            f"vLLM with latent attention: layers quantized by {method!r}: wanted a folder that "
            "was converted without --quantize"
        )
    return f"{PREFIX}{names[0]}"


def register_latent() -> None:
    """Register the config and the model classes; nothing of a model is imported."""
    from vllm import ModelRegistry

    AutoConfig.register(MODEL_TYPE, LatentConfig, exist_ok=True)
    known = ModelRegistry.get_supported_archs()
    for name in BASES:
        if f"{PREFIX}{name}" not in known:
            ModelRegistry.register_model(
                f"{PREFIX}{name}", f"flashhead.integrations.vllm.latent_model:{PREFIX}{name}"
            )

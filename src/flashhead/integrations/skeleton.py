"""A causal LM without weights: its modules and the shapes and dtypes of their tensors, from config.

On torch's meta device a model of any size is built in a moment, and says which tensor of a
checkpoint is a linear layer's weight, and in which dtype `load_dense` would hold it.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import WeightRenaming, get_model_conversion_mapping
from transformers.models.auto import modeling_auto

from flashhead.errors import FlashHeadError

_CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_OTHERS = {
    "masked tokens": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "an answer to an encoded text": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def require_causal(folder: Path) -> None:
    """Refuse a folder whose config names another kind of model, before its weights are read.

    Raises:
        FlashHeadError: an encoder, an encoder with a decoder, or a config that nobody knows.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            return  # whether its code may run is asked where the model is loaded
        line = str(error).strip().splitlines()[0]
        raise FlashHeadError(f"model {str(folder)!r} cannot be loaded: {line}") from error
    for name in getattr(config, "architectures", None) or ():
        if name in _CAUSAL.values():
            continue
        for what, mapping in _OTHERS.items():
            if name in mapping.values():
                raise FlashHeadError(
                    f"model {str(folder)!r}: {name} predicts {what}: wanted a causal LM"
                )


def skeleton(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel | str:
    """The model of a folder on the meta device.

    Args:
        folder: with config.json; its code, if it has any, is not run.
        dtype: that the weights would be loaded in.

    Returns:
        The model; or, if its tensors could not be told from those of a checkpoint one by one, why.

    Raises:
        FlashHeadError: transformers knows no causal LM of that config.
    """
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "auto_map", None):
        return "the model brings its own code"
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        line = str(error).strip().splitlines()[0]
        raise FlashHeadError(f"model {str(folder)!r} cannot be loaded: {line}") from error
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return "some of its modules stay in float32"
    conversions = [
        type(step).__name__
        for step in get_model_conversion_mapping(model)
        if not isinstance(step, WeightRenaming)
    ]
    if conversions:
        return "transformers rearranges its tensors as it loads them"
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def stored_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters by their names in a checkpoint: a tied one is stored under one name."""
    tied = set(model.all_tied_weights_keys)
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if name not in tied}


def save_configs(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and generation_config.json as `save_pretrained` would."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)

"""What vLLM is told of a folder with latent attention; engines are tested in tests/engines."""

import pytest
from latent_models import tiny, windows

from flashhead.convert.latent import make_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_model import MODEL_TYPE, SECTION, latent_class_of, section_of
from flashhead.integrations.vllm.latent_config import LatentConfig
from flashhead.options_latent import LatentOptions


@pytest.fixture(scope="module")
def config():
    """config.json of a converted folder."""
    model = tiny("qwen2")
    make_latent(model, LatentOptions(kv_ratio=2), windows(), progress=False)
    values = model.config.to_dict() | {"architectures": ["Qwen2ForCausalLM"]}
    return values | {"model_type": MODEL_TYPE, SECTION: section_of(model, "bf16")}


def test_it_is_the_model_that_it_was(config):
    """A model type that vLLM does not know, or one served by a class without latents."""
    read = LatentConfig.from_dict(config)
    assert read.model_type == "qwen2"
    assert read.architectures == ["FlashHeadLatentQwen2ForCausalLM"]
    assert read.num_key_value_heads == 2
    assert getattr(read, SECTION) == config[SECTION]
    latent_class_of(read, getattr(read, SECTION))(read)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["PhiForCausalLM"]}, "PhiForCausalLM: wanted one of LlamaForCausalLM"),
        ({"architectures": None}, "wanted one of LlamaForCausalLM"),
        ({SECTION: {"kv_dtype": "mixed"}}, "kv_dtype 'mixed'"),
        ({SECTION: {"version": 1}}, "version 1, this flashhead reads"),
        ({SECTION: {"layers": []}}, "wanted names and shapes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "without --quantize"),
        (
            {
                "quantization_config": {
                    "quant_method": "flashhead",
                    "inner": {"quant_method": "awq"},
                }
            },
            "without --quantize",
        ),
    ],
)
def test_what_is_not_served_is_refused(changes, message, config):
    """An engine that starts and answers something wrong, or keeps more than the folder promises."""
    changed = config | changes
    if SECTION in changes:
        changed[SECTION] = config[SECTION] | changes[SECTION]
    with pytest.raises(FlashHeadError, match=message):
        LatentConfig.from_dict(changed)


def test_an_index_in_the_folder_is_served(config):
    """A converted folder with an index, refused for its quantization config."""
    method = {"quantization_config": {"quant_method": "flashhead"}}
    read = LatentConfig.from_dict(config | method)
    assert read.architectures == ["FlashHeadLatentQwen2ForCausalLM"]

"""Entry point `vllm.general_plugins`: called in every process of vLLM, maybe more than once."""

import os

SWITCH = "FLASHHEAD_ENABLED"
METHOD = "flashhead"
WORKER = "flashhead.integrations.vllm.worker.FlashHeadWorker"
"""Extension of vLLM's workers that tells what was searched, as vLLM is given it."""


def register() -> None:
    """Make `--quantization flashhead`, `quant_method: flashhead` and folders with latent attention
    known to vLLM.
    """
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if METHOD not in QUANTIZATION_METHODS:
        from flashhead.integrations.vllm.config import FlashHeadConfig

        register_quantization_config(METHOD)(FlashHeadConfig)
    from flashhead.integrations.vllm.latent_config import register_latent

    register_latent()


def is_enabled() -> bool:
    """Whether heads are searched: `FLASHHEAD_ENABLED=0` leaves every layer as it would be."""
    return os.environ.get(SWITCH, "1") != "0"

"""A model class that hands its head no quantization config, as some of vLLM's do."""

from pathlib import Path
from typing import Any

from torch import nn
from vllm import ModelRegistry
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama import LlamaForCausalLM


class BareHeadForCausalLM(LlamaForCausalLM):
    """Llama whose head and name of it the quantization config never sees."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        nn.Module.__init__(self)
        self.config = config = vllm_config.model_config.hf_config
        self.model = self._init_model(vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors


def register() -> None:
    """As a plugin of vLLM: its worker processes have model classes in no other way."""
    ModelRegistry.register_model(BareHeadForCausalLM.__name__, BareHeadForCausalLM)


def install(folder: Path) -> None:
    """Make `folder`, on PYTHONPATH, one of an installed plugin."""
    info = folder / "bare_head-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bare-head\nVersion: 1\n")
    entry = "[vllm.general_plugins]\nbare_head = bare_head:register\n"
    (info / "entry_points.txt").write_text(entry)

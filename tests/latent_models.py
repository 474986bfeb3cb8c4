"""Tiny random models of every attention that is converted."""

import torch

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

FAMILIES = {
    "mha": ("Llama", {"num_key_value_heads": 4}),
    "gqa": ("Llama", {"num_key_value_heads": 2}),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "biases": ("Llama", {"num_key_value_heads": 2, "attention_bias": True}),
    "llama3-rope": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "yarn": ("Llama", {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "partial-rotary": ("Phi", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-windows": ("Qwen2", {"num_key_value_heads": 2, **WINDOWED}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2}),
    "gemma3": (
        "Gemma3",
        {
            "num_key_value_heads": 1,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
}


def tiny(family: str, **changes):  # type: ignore[no-untyped-def]
    """A model of a family with biases and norms that are not their trivial first values."""
    import transformers

    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    values = {**SIZES, **own, **changes}
    if name == "Phi":
        del values["head_dim"]
        values["hidden_size"] = 64
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**values)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "_norm" in key:
                parameter.add_(torch.randn_like(parameter) / 4)
            elif "_proj" in key:
                parameter.mul_(6)  # attention that looks somewhere
    return model


def ids(rows: int = 2, tokens: int = 40, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 131, (rows, tokens), generator=generator)


def windows(count: int = 8, tokens: int = 64) -> list[torch.Tensor]:
    return list(ids(count, tokens, seed=2))

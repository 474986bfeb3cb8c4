"""Heads of models that are timed with synthetic rows: rows V and dimensions d by name; no torch."""

SHAPES = {
    "llama-3.2-1b": (128_256, 2_048),
    "llama-3.2-3b": (128_256, 3_072),
    "qwen3-0.6b": (151_936, 1_024),
    "qwen3-1.7b": (151_936, 2_048),
    "gemma-3-270m": (262_144, 640),
    "gemma-3-1b": (262_144, 1_152),
    "smollm2-135m": (49_152, 576),
}
DEVICE_METHODS = ("int8", "fp8", "int4", "clusters", "flashhead")
"""What a benchmark on a device may leave out; the bf16 product is always there."""

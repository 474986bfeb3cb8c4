"""Tasks of `flashhead eval MODEL --against BASE` by name; no torch, for `--help`."""

TASKS = ("mmlu", "gsm8k", "humaneval", "perplexity", "needle", "copy", "lookup", "addition")
NEEDS_DATA = ("mmlu", "gsm8k", "humaneval", "perplexity")
"""Tasks that read `--data-dir`."""

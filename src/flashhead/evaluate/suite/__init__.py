"""Tasks through lm-evaluation-harness: a model against its base (docs/evaluate.md)."""

"""The only files that import transformers or vLLM."""

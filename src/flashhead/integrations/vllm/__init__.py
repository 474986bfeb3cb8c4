"""vLLM: any causal LM served with a FlashHead, through vLLM's own extension points.

`plugin.register` (entry point `vllm.general_plugins`) registers the quantization method
`flashhead`. Its `config.FlashHeadConfig` leaves every layer but the output embedding to the
checkpoint's own method, and gives the output embedding a `method.FlashHeadMethod`, which wraps its
own. Which row of a batch needs which logits is told by `requests.RowNeeds` (entry point
`vllm.logits_processors`), which sees the sampling parameters and never touches a logit. No method
of vLLM is replaced.

Importing this package imports nothing of vLLM; its modules do.
"""

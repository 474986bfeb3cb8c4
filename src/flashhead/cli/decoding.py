"""Decoding a prompt with either head of the same model: streamed, timed, compared by step."""

from typing import Any, TextIO

import torch

from flashhead.bench.decode import linear_twin
from flashhead.cli.session import pad_token
from flashhead.cli.stream import Streamer
from flashhead.evaluate.baselines import float32_logits


class Decoder:
    """A model with a FlashHead, and the dense head that can take its place.

    Args:
        model: whose output embedding is a FlashHead.
        tokenizer: of the model.
        inputs: the prompt, as `generate` takes it.
        new_tokens: at most.
    """

    def __init__(self, model: Any, tokenizer: Any, inputs: Any, new_tokens: int) -> None:
        self.model, self.tokenizer, self.inputs = model, tokenizer, inputs
        self.new_tokens = new_tokens
        self.head = model.get_output_embeddings()
        self.dense = linear_twin(self.head)

    def generate(self, flash: bool, out: TextIO | None = None) -> Streamer:
        """Decode greedily with one of the two heads."""
        self.model.set_output_embeddings(self.head if flash else self.dense)
        try:
            streamer = Streamer(self.tokenizer, out)
            self.model.generate(
                **self.inputs,
                do_sample=False,
                max_new_tokens=self.new_tokens,
                pad_token_id=pad_token(self.tokenizer),
                streamer=streamer,
            )
        finally:
            self.model.set_output_embeddings(self.head)
        return streamer

    def time(self, repeats: int) -> dict[bool, list[float]]:
        """Tokens per second of silent runs: key False dense, True FlashHead."""
        rates: dict[bool, list[float]] = {False: [], True: []}
        for repeat in range(repeats):
            for flash in (False, True) if repeat % 2 == 0 else (True, False):
                rates[flash].append(self.generate(flash).tok_per_sec)
        return rates


def compare_steps(decoder: Decoder) -> dict[str, Any]:
    """Decode densely and search with FlashHead at every step, on the same hidden state.

    Returns:
        JSON-able: `agreement` with the dense head's token, what FlashHead counted, and the steps
        that differ with the token that wins in float32.
    """
    head = decoder.head
    outputs: list[Any] = []
    steps: list[dict[str, Any]] = []

    def ask(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
        hidden = args[0].reshape(-1, head.weight.shape[1])[-1:]
        output = head.search(hidden)
        outputs.append(output)
        dense = int(logits.reshape(-1, logits.shape[-1])[-1].argmax())
        flash = int(output.logits.argmax())
        if dense != flash:
            exact = int(float32_logits(hidden, head.weight, head.bias).argmax())
            step: dict[str, Any] = {"step": len(outputs)}
            named = {"dense": dense, "flash": flash, "float32": exact}
            steps.append(
                step
                | {name: decoder.tokenizer.decode([t]) for name, t in named.items()}
                | {"float32_picks_flash": exact == flash}
            )

    hook = decoder.dense.register_forward_hook(ask)
    try:
        decoder.generate(flash=False)
    finally:
        hook.remove()
    head_bytes = head.weight.numel() * head.weight.element_size()
    tokens = len(outputs)
    return {
        "agreement": 1 - len(steps) / tokens,
        "bytes_fraction": sum(int(output.bytes_read) for output in outputs) / tokens / head_bytes,
        "certified_fraction": sum(int(output.certified) for output in outputs) / tokens,
        "candidates_mean": sum(int(output.candidates) for output in outputs) / tokens,
        "new_tokens": tokens,
        "differing_steps": steps,
        "head_bytes": head_bytes,
        "vocab_size": head.weight.shape[0],
    }

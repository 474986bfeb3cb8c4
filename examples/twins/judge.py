"""What a folder is worth: loss on held-out text, answers to the synthetic tasks.

Loss is over whole texts at once, latents rounded as the folder's cache rounds them; answers are
greedy and go through that cache token by token.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_model import latent_modules
from flashhead.integrations.transformers import load_dense
from twins import tasks
from twins.corpus import Corpus
from twins.rows import Rows
from twins.steps import held_out_loss
from twins.tasks import Question

BATCH = 250
"""Questions answered side by side."""


def judge(
    folder: Path, corpus: Corpus, *, context: int, tokens: int, count: int, seed: int, device: str
) -> dict[str, Any]:
    """Loss and accuracies of a model folder.

    Args:
        folder: of a model with the corpus' tokenizer.
        corpus: its held-out text is read.
        context: of the rows the loss is over.
        tokens: of held-out text, at most.
        count: questions a task, at most.
        seed: that the corpus was made with: it sets which sums are held out.
        device: "cpu" (float32) or "cuda" (bfloat16).

    Returns:
        JSON-able: `loss` in nats a token, `perplexity`, `tasks` with `correct` of `asked`.

    Raises:
        FlashHeadError: no such model, or one of another vocabulary.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_dense(str(folder), dtype=dtype).to(device).eval()
    if model.config.vocab_size != len(corpus.tokenizer):
        raise FlashHeadError(
            f"{folder}: {model.config.vocab_size} tokens, the corpus has {len(corpus.tokenizer)}"
        )
    rows = Rows(corpus.held_out, context)
    modules = latent_modules(model).values()
    for module in modules:
        module.rounding = model.latent_store
    loss = held_out_loss(model, rows, tokens, max(1, 32768 // context))
    for module in modules:
        module.rounding = None
    started = time.perf_counter()
    found = {
        name: accuracy(model, corpus.tokenizer, asked, tasks.ANSWER_TOKENS[name])
        for name, asked in tasks.questions(seed, count).items()
    }
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "held_out_tokens": max(1, min(rows.count, tokens // context)) * context,
        "dtype": str(dtype).removeprefix("torch."),
        "tasks": found,
        "answering_seconds": round(time.perf_counter() - started, 1),
    }


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: Any, asked: list[Question], new_tokens: int
) -> dict[str, Any]:
    """Share of the questions whose answer is exactly right up to the end of its line."""
    correct = 0
    for start in tqdm(range(0, len(asked), BATCH), desc="answering", leave=False):
        batch = asked[start : start + BATCH]
        lead = tokenizer.bos_token
        given = tokenizer(
            [lead + question.prompt for question in batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        ).to(model.device)
        out = model.generate(**given, max_new_tokens=new_tokens, do_sample=False)
        answers = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :])
        correct += sum(
            text.split("\n")[0] == question.answer
            for text, question in zip(answers, batch, strict=True)
        )
    share = correct / len(asked)
    error = math.sqrt(share * (1 - share) / len(asked))
    return {"correct": correct, "asked": len(asked), "accuracy": share, "standard_error": error}

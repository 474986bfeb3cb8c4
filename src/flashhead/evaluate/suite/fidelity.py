"""How far the value's answers are from the base's: tokens, distributions, and examples of both.

Generated tokens are compared position by position. Distributions are compared on the base's own
text, so that both models read the same: after its prompt and its generated tokens, or at the
positions that a log-likelihood task scores.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from flashhead.evaluate.metrics import Reference
from flashhead.evaluate.suite.heads import CHUNK_ROWS
from flashhead.evaluate.suite.rows import batches, groups

MOST_ROWS, MOST_POSITIONS = 16, 256
"""Of a task, for the distributions."""
MOST_EXAMPLES = 5
TOP = 5
PROMPT_CHARACTERS = 400


@dataclasses.dataclass(frozen=True)
class Asked:
    """What both models read.

    Args:
        row: token ids, the base's answer included, but for its last token.
        positions: at its end, whose next tokens are compared.
    """

    row: list[int]
    positions: int


def generations(base: list[dict[str, Any]], value: list[dict[str, Any]]) -> dict[str, Any]:
    """Token agreement of greedy generations.

    Args:
        base: answers with `tokens`.
        value: answers to the same requests.

    Returns:
        `agreement`: identical tokens at the same position, as a share of all positions of the
        longer of both; `tokens`, `identical_tokens`; `answers`, `identical_answers`;
        `first_divergence`: the earliest and the mean position among answers that differ, or None.
    """
    total = same = 0
    parted = []
    for left, right in zip(base, value, strict=True):
        a, b = left["tokens"], right["tokens"]
        total += max(len(a), len(b))
        same += sum(x == y for x, y in zip(a, b, strict=False))
        if a != b:
            parted.append(divergence(a, b))
    first = {"earliest": min(parted), "mean": float(np.mean(parted))} if parted else None
    return {
        "agreement": same / total if total else 1.0,
        "tokens": total,
        "identical_tokens": same,
        "answers": len(base),
        "identical_answers": len(base) - len(parted),
        "first_divergence": first,
    }


def divergence(a: list[int], b: list[int]) -> int:
    """The first position at which two lists differ."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


@torch.no_grad()
def distributions(base: Any, value: Any, asked: list[Asked], seed: int) -> dict[str, Any]:
    """KL(base||value) in nats, and agreement of the argmax, on a sample of positions.

    Args:
        base: has `body` and `head`.
        value: likewise.
        asked: of the whole task.
        seed: of the sample: at most 32 rows and about 256 positions.
    """
    picked: list[Asked] = []
    for i in np.random.default_rng(seed).permutation(len(asked)).tolist():
        if len(picked) == MOST_ROWS or sum(a.positions for a in picked) >= MOST_POSITIONS:
            break
        left = MOST_POSITIONS - sum(a.positions for a in picked)
        positions = min(asked[i].positions, left)
        cut = len(asked[i].row) - asked[i].positions + positions
        picked.append(Asked(asked[i].row[:cut], positions))
    read = hidden_states(base, picked)
    states = [read, read if value.body is base.body else hidden_states(value, picked)]
    kl, agree = [], []
    for a, b in zip(*(torch.cat(s).split(CHUNK_ROWS) for s in states), strict=True):
        truth, other = Reference(base.head.logits(a)), value.head.logits(b)
        kl.append(truth.divergences(other)[0])
        agree.append(truth.chosen(other.argmax(1)))
    nats = torch.cat(kl).clamp_min(0)
    spread = float(nats.std()) / len(nats) ** 0.5 if len(nats) > 1 else None
    return {
        "kl": {
            "mean": float(nats.mean()),
            "stderr": spread,
            "max": float(nats.max()),
            "positions": len(nats),
        },
        "argmax_agreement": float(torch.cat(agree).double().mean()),
    }


def hidden_states(side: Any, asked: list[Asked]) -> list[torch.Tensor]:
    """Hidden states `[positions, d]` of each row, in order."""
    rows = [a.row for a in asked]
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for group in groups(rows, side.body.sharing):
        room = min(len(rows[i]) - asked[i].positions for i in group.members)
        shared = max(0, min(group.shared, room))
        prefix = side.body.prefix(rows[group.members[0]][:shared])
        for members in batches(group, side.rows_at_once(len(rows[group.members[-1]]), shared)):
            keep = max(asked[i].positions for i in members)
            hidden, _ = side.body.prefill([rows[i] for i in members], prefix, keep)
            for states, i in zip(hidden, members, strict=True):
                found[i] = states[len(states) - asked[i].positions :].clone()
    return found


def examples(
    base: Any,
    value: Any,
    prompts: list[list[int]],
    answers: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    scores: tuple[list[float], list[float]],
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """Generations that differ, with the largest logits of both models where they part.

    Args:
        base: has `body` and `head`.
        value: likewise.
        prompts: token ids.
        answers: the base's and the value's.
        scores: likewise.
        tokenizer: of both.
    """
    found: list[dict[str, Any]] = []
    for i, (a, b) in enumerate(zip(*(([x["tokens"] for x in s]) for s in answers), strict=True)):
        if a == b or len(found) == MOST_EXAMPLES:
            continue
        at = divergence(a, b)
        asked = [Asked(prompts[i] + a[:at], 1)]
        logits = [side.head.logits(hidden_states(side, asked)[0])[0] for side in (base, value)]
        tops = [set(x.topk(min(TOP, len(x))).indices.tolist()) for x in logits]
        order = sorted(tops[0] | tops[1], key=lambda token: -float(logits[0][token]))
        found.append(
            {
                "number": i,
                "prompt": tokenizer.decode(prompts[i])[-PROMPT_CHARACTERS:],
                "position": at,
                "common": tokenizer.decode(a[:at]),
                "base": tokenizer.decode(a[at:]),
                "value": tokenizer.decode(b[at:]),
                "base_token": a[at] if at < len(a) else None,
                "value_token": b[at] if at < len(b) else None,
                "base_score": scores[0][i],
                "value_score": scores[1][i],
                "candidates": [
                    {
                        "token": token,
                        "text": tokenizer.decode([token]),
                        "base_logit": float(logits[0][token]),
                        "value_logit": float(logits[1][token]),
                    }
                    for token in order
                ],
            }
        )
    return found

"""Does the sampler draw from softmax(logits / T)? Draws on real hidden states against float32.

For each temperature, `draws` tokens are drawn, the same number from each of `states` hidden states
of a text, and their counts are compared with the float64 softmax of float32 logits of the same
weights (`evaluate/fit.py`): a p-value a state, and one for all by Fisher. The sampler is rejected
at a temperature where that is below 0.001.

top_p is tested for equivalence: the mean over the states of the total variation between the draws'
distribution and the dense nucleus, in bins, is below the margin with 95 % confidence. That is the
sum of two 97.5 % limits: the share of draws outside of the nucleus, and the distance inside. The
margin is 0.01 because that is what the bf16 dense head itself is away from float32 (0.008-0.010 on
the models measured here): less than rounding the logits does, which nobody calls another sampler.
"""

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from tqdm import tqdm

from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.evaluate import fit
from flashhead.evaluate.baselines import float32_logits
from flashhead.evaluate.capture import Postprocess, hidden_states
from flashhead.evaluate.text import read_documents, token_windows
from flashhead.nn.candidates import complete
from flashhead.nn.sampling import allowed
from flashhead.options import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW_TOKENS = 64
REJECTED_BELOW = 1e-3
MARGIN, CONFIDENCE = 0.01, 0.95


class DrawHead(Protocol):
    """What is asked of a head."""

    weight: Tensor
    bias: Tensor | None

    def draws(
        self,
        hidden: Tensor,
        count: int,
        sampling: Sampling,
        first_step: int = 0,
        failure_probability: float = 1e-6,
    ) -> Tensor:
        """Tokens `int64[count]` of steps first_step, ... drawn for one hidden state `[1, d]`."""


def evaluate_sampling(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text_file: Path,
    draws: int,
    temperatures: tuple[float, ...],
    *,
    top_p: float = 0.9,
    states: int = 20,
    seed: int = 0,
    failure_probability: float = 1e-6,
    progress: bool = True,
    postprocess: Postprocess | None = None,
) -> dict[str, Any]:
    """Test the exact sampler of a head on hidden states of a text.

    Args:
        model: whose output embedding has `draws`.
        tokenizer: of the model.
        text_file: `.txt` or `.jsonl`.
        draws: tokens drawn at each temperature, and for top_p, over all states.
        temperatures: above 0.
        top_p: of the equivalence test, at temperature 1.
        states: hidden states, each the last of another window of the text.
        seed: of the windows and of the noise.
        failure_probability: of each draw's certificate.
        progress: show a bar on stderr.
        postprocess: what the model does to logits after its head, as for `evaluate_head`; the
            distribution tested is that of the head's own logits.

    Returns:
        JSON document: `temperatures` with p-values, `top_p` with the limit, `passed`.

    Raises:
        FlashHeadError: the head cannot draw, the text is too short, or too few draws a state.
    """
    started = time.perf_counter()
    head = _draw_head(model)
    each = draws // states
    if each < 100:
        raise FlashHeadError(f"draws={draws}: wanted 100 or more for each of {states} states")
    windows = token_windows(
        read_documents(Path(text_file)),
        tokenizer,
        states * WINDOW_TOKENS,
        window_tokens=WINDOW_TOKENS,
        seed=seed,
    )[:states]
    with torch.inference_mode():
        captured = hidden_states(
            model, windows, tokenizer.bos_token_id, postprocess or (lambda logits: logits)
        )
        hidden = torch.cat([window[-1:] for window in captured])
    fitted, nucleus = evaluate_draws(
        head,
        hidden,
        each,
        temperatures,
        top_p,
        seed=seed,
        failure_probability=failure_probability,
        progress=progress,
    )
    return {
        "model": str(getattr(model, "name_or_path", "") or type(model).__name__),
        "data": str(text_file),
        "states": states,
        "draws": each * states,
        "temperatures": fitted,
        "top_p": nucleus,
        "passed": not any(row["rejected"] for row in fitted) and nucleus["equivalent"],
        "seed": seed,
        "failure_probability": failure_probability,
        **provenance(),
        "seconds": time.perf_counter() - started,
    }


def _draw_head(model: "PreTrainedModel") -> DrawHead:
    head = model.get_output_embeddings()
    if not hasattr(head, "draws"):
        raise FlashHeadError(
            f"model with a {type(head).__name__} as its head: wanted a FlashHead with a codes "
            'index; load it with head="codes"'
        )
    return cast(DrawHead, head)


def evaluate_draws(
    head: DrawHead,
    hidden: Tensor,
    each: int,
    temperatures: tuple[float, ...],
    top_p: float,
    *,
    seed: int = 0,
    failure_probability: float = 1e-6,
    progress: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The tests on given hidden states `[n, d]`: a row a temperature, and the one of top_p.

    Every draw has a step of its own, so that no two states share noise.
    """
    settings = [Sampling(temperature=t, seed=seed) for t in temperatures]
    settings.append(Sampling(temperature=1.0, top_p=top_p, seed=seed))
    rows: list[dict[str, Any]] = []
    step = 0
    total = len(settings) * len(hidden)
    bar = tqdm(
        total=total, desc="eval sampling", unit="state", file=sys.stderr, disable=not progress
    )
    with bar, torch.inference_mode():
        for sampling in settings:
            counts, started = [], time.perf_counter()
            for state in hidden:
                tokens = head.draws(state[None], each, sampling, step, failure_probability)
                counts.append(torch.bincount(tokens, minlength=head.weight.shape[0]))
                step += each
                bar.update()
            seconds = time.perf_counter() - started
            truths = [float32_logits(state[None], head.weight, head.bias)[0] for state in hidden]
            row = (_top_p_row if sampling.filters else _fit_row)(counts, truths, sampling)
            rows.append({**row, "draws": each * len(hidden), "seconds": seconds})
    return rows[:-1], rows[-1]


def _fit_row(counts: list[Tensor], truths: list[Tensor], sampling: Sampling) -> dict[str, Any]:
    """G-test of one temperature, over all states."""
    tests, distances = [], []
    for count, logits in zip(counts, truths, strict=True):
        probabilities = torch.softmax(logits.double() / sampling.temperature, 0)
        expected = probabilities * float(count.sum())
        bins = fit.pooled(expected)
        tests.append(fit.g_test(fit.binned(count, bins), fit.binned(expected, bins)))
        distances.append(float((count / count.sum() - probabilities).abs().sum() / 2))
    p_values = [fit.chi2_sf(g, dof) for g, dof in tests]
    informative = [p for p, (_, dof) in zip(p_values, tests, strict=True) if dof > 0]
    p_value = fit.fisher(informative) if informative else 1.0
    return {
        "temperature": sampling.temperature,
        "p_value": p_value,
        "rejected": p_value < REJECTED_BELOW,
        "p_values": p_values,
        "g": math.fsum(g for g, _ in tests),
        "degrees_of_freedom": sum(dof for _, dof in tests),
        "tv_of_counts": math.fsum(distances) / len(distances),
    }


def _top_p_row(counts: list[Tensor], truths: list[Tensor], sampling: Sampling) -> dict[str, Any]:
    """Equivalence of top_p sampling, over all states."""
    statistic, freedom, inside, outside = 0.0, 0, 0.0, 0
    for count, logits in zip(counts, truths, strict=True):
        left = allowed(complete(logits), sampling)
        assert left is not None
        held = count[left.rows]
        outside += int(count.sum() - held.sum())
        shares = torch.softmax(left.logits.double() / sampling.temperature, 0)
        expected = shares * max(1.0, float(held.sum()))
        bins = fit.pooled(expected)
        x, dof = fit.chi_square(fit.binned(held, bins), fit.binned(expected, bins))
        statistic, freedom, inside = statistic + x, freedom + dof, inside + float(held.sum())
    alpha = (1 - CONFIDENCE) / 2
    noncentrality = fit.noncentrality_limit(statistic, freedom, alpha)
    inside_limit = math.sqrt(noncentrality / max(1.0, inside)) / 2
    outside_limit = fit.poisson_limit(outside, alpha) / (inside + outside)
    limit = min(1.0, inside_limit + outside_limit)
    return {
        "top_p": sampling.top_p,
        "temperature": sampling.temperature,
        "outside": outside,
        "chi_square": statistic,
        "degrees_of_freedom": freedom,
        "tv_limit": limit,
        "margin": MARGIN,
        "confidence": CONFIDENCE,
        "equivalent": limit < MARGIN,
    }


def format_table(document: dict[str, Any]) -> str:
    """The tests for people; `document` is what `evaluate_sampling` returned."""
    counts = f"{document['draws']:,} draws a test, {document['states']} hidden states"
    lines = [f"{document['model']}: {counts}, against float32"]
    for row in document["temperatures"]:
        verdict = "REJECTED" if row["rejected"] else "fits"
        lines.append(
            f"T = {row['temperature']:<5g} G-test p = {row['p_value']:.3g} "
            f"({row['degrees_of_freedom']:,} degrees of freedom)  {verdict}"
        )
    row = document["top_p"]
    verdict = "equivalent" if row["equivalent"] else "NOT SHOWN TO BE EQUIVALENT"
    lines.append(
        f"top_p = {row['top_p']:g}  TV < {row['tv_limit']:.4f} (margin {row['margin']}, "
        f"{row['confidence']:.0%}), {row['outside']} draws outside the nucleus  {verdict}"
    )
    return "\n".join(lines)

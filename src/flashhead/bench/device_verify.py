"""Is what a head returns on a device right? Compared with float64 logits of the same weights.

Two logits that float32 cannot tell apart are a tie: what may differ is four times what the eager
float32 product errs. A certified token that is not a winner, a token drawn that is not the argmax
of the perturbed logits, complete logits whose winner is another or that lose more than the index
may lose end the run.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flashhead.bench.head import float64_logits
from flashhead.bench.products import int8_codes

_NOISE_STEPS = 8
"""Steps whose noise is made at a time: 32-bit words in int64 tensors of all rows."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """Logits of n hidden states: `float64[n, V]`, and how far float32 may be off."""

    logits: Tensor
    slack: float

    def of(self, part: slice) -> "Truth":
        """Of some of the hidden states."""
        return Truth(self.logits[part], self.slack)


def truth_of(hidden: Tensor, weight: Tensor) -> Truth:
    """Float64 logits of `bf16[n, d]` hidden states."""
    logits, error = float64_logits(hidden, weight, None)
    return Truth(logits, 4 * error)


def reference_noise(seed: int, steps: Tensor, rows: int) -> Tensor:
    """Gumbel noise as `ops/noise` specifies it, by the eager reference: `float32[n, rows]`.

    On the device of `steps`: its operations round the same everywhere, and a CPU takes minutes.
    """
    from flashhead.ops.noise.api import gumbel

    parts = steps.split(_NOISE_STEPS)
    return torch.cat([gumbel(seed, part, rows, impl="reference") for part in parts])


def collected(outputs: Iterable[Any]) -> dict[str, Tensor]:
    """The fields of several `NextToken`, joined; copied at once: a replay may write over them."""
    names = ("tokens", "certified", "fallback", "candidates", "bytes_read")
    kept = [{name: getattr(output, name).clone() for name in names} for output in outputs]
    return {name: torch.cat([own[name] for own in kept]) for name in names}


def check_tokens(
    name: str,
    tokens: Tensor,
    certified: Tensor,
    truth: Truth,
    noise: Tensor | None = None,
    temperature: float = 0.0,
) -> dict[str, float]:
    """Compare tokens with the argmax of the logits, or of logits + temperature * noise.

    Args:
        name: what the error names.
        tokens: `int64[n]`.
        certified: `bool[n]`.
        truth: of the same n hidden states.
        noise: `float32[n, V]` or None.
        temperature: what the noise is multiplied by.

    Returns:
        `agreement`, with ties as agreement, and `certified_fraction`.

    Raises:
        RuntimeError: a certified token is not a winner, or a token is outside the vocabulary.
    """
    scores, slack = truth.logits, truth.slack
    if noise is not None:
        scores = scores + temperature * noise.to(scores.device).double()
        # float32 rounds the sum of a logit and its noise
        slack += 4 * torch.finfo(torch.float32).eps * scores.abs().max().item()
    outside = (tokens < 0) | (tokens >= scores.shape[1])
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise RuntimeError(f"{name}, hidden state {row}: token {int(tokens[row])} does not exist")
    regret = scores.amax(1) - scores.gather(1, tokens[:, None])[:, 0]
    wrong = certified & (regret > slack)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"{name}, hidden state {row}: certified token {int(tokens[row])} is "
            f"{float(regret[row]):.3g} below the best float64 score, token "
            f"{int(scores[row].argmax())}; {int(wrong.sum())} of {len(tokens)} are wrong"
        )
    return {
        "agreement": (regret <= slack).double().mean().item(),
        "certified_fraction": certified.double().mean().item(),
    }


def check_winners(name: str, logits: Tensor, truth: Truth) -> None:
    """Raise RuntimeError unless the best logit of each row is the winner's, and exact."""
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError(f"{name}: logits hold NaN or infinity")
    chosen = logits.argmax(1, keepdim=True)
    own = truth.logits.gather(1, chosen)[:, 0]
    regret = truth.logits.amax(1) - own
    error = (logits.gather(1, chosen)[:, 0].double() - own).abs()
    wrong = (regret > truth.slack) | (error > truth.slack)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"{name}, hidden state {row}: the best logit is of token {int(chosen[row])}, "
            f"{float(regret[row]):.3g} below the best, its own off by {float(error[row]):.3g}"
        )


def require_kl(name: str, kl: float, most: float) -> None:
    """Raise RuntimeError unless a mean KL is a number and within `most` nats."""
    if not (math.isfinite(kl) and kl <= most):
        raise RuntimeError(f"{name}: KL is {kl:.3g} nats, wanted at most {most:.3g}")


def kl_divergence(truth: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(truth) || softmax(logits)) of each row, nats: float64[n]."""
    wanted = truth.log_softmax(1)
    return (wanted.exp() * (wanted - logits.double().log_softmax(1))).sum(1)


def int8_kl(hidden: Tensor, weight: Tensor, truth: Truth) -> float:
    """Mean KL of an int8 head with one scale a row, its product in float32, nats."""
    codes, scales = int8_codes(weight)
    logits = torch.empty_like(truth.logits, dtype=torch.float32)
    for start in range(0, len(weight), 2**14):
        block = slice(start, start + 2**14)
        rows = codes[block].float() * scales[block, None].float()
        logits[:, block] = hidden.float() @ rows.T
    parts = zip(truth.logits.split(64), logits.split(64), strict=True)
    return torch.cat([kl_divergence(*part) for part in parts]).mean().item()

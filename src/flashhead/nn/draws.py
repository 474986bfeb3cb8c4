"""Many draws for one hidden state: one search, then noise alone.

Every row is known by an upper bound of its logit: its own logit for the rows that were scored
exactly, the finest estimate plus its interval for the others. At each step the largest perturbed
bound wins; where it is that of an exact row, that row is the perturbed argmax of the exact logits
too, certified. Else the row is scored exactly and the step drawn again: the rows that ever win are
few, so the noise is all that most draws cost.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.bound import z_score
from flashhead.index.codes import CodesIndex
from flashhead.nn.candidates import complete
from flashhead.nn.next_token import MARGINS, candidates_of
from flashhead.nn.sampling import allowed, sample
from flashhead.ops.noise.api import draw
from flashhead.ops.refine.api import refine
from flashhead.ops.scan.api import scan
from flashhead.ops.scan.query import make_query
from flashhead.options import Sampling

if TYPE_CHECKING:
    from flashhead.nn.head import FlashHead


def draws(
    head: "FlashHead", hidden: Tensor, steps: Tensor, sampling: Sampling, failure_probability: float
) -> Tensor:
    """Tokens `int64[n]` of the steps `int64[n]`; see `FlashHead.draws`."""
    if sampling.temperature == 0 or sampling.penalises or len(hidden) != 1:
        raise FlashHeadError("draws: wanted one hidden state, a temperature, and no penalties")
    if not head.searches_codes:
        known = complete(head.exact_logits(hidden[0], None))
        left = allowed(known, sampling, failure_probability) if sampling.filters else known
        assert left is not None
        return sample(left, sampling, steps, impl=head.noise_impl)
    if sampling.filters:
        for margin in MARGINS:
            known, _ = candidates_of(
                head, hidden, sampling, margin * sampling.temperature, None, failure_probability
            )
            left = allowed(known, sampling, failure_probability)
            if left is not None:
                return sample(left, sampling, steps, impl=head.noise_impl)
        left = allowed(complete(head.exact_logits(hidden[0], None)), sampling, failure_probability)
        assert left is not None
        return sample(left, sampling, steps, impl=head.noise_impl)
    return _from_bounds(head, hidden, steps, sampling, failure_probability)


def _from_bounds(
    head: "FlashHead", hidden: Tensor, steps: Tensor, sampling: Sampling, failure_probability: float
) -> Tensor:
    bounds = _bounds(head, hidden, failure_probability)
    exact = torch.zeros(len(bounds), dtype=torch.bool)
    tokens = torch.empty(len(steps), dtype=torch.int64)
    open_steps = torch.arange(len(steps))
    while len(open_steps):
        winners, _ = draw(
            bounds, sampling.seed, steps[open_steps], sampling.temperature, impl=head.noise_impl
        )
        final = exact[winners]
        tokens[open_steps[final]] = winners[final]
        open_steps = open_steps[~final]
        rows = winners[~final].unique()
        bounds[rows] = head.exact_logits(hidden[0], rows)
        exact[rows] = True
    return tokens


def _bounds(head: "FlashHead", hidden: Tensor, failure_probability: float) -> Tensor:
    """Upper bounds of all logits from all planes of the codes: float32[V]."""
    index, plan = head.index, head.plan
    assert isinstance(index, CodesIndex)
    query = make_query(hidden, index, plan, failure_probability)
    bias = None if head.bias is None else head.bias.detach().float()[None]
    estimates = scan(query, index, plan, bias, impl=head.impl)[0]
    rows = torch.arange(index.vocab_size)
    for plane in range(1, plan.stages):
        estimates = refine(query, 0, index, plan, plane, rows, estimates, impl=head.impl)
    spread = query.spread[0, -1].double() @ index.scale.double().square() + query.floor[0]
    if failure_probability > 0:  # one comparison a draw, not one a stage
        spread *= (z_score(failure_probability, 1) / z_score(failure_probability, plan.stages)) ** 2
    return (estimates.double() + spread.sqrt()).float()

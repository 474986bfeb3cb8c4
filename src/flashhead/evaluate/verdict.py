"""What to do with a head, from what was measured: convert, little gain, or does not suit.

    does not suit   a sigma is too small beyond chance, for all rows or for the winners
                    (`error_model`), or a certified token was wrong: the certificate would promise
                    what it does not hold;
                    or the search reads as many bytes as the dense head (`MOST_BYTES`)
    little gain     the bytes of a whole token bound the speed-up below `LEAST_SPEEDUP`;
                    or the search does not beat the dense product on this machine
    convert         else

The first that holds decides.
"""

import dataclasses

MOST_BYTES = 1.0
"""Share of the dense head's bytes: from here on the dense product, which reads in order, wins."""
LEAST_SPEEDUP = 1.2
"""Bound on a token, by bytes. `generate` of Gemma 3 270M reached half of what its bytes promise
(1.5x of 2.1x), in a benchmark whose p10 and p90 lie 10 % apart (docs/log.md): what is left of less
than 20 % cannot be told from none."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What decides.

    Args:
        error_findings: what shows that a standard error is too small (`ErrorModel.too_small`).
        certified_wrong: certified tokens that are not the float32 winner.
        bytes_fraction: mean bytes of a search, as a share of the dense head's.
        head_share: the dense head's share of a token's bytes.
        speedup_bound: of a whole token, by bytes.
        crossover_rows: rows up to which the search beat the dense product on this machine.
    """

    error_findings: list[str]
    certified_wrong: int
    bytes_fraction: float
    head_share: float
    speedup_bound: float
    crossover_rows: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The recommendation.

    Args:
        decision: "convert", "little gain" or "does not suit".
        reasons: why, a sentence each.
        then: what FlashHead does in that case.
    """

    decision: str
    reasons: list[str]
    then: str


def judge(evidence: Evidence) -> Verdict:
    """Decide."""
    broken = list(evidence.error_findings)
    if evidence.certified_wrong:
        broken.append(f"{evidence.certified_wrong} certified tokens are not the float32 winner")
    if broken:
        return Verdict("does not suit", [f"error model off: {text}" for text in broken], _BROKEN)
    reads = f"a search reads {evidence.bytes_fraction:.1%} of the dense head's bytes"
    if evidence.bytes_fraction >= MOST_BYTES:
        return Verdict("does not suit", [reads], _dense_runs(evidence.crossover_rows))
    small = (
        f"the head is {evidence.head_share:.1%} of a token's bytes and {reads}: a token is at most "
        f"{evidence.speedup_bound:.2f}x as fast"
    )
    if evidence.speedup_bound < LEAST_SPEEDUP:
        reason = f"{small}, and below {LEAST_SPEEDUP:.1f}x little of it is left to measure"
        return Verdict("little gain", [reason], _runs(evidence.crossover_rows))
    if evidence.crossover_rows == 0:
        reason = f"{small}, but the search does not beat the dense product on this machine"
        return Verdict("little gain", [reason], _runs(0))
    return Verdict("convert", [small], _runs(evidence.crossover_rows))


_BROKEN = (
    'Keep the dense head (head="dense"): the search would run where it is faster, and its '
    "certificates would promise more than this model's estimates keep."
)


def _runs(crossover_rows: int) -> str:
    if crossover_rows == 0:
        return _dense_runs(0)
    return (
        f"Converted, it searches batches of up to {crossover_rows} rows here, scoring what can win "
        "in float32, and takes the dense product beyond: in result never worse than dense."
    )


def _dense_runs(crossover_rows: int) -> str:
    if crossover_rows == 0:
        return (
            "Attached all the same, FlashHead has timed its search as the slower one "
            "(crossover_rows is 0) and runs the dense product: in result never worse than dense."
        )
    return (
        'Keep the dense head (head="dense"): timed here on text of the model\'s own, the search '
        f"was still faster up to {crossover_rows} rows and would run."
    )

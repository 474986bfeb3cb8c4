"""Choose the rows that the next, finer and dearer stage looks at.

A row is chosen for one of two reasons:

- it can win: s_v + z sigma_v >= max_u (s_u - z sigma_u);
- the distribution would notice its error. Leaving row v at an estimate with variance sigma_v^2
  costs about p_v sigma_v^2 / 2 nats of KL(dense||ours) (second order in the error, errors
  independent of each other). Rows are left in ascending order of s_v as long as their summed cost
  stays within `budget`.

The second rule needs neither a sort nor an exponential a row: rows fall into bins of 1/16 nat below
the maximum, and the bins' counts and summed variances give both the normaliser and the cost.
Everything beyond 64 nats is one bin.
"""

from torch import Tensor


def select(
    estimates: Tensor,
    error: Tensor,
    scale: Tensor,
    factors: Tensor,
    z: float,
    budget: float,
    *,
    impl: str,
) -> tuple[Tensor, float]:
    """Choose rows by the two rules above.

    Args:
        estimates: `float32[k]`, k >= 1.
        error: `bfloat16[k]`, coding error norms.
        scale: `bfloat16[k]`, row scales.
        factors: `float32[2]`: sigma_v^2 = factors[0] error_v^2 + factors[1] scale_v^2.
        z: half-width of the interval in standard errors.
        budget: nats of KL that the rows left may cost.
        impl: "cpu" or "reference".

    Returns:
        Positions `int64[m]` ascending, and max(s_v + z sigma_v) of the rows left (-inf if none is).
    """
    if impl == "cpu":
        from flashhead.ops.select import cpu

        return cpu.select(estimates, error, scale, factors, z, budget)
    from flashhead.ops.select import reference

    variances = factors[0] * error.float().square() + factors[1] * scale.float().square()
    return reference.select(estimates, variances, z, budget)

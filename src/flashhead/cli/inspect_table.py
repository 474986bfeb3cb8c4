"""The report of `flashhead inspect --head` for people."""

import math
import textwrap
from typing import Any

WIDTH = 100
HELPFUL_BITS = 0.1
"""Bits a dimension that a shared direction must save to be called a help."""
UNLIKE_NORMS = 2.0
"""Longest rows (p99) over the median, from which norms are called unlike."""


def print_report(found: dict[str, Any]) -> None:
    """Print the document of `inspect_head.report`."""
    _print_vocabulary(found["vocabulary"])
    _print_errors(found["error_model"])
    _print_texts(found)
    _print_recall(found)
    _print_speed(found["speed"])
    verdict = found["verdict"]
    print(f"\n{verdict['decision'].upper()}")
    for sentence in (*verdict["reasons"], verdict["then"]):
        sentence = sentence[0].upper() + sentence[1:]
        print(textwrap.fill(sentence if sentence.endswith(".") else sentence + ".", WIDTH))


def _print_vocabulary(rows: dict[str, Any]) -> None:
    lowest, p1, _, median, _, p99, highest = rows["norms"]
    unlike = median > 0 and p99 / median >= UNLIKE_NORMS
    share, dimension, d = rows["mean_share"], rows["effective_dimension"], rows["dimensions"]
    saved = math.log2(1 / (1 - share)) / 2 if share < 1 else math.inf
    print(
        f"\nrow norms: {lowest:.3g} to {highest:.3g}, p1 {p1:.3g}, median {median:.3g}, "
        f"p99 {p99:.3g}: {'unlike, which hurts' if unlike else 'alike enough'}\n"
        f"zero rows: {rows['zero_rows']:,}; rows that repeat another: "
        f"{rows['duplicate_rows']:,} (harmless)\n"
        f"hidden states: {share:.0%} of their energy lies along the direction kept exactly, which "
        f"saves {saved:.2f} bits a dimension: {'helps' if saved >= HELPFUL_BITS else 'no help'}\n"
        f"spectrum: effective dimension {dimension:.1f} of {d}: "
        + ("helps, few dimensions need many bits" if dimension < d / 2 else "flat, which hurts")
    )


def _print_errors(errors: dict[str, Any]) -> None:
    low, high = errors["std_range"]
    print(
        f"\nerror model: (estimate - float32 logit) / sigma, {errors['positions']:,} positions x "
        f"{errors['rows']:,} rows; wanted std {low} to {high}\n"
        f"{'':<10}{'mean':>17}{'std':>17}{'beyond 3':>19}{'beyond 4':>19}"
        f"{'winner mean':>15}{'rms':>15}{'needed z p99, max':>20}{'lost':>8}"
    )
    gaussian = errors["gaussian_beyond"]
    lost = next(iter(errors["stages"].values()))["expected_lost"]
    print(
        f"{'Gaussian':<10}{'0':>17}{'1':>17}{gaussian['3']:>19.2e}{gaussian['4']:>19.2e}"
        f"{'0':>15}{'1':>15}{'at most ' + format(errors['z'], '.2f'):>20}{lost:>8.1g}"
    )
    for name, stage in errors["stages"].items():
        mean, std = (_with_error(stage[key], ".4f") for key in ("mean", "std"))
        tails = [_with_error(stage["beyond"][key], ".1e") for key in ("3", "4")]
        winner = [_with_error(stage[f"winner_{key}"], ".2f") for key in ("mean", "rms")]
        needed = f"{stage['needed_z']['p99']:.2f}, {stage['needed_z']['max']:.2f}"
        print(
            f"{name:<10}{mean:>17}{std:>17}{tails[0]:>19}{tails[1]:>19}{winner[0]:>15}{winner[1]:>15}"
            f"{needed:>20}{stage['lost']:>8,}"
            + ("  sigma larger than need be" if stage["too_large"] else "")
        )


def _with_error(figure: dict[str, float], spec: str) -> str:
    return f"{figure['value']:{spec}} +-{figure['stderr']:{spec}}"


def _print_texts(found: dict[str, Any]) -> None:
    print(
        f"\n{'text':<10}{'positions':>10}{'candidates mean / p50 / p99':>30}{'agreement':>12}"
        f"{'certified':>11}{'bytes':>8}"
    )
    rows = {**found["texts"], f"all {len(found['pooled'])}": found["whole"]}
    if len(found["pooled"]) == 1:
        rows.popitem()
    for name, row in rows.items():
        counts = " / ".join(f"{row[f'candidates_{part}']:,.0f}" for part in ("mean", "p50", "p99"))
        print(
            f"{name:<10}{row['positions']:>10,}{counts:>30}{row['agreement']:>12.2%}"
            f"{row['certified_fraction']:>11.1%}{row['bytes_fraction']:>8.1%}"
        )


def _print_recall(found: dict[str, Any]) -> None:
    recall = found["recall"]
    depths = "".join(f"{depth:>9,}" for depth in recall["depths"])
    print(f"\n{'winner within the best':<24}{depths}")
    for name, shares in recall["stages"].items():
        print(f"{name:<24}" + "".join(f"{share:>9.2%}" for share in shares))
    if "clusters" in found:
        clusters = found["clusters"]
        needed = ", ".join(
            f"{float(recall):.1%} with P = {probes:,}"
            if probes is not None
            else f"{float(recall):.1%} with too few positions to tell"
            for recall, probes in clusters["probes_for_recall"].items()
        )
        print(
            f"clusters ({clusters['clusters']:,} of {clusters['cluster_size']} tokens): "
            f"recall {needed}"
        )


def _print_speed(speed: dict[str, Any]) -> None:
    measured = speed["head_speedup_measured"]
    print(
        f"\nbytes: a search reads {speed['bytes_fraction']:.1%} of the head, which is "
        f"{speed['head_share']:.1%} of a token: head at most {speed['head_speedup_bound']:.1f}x, "
        f"token at most {speed['token_speedup_bound']:.2f}x\n"
        f"(a head that costs nothing: {speed['token_speedup_free_head']:.2f}x). Measured here, "
        f"batch 1: head {measured['median']:.2f}x "
        f"({measured['p10']:.2f}-{measured['p90']:.2f}); the search pays up to "
        f"{speed['crossover_rows']} rows."
    )

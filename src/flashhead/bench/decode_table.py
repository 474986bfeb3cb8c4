"""The table of `flashhead bench decode`, for people."""

from typing import Any

_OTHERS = {
    "dense": "this body with its dense head",
    "flash": "complete logits",
    "base": "the base",
    "int8": "this body with an int8 head",
}


def format_decode_table(document: dict[str, Any]) -> str:
    """Ratios first, for people; `document` is what `bench_decode` returned."""
    lines = [
        f"{document['model']}, {document['head']}, {document['impl']}: {document['prompts']} "
        f"prompts x {document['new_tokens']} tokens x {document['repeats']}, interleaved",
        f"{'':<10}{'speed-up':>9}{'p10-p90':>13}{'bound':>8}{'head':>7}"
        f"{'agree':>9}{'dense tok/s':>13}{'flash tok/s':>13}",
    ]
    for mode in ("eager", "compiled"):
        result = document[mode]
        if result is None:
            continue
        spread = f"{result['speedup_p10']:.2f}-{result['speedup_p90']:.2f}"
        dense, flash = (result["sides"][side]["tok_per_sec"] for side in ("dense", "flash"))
        lines.append(
            f"{mode:<10}{result['speedup']:>8.2f}x{spread:>13}{result['upper_bound']:>7.2f}x"
            f"{result['head_share']:>7.0%}{result['agreement']:>9.1%}{dense:>13.1f}{flash:>13.1f}"
        )
        lines += _over(result["stacked"], "")
        lines += _over(result["winner"], ", by the winner only")
    return "\n".join(lines)


def _over(ratios: dict[str, float] | None, how: str) -> list[str]:
    """A line for each side that was compared with."""
    return [
        f"{'':<10}{ratios[f'over_{name}']:.2f}x ({ratios[f'over_{name}_p10']:.2f}-"
        f"{ratios[f'over_{name}_p90']:.2f}) {what}{how}"
        for name, what in _OTHERS.items()
        if ratios is not None and f"over_{name}" in ratios
    ]

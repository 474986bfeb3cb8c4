"""The table of `flashhead bench decode --context`, for people."""

from typing import Any


def format_context_table(document: dict[str, Any]) -> str:
    """The points as text."""
    lines = []
    for point in document["points"]:
        lines.append(
            f"context {point['context']:,}, batch {point['batch']}, {document['dtype']} on "
            f"{document['device']}:"
        )
        lines.append(
            f"{'line':<22}{'ms a step':>11}{'p10-p90':>17}{'tok/s':>9}{'cache MB':>10}{'ratio':>8}"
        )
        for name, row in point["lines"].items():
            spread = f"{row['step_ms_p10']:.2f}-{row['step_ms_p90']:.2f}"
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
            lines.append(
                f"{name:<22}{row['step_ms']:>11.2f}{spread:>17}{row['tok_per_sec']:>9.0f}"
                f"{row['cache_bytes'] / 1e6:>10.1f}{ratio:>8}"
            )
        lines += [f"{name:<22}not timed: {why}" for name, why in point["skipped"].items()]
    return "\n".join(lines)

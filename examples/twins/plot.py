"""Loss against tokens, drawn from the document of `train`."""

import json
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.report.drawing import figure_file

LABELS = {"mha": "32-head MHA", "latent": "latent twin"}


def draw(path: Path, svg: Path) -> dict[str, Any]:
    """Held-out curves and the twin's loss over MHA's at equal tokens; what was drawn.

    Raises:
        FlashHeadError: not a document of `train`, or one twin is missing.
    """
    document = json.loads(path.read_text())
    if document.get("benchmark") != "train_twins" or set(document["twins"]) != set(LABELS):
        raise FlashHeadError(f"{path}: wanted a document of `train` with both twins")
    curves = {kind: document["twins"][kind]["held_out"] for kind in LABELS}
    with figure_file(svg, (8.0, 3.2)) as figure:
        left, right = figure.subplots(1, 2)
        for kind, label in LABELS.items():
            own = document["twins"][kind]
            points = [(tokens / 1e6, loss) for tokens, loss in curves[kind] if tokens]
            text = f"{label}, {own['parameters']['all'] / 1e6:.1f}M, {own['cache_bytes']:,} B/token"
            left.plot(*zip(*points, strict=True), label=text)
        left.set(xlabel="million tokens", ylabel="held-out loss, nats", yscale="log")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
        left.legend(frameon=False)
        ratios = [
            (tokens / 1e6, own / base)
            for (tokens, base), (_, own) in zip(curves["mha"], curves["latent"], strict=False)
            if tokens
        ]
        right.plot(*zip(*ratios, strict=True))
        right.axhline(1, color="grey", linewidth=0.8)
        right.axhline(1.01, color="grey", linewidth=0.8, linestyle=":")
        right.set(xlabel="million tokens", ylabel="latent over MHA, held-out loss")
        for panel in (left, right):
            panel.grid(alpha=0.3)
    return {"svg": svg.name, "points": len(ratios), "last_ratio": ratios[-1][1]}

"""Figures written to files, SVG or PNG: whole or not at all, the same figure in the same bytes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flashhead.errors import FlashHeadError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")


@contextlib.contextmanager
def figure_file(path: Path, size: tuple[float, float]) -> Iterator["Figure"]:
    """An empty figure to fill, which is written when the block ends.

    Args:
        path: the file, written over.
        size: in inches.

    Raises:
        FlashHeadError: `path` is named as neither SVG nor PNG.
        ImportError: matplotlib is not installed; the message names the command.
    """
    if path.suffix not in SUFFIXES:
        raise FlashHeadError(f"{path}: wanted a name that ends in .svg or .png")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib is not installed: pip install 'flashhead[plots]'", name="matplotlib"
        ) from error
    with mpl.rc_context({"svg.hashsalt": "flashhead", "font.size": 9, "axes.axisbelow": True}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(partial, dpi=110, metadata=metadata)
        partial.replace(path)

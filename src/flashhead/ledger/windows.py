"""Which layers of a model see a window of the latest tokens only, by family.

Each function takes a config and its number of layers, and returns the layers' types, as
`layer_types` of a config spells them, and the window; None: no layer has one.
"""

from flashhead.errors import FlashHeadError
from flashhead.ledger.fields import Fields, brief

FULL, SLIDING = "full_attention", "sliding_attention"
Windows = tuple[tuple[str, ...], int | None]


def no_window(_fields: Fields, layers: int) -> Windows:
    """Llama: every layer sees all tokens."""
    return (FULL,) * layers, None


def one_window(fields: Fields, layers: int) -> Windows:
    """Mistral: all layers slide, unless the window is null."""
    if "sliding_window" in fields.config and fields.config["sliding_window"] is None:
        return no_window(fields, layers)
    return (SLIDING,) * layers, fields.size("sliding_window")


def switched_window(fields: Fields, layers: int) -> Windows:
    """A mixture: all layers slide, if `use_sliding_window`."""
    if not fields.flag("use_sliding_window"):
        return no_window(fields, layers)
    return one_window(fields, layers)


def late_window(fields: Fields, layers: int) -> Windows:
    """Qwen: if `use_sliding_window`, the layers from `max_window_layers` on slide."""
    types, window = switched_window(fields, layers)
    if window is None:
        return types, None
    start = fields.get("max_window_layers")
    if type(start) is not int or start < 0:
        raise FlashHeadError(f"max_window_layers={brief(start)}: wanted an integer, 0 or more")
    usual = tuple(SLIDING if i >= start else FULL for i in range(layers))
    return _named_types(fields, usual), window


def pattern_window(fields: Fields, layers: int) -> Windows:
    """Gemma 3: every sixth layer sees all, the others slide."""
    step = fields.size("sliding_window_pattern")
    usual = tuple(FULL if (i + 1) % step == 0 else SLIDING for i in range(layers))
    return _named_types(fields, usual), fields.size("sliding_window")


def _named_types(fields: Fields, usual: tuple[str, ...]) -> tuple[str, ...]:
    """The config's `layer_types`, if it has them."""
    types = fields.get("layer_types")
    if types is None:
        return usual
    known = isinstance(types, list | tuple) and all(kind in (FULL, SLIDING) for kind in types)
    if not known or len(types) != len(usual):
        raise FlashHeadError(f"layer_types: wanted {len(usual)} of {FULL!r} or {SLIDING!r}")
    return tuple(types)

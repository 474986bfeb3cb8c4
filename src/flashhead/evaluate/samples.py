"""Short texts in several languages and scripts, to see how an index fares on each.

Written for this project, about 150-300 tokens each for a tokenizer that knows the script. They say
which kinds of text are dear for a model, not how dear: for that, give your own text.
"""

import importlib.resources

NAMES = (
    *("english", "code", "chat", "german", "russian"),
    *("arabic", "hindi", "chinese", "japanese"),
)
"""`chat` is English with emoji."""


def load_samples() -> dict[str, str]:
    """The texts by name, in the order of `NAMES`."""
    folder = importlib.resources.files("flashhead.evaluate") / "sample_texts"
    return {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in NAMES}

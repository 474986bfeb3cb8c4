"""Values of a config.json, checked while they are read: a mistake is one line."""

from typing import Any

from flashhead.errors import FlashHeadError

LARGEST_SIZE = 2**24
"""Of a vocabulary, a hidden state, a layer: beyond it a config is taken for a mistake."""


class Fields:
    """A config and what is taken for what it leaves out.

    `size` and `flag` raise FlashHeadError, which names the field and what was wanted.
    """

    def __init__(self, config: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.config, self.defaults = config, defaults

    def get(self, name: str) -> Any:
        """A value as it is, or its default; None: neither."""
        value = self.config.get(name)
        return self.defaults.get(name) if value is None else value

    def size(self, *names: str, most: int = LARGEST_SIZE) -> int:
        """An integer from 1 on, under the first of these names that is there."""
        for name in names:
            value = self.get(name)
            if value is None:
                continue
            if type(value) is not int or not 1 <= value <= most:
                raise FlashHeadError(f"{name}={brief(value)}: wanted an integer from 1 to {most:,}")
            return value
        raise FlashHeadError(f"the config has no {names[0]}, which the model's shapes need")

    def flag(self, name: str) -> bool:
        """True or false; false where nothing is said."""
        value = self.get(name)
        if value is not None and type(value) is not bool:
            raise FlashHeadError(f"{name}={brief(value)}: wanted true or false")
        return bool(value)


def brief(value: object) -> str:
    """A value of the config for a message, not longer than a line."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."

"""The one exception a user's mistake raises."""


class FlashHeadError(ValueError):
    """A mistake that the user can mend: one line naming the argument, the value got and the fix."""

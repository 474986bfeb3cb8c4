"""Documents that plots are drawn from."""

import json
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FlashHeadError: not there, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlashHeadError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FlashHeadError(f"{path}: not JSON ({error})") from error

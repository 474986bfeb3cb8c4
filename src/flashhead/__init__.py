"""FlashHead: small language models decode faster without changing what they say.

    model = flashhead.load("HuggingFaceTB/SmolLM2-135M-Instruct")  # an ordinary transformers model
    handle = flashhead.attach(model); ...; handle.detach()         # or one that is in memory

Importing this needs torch only and changes nothing.
"""

import importlib
from typing import Any

from flashhead._version import __version__
from flashhead.errors import FlashHeadError
from flashhead.options import ClustersOptions, CodesOptions, Sampling

_LAZY = {
    "Context": "flashhead.nn.next_token",
    "FlashHead": "flashhead.nn.head",
    "HeadOutput": "flashhead.nn.output",
    "LogProbs": "flashhead.nn.output",
    "NextToken": "flashhead.nn.output",
    "attach": "flashhead.integrations.transformers",
    "generate_certified": "flashhead.integrations.greedy",
    "load": "flashhead.integrations.transformers",
    "load_tokenizer": "flashhead.integrations.transformers",
}
__all__ = [
    "ClustersOptions",
    "CodesOptions",
    "FlashHeadError",
    "Sampling",
    "__version__",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'flashhead' has no attribute {name!r}")

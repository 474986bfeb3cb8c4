"""A folder with latent attention, written again in DeepSeek-V3's layout."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from flashhead.convert.checksums import write_checksums
from flashhead.convert.source import copy_licences, fingerprint
from flashhead.convert.workspace import Workspace, told_if_full
from flashhead.errors import FlashHeadError


def write_deepseek(source: str | Path, out: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Write a folder that plain transformers loads as `DeepseekV3ForCausalLM`, with its tokenizer.

    The products of weights are made in float32 and written in the dtype of the source.

    Args:
        source: a folder with decoupled latent attention in every layer.
        out: the folder to make; it must not exist.
        progress: say on stderr what is taken up.

    Returns:
        `out`, `seconds`, and what `integrations.deepseek.to_deepseek` reports.

    Raises:
        FlashHeadError: no such folder, what the layout cannot hold, or `out` cannot be written.
    """
    from flashhead.integrations.deepseek import to_deepseek
    from flashhead.integrations.latent_model import read_section
    from flashhead.integrations.transformers import load_dense, load_tokenizer

    started = time.perf_counter()
    source, out = Path(source), Path(out)
    if read_section(str(source)) is None:
        raise FlashHeadError(f"{source}: DeepSeek layout: wanted a folder with latent attention")
    kept = json.loads((source / "config.json").read_text()).get("dtype", "bfloat16")
    asked = fingerprint(source, {"layout": "deepseek"})
    with told_if_full(out), Workspace(out, asked, progress) as work:
        made, report = to_deepseek(load_dense(str(source), dtype=torch.float32))
        made.to(getattr(torch, kept)).save_pretrained(work.folder)
        load_tokenizer(str(source)).save_pretrained(work.folder)
        copy_licences(source, work.folder)
        write_checksums(work.folder)
        work.publish()
    return {"out": str(out), **report, "seconds": round(time.perf_counter() - started, 1)}

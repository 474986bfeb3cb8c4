"""The model card of a converted folder, `README.md`: written from facts, never from hopes.

What can be read off the folder is read off it (config.json, sizes, `verify.json`). What cannot
(base model, licence, how weights were rounded) is told once, by `facts_of`, and kept in the card's
front matter, so that `read_facts` can write the card anew. Figures appear only if `flashhead verify
--write-card` measured them on this index.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flashhead._version import __version__
from flashhead.convert.card_text import body
from flashhead.convert.checksums import write_whole
from flashhead.convert.files import CARD_FILE, MEASURED_FILE, model_files, read_config
from flashhead.convert.licence import UNKNOWN, License, hub_id_of, label_of, license_of
from flashhead.errors import FlashHeadError

ORIGIN = "flashhead"
"""Key of the front matter that says which card is ours, and keeps what the folder does not say."""


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Args:
        name: of the folder.
        base_model: hub id of the model that was converted, or None.
        base_label: what that model is called in the text.
        license: of the base model.
        config: config.json as it is.
        quantization: `kind`, `bits`, `group_size`, `method`, `calibration`, as far as known; None:
            the body is as it was.
        sizes: `folder_bytes`, `index_bytes`, `head_bytes`.
        measured: what `flashhead verify` wrote, or None.
    """

    name: str
    base_model: str | None
    base_label: str
    license: License
    config: dict[str, Any]
    quantization: dict[str, Any] | None
    sizes: dict[str, int]
    measured: dict[str, Any] | None = None


def facts_of(folder: Path, source: str, report: dict[str, Any], name: str = "") -> CardFacts:
    """Facts of a folder that was just written.

    Args:
        folder: with config.json, weights and index; it may still have a temporary name.
        source: what was converted: embedded name, folder, `.gguf` file or hub id.
        report: what `convert` returns; of its `quantize`, `method` and `calibration` are taken
            where it has them (texts: how weights were rounded, and on what).
        name: of the folder; "": the one it has.
    """
    config = read_config(folder)
    done = report.get("quantize") or {}
    told = {key: done[key] for key in ("method", "calibration") if done.get(key)}
    layout = _quantization(config)
    return CardFacts(
        name=name or folder.resolve().name,
        base_model=hub_id_of(source),
        base_label=label_of(source),
        license=license_of(source),
        config=config,
        quantization=None if layout is None else layout | told,
        sizes=_sizes(folder, config),
        measured=_measured(folder, config),
    )


def read_facts(folder: Path) -> CardFacts:
    """The same from the folder alone; what only its card says is taken from there.

    Raises:
        FlashHeadError: no model, or a damaged card or verify.json.
    """
    config, layout = read_config(folder), _quantization(read_config(folder))
    kept: Any = _front_matter(folder)
    own = kept.get(ORIGIN) or {}
    base = kept.get("base_model")
    told = {key: own[key] for key in ("method", "calibration") if own.get(key)}
    terms = UNKNOWN
    if kept.get("license"):
        found = own.get("license_found_in") or ""
        terms = License(
            kept.get("license"), kept.get("license_name"), kept.get("license_link"), found
        )
    return CardFacts(
        name=folder.resolve().name,
        base_model=base if isinstance(base, str) else None,
        base_label=str(own.get("base") or base or "not known"),
        license=terms,
        config=config,
        quantization=None if layout is None else layout | told,
        sizes=_sizes(folder, config),
        measured=_measured(folder, config),
    )


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Write README.md, checked by huggingface_hub's own reader.

    Args:
        folder: the model's.
        facts: what it says.

    Returns:
        The file.

    Raises:
        FlashHeadError: a README.md is there that this did not write.
    """
    from huggingface_hub import ModelCard

    path = folder / CARD_FILE
    if path.is_file() and not _front_matter(folder).get(ORIGIN):
        raise FlashHeadError(f"{path}: not written by flashhead, nothing is written over: move it")
    data = _card_data(facts)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body(facts)}")
    if card.data.to_dict() != data.to_dict():
        raise AssertionError("the front matter does not read back as it was written")
    return write_whole(path, str(card))


def write_measured(folder: Path, document: dict[str, Any]) -> tuple[Path, Path]:
    """Write `verify.json`, then the card with its figures.

    Args:
        folder: the model's.
        document: what `verify` returned.
    """
    if (folder / CARD_FILE).is_file() and not _front_matter(folder).get(ORIGIN):
        path = folder / CARD_FILE
        raise FlashHeadError(f"{path}: not written by flashhead, nothing is written over: move it")
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    return write_whole(folder / MEASURED_FILE, text), write_card(folder, read_facts(folder))


def _card_data(facts: CardFacts) -> Any:
    from huggingface_hub import ModelCardData

    section = facts.config.get("flashhead") or {}
    layout = facts.quantization or {}
    tags = [ORIGIN, *([f"flashhead-{section['index']}"] if section else [])]
    tags += [str(layout[key]) for key in ("library", "kind") if layout.get(key)]
    own = {"version": __version__, "base": facts.base_label}
    own |= {key: layout[key] for key in ("method", "calibration") if layout.get(key)}
    if facts.license.found_in:
        own["license_found_in"] = facts.license.found_in
    return ModelCardData(
        base_model=facts.base_model,
        base_model_relation="quantized" if layout and facts.base_model else None,
        license=facts.license.id,
        license_name=facts.license.name,
        license_link=facts.license.link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        flashhead=own,
    )


def _front_matter(folder: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data.to_dict()
    except ValueError as error:
        raise FlashHeadError(f"{path}: its front matter is damaged ({error})") from error
    own = data.get(ORIGIN)
    return data | {ORIGIN: own if isinstance(own, dict) else None}


def _quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """Library, kind, bits and group of the body, from `quantization_config`."""
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") == ORIGIN:
        return None
    library = str(section.get("quant_method"))
    groups = section.get("config_groups")
    if library != "compressed-tensors" or not isinstance(groups, dict) or len(groups) != 1:
        found = {"bits": section.get("bits"), "group_size": section.get("group_size")}
        return {"library": library, "kind": None, **found}
    (scheme,) = groups.values()
    weights, acts = scheme.get("weights") or {}, scheme.get("input_activations")
    bits = weights.get("num_bits")
    kind = f"w{bits}a{acts['num_bits']}-int8" if acts else f"w{bits}a16"
    if weights.get("type") == "float":
        kind = f"fp{bits}"
    return {
        "library": library,
        "kind": kind,
        "bits": bits,
        "group_size": weights.get("group_size"),
        "activation_bits": acts["num_bits"] if acts else None,
    }


def _sizes(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    section = config.get("flashhead") or {}
    total = sum((folder / name).stat().st_size for name in model_files(folder).kept)
    width = 4 if section.get("head_dtype") == "float32" else 2
    head = section.get("vocab_size", 0) * section.get("hidden_size", 0) * width
    return {
        "folder_bytes": total,
        "index_bytes": section.get("index_bytes", 0),
        "head_bytes": head,
    }


def _measured(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """verify.json, unless it was measured on another index."""
    path = folder / MEASURED_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FlashHeadError(f"{path}: not JSON ({error})") from error
    section = config.get("flashhead") or {}
    same = isinstance(document, dict) and document.get("index_sha256") == section.get(
        "index_sha256"
    )
    return document if same else None

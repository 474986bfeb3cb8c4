"""`flashhead inspect --config`: ledger and roofline of a config alone, or of all known ones."""

import argparse
import dataclasses
from typing import Any

from flashhead.cli.arguments import write_document
from flashhead.cli.inspect_ledger import ledger_document, print_ledger
from flashhead.ledger.configs import ALL, known_configs, read_architecture
from flashhead.ledger.index import expected_index
from flashhead.ledger.roofline import (
    CLUSTER_TOKENS,
    DEVICES,
    FIT_DEVICE,
    HEADS,
    MEASURED_FRACTION,
    PROBES,
    Device,
    Fit,
    fit_overhead,
    head_bytes_read,
    tok_per_sec,
)
from flashhead.ledger.shapes import WEIGHTS, sized_tensors
from flashhead.ledger.tokens import token_bytes

TITLES = {
    "dense": "dense",
    "published": "clusters",
    "ours_expected": "codes",
    "ours_measured": f"at {MEASURED_FRACTION:.0%}",
}


def report_config(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return the document; `--out` keeps it with what it was made on."""
    fit = fit_overhead()
    if args.config == ALL:
        weights = (args.quantize,) if args.quantize else WEIGHTS
        models = [
            _describe(name, kind, args.context, fit) for name in known_configs() for kind in weights
        ]
        document: dict[str, Any] = {"context": args.context, "models": models}
        _print_all(document)
        _print_fit(fit)
    else:
        document = _describe(args.config, args.quantize or "bf16", args.context, fit)
        _print_one(document)
    _print_legend(fit)
    document |= {"devices": [dataclasses.asdict(device) for device in DEVICES]}
    document |= {"fit": fit.document()}
    if args.out:
        from flashhead.environment import provenance

        document |= provenance()
        write_document(args.out, document)
    return document


def _describe(source: str, weights: str, context: int, fit: Fit) -> dict[str, Any]:
    """Ledger and roofline of one config with one kind of weights."""
    architecture = read_architecture(source)
    tensors = sized_tensors(architecture, weights)
    book = token_bytes(dataclasses.asdict(architecture), tensors, context)
    stored = sum(info.size_bytes for info in tensors.values()) + book.kv_bytes
    return {
        **ledger_document(source, book, expected_index(book)),
        "weights": weights,
        "weights_and_cache_bytes": stored,
        "head_bytes_read": head_bytes_read(book),
        "roofline": {
            device.name: {
                "overhead_ms": _overhead_ms(device, fit),
                "fits_in_memory": stored <= device.memory_bytes,
                "tok_per_sec": tok_per_sec(book, device, _overhead_ms(device, fit)),
            }
            for device in DEVICES
        },
    }


def _overhead_ms(device: Device, fit: Fit) -> float:
    return fit.overhead_ms if device.name == FIT_DEVICE else 0.0


def _print_one(document: dict[str, Any]) -> None:
    print_ledger(document)
    print(f"\n{'tokens/s at batch 1, ' + document['weights']:<44}{_titles()}")
    for device in DEVICES:
        roof = document["roofline"][device.name]
        print(f"{_device(device, roof['overhead_ms']):<44}{_rates(roof)}")


def _print_all(document: dict[str, Any]) -> None:
    print(f"bytes read for a token at {document['context']:,} tokens of context, MB")
    parts = ("head", "kv", "body", "total")
    print(
        f"\n{'model':<18}{'weights':<9}" + "".join(f"{part:>10}" for part in parts) + "  head share"
    )
    for model in document["models"]:
        amounts = "".join(f"{model['bytes_per_token'][part] / 1e6:>10,.1f}" for part in parts)
        print(f"{_label(model)}{amounts}{model['share']['head']:>12.1%}")
    for device in DEVICES:
        roofs = [model["roofline"][device.name] for model in document["models"]]
        print(f"\n{_device(device, roofs[0]['overhead_ms'])}, tokens/s at batch 1")
        print(f"{'model':<18}{'weights':<9}{_titles()}")
        for model, roof in zip(document["models"], roofs, strict=True):
            print(f"{_label(model)}{_rates(roof)}")


def _label(model: dict[str, Any]) -> str:
    return f"{model['model']:<18}{model['weights']:<9}"


def _device(device: Device, overhead_ms: float) -> str:
    extra = f", + {overhead_ms:.2f} ms a token" if overhead_ms else ", at most"
    return f"{device.name} ({device.bandwidth_bytes_per_s / 1e9:,g} GB/s{extra})"


def _titles() -> str:
    return "".join(f"{TITLES[head]:>10}" for head in HEADS)


def _rates(roof: dict[str, Any]) -> str:
    rates = "".join(f"{roof['tok_per_sec'][head]:>10,.0f}" for head in HEADS)
    return rates if roof["fits_in_memory"] else rates + " *"


def _print_fit(fit: Fit) -> None:
    print("\nLlama-3.2-1B on the RTX 3500 Ada, published and predicted tokens/s")
    for figure in fit.document()["figures"]:
        name = f"{figure['weights']} {TITLES[figure['head']]}"
        print(
            f"{name:<18}{figure['published_tok_per_sec']:>6.0f}"
            f"{figure['predicted_tok_per_sec']:>8.0f}{figure['error']:>9.1%}"
        )


def _print_legend(fit: Fit) -> None:
    share = TITLES["ours_measured"]
    print(
        f"\nclusters: the published method, V/{CLUSTER_TOKENS} centroids and {PROBES} clusters of "
        f"{CLUSTER_TOKENS} tokens; certifies nothing.\n"
        "codes: FlashHead's index at its expected bytes, before the rows that may win.\n"
        f"{share}: of the head's bytes, which a certified token reads, those rows included, on\n"
        "four models of 135M to 1.5B (9.0-9.9 %).\n"
        f"{fit.overhead_ms:.2f} ms are fitted to four published figures of Llama-3.2-1B on the "
        f"{FIT_DEVICE}; they do\n"
        "not transfer, so other devices have none and their rates are upper bounds. On an H100\n"
        "small models are bound by launches and the host, far below.\n"
        "*: weights and cache exceed the device's memory."
    )

"""`flashhead inspect --head`: does the vocabulary of a model cluster? Before anything is converted.

The index is built in memory as `load` does, or read from a converted folder.
"""

import argparse
import dataclasses
import sys
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.ledger.tokens import Ledger

ROUNDS = 20
"""Interleaved timings of the search and the dense product, a hidden state each."""


def report(
    args: argparse.Namespace, source: str, config: dict[str, Any], book: Ledger
) -> dict[str, Any]:
    """Build the index, measure, print, and return the JSON-able document.

    Raises:
        FlashHeadError: the folder holds a clusters index, or the text is too short.
    """
    _require_codes(args.model, config)
    from flashhead.environment import provenance
    from flashhead.evaluate import inspection
    from flashhead.evaluate.text import WINDOW_TOKENS
    from flashhead.integrations import transformers

    tokenizer = transformers.load_tokenizer(source)
    longest = config.get("text_config", config).get("max_position_embeddings") or WINDOW_TOKENS
    windows = inspection.text_windows(
        tokenizer, args.data, args.positions, min(WINDOW_TOKENS, longest)
    )
    print(f"loading {args.model}, building its index ...", file=sys.stderr, flush=True)
    model = transformers.load(source)
    head = transformers.head_of(model)
    postprocess = transformers.logit_postprocess(model.config)
    states = inspection.text_states(model, windows, tokenizer.bos_token_id, postprocess)
    inspected = inspection.inspect_head(head, states, progress=True)
    found = inspected.document()
    if args.clusters:
        found["clusters"] = _clusters(model, head, [states[name] for name in inspected.pooled])
    assert head.index is not None
    found |= {
        "data": None if args.data is None else str(args.data),
        "options": dataclasses.asdict(head.index.options),
        "calibration_tokens": head.index.calibration_tokens,
        "impl": head.impl,
        "speed": _speed(head, states, inspected.whole.bytes_fraction, book),
    }
    found["verdict"] = _verdict(inspected, found["speed"])
    from flashhead.cli.inspect_table import print_report

    print_report(found)
    return found | provenance()


def _require_codes(model: str, config: dict[str, Any]) -> None:
    section = config.get("flashhead")
    if isinstance(section, dict) and section.get("index") != "codes":
        raise FlashHeadError(
            f"{model} holds a {section.get('index')} index: wanted a codes index, "
            "or the model it was converted from"
        )


def _clusters(model: Any, head: Any, states: list[Any]) -> dict[str, Any]:
    """Build a clusters index as `convert --head clusters` does, and what recall costs with it."""
    import torch

    from flashhead.evaluate.recall import cluster_ranks, clusters_document
    from flashhead.index.build_clusters import build_clusters
    from flashhead.integrations.calibration import sample_hidden_states
    from flashhead.options import ClustersOptions

    options = ClustersOptions()
    sampled = sample_hidden_states(model, options.calibration_tokens, options.seed, progress=True)
    index = build_clusters(head.weight, options, sampled, True, head.bias)
    ranks = cluster_ranks(index, head.weight, head.bias, torch.cat(states), impl=head.impl)
    return clusters_document(index, ranks)


def _speed(head: Any, states: dict[str, Any], fraction: float, book: Ledger) -> dict[str, Any]:
    """Bounds by bytes, and the head alone timed on hidden states of the texts."""
    import torch

    from flashhead.bench.timing import interleave

    rows = torch.cat(list(states.values()))
    rows = rows[:: max(1, len(rows) // ROUNDS)].to(head.weight.dtype)
    with torch.inference_mode():
        timed = interleave(
            {
                "dense": lambda number: head.dense(rows[number % len(rows), None]),
                "search": lambda number: head.search(rows[number % len(rows), None]),
            },
            "dense",
            rounds=ROUNDS,
        )["search"]
    return {
        "bytes_fraction": fraction,
        "head_share": book.head_bytes / book.total_bytes,
        "head_speedup_bound": 1 / fraction,
        "token_speedup_bound": book.speedup_bound(fraction),
        "token_speedup_free_head": book.speedup_bound(0.0),
        "head_speedup_measured": {
            "median": timed["ratio"],
            "p10": timed["ratio_p10"],
            "p90": timed["ratio_p90"],
        },
        "crossover_rows": head.crossover_rows,
    }


def _verdict(inspected: Any, speed: dict[str, Any]) -> dict[str, Any]:
    from flashhead.evaluate.verdict import Evidence, judge

    evidence = Evidence(
        error_findings=inspected.errors.too_small,
        certified_wrong=sum(row.certified_wrong for row in inspected.texts.values()),
        bytes_fraction=speed["bytes_fraction"],
        head_share=speed["head_share"],
        speedup_bound=speed["token_speedup_bound"],
        crossover_rows=speed["crossover_rows"],
    )
    return dataclasses.asdict(judge(evidence))

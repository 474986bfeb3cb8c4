"""The ledger of one model, as a document and for people."""

from typing import Any

from flashhead.ledger.tokens import Ledger


def ledger_document(model: str, book: Ledger, index: dict[str, Any]) -> dict[str, Any]:
    """JSON-able: shape of the head, bytes that a token reads, their shares, what an index saves.

    Args:
        model: what the user called it.
        book: its ledger.
        index: of `describe_index`.
    """
    parts = {"head": book.head_bytes, "kv": book.kv_bytes, "body": book.body_bytes}
    return {
        "model": model,
        "context": book.context,
        "vocab_size": book.vocab_size,
        "hidden_size": book.hidden_size,
        "tied": book.tied,
        "bytes_per_token": {**parts, "total": book.total_bytes},
        "share": {name: part / book.total_bytes for name, part in parts.items()},
        "index": index,
        "speedup_bound": book.speedup_bound(index["bytes_fraction"]),
    }


def print_ledger(document: dict[str, Any]) -> None:
    """Print it for people."""
    tied = "tied to the input embedding" if document["tied"] else "untied"
    print(
        f"{document['model']}: head {document['vocab_size']:,} x {document['hidden_size']:,}, "
        f"{tied}"
    )
    print(f"\n{'bytes read for a token':<30}{'MB':>10}{'share':>9}")
    names = {
        "head": "head (output embedding)",
        "kv": f"KV cache at {document['context']:,} tokens",
        "body": "body weights",
    }
    for key, name in names.items():
        amount, share = document["bytes_per_token"][key], document["share"][key]
        print(f"{name:<30}{amount / 1e6:>10.1f}{share:>9.1%}")
    print(f"{'total':<30}{document['bytes_per_token']['total'] / 1e6:>10.1f}")
    _print_index(document)


def _print_index(document: dict[str, Any]) -> None:
    index = document["index"]
    head, read = document["bytes_per_token"]["head"], index["bytes_per_query"]
    what = (
        "index in this folder"
        if index["measured"]
        else f"expected at {index['bits']} bits a dimension"
    )
    more = ", and the rows that may win on top" if index["kind"] == "codes" else ""
    print(
        f"\nFlashHead, {index['kind']} ({what}): reads {read / 1e6:.1f} MB of the head's "
        f"{head / 1e6:.1f} MB ({index['bytes_fraction']:.1%}){more}.\n"
        f"Where bytes decide, a token is at most {document['speedup_bound']:.2f}x as fast."
    )
    if not index["measured"]:
        if "weights" not in document:  # there is a folder
            print("No index in this folder: flashhead convert MODEL OUT writes one.")
        return
    _print_stored_twice(document)
    parameters = index["section"]["parameters"]
    options = ", ".join(f"{name} {value}" for name, value in parameters["options"].items())
    print(
        f"Index file: {index['file_bytes'] / 1e6:.1f} MB, format "
        f"{index['section']['format_version']}, shaped by {parameters['calibration_tokens']:,} "
        f"hidden states; {options}."
    )


def _print_stored_twice(document: dict[str, Any]) -> None:
    """The head is in the folder as rows and as an index: why."""
    index, head = document["index"], document["bytes_per_token"]["head"]
    tied = "; they are the input embedding too" if document["tied"] else ""
    print(
        f"Stored twice: the head, and nothing of the body. Its exact rows ({head / 1e6:.1f} MB, "
        f"{index['section']['head_dtype']}) stay because winners are scored with them{tied}. The "
        f"index ({index['file_bytes'] / 1e6:.1f} MB) holds the same rows again, as "
        f"{index['kind']}, because that is what a token reads to find the winners."
    )

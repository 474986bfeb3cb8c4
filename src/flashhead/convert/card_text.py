"""The text of a model card, section by section."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashhead.convert.card import CardFacts

INDEX_TEXT = {
    "codes": (
        "Next to the output embedding lies an index of its rows: short codes and their known "
        "errors ({bits:g} bits a dimension, {planes} plane{s} of 2 more bits for rows that "
        "survive). A query reads the codes of all tokens, and the rows of those alone that can "
        "still win. Those are scored exactly, and the answer is certified against a failure "
        "probability of {failure_probability:g}."
    ),
    "clusters": (
        "Next to the output embedding lies an index of its rows in clusters of {cluster_size}: a "
        "query scores the rows of its {probes} best clusters exactly. It certifies nothing."
    ),
}
LIMITS = (
    "Without the package `flashhead`, transformers loads this folder as an ordinary model with a "
    "dense head.",
    "The base model's own limits, biases and terms of use apply unchanged.",
)
PACKED_LIMIT = (
    "transformers unpacks the packed weights to bf16 when it loads them; vLLM decodes from them "
    "as they are."
)


def body(facts: "CardFacts") -> str:
    """Everything behind the front matter."""
    sections = (
        ("", _intro(facts)),
        ("What was done", _done(facts)),
        ("What is stored twice", _twice(facts)),
        ("Measured", _measured(facts)),
        ("Run it", _run(facts)),
        ("Limits", _limits(facts)),
    )
    written = [
        f"# {facts.name}\n\n{text}" if not title else f"## {title}\n\n{text}"
        for title, text in sections
        if text
    ]
    return "\n\n".join(written) + "\n"


def _intro(facts: "CardFacts") -> str:
    base = facts.base_label
    if facts.base_model is not None:
        base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    found = facts.license
    text = found.name or found.id
    text = f"[{text}]({found.link})" if found.link else text
    where = "no file of the base model names one" if found.id == "unknown" else "as the base model"
    return f"Base model: {base}.\n\nLicence: {text} ({where})."


def _done(facts: "CardFacts") -> str:
    section, lines = facts.config.get("flashhead") or {}, []
    if section:
        options = section["parameters"]["options"]
        plural = "" if options.get("planes") == 1 else "s"
        text = INDEX_TEXT[section["index"]].format(**options, s=plural)
        lines.append(f"**Head.** {text} The rows themselves are unchanged.")
    else:
        lines.append("**Head.** Dense, without an index.")
    lines.append(f"**Body.** {_body_text(facts.quantization)}")
    return "\n\n".join(lines)


def _body_text(layout: dict[str, Any] | None) -> str:
    if layout is None:
        return "Unchanged."
    if layout["library"] != "compressed-tensors" or layout["kind"] is None:
        return (
            f"The checkpoint was quantized before ({layout['library']}); its files are unchanged."
        )
    group = layout.get("group_size")
    scale = f"a scale for {group} weights" if group and group > 0 else "a scale a row"
    acts = layout.get("activation_bits")
    activations = f"{acts}-bit, rounded as they come" if acts else "16-bit"
    text = (
        f"Linear layers in {layout['kind'].upper()}: {layout['bits']}-bit weights, {scale}; "
        f"activations {activations}; layout of compressed-tensors. Embeddings, norms and the "
        "output embedding stay as they were."
    )
    if layout.get("method"):
        text += f" Method: {layout['method']}."
    if layout.get("calibration"):
        text += f" Calibration text: {layout['calibration']}."
    return text


def _twice(facts: "CardFacts") -> str:
    sizes, section = facts.sizes, facts.config.get("flashhead") or {}
    if not section:
        return ""
    tied = " (also the input embedding)" if facts.config.get("tie_word_embeddings") else ""
    share = sizes["index_bytes"] / max(1, sizes["head_bytes"])
    return (
        f"The head's {section['vocab_size']:,} rows are in the weights, "
        f"{sizes['head_bytes'] / 1e6:,.1f} MB{tied}, and again as the index, "
        f"{sizes['index_bytes'] / 1e6:,.1f} MB ({share:.0%} of them): the index finds the few rows "
        "that can win, and these are then scored in full precision, so both are needed. Nothing of "
        f"the body is stored twice. The folder has {sizes['folder_bytes'] / 1e6:,.1f} MB."
    )


def _measured(facts: "CardFacts") -> str:
    document = facts.measured
    if document is None:
        return (
            "Not measured yet: `flashhead verify FOLDER --against BASE --write-card` measures "
            "and writes this section."
        )
    rows = [*_fidelity(document), *_against(document), *_speed(document)]
    table = ["| what | figure |", "| --- | --- |", *(f"| {what} | {how} |" for what, how in rows)]
    hardware, versions = document["hardware"], document["versions"]
    machine = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    note = (
        f"By `flashhead verify` (flashhead {versions['flashhead'] or 'from source'}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}) on {machine}; the whole "
        "document is `verify.json`."
    )
    return "\n".join(table) + "\n\n" + note


def _fidelity(document: dict[str, Any]) -> list[tuple[str, str]]:
    figures = document.get("positions")
    if not figures:
        return []
    where = f"{figures['positions']:,} positions of {figures['text']}"
    return [
        (
            f"next token is the float32 head's, {where}",
            f"{figures['certified_agreement']:.2%}, {figures['certified_wrong']} certified wrong, "
            f"{figures['certified_bytes_fraction']:.1%} of the head's bytes",
        ),
        (
            "complete logits: argmax agrees, KL",
            f"{figures['agreement']:.2%}, {figures['kl']:.1e} nats, "
            f"{figures['bytes_fraction']:.1%} of the head's bytes",
        ),
    ]


def _against(document: dict[str, Any]) -> list[tuple[str, str]]:
    figures = document.get("against")
    if not figures:
        return []
    return [
        (
            f"against the base model, both with dense heads, {figures['positions']:,} positions",
            f"argmax agrees {figures['agreement']:.1%}, KL {figures['kl']:.1e} nats, perplexity "
            f"{figures['perplexity']:.2f} (base: {figures['base_perplexity']:.2f})",
        )
    ]


def _speed(document: dict[str, Any]) -> list[tuple[str, str]]:
    figures = document.get("speed")
    if not figures:
        return []
    low, high = figures["speedup_p10"], figures["speedup_p90"]
    return [
        (
            "transformers' `generate`, batch 1, this head over the dense head, interleaved",
            f"{figures['speedup']:.2f}x ({low:.2f}-{high:.2f})",
        )
    ]


def _run(facts: "CardFacts") -> str:
    extras = "transformers,cpu,quantize" if facts.quantization else "transformers,cpu"
    return f"""With transformers (`pip install 'flashhead[{extras}]'`):

```python
import flashhead

model = flashhead.load("{facts.name}")  # this folder, or owner/name on the hub
tokenizer = flashhead.load_tokenizer("{facts.name}")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

With vLLM (`pip install 'flashhead[vllm]'`):

```
vllm serve {facts.name}
```

`flashhead chat {facts.name}` talks to it, `flashhead verify {facts.name}` checks it."""


def _limits(facts: "CardFacts") -> str:
    limits = [*LIMITS, *([PACKED_LIMIT] if facts.quantization else [])]
    return "\n".join(f"- {limit}" for limit in limits)

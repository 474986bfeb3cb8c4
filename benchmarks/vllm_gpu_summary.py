"""What the engines of `vllm_gpu_step.py` say together: savings, divergences, errors, the table."""

import math
from typing import Any

ULPS = 2.0
"""Steps of bfloat16 within which two logits of a bf16 head tie."""
TARGET = 0.8
PLAIN = "dense"
SEARCHED = "flashhead"


def add_summary(shape: dict[str, Any]) -> None:
    """Fill `summary` and `errors` of a shape from its engines, those that have ended."""
    engines, rows, errors = shape["engines"], [], []
    for kind, engine in engines.items():
        errors += [f"{kind}: {text}" for text in _engine_errors(kind, engine, shape["crossover"])]
    plain, searched = engines.get(PLAIN, {}), engines.get(SEARCHED, {})
    for batch, found in searched.get("batches", {}).items():
        if batch in plain.get("batches", {}):
            row, wrong = _compared(plain["batches"][batch], found)
            default = engines.get("default", {}).get("batches", {}).get(batch)
            rows.append({"batch": int(batch), **row, **_default(default, found)})
            errors += [f"batch {batch}: {text}" for text in wrong]
    shape["summary"] = rows
    shape["errors"] = errors
    if "memory" in plain and "memory" in searched:
        shape["memory_added"] = {
            name: searched["memory"][name] - plain["memory"][name] for name in searched["memory"]
        }


def _engine_errors(kind: str, engine: dict[str, Any], crossover: int | None) -> list[str]:
    errors = [engine["failed"]] if "failed" in engine else []
    errors += [
        f"{head['layer']} is served by {head.get('impl', 'the dense product')}"
        for head in engine.get("statistics", [])
        if engine["memory"] and head.get("impl") != "triton"
    ]
    for batch, found in engine.get("batches", {}).items():
        exact, rows = found["exact"], found.get("rows")
        # the other model runner may order a batch otherwise than its requests
        if kind != "default" and exact is not None and exact["beyond_rounding"]:
            errors.append(
                f"batch {batch}: {exact['beyond_rounding']} of {exact['tokens']} tokens are not "
                f"the float32 head's but for rounding (gap up to {exact['largest_gap']:.4g})"
            )
        if kind == SEARCHED and exact is None:
            errors.append(f"batch {batch}: tokens not compared: {found['exact_note']}")
        if kind != SEARCHED or rows is None:
            continue
        limit = engine["crossover"]["token"] if crossover is None else crossover
        if limit >= int(batch) and (rows["dense_rows"] or rows["searched_rows"] < rows["expected"]):
            errors.append(f"batch {batch}: not every row was searched: {rows}")
    return errors


def _compared(plain: dict[str, Any], found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A row of the summary, and errors."""
    parted, errors = divergences(plain, found)
    row: dict[str, Any] = {
        "path": path_of(found.get("rows")),
        "dense_ms_per_token": plain["ms_per_token"],
        "flashhead_ms_per_token": found["ms_per_token"],
        "ms_ratio": plain["ms_per_token"]["median"] / found["ms_per_token"]["median"],
        "distinct_tokens": found["distinct_tokens"],
        "divergences": parted,
    }
    if "profile" not in plain or "profile" not in found:
        return row, errors
    for name, engine in (("dense", plain), ("flashhead", found)):
        for part in ("step", "head", "sampler"):
            times = engine["profile"].get(f"{part}_union_us")
            row[f"{name}_{part}_us"] = times["median"] if times else None
    saved = row["dense_step_us"] - row["flashhead_step_us"]
    cheaper = row["dense_head_us"] - row["flashhead_head_us"]
    row |= {"saved_us": saved, "head_saved_us": cheaper, "step_ratio": None}
    row["step_ratio"] = row["dense_step_us"] / row["flashhead_step_us"]
    row["saved_share"] = row["meets_target"] = None
    if row["path"] != "dense":  # where all is dense nothing can be saved
        row["saved_share"] = saved / cheaper if cheaper > 0 else None
        row["meets_target"] = cheaper > 0 and saved / cheaper >= TARGET
    return row, errors


def path_of(rows: dict[str, int] | None) -> str:
    """How a batch's rows were served."""
    if rows is None:
        return "unknown"
    if not rows["dense_rows"]:
        return "searched"
    return "mixed" if rows["searched_rows"] else "dense"


def _default(default: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """The dense head on vLLM's own choice of model runner."""
    if default is None:
        return {}
    ratio = default["ms_per_token"]["median"] / found["ms_per_token"]["median"]
    row: dict[str, Any] = {"default_ms_per_token": default["ms_per_token"], "default_ratio": ratio}
    for part in ("step", "head", "sampler"):
        times = default.get("profile", {}).get(f"{part}_union_us")
        row[f"default_{part}_us"] = times["median"] if times else None
    return row


def divergences(plain: dict[str, Any], found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Where FlashHead's texts first part from the dense head's: counts, gaps, and errors.

    At that token both engines have read the same tokens. It is a tie if the dense engine's token
    is, on the dense engine's own hidden state, at most two steps of bfloat16 below the float32
    winner, and FlashHead's token is that winner.
    """
    answers, gaps, errors, others = plain.get("answers"), [], [], 0
    prompts = len(plain["texts"])
    for number, (left, right) in enumerate(zip(plain["texts"], found["texts"], strict=True)):
        step = next(
            (i for i, pair in enumerate(zip(left, right, strict=True)) if len({*pair}) > 1), None
        )
        if step is None:
            continue
        if answers is None:
            gaps.append(None)
            continue
        gap, top = answers["gaps"][number][step], answers["tops"][number][step]
        winner = answers["winners"][number][step]
        gaps.append(round(gap, 5))
        close = gap <= ULPS * bf16_step(top)
        if winner != right[step]:
            others += 1  # the engines' hidden states differ, or a tie of three
        if not close:
            errors.append(f"prompt {number} parts at token {step} by {gap:.4g}, logit {top:.4g}")
    told = {"prompts": prompts, "parted": len(gaps), "gaps": gaps, "not_the_winner": others}
    if answers is None and gaps:
        told["note"] = "counted only: hidden states of the dense engine could not be told apart"
    return told, errors


def bf16_step(logit: float) -> float:
    """Distance of bfloat16 numbers at a logit."""
    return float(2.0 ** (math.floor(math.log2(max(abs(logit), 1e-6))) - 7))


def without_texts(engine: dict[str, Any]) -> dict[str, Any]:
    """An engine's part of the document without tokens and their logits."""
    batches = {
        batch: {name: value for name, value in found.items() if name not in ("texts", "answers")}
        for batch, found in engine.get("batches", {}).items()
    }
    return engine | ({"batches": batches} if batches else {})


def table(document: dict[str, Any]) -> str:
    """The summary as text."""
    lines = [
        f"{'shape':20s} {'b':>3s} {'step us: dense':>14s} {'flash':>8s} {'saved':>7s} "
        f"{'head: dense':>11s} {'flash':>7s} {'share':>6s} {'ms/tok: default':>15s} {'dense':>7s} "
        f"{'flash':>7s} {'ratio':>6s} {'parted':>7s} {'path':>8s}"
    ]
    for name, shape in document["shapes"].items():
        for row in shape.get("summary", []):
            parted = row["divergences"]
            default = row.get("default_ms_per_token", {}).get("median")
            lines.append(
                f"{name:20s} {row['batch']:3d} {_cell(row.get('dense_step_us'), 14, 1)} "
                f"{_cell(row.get('flashhead_step_us'), 8, 1)} {_cell(row.get('saved_us'), 7, 1)} "
                f"{_cell(row.get('dense_head_us'), 11, 1)} "
                f"{_cell(row.get('flashhead_head_us'), 7, 1)} "
                f"{_cell(row.get('saved_share'), 6, 2)} {_cell(default, 15, 3)} "
                f"{_cell(row['dense_ms_per_token']['median'], 7, 3)} "
                f"{_cell(row['flashhead_ms_per_token']['median'], 7, 3)} "
                f"{_cell(row['ms_ratio'], 5, 2)}x {parted['parted']:3d}/{parted['prompts']:<3d} "
                f"{row.get('path', 'searched'):>8s}"
            )
        lines += [f"{name}: ERROR: {text}" for text in shape.get("errors", [])]
    return "\n".join(lines)


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.{digits}f}"

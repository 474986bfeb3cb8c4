"""The table of a benchmark on a device, for people."""

from typing import Any


def format_device_table(document: dict[str, Any]) -> str:
    """Times and ratios of `bench_device`'s document."""
    hardware, made_up = document["hardware"], document["rows_are"] == "synthetic"
    lines = [
        f"{document['name']}, head {document['vocab_size']:,} x {document['hidden_size']:,}, "
        f"{document['rows_are']} rows and hidden states; {hardware.get('gpu')}, "
        f"copy {document['copy_gb_per_sec']:,.0f} GB/s",
        *_index_lines(document),
        f"verified on {document['verified_states']} hidden states; microseconds a call in a CUDA "
        f"graph, {document['repeats']} replays interleaved, copies of the weights in turn",
        f"{'batch':>5}  {'method':<42}{'us':>8}{'p10-p90':>15}{'x dense':>9}{'python us':>11}"
        f"{'host us':>9}{'MB read':>9}{'floor us':>10}{'of floor':>10}{'agree':>9}{'KL':>9}",
    ]
    lines += [_line(row) for row in document["rows"]]
    lines += [
        f"left out at batch {own['batch']}: {own['method']}: {reason}"
        for own in document["left_out"]
        for reason in own["reasons"]
    ]
    if made_up:
        lines.append("synthetic rows: times and bytes count, agreement with a text does not")
    clusters = document["clusters"]
    if clusters is not None and not clusters["agreement_means_something"]:
        lines.append(
            "clusters: rows were assigned at random, so their agreement is meaningless "
            "(their time is not)"
        )
    return "\n".join(lines)


def _index_lines(document: dict[str, Any]) -> list[str]:
    codes, clusters = document["codes"], document["clusters"]
    lines = []
    if codes is not None:
        lines.append(
            f"codes: {codes['bits']:g} bits, {codes['planes']} planes, scan "
            f"{codes['scan_bytes'] / 1e6:.1f} MB, KL budget {codes['kl_budget']:.1e} "
            f"(int8 here: {document['int8_kl']:.1e}), built in {codes['build_seconds']:.1f} s"
        )
    if clusters is not None:
        lines.append(
            f"clusters: {clusters['assignment']}, built in {clusters['build_seconds']:.1f} s"
        )
    return lines


def _line(row: dict[str, Any]) -> str:
    name = row["method"] + (" (dense)" if row["dense"] and _searches(row["method"]) else "")
    spread = f"{row['p10_us']:.1f}-{row['p90_us']:.1f}"
    read, floor, share = (row.get(key) for key in ("bytes_read", "floor_us", "floor_fraction"))
    agreement, kl = row.get("agreement"), row.get("kl")
    return (
        f"{row['batch']:>5}  {name:<42}{row['median_us']:>8.1f}{spread:>15}{row['ratio']:>8.2f}x"
        f"{row['python_us']:>11.1f}{row['host_us']:>9.1f}"
        f"{'-' if read is None else f'{read / 1e6:.1f}':>9}"
        f"{'-' if floor is None else f'{floor:.1f}':>10}"
        f"{'-' if share is None else f'{share:.0%}':>10}"
        f"{'-' if agreement is None else f'{agreement:.2%}':>9}"
        f"{'-' if kl is None else f'{kl:.1e}':>9}"
    )


def _searches(method: str) -> bool:
    return method.startswith(("FlashHead", "clusters"))

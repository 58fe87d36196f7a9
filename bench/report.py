"""Tables and plots from results: `python -m bench.report results.json [other.json] [--rows REGEX] [--plot PNG]`.

Prints Markdown. One file: its table. Two files of one kind: their rows side by side, and the second's time over the
first's. Knows the JSON of bench_ops (pytest-benchmark), and of the benchmarks that compare
two things in turns.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--plot", type=Path, help="write a picture of the first file's rows here")
    parser.add_argument("--rows", metavar="REGEX", default="", help="only the rows in whose name this is found")
    options = parser.parse_args(arguments)
    first = load(options.results, options.rows)
    if options.other is None:
        print(tables(first))
    else:
        second = load(options.other, options.rows)
        if first["kind"] != second["kind"]:
            parser.error(f"expected two results of one kind, got {first['kind']} and {second['kind']}")
        print(comparison(first, second, options.results.stem, options.other.stem))
    if options.plot is not None:
        plot(first, options.plot)
        print(f"\n{options.plot}")
    return 0


def load(path: Path, wanted: str = "") -> dict[str, Any]:
    """``{"kind", "environment", "rows"}`` of any result file, of the rows in whose name ``wanted`` is found."""
    results = _load(path)
    key = _ops_key if results["kind"] == "ops" else _pairs_key
    rows = [row for row in results["rows"] if re.search(wanted, key(row))]
    if not rows:
        raise ValueError(f"{path}: expected rows with {wanted!r} in their names, got none")
    return results | {"rows": rows}


def _load(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if "benchmarks" in content:
        rows = [bench["extra_info"] for bench in content["benchmarks"] if "seconds" in bench["extra_info"]]
        if not rows:
            raise ValueError(f"{path}: expected rows of bench_ops, got none")
        return {"kind": "ops", "environment": rows[0], "rows": rows}
    if content.get("kind") not in ("overhead", "e2e", "skip"):
        raise ValueError(f"{path}: expected results of one of the benchmarks, got keys {list(content)}")
    return content


def tables(results: dict[str, Any]) -> str:
    parts = [_heading(results["environment"])]
    if results["kind"] == "ops":
        for op in dict.fromkeys(row["op"] for row in results["rows"]):
            parts.append(f"### `{op}`\n\n" + _ops_table([row for row in results["rows"] if row["op"] == op]))
    elif results["kind"] == "skip":
        parts.append(_skip_table(results["rows"]))
    else:
        parts.append(_pairs_table(results["rows"]))
    return "\n\n".join(parts)


def comparison(first: dict[str, Any], second: dict[str, Any], left: str, right: str) -> str:
    """Rows that both have, by what was measured; then how many only one has."""
    key, seconds = (_ops_key, "seconds") if first["kind"] == "ops" else (_pairs_key, "subject_seconds")
    before = {key(row): row[seconds] for row in first["rows"]}
    after = {key(row): row[seconds] for row in second["rows"]}
    both = [name for name in before if name in after]
    lines = [_line(["case", f"{left}", f"{right}", "ratio"]), _rule(4)]
    lines += [
        _line([name, _time(before[name]), _time(after[name]), f"{after[name] / before[name]:.3f}"]) for name in both
    ]
    lone = f"{len(before) - len(both)} rows only in {left}, {len(after) - len(both)} only in {right}"
    heads = f"{left}: {_heading(first['environment'])}\n\n{right}: {_heading(second['environment'])}"
    return "\n\n".join([heads, "\n".join(lines), lone])


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.22 * len(rows)), layout="constrained")
    if results["kind"] == "ops":
        names, values = [_ops_key(row) for row in rows], [row["share_of_copy"] for row in rows]
        axes.barh(names, values)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("share of the copy bandwidth of the same run (1 = as fast as copying as many bytes)")
    else:
        names, values = [_pairs_key(row) for row in rows], [row["ratio"] for row in rows]
        spread = [[value - row["low"] for value, row in zip(values, rows, strict=True)]]
        spread.append([row["high"] - value for value, row in zip(values, rows, strict=True)])
        axes.errorbar(values, names, xerr=spread, fmt="o", capsize=3)
        axes.axvline(1.0, color="black", linewidth=0.8)
        ideal = "the ideal's" if results["kind"] == "skip" else "the unpatched model's"
        axes.set_xlabel(f"time over {ideal}, median and 95 % interval")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    figure.suptitle(_heading(results["environment"]), fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _heading(facts: dict[str, Any]) -> str:
    known = [f"{name} {facts[name]}" for name in ("torch", "transformers", "void_ext", "commit") if facts.get(name)]
    threads = f"{facts['threads']} threads" if "sm" not in facts else f"driver {facts['driver']}"
    return ", ".join([facts["device"], threads, *known])


def _ops_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["alternatives"]))
    head = ["dtype", "rows × width", "time", "GB/s", "of copy", *(f"{name}: ×" for name in names)]
    lines = [_line(head), _rule(len(head))]
    for row in rows:
        ratios = [f"{row['alternatives'][name]['ratio']:.2f}" if name in row["alternatives"] else "–" for name in names]
        shape = f"{row['rows']} × {row['width']}" + (", in L2" if row.get("kind") == "decode-in-L2" else "")
        figures = [_time(row["seconds"]), f"{row['gbps']:.1f}", f"{100 * row['share_of_copy']:.0f} %"]
        lines.append(_line([row["dtype"], shape, *figures, *ratios]))
    return "\n".join(lines)


def _pairs_table(rows: list[Row]) -> str:
    head = ["case", "unpatched", "ratio, 95 % interval", "A/A interval", "pairs", "limit", "verdict"]
    counted = any(row.get("launches") for row in rows)
    if counted:
        head.append("launches a step, unpatched → traced")
    lines = [_line(head), _rule(len(head))]
    for row in rows:
        limit = "–" if row.get("limit") is None else f"{row['limit']:.2f}"
        ratio = f"{row['ratio']:.3f} ({row['low']:.3f} … {row['high']:.3f})"
        control = f"{row['control_low']:.3f} … {row['control_high']:.3f}"
        figures = [_pairs_key(row), _time(row["base_seconds"]), ratio, control, row["pairs"], limit, row["verdict"]]
        if counted:
            known = [count for count in row.get("launches", ()) if count is not None]
            figures.append(" → ".join(f"{count:.0f}" for count in known) or "–")
        lines.append(_line(figures))
    return "\n".join(lines)


def _skip_table(rows: list[Row]) -> str:
    """Tokens per second of the ideal and of skipping; their gain, where the dense model took turns with the ideal."""
    dense = {(_work(row), row["skipped"]): row["ratio"] for row in rows if row["variant"].endswith("dense")}
    head = ["case", "ideal, tokens/s", "skipping, tokens/s", "ideal gains", "skipping gains"]
    head += ["time over the ideal's", "A/A interval", "pairs", "limit", "verdict"]
    lines = [_line(head), _rule(len(head))]
    for row in rows:
        speeds = [row["tokens"] / row[name] for name in ("base_seconds", "subject_seconds")]
        gain = dense.get((_work(row), row["skipped"]))
        gains = ["–" if gain is None else f"{gain / part:.3f}" for part in (1.0, row["ratio"])]
        ratio = f"{row['ratio']:.3f} ({row['low']:.3f} … {row['high']:.3f})"
        control = f"{row['control_low']:.3f} … {row['control_high']:.3f}"
        limit = "–" if row.get("limit") is None else f"{row['limit']:.2f}"
        shown = [f"{speed:.3g}" for speed in speeds]
        lines.append(_line([_pairs_key(row), *shown, *gains, ratio, control, row["pairs"], limit, row["verdict"]]))
    return "\n".join(lines)


def _work(row: Row) -> tuple[object, ...]:
    return row["model"], row["dtype"], row["work"], row.get("threads")


def _ops_key(row: Row) -> str:
    return f"{row['op']} {row['dtype']} {row['rows']}×{row['width']}" + (
        " in L2" if row.get("kind") == "decode-in-L2" else ""
    )


def _pairs_key(row: Row) -> str:
    return f"{row['model']} {row['dtype']}, {row['work']}, {row['variant']}" + (
        f", {row['threads']} threads" if row.get("threads") else ""
    )


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _rule(columns: int) -> str:
    return "|" + " --- |" * columns


if __name__ == "__main__":
    sys.exit(main())

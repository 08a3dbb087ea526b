"""Figures of pages on time, memory and bytes, from the tables on the pages."""

import re
from collections import defaultdict
from pathlib import Path

from _common import RESULTS
from _figures import numbers_in, tables_of
from _page_figures import first, headings
from _shapes import draw_dots, draw_lines


def draw_bank(out: Path) -> list[Path]:
    """Bytes on disk before and now."""
    rows = {
        f"{row['backend']}, {row['widths']} bits": {
            "packed weights": first(row["MB on disk"]),
            "dequantized weights": first(row["MB before"]),
        }
        for row in tables_of("bank")[0]
    }
    title = "The bank of SmolLM2-135M, dequantized and packed"
    return draw_dots(out / "bank", list(rows.items()), title=title, xlabel="MB on disk")


def draw_type_speed(out: Path) -> list[Path]:
    """Tokens per second of each type, by processor."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for machine, table in zip(headings("type_speed"), tables_of("type_speed"), strict=True):
        name = re.split(r",|\(R\)", machine)[0].strip()
        for row in table:
            rows_of = "" if row["rows"] == "long" else ", short rows"
            rows[f"{row['type']}, {row['bits per weight']} bits{rows_of}"][name] = float(row["generation, tokens/s"])
    return draw_dots(
        out / "type_speed",
        list(rows.items()),
        title="Which of ggml's types write slowly for their bytes",
        xlabel="tokens per second written, one thread",
    )


def draw_mix_speed(out: Path) -> list[Path]:
    """Speed and divergence of CoopQ's files by two recipes, as multiples of those of the mix of their size."""
    names = {"CoopQ": "llama.cpp's recipe", "CoopQ, speed": "--recipe speed"}
    measured = [row for row in tables_of("mix_speed")[0] if row["divergence"]]
    mixes = {row["size of"]: row for row in measured if row["types by"] not in names}
    columns = {"tokens per second": "generation, tokens/s", "divergence": "divergence"}
    rows = [
        (
            f"{shown}, size of {row['size of']}",
            {name: first(row[column]) / first(mixes[row["size of"]][column]) for name, column in columns.items()},
        )
        for who, shown in names.items()
        for row in measured
        if row["types by"] == who
    ]
    return draw_dots(
        out / "mix_speed",
        rows,
        reference=1.0,
        title="CoopQ's files beside llama.cpp's mixes of their size",
        xlabel="as a multiple of the mix's; one thread of an Intel Xeon",
    )


def draw_protocol(out: Path) -> list[Path]:
    """How many times less CoopQ takes than the protocol written plainly, by processor."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for machine, table in zip(headings("protocol"), tables_of("protocol"), strict=True):
        name = re.split(r",|\(", machine)[0].strip()
        for row in table:
            rows[row[""]][name] = first(row["ratio"])
    return draw_dots(
        out / "protocol",
        list(rows.items()),
        reference=1.0,
        title="SPQE beside the paper's protocol written plainly",
        xlabel="times less than plainly (GFLOP/s: times more)",
    )


def draw_growth(out: Path) -> list[Path]:
    """Seconds against what grows, as multiples of the first row of each sweep."""
    lines = {}
    for what, table in zip(headings("growth"), tables_of("growth"), strict=True):
        column = what.removeprefix("By ")
        if column != "granularity":
            base = table[0]
            lines[column] = [
                (float(row[column]) / float(base[column]), float(row["seconds"]) / float(base["seconds"]))
                for row in table
            ]
    return draw_lines(
        out / "growth",
        lines,
        log="xy",
        title="Time grows with the square of the blocks, and linearly with walks and tokens",
        xlabel="times as many",
        ylabel="times as long",
    )


def draw_memory(out: Path) -> list[Path]:
    """Peaks of memory and their forecasts."""
    rows = [
        (
            f"{first(row['tokens']):,.0f} tokens, {row['dequantized']} weights dequantized",
            {"peak": first(row["peak"]), "forecast": first(row["forecast"])},
        )
        for row in tables_of("memory")[0]
    ]
    title = "Memory of SmolLM2-135M beside its forecast"
    return draw_dots(out / "memory", rows, title=title, xlabel="MiB beside the interpreter and the libraries")


def draw_layer_forward(out: Path) -> list[Path]:
    """Speed of a block forward as a share of its matrix products."""
    rows = []
    for machine, table in zip(headings("layer_forward"), tables_of("layer_forward"), strict=True):
        engine, plain = (
            [numbers_in(line.strip("| ").split(" | ")[place])[0] for line in _lines_of("layer_forward", machine)]
            for place in (7, 5)
        )
        for row, ours, theirs in zip(table, engine, plain, strict=True):
            label = f"{machine.split(',')[0]}, {first(row['tokens']):,.0f} tokens"
            rows.append((label.replace("(R)", ""), {"CoopQ's block": ours, "transformers' block": theirs}))
    title = "A block forward beside its matrix products alone"
    return draw_dots(out / "layer_forward", rows, title=title, xlabel="speed, % of the products alone")


def _lines_of(name: str, heading: str) -> list[str]:
    """The lines of the table below a heading, without its head: for tables whose columns share names."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| ")][2:]


def draw_prefix_sharing(out: Path) -> list[Path]:
    """How many times fewer block forwards, by walks."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in tables_of("prefix_sharing")[0]:
        blocks, players = row["blocks L"], row["players N"]
        kind = "blocks" if blocks == players else "linear layers"
        if blocks != "32":  # lies between the others
            lines[f"{players} {kind}"].append((float(row["walks M"]), float(row["times fewer"])))
    return draw_lines(
        out / "prefix_sharing",
        lines,
        log="x",
        title="Shared prefixes: what they save",
        xlabel="walks",
        ylabel="times fewer block forwards",
    )


def draw_generation(out: Path) -> list[Path]:
    """Tokens per second of each form."""
    rows = [(row["form"], {"speed": float(row["tokens per second"])}) for row in tables_of("generation")[0]]
    title = "SmolLM2-135M at 4 bits, by coopq.load"
    return draw_dots(out / "generation", rows, title=title, xlabel="tokens per second on one CPU")


def draw_gpu(out: Path) -> list[Path]:
    """Speed of a block and of the head, as shares of the peak."""
    table = next(table for table in tables_of("gpu") if "share of the peak" in table[0])
    rows = []
    for row in table:
        ours, (milliseconds, theirs) = first(row["share of the peak"]), numbers_in(row["by torch's own operations, ms"])
        assert milliseconds > float(row["ms"])
        rows.append((row[""], {"CoopQ": ours, "torch's own operations": theirs}))
    title = "Llama-3.1-8B's shape on one H100"
    return draw_dots(out / "gpu", rows, title=title, xlabel="speed, % of a large matrix product")


def draw_solver(out: Path) -> list[Path]:
    """Seconds to the end of each solver, by program."""
    solvers = {"descents": "descents: seconds", "SCIP": "SCIP: seconds", "HiGHS": "HiGHS: seconds"}
    rows = [
        (
            f"{row['K']}, {row['steps']} steps",
            {name: float(row[column]) for name, column in solvers.items() if row[column]},
        )
        for row in tables_of("solver")[0]
    ]
    title = "Programs of a budget: time to the end, or 15 seconds"
    return draw_dots(
        out / "solver", rows, log=True, title=title, xlabel="seconds of the processor, the longer of two seeds"
    )


OF_COSTS = (
    draw_bank,
    draw_generation,
    draw_gpu,
    draw_growth,
    draw_layer_forward,
    draw_memory,
    draw_mix_speed,
    draw_prefix_sharing,
    draw_protocol,
    draw_solver,
    draw_type_speed,
)

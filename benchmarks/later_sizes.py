"""What do a second and a third size cost in a run folder, and are their plans those of fresh runs?

python benchmarks/later_sizes.py llama       # a reference model; minutes, resumes
python benchmarks/later_sizes.py --report    # only write the report
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _common import RESULTS, WORK, command_line, mean_difference, table, write_report
from _models import session_on, source_of
from coopq.core.files import read_json, write_json
from coopq.core.sizes import Budget
from coopq.core.specs import DEFAULT_SOLVER, Request
from coopq.game.session import Session
from coopq.model.texts import HeldOut
from coopq.plan.methods import make_plans

MEASURED = """\
Fused layers, rtn with 2, 3, 4 and 8 bits, by divergence on 8 x 512 tokens of C4, the default method without a limit.
Sizes are asked for one after the other in one run folder, and each alone in a folder of its own. Forwards are those of
the whole model over the calibration tokens, scores included. Held out are 32 x 256 tokens of WikiText-2, with the
standard error of the difference over windows. Writes docs/results/later_sizes.md.
"""
"""Stands in the help and on the page."""
SIZES = ("3.5bpw", "4.5bpw", "2.8bpw")
LENGTH, HELD_OUT = 256, 32 * 256


def measure(model: str, place: Path) -> list[dict[str, Any]]:
    """Forwards, losses and held-out divergences of each size, after the sizes before it and alone."""
    request = Request.from_options(
        model=source_of(model),
        backend="rtn",
        bits=(2, 3, 4, 8),
        granularity="fused",
        loss="kl",
        tokens=4096,
        sequence_length=512,
    )
    found: list[dict[str, Any]] = []
    for size in SIZES:
        with session_on(request, place / f"alone-{size}") as session:
            found.append({"size": size, "alone": planned(session, size)})
    with session_on(request, place / "together") as session:
        for row in found:
            row["after others"] = planned(session, row["size"])
        windows = HeldOut(LENGTH, HELD_OUT).windows(session.loaded.tokenizer)
        with session.game_on(windows, session.folder.path / "held-out.jsonl", "judging", loss="kl") as judge:
            for row in found:
                for one in (row["alone"], row["after others"]):
                    one["held out"] = judge.per_sequence(np.array([one["assignment"]], dtype=np.float32))[0].tolist()
    return found


def planned(session: Session, size: str) -> dict[str, Any]:
    """The plan of a size in a session, and the forwards that its search spent."""
    (plan,) = make_plans(session, "active", [Budget.parse(size)], DEFAULT_SOLVER)
    forwards = plan.block_forwards / len(set(session.blocks))
    print(f"{size}: {forwards:.0f} forwards, {plan.measured_loss:.5f}", flush=True)
    return {"forwards": forwards, "loss": plan.measured_loss, "assignment": list(plan.assignment)}


def report_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """The report on all models."""
    lines = [*MEASURED.splitlines(), ""]
    header = ["size", "forwards alone", "after the sizes above", "divergence alone", "after", "held out alone"]
    header.append("after less alone")
    for one in found:
        rows: list[list[object]] = []
        for row in one["sizes"]:
            alone, after = row["alone"], row["after others"]
            rows.append(
                [
                    row["size"],
                    f"{alone['forwards']:.0f}",
                    f"{after['forwards']:.0f}",
                    f"{alone['loss']:.5f}",
                    f"{after['loss']:.5f}",
                    f"{np.mean(alone['held out']):.5f}",
                    mean_difference(np.array(after["held out"]) - np.array(alone["held out"])),
                ]
            )
        lines += [f"## {one['model']}", "", *table(header, rows), ""]
    return lines


def main() -> None:
    """Measure a model, and write the report."""
    parser = command_line(f"{__doc__}\n{MEASURED}")
    parser.add_argument("model", nargs="?", help="a reference model")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--work", type=Path, default=WORK / "later_sizes")
    parser.add_argument("--out", type=Path, default=RESULTS / "later_sizes.md")
    options = parser.parse_args()
    if not options.report:
        if options.model is None:
            parser.error("give a reference model, or --report")
        file = options.work / options.model / "found.json"
        write_json(file, {"model": options.model, "sizes": measure(options.model, file.parent)})
    write_report(options.out, report_lines([read_json(file) for file in sorted(options.work.glob("*/found.json"))]))


if __name__ == "__main__":
    main()

"""Players that choose among the types of their own rows: sizes, losses, and types worth leaving out.

python benchmarks/own_types.py            # an hour on two cores, resumes; writes docs/results/own_types.md
python benchmarks/own_types.py --types    # the sizes and the errors of types alone, minutes
"""

import json
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from _common import DATA, RESULTS, WORK, command_line, table, write_report
from _models import measured_plans, session_on
from coopq.core.files import read_json, write_json
from coopq.core.specs import Request
from coopq.core.types import Width
from coopq.game.engines.prefix_engine import make_engine
from coopq.game.prepared import prepare
from coopq.game.sensitivity import Sensitivity
from coopq.model.texts import calibration_set, fitting_set
from coopq.plan.scores.output_errors import output_errors
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.ggml.types import IQuants

MEASURED = """\
Three quarters of the demo model's weights lie in rows of 576, which have types from 4 bits up. Rows of down projections
have 1,536 weights, and types from 2 bits up. "Shared widths" are those of which all rows have a type. The error of a
type is what `auto-quantize` scores: how far outputs move, weighted by gradients, on 1,024 tokens of C4; of the demo
model in every sixth block. A type is dominated for a player if another type of no more bytes has no higher error. The
demo model's file is quantized to Q4_1 already, so Q4_1 loses nothing there; the reference Llama has full precision.
Losses are divergences from full precision on these tokens.
"""
"""Stands in the help and on the page."""
SHARED: tuple[Width, ...] = (4, 5, 8)
OWN: dict[str, tuple[Width, ...]] = {
    "ggml": (2, 3, 4, 4.5, 5, 5.5, 6, 8),
    "ggml-iq": (2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 8),
}
BUDGETS = ("4.5bpw", "5bpw")
EVERY = 6
"""Errors on the demo model are those of every sixth block's players; the last block is among them."""


class EveryShortType(IQuants):
    """The types of `ggml-iq`, and Q4_0 for short rows."""

    short_rows: ClassVar[dict[Width, str]] = {3.5: "Q4_0", **IQuants.short_rows}


class ShortTypesAlone(EveryShortType):
    """The types of short rows for all rows."""

    long_rows: ClassVar[dict[Width, str]] = EveryShortType.short_rows


CASES = {
    "demo": ("demo", EveryShortType, EVERY),
    "llama, types of short rows": (str(DATA / "llama"), ShortTypesAlone, 1),
}
"""Model, backend, and which of its blocks have their errors measured."""


def request_of(backend: str, widths: tuple[Width, ...], model: str = "demo") -> Request:
    """What is measured of a model."""
    return Request.from_options(
        model=model,
        backend=backend,
        bits=widths,
        granularity="fused",
        loss="kl",
        tokens=1024,
        sequence_length=256,
        fit_tokens=4096,
    )


def smallest_sizes() -> list[list[object]]:
    """Bytes of the smallest assignment with shared and with own widths, by backend."""
    rows = list[list[object]]()
    for backend, widths in OWN.items():
        prepared = [prepare(request_of(backend, bits)) for bits in (SHARED, widths)]
        smallest = [each.sizes.total_bytes([own[0] for own in each.player_widths]) for each in prepared]
        rows.append([backend, *(f"{n / 1e6:.1f} MB" for n in smallest), f"{1 - smallest[1] / smallest[0]:.1%}"])
    return rows


def errors_of_types(model: str, kind: type[IQuants], every: int) -> dict[str, Any]:
    """For each type of each kind of rows: bits of a weight, errors, and for which players it is dominated."""
    prepared, backend = prepare(request_of("ggml-iq", (4, 8), model)), kind()
    loaded, text = prepared.load(), prepared.request.text
    players = [player for player in prepared.players if player.block % every == every - 1]
    player_widths = [backend.widths_of(player.linears[0].shape) for player in players]
    with TemporaryDirectory() as folder:
        bank = WeightBank(Path(folder), loaded, players, backend, {})
        bank.build(backend.bits, fitting_set(text, loaded.tokenizer).tokens, print_progress, player_widths)
        blockwise = make_engine(loaded.model, bank, calibration_set(text, loaded.tokenizer).tokens).blockwise
        errors = output_errors(Sensitivity(blockwise, bank, 2, 8, player_widths), backend.bits)
    found: dict[str, Any] = {}
    for player, own in enumerate(player_widths):
        shape = players[player].linears[0].shape
        for width in own:
            n_bytes = backend.format.row_bytes(shape[1], width)
            error = errors[backend.bits.index(width), player]
            rivals = [other for other in own if other != width and backend.format.row_bytes(shape[1], other) <= n_bytes]
            entry = found.setdefault(f"{backend.format.tensor_type(shape[1], width).name}, rows of {shape[1]}", {})
            entry.setdefault("bits", 8 * n_bytes / shape[1])
            entry.setdefault("errors", []).append(error)
            lowest = min((errors[backend.bits.index(other), player] for other in rivals), default=np.inf)
            entry.setdefault("dominated", []).append(bool(lowest <= error))
    return found


def print_progress(stage: str, done: int, total: int) -> None:
    """Say now and then how far the weights are."""
    if done % 100 == 0:
        print(stage, done, total, flush=True)


def losses(work: Path) -> dict[str, list[float]]:
    """Divergences that the active search reaches with shared and with own widths, for each budget."""
    found: dict[str, list[float]] = {}
    for backend, is_own in product(("ggml-iq",), (False, True)):
        widths = OWN[backend] if is_own else SHARED
        name = f"{backend}, {'own' if is_own else 'shared'} widths"
        with session_on(request_of(backend, widths), work / name.replace(", ", "-").replace(" ", "-")) as session:
            plans = measured_plans(session, "active", BUDGETS)
        found[name] = [float(plan.measured_loss or np.nan) for plan in plans]
        found[f"{name}: bits for each weight"] = [plan.bits_per_weight for plan in plans]
    return found


def report_lines(types: dict[str, Any], searched: dict[str, list[float]]) -> list[str]:
    """The report."""
    lines = [*MEASURED.splitlines(), ""]
    lines += ["## The smallest size", ""]
    lines += [*table(["backend", "shared widths", "own widths", "smaller by"], smallest_sizes()), ""]
    for case, of_case in types.items():
        rows = [
            [name, f"{each['bits']:.2f}", f"{np.sum(each['errors']):.5f}", f"{np.mean(each['dominated']):.0%}"]
            for name, each in sorted(of_case.items(), key=lambda item: (item[0].split("of ")[1], item[1]["bits"]))
        ]
        kept = {name: entry for name, entry in of_case.items() if not name.startswith("Q4_0")}
        dominated = np.mean([each for entry in kept.values() for each in entry["dominated"]])
        lines += [f"## Errors of types: {case}", ""]
        lines += [f"Of all pairs of a player and a type other than Q4_0, {dominated:.1%} are dominated.", ""]
        lines += [*table(["type", "bits for each weight", "error, sum over players", "players dominated"], rows), ""]
    if searched:
        rows = [[name, *(f"{value:.5f}" for value in values)] for name, values in searched.items()]
        lines += ["## Divergences that the active search reaches", "", *table(["", *BUDGETS], rows), ""]
    return lines


def main() -> None:
    """Measure what is not measured yet, and write the report."""
    parser = command_line(f"{__doc__}\n{MEASURED}")
    parser.add_argument("--types", action="store_true", help="search nothing")
    parser.add_argument("--work", type=Path, default=WORK / "own_types")
    parser.add_argument("--out", type=Path, default=RESULTS / "own_types.md")
    options = parser.parse_args()
    searches, types = options.work / "searches.json", dict[str, Any]()
    for case, arguments in CASES.items():
        file = options.work / f"{case.replace(', ', '-').replace(' ', '-')}.json"
        if not file.exists():
            write_json(file, json.loads(json.dumps(errors_of_types(*arguments))))
        types[case] = read_json(file)
    if not options.types and not searches.exists():
        write_json(searches, losses(options.work))
    write_report(options.out, report_lines(types, read_json(searches) if searches.exists() else {}))


if __name__ == "__main__":
    main()

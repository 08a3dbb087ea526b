"""Each recipe against what else its engine takes, at equal size: is it the best choice?

    python benchmarks/recipes.py llama coopq 3.5bpw       # one model, engine and size; minutes, resumes
    python benchmarks/recipes.py --report                 # only write the report

Writes docs/results/recipes.md, and recipes.json, which keeps what was measured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from _common import RESULTS, WORK, command_line, mean_difference, perplexity, table, write_report
from _models import session_on, source_of
from coopq.core.errors import InfeasibleBudget
from coopq.core.files import read_json, write_json
from coopq.core.goal import Limit
from coopq.core.recipes import RECIPES
from coopq.core.sizes import Budget
from coopq.core.specs import DEFAULT_SOLVER, Request
from coopq.core.types import UNTOUCHED
from coopq.game.prepared import usable_bits
from coopq.judge.references import N_RANDOM, RANDOM, random_assignments
from coopq.model.texts import HeldOut
from coopq.plan.methods import get_method, make_plans
from coopq.search.prior import PRIOR_SCORE

MEASURED = """\
Each row changes one setting of the recipe, or what its name says. All search with a limit of 60 forwards, by the
default method; the score is what that search begins with, and random widths are the mean of 5 draws. Divergence is
from the original on 32 x 256 tokens of WikiText-2, which no search sees, with the standard error over windows; beside
it the loss there, as a perplexity. The ratio is the mean over windows of the ratio to the recipe's divergence. Sizes
are those of our own form.
"""
"""Stands in the help and on the page."""
FORWARDS = 60
LENGTH, HELD_OUT = 256, 32 * 256
_BLOCKS: dict[str, Any] = {"granularity": "block"}
_FUSED: dict[str, Any] = {"granularity": "fused"}
SCORE, RANDOM_WIDTHS = "the score alone", "random widths"
OF_FACTORS: dict[str, dict[str, Any]] = {
    SCORE: {"method": PRIOR_SCORE},
    RANDOM_WIDTHS: {"method": RANDOM},
    "1,024 tokens": {"tokens": 1024},
    "16,384 tokens": {"tokens": 16384},
}
"""What is no other setting of an engine: how the widths are chosen, and on how many tokens (factors.py)."""
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "coopq": {
        "blocks, 2 and 4 bits, nll": {**_BLOCKS, "bits": (2, 4), "loss": "nll"},
        "2 and 4 bits": {"bits": (2, 4)},
        "blocks": _BLOCKS,
        "fused layers": _FUSED,
        "nll": {"loss": "nll"},
        "hqq": {"backend": "hqq"},
        "gptq-static": {"backend": "gptq-static", "bits": (2, 4, 8)},
        **OF_FACTORS,
    },
    "llama.cpp": {
        "ggml": {"backend": "ggml", "bits": (2, 3, 4, 4.5, 5, 5.5, 6, 8)},
        "ggml-iq": {"backend": "ggml-iq", "bits": (2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 8)},
        "blocks": _BLOCKS,
        "fused layers": _FUSED,
        **OF_FACTORS,
    },
    "vllm": {"blocks": _BLOCKS, "4 and 8 bits": {"bits": (4, 8)}},
    "transformers": {"fused layers": _FUSED, "blocks": _BLOCKS, "nll": {"loss": "nll"}},
    "mlx": {"fused layers": _FUSED, "hqq": {"backend": "hqq"}, "blocks": _BLOCKS},
    "openvino": {
        "fused layers": _FUSED,
        "gptq-static": {"backend": "gptq-static"},
        "hqq": {"backend": "hqq"},
        "blocks": _BLOCKS,
    },
}
"""What each recipe is compared with: the settings and the method that differ, by a name. New ones go last."""


def measure(model: str, engine: str, size: str, changes: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Divergences and losses of the plan of a recipe with some settings changed, on each held-out window."""
    settings = {name: setting.value for name, setting in RECIPES[engine].settings.items()}
    if engine == "llama.cpp":  # 16 is for bases that are quantized already
        settings["bits"] = tuple(width for width in settings["bits"] if width != UNTOUCHED)
    tokens = {"tokens": 1024, "sequence_length": 256} if model == "demo" else {"sequence_length": 512}
    options = {**settings, **tokens, **changes}
    method = options.pop("method", "active")
    request = Request.from_options(model=source_of(model), **options)
    request = request.replace(bits=usable_bits(request))
    with session_on(request, run) as session:
        budget = Budget.parse(size)
        if method == RANDOM:
            sizes, widths = session.sizes, session.request.widths.bits
            chosen = random_assignments(sizes, widths, sizes.limit(budget, widths), N_RANDOM, seed=0)
        else:
            limit = Limit(forwards=FORWARDS) if get_method(method).is_anytime else None
            (plan,) = make_plans(session, method, [budget], DEFAULT_SOLVER, limit)
            chosen = np.array([plan.assignment], dtype=np.float32)
        windows, judged = HeldOut(LENGTH, HELD_OUT).windows(session.loaded.tokenizer), {}
        for name, loss, journal in (("divergences", "kl", "held-out"), ("losses", "nll", "held-out-nll")):
            with session.game_on(windows, run / f"{journal}.jsonl", "judging", loss=loss) as judge:
                judged[name] = judge.per_sequence(chosen).mean(axis=0).tolist()
        n_weights = sum(session.sizes.n_weights)
        bits = float(np.mean([session.sizes.bits_per_weight(one) for one in chosen]))
    return {**judged, "bits per weight": bits, "weights": n_weights}


def report_lines(found: Mapping[str, Any]) -> list[str]:
    """The report: a table for each model, engine and size; with perplexities, if all of its records have losses."""
    lines = [*MEASURED.splitlines(), ""]
    for case, variants in found.items():
        recipe = variants["the recipe"]
        judges = all("losses" in one for one in variants.values())
        rows: list[list[object]] = []
        for name, one in sorted(variants.items(), key=lambda item: float(np.mean(item[1]["divergences"]))):
            own, ratio = np.array(one["divergences"]), np.divide(one["divergences"], recipe["divergences"])
            rows.append([name, f"{one['bits per weight']:.3f}", f"{own.mean():.5f}"])
            rows[-1] += [_less_recipe(one, recipe, "divergences"), f"{ratio.mean():.2f}"]
            if judges:
                rows[-1] += [perplexity(np.array(one["losses"])), _less_recipe(one, recipe, "losses")]
        header = ["settings", "bits per weight", "divergence", "less the recipe's", "ratio"]
        header += ["perplexity", "loss less the recipe's"] if judges else []
        lines += [f"## {case}", "", *table(header, rows), ""]
    return lines


def _less_recipe(one: Mapping[str, Any], recipe: Mapping[str, Any], what: str) -> str:
    return "" if one is recipe else mean_difference(np.subtract(one[what], recipe[what]))


def main() -> None:
    """Measure a case, and write the report."""
    parser = command_line(f"{__doc__}\n{MEASURED}")
    parser.add_argument("case", nargs="*", help="model, engine, size")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--work", type=Path, default=WORK / "recipes")
    parser.add_argument("--out", type=Path, default=RESULTS / "recipes.md")
    options = parser.parse_args()
    if not options.report:
        if len(options.case) != 3 or options.case[1] not in OTHERS:
            parser.error(f"give a model, an engine ({', '.join(OTHERS)}) and a size, or --report")
        model, engine, size = options.case
        place = options.work / "-".join(options.case)
        variants = {"the recipe": {}, **OTHERS[engine]}
        for number, (name, changes) in enumerate(variants.items()):
            file = place / f"{number}.json"
            if not file.exists():
                try:
                    found = measure(model, engine, size, changes, place / f"run-{number}")
                except InfeasibleBudget as error:  # the case goes on without a setting that has no such size
                    print(f"{name}: {error}")
                    continue
                write_json(file, {"case": ", ".join(options.case), "settings": name, **found})
                print(name, np.mean(found["divergences"]), flush=True)
    kept = options.out.with_suffix(".json")
    measured: dict[str, dict[str, Any]] = read_json(kept) if kept.exists() else {}
    for file in sorted(options.work.glob("*/*.json")):
        one = read_json(file)
        measured.setdefault(one["case"], {})[one["settings"]] = one
    write_json(kept, dict(sorted(measured.items())))
    write_report(options.out, report_lines(measured))


if __name__ == "__main__":
    main()

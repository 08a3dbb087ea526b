"""Every assignment of a real model of twelve blocks, and how far from its true optimum every estimator ends.

    python benchmarks/train.py twelve      # once: an hour; its result lies in benchmarks/data/twelve
    python benchmarks/enumerated.py        # all 4096 assignments, twice; half an hour, resumes

The games are the model's mean loss on 32 x 256 tokens of Wikipedia that it was not trained on; its first 8 and 16
sequences are games of fewer tokens. What estimators choose on those is judged there, and on 32 x 256 tokens of other
articles. Writes docs/results/enumerated.json and enumerated.md; work is kept in build/enumerated.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from shapiq import ExactComputer

from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.core.types import Assignment
from coopq.game.session import open_workbench
from coopq.model.texts import calibration_set
from coopq.plan.methods import plans_on
from coopq.plan.scores import PAPER_BASELINES
from coopq.search import SPQE, Enumeration, SearchSpace, run
from coopq.search.strategies.exhaustive import best_quadratic, shapley_values
from coopq.search.synthetic import HIGH, LOW, TableGame
from main_job import bars_for
from regret import METHODS, Counted, Judge, cell
from train import TWELVE, held_out_articles

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "build" / "enumerated", ROOT / "docs" / "results" / "enumerated.json"
WIDTHS = ((2, 4), (3, 4))
SEQUENCES, LENGTH = 32, 256
FEWER = (8, 16, 32)
AVERAGES = (0.125, 0.25, 0.5, 0.75)
"""Budgets, as shares of the players that may be raised: 2.25avg to 3.5avg of the paper's widths."""
SEEDS = range(3)
PRUNING_WALKS = 25


def texts() -> tuple[Path, Path]:
    """The held-out articles in two halves: to search on, and to judge by."""
    WORK.mkdir(parents=True, exist_ok=True)
    held_out = held_out_articles()
    paths = WORK / "search.jsonl", WORK / "judge.jsonl"
    for path, part in zip(paths, (held_out[::2], held_out[1::2]), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return paths


def tables(low: int, high: int) -> dict[str, Any]:
    """Losses of all assignments on both texts, shape (n_sequences, 4096) each, in the order of `Table`."""
    search, judge = texts()
    sets = [CalibrationConfig(str(path), sequences=SEQUENCES, length=LENGTH) for path in (search, judge)]
    config = RunConfig(str(TWELVE), low=low, high=high, calibration=sets[0])
    found = {}
    with (
        Progress() as bars,
        open_workbench(config, WORK / f"rtn-{low}-{high}", bars_for(bars, f"{low},{high}")) as bench,
    ):
        space = SearchSpace.uniform((low, high), bench.storage.raise_costs(low, high))
        points = Enumeration(space).propose()
        for name, source in zip(("search", "judge"), sets, strict=True):
            tokens = calibration_set(source, bench.loaded.tokenizer)
            journal = bench.folder.path / f"{name}.jsonl"
            with bench.game(tokens, journal, f"all assignments, {name}") as game:
                found[name] = game.per_sequence(points).T
    return found


def by_model(low: int, high: int, n_sequences: int, seed: int) -> Iterator[tuple[str, float, list[Assignment]]]:
    """What methods that look at more than losses between the widths choose: name, cost, an assignment for each budget.

    One-layer scores do not depend on the seed.
    """
    calibration = CalibrationConfig(str(texts()[0]), sequences=n_sequences, length=LENGTH)
    config = RunConfig(str(TWELVE), low=low, high=high, permutations=PRUNING_WALKS, seed=seed, calibration=calibration)
    budgets = [Budget.parse(f"{low + share * (high - low)}avg") for share in AVERAGES]
    folder = WORK / f"rtn-{low}-{high}-{n_sequences}"
    with Progress() as bars, open_workbench(config, folder, bars_for(bars, f"{low},{high}")) as bench:
        for method in ("pruning", *(("fisher", *PAPER_BASELINES) if seed == 0 else ())):
            plans = plans_on(bench, method, budgets)
            rows = np.array([plan.assignment for plan in plans])
            chosen = np.where(rows == low, LOW, HIGH).astype(np.float32)
            name = f"pruning, M = {PRUNING_WALKS}" if method == "pruning" else method
            yield name, plans[0].layer_forwards / rows.shape[1], list(chosen)


def compare(low: int, high: int) -> dict[str, Any]:
    """Exact values of the game, and cost and regret of every method on it, by number of sequences."""
    table = tables(low, high)
    n = int(table["search"].shape[1]).bit_length() - 1
    judged = TableGame(table["judge"].mean(axis=0))
    whole = table["search"].mean(axis=0)
    capacities = tuple(int(share * n) for share in AVERAGES)
    rows: dict[str, dict[str, list[list[float]]]] = {}
    for n_sequences in FEWER:
        game = TableGame(table["search"][:n_sequences].mean(axis=0))
        for seed in SEEDS:
            space = SearchSpace.uniform((LOW, HIGH), np.ones(n, dtype=np.int64), capacities, seed)
            judges = [Judge(of, space, optima(of, space)) for of in (game, judged)]
            for name, method in METHODS.items():
                counted = Counted(game)
                choose = method(space, counted)
                cost = counted.forwards
                of_method = rows.setdefault(name, {}).setdefault(str(n_sequences * LENGTH), [])
                of_method.append([cost, *(judge(choose) for judge in judges)])
            answers = [*by_model(low, high, n_sequences, seed), ("optimum", 2 ** (n + 1) / n, optima(game, space))]
            for name, cost, chosen in answers:
                of_method = rows.setdefault(name, {}).setdefault(str(n_sequences * LENGTH), [])
                of_method.append(
                    [cost, *(judge(dict(zip(capacities, chosen, strict=True)).__getitem__) for judge in judges)]
                )
    exact = interactions(whole)
    above = np.triu_indices(n, 1)
    walks = covariance_of_walks(whole)
    return {
        "methods": rows,
        "loss high": float(whole[0]),
        "loss low": float(whole[-1]),
        "shapley": shapley_values(whole).tolist(),
        "correlation of the covariance of walks with exact interactions": float(
            np.corrcoef(walks[above], exact[above])[0, 1]
        ),
        "share of pairs with the same sign": float((np.sign(walks[above]) == np.sign(exact[above])).mean()),
        "size of the covariance over that of interactions": float(
            np.abs(walks[above]).mean() / np.abs(exact[above]).mean()
        ),
        "variance that single terms explain": explained(whole, pairs=False),
        "variance that single and pair terms explain": explained(whole, pairs=True),
    }


def optima(game: TableGame, space: SearchSpace) -> list[Any]:
    """The true optimum of each budget."""
    search = Enumeration(space)
    points = search.propose()
    search.learn(points, game(points))
    return [search.choose(capacity) for capacity in space.capacities]


def interactions(table: Any) -> Any:
    """Exact Shapley interaction index of all pairs, symmetric with a zero diagonal, shape (n_players, n_players).

    Source: Grabisch and Roubens, An axiomatic approach to the concept of interaction among players in cooperative
    games, 1999.
    """
    n = len(table).bit_length() - 1
    computer = ExactComputer(lambda members: table[members.astype(int) @ (1 << np.arange(n))], n)
    return computer("SII", 2).get_n_order_values(2)


def covariance_of_walks(table: Any, walks: int = 2000) -> Any:
    """The covariance of marginals that SPQE converges to."""
    n = len(table).bit_length() - 1
    spqe = SPQE(n, low=LOW, high=HIGH, permutations=walks, seed=0)
    return run(spqe, TableGame(table)).estimate().covariance


def explained(table: Any, *, pairs: bool) -> float:
    """Share of the variance over all coalitions that the best additive, or quadratic, function explains."""
    n = len(table).bit_length() - 1
    q = (np.arange(len(table))[:, None] >> np.arange(n) & 1).astype(float)
    constant, a, K = best_quadratic(table)
    if not pairs:  # single terms in z = 2q - 1 do not change when pair terms are left out
        a, K = a + K.sum(axis=1), np.zeros_like(K)
    fitted = constant + q @ a + ((q @ K) * q).sum(axis=1)
    left = table - fitted
    return float(1 - np.var(left) / np.var(table))


def markdown(results: dict[str, Any]) -> str:
    """The report."""
    training = json.loads((TWELVE / "training.json").read_text())
    scores = training["validation"]["float16"]
    lines = [
        "# All assignments of a real model",
        "",
        "Written by `python benchmarks/enumerated.py`. The model of `benchmarks/train.py`, a Llama of twelve",
        f"blocks trained on {training['tokens']:,} tokens (on held-out articles perplexity {scores['perplexity']:.2f}, "
        f"{scores['bits_per_byte']:.3f} bits a byte),",
        "backend rtn; all 4096 assignments measured. Regret is",
        "0 at the optimum and 1 at the mean of random assignments, averaged over budgets that raise",
        f"{', '.join(str(int(12 * share)) for share in AVERAGES)} of 12 blocks, on the text searched and another.",
        "Cost in forwards of the whole model on those tokens. Mean ± standard error over seeds; one-layer scores and",
        "greedy search have none to vary.",
        "",
    ]
    for name, of in results.items():
        tokens = list(of["methods"]["optimum"])
        lines += [f"## rtn, {name} bits", "", *(f"* {k}: {v:.4f}" for k, v in of.items() if isinstance(v, float)), ""]
        lines += [
            f"| method | cost | {' | '.join(f'{t} tokens: searched | other text' for t in tokens)} |",
            f"| --- | --- | {' | '.join('--- | ---' for _ in tokens)} |",
        ]
        for method, rows in of["methods"].items():
            cells = [cell([row[k] for row in rows[t]]) for t in tokens for k in (1, 2)]
            lines.append(f"| {method} | {np.mean([row[0] for row in rows[tokens[-1]]]):.0f} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Enumerate both pairs of widths, run all methods, write the report."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = {f"{low} and {high}": compare(low, high) for low, high in WIDTHS}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()

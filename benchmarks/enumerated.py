"""Every assignment of a real model of twelve blocks, and how far from the true optimum every method ends.

    python benchmarks/train.py twelve      # once: 45 minutes on two cores; writes benchmarks/data/twelve
    python benchmarks/enumerated.py        # all 4096 assignments, twice; half an hour, resumes

The games are the model's mean loss on 32 x 256 tokens of held-out Wikipedia articles; the first 8 and 16 sequences are
games of fewer tokens. The report judges what methods choose on each game by the game itself, and by 32 x 256 tokens of
other held-out articles. Writes docs/results/enumerated.md; build/enumerated keeps the work.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from shapiq import ExactComputer

from _common import DATA, RESULTS, WORK, command_line, table, write_documents, write_report
from _models import session_on
from _wikipedia import held_out_articles
from coopq.core.sizes import Budget
from coopq.core.specs import Request, SolverSpec
from coopq.core.types import Assignment, Width
from coopq.model.texts import calibration_set
from coopq.plan.methods import make_plans, names
from coopq.search import SPQE, Enumeration, SearchSpace, run
from coopq.search.strategies.exhaustive import Table, best_quadratic
from coopq.search.synthetic import HIGH, LOW, TableGame
from regret import METHODS, Counted, Judge, mean_regret

FOLDER, MODEL = WORK / "enumerated", DATA / "twelve"
WIDTHS = ((2, 4), (3, 4))
N_SEQUENCES, LENGTH = 32, 256
GAMES = (8, 16, 32)
"""Sequences of each game."""
SHARES = (0.125, 0.25, 0.5, 0.75)
"""Budgets, as the share of the players that may have the high width: 2.25avg to 3.5avg at 2 and 4 bits."""
SEEDS = range(3)
PRUNING_WALKS, COVARIANCE_WALKS = 25, 2000

Regrets = dict[str, dict[int, list[list[float]]]]
"""For each method and number of tokens, and for each seed: cost, regret on the game, regret on the other text."""


@dataclass(frozen=True)
class Chosen:
    """What a method chooses.

    Attributes:
        method: Name of the method.
        cost: Block forwards in forwards of the whole model.
        assignments: An assignment for each budget.
    """

    method: str
    cost: float
    assignments: Sequence[Assignment]


def texts() -> tuple[Path, Path]:
    """The held-out articles in two halves: the text to search on, and the other text."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    articles = held_out_articles()
    paths = FOLDER / "search.jsonl", FOLDER / "judge.jsonl"
    for path, part in zip(paths, (articles[::2], articles[1::2]), strict=True):
        write_documents(path, part)
    return paths


def request_on(bits: tuple[Width, Width], n_sequences: int, seed: int = 0) -> Request:
    """What is measured on the first sequences of the text to search on."""
    return Request.from_options(
        model=str(MODEL),
        bits=bits,
        calibration=str(texts()[0]),
        tokens=n_sequences * LENGTH,
        sequence_length=LENGTH,
        permutations=PRUNING_WALKS,
        seed=seed,
    )


def measure_all(bits: tuple[Width, Width]) -> list[npt.NDArray[np.float64]]:
    """Losses of all assignments on both texts, each of shape (N_SEQUENCES, 4096), columns in the order of `Table`."""
    request, found = request_on(bits, N_SEQUENCES), []
    with session_on(request, FOLDER / f"rtn-{bits[0]}-{bits[1]}") as session:
        points = Enumeration(SearchSpace.uniform(bits, session.sizes.step_bytes(bits))).propose()
        for path in texts():
            tokens = calibration_set(request.replace(calibration=str(path)).text, session.loaded.tokenizer)
            stage = f"all assignments, {path.stem}"
            with session.game_on(tokens, session.folder.path / f"{path.stem}.jsonl", stage) as game:
                found.append(game.per_sequence(points).T)
    return found


def by_model(bits: tuple[Width, Width], n_sequences: int, seed: int) -> Iterator[Chosen]:
    """What methods choose that look at more than losses between the widths; scores do not depend on the seed."""
    low, high = bits
    budgets = [Budget.parse(f"{low + share * (high - low)}avg") for share in SHARES]
    scores = ("fisher", *names(is_in_paper=True)) if seed == 0 else ()
    with session_on(request_on(bits, n_sequences, seed), FOLDER / f"rtn-{low}-{high}-{n_sequences}") as session:
        for method in ("pruning", *scores):
            plans = make_plans(session, method, budgets, SolverSpec())
            rows = np.array([plan.assignment for plan in plans])
            chosen = np.where(rows == low, LOW, HIGH).astype(np.float32)
            name = f"pruning, M = {PRUNING_WALKS}" if method == "pruning" else method
            yield Chosen(name, plans[0].block_forwards / rows.shape[1], list(chosen))


def by_losses(game: TableGame, space: SearchSpace) -> Iterator[Chosen]:
    """What methods choose that look at losses alone."""
    for name, method in METHODS.items():
        counted = Counted(game)
        choose = method(space, counted)
        yield Chosen(name, counted.forwards, [choose(capacity) for capacity in space.capacities])


def optima(game: TableGame, space: SearchSpace) -> list[Assignment]:
    """The true optimum of each budget."""
    search = run(Enumeration(space), game)
    return [search.choose(capacity) for capacity in space.capacities]


def regrets(bits: tuple[Width, Width], searched: npt.NDArray[np.float64], other: Table) -> Regrets:
    """Cost and regret of every method.

    Args:
        bits: The two widths.
        searched: Losses of all assignments on the text to search on, shape (N_SEQUENCES, 4096).
        other: Mean losses of all assignments on the other text, shape (4096,).
    """
    n = len(other).bit_length() - 1
    capacities = tuple(int(share * n) for share in SHARES)
    found: Regrets = {}
    for n_sequences in GAMES:
        game = TableGame(searched[:n_sequences].mean(axis=0))
        for seed in SEEDS:
            space = SearchSpace.uniform((LOW, HIGH), np.ones(n, dtype=np.int64), capacities, seed)
            judges = [Judge(judging, space, optima(judging, space)) for judging in (game, TableGame(other))]
            optimum = Chosen("optimum", 2 ** (n + 1) / n, optima(game, space))
            for chosen in (*by_losses(game, space), *by_model(bits, n_sequences, seed), optimum):
                by_capacity = dict(zip(capacities, chosen.assignments, strict=True))
                row = [chosen.cost, *(judge(by_capacity.__getitem__) for judge in judges)]
                found.setdefault(chosen.method, {}).setdefault(n_sequences * LENGTH, []).append(row)
    return found


def exact_values(losses: Table) -> dict[str, float]:
    """What the losses of all assignments say about the game, by name for people."""
    n = len(losses).bit_length() - 1
    exact, walks = shapley_interactions(losses), walks_covariance(losses)
    above = np.triu_indices(n, 1)
    return {
        "loss high": losses[0],
        "loss low": losses[-1],
        "correlation of the covariance of walks with exact interactions": np.corrcoef(walks[above], exact[above])[0, 1],
        "share of pairs with the same sign": (np.sign(walks[above]) == np.sign(exact[above])).mean(),
        "size of the covariance over that of interactions": np.abs(walks[above]).mean() / np.abs(exact[above]).mean(),
        "variance that single terms explain": explained_variance(losses, pairs=False),
        "variance that single and pair terms explain": explained_variance(losses, pairs=True),
    }


def shapley_interactions(losses: Table) -> npt.NDArray[np.float64]:
    """Exact Shapley interaction index of all pairs, symmetric with a zero diagonal, shape (n_players, n_players).

    Source: Grabisch and Roubens, An axiomatic approach to the concept of interaction among players in cooperative
    games, 1999.
    """
    n = len(losses).bit_length() - 1
    computer = ExactComputer(lambda members: losses[members.astype(int) @ (1 << np.arange(n))], n)
    values: npt.NDArray[np.float64] = computer("SII", 2).get_n_order_values(2)
    return values


def walks_covariance(losses: Table) -> npt.NDArray[np.float64]:
    """The covariance of marginals that SPQE converges to, shape (n_players, n_players)."""
    n = len(losses).bit_length() - 1
    spqe = SPQE(n, low=LOW, high=HIGH, permutations=COVARIANCE_WALKS, seed=0)
    return run(spqe, TableGame(losses)).estimate().covariance


def explained_variance(losses: Table, *, pairs: bool) -> float:
    """Share of the variance over all assignments that the best additive, or quadratic, function explains."""
    n = len(losses).bit_length() - 1
    q = (np.arange(len(losses))[:, None] >> np.arange(n) & 1).astype(float)
    constant, a, K = best_quadratic(losses)
    if not pairs:  # single terms in z = 2q - 1 do not change when pair terms are left out
        a, K = a + K.sum(axis=1), np.zeros_like(K)
    fitted = constant + q @ a + ((q @ K) * q).sum(axis=1)
    return float(1 - np.var(losses - fitted) / np.var(losses))


def describe(bits: tuple[Width, Width]) -> list[str]:
    """The report on two widths."""
    searched, judging = measure_all(bits)
    found = regrets(bits, searched, judging.mean(axis=0))
    tokens = list(found["optimum"])
    rows = []
    for method, by_tokens in found.items():
        cost = np.mean([cost for cost, *_ in by_tokens[tokens[-1]]])
        cells = [mean_regret([row[k] for row in by_tokens[n]]) for n in tokens for k in (1, 2)]
        rows.append([method, f"{cost:.0f}", *cells])
    values = exact_values(searched.mean(axis=0))
    head = ["method", "cost", *(f"{n} tokens: {text}" for n in tokens for text in ("searched", "other text"))]
    return [
        f"## rtn, {bits[0]} and {bits[1]} bits",
        "",
        *(f"* {name}: {value:.4f}" for name, value in values.items()),
        "",
        *table(head, rows),
        "",
    ]


def main() -> None:
    """Measure all assignments at both pairs of widths, run all methods, and write the report."""
    command_line(__doc__).parse_args()
    training = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    scores = training["validation"]["float16"]
    head = [
        "Written by `python benchmarks/enumerated.py`. The model of `benchmarks/train.py`, a Llama of twelve",
        f"blocks trained on {training['tokens']:,} tokens (on held-out articles perplexity {scores['perplexity']:.2f}, "
        f"{scores['bits_per_byte']:.3f} bits a byte),",
        "backend rtn; all 4096 assignments measured. Regret is",
        "0 at the optimum and 1 at the mean of random assignments, averaged over budgets that raise",
        f"{', '.join(str(int(12 * share)) for share in SHARES)} of 12 blocks, on the text searched and another.",
        "Cost in forwards of the whole model on the searched tokens. Mean ± standard error over seeds; one-layer",
        "scores and greedy search have no seed.",
        "",
    ]
    write_report(RESULTS / "enumerated.md", [*head, *(line for bits in WIDTHS for line in describe(bits))])


if __name__ == "__main__":
    main()

"""Evolutionary search: one parent, many offspring, and selection on more and more sequences."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from coopq.search.space import Measured, Search, Setting
from coopq.search.solver.quadratic_program import random_fill
from coopq.search.surrogate import Lowered
from coopq.core.types import Assignment, Assignments, Game, Losses

SHARES = (1 / 16, 1 / 4, 1.0)
"""Share of the sequences that each stage of a selection measures."""
_SURVIVORS = (8, 2, 1)
"""What each stage leaves; the parent enters the last one."""
_GENERATIONS = 25
_OFFSPRING = 32


class Evolution:
    """Exchanges widths between random players, a few at a time, and keeps what loses least.

    A generation is the offspring of one parent for each budget. A stage measures what the one before has left on more
    sequences; only the last one, on all of them, has losses that compare with those of other searches. The first
    generation is random assignments that use up the budget.

    Args:
        setting: Widths, sizes, budgets, seed.

    Attributes:
        share: Share of the sequences that the losses of what was proposed last are to be of.
        measured: What was measured on all sequences.

    Source: Sieberling et al., EvoPress, 2024 (arXiv 2410.14649). Choices here: 25 generations of 32, survivors 8, 2 and
    1 on a sixteenth, a quarter and all of the sequences, where theirs are more and vary with the model; the first
    sequences at every generation, not a new sample; the loss, not the divergence from full precision.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._rng = np.random.default_rng([setting.seed, 0])
        self._generation = self._stage = 0
        self._parents: list[Lowered] = []
        self._pools: list[Lowered] = []
        self.share = SHARES[0]
        self.measured = Measured(setting)

    def propose(self) -> Assignments:
        """What is left of this generation."""
        if self._generation > _GENERATIONS:
            return self._setting.assignments(np.zeros((0, self._setting.n_steps), dtype=bool))
        if self._stage == 0:
            self._pools = [self._offspring(budget) for budget in range(len(self._setting.capacities))]
        elif self._stage == len(SHARES) - 1 and self._parents:
            pairs = zip(self._pools, self._parents, strict=True)
            self._pools = [np.concatenate([pool, parent[None]]) for pool, parent in pairs]
        self.share = SHARES[self._stage]
        return self._setting.assignments(np.concatenate(self._pools))

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Select."""
        survivors, start = [], 0
        for pool in self._pools:
            order = np.argsort(losses[start : start + len(pool)], kind="stable")
            survivors.append(pool[order[: _SURVIVORS[self._stage]]])
            start += len(pool)
        self._pools = survivors
        self._stage += 1
        if self._stage == len(SHARES):
            self.measured.add(assignments, losses)
            self._parents = [pool[0] for pool in survivors]
            self._stage = 0
            self._generation += 1

    def choose(self, capacity: int) -> Assignment:
        """The best assignment measured on all sequences."""
        return self._setting.assignments(self.measured.best(capacity)[0])

    def _offspring(self, budget: int) -> Lowered:
        """Mutants of a budget's parent, or random assignments where there is none yet."""
        capacity = self._setting.capacities[budget]
        if not self._parents:
            program = self._setting.program(capacity)
            return np.array([random_fill(program, self._rng) for _ in range(_OFFSPRING)])
        return np.array([self._mutant(self._parents[budget], capacity) for _ in range(_OFFSPRING)])

    def _mutant(self, parent: Lowered, capacity: int) -> Lowered:
        """One to three times, a random raised player is lowered and a random other one raised that then fits."""
        child, costs, owners = parent.copy(), self._setting.costs, self._setting.owners
        program = self._setting.program(capacity)
        for _ in range(min(self._rng.integers(1, 4, size=2))):
            back, lowerable = program.movable(child)
            raised = np.flatnonzero(lowerable)
            if len(raised) == 0:
                break
            down = self._rng.choice(raised)
            slack = capacity - int(costs[~child].sum()) + int(costs[down])
            fitting = np.flatnonzero(back & (owners != owners[down]) & (costs <= slack))
            if len(fitting):
                child[down] = True
                child[self._rng.choice(fitting)] = False
        return child


AnySearch = TypeVar("AnySearch", bound=Search)


def run_search(search: AnySearch, game_of: Callable[[float], Game]) -> AnySearch:
    """Measure what a search proposes, each on the share of the sequences that it asks for: all, if it asks for none.

    Args:
        search: The search.
        game_of: The game on a share of the sequences.
    """
    while len(points := search.propose()):
        share = search.share if isinstance(search, Evolution) else 1.0
        search.learn(points, game_of(share)(points))
    return search

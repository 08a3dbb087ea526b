"""Evolutionary search: one parent, many offspring, and selection on more and more sequences."""

import numpy as np

from coopq.core.types import Assignment, Assignments, Losses
from coopq.search.measured import Measured
from coopq.search.protocol import Search
from coopq.search.solver.local_search import random_fill
from coopq.search.solver.quadratic_program import Steps
from coopq.search.space import SearchSpace

SHARES = (1 / 16, 1 / 4, 1.0)
"""Share of the calibration sequences that each stage of a selection measures. Chosen by hand."""
_SURVIVORS = (8, 2, 1)
"""Points that each stage leaves; the parent enters the last stage. Chosen by hand."""
_GENERATIONS = 25
_OFFSPRING = 32
"""Generations, and points of a generation for each budget. Chosen by hand; EvoPress takes more."""


class Evolution(Search):
    """Exchanges steps between random players, a few at a time, and keeps the offspring of lowest loss.

    A generation is the offspring of one parent for each budget. A selection has stages, each on more sequences than the
    stage before. Only the last stage measures all sequences, so only losses of the last stage enter `measured`. The
    first generation is random points that fill the budget.

    Args:
        space: Players, widths, budgets, seed.

    Source: Sieberling et al., EvoPress, 2024 (arXiv 2410.14649). Different here: 25 generations of 32 offspring, and 8,
    2 and 1 survivors on a sixteenth, a quarter and all of the sequences, where EvoPress takes more, by model; the same
    sequences in every generation, not a new sample; the loss of the run, not always the KL divergence.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._rng = np.random.default_rng([space.seed, 0])
        self._generation = self._stage = 0
        self._parents: list[Steps] = []
        self._pools: list[Steps] = []
        self.share = SHARES[0]
        self.measured = Measured(space)

    def propose(self) -> Assignments:
        """The points that the stages so far have left of this generation."""
        if self._generation > _GENERATIONS:
            return self._space.assignments(np.zeros((0, self._space.n_steps), dtype=bool))
        if self._stage == 0:
            self._pools = [self._offspring(budget) for budget in range(len(self._space.capacities))]
        elif self._stage == len(SHARES) - 1 and self._parents:
            pairs = zip(self._pools, self._parents, strict=True)
            self._pools = [np.concatenate([pool, parent[None]]) for pool, parent in pairs]
        self.share = SHARES[self._stage]
        return self._space.assignments(np.concatenate(self._pools))

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses and select the survivors."""
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
        """The assignment of lowest loss on all sequences, shape (n_players,)."""
        return self._space.assignments(self.measured.best(capacity)[0])

    def _offspring(self, budget: int) -> Steps:
        """Mutants of a budget's parent, or random points if there is no parent yet, shape (_OFFSPRING, n_steps)."""
        capacity = self._space.capacities[budget]
        if not self._parents:
            program = self._space.constraint(capacity)
            return np.array([random_fill(program, self._rng) for _ in range(_OFFSPRING)])
        return np.array([self._mutant(self._parents[budget], capacity) for _ in range(_OFFSPRING)])

    def _mutant(self, parent: Steps, capacity: int) -> Steps:
        """The parent after one to three random exchanges: one step down, one step of another player back that fits."""
        child, step_bytes, player_of_step = parent.copy(), self._space.step_bytes, self._space.player_of_step
        program = self._space.constraint(capacity)
        for _ in range(min(self._rng.integers(1, 4, size=2))):
            back, down = program.movable(child)
            candidates = np.flatnonzero(down)
            if len(candidates) == 0:
                break
            lowered = self._rng.choice(candidates)
            slack = capacity - int(step_bytes[~child].sum()) + int(step_bytes[lowered])
            fitting = np.flatnonzero(back & (player_of_step != player_of_step[lowered]) & (step_bytes <= slack))
            if len(fitting):
                child[lowered] = True
                child[self._rng.choice(fitting)] = False
        return child

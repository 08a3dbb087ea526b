"""What tests of coopq and of its plugins share: games with exact answers, and the contract of a backend."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from coopq.quantize import Backend
from coopq.search import Setting
from coopq.core.types import Assignments, Game, Losses, Width

LOW, HIGH = 2, 4
WEIGHT_ONLY = ("rtn", "quanto", "hqq")
"""Backends that quantize one weight at a time, without calibration tokens."""


class TableGame:
    """A game of a few players whose loss is a table, so that everything about it can be enumerated.

    Args:
        table: Loss of each coalition, shape (2**n_players,); bit i of the index says that player i is at `LOW`.
    """

    def __init__(self, table: npt.NDArray[np.float64]) -> None:
        self.table = table
        self.calls = 0

    @property
    def n_players(self) -> int:
        """Number of players."""
        return int(self.table.size).bit_length() - 1

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of the assignments."""
        self.calls += len(assignments)
        return self.table[(assignments == LOW) @ (1 << np.arange(self.n_players))]


class SyntheticGame:
    """A game of any size with a known optimum: an increasing function of a random quadratic.

    Players differ in what they cost alone as blocks of language models do, and interact most with their neighbours.
    The optimum of a budget is that of the quadratic, whatever the function.

    Args:
        n_players: Number of players.
        form: "quadratic", "super-linear", "saturating" or "s-shaped".
        seed: Seed of the quadratic.

    Attributes:
        linear: Of the quadratic, shape (n_players,).
        pairs: Of the quadratic, symmetric with a zero diagonal, shape (n_players, n_players).
    """

    FORMS: ClassVar[dict[str, Callable[[Losses], Losses]]] = {
        "quadratic": lambda u: u,
        "super-linear": lambda u: np.expm1(1.5 * u) / 1.5,
        "saturating": lambda u: -2 * np.expm1(-u / 2),
        "s-shaped": lambda u: 3 / (1 + np.exp(2.5 * (1.5 - u))),
    }

    def __init__(self, n_players: int, form: str, seed: int) -> None:
        rng = np.random.default_rng([seed, n_players, list(self.FORMS).index(form)])
        linear = rng.lognormal(0, 0.8, n_players)
        distance = np.abs(np.subtract.outer(np.arange(n_players), np.arange(n_players)))
        shape = (n_players, n_players)
        pairs = np.triu(rng.normal(0, 1, shape) * np.exp(-distance / 6) + 0.3 * rng.normal(0, 1, shape), 1)
        pairs += pairs.T
        pairs *= 0.3 * linear.mean() / np.sqrt((pairs**2).sum(axis=1).mean())
        # All players lowered are at about 3, where the forms differ.
        scale = 3 / max(linear.sum() + pairs.sum(), linear.sum() / 2)
        self.linear, self.pairs, self._form = linear * scale, pairs * scale, self.FORMS[form]

    @property
    def n_players(self) -> int:
        """Number of players."""
        return len(self.linear)

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of the assignments."""
        q = (assignments == LOW).astype(np.float64)
        return self._form(q @ self.linear + ((q @ self.pairs) * q).sum(axis=1))


class SteppedGame:
    """A game of several widths: each step between neighbouring ones is a player of a game of two.

    Args:
        game: The game of two, of as many players as there are steps.
        setting: The widths.
    """

    def __init__(self, game: Game, setting: Setting) -> None:
        self._game, self._setting = game, setting

    @property
    def n_players(self) -> int:
        """Number of players."""
        return self._setting.n_players

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of the assignments."""
        return self._game(np.where(self._setting.lowered(assignments), LOW, HIGH).astype(np.float32))


def check_backend(backend: Backend, weight: torch.Tensor, bits: Width, most_steps: float = 1.0) -> None:
    """The contract: sizes are as predicted, and what runs packed is what the bank holds.

    Args:
        backend: The backend.
        weight: A weight of shape (out, in), float32.
        bits: One of its widths.
        most_steps: How far a weight may move, in steps of an even grid of so many bits.
    Raises:
        AssertionError: If a promise of `coopq.quantize.Backend` is broken.
    """
    shape = (weight.shape[0], weight.shape[1])
    packed = backend.quantize(weight, bits)
    n_bytes = sum(tensor.nbytes for tensor in packed.values())
    assert n_bytes == backend.storage_bytes(shape, bits), (n_bytes, backend.storage_bytes(shape, bits))
    assert n_bytes * 8 < (bits + 2.1) * weight.numel(), "weights must be packed"
    restored = backend.dequantize(packed, shape, bits, weight.dtype)
    assert restored.shape == weight.shape
    assert restored.dtype == weight.dtype
    again = backend.dequantize(backend.quantize(weight, bits), shape, bits, weight.dtype)
    assert torch.equal(restored, again), "quantizing twice must give the same weights"
    spread = float(weight.max() - weight.min())
    step = spread / (2**bits - 1)
    assert float((restored - weight).abs().max()) <= most_steps * step, "no weight may move by more than a step"
    inputs, bias = torch.randn(3, shape[1], dtype=weight.dtype), torch.randn(shape[0], dtype=weight.dtype)
    layer = backend.linear(packed, shape, bits, bias, weight.dtype)
    assert torch.allclose(layer(inputs), functional.linear(inputs, restored, bias), atol=1e-4)

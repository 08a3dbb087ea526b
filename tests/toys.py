"""Toy plugins, as docs/extending.md says to write them: a backend, a strategy, a score and an export form."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import Assignment, Assignments, Losses, Player, ProgressCallback, Width
from coopq.export.base_model import BaseModel
from coopq.export.checkpoint import SavedModel
from coopq.export.formats import Form
from coopq.game.sensitivity import Sensitivity
from coopq.plan.plan import Plan
from coopq.plan.scores import Gains
from coopq.quantizers.backend import Backend, Packed, WeightQuantizer
from coopq.quantizers.packed_modules import PackedLinear
from coopq.search import Measured, SearchSpace


class ToyBackend(WeightQuantizer):
    """One scale for a whole weight, codes of a byte each."""

    name: ClassVar[str] = "toy"
    bits: ClassVar[tuple[Width, ...]] = (2, 4)

    def __init__(self) -> None:
        pass

    @property
    def version(self) -> str:
        return "1"

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def quantize(self, weight: Tensor, bits: Width) -> Packed:
        most = 2 ** (int(bits) - 1) - 1
        scale = (weight.float().abs().max() / most).half().reshape(1)
        rows = -(-weight.numel() * int(bits) // 8)  # bytes as a packed form would have them
        codes = (weight.float() / scale.float()).round().clamp(-most, most).to(torch.int8).flatten()
        shifted = (codes + most).to(torch.uint8).reshape(-1, 8 // int(bits))
        places = torch.arange(0, 8, int(bits))
        packed = (shifted.long() << places).sum(dim=1).to(torch.uint8)
        assert len(packed) == rows
        return {"codes": packed, "scale": scale}

    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        most, places = 2 ** (int(bits) - 1) - 1, torch.arange(0, 8, int(bits))
        codes = (packed["codes"].long().unsqueeze(1) >> places & 2 ** int(bits) - 1).flatten() - most
        return (codes.float() * packed["scale"].float()).reshape(shape).to(dtype)

    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: Width, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        return PackedLinear(self, packed, shape, bits, bias, dtype)

    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        return shape[0] * shape[1] * int(bits) // 8 + 2


class ToySearch:
    """Ten random assignments that keep the budgets; the best of them wins."""

    share = 1.0

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self.measured = Measured(space)

    def propose(self) -> Assignments:
        if len(self.measured):
            return self._space.assignments(np.zeros((0, self._space.n_steps), dtype=bool))
        rng = np.random.default_rng(self._space.seed)
        lowest = np.ones((1, self._space.n_steps), dtype=bool)
        drawn = rng.random((10, self._space.n_steps)) < 0.5
        fitting = drawn[(~drawn @ self._space.step_bytes) <= min(self._space.capacities)]
        return self._space.assignments(np.concatenate([lowest, fitting]))

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        self.measured.add(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        return self._space.assignments(self.measured.best(capacity)[0])


def largest_weights(sensitivity: Sensitivity) -> Gains:
    """A score: players with the largest weights are raised first."""
    return np.array(
        [
            max(float(weight.abs().max()) for weight in sensitivity.weights(player).values())
            for player in range(len(sensitivity.players))
        ]
    )


class ToyForm(Form):
    """A form that is a copy of what coopq saves, with eight bytes more."""

    def check(self, backend: Backend) -> None:
        pass

    def player_sizes(
        self, ours: Sizes, request: Request, skeleton: Any, players: Sequence[Player], backend: Backend
    ) -> Sizes:
        return Sizes(ours.n_weights, ours.n_bytes, fixed=8)

    def file_bytes(self, plan: Plan, backend: Backend, base: BaseModel) -> int:
        return plan.bytes + 8

    def write(self, saved: SavedModel, out: Path, base: BaseModel, progress: ProgressCallback) -> int:
        shutil.copytree(saved.folder, out)
        return saved.plan.bytes + 8

"""No float64 on devices without it, as Apple's MPS: a CPU stands for the device, marked tensors for the host."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from coopq.core.sizes import Budget
from coopq.core.specs import Request, SolverSpec
from coopq.game.prepared import prepare
from coopq.game.session import open_session
from coopq.model.load import load_model
from coopq.model.matrices import in_float64
from coopq.plan.methods import make_plans, names
from coopq.quantizers.ggml.gptq import elimination_order
from coopq.quantizers.input_statistics import column_importance
from tests.conftest import STORIES

SCORES = [name for name in names(kind="score") if name not in ("random", "uniform")]


class OnHost(torch.Tensor):
    """A tensor in the host's memory; what is made of it is too."""


class NoFloat64(TorchFunctionMode):
    """Refuses float64 tensors that `in_float64` did not make."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        caller = sys._getframe(1)
        assert caller.f_back is not None
        callers = (caller.f_code, caller.f_back.f_code)  # another mode may lie between
        is_moved = function is torch.Tensor.double and in_float64.__code__ in callers
        if is_moved or function in (torch.Tensor.cpu, torch.from_numpy):
            return made.as_subclass(OnHost)
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float64 and not isinstance(each, OnHost):
                raise AssertionError(f"{function} makes float64 on the device")
        return made


def test_float64_is_found() -> None:
    with NoFloat64():
        in_float64(torch.ones(3)).sum()
        with pytest.raises(AssertionError, match="float64 on the device"):
            torch.ones(3).sum(dtype=torch.float64)


@pytest.mark.parametrize("loss", ["nll", "kl"])
@pytest.mark.parametrize("backend", ["rtn", "hqq"])
def test_a_session_makes_no_float64_on_the_device(backend: str, loss: str, tmp_path: Path) -> None:
    options = {"backend": backend, "loss": loss, "tokens": 128, "sequence_length": 64, "embeddings": loss == "kl"}
    request = Request.from_options(model=str(STORIES), **options)
    with NoFloat64(), open_session(prepare(request), tmp_path) as session:
        points = np.array([[2] * len(session.players), [4] * len(session.players)], dtype=np.float32)
        with session.game("measuring") as game:
            assert np.isfinite(game(points)).all()
        for method in SCORES if backend == "rtn" and loss == "nll" else ():
            assert make_plans(session, method, [Budget.parse("3avg")], SolverSpec())


def test_statistics_make_no_float64_on_the_device() -> None:
    tokens = np.random.default_rng(0).integers(3, 97, size=(2, 32))
    model = load_model(str(STORIES)).model
    with NoFloat64():
        column_importance(model, ["model.layers.0.mlp.down_proj"], tokens)
        elimination_order(torch.eye(32))

"""Sensitivities of tiny models, on tokens that tests compute the same by other ways from."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from coopq.game.engines.prefix_engine import make_engine
from coopq.game.sensitivity import Sensitivity
from coopq.model.load import LoadedModel
from coopq.model.players import find_players
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.rtn import RTNBackend

TOKENS = np.random.default_rng(0).integers(3, 97, size=(18, 30))  # two batches


def make_sensitivity(model: Any, folder: Path, granularity: str = "block") -> Sensitivity:
    """The sensitivity of a model at 2 and 4 bits."""
    loaded = LoadedModel(model, None, torch.float32)
    bank = WeightBank(folder, loaded, find_players(model, granularity), RTNBackend(group_size=16), {})
    bank.build((2, 4))
    return Sensitivity(make_engine(model, bank, TOKENS).blockwise, bank, 2, 4)

"""Tokens and banks that tests of the engines measure losses with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from coopq.model.load import LoadedModel
from coopq.model.players import find_players
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.rtn import RTNBackend

TOKENS = np.random.default_rng(0).integers(3, 97, size=(20, 40))
"""Two batches of sequences for the tiny models."""


def build(model: Any, folder: Path, granularity: str = "block") -> WeightBank:
    """A bank of a model at 2 and 4 bits."""
    loaded = LoadedModel(model, None, torch.float32)
    bank = WeightBank(folder, loaded, find_players(model, granularity), RTNBackend(group_size=16), {})
    bank.build((2, 4))
    return bank

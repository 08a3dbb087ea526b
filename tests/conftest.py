import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: no test asks the network

STORIES = Path(__file__).parent / "data" / "stories260k"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def stories() -> str:
    """A real Llama of 260,000 parameters: 5 layers, 64 wide, trained on TinyStories."""
    return str(STORIES)

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.command_line import PAPER, command

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: no test asks the network

# The same examples in every run, however slow a busy machine draws them.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job: out/ holds the model, out-run/ the work."""
    out = tmp_path_factory.mktemp("job") / "out"
    code, _, err = command("quantize", STORIES, "--budget", "3avg", "--out", out, *PAPER)
    assert code == 0, err
    return out


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished job to break."""
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(finished.with_name("out-run"), tmp_path / "out-run")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search: out/ holds the model, out-run/ the work and the page."""
    from tests.pages import search  # imports STORIES from here

    return search(tmp_path_factory.mktemp("page") / "out")


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """The page of a comparison."""
    from tests.pages import comparison_page  # imports STORIES from here

    return comparison_page(tmp_path)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """The page of a run with 210 players and nine widths."""
    from tests.pages import large_page  # imports STORIES from here

    return large_page(tmp_path)

"""An open session turns what a device lacks into one line."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coopq.core.errors import OutOfMemory
from coopq.core.specs import Request
from coopq.game.prepared import prepare
from coopq.game.sensitivity import Sensitivity
from coopq.game.session import Session, open_session
from tests.conftest import STORIES

REQUEST = Request.from_options(model=str(STORIES), tokens=64, sequence_length=64)


def measure(session: Session) -> None:
    with session.game("measuring") as game:
        game(np.full((1, 5), len(game.journal) + 2, dtype=np.float32))


def differentiate(session: Session) -> None:
    list(Sensitivity(session.engine(session.calibration).blockwise, session.bank, 2, 4).gradients())


@pytest.mark.parametrize("work", [measure, differentiate])
def test_a_device_that_runs_out_of_memory(work: object, tmp_path: Path) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    def run() -> None:
        with open_session(prepare(REQUEST), tmp_path / "run") as session:
            measure(session)
            session.loaded.model.model.layers[3].mlp.register_forward_hook(run_out)
            assert callable(work)
            work(session)

    with pytest.raises(OutOfMemory, match=r"^the device ran out of memory; .*--sequence-length.* nothing computed is"):
        run()
    assert (tmp_path / "run" / "journal.jsonl").read_bytes().count(b"\n") == 2, "the loss is kept"

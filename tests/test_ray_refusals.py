"""What goes wrong on a Ray cluster is one line, and what can be known early is said before the model is loaded."""

from copy import copy
from pathlib import Path

import numpy as np
import pytest

from coopq.core.errors import EstimationError, Mismatch
from coopq.core.specs import Request
from coopq.game.engines.ray_cluster import Cluster, RayConfig
from coopq.game.prepared import Prepared, prepare
from coopq.game.session import open_session
from tests.conftest import STORIES

REQUEST = Request.from_options(model=str(STORIES), tokens=64, sequence_length=64)
POINTS = np.full((1, 5), 4, dtype=np.float32)

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


def test_what_a_worker_raises_comes_back_in_one_line(tmp_path: Path) -> None:
    where = RayConfig("local", 1)
    with open_session(prepare(REQUEST), tmp_path / "run", ray=where) as session:
        cluster, tokens = session.cluster, session.calibration.tokens
        assert isinstance(cluster, Cluster)
        with pytest.raises(EstimationError, match=r"^loss 'no loss' is unknown; choose from nll, kl$"):
            list(cluster.evaluate("tokens", tokens, POINTS, "no loss"))
        with pytest.raises(EstimationError, match=r"^a worker failed \(.*\)$"):
            list(cluster.evaluate("tokens", tokens, POINTS[:, :2], "nll"))
        cluster._ray.kill(cluster.workers[0])
        with pytest.raises(EstimationError, match=r"^a worker is lost \(.*\); run the same command again to go on$"):
            list(cluster.evaluate("tokens", tokens, POINTS, "nll"))
        weights = {key: value for key, value in session.fingerprint.items() if key not in ("tokens", "bos", "loss")}
        astray = Cluster(where, session, {**weights, "weights": "of another model"})
        with (
            astray,
            pytest.raises(Mismatch, match=r"^a worker found another model .*the driver's files"),
        ):
            list(astray.evaluate("tokens", tokens, POINTS, "nll"))


def test_a_mismatch_is_the_same_after_a_journey() -> None:
    error = Mismatch("two things", {"name": 1}, {"name": 2}, "choose one")
    assert str(error) == "two things (name: 2 there, 1 here); choose one"
    assert str(copy(error)) == str(error), "as after pickling"


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model is not needed for this")

    monkeypatch.setattr(Prepared, "load", load)


@pytest.mark.usefixtures("no_load")
def test_a_cluster_that_cannot_be_reached_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with pytest.raises(EstimationError, match="no Ray cluster"):
        open_session(prepare(REQUEST), run, ray=RayConfig("127.0.0.1:1")).__enter__()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EstimationError, match="needs Ray"):
        open_session(prepare(REQUEST), run, ray=RayConfig("local")).__enter__()
    assert not run.exists()


def test_a_driver_on_a_gpu_wants_a_gpu_for_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 2.0, "CPU": 64.0})
    monkeypatch.setattr("ray.shutdown", lambda: ended.append(True))
    with RayConfig("local", 2).connected("cuda"), RayConfig("local", 3).connected("cpu"):
        pass
    with pytest.raises(EstimationError, match="2 GPUs for 3 workers"), RayConfig("local", 3).connected("cuda"):
        pass
    assert len(ended) == 3

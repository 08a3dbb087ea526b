"""What a run will take, against what runs take."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from coopq.core.errors import OutOfMemory
from coopq.core.sizes import Budget
from coopq.core.specs import Request, SolverSpec, TextSpec
from coopq.game.prepared import prepare
from coopq.game.session import open_session
from coopq.model import memory
from coopq.model.load import load_model, load_skeleton
from coopq.model.memory import Footprint, free_memory
from coopq.model.players import find_players
from coopq.pipeline import estimate
from coopq.plan.by_score import cost
from coopq.plan.forecast import forecast, forecast_methods
from coopq.plan.methods import METHODS, make_plans
from coopq.search.prior import PRIOR_SCORE
from tests.command_line import command, refused
from tests.conftest import STORIES

REQUEST = Request.from_options(model=str(STORIES), permutations=4, tokens=256, sequence_length=64)


def test_a_skeleton_has_the_footprint_of_the_model() -> None:
    model, skeleton = load_model(str(STORIES)).model, load_skeleton(str(STORIES))
    assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())
    by_model, by_skeleton = (Footprint.estimate(m, find_players(m), REQUEST.text, "cpu") for m in (model, skeleton))
    assert by_model == by_skeleton
    assert by_model.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert by_model.states == (5 + 3) * 64 * 4 * 256  # blocks, the embedding and two in flight; width, bytes, tokens


def test_the_bank_is_as_large_as_foreseen(tmp_path: Path) -> None:
    prepared = prepare(REQUEST)
    with open_session(prepared, tmp_path) as session:
        weights = [session.bank.weights(player, bits) for player in range(5) for bits in (2, 4)]
    assert sum(tensor.nbytes for by_name in weights for tensor in by_name.values()) == prepared.footprint.dequantized
    packed = [load_file(file) for file in (tmp_path / "bank").glob("*.safetensors")]
    assert sum(tensor.nbytes for by_name in packed for tensor in by_name.values()) == prepared.footprint.bank


def test_dequantized_weights_get_what_a_run_leaves() -> None:
    skeleton = load_skeleton(str(STORIES))
    cpu, gpu = (
        Footprint.estimate(skeleton, find_players(skeleton), REQUEST.text, kind, 2, 1000) for kind in ("cpu", "cuda")
    )
    assert cpu.needed == cpu.total - cpu.dequantized + cpu.at_once + 1000
    assert gpu.needed == gpu.total - gpu.dequantized + gpu.at_once  # packed weights can stay on the host
    assert cpu.room(None) is None
    assert cpu.room(2 * cpu.total) is None
    assert cpu.room(cpu.needed) == cpu.at_once
    half = cpu.room(round(1.15 * (cpu.total - cpu.dequantized)) + cpu.dequantized // 2)
    assert half == cpu.dequantized // 2 - 1000
    assert gpu.room(gpu.blocks + gpu.dequantized) == gpu.at_once
    assert gpu.room(2 * gpu.blocks + gpu.dequantized, offloaded=True) is None


def test_too_little_memory_is_refused_with_what_fits() -> None:
    skeleton = load_skeleton(str(STORIES))
    players = find_players(skeleton)
    footprint = Footprint.estimate(skeleton, players, TextSpec(tokens=1024 * 64, sequence_length=64), "cpu")
    free = footprint.needed - 1
    with pytest.raises(OutOfMemory, match="--tokens") as caught:
        footprint.check(free)
    tokens = int(str(caught.value).split("--tokens ")[1].split()[0])
    Footprint.estimate(skeleton, players, TextSpec(tokens=tokens, sequence_length=64), "cpu").check(free)
    footprint.check(footprint.needed)
    footprint.check(None)
    with pytest.raises(OutOfMemory, match="bfloat16"):
        footprint.check(footprint.weights)


@pytest.fixture
def too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that holds no model, and where none may be loaded."""

    def not_loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded though it does not fit")

    for module in ("coopq.game.prepared", "coopq.plan.forecast"):
        monkeypatch.setattr(f"{module}.free_memory", lambda device: 1000)
    monkeypatch.setattr("coopq.game.prepared.load_model", not_loaded)


@pytest.mark.usefixtures("too_small")
def test_a_run_that_does_not_fit_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    line = refused("quantize", STORIES, "--budget", "3avg", "--out", tmp_path / "out")
    assert "are free on the cpu" in line
    assert not (tmp_path / "out-run" / "bank").exists()


@pytest.mark.usefixtures("too_small")
def test_a_dry_run_says_what_does_not_fit_without_times() -> None:
    code, out, err = command("estimate", STORIES, "--dry-run", "--tokens", "256", "--sequence-length", "64")
    assert code == 0, err
    flat = " ".join(out.split())
    assert "it does not fit here: the run needs" in flat
    assert "no times: one block" in flat
    assert "greedy-down" in flat


def config_alone(folder: Path, **changes: int) -> Path:
    """A folder with the configuration of a model and no weights."""
    folder.mkdir()
    config = json.loads((STORIES / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_dry_run_needs_a_configuration_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config_alone(tmp_path / "bare")
    with monkeypatch.context() as patch:
        patch.setattr("coopq.game.prepared.load_model", None)
        found = forecast(REQUEST.replace(model=str(folder)))
    assert found.problem is None
    assert found.footprint == prepare(REQUEST).footprint
    assert found.block_seconds is not None
    assert found.block_seconds > 0
    assert found.seconds(found.methods["active"])
    assert "holds no model.safetensors" in refused("quantize", folder, "--budget", "3avg", "--out", tmp_path / "out")


def test_tokens_are_multiplied_by_the_experts_that_they_choose(tmp_path: Path) -> None:
    found = []
    for chosen in (2, 8):
        config = {**json.loads((STORIES / "config.json").read_text()), "num_experts_per_tok": chosen}
        config.update(model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=8)
        (folder := tmp_path / str(chosen)).mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        found.append(forecast(REQUEST.replace(model=str(folder), backend="rtn")).block_flops)
    assert found[1] - found[0] == 2 * 256 * 6 * 3 * 64 * 172, "six experts of three matrices"


@pytest.mark.parametrize("bits", [(2, 4), (2, 3, 4, 8)])
def test_the_prior_score_takes_what_is_foreseen(bits: tuple[int, ...], tmp_path: Path) -> None:
    request = REQUEST.replace(bits=bits, backend="rtn")
    with open_session(prepare(request), tmp_path / "run") as session:
        (plan,) = make_plans(session, PRIOR_SCORE, [Budget.parse("3avg")], SolverSpec())
    assert plan.block_forwards == cost(METHODS[PRIOR_SCORE], len(bits)) * 5


def test_a_model_of_70_billion_weights_is_sized_without_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 80}
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256, "max_position_embeddings": 8192}
    folder = config_alone(tmp_path / "large", **shape, **sizes)
    for module in ("coopq.game.prepared", "coopq.plan.forecast"):
        monkeypatch.setattr(f"{module}.free_memory", lambda device: 2**30)
    found = forecast(REQUEST.replace(model=str(folder), backend="rtn", dtype="bfloat16"))
    assert found.footprint.weights > 130e9
    assert 0.25 < found.footprint.bank / (found.footprint.weights / 2) < 1
    assert found.problem is not None
    assert found.untimed is not None
    assert found.block_seconds is None


def write(folder: Path, **files: object) -> None:
    """Files with `_` for `.` in their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n")


def test_free_memory_is_that_of_the_machine_or_of_its_groups(tmp_path: Path) -> None:
    free = free_memory("cpu")
    assert free is None or free > 2**20
    write(tmp_path / "proc", meminfo="MemTotal: 9000 kB\nMemAvailable: 8000 kB")
    assert free_memory("cpu", tmp_path) == 8000 * 1024, "no groups"
    write(tmp_path / "proc" / "self", cgroup="0::/slurm/job")
    top = tmp_path / "sys" / "fs" / "cgroup"
    write(top / "slurm" / "job", memory_max="max", memory_current=100, memory_stat="anon 70\nfile 30\nshmem 10")
    assert free_memory("cpu", tmp_path) == 8000 * 1024, "no limit"
    write(top / "slurm", memory_max=5000, memory_current=1000, memory_stat="anon 700\nfile 300\nshmem 100")
    assert free_memory("cpu", tmp_path) == 5000 - 1000 + 300 - 100, "the limit of the group around it"
    write(top / "slurm" / "job", memory_max=200)
    assert free_memory("cpu", tmp_path) == 200 - 100 + 30 - 10
    write(top, memory_max=90, memory_current=10, memory_stat="anon 7\nfile 3\nshmem 1")
    write(tmp_path / "proc" / "self", cgroup="0::/elsewhere/on/the/host")
    assert free_memory("cpu", tmp_path) == 90 - 10 + 3 - 1, "a container sees its own group as the top"


def test_free_memory_by_control_groups_of_version_1(tmp_path: Path) -> None:
    write(tmp_path / "proc", meminfo="MemAvailable: 8000 kB")
    write(tmp_path / "proc" / "self", cgroup="5:cpu,cpuacct:/other\n4:memory:/job\n0::/")
    group = tmp_path / "sys" / "fs" / "cgroup" / "memory" / "job"
    write(group, memory_limit_in_bytes=5000, memory_usage_in_bytes=900, memory_stat="total_cache 30\ntotal_shmem 10")
    assert free_memory("cpu", tmp_path) == 5000 - 900 + 30 - 10


def test_what_does_not_fit_even_with_blocks_on_the_host_says_that_size() -> None:
    skeleton = load_skeleton(str(STORIES))
    footprint = Footprint.estimate(skeleton, find_players(skeleton), REQUEST.text, "cuda")
    assert footprint.needed_offloaded < footprint.needed
    with pytest.raises(OutOfMemory, match=r"needs at least .* with its blocks on the host") as caught:
        footprint.check(footprint.needed_offloaded - 1)
    assert memory.gib(footprint.needed_offloaded) in str(caught.value)
    footprint.check(footprint.needed_offloaded)


@pytest.mark.parametrize("granularity", ["block", pytest.param("fused", marks=pytest.mark.slow)])
def test_methods_take_what_was_forecast(granularity: str, tmp_path: Path) -> None:
    request = REQUEST.replace(granularity=granularity)
    prepared = prepare(request)
    expected = forecast_methods(prepared)
    walks = estimate(request, tmp_path / "walks")
    assert expected["coopq, M = 4"].block_forwards == walks.spent.block_forwards
    with open_session(prepared, tmp_path / "run") as session:
        for method in ("greedy-down", "active"):
            (plan,) = make_plans(session, method, [Budget.parse("3avg")], SolverSpec())
            work = expected[method]
            if work.is_bound:
                assert plan.block_forwards <= work.block_forwards
            else:
                assert plan.block_forwards == pytest.approx(work.block_forwards, rel=0.35)


def test_a_run_with_little_memory_has_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.array([[2, 4, 2, 4, 4], [4, 4, 4, 4, 4]], dtype=np.float32)
    found, needed = [], prepare(REQUEST).footprint.needed
    for free in (None, needed):
        monkeypatch.setattr("coopq.game.prepared.free_memory", lambda device, free=free: free)
        with open_session(prepare(REQUEST), tmp_path / str(free)) as session, session.game("measuring") as game:
            assert (session.bank._room is None) == (free is None)
            found.append(game(points))
    np.testing.assert_array_equal(found[0], found[1])


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(tmp_path: Path) -> None:
    arguments: list[str | Path] = ["estimate", STORIES, "--dry-run", "--permutations", "4", "--tokens", "256"]
    code, out, err = command(*arguments, "--sequence-length", "64", "--run", tmp_path / "run", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["methods"]["active"]["seconds"] > 0
    assert data["block_seconds"] > 0
    assert not (tmp_path / "run").exists()
    assert prepare(REQUEST).fit()[0].weights == data["footprint"]["weights"]
    code, out, err = command(*arguments, "--sequence-length", "64")
    assert code == 0, err
    assert "greedy-down" in out
    assert "GiB of memory" in out
    assert "of disk" in out


def test_a_dry_run_knows_the_limit_of_the_search(tmp_path: Path) -> None:
    arguments: list[str | Path] = ["quantize", STORIES, "--size", "3avg", "--out", tmp_path / "out", "--dry-run"]
    code, out, err = command(*arguments, "--forwards", "7", "--json")
    assert code == 0, err
    found = json.loads(out)["methods"]
    assert 0 < found["active, --forwards 7"]["block_forwards"] <= 7 * 5 < found["active"]["block_forwards"]
    assert found["active, --forwards 7"]["seconds"] < found["active"]["seconds"]
    text = command(*arguments, "--forwards", "7")[1]
    assert "active, --forwards 7" in " ".join(text.split())


def test_estimate_without_a_folder_says_what_to_do() -> None:
    assert "--dry-run" in refused("estimate", STORIES)

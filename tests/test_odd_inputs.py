"""Inputs that are odd in their name, their place or their age: refused in one line, or taken as they are."""

import importlib.util
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec import structs

from coopq.core.errors import BackendError, InfeasibleBudget, ModelError, OutputError, RunError, is_out_of_memory
from coopq.core.files import cache_folder, expanded, write_record
from coopq.core.recipes import RECIPES
from coopq.core.sizes import Budget, Sizes
from coopq.core.types import silent
from coopq.export.base_model import BaseModel
from coopq.export.checkpoint import SavedModel
from coopq.export.formats import get_form
from coopq.game.prepared import prepare
from coopq.game.run_folder import Delivered, RunFolder
from coopq.judge.bench import results
from coopq.judge.engines.engine_check import _end
from coopq.judge.judge import Judge
from coopq.judge.results import Comparison, Divergence, Estimate, Evaluation, JudgedPlan, keep_judged, kept_judged
from coopq.model.load import config_positions
from coopq.model.sources import gguf
from coopq.plan.plan import Plan, interrupted_plans
from coopq.plan.searches.front import front_of
from coopq.quantizers.input_statistics import column_importance
from coopq.report.page.run.page import save_run_page
from coopq.report.page.saved import _made
from tests.architectures import tiny_model
from tests.checkpoints import plan_for
from tests.command_line import FAST, as_written, command, refused
from tests.conftest import STORIES
from tests.gguf_files import write_gguf

RECORDED = Path(__file__).parents[1] / "docs" / "results" / "small"


@pytest.mark.parametrize("config", ["{}", '{"model_type": "no_such_type"}'])
def test_a_configuration_of_no_known_model(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    assert "cannot load model" in refused("evaluate", tmp_path)
    assert "cannot load model" in refused("compare", tmp_path, "--budget", "3avg", "--run", tmp_path / "run", *FAST)


def test_a_model_without_a_limit_of_positions() -> None:
    config = tiny_model("llama").config
    config.max_position_embeddings = -1  # as XLNet says
    assert config_positions(config) is None


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_a_data_set_with_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").touch()
    monkeypatch.chdir(tmp_path)
    line = refused("quantize", STORIES, "--size", "3avg", "--out", tmp_path / "out", "--calibration", "hub:set")
    assert "cannot read data set 'set'" in line


@pytest.mark.parametrize("option", ["--calibration", "--out", "--run"])
def test_a_path_that_is_not_utf_8(option: str, tmp_path: Path) -> None:
    options = {"--out": str(tmp_path / "out"), option: "caf\udce9"}
    words = [word for pair in options.items() for word in pair]
    assert r"'caf\udce9' is not UTF-8; rename it" in refused("quantize", STORIES, "--size", "3avg", *words)


def test_the_root_of_a_disk_has_no_run_folder(tmp_path: Path) -> None:
    assert "/ is the root of a disk" in refused("quantize", STORIES, "--size", "3avg", "--out", "/", *FAST)


def test_a_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(OutputError, match="set XDG_CACHE_HOME to another folder"):
        cache_folder()


def test_a_reason_is_for_the_value_of_the_recipe_alone(tmp_path: Path) -> None:
    written = ("quantize", str(STORIES), "--size", "3.5avg", "--out", str(tmp_path / "out"), "--dry-run")
    _, _, err = as_written(*written)
    assert "bits 2,3,4,8: lower loss" in err
    _, _, err = as_written(*written, "--bits", "3,4")
    assert "loss kl: " in err
    assert "bits" not in err


def test_the_command_that_runs_a_result_keeps_its_path() -> None:
    assert "'/🙂/x'" in RECIPES["coopq"].command("/🙂/x").replace('"', "'")


def test_the_smallest_budget_that_an_error_names_is_feasible() -> None:
    sizes = Sizes(n_weights=(8_000_000_000,), n_bytes={2: (1_234_567_891,), 4: (2_400_000_000,)})
    with pytest.raises(InfeasibleBudget) as refusal:
        sizes.limit(Budget.parse("1KiB"), (2, 4))
    smallest = str(refusal.value).partition("the smallest is ")[2].split(" ")[0]
    assert smallest.endswith("KiB")
    assert sizes.limit(Budget.parse(smallest), (2, 4)) >= 1_234_567_891


def test_a_damaged_gguf_file_to_evaluate_has_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(10))
    line = refused("evaluate", tmp_path / "bad.gguf", "--reference", tmp_path / "bad.gguf")
    assert line.endswith("; download or convert it again")


def test_inputs_that_are_not_finite() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e38)
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(ModelError, match=f"inputs of {name} are not finite"):
        column_importance(model, [name], np.full((1, 8), 5))


def test_a_conversion_is_made_again_where_a_cleaner_has_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write(path: Path, shards: list[Path], folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").touch()
        written.append(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf, "_write_converted", write)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    folder = gguf.convert_gguf(file)
    assert gguf.convert_gguf(file) == folder
    assert len(written) == 1
    (folder / "model.safetensors").unlink()
    assert (gguf.convert_gguf(file) / "model.safetensors").is_file()
    assert len(written) == 2


def test_a_conversion_without_room_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    file = write_gguf(tiny_model("llama"), tmp_path / "model.gguf")
    with pytest.raises(OutputError, match=r"the conversion of model\.gguf needs .*set XDG_CACHE_HOME"):
        gguf.convert_gguf(file)


def test_memory_that_runs_out_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Judge, "judge", no_room)
    assert "the device ran out of memory; end other programs" in refused("evaluate", STORIES)


def test_a_front_of_less_than_nothing(job: Path) -> None:
    assert "--front" in refused("allocate", job.with_name("out-run"), "--front", "-3")


def test_tasks_go_without_a_comparison() -> None:
    assert "and --compare is for texts" in refused("evaluate", STORIES, "--task", "t.jsonl", "--no-compare")


def test_no_other_file_is_replaced_by_a_gguf_file(job: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="exists and is no GGUF file"):
        get_form("gguf").write(SavedModel(job), notes, BaseModel(None, str(STORIES)), silent)
    assert notes.read_text(encoding="utf-8") == "mine"


def test_a_configuration_without_a_token_that_ends_texts() -> None:
    config = SimpleNamespace(get_text_config=SimpleNamespace)
    assert _end(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None), config=config)) is None


def _judged(divergence: Divergence | None, rows: list[Comparison]) -> JudgedPlan:
    return JudgedPlan({"weights": "w"}, [4.0], Evaluation(2.0, 100, 10, 10, "text", divergence), rows)


def test_a_shorter_evaluation_keeps_what_a_longer_one_found(tmp_path: Path) -> None:
    some = Estimate(0.1, (0.0, 0.2))
    row = Comparison("original", None, 1, 16.0, 16.0, "kl", 0.0, 2.0, 7.4, (2.0,))
    keep_judged(tmp_path, _judged(Divergence(some, some, some, some, some), [row]))
    keep_judged(tmp_path, _judged(None, []))
    (kept,) = kept_judged(tmp_path)
    assert kept.rows == [row]
    assert kept.evaluation.divergence is not None


def test_results_on_other_judging_texts_are_not_mixed(tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "results", tmp_path / "results")
    (file,) = (tmp_path / "results").glob("*.json")
    assert len(results.load_results(tmp_path)) == 1
    other = structs.replace(results._read(file), judge_length=64)
    write_record(file.with_name("other.json"), other, results._FORMAT_VERSION)
    with pytest.raises(RunError, match="judging texts of different lengths"):
        results.load_results(tmp_path)


def test_an_interrupted_search_and_a_limit_on_the_loss_are_told_as_they_are(tmp_path: Path) -> None:
    plan = plan_for(tiny_model("llama"), "rtn", 32, (2, 4, 4))
    plan = plan.replace(fingerprint=plan.fingerprint | {"bos": False})
    whole = save_run_page(plan, None, None, tmp_path / "whole.html").read_text(encoding="utf-8")
    assert "forwards of the model over" in whole
    broken = plan.replace(stopped_after="12 losses", block_forwards=0, max_loss=0.25)
    page = save_run_page(broken, None, None, tmp_path / "broken.html").read_text(encoding="utf-8")
    assert "forwards of the model over" not in page
    assert "asked for a loss of at most 0.25 nats per token" in page
    for each, is_told in ((plan, True), (broken, False)):
        each.save(tmp_path / "plan.json")
        assert ("block forwards" in as_written("show", str(tmp_path / "plan.json"))[1]) == is_told


def test_outputs_of_another_engine_are_not_those_of_a_plan(job: Path) -> None:
    run = job.with_name("out-run")
    plan = Plan.load(next((run / "plans").glob("*.json")))
    (run / "saved").mkdir()
    Delivered(out="../mlx", form="mlx", bits=plan.assignment, is_whole=True).save(run / "saved" / "mlx.json")
    assert [saved for saved, _ in _made(plan, run)] == [job]


def test_a_search_that_kept_its_limit_is_not_interrupted(tmp_path: Path) -> None:
    plan = plan_for(tiny_model("llama"), "rtn", 32, (2, 4, 4))
    plan.replace(stopped_after="60 forwards").save(tmp_path / "whole.json")
    plan.replace(stopped_after="12 losses").save(tmp_path / "broken.json")
    (tmp_path / "damaged.json").write_text("{", encoding="utf-8")
    assert interrupted_plans(tmp_path) == [tmp_path / "broken.json"]


def test_the_ways_out_of_recipes_can_be_followed(tmp_path: Path) -> None:
    def line(*options: str) -> str:
        return as_written("quantize", str(STORIES), "--size", "3avg", "--out", str(tmp_path / "out"), *options)[2]

    assert "use --method active" in line("--recipe", "paper", "--minutes", "10")
    assert "use --granularity block" in line("--bits", "2,4", "--method", "pruning")
    assert "use --no-embeddings" in line("--embeddings", "--method", "llm-mq", "--bits", "2,4")


def test_an_allocation_without_walks_names_the_command_that_walks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("quantize", str(STORIES), "--size", "3.5avg", "--run", str(run), *FAST, "--forwards", "1")
    assert as_written(*options, "--out", str(tmp_path / "out"))[0] == 0
    assert "estimate in another run folder, with two widths" in refused("allocate", run, "--budget", "3avg")


def test_an_estimation_that_is_named_can_be_made(job: Path) -> None:
    run = job.with_name("out-run")
    (run / "estimate.json").unlink()
    line = refused("allocate", run, "--budget", "3avg")
    words = shlex.split(line.partition("run: coopq ")[2])
    assert words[0] == "estimate"
    assert as_written(*words)[0] == 0


def test_a_cpu_without_memory_is_no_fault_of_the_model() -> None:
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_the_home_of_an_unknown_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = refused(
        "quantize", STORIES, "--size", "3avg", "--out", tmp_path / "out", "--calibration", "~nobody-here/t.txt"
    )
    assert "no text file at ~nobody-here/t.txt" in line
    assert "~nobody-here/plan.json" in refused("show", "~nobody-here/plan.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/x") == tmp_path / "x"


def test_a_journal_of_another_model_has_no_front(job: Path) -> None:
    run = RunFolder(job.with_name("out-run"))
    with pytest.raises(RunError, match=r"has 5 players, and .* has 35"):
        front_of(run.path, prepare(run.request().replace(granularity="linear")))


def test_an_output_is_not_the_place_of_the_model_on_the_way(job: Path) -> None:
    out = job.with_name("out-run") / "saved" / "model"
    line = refused("quantize", STORIES, "--for", "mlx", "--size", "4avg", "--out", out)
    assert "keeps the model before export; name another --out" in line


def test_a_plan_is_applied_without_the_text_that_it_was_searched_on(job: Path, tmp_path: Path) -> None:
    plan = Plan.load(job / "plan.json")
    plan.replace(request=plan.request.replace(calibration=str(tmp_path / "gone.txt"))).save(tmp_path / "plan.json")
    code, _, err = command("apply", tmp_path / "plan.json", "--out", tmp_path / "again")
    assert code == 0, err


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_gguf_file_without_the_packages_that_read_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(BackendError, match=f"needs the package {package}; run: pip install"):
        gguf.convert_gguf(tmp_path / "model.gguf")

"""One step: a recipe chooses the settings, and the result is what an engine loads."""

import html
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import coopq
from coopq import Goal, Request
from coopq.core.errors import CoopQError, InfeasibleBudget, OptionError, UnsupportedBits
from coopq.core.recipes import RECIPES, recipe_options
from coopq.core.types import UNTOUCHED
from coopq.export.fitting import working_bytes
from coopq.export.formats import TargetFile, get_form
from coopq.export.kv_cache import cache_bytes
from coopq.export.request import fitted_to_model
from coopq.game.prepared import prepare
from coopq.judge.engines.engine_check import _end
from coopq.plan.methods import METHODS
from coopq.plan.plan import Plan
from coopq.plan.searches.front import FrontPoint, _with_knee
from coopq.quantizers import BACKENDS, get_backend
from tests.architectures import tiny_model
from tests.command_line import command, refused

LLAMA = str(Path(__file__).parents[1] / "benchmarks" / "data" / "llama")
QUICK = ["--tokens", "256", "--sequence-length", "128", "--forwards", "8"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_accepted(name: str, stories: str) -> None:
    engine = {"paper": "coopq", "speed": "llama.cpp"}.get(name, name)
    options = {**recipe_options(name, engine, {}), "model": stories}
    method, _ = options.pop("method", "active"), options.pop("alpha", None)
    request = Request.from_options(**options)
    assert method in METHODS
    assert request.quantizer.backend in BACKENDS
    backend = get_backend(request.quantizer, request.widths.bits)
    assert {width for width in request.widths.bits if width != UNTOUCHED} <= set(backend.bits)
    if request.target.form is not None:
        get_form(request.target.form).check(backend)


def test_the_paper_is_one_flag_away() -> None:
    paper = {name: setting.value for name, setting in RECIPES["paper"].settings.items()}
    assert paper["bits"] == (2, 4)
    assert (paper["granularity"], paper["loss"], paper["method"]) == ("block", "nll", "coopq")
    assert (paper["alpha"], paper["permutations"]) == (0.5, 100)


def test_what_a_user_names_goes_before_the_recipe() -> None:
    options = recipe_options("llama.cpp", "llama.cpp", {"backend": "ggml", "tokens": 512})
    assert (options["backend"], options["tokens"], options["target"]) == ("ggml", 512, "gguf")
    with pytest.raises(OptionError, match=r"did you mean 'llama\.cpp'"):
        recipe_options("llama.cp", "llama.cp", {})
    with pytest.raises(OptionError, match="takes the form 'gguf', not 'openvino'"):
        recipe_options("llama.cpp", "llama.cpp", {"target": "openvino"})
    with pytest.raises(
        OptionError, match="widths of recipe 'speed' are for backend 'ggml-gptq', not 'ggml'; name --bits"
    ):
        recipe_options("speed", "llama.cpp", {"backend": "ggml"})
    assert recipe_options("speed", "llama.cpp", {"backend": "ggml", "bits": (2, 3)})["bits"] == (2, 3)
    for name, theirs in (("speed", "llama.cpp"), ("vllm", "vllm")):
        with pytest.raises(OptionError, match=f"recipe '{name}' is not for engine 'openvino'; use --for {theirs}, "):
            recipe_options(name, "openvino", {})


def test_widths_of_a_recipe_that_another_backend_lacks_are_left_out() -> None:
    request = Request.from_options(model=LLAMA, **recipe_options("llama.cpp", "llama.cpp", {"backend": "ggml"}))
    assert fitted_to_model(request, keep_bits=False).widths.bits == (2, 3, 4, 5, 6, 8)
    assert coopq.request_for("llama.cpp", model=LLAMA, backend="ggml").widths.bits == (2, 3, 4, 5, 6, 8)
    assert fitted_to_model(request, keep_bits=True) == request
    with pytest.raises(UnsupportedBits, match=r"backend 'ggml' has no 2\.5 bits"):
        prepare(request)  # widths that a user names


def test_groups_that_divide_the_rows_are_chosen_where_an_engine_needs_them(tmp_path: Path) -> None:
    def chosen(width: int, **options: Any) -> int | None:
        config = LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=3, vocab_size=99
        )
        config.save_pretrained(tmp_path)
        given = recipe_options("vllm", "vllm", {}) | options
        request = Request.from_options(model=str(tmp_path), **given)
        return fitted_to_model(request, keep_bits=True).quantizer.group_size

    assert [chosen(width) for width in (576, 96, 384, 48)] == [64, 32, None, None]
    assert chosen(576, group_size=32) == 32, "a size that the user names"
    assert chosen(576, target=None) is None, "our own form pads rows"


@pytest.mark.parametrize(("engine", "size"), [("vllm", "7bpw"), ("transformers", "5bpw")])
def test_a_model_is_delivered_to_an_engine(engine: str, size: str, tmp_path: Path) -> None:
    out, few = tmp_path / "out", ["--fit-tokens", "256", "--group-size", "32"]
    arguments = ["quantize", LLAMA, "--for", engine, "--size", size, *few, *QUICK, "--out", str(out)]
    code, text, err = command(*arguments)
    assert code == 0, err
    assert f"backend {RECIPES[engine].settings['backend'].value}" in err, "the settings are printed with their reasons"
    assert f"run it: {RECIPES[engine].command(out)}" in text
    (report,) = (tmp_path / "out-run").glob("report-*.html")
    page = report.read_text(encoding="utf-8")
    assert html.escape(RECIPES[engine].command(out.name)) in page
    assert "coopq export" not in page, "the output is there already"
    record = tmp_path / "out-run" / "saved" / "out.json"
    written = record.read_text()
    for damaged in ("{", written.replace('"bits"', '"width"'), written.replace("[", "[8, ", 1)):
        record.write_text(damaged)
        assert "repeat the command" in refused(*arguments)
        assert "repeat the command" in refused("show", tmp_path / "out-run", "--page")
    record.write_text(written)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    code, text, err = command(*arguments, "--json")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before, "a finished job is not repeated"
    plan = Plan.load(record.with_suffix("") / "plan.json")
    written_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert json.loads(text)["file_bytes"] == plan.file_bytes == written_bytes
    code, _, err = command(*[{size: "6bpw"}.get(word, word) for word in arguments])
    assert code == 2
    assert "another budget" in err
    other = [{size: "4.8bpw", str(out): str(tmp_path / "other")}.get(word, word) for word in arguments]
    code, text, err = command(*other, "--run", tmp_path / "out-run", "--json")
    assert code == 0, err
    assert json.loads(text)["file_bytes"] < sum(path.stat().st_size for path in out.glob("*.safetensors"))
    same_name = [{str(out): str(tmp_path / "else" / "out")}.get(word, word) for word in arguments]
    assert "made out as" in refused(*same_name, "--run", tmp_path / "out-run")
    whole = json.loads(written)
    assert whole["is_whole"]
    assert whole["out"] == "../out"


def test_widths_that_a_user_names_are_not_left_out_in_silence(tmp_path: Path) -> None:
    out = tmp_path / "out"
    named = refused("quantize", LLAMA, "--backend", "quanto", "--bits", "2,3,4,8", "--size", "3bpw", "--out", out)
    assert "backend 'quanto' has no 3 bits" in named, "they are the widths of the default recipe too"


def test_a_recipe_s_embeddings_can_be_left_out(tmp_path: Path) -> None:
    out = str(tmp_path / "out.gguf")
    arguments = ["quantize", LLAMA, "--for", "llama.cpp", "--size", "3.5bpw", "--out", out, "--dry-run", "--json"]
    with_ends, without = (json.loads(command(*arguments, *more)[1])["n_players"] for more in ([], ["--no-embeddings"]))
    assert with_ends == without + 1


def test_a_dry_run_takes_the_recipe_and_leaves_nothing(tmp_path: Path) -> None:
    code, text, err = command(
        "quantize", LLAMA, "--for", "vllm", "--size", "7bpw", "--out", tmp_path / "out", "--dry-run"
    )
    assert code == 0, err
    assert "active" in text
    assert "backend gptq-static" in err
    assert not list(tmp_path.iterdir())


def test_the_command_to_run_is_quoted() -> None:
    for name, recipe in RECIPES.items():
        words = shlex.split(recipe.command("my 'own' model"))
        assert len(words) == len(recipe.run), name
        if words[1] == "-c":
            compile(words[2], name, "exec")
    assert shlex.split(RECIPES["vllm"].command("a b")) == ["vllm", "serve", "a b"]


def test_wrong_targets_are_named_before_the_work(stories: str, tmp_path: Path) -> None:
    request = Request.from_options(model=stories)
    with pytest.raises(OptionError, match="target = None is loaded by no engine of a recipe; use one of auto-round, "):
        coopq.deliver(request, Goal(budget="3avg"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_was_there_is_not_written_over(stories: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code, _, err = command("quantize", stories, "--for", "vllm", "--size", "7bpw", *QUICK, "--out", tmp_path / "out")
    assert code == 2
    assert "this command did not make it" in err
    out, work = tmp_path / "other", tmp_path / "other" / "work"
    within = refused("quantize", stories, "--for", "vllm", "--size", "7bpw", *QUICK, "--out", out, "--run", work)
    assert "lies in, the output folder" in within
    assert not work.exists()


def test_a_memory_to_fit_in_holds_the_cache_too(stories: str, tmp_path: Path) -> None:
    request = Request.from_options(model=stories, granularity="fused", tokens=256, sequence_length=128, context=512)
    prepared = prepare(request, target=TargetFile())
    beside = cache_bytes(prepared.skeleton, 512) + working_bytes(prepared.skeleton) + prepared.sizes.fixed
    smallest = prepared.sizes.total_bytes([2] * len(prepared.players))
    fit = f"{beside + smallest + 30_000}B"
    plan = coopq.quantize(request, Goal(fit=fit, forwards=5), tmp_path / "out")
    assert smallest < plan.bytes <= smallest + 30_000
    assert coopq.quantize(request, Goal(fit=fit, forwards=5), tmp_path / "out") == plan
    roomy = coopq.quantize(request, Goal(fit="1GiB", forwards=5), tmp_path / "roomy")
    assert set(roomy.assignment) == {4}, "where all fits, all are at the highest width"
    with pytest.raises(InfeasibleBudget, match="KV cache of 512 tokens"):
        coopq.quantize(request, Goal(fit="100kB"), tmp_path / "small")
    with pytest.raises(OptionError, match="--context"):
        coopq.quantize(request.replace(context=None), Goal(fit="1GiB"), tmp_path / "small")
    with pytest.raises(OptionError, match="is no number of bytes"):
        Goal(fit="3bpw")


def test_a_front_has_a_knee_where_bytes_begin_to_gain_less() -> None:
    def knees(*losses: float) -> list[bool]:
        points = [FrontPoint(1000 * at, 2.0 + at, loss, None) for at, loss in enumerate(losses, 1)]
        return [point.is_knee for point in _with_knee(points)]

    assert knees(1.0, 0.2, 0.15, 0.12) == [False, True, False, False]
    for straight in ((1.0, 0.5, 0.25, 0.125), (0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0.1)):
        assert not any(knees(*straight)), "bytes gain nothing less than before"


def test_a_file_larger_than_the_widest_weights_holds_them(
    stories: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["quantize", stories, "--size", "90MB", *QUICK, "--out", str(tmp_path / "out")]
    code, _, err = command(*arguments)
    assert code == 0, err
    assert "budget 90MB holds all layers at their widest: there is nothing to choose" in caplog.messages
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert set(plan.assignment) == {4}


def test_the_front_is_read_from_a_run(stories: str, tmp_path: Path) -> None:
    run = tmp_path / "out-run"
    with pytest.raises(CoopQError):
        _front(run)
    arguments = ["quantize", stories, "--size", "4bpw", *QUICK[:-1], "30", "--out", str(tmp_path / "out")]
    assert command(*arguments)[0] == 0
    points = _front(run)
    sizes = [point["n_bytes"] for point in points]
    measured = [point["measured"] for point in points if point["measured"] is not None]
    assert sizes == sorted(sizes)
    assert measured == sorted(measured, reverse=True), "more bytes lose no more"
    assert sum(point["is_knee"] for point in points) == 1
    assert all(point["predicted"] is not None for point in points if point["measured"] is not None)
    code, text, _ = command("front", run)
    assert code == 0
    assert "knee" in text
    (report,) = run.glob("report-*.html")
    assert text.rstrip().endswith(f"report: {report}")


def _front(run: Path) -> list[dict[str, Any]]:
    code, out, err = command("front", run, "--json")
    if code:
        raise CoopQError(err)
    found: list[dict[str, Any]] = json.loads(out)
    return found


@pytest.mark.real
@pytest.mark.parametrize("granularity", ["fused", "block"])
def test_a_recipe_has_only_widths_of_use_for_a_base_that_is_quantized(granularity: str) -> None:
    settings = {name: setting.value for name, setting in RECIPES["llama.cpp"].settings.items()}
    options = {**settings, "granularity": granularity, "target": "gguf"}
    request = Request.from_options(model="demo", **options)
    request = fitted_to_model(request, keep_bits=False)
    assert request.widths.bits == (2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 16), "6 and 8 bits are larger than the base's"
    assert prepare(request, target=TargetFile()).player_widths, "accepted"


def test_a_model_may_have_no_token_that_ends_a_text() -> None:
    model = tiny_model("llama")
    for ends, found in ((None, None), (0, 0), ([3, 4], 3)):
        model.generation_config.eos_token_id, model.config.eos_token_id = ends, None
        assert _end(model) == found

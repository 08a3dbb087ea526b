"""What is saved is true: it computes what was chosen, answers only the request it was made for, harms no input."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import coopq
from coopq import Goal, Request
from coopq.cli.main import app
from coopq.core.errors import ModelError, OutputError
from coopq.core.files import require_no_input
from coopq.core.types import UNTOUCHED
from coopq.export.folders.folder_files import SOURCE_CARD, copy_source_files, write_model_card
from coopq.export.formats import export_model
from coopq.game.engines.prefix_engine import model_nll
from coopq.model.load import LoadedModel
from coopq.plan.plan import Plan
from coopq.quantizers.packed_modules import PackedLinear
from tests.architectures import COMMON, GROUPED, tiny_model
from tests.checkpoints import Tokenizer, plan_for, save

GOAL = Goal(budget="3avg", method="first-last")


def request_of(model: str | Path, **options: Any) -> Request:
    settings = {"bits": (2, 4), "tokens": 64, "sequence_length": 32, "device": "cpu"} | options
    return Request.from_options(model=str(model), **settings)


def copied(stories: str, place: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None) -> Path:
    """A copy of the story model, with some tensors changed."""
    shutil.copytree(stories, place, dirs_exist_ok=True)
    if change is not None:
        tensors = load_file(place / "model.safetensors")
        change(tensors)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def nll(model: Any) -> float:
    tokens = np.random.default_rng(0).integers(3, 97, (2, 24))
    return float(np.concatenate(list(model_nll(model, tokens))).mean())


@pytest.mark.parametrize(
    "config",
    [
        lambda: hf.CamembertConfig(**COMMON, intermediate_size=64, is_decoder=True),
        lambda: hf.RobertaConfig(**COMMON, intermediate_size=64, is_decoder=True),
        lambda: hf.BertConfig(**COMMON, intermediate_size=64, is_decoder=True),
        lambda: hf.Gemma3TextConfig(**GROUPED, query_pre_attn_scalar=8),
    ],
)
def test_a_tied_weight_is_loaded_whatever_its_name_in_the_file(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config(), dtype=torch.float32).eval()
    plan = plan_for(model, "rtn", 16, [8] * 3)
    save(LoadedModel(model, Tokenizer(), torch.float32), plan, tmp_path / "saved")
    losses = [nll(coopq.load(tmp_path / "saved", device="cpu")) for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(nll(model), rel=1e-2)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_head_of_its_own_is_saved_though_the_configuration_ties_it(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    assert model.config.tie_word_embeddings
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    save(LoadedModel(model, Tokenizer(), torch.float32), plan_for(model, "rtn", 16, [8] * 3), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    assert nll(coopq.load(tmp_path / "saved", device="cpu")) == pytest.approx(nll(model), rel=1e-2)


def test_the_saved_configuration_says_the_checkpoints_dtype(tmp_path: Path) -> None:
    model = tiny_model("qwen3").bfloat16().float()
    save(LoadedModel(model, Tokenizer(), torch.bfloat16), plan_for(model, "rtn", 16, [4] * 3), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.config.dtype == torch.float32, "the model's own configuration stays"


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.embed_tokens.weight", "nan"), ("model.norm.weight", "inf"), ("model.layers.2.mlp.up_proj.weight", "-inf")],
)
def test_a_value_that_is_no_number_is_refused_before_the_search(
    name: str, value: str, stories: str, tmp_path: Path
) -> None:
    source = copied(stories, tmp_path / "model", lambda tensors: tensors[name].view(-1)[-1:].fill_(float(value)))
    with pytest.raises(ModelError, match=rf"not finite .*{name}"):
        coopq.quantize(request_of(source), GOAL, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "a refused run leaves nothing behind"


def test_a_saved_tensor_that_is_no_number_is_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = torch.nan
    plan = plan_for(model, "rtn", 16, [4] * 3)
    with pytest.raises(ModelError, match=r"lm_head.weight .*not finite"):
        save(LoadedModel(model, Tokenizer(), torch.float32), plan, tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_an_untouched_weight_beyond_float16_is_saved_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = 1e5
    plan = plan_for(model, "rtn", 16, [4, UNTOUCHED, 4])
    save(LoadedModel(model, Tokenizer(), torch.float32), plan, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "quantized.safetensors")
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.gate_proj.weight"].dtype == torch.float16


def test_a_packed_module_that_the_model_cannot_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: PackedLinear, inputs: torch.Tensor) -> torch.Tensor:
        raise AttributeError("'PackedLinear' object has no attribute 'weight_'")

    monkeypatch.setattr(PackedLinear, "forward", forward)
    model = tiny_model("qwen3")
    with pytest.raises(ModelError, match=r"Qwen3ForCausalLM fails in model.layers.0.self_attn.q_proj \(PackedLinear\)"):
        save(LoadedModel(model, Tokenizer(), torch.float32), plan_for(model, "rtn", 16, [4] * 3), tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_a_saved_model_with_another_loss_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, inputs: 1.5 * right(self, inputs))
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="computes other losses"):
        save(LoadedModel(model, Tokenizer(), torch.float32), plan_for(model, "rtn", 16, [4] * 3), tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(LoadedModel(model, Tokenizer(), torch.float32), plan_for(model, "rtn", 16, [4] * 3), tmp_path / "saved")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dequantized_weights_have_the_names_and_shapes_of_the_model(tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_config(
        hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64), dtype=torch.float32
    ).eval()
    save(LoadedModel(model, Tokenizer(), torch.float32), plan_for(model, "rtn", 16, [8] * 3), tmp_path / "saved")
    found = dict(coopq.dequantized(tmp_path / "saved"))
    parameters = dict(model.named_parameters())
    assert found.keys() <= parameters.keys()
    assert len(found) == 12
    assert all(torch.allclose(weight, parameters[name], atol=0.01) for name, weight in found.items())


@pytest.mark.parametrize(("what", "name"), [("model", "the model"), ("text", "the text")])
def test_a_finished_output_does_not_answer_for_what_changed_under_its_name(
    what: str, name: str, stories: str, tmp_path: Path
) -> None:
    source, text = copied(stories, tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl. " * 200)
    request = request_of(source, calibration=str(text))
    plan = coopq.quantize(request, GOAL, tmp_path / "out")
    assert coopq.quantize(request, GOAL, tmp_path / "out") == plan
    if what == "model":
        copied(stories, source, lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    else:
        text.write_text("The dog sees a red ball in the garden now. " * 200)
    with pytest.raises(OutputError, match=f"{name} .* is not what its model was made from"):
        coopq.quantize(request, GOAL, tmp_path / "out")


def test_the_same_model_by_another_path_is_the_same_model(
    stories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copied(stories, tmp_path / "model")
    plan = coopq.quantize(request_of(source), GOAL, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    source.rename(tmp_path / "moved")
    for name in ("moved", "./moved", "../" + tmp_path.name + "/moved"):
        assert coopq.quantize(request_of(name), GOAL, Path("~/out")) == plan
    shutil.rmtree(tmp_path / "out")
    assert coopq.quantize(request_of("moved"), GOAL, Path("out")).modules == plan.modules, "the run goes on"


@pytest.mark.parametrize(
    ("out", "run"),
    [("model", None), ("model/out", None), ("out", "model/run"), ("out", "model"), ("out", "out"), ("out", "out/run")],
)
def test_outputs_and_run_folders_do_not_touch_inputs_or_each_other(
    out: str, run: str | None, stories: str, tmp_path: Path
) -> None:
    source = copied(stories, tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=r"input|output folder"):
        coopq.quantize(request_of(source), GOAL, tmp_path / out, run=None if run is None else tmp_path / run)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_input_is_recognized_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    (tmp_path / "link.gguf").symlink_to(model)
    (tmp_path / "hard.gguf").hardlink_to(model)
    monkeypatch.setenv("HOME", str(tmp_path))
    for out in ("~/model.gguf", f"{tmp_path}/link.gguf", f"{tmp_path}/hard.gguf", f"{tmp_path}/x/../model.gguf"):
        with pytest.raises(OutputError, match="is the same as the input"):
            require_no_input(Path(out), [model])
    with pytest.raises(OutputError, match="contains the input"):
        require_no_input(tmp_path, [model])
    require_no_input(tmp_path / "other.gguf", [model, tmp_path / "missing"])


def test_an_export_does_not_go_into_the_saved_model(job: Path) -> None:
    plan = Plan.load(job / "plan.json")
    plan.replace(deployment=coopq.QuantizerSpec(backend="gptq", act_order=False, symmetric=True)).save(
        job / "plan.json"
    )
    before = sorted(job.rglob("*"))
    for out in (job, job / "quantized.safetensors", job / "exported"):
        with pytest.raises(OutputError, match="input"):
            export_model(job, "compressed-tensors", out)
    assert sorted(job.rglob("*")) == before


def test_the_sources_licence_and_processors_are_saved_with_a_card(stories: str, tmp_path: Path) -> None:
    source = copied(stories, tmp_path / "model")
    kept = ("LICENSE", "LICENSE.md", "NOTICE.txt", "preprocessor_config.json", "video_preprocessor_config.json")
    for name in (*kept, "chat_template.jinja", "merges.txt", "modeling_own.py", "tokenizer.py", "pytorch_model.bin"):
        (source / name).write_text("{}")
    (source / "README.md").write_bytes(b"---\nlicense: apache-2.0\ntags:\n- stories\n---\n# Stories of Andr\xe9\n")
    plan = coopq.quantize(request_of(source), GOAL, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {*kept, "chat_template.jinja", "merges.txt", SOURCE_CARD, "README.md"} <= names
    assert not any(name.endswith((".py", ".bin")) for name in names)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "library_name: coopq" in card
    assert f"{plan.measured_loss:.5f} nats per token on 64 calibration tokens of c4" in card
    assert str(tmp_path) not in card, "no folder of this machine"


def test_the_commands_of_a_card_make_the_model_again(tmp_path: Path) -> None:
    text = str(tmp_path / "my notes.txt")
    options = {"symmetric": False, "loss": "kl", "calibration": text, "tokens": 4096, "sequence_length": 64}
    plan = plan_for(tiny_model("llama"), "gptq", 16, [4, 8, 8])
    request = plan.request.replace(**options, model="somebody/tiny-1B", device="cuda", bits=(4, 8))
    plan = plan.replace(request=request, alpha=0.25, stopped_after="60 forwards or 5 minutes")
    write_model_card(plan, tmp_path, "coopq", 1000)
    (quantized,) = _commands(tmp_path)
    goal = {"budget": "3avg", "method": "coopq", "alpha": 0.25, "forwards": 60, "minutes": 5.0}
    assert {name: quantized[name] for name in goal} == goal
    made = Request.from_options(**{name: quantized[name] for name in request.options() if name in quantized})
    assert made == request.replace(calibration="my notes.txt", device="auto")
    assert 'coopq.load("FOLDER")' in (tmp_path / "README.md").read_text(), "how to run it"
    deployed = plan.replace(deployment=coopq.QuantizerSpec("rtn", group_size=32), max_loss=2.5)
    write_model_card(deployed, tmp_path, "mlx", 1000, "mlx")
    quantized, applied, exported = _commands(tmp_path)
    assert (quantized["backend"], quantized["max_loss"]) == ("gptq", 2.5)
    assert "budget" not in quantized
    assert (applied["backend"], applied["group_size"], applied["plan"]) == ("rtn", 32, quantized["out"] / "plan.json")
    assert (exported["saved"], exported["to"]) == (applied["out"], "mlx")
    assert "mlx_lm.generate --model FOLDER" in (tmp_path / "README.md").read_text()


def _commands(folder: Path) -> list[dict[str, Any]]:
    """The options of each command of a model card, as the command line reads them."""
    found = []
    for line in (folder / "README.md").read_text().splitlines():
        if line.startswith("coopq "):
            _, name, *words = shlex.split(line)
            command = app.get_command(click.Context(app), name)
            assert command is not None
            given = command.make_context(name, words).params
            found.append({option: value for option, value in given.items() if value is not None})
    return found


def test_files_that_the_tokenizer_wrote_are_not_written_over(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    (out := tmp_path / "out").mkdir()
    (source / "tokenizer.json").write_text("old")
    (source / "tokenizer.model").write_bytes(b"\0")
    (out / "tokenizer.json").write_text("new")
    copy_source_files(source, out)
    assert (out / "tokenizer.json").read_text() == "new"
    assert (out / "tokenizer.model").exists()

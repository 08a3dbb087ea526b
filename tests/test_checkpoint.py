"""What was measured is what ships: packed models on disk against the bank that the search used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

import coopq
from coopq import Goal, Request
from coopq.core.errors import ModelError, OutputError, PlanError
from coopq.core.sizes import Budget
from coopq.core.specs import SolverSpec
from coopq.core.types import UNTOUCHED
from coopq.export.checkpoint import SavedModel, Source, save_model
from coopq.export.folders.folder_files import write_hashes
from coopq.export.folders.stored_tensors import stored_tensors
from coopq.game.engines.prefix_engine import make_engine, model_nll
from coopq.game.prepared import prepare
from coopq.game.session import open_session
from coopq.model.load import LoadedModel, load_model
from coopq.model.matrices import round_untouched
from coopq.model.players import GRANULARITIES, find_players
from coopq.model.sources.gguf import gguf_file
from coopq.plan.methods import make_plans
from coopq.plan.plan import Plan
from coopq.quantizers import get_backend
from coopq.quantizers.bank import WeightBank
from tests.architectures import CONFIGS, tiny_model
from tests.checkpoints import Tokenizer, plan_for, save
from tests.quantizers import WEIGHT_ONLY


def bank_and_saved_nll(loaded: LoadedModel, plan: Plan, tmp_path: Path, tokens: Any) -> tuple[Any, Any]:
    backend = get_backend(plan.quantizer)
    players = find_players(loaded.model, plan.request.widths.granularity)
    round_untouched(loaded, players, plan.assignment)
    bank = WeightBank(tmp_path / "bank", loaded, players, backend, {})
    bank.build(sorted(set(plan.assignment)))
    engine = make_engine(loaded.model, bank, tokens)
    _, measured, _ = next(engine.evaluate(np.array([plan.assignment], dtype=np.float32)))
    saved = SavedModel(tmp_path / "saved")
    n_bytes = plan.file_bytes
    plan = save(loaded, plan, saved.folder, tokens)
    assert plan.file_bytes == (saved.folder / backend.weights_file).stat().st_size > n_bytes, "all tensors and a header"
    assert plan.bytes == saved.n_bytes()
    reloaded = coopq.load(saved.folder, device="cpu")
    return measured, np.concatenate(list(model_nll(reloaded, tokens)))


def test_a_model_is_saved_from_the_bank_without_quantizing_anew(
    stories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request.from_options(
        model=stories, group_size=16, bits=(2, 16), device="cpu", tokens=64, sequence_length=32
    )
    with open_session(prepare(request), tmp_path / "run") as session:
        (plan,) = make_plans(session, "first-last", [Budget.parse("9avg")], SolverSpec())
        monkeypatch.setattr(type(session.backend), "quantize", pytest.fail)
        source = Source(loaded=session.loaded, players=session.players, backend=session.backend, bank=session.bank)
        save_model(source, plan, tmp_path / "ours")
    assert set(plan.assignment) == {2, UNTOUCHED}
    monkeypatch.undo()
    coopq.apply(plan, tmp_path / "anew")
    ours, anew = (load_file(tmp_path / name / "quantized.safetensors") for name in ("ours", "anew"))
    assert ours.keys() == anew.keys()
    assert all(torch.equal(ours[name], anew[name]) for name in ours)


@pytest.mark.parametrize("backend", WEIGHT_ONLY)
def test_the_saved_model_has_the_banks_loss_and_the_predicted_bytes(backend: str, stories: str, tmp_path: Path) -> None:
    loaded = load_model(stories, device="cpu")
    plan = plan_for(loaded.model, backend, None, [4, 2, 8, 2, 4])
    tokens = np.array([loaded.tokenizer.encode("Once upon a time there was a little girl who had a red ball. " * 3)])
    measured, saved = bank_and_saved_nll(loaded, plan, tmp_path, tokens)
    np.testing.assert_allclose(saved, measured, atol=1e-5)
    assert saved.mean() < 6.2, "a real model that still predicts: chance is log 512 = 6.24"


@pytest.mark.parametrize("backend", WEIGHT_ONLY)
def test_linear_layers_of_widths_of_their_own_ship_as_measured(backend: str, stories: str, tmp_path: Path) -> None:
    loaded = load_model(stories, device="cpu")
    bits = np.random.default_rng(0).choice([2, 4, 8, UNTOUCHED], size=35).tolist()
    plan = plan_for(loaded.model, backend, None, bits, "linear")
    tokens = np.array([loaded.tokenizer.encode("Once upon a time there was a little girl who had a red ball. " * 3)])
    measured, saved = bank_and_saved_nll(loaded, plan, tmp_path, tokens)
    np.testing.assert_allclose(saved, measured, atol=1e-5)
    sizes = get_backend(plan.quantizer)
    shapes = {linear.name: linear.shape for player in find_players(loaded.model) for linear in player.linears}
    expected = sum(
        2 * shape[0] * shape[1] if width == UNTOUCHED else sizes.storage_bytes(shape, width)
        for shape, width in zip(shapes.values(), bits, strict=True)
    )
    assert SavedModel(tmp_path / "saved").n_bytes() == expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_saved_and_loaded(name: str, granularity: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    loaded = LoadedModel(model, Tokenizer(), torch.float32)
    n_players = len(find_players(model, granularity))
    plan = plan_for(model, "rtn", 16, [[3, 8, UNTOUCHED][player % 3] for player in range(n_players)], granularity)
    measured, saved = bank_and_saved_nll(loaded, plan, tmp_path, np.random.default_rng(0).integers(3, 97, (4, 24)))
    np.testing.assert_allclose(saved, measured, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_of_a_saved_model_are_predicted_without_weights(name: str) -> None:
    model, dtype = tiny_model(name).bfloat16().float(), torch.bfloat16
    with torch.device("meta"):
        skeleton = tiny_model(name)
    names = [linear.name for player in find_players(model, embeddings=True) for linear in player.linears]
    widths = {name: [4, UNTOUCHED][index % 2] for index, name in enumerate(names)}
    stored, predicted = (
        {key: (tensor.shape, tensor.dtype) for key, tensor in stored_tensors(which, widths, dtype)}
        for which in (model, skeleton)
    )
    assert stored == predicted
    assert not [name for name in names if widths[name] == 4 and f"{name}.weight" in stored]


def test_two_bit_weights_take_two_bits_on_disk(stories: str, tmp_path: Path) -> None:
    loaded = load_model(stories, device="cpu")
    plan = plan_for(loaded.model, "rtn", 64, [2] * 5)
    save(loaded, plan, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "quantized.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight_codes"].nbytes == 172 * 64 * 2 / 8
    assert "lm_head.weight" not in tensors, "tied weights are stored once"


def test_untouched_weights_keep_the_checkpoints_dtype_where_that_loses_nothing(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        model.model.norm.weight[0] = 1.0001  # not a bfloat16
    loaded = LoadedModel(model, Tokenizer(), torch.bfloat16)
    plan = plan_for(model, "rtn", 16, [4, 4, 4])
    bank_and_saved_nll(loaded, plan, tmp_path, np.ones((1, 8), dtype=np.int64))
    tensors = load_file(tmp_path / "saved" / "quantized.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("backend", WEIGHT_ONLY)
def test_the_main_job_gives_a_model_that_generates(backend: str, stories: str, tmp_path: Path) -> None:
    request = Request.from_options(model=stories, backend=backend, tokens=128, sequence_length=64)
    plan = coopq.quantize(request, Goal(budget="3.5avg"), tmp_path / "out")
    assert plan.measured_loss is not None
    model = coopq.load(tmp_path / "out", device="cpu")
    tokenizer = load_model(stories).tokenizer
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    story = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    assert len(story) > len("Once upon a time") + 12
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "hashes.json",
        "plan.json",
        "quantized.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_loaded_model_generates_by_the_settings_of_the_source(stories: str, tmp_path: Path) -> None:
    """Chat models end their answers with more tokens than config.json names."""
    loaded = load_model(stories, device="cpu")
    loaded.model.generation_config.eos_token_id = [2, 7]
    save(loaded, plan_for(loaded.model, "rtn", 64, [2] * 5), tmp_path / "saved")
    assert coopq.load(tmp_path / "saved", device="cpu").generation_config.eos_token_id == [2, 7]
    (tmp_path / "saved" / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"does not fit its plan .*generation_config\.json.*; save the model again"):
        coopq.load(tmp_path / "saved", device="cpu")


def test_a_folder_without_a_model_and_weights_that_do_not_fit_are_refused(stories: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model saved by coopq"):
        coopq.load(tmp_path)
    loaded = load_model(stories, device="cpu")
    plan = plan_for(loaded.model, "rtn", 64, [2] * 5)
    save(loaded, plan, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    write_hashes(tmp_path / "saved")
    with pytest.raises(ModelError, match=r"lacks, or should not hold, model.layers.5"):
        coopq.load(tmp_path / "saved")


def test_plans_edited_by_hand_and_damaged_weights_are_refused(stories: str, tmp_path: Path) -> None:
    loaded = load_model(stories, device="cpu")
    plan, saved = plan_for(loaded.model, "rtn", 64, [2] * 5), SavedModel(tmp_path / "saved")
    first, *rest = plan.players
    widened = plan.replace(players=(replace(first, bits=4), *rest))
    with pytest.raises(PlanError, match="repeat the command that made"):
        save(loaded, widened, saved.folder)
    renamed = plan.replace(players=(replace(first, modules=("model.nothing",)), *rest))
    with pytest.raises(PlanError, match=r"differ in .*model.nothing"):
        save(loaded, renamed, saved.folder)
    assert not saved.exists
    save(loaded, plan, saved.folder)
    weights = saved.folder / "quantized.safetensors"
    before = saved.fingerprint()
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight_scale"}, weights)
    assert saved.fingerprint() != before
    with pytest.raises(OutputError, match="is not what was written there"):
        coopq.load(tmp_path / "saved")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OutputError, match="is damaged or missing"):
        coopq.load(tmp_path / "saved")


@pytest.mark.real
@pytest.mark.parametrize(
    "backend", ["rtn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("quanto", "hqq"))]
)
def test_the_demo_model_ships_as_measured(backend: str, tmp_path: Path) -> None:
    loaded = load_model("demo", device="cpu")
    plan = plan_for(loaded.model, backend, None, [4] * 24 + [2] * 6)
    text = "The quick brown fox jumps over the lazy dog, and then the dog sleeps in the sun all day long. " * 4
    tokens = np.array([loaded.tokenizer.encode(text)[:64]])
    measured, saved = bank_and_saved_nll(loaded, plan, tmp_path, tokens)
    np.testing.assert_allclose(saved, measured, atol=1e-4)
    # The embedding is Q8_0 in the GGUF file. 16 bits hold it, rounded before the loss was measured.
    tensors = load_file(tmp_path / "saved" / "quantized.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    source = gguf_file("demo")
    assert source is not None
    assert coopq.Plan.load(tmp_path / "saved" / "plan.json").source_bytes == source.stat().st_size

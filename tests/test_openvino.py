"""OpenVINO's form: the engine itself computes our losses from a file of the predicted size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import coopq
import openvino
from coopq import Goal, Request
from coopq.core.errors import ExportError, OutputError
from coopq.core.specs import TextSpec
from coopq.export.formats import export_model, predicted_bytes
from coopq.game.engines.prefix_engine import model_nll
from coopq.model.load import LoadedModel, fingerprint_weights, load_model
from coopq.model.players import find_players
from coopq.model.texts import calibration_set
from tests.checkpoints import plan_for, save
from tests.command_line import command
from tests.folders import save_source
from tests.openvino import EXACT, openvino_nll, save_openvino

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """The reference Llama, and as OpenVINO has it in full precision."""
    loaded, base = load_model(str(BENCHMARKS / "data" / "llama"), device="cpu"), tmp_path_factory.mktemp("openvino")
    save_openvino(loaded.model, base)
    (base / "tokenizer.json").write_text("as the base has it")
    return loaded, base


@pytest.mark.real
@pytest.mark.parametrize(
    ("backend", "group_size", "widths"),
    [
        ("rtn", 64, [8, 2, 3, 4, 16]),
        pytest.param("hqq", 64, [8, 2, 3, 4, 16], marks=pytest.mark.slow),
        pytest.param("quanto", None, [8, 2, 4, 16], marks=pytest.mark.slow),
    ],
)
def test_openvino_computes_the_same_loss_at_every_width(
    backend: str, group_size: int | None, widths: list[int], llama: tuple[LoadedModel, Path], tmp_path: Path
) -> None:
    (loaded, base), (saved, out) = llama, (tmp_path / "saved", tmp_path / "out")
    tokens = calibration_set(TextSpec(tokens=128, sequence_length=64), loaded.tokenizer).tokens
    assignment = (widths * 13)[:13]
    plan = plan_for(loaded.model, backend, group_size, assignment, embeddings=True)
    plan = plan.replace(
        request=plan.request.replace(model=str(BENCHMARKS / "data" / "llama")),
        fingerprint={**plan.fingerprint, "weights": fingerprint_weights(loaded.model)},
    )
    save(loaded, plan, saved)
    n_bytes = export_model(saved, "openvino", out, base=base)
    assert n_bytes == (out / "openvino_model.bin").stat().st_size == predicted_bytes(plan, "openvino", base=base)
    assert (out / "tokenizer.json").read_text() == "as the base has it"
    ours, whole = (
        np.concatenate(list(model_nll(model, tokens))) for model in (coopq.load(saved, device="cpu"), loaded.model)
    )
    np.testing.assert_allclose(openvino_nll(out, tokens, **EXACT), ours, atol=1e-4)
    np.testing.assert_allclose(openvino_nll(out, tokens), ours, atol=0.03)
    assert np.abs(ours - whole).min() > 0.03
    graph = openvino.Core().read_model(out / "openvino_model.xml")
    codes: dict[str, int] = {}
    for node in graph.get_ops():
        kind = node.get_element_type().to_string() if node.get_type_name() == "Constant" else ""
        if kind.startswith("u") and node.shape[2] > 1:
            codes[kind] = codes.get(kind, 0) + int(np.prod(node.shape))
    players = find_players(loaded.model, embeddings=True)
    expected: dict[str, int] = {}
    for player, bits in zip(players, plan.assignment, strict=True):
        if bits != 16:
            expected[f"u{bits}"] = expected.get(f"u{bits}", 0) + player.n_weights
    assert codes == expected
    with pytest.raises(ExportError, match=r"has no constant with the weights of model\..*choose another form"):
        export_model(saved, "openvino", tmp_path / "other", base=out)
    with pytest.raises(
        ExportError,
        match=r"no base is given.*--base: optimum-cli export openvino --model .* --task text-gen",
    ):
        export_model(saved, "openvino", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.real
@pytest.mark.parametrize(
    ("backend", "bits"), [("rtn", "2,3,4"), pytest.param("quanto", "2,4,8", marks=pytest.mark.slow)]
)
def test_an_openvino_file_of_linear_layers_has_the_predicted_size_within_the_budget(
    backend: str, bits: str, llama: tuple[LoadedModel, Path], tmp_path: Path
) -> None:
    limit, base = 9_000_000, llama[1]
    where: list[str | Path] = ["--run", tmp_path / "run", "--out", tmp_path / "saved"]
    quantizer = ["--backend", backend, "--bits", bits, "--tokens", "64", "--sequence-length", "64"]
    quantizer += ["--granularity", "linear"]
    what = ["--budget", f"{limit}B", "--target", "openvino", "--base", str(base), "--method", "llm-mq", "--json"]
    code, out, err = command("quantize", BENCHMARKS / "data" / "llama", *quantizer, *what, *where)
    assert code == 0, err
    n_bytes = export_model(tmp_path / "saved", "openvino", tmp_path / "out", base=base)
    assert n_bytes == json.loads(out)["exported_bytes"]
    assert 0.95 * limit < n_bytes <= limit
    tokens = calibration_set(TextSpec(tokens=64, sequence_length=64), llama[0].tokenizer).tokens
    ours = np.concatenate(list(model_nll(coopq.load(tmp_path / "saved", device="cpu"), tokens)))
    np.testing.assert_allclose(openvino_nll(tmp_path / "out", tokens, **EXACT), ours, atol=1e-4)


@pytest.fixture
def request_of_tiny(tmp_path: Path) -> Request:
    """A request for a small random model, with a base of it."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=512, **shape)).eval()
    save_source(model, tmp_path / "model")
    (tmp_path / "base").mkdir()
    save_openvino(model, tmp_path / "base")
    options = {"group_size": 32, "bits": (2, 4, 16), "device": "cpu", "tokens": 32, "sequence_length": 32}
    return Request.from_options(
        model=str(tmp_path / "model"), target="openvino", base=str(tmp_path / "base"), **options
    )


def test_a_base_of_other_weights_is_refused_before_a_search(request_of_tiny: Request, tmp_path: Path) -> None:
    model = load_model(request_of_tiny.model.source, device="cpu").model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1.0
    save_openvino(model, tmp_path / "base")
    with pytest.raises(ExportError, match=r"has no constant with the weights of model\.layers\.1\.mlp\.up_proj;"):
        coopq.quantize(request_of_tiny, Goal(budget="3avg", method="first-last"), tmp_path / "out")
    assert not (tmp_path / "out-run" / "journal.jsonl").exists()


def test_a_damaged_base_is_one_line(request_of_tiny: Request, tmp_path: Path) -> None:
    for name in ("openvino_model.bin", "openvino_model.xml"):
        file = tmp_path / "base" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(
            ExportError, match=r"OpenVINO cannot read base .*base \(.*\); export the base again"
        ) as error:
            coopq.quantize(request_of_tiny, Goal(budget="3avg", method="first-last"), tmp_path / "out")
        assert "\n" not in str(error.value)
        file.write_bytes(whole)
    plan = coopq.quantize(request_of_tiny, Goal(budget="3avg", method="first-last"), tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(OutputError, match=r"theirs needs .* are free"):
            export_model(tmp_path / "out", "openvino", tmp_path / "theirs")
    assert export_model(tmp_path / "out", "openvino", tmp_path / "theirs") == plan.file_bytes

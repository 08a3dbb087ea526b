"""The embedding and the head as players."""

from pathlib import Path

import numpy as np
import pytest
import torch

import coopq
from coopq.core.types import UNTOUCHED
from coopq.export.checkpoint import SavedModel
from coopq.game.engines.prefix_engine import make_engine, model_nll
from coopq.model.load import LoadedModel
from coopq.model.players import find_players
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.rtn import RTNBackend
from tests.architectures import CONFIGS, tiny_model
from tests.checkpoints import Tokenizer, plan_for, save
from tests.command_line import command, refused
from tests.conftest import STORIES

TEXT: list[str | Path] = ["--tokens", "256", "--sequence-length", "64"]
TIED = ("llama", "qwen2", "gemma2", "gemma3")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "opt"])
def test_what_is_measured_is_what_is_saved(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    players = find_players(model, "block", embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name in TIED)
    assert [player.is_end for player in players] == [True] + [False] * 3 + [True] * (not tied)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 97, size=(3, 16))
    loaded = LoadedModel(model, Tokenizer(), torch.float32)
    backend = RTNBackend(group_size=16)
    bank = WeightBank(tmp_path / "bank", loaded, players, backend, {})
    bank.build((3, 4, 8))
    engine = make_engine(model, bank, tokens)
    points = rng.choice([3, 4, 8, UNTOUCHED], size=(12, len(players))).astype(np.float32)
    points[:2] = [3, *[8] * (len(players) - 1)], [UNTOUCHED, *[8] * (len(players) - 2), 3]
    measured = {assignment.tobytes(): losses for assignment, losses, _ in engine.evaluate(points)}
    for assignment in points[:4]:
        for index, bits in enumerate(assignment):
            bank.set_player(index, int(bits))
        own = np.concatenate(list(model_nll(model, tokens)))
        bank.restore()
        np.testing.assert_allclose(measured[assignment.tobytes()], own, rtol=1e-5)
    for index, point in enumerate(points[:2]):
        plan = plan_for(model, "rtn", 16, point.tolist(), "block", embeddings=True)
        save(loaded, plan, tmp_path / f"{index}")
        assert SavedModel(tmp_path / f"{index}").n_bytes() == plan.bytes
        again = coopq.load(tmp_path / f"{index}", device="cpu")
        losses = np.concatenate(list(model_nll(again, tokens)))
        np.testing.assert_allclose(losses, measured[point.tobytes()], rtol=1e-5)


def test_the_main_job_counts_the_embedding(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: list[str | Path] = ["quantize", STORIES, "--bits", "3,4,8", *TEXT, "--embeddings"]
    code, _, err = command(*arguments, "--budget", "150kB", "--out", out)
    assert code == 0, err
    plan = coopq.Plan.load(out / "plan.json")
    assert plan.players[0].modules == ("model.embed_tokens",)
    assert plan.bytes == SavedModel(out).n_bytes() <= 150_000
    whole = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert whole - plan.bytes < 20_000, "norms and the file's header are all that is left"
    line = refused(*arguments, "--budget", "4avg", "--method", "zd", "--out", tmp_path / "other")
    assert "method 'zd' scores layers in blocks, not embeddings" in line
    line = refused(*arguments[:-1], "--budget", "4avg", "--out", tmp_path / "out2", "--run", tmp_path / "out-run")
    assert "embeddings: True there, False here" in line

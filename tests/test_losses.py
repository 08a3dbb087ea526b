"""Losses from logits in portions, and the divergence from full precision as the game plays it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn import functional

import coopq
from coopq.core.errors import EstimationError
from coopq.core.specs import TextSpec
from coopq.core.types import UNTOUCHED, Assignment
from coopq.game.engines.prefix_engine import make_engine
from coopq.game.journal import Journal
from coopq.game.losses import Portions, Reference, make_loss, portions_divergence, portions_nll
from coopq.model.load import LoadedModel
from coopq.model.memory import Footprint
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import find_players
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.rtn import RTNBackend
from tests.architectures import CONFIGS, tiny_model
from tests.command_line import command
from tests.conftest import STORIES
from tests.engines import TOKENS


def portions(logits: torch.Tensor, size: int) -> Portions:
    return [(first, logits[:, first : first + size]) for first in range(0, logits.shape[1], size)]


@example(2, 2, 1, 1)  # the first portion has hardly any mass
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 50), st.integers(0, 10))
def test_portions_give_what_whole_logits_do(n: int, vocabulary: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits, full = 5 * torch.randn(2, n, vocabulary)
    targets = torch.randint(vocabulary, (n,))
    nll = functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(portions_nll(portions(logits, size), targets), nll, rtol=1e-4, atol=1e-5)
    expected = functional.kl_div(logits.log_softmax(1), full.log_softmax(1), reduction="none", log_target=True).sum(1)
    found = portions_divergence(portions(logits, size), Reference.from_logits(portions(full, size)))
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("embeddings", [False, True])
def test_the_divergence_is_that_of_the_models_own_logits(name: str, embeddings: bool, tmp_path: Path) -> None:
    if embeddings and name == "opt":
        pytest.skip("its embedding is no player")
    model = tiny_model(name)
    players = find_players(model, "block", embeddings=embeddings)
    bank = WeightBank(tmp_path, LoadedModel(model, None, torch.float32), players, RTNBackend(group_size=16), {})
    bank.build((2, 4))
    points = np.random.default_rng(0).choice([2, 4], size=(6, len(players))).astype(np.float32)
    points[0] = UNTOUCHED
    ids = torch.from_numpy(TOKENS)

    def own(point: Assignment) -> torch.Tensor:
        for player, bits in enumerate(point):
            bank.set_player(player, int(bits))
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        bank.restore()
        return logits.log_softmax(-1)

    whole = own(points[0])
    for is_offloaded in (False,) if embeddings else (False, True):
        offloaded = OffloadedBlocks(model, whole.device) if is_offloaded else None
        engine = make_engine(model, bank, TOKENS, "kl", offloaded)
        for point, losses, _ in list(engine.evaluate(points)):
            expected = (whole.exp() * (whole - own(point))).sum(-1).mean(-1)
            np.testing.assert_allclose(losses, expected, rtol=1e-3, atol=2e-6)
            assert (point == UNTOUCHED).all() == (losses.mean() < 1e-6)


def test_an_unknown_loss_is_refused_with_a_hint() -> None:
    with pytest.raises(EstimationError, match="loss 'kll' is unknown; did you mean 'kl'"):
        make_loss("kll")


def test_a_run_on_the_divergence_keeps_it_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: list[str | Path] = ["quantize", STORIES, "--bits", "2,4", "--budget", "3avg", "--out", out]
    arguments += ["--tokens", "256", "--sequence-length", "64"]
    code, shown, err = command(*arguments, "--loss", "kl")
    assert code == 0, err
    assert "calibration KL divergence" in shown
    plan = coopq.Plan.load(out / "plan.json")
    assert plan.fingerprint["loss"] == "kl"
    (assignments, losses), _ = Journal.peek(tmp_path / "out-run" / "journal.jsonl")
    assert len(assignments) == len(losses)
    assert 0 < losses.min() < losses.max()
    code, _, err = command(*arguments[:-6], "--out", tmp_path / "other", "--run", tmp_path / "out-run", *arguments[-4:])
    assert code != 0
    assert "loss: 'kl' there, 'nll' here" in err


def test_the_footprint_counts_the_distributions_of_full_precision() -> None:
    model, text = tiny_model("llama"), TextSpec(tokens=96, sequence_length=32)
    players = find_players(model)
    plain, diverging = (
        Footprint.estimate(model, players, text, "cpu", diverges=diverges) for diverges in (False, True)
    )
    assert diverging.states - plain.states == 4 * 3 * 32 * model.config.vocab_size


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-4, 1e-2, 1.0, 30.0])
def test_a_divergence_keeps_its_digits_however_small(scale: float) -> None:
    full = 10 + 3 * torch.randn(16, 5000)
    other = full + scale * torch.randn(16, 5000)
    exact = functional.kl_div(
        other.double().log_softmax(1), full.double().log_softmax(1), reduction="none", log_target=True
    )
    reference = Reference.from_logits([(0, full)])
    found = portions_divergence([(at, other[:, at : at + 700]) for at in range(0, 5000, 700)], reference)
    torch.testing.assert_close(found, exact.sum(dim=1), rtol=1e-2, atol=1e-11)
    assert (found >= 0).all()


def test_a_model_has_no_divergence_from_itself(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank = WeightBank(
        tmp_path, LoadedModel(model, None, torch.float32), find_players(model), RTNBackend(group_size=16), {}
    )
    engine = make_engine(model, bank, np.random.default_rng(0).integers(3, 97, size=(4, 20)), "kl")
    ((_, losses, _),) = engine.evaluate(np.full((1, len(bank.players)), UNTOUCHED, dtype=np.float32))
    assert np.abs(losses).max() < 1e-7

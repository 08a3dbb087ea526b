"""One-layer scores, against values computed another way on tiny models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coopq.game.engines.prefix_engine import make_engine
from coopq.game.sensitivity import Sensitivity
from coopq.model.load import LoadedModel
from coopq.model.players import GRANULARITIES, find_players
from coopq.plan.by_score import score
from coopq.plan.methods import get_method
from coopq.plan.scores import activation, auto_quantize, first_last, fisher, imatrix, lim, llm_mq, zd
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.rtn import RTNBackend
from tests.architectures import tiny_model
from tests.sensitivities import TOKENS, make_sensitivity


def block_states(model: Any) -> list[tuple[Any, Any]]:
    """Input and output of every block in one plain forward of all tokens."""
    seen: list[tuple[Any, Any]] = []

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        seen.append((states.detach(), (output[0] if isinstance(output, tuple) else output).detach()))

    handles = [
        model.get_submodule(player.name).register_forward_hook(keep, with_kwargs=True) for player in find_players(model)
    ]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(TOKENS), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_llm_mq_by_whole_model_autograd(granularity: str, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    sensitivity = make_sensitivity(model, tmp_path, granularity)
    n_players = len(sensitivity.players)
    ids = torch.from_numpy(TOKENS)
    model(input_ids=ids, labels=ids).loss.backward()
    backend = RTNBackend(group_size=16)
    by_layer, by_block = np.zeros((2, n_players)), np.zeros((2, n_players))
    for row, bits in enumerate((2, 4)):
        for player in range(n_players):
            changes = []
            for linear in sensitivity.players[player].linears:
                weight = model.get_submodule(linear.name).weight
                rounded = backend.dequantize(backend.quantize(weight.detach(), bits), linear.shape, bits, weight.dtype)
                changes.append(float((weight.grad * (weight.detach() - rounded)).sum()))
            by_layer[row, player], by_block[row, player] = np.abs(changes).sum(), abs(sum(changes))
    model.zero_grad()
    np.testing.assert_allclose(llm_mq.gains_by_layer(sensitivity), by_layer[0] - by_layer[1], rtol=1e-3)
    np.testing.assert_allclose(llm_mq.gains_by_block(sensitivity), by_block[0] - by_block[1], rtol=1e-3)
    assert np.allclose(by_layer, by_block) == (granularity == "linear")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
def test_fisher_by_whole_model_autograd(name: str, granularity: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    sensitivity = make_sensitivity(model, tmp_path, granularity)
    backend = RTNBackend(group_size=16)
    expected = np.zeros((2, len(sensitivity.players), len(TOKENS)))
    for s, sequence in enumerate(torch.from_numpy(TOKENS)):
        model.zero_grad()
        model(input_ids=sequence[None], labels=sequence[None]).loss.backward()
        for row, bits in enumerate((2, 4)):
            for index, player in enumerate(sensitivity.players):
                for linear in player.linears:
                    weight = model.get_submodule(linear.name).weight
                    packed = backend.quantize(weight.detach(), bits)
                    moved = backend.dequantize(packed, linear.shape, bits, weight.dtype) - weight.detach()
                    expected[row, index, s] += float((weight.grad * moved).sum())
    model.zero_grad()
    np.testing.assert_allclose(sensitivity.sequence_changes(), expected, rtol=1e-3, atol=1e-6)
    linear_terms, pairs = fisher.terms([sensitivity])
    # by the definition, for one coalition
    lowered = np.arange(len(sensitivity.players)) % 2 == 0
    changes = np.where(lowered[:, None], expected[0], expected[1]).sum(axis=0)
    before = expected[1].sum(axis=0)
    n_scored = TOKENS.shape[1] - 1
    exact = (changes - before).mean() + n_scored / 2 * (changes**2 - before**2).mean()
    assert linear_terms @ lowered + lowered @ pairs @ lowered == pytest.approx(exact, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_lim_and_activation_by_hand(name: str, granularity: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    states = block_states(model)
    similarity, norm = np.zeros(3), np.zeros(3)
    for player, (before, after) in enumerate(states):
        x, y = before.flatten(1).double().numpy(), after.flatten(1).double().numpy()
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        similarity[player] = np.mean((x * y).sum(axis=1) / norms)
        norm[player] = np.mean(np.linalg.norm(y, axis=1))
    sensitivity = make_sensitivity(model, tmp_path, granularity)
    n = len(sensitivity.players) // 3  # players inherit the score of their block
    np.testing.assert_allclose(lim.scores(sensitivity), np.repeat(-similarity, n), rtol=1e-5)
    np.testing.assert_allclose(activation.scores(sensitivity), np.repeat(norm, n), rtol=1e-5)
    assert lim.gains(sensitivity).shape == (3 * n,)
    assert sensitivity.block_forwards == 9, "three forwards a score"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_output_errors_by_whole_model_autograd(granularity: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    sensitivity = make_sensitivity(model, tmp_path, granularity)
    backend = RTNBackend(group_size=16)
    expected = np.zeros((2, len(sensitivity.players)))
    seen: dict[str, tuple[Any, Any]] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            output.retain_grad()
            seen[name] = inputs[0].detach(), output

        return hook

    handles = [
        model.get_submodule(linear.name).register_forward_hook(keep(linear.name))
        for player in sensitivity.players
        for linear in player.linears
    ]
    for sequence in torch.from_numpy(TOKENS):
        model(input_ids=sequence[None], labels=sequence[None]).loss.backward()
        for row, bits in enumerate((2, 4)):
            for index, player in enumerate(sensitivity.players):
                for linear in player.linears:
                    inputs, output = seen[linear.name]
                    weight = model.get_submodule(linear.name).weight.detach()
                    rounded = backend.dequantize(backend.quantize(weight, bits), linear.shape, bits, weight.dtype)
                    error = inputs @ (rounded - weight).T
                    expected[row, index] += float((output.grad * error).square().sum())
    for handle in handles:
        handle.remove()
    model.zero_grad()
    gains = auto_quantize.gains_by_gradient([sensitivity])[:, 0]
    scale = sensitivity.scored_tokens / 2 / len(TOKENS)
    np.testing.assert_allclose(gains, scale * (expected[0] - expected[1]), rtol=1e-3)
    assert (gains > 0).all()


def test_progress_of_a_score_expects_about_what_it_takes(tmp_path: Path) -> None:
    loaded = LoadedModel(tiny_model("llama"), None, torch.float32)
    bank = WeightBank(tmp_path, loaded, find_players(loaded.model), RTNBackend(group_size=16), {})
    bank.build((2, 3, 4, 8))
    blockwise = make_engine(loaded.model, bank, TOKENS).blockwise
    at = [Sensitivity(blockwise, bank, low, high) for low, high in ((4, 8), (3, 4), (2, 3))]
    told: list[tuple[int, int]] = []
    spent = score(get_method("auto-quantize"), at, lambda _, done, total: told.append((done, total))).block_forwards
    assert told[0] == (0, told[0][1])
    assert spent <= told[0][1] <= 1.2 * spent
    assert told[-1] == (spent, spent)


def test_imatrix_is_how_far_outputs_move_if_inputs_are_not_correlated(tmp_path: Path) -> None:
    model = tiny_model("llama")
    sensitivity = make_sensitivity(model, tmp_path, "linear")
    expected = np.zeros(len(sensitivity.players))
    for index, player in enumerate(sensitivity.players):
        (name,) = (linear.name for linear in player.linears)
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=torch.from_numpy(TOKENS), use_cache=False)
        handle.remove()
        weight = sensitivity.weights(index)[name]
        for sign, bits in ((1, 2), (-1, 4)):
            error = sensitivity.quantized(index, bits)[name] - weight
            moved = [
                float((column[:, None] * along).square().sum())
                for column, along in zip(seen[0].flatten(0, 1).T, error.T, strict=True)
            ]
            expected[index] += sign * sum(moved) / TOKENS.size
    np.testing.assert_allclose(imatrix.gains([sensitivity])[:, 0], expected, rtol=1e-4)
    assert (expected > 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_first_and_last_by_hand(granularity: str, tmp_path: Path) -> None:
    sensitivity = make_sensitivity(tiny_model("llama"), tmp_path, granularity)
    blocks = np.array(sensitivity.blocks)
    gains = first_last.gains(sensitivity) / sensitivity.shares
    first, middle, last = (float(gains[blocks == block].mean()) for block in range(3))
    assert first > last > middle > 0, "the ends, the first one first, and the middle last"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zd_by_hand(granularity: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    sensitivity = make_sensitivity(model, tmp_path, granularity)
    with torch.no_grad():
        for weight in sensitivity.weights(1).values():
            weight.exponential_()  # skewed: the two readings differ
    for two_sided in (False, True):
        expected = []
        for player in range(len(sensitivity.players)):
            weights = np.concatenate([w.numpy().ravel() for w in sensitivity.weights(player).values()])
            z = (weights - weights.mean()) / weights.std(ddof=1)
            expected.append(((np.abs(z) if two_sided else z) > 1).mean())
        np.testing.assert_allclose(zd.scores(sensitivity, two_sided=two_sided), expected, atol=2e-4)
    assert sensitivity.block_forwards == 0, "needs no data"
    one_sided = zd.scores(sensitivity, two_sided=False)
    assert zd.gains_one_sided(sensitivity).argmin() == one_sided.argmax(), "smaller keeps more bits"

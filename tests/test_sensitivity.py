"""What scores are made of: gradients, divergences and traces, against those of the whole model."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coopq.core.errors import EstimationError
from coopq.model.players import GRANULARITIES
from coopq.plan.scores import auto_quantize, hawq
from tests.architectures import CONFIGS, tiny_model
from tests.command_line import refused
from tests.sensitivities import TOKENS, make_sensitivity


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_gradients_are_those_of_the_whole_model(name: str, granularity: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    sensitivity = make_sensitivity(model, tmp_path, granularity)
    by_player = dict(sensitivity.gradients())
    assert list(by_player) == list(reversed(range(len(sensitivity.players))))
    for player, gradients in by_player.items():
        assert list(gradients) == [linear.name for linear in sensitivity.players[player].linears]
    streamed = {name: gradient for gradients in by_player.values() for name, gradient in gradients.items()}
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing is left behind"
    ids = torch.from_numpy(TOKENS)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, gradient in streamed.items():
        torch.testing.assert_close(gradient, model.get_submodule(name).weight.grad, rtol=1e-3, atol=1e-5)
    assert len(streamed) == sum(len(player.linears) for player in sensitivity.players)
    assert sensitivity.block_forwards == 4 * 3, "once for each block, however many players are in it"


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_divergences_by_whole_forwards(name: str, granularity: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    sensitivity = make_sensitivity(model, tmp_path, granularity)
    ids = torch.from_numpy(TOKENS)

    def log_probabilities() -> Any:
        with torch.no_grad():
            return model(input_ids=ids).logits[:, :-1].double().log_softmax(dim=-1)

    reference = log_probabilities()
    expected = np.zeros((2, len(sensitivity.players)))
    for (row, bits), player in product(enumerate((2, 4)), range(len(sensitivity.players))):
        originals = sensitivity.weights(player)
        for linear_name, quantized in sensitivity.quantized(player, bits).items():
            model.get_submodule(linear_name).weight.data = quantized
        moved = log_probabilities()
        expected[row, player] = float((reference.exp() * (reference - moved)).sum(dim=-1).mean())
        for linear_name, weight in originals.items():
            model.get_submodule(linear_name).weight.data = weight
    found = sensitivity.divergences()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(auto_quantize.gains_by_divergence(sensitivity), found[0] - found[1])
    torch.testing.assert_close(log_probabilities(), reference)  # its own weights again


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_hawq_by_exact_hessian_products(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    sensitivity = make_sensitivity(model, tmp_path)
    names = [linear.name for player in sensitivity.players for linear in player.linears]
    ids = torch.from_numpy(TOKENS)
    weights = [model.get_submodule(linear_name).weight for linear_name in names]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # others have no second derivative
        loss = model(input_ids=ids, labels=ids).loss
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        expected = np.zeros(len(names))
        for sample in range(3):
            draws = torch.Generator().manual_seed(3 * 5 + sample)
            signs = [
                torch.randint(2, weight.shape, generator=draws, dtype=torch.int8).float() * 2 - 1 for weight in weights
            ]
            products = torch.autograd.grad(gradients, weights, signs, retain_graph=True)
            expected += [float((sign * along).sum()) / 3 for sign, along in zip(signs, products, strict=True)]
    traces = sensitivity.traces(3, 5)
    assert list(traces) == names
    np.testing.assert_allclose(list(traces.values()), expected, rtol=0.02, atol=2e-3 * np.abs(expected).max())
    for linear_name, weight in zip(names, weights, strict=True):
        assert torch.equal(weight, model.get_submodule(linear_name).weight), "the model has its own weights again"
    exact = np.zeros(3)
    eight_samples = sensitivity.traces(8, 0)
    for index, player in enumerate(sensitivity.players):
        quantized = [sensitivity.quantized(index, bits) for bits in (2, 4)]
        for linear in player.linears:
            weight = sensitivity.weights(index)[linear.name]
            errors = [float((by_name[linear.name] - weight).square().sum()) for by_name in quantized]
            exact[index] += eight_samples[linear.name] / weight.numel() * (errors[0] - errors[1])
    np.testing.assert_allclose(hawq.gains(sensitivity), exact, rtol=1e-4)


def test_hawq_refuses_a_dtype_that_swallows_its_steps(tmp_path: Path) -> None:
    sensitivity = make_sensitivity(tiny_model("llama").bfloat16(), tmp_path)
    with pytest.raises(EstimationError, match="hawq needs --dtype float32 or float16"):
        hawq.gains(sensitivity)
    assert sensitivity.block_forwards == 0


def test_hawq_refuses_that_dtype_before_weights_are_quantized(stories: str, tmp_path: Path) -> None:
    arguments = ["quantize", stories, "--budget", "3avg", "--method", "hawq", "--dtype", "bfloat16"]
    assert "hawq needs --dtype float32 or float16" in refused(*arguments, "--out", tmp_path / "out")
    assert not list(tmp_path.rglob("bank"))

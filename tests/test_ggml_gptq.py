"""Second-order rounding into ggml's types, against ggml's own rounding."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import coopq.quantizers.ggml.gptq as ggml_gptq
from coopq.model.matrices import matrix_of
from coopq.model.players import find_players
from coopq.quantizers.ggml.codes import code_layout
from coopq.quantizers.ggml.gptq import GGMLGPTQ, elimination_order, second_order
from coopq.quantizers.ggml.library import from_blocks, to_blocks
from coopq.quantizers.input_statistics import second_moments
from tests.architectures import tiny_model

BITS = {
    "Q2_K": 2,
    "Q3_K": 3,
    "IQ4_XS": 4,
    "IQ4_NL": 4,
    "Q4_1": 4,
    "Q4_K": 4,
    "Q5_0": 5,
    "Q5_1": 5,
    "Q5_K": 5,
    "Q6_K": 6,
}
"""Bits of a weight's own code, by type."""
SHARED = ("IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "Q8_0")


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def inputs(columns: int, n: int = 2048) -> torch.Tensor:
    """Inputs whose columns are correlated, some larger than others, shape (n, columns)."""
    generator = torch.Generator().manual_seed(columns)
    mixed = torch.randn(columns, columns, generator=generator) * 0.98 ** torch.arange(columns)[:, None]
    return torch.randn(n, columns, generator=generator) @ mixed


def levels_by_code(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """What each code stands for in each weight of blocks, shape (codes, out, in)."""
    layout = code_layout(kind(name))
    assert layout is not None
    return layout.levels(kind(name), blocks).permute(2, 1, 0).repeat_interleave(layout.run, dim=2)


@pytest.mark.parametrize("name", BITS)
def test_the_layout_of_codes_is_found(name: str) -> None:
    layout = code_layout(kind(name))
    assert layout is not None
    assert len(layout.places) == BITS[name]
    assert layout.places.size == np.unique(layout.places).size, "a bit belongs to one weight"
    weight = torch.randn(3, 512)
    blocks = to_blocks(kind(name), weight, None)
    codes = torch.randint(2 ** BITS[name], weight.shape, dtype=torch.uint8)
    coded = layout.with_codes(blocks, codes)
    every = levels_by_code(name, blocks)
    assert torch.equal(from_blocks(kind(name), coded), every.gather(0, codes[None].long())[0])
    steps = every.diff(dim=0)
    assert bool(((steps >= 0).all(dim=0) | (steps <= 0).all(dim=0)).all()), "levels rise or fall with the code"
    # ggml rounds to one of these levels, and what it made can be written again.
    own = (every == from_blocks(kind(name), blocks)).int().argmax(dim=0).to(torch.uint8)
    assert torch.equal(from_blocks(kind(name), layout.with_codes(blocks, own)), from_blocks(kind(name), blocks))


@pytest.mark.parametrize("name", SHARED)
def test_types_without_such_codes_stay_as_ggml_rounds_them(name: str) -> None:
    assert code_layout(kind(name)) is None
    weight = torch.randn(4, 256)
    blocks = to_blocks(kind(name), weight, torch.ones(256))
    assert second_order(kind(name), weight, blocks, elimination_order(torch.eye(256))) is blocks


@pytest.mark.parametrize("name", BITS)
def test_outputs_lose_less_than_by_rounding(name: str) -> None:
    columns = {32: 96, 256: 512}[gguf.GGML_QUANT_SIZES[kind(name)][0]]
    seen = inputs(columns)
    moments, weight = seen.T @ seen / len(seen), torch.randn(32, columns)
    blocks = to_blocks(kind(name), weight, moments.diagonal())
    solved = second_order(kind(name), weight, blocks, elimination_order(moments))

    def lost(found: torch.Tensor) -> float:
        return float((seen @ (from_blocks(kind(name), found) - weight).T).square().mean())

    assert lost(solved) < 0.5 * lost(blocks)


def by_definition(levels: torch.Tensor, weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Each column in turn at its nearest level, and all columns still free where outputs are then best.

    Args:
        levels: Levels of each weight, shape (levels, out, in).
        weight: The weight, shape (out, in).
        moments: Damped second moments, shape (in, in).
    """
    order = moments.diagonal().argsort(descending=True, stable=True).tolist()
    chosen, free = weight.clone(), weight.clone()
    for number, column in enumerate(order):
        nearest = (levels[:, :, column] - free[:, column]).abs().argmin(dim=0, keepdim=True)
        chosen[:, column] = levels[:, :, column].gather(0, nearest)[0]
        fixed, rest = order[: number + 1], order[number + 1 :]
        pushed = (weight - chosen)[:, fixed] @ moments[fixed][:, rest]
        free[:, rest] = weight[:, rest] + torch.linalg.solve(moments[rest][:, rest], pushed.T).T
    return chosen


@given(st.sampled_from(["IQ4_NL", "Q5_1"]), st.integers(0, 10_000))
def test_it_is_what_least_squares_say_of_the_columns_still_free(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randn(40, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    moments, weight = seen.T @ seen / len(seen), torch.randn(16, 64, generator=generator)
    blocks = to_blocks(kind(name), weight, moments.diagonal())
    solved = from_blocks(kind(name), second_order(kind(name), weight, blocks, elimination_order(moments)))
    every = levels_by_code(name, blocks)
    damped = moments.double() + 0.01 * moments.diagonal().double().mean() * torch.eye(64)
    wanted = by_definition(every.double(), weight.double(), damped)
    # Where two levels are as near as numbers of 32 bits can tell, either will do, and columns after it differ.
    assert (solved == wanted).all(dim=1).float().mean() > 0.9


def test_uncorrelated_inputs_leave_nothing_but_the_nearest_level() -> None:
    weight = torch.randn(16, 256)
    blocks = to_blocks(kind("Q3_K"), weight, torch.ones(256))
    solved = from_blocks(kind("Q3_K"), second_order(kind("Q3_K"), weight, blocks, elimination_order(torch.eye(256))))
    rounded = from_blocks(kind("Q3_K"), blocks)
    assert bool(((solved - weight).abs() <= (rounded - weight).abs()).all())


def test_rows_are_rounded_alike_in_whatever_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = inputs(256)
    weight, elimination = torch.randn(24, 256), elimination_order(seen.T @ seen / len(seen))
    blocks = to_blocks(kind("Q4_K"), weight, None)
    whole = second_order(kind("Q4_K"), weight, blocks, elimination)
    monkeypatch.setattr(ggml_gptq, "_WEIGHTS_AT_ONCE", 5 * 256)
    assert torch.equal(second_order(kind("Q4_K"), weight, blocks, elimination), whole)


def test_layers_with_the_same_inputs_share_moments_and_their_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    tokens = np.random.default_rng(0).integers(3, 97, size=(4, 64))
    names = [linear.name for player in find_players(model) for linear in player.linears if player.block == 0]
    moments = second_moments(model, names, tokens)
    assert len({id(each) for each in moments.values()}) == 4, "q, k and v; o; gate and up; down"
    for each in moments.values():
        assert torch.equal(each, each.T)
    made: list[torch.Tensor] = []

    def watched(of_layer: torch.Tensor) -> ggml_gptq.Elimination:
        made.append(of_layer)
        return elimination_order(of_layer)

    monkeypatch.setattr(ggml_gptq, "elimination_order", watched)
    told: list[tuple[str, int, int]] = []
    layers: dict[float, list[str]] = dict.fromkeys((4, 5, 8), names)
    found = list(GGMLGPTQ().quantize_widths(model, None, layers, tokens, lambda *step: told.append(step)))
    assert told == [("collecting inputs of layers", done, 4) for done in (0, 2, 4)]
    assert len(made) == 4
    assert [(name, width) for width, name, _ in found] == [(name, width) for name in names for width in (4, 5, 8)]


def test_the_factor_is_that_of_the_inverse() -> None:
    seen = inputs(256)
    moments = (seen.T @ seen / len(seen)).double()
    order, factor = elimination_order(moments.float())
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(256)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-4, atol=1e-6)


def test_layers_are_the_same_at_once_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All widths at once, as searched on, give the weights of mixed widths, as saved; with little memory too."""
    model = tiny_model("llama")
    tokens = np.random.default_rng(0).integers(3, 97, size=(4, 64))
    names = [linear.name for player in find_players(model, embeddings=True) for linear in player.linears]
    backend, widths = GGMLGPTQ(), (4, 5)
    together = {
        (name, width): packed["blocks"]
        for width, name, packed in backend.quantize_widths(model, None, dict.fromkeys(widths, names), tokens)
    }
    assert len(together) == len(widths) * len(names)
    mixed = {name: widths[number % 2] for number, name in enumerate(names)}
    monkeypatch.setattr(ggml_gptq, "_MOMENTS_BYTES", 1)
    found = list(backend.quantize_model(model, None, mixed, tokens))
    assert [name for name, _ in found] == names
    moments = second_moments(model, names, tokens)
    for name, packed in found:
        assert torch.equal(packed["blocks"], together[name, mixed[name]])
        rounded = backend.quantize(matrix_of(model, name).parameter.data, mixed[name], moments[name].diagonal())
        assert not torch.equal(packed["blocks"], rounded["blocks"])

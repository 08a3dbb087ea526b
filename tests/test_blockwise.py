"""A model in pieces: its blocks, its head in portions of the vocabulary, and faster forwards of both."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from coopq.core.errors import ModelError
from coopq.core.types import REMOVED, UNTOUCHED
from coopq.game.engines.prefix_engine import make_engine, model_nll
from coopq.model import blockwise
from coopq.model.blockwise import Blockwise
from coopq.model.kernels import gpu as kernels_gpu
from coopq.model.kernels.cpu import onednn_forwards
from coopq.model.kernels.forward import override_forward
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import find_blocks
from tests.architectures import CONFIGS, tiny_model
from tests.engines import TOKENS, build


def test_states_of_all_batches_lie_in_one_piece_that_holds_nothing_else() -> None:
    pieces = Blockwise(tiny_model(next(iter(CONFIGS))), TOKENS)
    pieces.record()
    for states in (pieces.embedded, pieces.forward_block(0, pieces.embedded)):
        assert [len(batch) for batch in states] == [12, 8]
        (piece,) = {batch.untyped_storage().data_ptr(): batch.untyped_storage() for batch in states}.values()
        assert piece.nbytes() == sum(batch.nbytes for batch in states)


def test_linear_layers_by_onednn_are_those_of_torch() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 7, bias=False))
    inputs = torch.randn(3, 5, 48)
    expected = layers(inputs)
    with torch.no_grad(), override_forward(onednn_forwards(layers)):
        replaced = "forward" in vars(layers[0])
        torch.testing.assert_close(layers(inputs), expected, rtol=1e-5, atol=1e-5)
    assert replaced == (torch.backends.cpu.get_cpu_capability() == "AVX512")
    assert "forward" not in vars(layers[0])
    layers(inputs).sum().backward()  # gradients flow again
    assert not onednn_forwards(layers.bfloat16()), "torch itself uses oneDNN for bfloat16"


def test_losses_do_not_depend_on_the_portions_of_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2")  # whose head caps its logits, and whose embedding is its head
    bank = build(model, tmp_path)
    point = np.array([[2, 4, 2]], dtype=np.float32)
    ((_, whole, _),) = make_engine(model, bank, TOKENS).evaluate(point)
    monkeypatch.setitem(blockwise.LOGIT_BYTES, "cpu", 4 * 12 * 39 * 7)  # 7 words at a time
    ((_, parts, _),) = make_engine(model, bank, TOKENS).evaluate(point)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_a_tied_head_in_portions_needs_no_row_of_the_padding_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gemma2")
    model.get_input_embeddings().padding_idx = 96  # the last row, as transformers sets it by pad_token_id
    engine = make_engine(model, build(model, tmp_path), TOKENS)
    point = np.array([[2, 4, 2]], dtype=np.float32)
    ((_, whole, _),) = engine.evaluate(point)
    monkeypatch.setitem(blockwise.LOGIT_BYTES, "cpu", 4 * 12 * 39 * 7)  # 7 words at a time
    ((_, parts, _),) = engine.evaluate(point)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    assert model.get_input_embeddings().padding_idx == 96


def test_the_model_is_whole_between_portions_of_the_head() -> None:
    model = tiny_model("gemma2")
    pieces = Blockwise(model, TOKENS)
    pieces.record()
    weight = model.get_output_embeddings().weight
    whole = weight.data_ptr(), weight.shape
    pieces_of_logits = pieces.logits(pieces.embedded[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blockwise.LOGIT_BYTES, "cpu", 4 * 12 * 39 * 7)  # 7 words at a time
        first, logits = next(pieces_of_logits)
    assert (first, logits.shape) == (0, (12 * 39, 7))
    assert (weight.data_ptr(), weight.shape) == whole, "the generator is not exhausted, closed or collected"
    assert model(input_ids=torch.from_numpy(TOKENS[:1])).logits.shape == (1, 40, 97)


def test_a_head_that_fails_has_all_its_rows_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    pieces = Blockwise(model, TOKENS)
    pieces.record()
    monkeypatch.setitem(vars(model.get_output_embeddings()), "forward", lambda *_: 1 / 0)
    monkeypatch.setitem(blockwise.LOGIT_BYTES, "cpu", 4 * 12 * 39 * 7)
    with pytest.raises(ZeroDivisionError):
        next(pieces.logits(pieces.embedded[0]))
    assert len(model.get_output_embeddings().weight) == 97


def test_overrides_of_forwards_are_nested_and_undone() -> None:
    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    vars(other)["forward"] = lambda inputs: inputs + 1  # as accelerate's hooks do
    inputs, own = torch.ones(2), layer(torch.ones(2))
    with override_forward({layer: lambda inputs: inputs, other: lambda inputs: inputs}):
        assert layer(inputs) is other(inputs) is inputs
        with pytest.raises(ZeroDivisionError), override_forward({layer: lambda inputs: 1 / 0}):
            layer(inputs)
        assert layer(inputs) is inputs
    assert "forward" not in vars(layer)
    assert torch.equal(layer(inputs), own)
    assert torch.equal(other(inputs), inputs + 1)


def test_whole_models_take_as_many_sequences_as_their_logits_have_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen3")
    bank = build(model, tmp_path)
    point = np.array([[2, 4, 2]], dtype=np.float32)
    ((_, expected, _),) = make_engine(model, bank, TOKENS).evaluate(point)
    whole = list(model_nll(model, TOKENS))
    assert [len(batch) for batch in whole] == [12, 8]
    monkeypatch.setattr(blockwise, "WHOLE_LOGIT_BYTES", 5 * 4 * 40 * 97)
    ((_, found, _),) = make_engine(model, bank, TOKENS).evaluate(point)
    np.testing.assert_array_equal(found, expected)
    parts = list(model_nll(model, TOKENS))
    assert [len(batch) for batch in parts] == [5, 5, 5, 5]
    np.testing.assert_allclose(np.concatenate(parts), np.concatenate(whole), rtol=1e-5)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile for the CPU too, into torch's own operations: without Triton or a C compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(blockwise, "is_compilable", lambda model: True)
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_compiled_blocks_of_a_kind_share_a_graph_and_give_the_same_losses(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = tiny_model(name)
    bank = build(model, tmp_path)
    points = np.array([[2, 2, 2], [2, 4, 2], [REMOVED, 4, 4], [UNTOUCHED] * 3], dtype=np.float32)
    expected = [losses for _, losses, _ in make_engine(model, bank, TOKENS[:12]).evaluate(points)]
    request.getfixturevalue("traced")
    engine = make_engine(model, bank, TOKENS[:12])
    found = [losses for _, losses, _ in engine.evaluate(points)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    kinds = 2 if name == "gemma2" else 1  # of attention: torch may tell them apart, or not
    assert 1 <= counters["stats"]["unique_graphs"] <= kinds
    assert not any("forward" in vars(block) for block in find_blocks(model)[1])


def test_a_compiled_block_that_computes_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: None
) -> None:
    model = tiny_model("llama")
    bank = build(model, tmp_path)

    def doubled(block: Any) -> Any:
        forward = block.forward
        return lambda *args, **kwargs: 2 * forward(*args, **kwargs)

    monkeypatch.setattr(blockwise, "compiled_forward", doubled)
    with pytest.raises(ModelError, match=r"model\.layers\.0 is off by .* TORCH_COMPILE_DISABLE=1"):
        list(make_engine(model, bank, TOKENS[:2]).evaluate(np.array([[2, 2, 2]], dtype=np.float32)))


def test_blocks_are_compiled_on_a_gpu_unless_they_are_offloaded_or_divided_between_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(kernels_gpu, "_has_compiler", lambda device: True)
    assert kernels_gpu.is_compilable(SimpleNamespace(device=gpu))
    assert kernels_gpu.is_compilable(SimpleNamespace(device=gpu, hf_device_map={"": 0}))
    assert not kernels_gpu.is_compilable(SimpleNamespace(device=torch.device("cpu")))
    assert not kernels_gpu.is_compilable(SimpleNamespace(device=gpu, hf_device_map={"a": 0, "b": 1}))
    monkeypatch.setattr(blockwise, "is_compilable", lambda model: True)
    assert Blockwise(tiny_model("llama"), TOKENS).is_compiled
    model = tiny_model("llama")
    assert not Blockwise(model, TOKENS, OffloadedBlocks(model, torch.device("cpu"))).is_compiled


def test_where_torch_cannot_compile_it_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find C compiler\nthe rest")

    monkeypatch.setattr(torch, "compile", refuse)
    kernels_gpu._has_compiler.cache_clear()
    for _ in range(2):
        assert not kernels_gpu.is_compilable(SimpleNamespace(device=torch.device("cuda")))
    kernels_gpu._has_compiler.cache_clear()
    (record,) = caplog.records
    assert record.message.endswith("uncompiled and slower: Failed to find C compiler")

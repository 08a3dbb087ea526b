"""The bank: packed weights on disk, and as many dequantized ones in memory as there is room for."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from coopq.core.errors import Mismatch, ModelError, OutputError, RunError
from coopq.core.files import locked
from coopq.core.types import UNTOUCHED, Width
from coopq.core.weight_cache import WeightCache, bytes_at_once, ranks
from coopq.game.engines.prefix_engine import make_engine, model_nll
from coopq.model.load import LoadedModel
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import find_players
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.gptq.format import GPTQFormat, pack_weight
from coopq.quantizers.rtn import RTNBackend
from tests.architectures import tiny_model
from tests.quantizers import backend as make
from tests.quantizers import weight_quantizer

TOKENS = np.random.default_rng(0).integers(3, 97, size=(4, 16))


def bank(folder: Path, model: Any, fingerprint: str = "a", **options: Any) -> WeightBank:
    loaded = LoadedModel(model, None, torch.float32)
    return WeightBank(folder, loaded, find_players(model), make("rtn"), {"weights": fingerprint}, **options)


def test_the_bank_is_built_once(tmp_path: Path) -> None:
    model = tiny_model("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    original = weight.detach().clone()
    bank(tmp_path, model).build((2, 4))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(stamps) == 6  # three players at two widths
    seen: list[str] = []
    again = bank(tmp_path, model)
    again.build((2, 4), progress=lambda stage, *_: seen.append(stage))
    assert not seen
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == stamps
    backend = weight_quantizer("rtn")
    again.set_player(1, 4)
    expected = backend.dequantize(backend.quantize(original, 4), (64, 32), 4, torch.float32)
    assert torch.equal(weight, expected)
    again.set_player(1, UNTOUCHED)
    assert torch.equal(weight, original)


def test_the_bank_keeps_packed_weights_alone_and_makes_what_is_lacking(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank(tmp_path, model).build((2, 4))
    (tmp_path / "player001-4bit.safetensors").unlink()
    again = bank(tmp_path, model)
    again.build((2, 4))
    bits = {
        linear.name: width for player, width in zip(again.players, (2, 4), strict=False) for linear in player.linears
    }
    packed = dict(again.packed(bits))
    assert list(packed) == list(bits)
    for name, tensors in make("rtn").quantize_model(model, None, bits, None):
        assert packed[name].keys() == tensors.keys()
        assert all(torch.equal(packed[name][key], tensor) for key, tensor in tensors.items())
    for player, width in product(range(3), (2, 4)):
        linears = again.players[player].linears
        file = load_file(tmp_path / f"player{player:03d}-{width}bit.safetensors")
        n_bytes = sum(make("rtn").storage_bytes(linear.shape, width) for linear in linears)
        assert sum(tensor.nbytes for tensor in file.values()) == n_bytes


def test_a_bank_is_built_by_one_process_at_a_time(tmp_path: Path) -> None:
    shared = bank(tmp_path, tiny_model("llama"))
    with locked(tmp_path), pytest.raises(RunError, match=r"weight bank .* is in use by another process; wait for it"):
        shared.build((2,))
    shared.build((2,))


def test_a_bank_of_something_else_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank(tmp_path, model)
    with pytest.raises(Mismatch, match="weights: 'a' there, 'b' here"):
        bank(tmp_path, model, "b")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"model.layers.2.self_attn.v_proj holds values that are not finite"):
        bank(tmp_path, model).build((2,))


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match="the weight bank needs 0 MiB"):
        bank(tmp_path, tiny_model("llama")).build((2, 4))


@pytest.mark.parametrize("name", ["rtn", "hqq", "quanto", "ggml"])
def test_weights_are_those_that_the_backend_made(name: str, tmp_path: Path) -> None:
    model, backend = tiny_model("llama"), weight_quantizer(name)
    widths = (4, 8)
    originals = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    held = WeightBank(tmp_path, LoadedModel(model, None, torch.float32), find_players(model), backend, {}, room=0)
    held.build(widths)
    for player, width in product(range(3), widths):
        for linear in held.players[player].linears:
            packed = backend.quantize(originals[f"{linear.name}.weight"], width)
            expected = backend.dequantize(packed, linear.shape, width, torch.float32)
            assert torch.equal(held.weights(player, float(width))[linear.name], expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_gptq_are_scales_times_codes_less_zeros(bits: int) -> None:
    codes, group = torch.randint(2**bits, (32, 48)), torch.arange(48) // 16
    scales, zeros = torch.rand(32, 3).half(), torch.randint(2**bits, (32, 3))
    weight = (codes - zeros[:, group]) * scales.float()[:, group]
    packed = pack_weight({"weight": weight, "scales": scales, "zeros": zeros, "g_idx": group}, bits)
    tensor_format = GPTQFormat(16, act_order=False, symmetric=False)
    assert torch.equal(tensor_format.dequantize(packed, (32, 48), bits, torch.float32), weight)


def rooms(held: WeightBank) -> Iterator[int]:
    """Nothing besides what computes at once, less than a player more, a player more, and half of two widths."""
    weights = 4 * sum(player.n_weights for player in held.players)
    at_once = bytes_at_once(held.players, 4, shared=False)
    yield from (0, at_once, at_once + 100, at_once + 4 * held.players[-1].n_weights, at_once + weights)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("granularity", ["block", "linear"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_small_cache_gives_the_same_losses_and_leaves_the_originals(
    name: str, granularity: str, embeddings: bool, tmp_path: Path
) -> None:
    model = tiny_model(name)
    players = find_players(model, granularity, embeddings=embeddings)
    loaded, backend = LoadedModel(model, None, torch.float32), make("rtn", group_size=16)
    originals = {key: (tensor.data_ptr(), tensor.detach().clone()) for key, tensor in model.named_parameters()}
    full = WeightBank(tmp_path, loaded, players, backend, {})
    full.build((2, 4, 8))
    points = np.random.default_rng(1).choice([2, 4, 8, UNTOUCHED], size=(12, len(players))).astype(np.float32)
    expected = [losses for _, losses, _ in make_engine(model, full, TOKENS).evaluate(points)]
    with full.assigned(points[0].tolist()):
        own = np.concatenate(list(model_nll(model, TOKENS)))
    full.restore()
    for room in rooms(full):
        small = WeightBank(tmp_path, loaded, players, backend, {}, room=room)
        for _ in range(2):
            found = [losses for _, losses, _ in make_engine(model, small, TOKENS).evaluate(points)]
            np.testing.assert_array_equal(found, expected)
        assert small._cache.n_bytes <= max(0, room - bytes_at_once(players, 4, shared=False))
        with small.assigned(points[0].tolist()):
            np.testing.assert_array_equal(np.concatenate(list(model_nll(model, TOKENS))), own)
        small.restore()
        for key, tensor in model.named_parameters():
            place, values = originals[key]
            assert tensor.data_ptr() == place
            assert torch.equal(tensor, values)
    if not embeddings:
        small = WeightBank(tmp_path, loaded, players, backend, {}, room=0)
        engine = make_engine(model, small, TOKENS, offloaded=OffloadedBlocks(model, torch.device("cpu")))
        np.testing.assert_array_equal([losses for _, losses, _ in engine.evaluate(points)], expected)


def test_blocks_that_share_weights_keep_those_of_each_other(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    players, loaded = find_players(model, "linear"), LoadedModel(model, None, torch.float32)
    WeightBank(tmp_path, loaded, players, make("rtn"), {}).build((2, 4))
    points = np.random.default_rng(1).choice([2, 4], size=(8, len(players))).astype(np.float32)
    banks = [WeightBank(tmp_path, loaded, players, make("rtn"), {}, room=room) for room in (None, 0, 30000)]
    found = [[losses for _, losses, _ in make_engine(model, bank, TOKENS).evaluate(points)] for bank in banks]
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_the_model_holds_no_more_than_one_block_and_the_cache(tmp_path: Path) -> None:
    model = tiny_model("llama")
    small = bank(tmp_path, model, room=0)
    small.build((2, 4))
    originals = {key: tensor.data_ptr() for key, tensor in model.named_parameters()}
    for player in range(3):
        small.set_player(player, 2)
        changed = [key for key, tensor in model.named_parameters() if tensor.data_ptr() != originals[key]]
        assert changed
        assert all(key.startswith(f"model.layers.{player}.") for key in changed)


def test_weights_that_gave_way_are_given_again(tmp_path: Path) -> None:
    """A player whose weights were let go, kept by the cache and evicted has the model's own weights."""
    model = tiny_model("llama")
    players, loaded = find_players(model, "linear"), LoadedModel(model, None, torch.float32)
    names = [player.linears[0].name for player in players]
    gate, up, later = (names.index(f"model.layers.{of}_proj") for of in ("0.mlp.gate", "0.mlp.up", "1.mlp.gate"))
    room = bytes_at_once(players, 4, shared=False) + 4 * players[gate].n_weights  # the cache keeps one player
    small = WeightBank(tmp_path, loaded, players, make("rtn"), {}, room=room)
    small.build((2,))
    small.weights(later, 2)
    small.set_player(gate, 2)  # not kept: a block before the one in the cache
    small.set_player(later, 2)  # the gate gets its own weights back
    for kept in (gate, up):  # asked for until what is in the cache is stale
        for _ in range(21 * len(players)):
            small.weights(kept, 2)
    small.set_player(gate, 2)
    given = model.get_submodule(names[gate]).weight.data
    assert torch.equal(given, small.weights(gate, 2)[names[gate]])


def test_a_walk_longer_than_the_cache_finds_the_last_blocks_there() -> None:
    """The least recently used weights would be those of the next block: nothing would ever be found."""
    cache = WeightCache([0, 1, 2, 3, 4], limit=300)
    found = [visit(cache, player, 2) for _ in range(4) for player in range(5)]
    assert found == [False] * 5 + [False, False, True, True, True] * 3
    found = [visit(cache, player, 4) for _ in range(30) for player in range(5)]  # nobody asks for the first width now
    assert found[-5:] == [False, False, True, True, True]
    assert cache.n_bytes == 300


def visit(cache: WeightCache, player: int, width: Width) -> bool:
    """Ask for weights of 100 bytes as a bank does; whether they are there."""
    if cache.get((player, width)) is not None:
        return True
    if cache.make_room((player, width), 100) is not None:
        cache.put((player, width), {"a": torch.zeros(25)})
    return False


def test_the_ends_compute_with_every_block() -> None:
    players = find_players(tiny_model("qwen3"), embeddings=True)
    order = ranks(players, shared=False)
    assert order[0] == max(order)
    n_weights = [player.n_weights for player in players if not player.is_end]
    ends = sum(player.n_weights for player in players if player.is_end)
    assert bytes_at_once(players, 2, shared=False) == 2 * (max(n_weights) + ends)
    assert bytes_at_once(players, 2, shared=True) == 2 * (sum(n_weights) + ends)


def test_a_backend_of_whole_models_keeps_packed_weights_too(tmp_path: Path) -> None:
    class Whole(RTNBackend):
        whole_model = True

    model, backend = tiny_model("llama"), Whole()
    seen: list[tuple[int, int]] = []
    for lost in ([], ["player001-4bit.safetensors"]):
        for name in lost:
            (tmp_path / name).unlink()
        seen.clear()
        held = WeightBank(tmp_path, LoadedModel(model, None, torch.float32), find_players(model), backend, {})
        held.build((2, 4), progress=lambda _, done, total: seen.append((done, total)))
        assert seen[-1] == ((3, 3) if lost else (6, 6)), "all layers of a width are quantized together"
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    for linear in held.players[1].linears:
        weight = model.get_submodule(linear.name).weight.detach()
        expected = backend.dequantize(backend.quantize(weight, 4), linear.shape, 4, torch.float32)
        assert torch.equal(held.weights(1, 4)[linear.name], expected)


def test_a_layer_that_takes_long_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    players = find_players(model, embeddings=True)
    with caplog.at_level("INFO", "coopq"):
        WeightBank(tmp_path, LoadedModel(model, None, torch.float32), players, make("rtn"), {}).build((2, 4))
    (line,) = [line for line in caplog.messages if "embed_tokens" in line]
    n_weights = {linear.name: linear.n_weights for player in players for linear in player.linears}
    assert f"{100 * n_weights['model.embed_tokens'] / sum(n_weights.values()):.0f} %" in line


def test_a_file_of_the_bank_is_what_its_name_says(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank(tmp_path, model).build((2, 4))
    (tmp_path / "player000-4bit.safetensors").rename(tmp_path / "player000-2bit.safetensors")
    again = bank(tmp_path, model)
    with pytest.raises(OutputError, match=r"player000-2bit.safetensors is not what was written there \(bits: '4'"):
        again.weights(0, 2)
    (tmp_path / "player001-2bit.safetensors").rename(tmp_path / "player002-2bit.safetensors")
    with pytest.raises(OutputError, match=r"\(player: 'model.layers.1'"):
        again.weights(2, 2)
    data = bytearray((tmp_path / "player001-4bit.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "player001-4bit.safetensors").write_bytes(data)
    with pytest.raises(OutputError, match=r"\(crc32: "):
        again.weights(1, 4)


def test_a_weight_that_16_bit_scales_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e9
    with pytest.raises(ModelError, match=r"values of model.layers.1.mlp.up_proj at 2 bits that are not finite"):
        bank(tmp_path, model).build((2, 4))

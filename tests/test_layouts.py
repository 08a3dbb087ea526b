"""Models that store matrices in unusual ways, or whose blocks hand each other more than the hidden states."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import coopq
from coopq.core.errors import ModelError
from coopq.game.engines.prefix_engine import make_engine, model_nll
from coopq.model.load import LoadedModel
from coopq.model.matrices import matrix_of
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import covered_share, find_players, fused_groups
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.input_statistics import column_importance
from coopq.quantizers.rtn import RTNBackend
from tests.architectures import COMMON, GROUPED, tiny_model
from tests.checkpoints import Tokenizer, plan_for, save
from tests.folders import save_source

TOKENS = np.random.default_rng(0).integers(3, 97, size=(6, 16))
MIXTURE: dict[str, Any] = {**GROUPED, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: hf.GPT2Config(**GPT2, eos_token_id=2),
    "gpt_oss": lambda: hf.GptOssConfig(**MIXTURE, num_local_experts=4, sliding_window=8),
    "llama4": lambda: hf.Llama4TextConfig(
        **{**MIXTURE, "num_experts_per_tok": 1}, num_local_experts=4, intermediate_size_mlp=64, attention_chunk_size=16
    ),
    "dbrx": lambda: hf.DbrxConfig(
        vocab_size=97,
        d_model=32,
        n_heads=4,
        n_layers=3,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "jamba": lambda: hf.JambaConfig(
        **{**MIXTURE, "num_hidden_layers": 4},
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    "gemma4": lambda: hf.Gemma4TextConfig(
        **{**GROUPED, "num_hidden_layers": 4},
        sliding_window=8,
        global_head_dim=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=97,
    ),
    "falcon": lambda: hf.FalconConfig(**COMMON, new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "phimoe": lambda: hf.PhimoeConfig(**MIXTURE, num_local_experts=4),
}


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key and "A_log" not in key:
                parameter.normal_(0, 0.1)
    return model


def build(model: Any, folder: Path, granularity: str = "block") -> WeightBank:
    loaded = LoadedModel(model, None, torch.float32)
    bank = WeightBank(folder, loaded, find_players(model, granularity), RTNBackend(group_size=8), {})
    bank.build((2, 4))
    return bank


@pytest.mark.parametrize("granularity", ["block", "linear"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_computes_what_was_measured(name: str, granularity: str, tmp_path: Path) -> None:
    model = tiny(name)
    bank = build(model, tmp_path / "bank", granularity)
    points = np.random.default_rng(1).choice([2.0, 4.0], size=(3, len(bank.players))).astype(np.float32)
    measured = {point.tobytes(): losses for point, losses, _ in make_engine(model, bank, TOKENS).evaluate(points)}
    plan = plan_for(model, "rtn", 8, [int(bits) for bits in points[0]], granularity)
    save(LoadedModel(model, Tokenizer(), torch.float32), plan, tmp_path / "saved")
    again = coopq.load(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(np.concatenate(list(model_nll(again, TOKENS))), measured[points[0].tobytes()], rtol=1e-5)


INPUTS = {
    "gpt2": {"transformer.h.0.attn.c_attn": (96, 32), "transformer.h.0.mlp.c_proj": (32, 128)},
    "gpt_oss": {
        "model.layers.0.mlp.experts.gate_up_proj": (512, 32),
        "model.layers.0.mlp.experts.down_proj": (128, 64),
    },
    "llama4": {
        "model.layers.0.feed_forward.experts.gate_up_proj": (512, 32),
        "model.layers.0.feed_forward.experts.down_proj": (128, 64),
    },
    "dbrx": {
        "transformer.blocks.0.ffn.experts.mlp.w1": (256, 32),
        "transformer.blocks.0.ffn.experts.mlp.w2": (128, 64),
    },
}


@pytest.mark.parametrize("name", INPUTS)
def test_groups_lie_along_the_inputs(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    bank = build(model, tmp_path)
    shapes = {linear.name: linear.shape for player in bank.players for linear in player.linears}
    assert {key: shapes[key] for key in INPUTS[name]} == INPUTS[name]
    for key, (_, inputs) in INPUTS[name].items():
        matrix, quantized = matrix_of(model, key), bank.weights(0, 2)[key]
        assert quantized.shape == matrix.parameter.shape
        groups = matrix.rows(quantized).reshape(-1, 8)
        assert max(len(group.unique()) for group in groups) <= 4, "2 bits have 4 values in each group of inputs"
        assert groups.numel() % inputs == 0
        assert torch.equal(matrix.stored(matrix.rows()), matrix.parameter.data)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "dbrx"])
def test_every_expert_has_an_importance_of_its_own(name: str) -> None:
    model = tiny(name)
    names = [key for key in INPUTS[name] if "gate_up" in key or "w1" in key]
    found = column_importance(model, names, TOKENS)[names[0]]
    assert found.shape == (4, 32)
    assert len({tuple(row.tolist()) for row in found}) > 1


def test_experts_that_no_token_reaches_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("phimoe")
    with torch.no_grad():
        model.model.layers[0].mlp.router.weight.zero_()  # the first experts are always chosen
    with caplog.at_level(logging.WARNING):
        column_importance(model, ["model.layers.0.mlp.experts.down_proj"], TOKENS)
    assert "experts of model.layers.0.mlp.experts.down_proj were reached by no token" in caplog.text


@pytest.mark.parametrize("name", ["jamba", "dbrx", "llama4", "phimoe", "gpt_oss"])
def test_routers_stay_as_they_are(name: str) -> None:
    names = [player.name for player in find_players(tiny(name), "linear")]
    assert names
    assert not any("router" in name for name in names)


def test_a_router_that_is_a_linear_layer_is_a_player_on_request() -> None:
    config = hf.JetMoeConfig(**{**MIXTURE, "num_hidden_layers": 2}, num_local_experts=4, kv_channels=8)
    model = hf.AutoModelForCausalLM.from_config(config)
    routers = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "router" in name
    ]
    assert routers
    without, with_them = (find_players(model, "linear", routers=routers) for routers in (False, True))
    assert {player.name for player in with_them} - {player.name for player in without} == set(routers)


def test_a_gate_with_one_output_and_a_small_key_projection() -> None:
    config = hf.Qwen2MoeConfig(**MIXTURE, num_experts=16, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    model = hf.AutoModelForCausalLM.from_config(config)
    names = [player.name for player in find_players(model, "linear")]
    assert not any(name.endswith("shared_expert_gate") for name in names)
    assert "model.layers.0.self_attn.k_proj" in names, "16 rows, as many as experts, and no router"
    assert "model.layers.0.mlp.shared_expert.gate_proj" in names
    assert 0.9 < covered_share(model, find_players(model)) < 1


def test_fused_groups_are_those_that_vllm_multiplies_as_one() -> None:
    names = [
        "a.q_a_proj",
        "a.kv_a_proj_with_mqa",
        "a.q_b_proj",
        "b.in_proj_qkv",
        "b.in_proj_z",
        "b.in_proj_b",
        "b.in_proj_a",
    ]
    assert fused_groups([*names, "c.w1", "c.w2", "c.w3"]) == [
        ("a.q_a_proj", "a.kv_a_proj_with_mqa"),
        ("a.q_b_proj",),
        ("b.in_proj_qkv", "b.in_proj_z"),
        ("b.in_proj_b", "b.in_proj_a"),
        ("c.w1", "c.w3"),
        ("c.w2",),
    ]


def test_blocks_on_the_host_share_keys_and_values_as_the_model_does(tmp_path: Path) -> None:
    model = tiny("gemma4")
    bank = build(model, tmp_path)
    points = np.array([[2, 4, 4, 2], [2, 4, 2, 4], [4, 2, 4, 4], [4, 4, 4, 4], [2, 2, 4, 2]], dtype=np.float32)
    expected = {point.tobytes(): losses for point, losses, _ in make_engine(model, bank, TOKENS).evaluate(points)}
    engine = make_engine(model, bank, TOKENS, offloaded=OffloadedBlocks(model, torch.device("cpu")))
    for point, losses, _ in engine.evaluate(points):
        np.testing.assert_allclose(losses, expected[point.tobytes()], rtol=1e-6)


def test_blocks_that_share_weights_cannot_stay_on_the_host(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    bank = build(model, tmp_path, "linear")
    assert len({player.name for player in bank.players}) == 7 + 7 + 4
    points = np.random.default_rng(1).choice([2.0, 4.0], size=(4, len(bank.players))).astype(np.float32)
    for point, losses, _ in make_engine(model, bank, TOKENS).evaluate(points):
        for player, bits in enumerate(point):
            bank.set_player(player, int(bits))
        np.testing.assert_allclose(losses, np.concatenate(list(model_nll(model, TOKENS))), rtol=1e-5)
    bank.restore()
    with pytest.raises(ModelError, match="its blocks share weights, so they cannot stay on the host"):
        make_engine(model, bank, TOKENS, offloaded=OffloadedBlocks(model, torch.device("cpu")))


def test_a_layer_that_two_blocks_share_is_saved_once_and_loaded_in_both(tmp_path: Path) -> None:
    config = hf.Zamba2Config(
        **{**GROUPED, "num_hidden_layers": 4, "num_key_value_heads": 4},
        layers_block_type=["mamba", "hybrid"] * 2,
        mamba_headdim=16,
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=4,
        chunk_size=8,
        num_mem_blocks=1,
        attention_head_dim=16,
        use_mem_rope=True,
    )
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    bits = [2, 4, 2, 4]
    save(LoadedModel(model, Tokenizer(), torch.float32), plan_for(model, "rtn", 8, bits), tmp_path / "saved")
    bank = build(model, tmp_path / "bank")
    for player, width in enumerate(bits):
        bank.set_player(player, width)
    expected = np.concatenate(list(model_nll(model, TOKENS)))
    again = coopq.load(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(np.concatenate(list(model_nll(again, TOKENS))), expected, rtol=1e-5)


def with_states_of_another_shape(**settings: Any) -> Any:
    """A Gemma 3n, whose blocks hand each other four states a token."""
    config = hf.Gemma3nTextConfig(
        **{
            **GROUPED,
            "num_hidden_layers": 2,
            "intermediate_size": [64] * 2,
            "vocab_size_per_layer_input": 97,
            **settings,
        },
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        sliding_window=8,
    )
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_model_with_states_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = with_states_of_another_shape()
    with pytest.raises(ModelError, match=r"states before the first have shape \(4, 6, 16, 32\)"):
        list(make_engine(model, build(model, tmp_path), TOKENS).evaluate(np.array([[2, 4]], dtype=np.float32)))


def test_a_model_that_cannot_be_measured_is_refused_before_its_weights_are_quantized(tmp_path: Path) -> None:
    save_source(with_states_of_another_shape(vocab_size=512, vocab_size_per_layer_input=512), tmp_path / "model")
    work = []
    with pytest.raises(ModelError, match="states before the first have shape"):
        coopq.quantize(
            coopq.Request.from_options(model=str(tmp_path / "model"), tokens=128, sequence_length=64, bits=(4, 8)),
            coopq.Goal(budget="5avg"),
            tmp_path / "out",
            progress=lambda stage, *_: work.append(stage),
        )
    assert "loading the model" in work
    assert "quantizing" not in work

"""Sizes of tiny models: what entries of configurations are called, and the values of types that need their own."""

from typing import Any

UNSET: Any = object()
"""Stands for an entry that keeps its default."""
VOCABULARY, HIDDEN, LAYERS, HEADS, HEAD_DIM, INNER, EXPERTS, POSITIONS = 512, 64, 4, 4, 16, 128, 4, 512


def _named(names: str, size: Any) -> dict[str, Any]:
    """The same size for several names."""
    return dict.fromkeys(names.split(), size)


LISTS_BY_LAYER = (
    "layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_layers", "indexer_types",
)  # fmt: skip
"""Entries that name the kind of each layer."""

NAMES: dict[str, dict[str, Any]] = {
    "hidden": _named(
        "hidden_size d_model n_embd dim embed_dim emb_dim embedding_dim lru_width word_embed_proj_dim", HIDDEN
    ),
    "layers": _named(
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers layers num_blocks",
        LAYERS,
    ),
    "heads": _named(
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_sliding_attention_heads",
        HEADS,
    ),
    "key and value heads": _named(
        "num_key_value_heads n_head_kv num_kv_heads swa_num_key_value_heads num_query_groups "
        "num_global_key_value_heads",
        2,
    ),
    "inner": _named(
        "intermediate_size ffn_dim d_ff dff dim_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
        "intermediate_size_mlp dense_intermediate_size feed_forward_size d_inner n_inner block_ff_dim "
        "ffn_intermediate_size",
        INNER,
    ),
    "inner of experts": _named(
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size share_expert_dim moe_hidden_size",
        64,
    ),
    "experts": _named("num_experts num_local_experts n_routed_experts moe_num_experts", EXPERTS),
    "chosen experts": _named("num_experts_per_tok moe_topk top_k_experts moe_k num_experts_per_token", 2),
    "positions": _named(
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length", POSITIONS
    ),
}
"""Entries by what they count."""

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2,
    "cls_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": 2, "forced_bos_token_id": None,
    **_named("head_dim swa_head_dim global_head_dim attention_head_size kv_channels dim_head d_head d_kv", HEAD_DIM),
    **_named("linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim", HEAD_DIM),
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 4, "index_n_heads": 4, "index_topk": 8,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": 16, "o_lora_rank": 32, "o_groups": 2, "n_group": 1, "topk_group": 1, "rotary_dim": 8,
    "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32,
    "mamba_d_ssm": 128, "mamba_dt_rank": 32, "ssm_state_size": 16, "state_size": 16, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 32, "time_step_rank": 32, "n_mamba_heads": 2,
    "sliding_window": 16, "sliding_window_size": 16, "attention_chunk_size": 32, "window_size": 16,
    "attention_window_size": 16, "local_attention": 16, "keep_window_size": 64, "block_size": 32,
    "hidden_size_per_layer_input": 32, "laurel_rank": 8, "vocab_size_per_layer_input": VOCABULARY,
    "query_pre_attn_scalar": HEAD_DIM, "block_multiple_of": 16, "num_kv_shared_layers": 2, "d_rel": 8,
    "rel_extent": 64, "router_hidden_size": 16, "adapter_rank": 8, "zero_expert_num": 2, "type_vocab_size": 2,
    "max_window_layers": 2, "first_k_dense_replace": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 3,
    "num_nextn_predict_layers": 0, "floor_scale": 64, "original_max_position_embeddings": 256, "hc_lowrank": 8,
    "ple_embed_dim": 16, "ngram_vocab_size_base": 512, "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8,
    "gated_norm_rank": 8, "encoder_hash_byte_group_vocab": 64, "input_embedding_size": 64, "output_embedding_size": 64,
    "embedding_size": 64, "index_block_size": 8, "index_topk_blocks": 4, "index_kpool": 4, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "layer_group_size": 2, "expert_layer_period": 2,
    "attn_layer_period": 2, "expert_layer_offset": 1, "attn_layer_offset": 1, "moe_latent_size": None,
    "max_source_positions": 512, "local_attention_window_len": 64, "hidden_size_global": 64,
    "decoder_vocab_size": VOCABULARY, "d_embed": HIDDEN, "projector_hidden_size": 64, "out_hidden_size": HIDDEN,
}  # fmt: skip
"""Other entries of language models."""

VISION: dict[str, Any] = {
    **_named("hidden_size embed_dim d_model width vision_hidden_size conf_hidden_size", 32),
    **_named("num_hidden_layers depth num_layers encoder_layers n_layers layers num_encoder_layers", 2),
    **_named("num_attention_heads num_heads encoder_attention_heads num_key_value_heads attention_heads", 2),
    **_named("intermediate_size encoder_ffn_dim ffn_dim mlp_dim", 64),
    **_named("projection_dim out_hidden_size vision_output_dim text_hidden_size", HIDDEN),
    **_named("projector_input_dim projector_output_dim", HIDDEN),
    **_named("deepstack_visual_indexes fullatt_block_indexes intermediate_layers_indices", [0, 1]),
    **_named("conf_num_hidden_layers conf_num_attention_heads", 2),
    "head_dim": 16, "image_size": 32, "patch_size": 8, "vocab_size": VOCABULARY, "num_position_embeddings": 16,
    "vision_soft_tokens_per_image": 4, "max_position_embeddings": 512, "position_embedding_size": 4,
    "num_global_layers": 1, "model_args": None, "vocab_offset": 0, "video_temporal_patch_size": 2, "base_channels": 32,
    "pos_emb_height": 4, "pos_emb_width": 4,
}  # fmt: skip
"""Entries of parts that read images or sounds."""

_SLIDING = ["sliding_attention", "full_attention"] * 2
_GEMMA3N = {
    "intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "layer_types": _SLIDING, "num_kv_shared_layers": 2,
}  # fmt: skip
_HYBRID = ["linear_attention", "hybrid"] * 2
_FOUR_KV = {"num_key_value_heads": 4}


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    """Settings of rotary embeddings with a section each for time, height and width: half of a head together."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}


_THREE_AXES = {"rope_parameters": _rope(2, 3, 3)}
_IMAGE_TOKENS = {"vocabulary_map": {"<image>": 500, "<|extra_200|>": 501}}

BY_TYPE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_experts": 4},
    "biogpt": {"intermediate_size": 128},
    "codegen": {"rotary_dim": 8},
    "chameleon": _IMAGE_TOKENS,
    "cohere_compass_text": {
        "layer_types": _SLIDING, "rope_parameters": {"full_attention": None, "sliding_attention": _rope(2, 3, 3)},
    },
    "cpmant": {"dim_head": 16, "prompt_types": 4, "segment_types": 4},
    "ctrl": {"dff": 128},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", *["sparse"] * 3], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy", **_FOUR_KV},
    "deepseek_v3": _FOUR_KV,
    "deepseek_v32": _FOUR_KV,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": _FOUR_KV,
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 64},
    "dots3_note_text": {"per_layer_config": {}, **_FOUR_KV},
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 64},
    "emu3": _IMAGE_TOKENS,
    "ernie4_5_vl_moe_text": {"rope_parameters": _rope(3, 3, 2), "moe_intermediate_size": [64, 32]},
    "falcon": {"num_kv_heads": 4, "alibi": False, "new_decoder_architecture": True},
    "falcon_h1": {
        "head_dim": 16, "mlp_multipliers": [1.3, 0.7], "ssm_out_multiplier": 0.6, "attention_out_multiplier": 0.8,
        "key_multiplier": 0.9, "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 1.2], "embedding_multiplier": 5.0,
        "lm_head_multiplier": 0.4,
    },
    "glm4_moe_lite": _FOUR_KV, "glm_moe_dsa": _FOUR_KV, "youtu": _FOUR_KV,
    "gpt-sw3": {"n_inner": None}, "gpt2": {"n_inner": None}, "gpt_bigcode": {"num_key_value_heads": 1},
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "glm46v_text": _THREE_AXES,
    "glm4v_moe_text": {"rope_parameters": _rope(1, 1, 2, partial_rotary_factor=0.5)},
    "glm4v_text": _THREE_AXES,
    "glm5_next_text": {"qk_nope_head_dim": 16, "v_head_dim": 16, **_FOUR_KV},
    "glm_ocr_text": _THREE_AXES,
    "glmga_text": _THREE_AXES,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granite4_vision": {"deepstack_layer_map": [[0, 1], [1, 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": [2] * 4, "num_experts": 4},
    "hunyuan_vl_text": {"head_dim": 16, **_THREE_AXES},
    "lfm2": {"full_attn_idxs": [1, 3], "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, **_FOUR_KV},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moshi": {"audio_vocab_size": 512},
    "musicgen_decoder": {"num_codebooks": 2},
    "musicgen_melody_decoder": {"num_codebooks": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "qwen2_5_omni_text": _THREE_AXES,
    "qwen2_5_vl_text": _THREE_AXES,
    "qwen2_vl_text": _THREE_AXES,
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 48], "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
    },
    "step3p5": {
        "sliding_window": 16, "layer_types": _SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "xlm": {"n_heads": 4, "emb_dim": 64, "n_layers": 4, "causal": True},
    "xlnet": {"d_inner": 128, "d_head": 16},
    "xlstm": {"num_heads": 4, "num_blocks": 4, "hidden_size": 64, "embedding_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": _HYBRID, "attention_head_dim": 32, "num_key_value_heads": 4, "attention_hidden_size": 128,
    },
    "zamba2": {
        "layers_block_type": _HYBRID, "attention_head_dim": 32, "mamba_headdim": 16, "hybrid_layer_ids": [1, 3],
        "num_key_value_heads": 4, "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What the rules above do not get right, by type."""

_TIED = {"tie_word_embeddings": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "bamba@attn": {"attn_layer_indices": [1, 3]},
    "deepseek_v2@lite": {"q_lora_rank": None},
    "deepseek_v3@noqlora": {"q_lora_rank": None},
    "deepseek_v3@tied": _TIED,
    "deepseek_v32@shared": {"indexer_types": ["full", "shared", "shared", "full"]},
    "falcon@7b": {"num_kv_heads": 1, "new_decoder_architecture": False, "multi_query": True},
    "gemma3n_text@nokv": {"num_kv_shared_layers": 0},
    "gemma4_text@kv": {"num_kv_shared_layers": 2, "layer_types": _SLIDING, "num_hidden_layers": 4},
    "gemma4_text@moe": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "gemma4_text@noperlayer": {"hidden_size_per_layer_input": 0},
    "glm_moe_dsa@shared": {"indexer_types": ["full", "shared", "shared", "full"]},
    "gpt_neox@tied": _TIED,
    "granitemoehybrid@attn": {
        "layer_types": ["mamba", "attention"] * 2,
        "layers_block_type": ["mamba", "attention"] * 2,
    },
    "lfm2@bias": {"conv_bias": True},
    "llama@tied": _TIED,
    "llama4_text@dense": {"moe_layers": [1, 3], "interleave_moe_layer_step": 2},
    "nemotron_h@dense": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
    "opt@350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "phi3@tied": _TIED,
    "qwen2@sliding": {"use_sliding_window": True},
    "qwen3@tied": _TIED,
    "qwen3_next@tied": _TIED,
}
"""Further forms of a type that users have: TYPE@FORM."""

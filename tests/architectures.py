"""Tiny random models of the architectures that must work without a table; only their shape is the point."""

from typing import Any

import torch
import transformers as hf

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
SLIDING = {**GROUPED, "sliding_window": 8}

CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**SLIDING),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED),
    "gemma2": lambda: hf.Gemma2Config(**SLIDING, query_pre_attn_scalar=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**SLIDING, query_pre_attn_scalar=8),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**COMMON, intermediate_size=64),
    "opt": lambda: hf.OPTConfig(**COMMON, ffn_dim=64, word_embed_proj_dim=16),
    "phi3": lambda: hf.Phi3Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}),
}


def tiny_model(name: str) -> Any:
    """A model with random weights large enough that its layers matter, in evaluation mode."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model

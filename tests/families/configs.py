"""Tiny models with random weights, of many families, from their configurations alone."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.words import save_words

WORDS = 128
# A family whose configuration computes this by itself.
COMPUTED = object()
# An attention head of 32 and experts of 128 are the smallest that vLLM's kernels for CPUs take.
COMMON = {
    "vocab_size": WORDS,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
}
GROUPED = EXPERTS | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
LATENT = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "head_dim": COMPUTED,
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
}
GPT_2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
WINDOW = {"sliding_window": 16}
# These have one matrix for words in and out in vLLM, whatever their configuration says.
TIED = {"tie_word_embeddings": True}

# What each family has beside COMMON, by transformers' `model_type`.
DENSE: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bloom": {"n_layer": 2, "n_head": 4, **TIED},
    "cohere": {"logit_scale": 0.25, **TIED},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 64, **TIED},
    "ernie4_5": {},
    "exaone4": WINDOW,
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "head_dim": COMPUTED, **TIED},
    "gemma": TIED,
    "gemma2": {"query_pre_attn_scalar": 32, **WINDOW, **TIED},
    "gemma3_text": {"query_pre_attn_scalar": 32, **WINDOW, **TIED},
    "glm": {},
    "glm4": {},
    "gpt2": {**GPT_2, **TIED},
    "gpt_bigcode": {**GPT_2, "num_key_value_heads": COMPUTED, **TIED},
    "gpt_neox": {"num_key_value_heads": COMPUTED},
    "gptj": {**GPT_2, "rotary_dim": 8},
    "granite": {"logits_scaling": 0.25, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llama": {},
    "minicpm3": {**LATENT, "q_lora_rank": 16, "kv_lora_rank": 32, "qk_rope_head_dim": 16},
    "ministral": {},
    "mistral": WINDOW,
    "mpt": {"d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, **TIED},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 128, "init_std": 0.2, **TIED},
    "persimmon": {"num_key_value_heads": COMPUTED},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {"query_pre_attn_scalar": 32, **TIED},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**GROUPED, **LATENT, "q_lora_rank": None},
    "deepseek_v3": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        **GROUPED,
        **LATENT,
        **YARN,
        "q_lora_rank": None,
    },
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "glm4_moe": GROUPED,
    "gpt_oss": {**EXPERTS, **WINDOW},
    "granitemoe": {**EXPERTS, "logits_scaling": 0.4},
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 128},
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 128},
    "qwen3_moe": EXPERTS,
}
# With layers that carry a state from token to token instead of keys and values, or beside them.
RECURRENT: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA_2, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA_2, "mamba_d_ssm": 256, "mamba_chunk_size": 8},
    "granitemoehybrid": {
        **EXPERTS,
        **MAMBA_2,
        "shared_intermediate_size": 128,
        "layer_types": ["mamba", "attention"],
    },
    "jamba": {
        **EXPERTS,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        "block_dim": 128,
        "conv_dim": 128,
        **TIED,
    },
    "lfm2_moe": {**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"], **TIED},
    "mamba": {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4},
    "mamba2": {
        "intermediate_size": COMPUTED,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 32,
        "expand": 2,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "qwen3_5_text": DELTA_NET,
    "qwen3_next": {**EXPERTS, **DELTA_NET, "shared_expert_intermediate_size": 128},
    "recurrent_gemma": {
        "lru_width": 128,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
        **TIED,
    },
}
FAMILIES = DENSE | MIXTURES | RECURRENT
# A soft cap does nothing to small logits, and a scale little.
LOGITS_SD = 5.0


def tiny(family: str, seed: int = 0) -> Any:
    """A float32 model whose logits have a standard deviation of LOGITS_SD or more."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = {name: value for name, value in (COMMON | FAMILIES[family]).items() if value is not COMPUTED}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**values)
    # The only implementation that every family has whole: PyTorch's fused one knows no cap and no sink.
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    raise_logits(model)
    return model


@torch.no_grad()
def raise_logits(model: Any) -> None:
    """Raises the output's matrix until the logits are large; where the words come in by it too, the norms'.
    Raises ArithmeticError where they stay small."""
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    norms = {name: module for name, module in model.named_modules() if "Norm" in type(module).__name__}
    text = torch.arange(WORDS)[None]
    for name, norm in norms.items():
        # Gemma's words come in so large that each would be followed by itself.
        if tied and name.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
            norm.weight.add_(10)
    for _ in range(60):
        if float(logits(model, text).std()) >= LOGITS_SD:
            return
        if tied:
            # Of a norm that multiplies by 1 + weight, too.
            for norm in norms.values():
                norm.weight.mul_(1.2).add_(0.2)
        else:
            head.mul_(1.5)
    raise ArithmeticError("the logits stay small")


def logits(model: Any, token_ids: Tensor) -> Tensor:
    """(L, V) of a text (1, L), as the model itself computes them."""
    found: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return found[0].float()


def save(family: str, directory: Path) -> None:
    """The tiny model with a tokenizer of one token a word, `w0` to `w127`, as a Hugging Face directory."""
    tiny(family).save_pretrained(directory)
    save_words(directory, WORDS, end=2)

"""The families that are tested: what the tiny config of each needs beyond the common small values."""

from typing import Any

LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
CONVOLUTIONAL = {"layer_types": ["conv", "full_attention"]}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8}
NEMOTRON_H = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8, "n_groups": 1}
ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "mamba_d_state": 8,
    "attention_head_dim": 32,
}
GEMMA4 = {
    **LAYER_TYPES,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
}
GEMMA3N = {
    **LAYER_TYPES,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "intermediate_size": 48,
}
# Of four layers the last two use keys and values of the first two.
SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
INKLING = {"swa_num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_head_dim": 16}
GEMMA4_VISION = {"model_type": "gemma4_vision", "position_embedding_size": 64}
CODEC = {"num_filters": 16, "hidden_size": 64, "upsample_groups": 64}
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
CONVOLUTIONS = {"downsample_hidden_size": 32}


def text(**overrides: Any) -> dict[str, Any]:
    return {"text_config": overrides}


def rope(key: str, *sections: int) -> dict[str, Any]:
    """Rotary angles from several positions, those of images among them."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, key: list(sections)}}


def rope_by_layer(*sections: int) -> dict[str, Any]:
    one = rope("mrope_section", *sections)["rope_parameters"]
    return {**LAYER_TYPES, "rope_parameters": dict.fromkeys(LAYER_TYPES["layer_types"], one)}


# One line a family: what its config needs beyond the common small values, if anything.
TEXT: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "beam": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": {},
    "cohere2_moe": {},
    "cwm": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": 2,
            "moe_top_k": 1,
            "hidden_size": 64,
        },
    },
    "diffllama": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "flex_olmo": {},
    "flint": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": GEMMA3N,
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": {**GEMMA4, "num_global_key_value_heads": 4},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt_bigcode": {"multi_query": False},
    "gpt_oss": {},
    "granite": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hyperclovax": {},
    "inkling_text": INKLING,
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "kolibri1": {},
    "laguna": {},
    "lfm2": {},
    "lfm2_moe": CONVOLUTIONAL,
    "lfm3": CONVOLUTIONAL,
    "llama": {},
    "llama4_text": {},
    "mellum": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "moshi": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": NEMOTRON_H,
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_moe": {},
    "qwen3_next": HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
}
FAMILIES: dict[str, dict[str, Any]] = {
    **TEXT,
    # What follows a colon tells forms of a family apart.
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3],
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere:norms": {"use_qk_norm": True},
    "cohere_compass_text": rope_by_layer(4, 2, 2),
    "doge": {},
    "eurobert": {},
    "falcon:one-for-each": {"multi_query": False},
    "falcon:sequential": {"multi_query": False, "parallel_attn": False, "alibi": True},
    "gemma3n_text:shared": {**GEMMA3N, **SHARED, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text:keys-are-values": {
        **GEMMA4,
        "global_head_dim": 32,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
    },
    "gemma4_text:shared": {**GEMMA4, **SHARED},
    "higgs_audio_v2": {},
    "inkling2_text": INKLING,
    "inkling_text:different": {**INKLING, "swa_num_key_value_heads": 2, "local_layer_ids": [0]},
    "phi:norms": {"qk_layernorm": True},
    "qwen4_exp_text": {
        **HYBRID,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 4,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "stablelm:norms": {"qk_layernorm": True},
    "ultrabert": {},
    "zamba": {**ZAMBA, "n_mamba_heads": 2},
    "zamba2": {
        **ZAMBA,
        "num_mem_blocks": 1,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "adapter_rank": 4,
    },
    # Encoder-decoders.
    "canary": {},
    "cohere_asr": {},
    "dia": {},
    "dia:different": {"decoder_config": {"cross_num_key_value_heads": 2}},
    "t5gemma": {},
    "t5gemma2": {},
    # Models that also see or hear: only their text model changes.
    "aria": {},
    "audioflamingo3": {},
    "aya_vision": {},
    "chameleon": {
        "vocabulary_map": {"<image>": 5},
        "vq_config": {
            **VQ,
            "embed_dim": 16,
            "latent_channels": 16,
            "num_embeddings": 16,
            "resolution": 16,
        },
    },
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "cohere_compass": text(**rope_by_layer(4, 2, 2)),
    "colpali": {"architectures": ["ColPaliForRetrieval"]},
    "colqwen2": {
        "architectures": ["ColQwen2ForRetrieval"],
        "vlm_config": text(**rope("mrope_section", 2, 3, 3)),
    },
    "cosmos3_edge": text(**rope("mrope_section", 4, 2, 2)),
    "cosmos3_omni": {},
    "csm": {
        "text_vocab_size": 128,
        "num_codebooks": 4,
        "codec_config": CODEC,
        "depth_decoder_config": {"backbone_hidden_size": 64, "num_codebooks": 4},
    },
    "deepseek_vl": {},
    "deepseek_vl_hybrid": {
        "high_res_vision_config": {"model_type": "sam_vision_model", "output_channels": 16}
    },
    "diffusion_gemma": {
        **text(**LAYER_TYPES, top_k_experts=1, moe_intermediate_size=24, global_head_dim=16),
        "vision_config": GEMMA4_VISION,
    },
    "emu3": {
        "architectures": ["Emu3ForConditionalGeneration"],
        "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6},
        "vq_config": {
            **VQ,
            "embed_dim": 16,
            "latent_channels": 16,
            "codebook_size": 16,
            "attn_resolutions": [],
        },
    },
    "ernie4_5_vl_moe": text(moe_intermediate_size=[24, 24], **rope("mrope_section", 3, 3, 2)),
    "exaone4_5": {},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3": {},
    "gemma4": {**text(**GEMMA4), "vision_config": GEMMA4_VISION},
    "gemma4_unified": {},
    "glm46v": text(**rope("mrope_section", 2, 3, 3)),
    "glm4v": text(**rope("mrope_section", 2, 3, 3)),
    "glm4v_moe": text(**rope("mrope_section", 2, 1, 1)),
    "glm_image": text(**rope("mrope_section", 2, 3, 3)),
    "glm_ocr": text(**rope("mrope_section", 2, 3, 3)),
    "glmasr": {},
    "glmga": text(**rope("mrope_section", 2, 3, 3)),
    "got_ocr2": {},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    "granite_docling": {},
    "granite_speech": {},
    "granite_speech_plus": {},
    "hunyuan_vl": {
        **text(**rope("xdrope_section", 2, 2, 2, 2)),
        "vision_config": {"max_image_size": 64},
    },
    "hyperclovax_vision_v2": {},
    "idefics2": {},
    "idefics3": {},
    "internvl": {},
    "janus": {"vq_config": VQ},
    "kyutai_speech_to_text": {
        "codec_config": CODEC,
        "audio_pad_token_id": 0,
        "num_codebooks": 1,
        "codebook_vocab_size": 128,
    },
    "lfm2_vl": {},
    "lfm3_vl": text(**CONVOLUTIONAL),
    "lighton_ocr": {},
    "llama4": {
        "architectures": ["Llama4ForConditionalGeneration"],
        "vision_config": {"projector_input_dim": 64, "projector_output_dim": 64},
    },
    "llava": {},
    "llava_next": {},
    "llava_next_video": {},
    "llava_onevision": {},
    "minicpm_ocr": text(**HYBRID),
    "minicpmv4_6": text(**HYBRID),
    "minicpmv4_7": text(**HYBRID),
    "minimax_m3_vl": {},
    "mistral3": {},
    "mllama": {
        "architectures": ["MllamaForConditionalGeneration"],
        **text(cross_attention_layers=[1]),
        "vision_config": {"intermediate_layers_indices": [0], "num_global_layers": 1},
    },
    "molmo2": {
        "vision_config": {"image_size": [32, 32]},
        "adapter_config": {"vision_feature_layer": [1, 0]},
    },
    "moss_transcribe_diarize": {},
    "muse_glimmer": {"projector_hidden_size": 64},
    "muse_spark": {
        "projector_hidden_size": 64,
        **text(moe_hidden_size=32),
        "audio_config": {"patch_sizes": [4, 4], "hidden_sizes": [16, 64], "depths": [1, 1]},
    },
    "musicflamingo": {},
    "nemotron_h_omni": {
        **text(**NEMOTRON_H),
        "vision_config": {"video_temporal_patch_size": 2, "max_resolution": 64},
        "projector_hidden_size": 32,
    },
    "ovis2": {},
    "paddleocr_vl": text(**rope("mrope_section", 2, 3, 3)),
    "paligemma": {},
    "phi4_multimodal": {
        "audio_config": {"ext_pw_out_channel": 64, "nemo_conv_channels": 32, "num_blocks": 2}
    },
    "pp_chart2table": {},
    "qianfan_ocr": {},
    "qwen2_5_omni_thinker": text(**rope("mrope_section", 2, 3, 3)),
    "qwen2_5_vl": text(**rope("mrope_section", 2, 3, 3)),
    "qwen2_audio": {},
    "qwen2_vl": text(**rope("mrope_section", 2, 3, 3)),
    "qwen3_5": {"architectures": ["Qwen3_5ForConditionalGeneration"], **text(**HYBRID)},
    "qwen3_5_moe": {"architectures": ["Qwen3_5MoeForConditionalGeneration"], **text(**HYBRID)},
    "qwen3_asr": {"audio_config": CONVOLUTIONS},
    "qwen3_omni_moe_thinker": {
        "audio_config": CONVOLUTIONS,
        "vision_config": {"num_position_embeddings": 64},
    },
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
    "smolvlm": {},
    "step3p7": {},
    "ultravbert": {},
    "unlimited_ocr": {},
    "video_llama_3": {},
    "video_llava": {},
    "vipllava": {},
    "voxtral": {},
    "voxtral_realtime": {},
}
COUNTS = {
    "diffllama": [2],
    "falcon:one-for-each": [1],
    "falcon:sequential": [1],
    "gpt_bigcode": [1],
}
# Their norms over the whole key compute in float32, whatever the model's dtype.
FLOAT32_INSIDE = {"flex_olmo", "minimax_m2", "olmo2", "olmo3", "olmo_hybrid", "olmoe"}
FLOAT32_ONLY = {"inkling2_text"}  # its router multiplies float32 by the model's dtype

# Whose encoders take what is not known here: only the decoder is converted, and not calibrated.
UNHEARD = ["canary", "cohere_asr"]
# Whose layers cannot be run one by one on plain text, and what is said: only pooling is possible.
_EARLIER_KEYS = "_text: layer 2 reads the keys and values of an earlier layer"
POOLED_ONLY = {
    "blt": "blt cuts bytes into patches",
    "csm": "csm speaks in audio codes by two models",
    "dia": "dia speaks in several rows of audio codes",
    "dia:different": "dia speaks in several rows of audio codes",
    "diffusion_gemma": "diffusion_gemma runs each layer twice",
    "gemma3n_text": "gemma3n_text: its layers pass on 4 streams of hidden states",
    "gemma3n_text:shared": _EARLIER_KEYS,
    "gemma4_text:shared": _EARLIER_KEYS,
    "inkling2_text": "inkling2_text: what lies behind its layers is given more of the text than hidden states",
    "kyutai_speech_to_text": "kyutai_speech_to_text reads audio codes beside each token",
    "voxtral_realtime": "voxtral_realtime adds what it hears to each token",
}

# What models are run on, in their dtype or as token ids, where it is not just text.
INPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "canary": {"input_features": (1, 64, 16), "decoder_input_ids": (1, 10)},
    "cohere_asr": {"input_features": (1, 64, 16), "decoder_input_ids": (1, 10)},
    "dia": {"input_ids": (1, 20), "decoder_input_ids": (1, 10, 9)},
    "kyutai_speech_to_text": {"input_ids": (1, 20, 2)},
    "mllama": {"input_ids": (1, 20), "cross_attention_states": (1, 8, 64)},
    "t5gemma": {"input_ids": (1, 20), "decoder_input_ids": (1, 10)},
    "t5gemma2": {"input_ids": (1, 20), "decoder_input_ids": (1, 10)},
    "voxtral_realtime": {"input_ids": (1, 4), "input_features": (1, 16, 32)},
}
# Parts that only `generate` runs, and what they are run on.
PARTS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "csm": (
        "depth_decoder",
        {"input_ids": (1, 4), "backbone_last_hidden_state": (1, 64)},
    ),
}
# Where eager attention gives NaN, or has no fewer KV heads than query heads.
IMPLEMENTATION = {"blt": "sdpa", "unlimited_ocr": "sdpa"}

# transformers 4.57 computes the same as 5 with these (tests/test_transformers_4.py).
IN_4 = {
    "arcee", "aria", "aria_text", "aya_vision", "bamba", "bitnet", "blt", "chameleon", "cohere",
    "cohere2", "cohere2_vision", "cohere:norms", "colpali", "csm", "deepseek_vl",
    "deepseek_vl_hybrid", "dia", "dia:different", "diffllama", "doge", "dots1", "emu3",
    "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon:one-for-each", "falcon:sequential",
    "falcon_h1", "flex_olmo", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "glm",
    "glm4", "glm4_moe", "got_ocr2", "gpt_bigcode", "gpt_oss", "granite", "granite_speech",
    "granitemoe", "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "idefics2", "idefics3", "internvl", "jamba", "janus",
    "kyutai_speech_to_text", "lfm2", "llama", "llama4", "llama4_text", "llava", "llava_next",
    "llava_next_video", "llava_onevision", "minimax", "ministral", "mistral", "mistral3",
    "mixtral", "moshi", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "ovis2", "paligemma", "phi", "phi3",
    "phi4_multimodal", "phi:norms", "phimoe", "qwen2", "qwen2_5_vl", "qwen2_audio", "qwen2_moe",
    "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_next", "recurrent_gemma", "seed_oss", "smollm3",
    "smolvlm", "stablelm", "stablelm:norms", "starcoder2", "t5gemma", "vaultgemma", "video_llava",
    "vipllava", "voxtral", "zamba",
}  # fmt: skip
# These it knows too, but even the tiny original is another model there than in 5, or none. The others it
# does not know.
OTHERWISE_IN_4 = {
    "apertus", "colqwen2", "dbrx", "gemma3n_text:shared", "glm4v", "glm4v_moe", "lfm2_vl", "mllama",
    "qwen3_vl", "qwen3_vl_moe", "zamba2",
}  # fmt: skip

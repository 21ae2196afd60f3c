"""What each family needs beyond the defaults of `Family`: one literal a family."""

from uptrain.families.schema import Family, Layout

_QKV = {"self_attn.qkv_proj": Layout.CONCATENATED}
_FALCON = {"self_attention.query_key_value": Layout.GROUPED}
_GQA_ENCODER_DECODERS = (
    "gqa_bart", "gqa_blenderbot", "gqa_blenderbot-small", "gqa_m2m_100", "gqa_marian", "gqa_mbart",
    "gqa_mt5", "gqa_pegasus", "gqa_plbart", "gqa_t5", "gqa_whisper",
)  # fmt: skip

_SEVERAL_MODELS = "it is several models in one, which only its generate runs; save its thinker by itself and convert that"

FAMILIES: dict[str, Family | tuple[Family, ...]] = {
    "blt": Family(
        kv_keys=(
            "global_config.num_key_value_heads",
            "decoder_config.num_key_value_heads",
            "encoder_config.num_key_value_heads",
            "patcher_config.num_key_value_heads",
        ),
        unread="cuts bytes into patches and joins six lists of layers as it goes",
    ),
    "canary": Family(
        kv_keys=("decoder_config.num_key_value_heads",),
        encoder_kv_keys=("encoder_config.num_key_value_heads",),
    ),
    "cohere_asr": Family(encoder_kv_keys=("encoder_config.num_key_value_heads",)),
    "colpali": Family(kv_keys=("vlm_config.text_config.num_key_value_heads",)),
    "colqwen2": Family(kv_keys=("vlm_config.text_config.num_key_value_heads",)),
    "csm": Family(
        kv_keys=("num_key_value_heads", "depth_decoder_config.num_key_value_heads"),
        unread="speaks in audio codes by two models, of which only its generate runs the second",
    ),
    "dbrx": Family(
        kv_keys=("attn_config.kv_n_heads",),
        layouts={"norm_attn_norm.attn.Wqkv": Layout.CONCATENATED},
    ),
    "dia": Family(
        kv_keys=("decoder_config.num_key_value_heads", "decoder_config.cross_num_key_value_heads"),
        encoder_kv_keys=("encoder_config.num_key_value_heads",),
        unread="speaks in several rows of audio codes, not in one row of tokens",
    ),
    "diffusion_gemma": Family(
        kv_keys=("text_config.num_key_value_heads",),
        unread="runs each layer twice, to read a prompt and to fill a canvas behind it",
    ),
    "doge": Family(layouts={"self_attn.dt_proj": Layout.MIXED}),
    "falcon": (
        Family(when={"new_decoder_architecture": True}, kv_keys=("num_kv_heads",), layouts=_FALCON),
        # The older form has one KV head, or as many as query heads. It ignores num_kv_heads, which
        # transformers fills with the number of query heads where it is absent, and other runtimes read.
        Family(
            when={"multi_query": False},
            kv_keys=("multi_query",),
            is_flag=True,
            sets={"num_kv_heads": 1},
            layouts=_FALCON,
        ),
        Family(kv_keys=("multi_query",), is_flag=True, layouts=_FALCON),
    ),
    "gemma4_text": Family(
        when={"attention_k_eq_v": True},
        kv_keys=("num_key_value_heads", "num_global_key_value_heads"),
    ),
    "gemma4_unified_text": Family(kv_keys=("num_key_value_heads", "num_global_key_value_heads")),
    "gpt_bigcode": Family(
        kv_keys=("multi_query",), is_flag=True, layouts={"attn.c_attn": Layout.GROUPED}
    ),
    "gqa_gpt2": Family(layouts={"attn.c_attn": Layout.COLUMNS}),
    **dict.fromkeys(
        _GQA_ENCODER_DECODERS, Family(encoder_kv_keys=("encoder_num_key_value_heads",))
    ),
    "inkling_text": Family(kv_keys=("num_key_value_heads", "swa_num_key_value_heads")),
    "inkling2_text": Family(kv_keys=("num_key_value_heads", "swa_num_key_value_heads")),
    "jetmoe": Family(
        refusal="its attention is a mixture of experts whose query heads are tied to the KV heads; use "
        "it as it is"
    ),
    "molmo2_text": Family(layouts={"self_attn.att_proj": Layout.CONCATENATED}),
    "kyutai_speech_to_text": Family(unread="reads audio codes beside each token of text"),
    "moonshine": Family(
        refusal="transformers reshapes its queries by the number of KV heads, so that only as many "
        "KV heads as query heads can run; use it as it is"
    ),
    "pi0": Family(
        refusal="two models attend to each other's keys and values, and the result was not checked; use it "
        "as it is"
    ),
    "openai-gpt": Family(
        refusal="its norms stand behind the residuals and its positions are learned, which no family with "
        "KV heads has; use it as it is"
    ),
    "phi3": Family(layouts=_QKV),
    "phi4_multimodal": Family(layouts=_QKV),
    "qwen2_5_omni": Family(refusal=_SEVERAL_MODELS),
    "qwen3_omni_moe": Family(refusal=_SEVERAL_MODELS),
    "stablelm": Family(layouts={"self_attn.k_layernorm.norms": Layout.LISTED}),
    "t5gemma": Family(
        kv_keys=("decoder.num_key_value_heads",), encoder_kv_keys=("encoder.num_key_value_heads",)
    ),
    "t5gemma2": Family(
        kv_keys=("decoder.num_key_value_heads",),
        encoder_kv_keys=("encoder.text_config.num_key_value_heads",),
    ),
    "voxtral_realtime": Family(
        kv_keys=("text_config.num_key_value_heads",),
        unread="adds what it hears to each token of text",
    ),
    "zamba2": Family(
        when={"use_shared_attention_adapter": True},
        refusal="its shared attention has adapters for each place that it stands in, sized for all heads; "
        "merge them into a checkpoint without adapters first",
    ),
    "zaya": Family(
        refusal="it convolves queries and keys together and keeps a scale for each KV head; use it as it is"
    ),
}

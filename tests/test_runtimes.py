"""What runtimes accept, rule by rule; tests/test_real_runtimes.py runs the runtimes themselves."""

import pytest
from tiny import tiny_config

from uptrain.families.runtimes import RAN, refusals, runtimes

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 8}
PHI = {"model_type": "phi", "num_attention_heads": 8, "hidden_size": 64, "intermediate_size": 256}
FALCON = {"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 8}
BIGCODE = {"model_type": "gpt_bigcode", "n_embd": 64, "activation_function": "gelu_pytorch_tanh"}
STABLELM = {"model_type": "stablelm", "num_attention_heads": 8, "hidden_act": "silu"}
NEMOTRON = {"model_type": "nemotron", "num_attention_heads": 8, "hidden_act": "relu2"}
STARCODER2 = {"model_type": "starcoder2", "num_attention_heads": 8}
IGNORES = "its own class ignores the number of KV heads; use --model-impl transformers (not run)"


def judged(config: dict, heads: int) -> dict[str, tuple[bool | None, str]]:
    return {each["runtime"]: (each["accepts"], each["note"]) for each in runtimes(config, heads)}


@pytest.mark.parametrize("heads", [8, 4, 1])
def test_what_was_run_is_told_from_what_was_read(heads: int) -> None:
    found = judged(LLAMA, heads)
    assert list(found) == ["transformers", "vLLM", "llama.cpp", "CTranslate2", "TGI"]
    assert found["transformers"] == (True, "stock class, no remote code")
    assert found["vLLM"] == (True, "from its source, not run")
    assert found["llama.cpp"] == (True, "run, with llama-cpp-python 0.3.36")
    assert found["CTranslate2"] == (True, "run, with version 4.8.5")
    assert found["TGI"] == (None, "for the families it knows; from its source, not run")
    read = judged({**LLAMA, "model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, heads)
    assert {each for name, each in read.items() if name not in ("transformers", "TGI")} == {
        (True, "from its source, not run")
    }


@pytest.mark.parametrize(
    ("runtime", "config", "heads", "note"),
    [
        ("vLLM", PHI, 4, IGNORES),
        ("vLLM", {"model_type": "olmo", "num_attention_heads": 8}, 1, IGNORES),
        (
            "vLLM",
            {**PHI, "qk_layernorm": True},
            8,
            "its own class leaves out the norms of queries and keys",
        ),
        (
            "vLLM",
            {**STABLELM, "qk_layernorm": True},
            4,
            "its own class leaves out the norms of queries and keys",
        ),
        (
            "vLLM",
            {**STABLELM, "use_parallel_residual": True},
            4,
            "its own class has no parallel residual",
        ),
        (
            "vLLM",
            {**FALCON, "ffn_hidden_size": 192},
            4,
            "it takes the MLP for 256 wide, where this one has 192",
        ),
        (
            "vLLM",
            {**FALCON, "activation": "relu"},
            4,
            "it computes gelu where this family has relu",
        ),
        ("llama.cpp", PHI, 4, "its converter writes as many KV heads as query heads"),
        (
            "llama.cpp",
            {**PHI, "intermediate_size": 128},
            8,
            "it takes the MLP for 256 wide, where this one has 128",
        ),
        ("llama.cpp", BIGCODE, 8, "its converter knows one KV head only"),
        (
            "llama.cpp",
            {**BIGCODE, "n_inner": 100},
            1,
            "it takes the MLP for 256 wide, where this one has 100",
        ),
        (
            "llama.cpp",
            {**BIGCODE, "activation_function": "relu"},
            1,
            "it computes gelu where this family has relu",
        ),
        (
            "llama.cpp",
            {**NEMOTRON, "hidden_act": "gelu"},
            4,
            "it computes relu2 where this family has gelu",
        ),
        (
            "llama.cpp",
            {**STARCODER2, "hidden_act": "silu"},
            4,
            "it computes gelu where this family has silu",
        ),
        ("llama.cpp", {"model_type": "helium"}, 4, "its converter has no HeliumForCausalLM"),
        ("CTranslate2", BIGCODE, 8, "its converter knows one KV head only"),
        (
            "CTranslate2",
            {**FALCON, "num_ln_in_parallel_attn": 1},
            4,
            "its converter expects two norms a layer with more than one KV head",
        ),
        (
            "CTranslate2",
            STARCODER2,
            4,
            "its converter has no Starcoder2ForCausalLM with a number of KV heads",
        ),
    ],
)
def test_a_runtime_refuses(runtime: str, config: dict, heads: int, note: str) -> None:
    assert judged(config, heads)[runtime] == (False, note)
    assert any(runtime in line and line.endswith(f": {note}") for line in refusals(config, heads))


@pytest.mark.parametrize(
    ("runtime", "config", "heads"),
    [
        ("vLLM", PHI, 8),
        ("vLLM", STABLELM, 4),
        ("vLLM", {**FALCON, "ffn_hidden_size": 256, "activation": "gelu"}, 4),
        ("vLLM", {**FALCON, "ffn_hidden_size": None}, 4),
        ("llama.cpp", PHI, 8),
        ("llama.cpp", {**STABLELM, "qk_layernorm": True, "use_parallel_residual": True}, 4),
        ("llama.cpp", {"model_type": "olmo", "num_attention_heads": 8}, 1),
        ("llama.cpp", BIGCODE, 1),
        ("llama.cpp", NEMOTRON, 4),
        ("llama.cpp", {**STARCODER2, "hidden_act": "gelu_pytorch_tanh"}, 4),
        ("CTranslate2", BIGCODE, 1),
        ("CTranslate2", {**FALCON, "num_ln_in_parallel_attn": 1}, 1),
    ],
)
def test_a_runtime_accepts(runtime: str, config: dict, heads: int) -> None:
    accepted, note = judged(config, heads)[runtime]
    ran = config["model_type"] in RAN.get(runtime, ())
    assert accepted
    assert note.startswith("run, with " if ran else "from its source, not run")


def test_a_sliding_window_that_llama_cpp_ignores() -> None:
    ran = "run, with llama-cpp-python 0.3.36"
    mistral = {"model_type": "mistral", "max_position_embeddings": 8192, "sliding_window": 4096}
    assert judged(mistral, 8)["llama.cpp"] == (
        True,
        f"{ran}; ignores the sliding window, so it is right on up to 4,096 tokens only",
    )
    for changes in ({"sliding_window": None}, {"sliding_window": 8192}, {"model_type": "qwen2"}):
        assert judged({**mistral, **changes}, 8)["llama.cpp"] == (True, ran)


def test_what_nobody_read_is_not_known() -> None:
    llava = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    note = "not known for LlavaForConditionalGeneration, which was not read"
    assert [judged(llava, 4)[name] for name in ("vLLM", "llama.cpp", "CTranslate2")] == [
        (None, note)
    ] * 3
    assert judged({"model_type": "helium"}, 4)["vLLM"] == (
        None,
        "has no HeliumForCausalLM of its own; its Transformers backend may run it (not run)",
    )
    assert refusals(llava, 4) == []


def test_a_carried_model_is_for_transformers_only() -> None:
    found = judged({"model_type": "gqa_gpt2"}, 4)
    assert found["transformers"][0] is True
    assert [found[name][0] for name in found if name != "transformers"] == [False] * 4
    (line,) = refusals({"model_type": "gqa_gpt2"}, 4)
    assert line.startswith("vLLM, llama.cpp, CTranslate2, TGI: does not know this architecture")


def test_the_configs_above_have_the_keys_of_transformers() -> None:
    for config in (PHI, FALCON, BIGCODE, STABLELM, NEMOTRON, STARCODER2):
        own = tiny_config(config["model_type"]).to_dict()
        assert set(config) <= set(own) | {"num_attention_heads"}
    for model_type, key in (
        ("phi", "qk_layernorm"),
        ("stablelm", "qk_layernorm"),
        ("stablelm", "use_parallel_residual"),
        ("falcon", "ffn_hidden_size"),
        ("falcon", "activation"),
        ("falcon", "num_ln_in_parallel_attn"),
        ("gpt_bigcode", "n_inner"),
    ):
        assert key in tiny_config(model_type).to_dict()

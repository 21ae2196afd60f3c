"""What is converted computes the same in transformers 4.57 as in 5, and nothing is left over or missing.

Both run tests/any_transformers.py, 4.57 in a Python of its own that has torch, transformers and safetensors.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import test_carried as carried
import test_remote_code as remote_code
import test_rewrites as rewrites
import torch
import transformers
from family_list import COUNTS, FAMILIES, IMPLEMENTATION, IN_4, INPUTS, OTHERWISE_IN_4
from test_families import make_inputs
from tiny import save, tiny_config, tiny_model

import uptrain

OTHER_PYTHON = os.environ.get("UPTRAIN_TRANSFORMERS_4_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the model classes themselves
    pytest.mark.skipif(
        not OTHER_PYTHON,
        reason="UPTRAIN_TRANSFORMERS_4_PYTHON does not name the Python of a virtual environment with "
        "transformers 4.57: pip install torch safetensors 'transformers==4.57.*'",
    ),
]


class Transformers:
    """One version of transformers, in a process of its own."""

    def __init__(self, python: str, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        script = Path(__file__).with_name("any_transformers.py")
        environment = {"HF_HOME": str(folder), "OMP_NUM_THREADS": "1", "PATH": ""}
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [python, "-W", "ignore", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**environment, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def ask(self, call: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([call, arguments]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["answer"]

    def run(
        self, folder: Path, given: dict[str, torch.Tensor], **options: Any
    ) -> list[torch.Tensor]:
        """Logits, then what is generated; every tensor is where it belongs."""
        torch.save(given, self._folder / "inputs")
        names = {name: str(self._folder / name) for name in ("inputs", "outputs")}
        assert self.ask("run", folder=str(folder), **names, **options) == {}
        return list(torch.load(self._folder / "outputs"))

    def close(self) -> None:
        self._process.communicate()
        self._log.close()


class Versions(NamedTuple):
    old: Transformers
    new: Transformers

    def difference(self, folder: Path, given: dict[str, torch.Tensor], **options: Any) -> float:
        """Run a checkpoint in both, and compare the logits; what is generated is the same."""
        (old, *texts), (new, *others) = (each.run(folder, given, **options) for each in self)
        assert len(texts) == len(others) == len(options.get("generations", ()))
        assert all(map(torch.equal, texts, others))
        if "attention_mask" in given and given["attention_mask"].shape == new.shape[:2]:
            old, new = (each[given["attention_mask"] == 1] for each in (old, new))
        assert new.abs().max() > 0.1
        found = float((old - new).abs().max() / new.abs().max())
        print(f"largest difference of a logit: {found:.1e} of the largest")
        return found


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versions]:
    root = tmp_path_factory.mktemp("versions")
    both = Versions(
        Transformers(OTHER_PYTHON, root / "4"), Transformers(sys.executable, root / "5")
    )
    assert both.old.ask("version").startswith("4.57.")
    assert both.new.ask("version") == transformers.__version__
    yield both
    for each in both:
        each.close()


# float64 throughout, or float32 within the families' own code.
TOLERANCE, FLOAT32_TOLERANCE = 1e-12, 2e-6

# Tiny ones of these only 5 can make; the other sources are written by 4.57.
MADE_BY_5 = OTHERWISE_IN_4 | {
    "chameleon", "gemma3n_text", "moshi", "phi4_multimodal", "qwen2_5_vl", "qwen2_vl", "stablelm:norms",
    "t5gemma",
}  # fmt: skip
# 5 forgets any other base in olmo3's sliding layers; zamba's kernels need a GPU.
OVERRIDES = {"olmo3": {"rope_theta": 500000.0}, "zamba": {"use_mamba_kernels": False}}
FLOAT32_IN_4 = {"dots1", "glm4_moe"}  # their experts add up in float32
SDPA = {"colpali", "kyutai_speech_to_text", "moshi", "paligemma"}  # eager ones have no mask in 5


def with_older_keys(part: dict[str, Any]) -> dict[str, Any]:
    """State rotary settings, as transformers 5 writes them, as 4 does too, in all parts of a config."""
    made = {k: with_older_keys(v) if isinstance(v, dict) else v for k, v in part.items()}
    rope = dict(part.get("rope_parameters") or {})
    if "rope_theta" in rope:
        own = ("rope_theta", "partial_rotary_factor")
        made |= {key: rope.pop(key) for key in own if key in rope}
        made |= {"rope_scaling": rope} if len(rope) > 1 else {}
    return made


def make_source(versions: Versions, name: str, folder: Path, **overrides: Any) -> bool:
    """Save a tiny model as 4.57 writes it, or as 5 does and with the older keys; false if 4.57 does not know it."""
    model_type = name.partition(":")[0]
    overrides = {**FAMILIES[name], **overrides}
    arguments = {"folder": str(folder), "model_type": model_type, "overrides": overrides}
    if name not in MADE_BY_5:
        return bool(versions.old.ask("make", **arguments))
    versions.new.ask("make", **arguments)
    file = folder / "config.json"
    file.write_text(json.dumps(with_older_keys(json.loads(file.read_text()))))
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_the_same_in_both(
    name: str, versions: Versions, tmp_path: Path, record_property: Any
) -> None:
    model_type = name.partition(":")[0]
    source, target = tmp_path / "source", tmp_path / "target"
    is_known = make_source(versions, name, source, **OVERRIDES.get(name, {}))
    assert is_known == (name in IN_4 | OTHERWISE_IN_4)
    if not is_known:
        return
    dtype = "float32" if name in FLOAT32_IN_4 else "float64"
    shapes = INPUTS.get(model_type, {"input_ids": (1, 20)})
    given: dict[str, Any] = {**make_inputs(shapes, getattr(torch, dtype)), "use_cache": False}
    attention = "sdpa" if name in SDPA else IMPLEMENTATION.get(model_type, "eager")
    options = {"attention": attention, "dtype": dtype}
    if name in OTHERWISE_IN_4:
        try:
            assert versions.difference(source, given, **options) < 1e-4
        except AssertionError:  # of the original: nothing that a conversion could change
            return
        pytest.fail(f"4.57 reads {name} as 5 does: it belongs in IN_4")
    uptrain.convert(source, target, COUNTS.get(name, [2])[0], architecture="keep")
    assert versions.difference(target, given, **options) <= FLOAT32_TOLERANCE
    record_property("family", model_type)


# As transformers 4 writes them, for whole heads or a part of each, and by layer.
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "theta": ("llama", {"rope_theta": 5000.0}),
    "linear": ("llama", {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}),
    "llama3": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}},
    ),
    "yarn": (
        "qwen2",
        {"rope_theta": 5e5, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "longrope": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8},
         "original_max_position_embeddings": 32},
    ),
    "phi": ("phi", {"rope_theta": 5000.0, "partial_rotary_factor": 0.25}),
    "glm": ("glm", {"rope_theta": 5000.0, "partial_rotary_factor": 0.25}),
    "nemotron": ("nemotron", {"rope_theta": 5000.0, "partial_rotary_factor": 0.25}),
    "stablelm": ("stablelm", {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}),
    "falcon": ("falcon", {"rope_theta": 5000.0}),
    "by-layer": (
        "gemma3_text",
        {"rope_theta": 5e4, "rope_local_base_freq": 2000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "none-in-some": ("smollm3", {"rope_theta": 5000.0, "no_rope_layers": [1, 0]}),
}  # fmt: skip


@pytest.mark.parametrize("case", ROTARY)
def test_rotary_settings(case: str, versions: Versions, tmp_path: Path) -> None:
    name, overrides = ROTARY[case]
    source, target = tmp_path / "source", tmp_path / "target"
    make_source(versions, name, source, **overrides)
    uptrain.convert(source, target, 2, max_shard_bytes=50_000)
    assert len(list(target.glob("*.safetensors"))) > 1
    given = make_inputs({"input_ids": (2, 20)}, torch.float64)
    assert versions.difference(target, given, attention="eager") <= FLOAT32_TOLERANCE
    # They do count: without them the same weights are another model.
    before = versions.new.run(target, given, attention="eager")[0]
    config = json.loads((target / "config.json").read_text())
    changed = {key: value for key, value in config.items() if key not in overrides}
    (target / "config.json").write_text(json.dumps(changed))
    assert (versions.new.run(target, given, attention="eager")[0] - before).abs().max() > 1e-3


def test_settings_in_the_newer_form_alone_are_read_as_the_originals_are(
    versions: Versions, tmp_path: Path
) -> None:
    """Which is wrong in 4.57, for both, until the older keys stand beside them."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    source = save(tiny_model(tiny_config("llama", rope_parameters=rope)), tmp_path / "source")
    target = tmp_path / "target"
    uptrain.convert(source, target, 2)
    given = make_inputs({"input_ids": (2, 20)}, torch.float64)
    for folder in (source, target):
        assert versions.difference(folder, given) > 1e-2
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(with_older_keys(config)))
        assert versions.difference(folder, given) <= TOLERANCE


NEXT = {
    "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
WAYS = [NEXT, {**NEXT, "use_cache": False}]
IN_OTHER_WAYS = [
    {**NEXT, "cache_implementation": "static", "disable_compile": True},
    {**NEXT, "num_beams": 3},
]


def prompts() -> dict[str, torch.Tensor]:
    """Two, one of them padded on the left."""
    mask = (torch.arange(12) >= torch.tensor([[3], [0]])).long()
    return {"input_ids": rewrites.IDS, "attention_mask": mask}


DYNAMIC = {**rewrites.ROTARY, "rope_type": "dynamic", "factor": 2.0}
REWRITES = {
    **rewrites.CASES,
    "gpt_neox-phi-dynamic": ("gpt_neox", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}, "phi"),
    "gpt_neox-starcoder2-linear": (
        "gpt_neox",
        {**rewrites.WHOLE, "rope_parameters": {**rewrites.LINEAR, "partial_rotary_factor": 1.0}},
        "starcoder2",
    ),
    "falcon-linear": (
        "falcon",
        {"multi_query": False, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
        "falcon",
    ),
    "gpt_neox-phi-classifier": ("gpt_neox", {"architectures": ["GPTNeoXForSequenceClassification"]}, "phi"),
    "gpt2-gpt_bigcode-base": ("gpt2", {"architectures": ["GPT2Model"]}, "gpt_bigcode"),
}  # fmt: skip


@pytest.mark.parametrize("case", REWRITES)
def test_rewrites(case: str, versions: Versions, tmp_path: Path) -> None:
    model_type, overrides, expected = REWRITES[case]
    source = save(tiny_model(tiny_config(model_type, **overrides)), tmp_path / "source")
    generations = [] if "architectures" in overrides else WAYS
    for count in [1] if expected == "gpt_bigcode" else [2, 1]:
        target = tmp_path / str(count)
        assert uptrain.convert(source, target, count)["rewrite"]["target"] == expected
        found = versions.difference(target, prompts(), generations=generations)
        assert found <= TOLERANCE


@pytest.mark.parametrize("count", [2, 1])
@pytest.mark.parametrize("case", remote_code.CASES)
def test_originals_of_their_own_code(
    case: str, count: int, versions: Versions, tmp_path: Path
) -> None:
    config, _ = remote_code.CASES[case]
    state = remote_code.make_state(config)
    source, target = remote_code.write(tmp_path / "source", config, state), tmp_path / "target"
    uptrain.convert(source, target, count)
    assert versions.difference(target, prompts(), generations=WAYS) <= TOLERANCE


@pytest.mark.parametrize("case", ["gpt2-gpt_bigcode", "opt-gpt_bigcode", "gpt_neox-nemotron"])
def test_tokenizers_that_are_written(case: str, versions: Versions, tmp_path: Path) -> None:
    model_type, overrides, _ = rewrites.CASES[case]
    source = save(tiny_model(tiny_config(model_type, **overrides)), tmp_path / "source")
    special = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "model_max_length": 64}
    rewrites.byte_tokenizer(source, whole=True, **rewrites.OPTS, **special)
    uptrain.convert(source, tmp_path / "target", 1)
    file = "tokenizer_config.json"
    assert (source / file).read_bytes() != (tmp_path / "target" / file).read_bytes()
    text = "the lazy  fox\n<|im_start|> jumps</s> over"
    wanted = versions.new.ask("tokenize", folder=str(source), text=text)
    for each in versions:
        assert each.ask("tokenize", folder=str(tmp_path / "target"), text=text) == wanted


published = remote_code.published


def test_a_tokenizer_that_needed_code(versions: Versions, published: Path, tmp_path: Path) -> None:
    uptrain.convert(published, tmp_path / "target", 2)
    for each in versions:
        found = each.ask("tokenize", folder=str(tmp_path / "target"), text="the other<|im_end|>")
        assert found == [[257, *b" o", 257, *b"r", 262], [64, "right", ["<|endoftext|>"]]]


def test_nemotron_does_not_scale_positions_in_4(versions: Versions, tmp_path: Path) -> None:
    overrides = {**rewrites.SEQUENTIAL, "rope_parameters": rewrites.LINEAR}
    source = save(tiny_model(tiny_config("gpt_neox", **overrides)), tmp_path / "source")
    result = uptrain.convert(source, tmp_path / "target", 2)
    assert (
        "transformers 4 does not scale nemotron's rotary positions; use transformers 5"
        in (result["rewrite"]["lost"])
    )
    assert versions.difference(tmp_path / "target", prompts()) > 1e-3


def give_head(folder: Path) -> None:
    """Untie the head from the embeddings, as mt5 and the later t5 are published; 5 cannot save that."""
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    config.pop("scale_decoder_outputs", None)
    (folder / "config.json").write_text(json.dumps(config))
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["shared.weight"].flip(0)
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("case", [*carried.MODELS, "t5-untied"])
def test_models_with_a_file_of_their_own(
    case: str, attention: str | None, versions: Versions, tmp_path: Path
) -> None:
    model_type = case.removesuffix("-untied")
    source = carried.make_source(model_type, tmp_path / "source")
    if case in ("mt5", "t5-untied"):
        give_head(source)
    is_encoder_decoder = model_type in carried.ENCODER_DECODERS
    given = carried.inputs(model_type)
    if "attention_mask" in given:
        given["attention_mask"][1, :3] = 0
    if is_encoder_decoder:
        given["decoder_input_ids"] = carried.text()["input_ids"][:, :5]
    is_generating = is_encoder_decoder or model_type in carried.GENERATING
    options = {"attention": attention, "generations": [*WAYS, *IN_OTHER_WAYS] * is_generating}
    for count in (2, 1):
        target = tmp_path / str(count)
        encoder = is_encoder_decoder and count == 1
        uptrain.convert(source, target, count, architecture=f"gqa_{model_type}", encoder=encoder)
        assert versions.difference(target, given, **options) <= TOLERANCE

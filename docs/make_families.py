"""Write docs/families.md from the registry and the tests: `python docs/make_families.py`, in minutes.

Each family of tests/family_list.py is built tiny; its keys and layouts are what the package finds, its
methods what probing its attention allows.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import transformers

import uptrain
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.plan import plan_conversion
from uptrain.errors import UnsupportedFamilyError
from uptrain.families import registry
from uptrain.families.rewrites import REWRITES
from uptrain.families.runtimes import runtimes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# The page lists the families that the tests check, which are found by the path just above.
from family_list import COUNTS, FAMILIES, IN_4, UNHEARD  # noqa: E402
from tiny import save, tiny_config, tiny_model  # noqa: E402

PAGE = ROOT / "docs" / "families.md"

# From memory of their configs: compare num_key_value_heads, absent or equal to the query heads.
MHA_CHECKPOINTS = {
    "chameleon": "Chameleon-7B",
    "cohere": "Command-R v01 35B, Aya-23-35B",
    "falcon": "falcon-rw-1b, falcon-rw-7b",
    "gemma": "Gemma-7B, CodeGemma-7B",
    "granite": "granite-3b",
    "helium": "helium-1-preview-2b",
    "llama": "LLaMA 7B to 65B, Llama-2 7B and 13B, CodeLlama 7B and 13B, Vicuna, OpenLLaMA, Sheared-LLaMA, "
    "SmolLM-1.7B, SmolLM2-1.7B, deepseek-llm-7b, deepseek-coder 1.3B and 6.7B",
    "llava": "LLaVA-1.5 7B and 13B",
    "moshi": "Moshi-7B",
    "nemotron": "nemotron-3-8b",
    "olmo": "OLMo 1B and 7B",
    "olmo2": "OLMo-2 1B, 7B and 13B",
    "olmo3": "OLMo-3-7B",
    "olmoe": "OLMoE-1B-7B",
    "phi": "phi-1, phi-1.5, phi-2",
    "phi3": "Phi-3-mini, Phi-3.5-mini",
    "qwen2": "Qwen1.5 0.5B to 14B and 72B",
    "qwen2_moe": "Qwen1.5-MoE-A2.7B",
    "stablelm": "stablelm-3b-4e1t, zephyr-3b, stablelm-2-1.6b",
    "zamba": "Zamba-7B",
    "zamba2": "Zamba2",
}

HEAD = f"""# Families

Written by `python docs/make_families.py` from the registry and the tests, with transformers
{transformers.__version__}. Every row is checked by `tests/test_families.py`
(`test_equal_heads_merge_without_a_trace[family]`): equal heads give equal logits in float64 through stock
transformers, exchanged groups do not, and no key is missing, unexpected or of another shape.

* **key**: what changes in `config.json`. Encoders keep nothing in a cache and change only with `--encoder`.
* **layout**: how the heads lie in the tensors that follow it (`uptrain/families/schema.py`).
* **methods**: *pooling* is mean, first and random, without calibration, for the reasons below the table; *no text*
  adds align and factorize, *all* calibration as well. Families that also see or hear are calibrated on plain text,
  as far as it reaches their layers. Behind the methods is what may be done to the basis of a value and of a key
  head, found by probing the attention of a tiny model (`docs/methods.md`).
* **known to be MHA**: from memory of their configs; compare `num_key_value_heads` before you rely on it.
* **runtimes**: those whose own code for the family accepts the result, as read in the source of vLLM (0002bff,
  ee92a6f, 4652ef5, 4ae0583, 4819ff7, 7477b4f, ccf9c9b, 52e9d6f), of llama.cpp (as in llama-cpp-python 0.3.36) and
  of CTranslate2 4.8.5. Run were Llamas only, with the last two (`tests/test_real_runtimes.py`); vLLM was not.
  Written as "transformers", logits are the same in 5 and in 4.57 (`tests/test_transformers_4.py`); as
  "transformers 5", 4.57 does not know the family, or did not read even the tiny original as 5 does.
  [Serving](serving.md#transformers-457) says what else to know of 4.57.
  A runtime that is not named may still take a family whose class was not read, as those of images and speech
  were not: `uptrain inspect` says "not known" of these.

| family | key | layout | methods | known to be MHA | runtimes |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Make the whole page."""
    made = {name: row(name) for name in sorted(FAMILIES)}
    table = "".join(f"| {' | '.join(cells)} |\n" for cells, _ in made.values())
    reasons = {cells[0]: reason for cells, reason in made.values() if reason}
    left = "".join(f"* {family}: {reason}\n" for family, reason in reasons.items())
    return HEAD + table + f"\n## Pooling only\n\n{left}" + rewritten()


def row(name: str) -> tuple[list[str], str]:
    """Make one family's cells, by building it, and say why only pooling is possible, if so."""
    family, key, known, runs = described(name)
    model_type, count = name.partition(":")[0], COUNTS.get(name, [2])[0]
    with tempfile.TemporaryDirectory() as folder:
        source = save(
            tiny_model(tiny_config(model_type, **FAMILIES[name])), Path(folder) / "source"
        )
        checkpoint = open_checkpoint(source)
        tensors = plan_conversion(checkpoint, count).head_tensors.values()
        layouts = ", ".join(sorted({tensor.layout.value for tensor in tensors}))
        try:
            made = uptrain.convert(
                source, Path(folder) / "t", count, method="align", architecture="keep"
            )
        except UnsupportedFamilyError as error:
            methods = "pooling"
            reason = str(error).removeprefix("source: ").partition(";")[0]
            reason = reason.partition(", so ")[0].removeprefix(model_type).lstrip(": ")
        else:
            reason = ""
            layers = [layer for layer in made["layers"] if layer["freedom"]]
            blocks = [block for layer in layers for block in layer["blocks"].values() or [layer]]
            freedoms = [block["freedom"] for block in blocks]
            bases = {f"value {f['value']}, key {f['key']}" for f in freedoms}
            methods = f"{'no text' if name in UNHEARD else 'all'}: {'; '.join(sorted(bases))}"
    return [family, key, layouts, methods, known, runs], reason


def described(name: str) -> tuple[str, str, str, str]:
    """Make those cells of a family that need no model: its name, keys, checkpoints and runtimes."""
    model_type, _, form = name.partition(":")
    config = json.loads(tiny_config(model_type, **FAMILIES[name]).to_json_string())
    keys = dict.fromkeys(
        key.partition(".per_layer_config.")[0]
        for setting in registry.kv_settings(config)
        for key in setting.keys
    )
    count = COUNTS.get(name, [2])[0]
    accepted = [each["runtime"] for each in runtimes(config, count) if each["accepts"]]
    if name not in IN_4:
        accepted = ["transformers 5" if each == "transformers" else each for each in accepted]
    family = f"{model_type} ({form.replace('-', ' ')})" if form else model_type
    known = "" if form else MHA_CHECKPOINTS.get(model_type, "")
    return family, ", ".join(f"`{key}`" for key in keys), known, ", ".join(accepted)


def rewritten() -> str:
    """List the families without a key, and what they are rewritten into."""
    text = """
## Families without a number of KV heads

They are rewritten while converting, exactly; what begins with `gqa_` is transformers' own class in the
smallest modeling file that gives it KV heads, which the checkpoint then brings along. Checked by
`tests/test_rewrites.py` and `tests/test_carried.py`. All of them allow align, factorize and calibration, with
every invertible map of value and key heads but where rotary embedding leaves less (`tests/test_encoder.py`);
whisper is calibrated on speech. All of them, those of the next paragraph as well, give the same logits and
continuations in transformers 5 and in 4.57 (`tests/test_transformers_4.py`).

baichuan (of 7B), chatglm (the second and third), internlm, internlm2 and qwen (the first) are known to
transformers only by code of the checkpoints' own. They are rewritten by the layout of their tensors, and that
code is not run; tiktoken and sentencepiece files become a `tokenizer.json`. Checked against the originals'
arithmetic by `tests/test_remote_code.py`, against tiktoken and sentencepiece by
`tests/test_remote_tokenizers.py`. The plan says what stays behind: methods such as `chat()`, and how Qwen and
InternLM stretch positions beyond the length that they were trained on.

| family | becomes, in order of preference |
|---|---|
"""
    for source, targets in sorted(REWRITES.items()):
        text += f"| {source} | {', '.join(targets)} |\n"
    return text


if __name__ == "__main__":
    main()

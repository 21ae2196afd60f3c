"""Exact rewrites of families without a number of KV heads into families that have one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from uptrain.errors import UnsupportedFamilyError
from uptrain.families import carried as carried_models
from uptrain.families.rewrites import (
    baichuan,
    carried,
    chatglm,
    falcon,
    gpt_bigcode,
    gpt_neox,
    gptj,
    internlm,
    qwen,
)
from uptrain.families.rewrites.recipe import Recipe, Rewrite, copied

__all__ = ["REWRITES", "Recipe", "Rewrite", "find_rewrites"]

REWRITES: dict[str, dict[str, Callable[[Mapping[str, Any]], Rewrite | None]]] = {
    "baichuan": {"llama": baichuan.to_llama},
    "chatglm": {"glm": chatglm.to_glm},
    "codegen": {"phi": gptj.to_phi},
    "falcon": {"falcon": falcon.to_new_architecture},
    "gpt2": {"gpt_bigcode": gpt_bigcode.gpt2_to_gpt_bigcode},
    "gpt_neox": {
        "phi": gpt_neox.to_phi,
        "starcoder2": gpt_neox.to_starcoder2,
        "nemotron": gpt_neox.to_nemotron,
    },
    "gptj": {"phi": gptj.to_phi},
    "internlm": {"llama": internlm.to_llama},
    "internlm2": {"llama": internlm.internlm2_to_llama},
    "opt": {"gpt_bigcode": gpt_bigcode.opt_to_gpt_bigcode},
    "qwen": {"qwen2": qwen.to_qwen2},
}
"""By the source's `model_type`, in order of preference (starcoder2 is served by most runtimes)."""

for _family in carried_models.FAMILIES:
    REWRITES.setdefault(_family, {})[f"gqa_{_family}"] = carried.to_gqa

# What a model can have behind its layers, and transformers' class for it by `model_type`.
_CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_CLASSIFIER = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
_BASE = modeling_auto.MODEL_MAPPING_NAMES
_CONFIGS = transformers.CONFIG_MAPPING


def find_rewrites(config: Mapping[str, Any], architecture: str = "auto") -> list[Rewrite]:
    """Find what a checkpoint can be rewritten into.

    Args:
        config: The content of `config.json`.
        architecture: `auto` for every exact rewrite, `keep` for none, or the `model_type` to get.

    Returns:
        Rewrites in order of preference; none if the family is to stay as it is.

    Raises:
        UnsupportedFamilyError: If there is no exact rewrite into `architecture`, or the family needs
            one and this checkpoint has none.
    """
    model_type = config["model_type"]
    known = REWRITES.get(model_type, {})
    if architecture in {"keep", model_type} - known.keys() or (
        architecture == "auto" and not known
    ):
        return []
    found, reasons = [], []
    for name, rewrite in known.items():
        if architecture not in ("auto", name):
            continue
        try:
            made = rewrite(config)
            if made is None:
                return []
            found.append(_with_head(made, config))
        except UnsupportedFamilyError as error:
            reasons.append(str(error))
    if not found:
        lacking = "number of KV heads" if model_type in _CONFIGS else "class in transformers"
        finding = f"no {lacking} and no exact rewrite into a family that has one"
        way_out = "use it as it is"
        if architecture != "auto":
            finding = f"no exact rewrite into {architecture}"
            way_out = f"choose one of {', '.join(('auto', 'keep', *known))}"
        because = f" ({'; '.join(reasons)})" if reasons else ""
        raise UnsupportedFamilyError(f"{model_type}: has {finding}{because}; {way_out}")
    return found


def _with_head(rewrite: Rewrite, config: Mapping[str, Any]) -> Rewrite:
    """Give the target the source's kind of class: causal, classifier or base model.

    Raises:
        UnsupportedFamilyError: If the source is of another kind.
    """
    if "architectures" in rewrite.config or rewrite.tensors is None:
        return rewrite
    source, target = config["model_type"], rewrite.config["model_type"]
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    kinds = {
        classes[source]: classes
        for classes in (_CAUSAL, _CLASSIFIER, _BASE)
        if source in classes and target in classes
    }
    if hasattr(transformers, name) and name not in kinds:
        raise UnsupportedFamilyError(f"{name} cannot be rewritten, expected {', '.join(kinds)}")
    classes, tensors = kinds.get(name, _CAUSAL), dict(rewrite.tensors)
    if classes is not _CAUSAL:
        tensors = {key: recipe for key, recipe in tensors.items() if not key.startswith("lm_head.")}
    if classes is _CLASSIFIER:
        tensors |= copied("score", "score", "weight")
    if classes is _BASE:
        tensors = {key.partition(".")[2]: recipe for key, recipe in tensors.items()}
    config = {"architectures": [classes[target]], **rewrite.config}
    return replace(rewrite, config=config, tensors=tensors)

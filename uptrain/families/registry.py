"""Which family a config is, and which tensors follow its number of key/value heads.

The tensors are not listed by hand: transformers builds the class on the meta device with the old and
the new value of the key, and the shapes that differ are the answer. A tensor that differs without a
rule is refused by name.
"""

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from uptrain.errors import CheckpointError, HeadCountError, UnsupportedFamilyError, one_line
from uptrain.families.schema import Family, Heads, HeadTensor, Layout

_QKV = {"self_attn.qkv_proj": Layout.CONCATENATED}
_INERT = (
    "no tensor follows its number of KV heads (latent attention, or no attention layer at all), "
    "so there is nothing to merge"
)

FAMILIES: dict[str, Family] = {
    "phi3": Family(fused=_QKV),
    "dbrx": Family(
        kv_key="attn_config.kv_n_heads", fused={"norm_attn_norm.attn.Wqkv": Layout.CONCATENATED}
    ),
    "falcon": Family(
        kv_key="num_kv_heads",
        fused={"self_attention.query_key_value": Layout.GROUPED},
        requires={"new_decoder_architecture": True},
        refusal="only falcon's new decoder architecture has a number of KV heads, and rewriting the "
        "older one into it is not available yet",
    ),
    "inkling_text": Family(other_kv_keys=("swa_num_key_value_heads",)),
    "gpt_bigcode": Family(
        kv_key="multi_query", kv_key_is_flag=True, fused={"attn.c_attn": Layout.GROUPED}
    ),
    "moonshine": Family(
        refusal="transformers reshapes its queries by the number of KV heads, so that only as many "
        "KV heads as query heads can run"
    ),
    "jetmoe": Family(
        refusal="its attention is a mixture of experts whose query heads are tied to the KV heads"
    ),
    "zaya": Family(
        refusal="it convolves queries and keys together and keeps a scale for each KV head"
    ),
}

_KERNELS = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}

# Other keys that some runtimes read instead; where a config has them they must say the same.
_KV_KEY_ALIASES = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")


def parse_config(
    config: Mapping[str, Any], code: Path | None = None
) -> transformers.PretrainedConfig:
    """Let transformers read a config.

    Args:
        config: The content of `config.json`.
        code: The checkpoint's folder if its own Python code may be executed, else None.

    Raises:
        UnsupportedFamilyError: If transformers does not know the `model_type`.
        CheckpointError: If transformers does not accept a value.
    """
    return _parse_config(json.dumps(config), code)


@lru_cache(maxsize=64)
def _parse_config(config_json: str, code: Path | None) -> transformers.PretrainedConfig:
    config = json.loads(config_json)
    model_type = config["model_type"]
    try:
        with quiet():
            if code is not None and "auto_map" in config:
                cls = type(AutoConfig.from_pretrained(code, trust_remote_code=True))
            elif model_type in CONFIG_MAPPING:
                cls = CONFIG_MAPPING[model_type]
            else:
                hint = (
                    "it brings its own code: read it, then pass --trust-remote-code"
                    if "auto_map" in config
                    else "check the model_type, or upgrade transformers"
                )
                raise UnsupportedFamilyError(
                    f"{model_type}: is not a model type of transformers {transformers.__version__}; {hint}"
                )
            # transformers 5 writes infinities as {"__float__": "Infinity"}.
            decode = getattr(cls, "_decode_special_floats", dict)
            # Of no consequence for shapes, and a way to have code fetched from the hub.
            for key in _KERNELS & config.keys():
                del config[key]
            parsed = cls.from_dict(decode(config))
            if code is not None:
                parsed._name_or_path = str(code)
            return parsed
    except UnsupportedFamilyError:
        raise
    except Exception as error:  # each config class validates in its own way
        raise CheckpointError(
            f"config.json: transformers {transformers.__version__} rejects it as {model_type} "
            f"({one_line(error)}); take config.json from the original checkpoint"
        ) from error


def family_of(config: Mapping[str, Any], code: Path | None = None) -> Family:
    """Say how a config's family states its number of key/value heads.

    Raises:
        UnsupportedFamilyError: If the family has no such setting, or cannot be converted.
    """
    model_type = config["model_type"]
    family = FAMILIES.get(model_type, Family())
    if family.refusal and not (
        family.requires and all(config.get(key) == value for key, value in family.requires.items())
    ):
        raise UnsupportedFamilyError(f"{model_type}: cannot be converted: {family.refusal}")
    overrides = config.get("per_layer_config")
    layers = overrides.values() if isinstance(overrides, dict) else ()
    if any(isinstance(layer, dict) and "num_key_value_heads" in layer for layer in layers):
        raise UnsupportedFamilyError(
            f"{model_type}: cannot be converted yet: its layers have different numbers of KV heads"
        )
    if _lookup(parse_config(config, code), family.kv_key) is None:
        part = _part_with_heads(parse_config(config, code))
        raise UnsupportedFamilyError(
            f"{model_type}: cannot be converted yet: its KV heads are set in {part}, and models of several "
            "parts are not covered"
            if part
            else f"{model_type}: cannot be converted yet: transformers has no number of KV heads for "
            "this family; it needs a rewrite into another one"
        )
    return family


def read_heads(config: Mapping[str, Any], code: Path | None = None) -> Heads:
    """Read the head counts of a config, defaults filled in as transformers fills them.

    Raises:
        UnsupportedFamilyError: If the family cannot be converted.
        CheckpointError: If a count is no positive integer, or KV heads do not divide query heads.
    """
    family = family_of(config, code)
    parsed = parse_config(config, code)
    num_attention_heads = getattr(parsed, "num_attention_heads", None)
    value = _lookup(parsed, family.kv_key)
    count = (1 if value else num_attention_heads) if family.kv_key_is_flag else value
    for key, number in (("num_attention_heads", num_attention_heads), (family.kv_key, count)):
        if type(number) is not int or not 0 < number < 2**20:
            raise CheckpointError(
                f"config.json: {key} is {json.dumps(number, default=str)}, expected a positive integer; "
                "take config.json from the original checkpoint"
            )
    assert isinstance(num_attention_heads, int)
    assert isinstance(count, int)
    for key in family.other_kv_keys:
        if _lookup(parsed, key) != count:
            raise UnsupportedFamilyError(
                f"{config['model_type']}: cannot be converted yet: {key} is {_lookup(parsed, key)}, "
                f"{family.kv_key} {count}; layers with different numbers of KV heads are not covered"
            )
    if num_attention_heads % count:
        raise CheckpointError(
            f"config.json: {count} KV heads do not divide {num_attention_heads} query heads; "
            "take config.json from the original checkpoint"
        )
    return Heads(num_attention_heads, count)


def possible_head_counts(config: Mapping[str, Any], code: Path | None = None) -> list[int]:
    """List the numbers of KV heads that a checkpoint can be converted to, itself included.

    Counts that transformers refuses for the family (an odd one for diffllama, say) are left out.
    """
    K = read_heads(config, code).num_key_value_heads
    return [n for n in range(1, K + 1) if can_have_heads(config, n, code)]


def can_have_heads(config: Mapping[str, Any], count: int, code: Path | None = None) -> bool:
    """Say whether a checkpoint can be converted to `count` KV heads."""
    K = read_heads(config, code).num_key_value_heads
    if not 0 < count <= K or K % count:
        return False
    if family_of(config, code).kv_key_is_flag and count not in (1, K):
        return False
    return count == K or _builds(with_key_value_heads(config, count, code), code)


def with_key_value_heads(
    config: Mapping[str, Any], count: int, code: Path | None = None
) -> dict[str, Any]:
    """Return a copy of a config in which only the number of key/value heads differs."""
    family = family_of(config, code)
    changed = copy.deepcopy(dict(config))
    *path, key = family.kv_key.split(".")
    owner = changed
    for part in path:
        owner = owner.setdefault(part, {})
    if family.kv_key_is_flag:
        owner[key] = count == 1
    else:
        owner[key] = count
    for other in family.other_kv_keys:
        changed[other] = count
    for level in (changed, owner):
        for alias in _KV_KEY_ALIASES:
            if isinstance(level.get(alias), int):
                level[alias] = count
    return changed


def head_tensors(
    config: Mapping[str, Any],
    count: int,
    shapes: Mapping[str, tuple[int, ...]],
    code: Path | None = None,
) -> list[HeadTensor]:
    """Find the tensors of a checkpoint whose shape follows the number of key/value heads.

    Args:
        config: The content of `config.json`.
        count: The wanted number of KV heads.
        shapes: Shape of every tensor of the checkpoint, by its name in the file.
        code: The checkpoint's folder if its own Python code may be executed.

    Returns:
        The tensors in the order of `shapes`, each with its layout, old and new shape.

    Raises:
        UnsupportedFamilyError: If none depends on it, or one that does has no rule.
        CheckpointError: If the checkpoint lacks one of them, or its shape contradicts the config.
        HeadCountError: If transformers cannot build the family with `count` KV heads.
    """
    model_type, family = config["model_type"], family_of(config, code)
    heads = read_heads(config, code)
    old = tensor_shapes(config, code)
    try:
        new = tensor_shapes(with_key_value_heads(config, count, code), code)
    except CheckpointError as error:
        raise HeadCountError(
            f"num_key_value_heads={count}: transformers cannot build {model_type} with it ({error}); "
            f"choose one of {_or_list(possible_head_counts(config, code))}"
        ) from error
    changed = [name for name in old if old[name] != new.get(name)]
    changed += [name for name in new if name not in old]
    if not changed and count != heads.num_key_value_heads:
        raise UnsupportedFamilyError(f"{model_type}: cannot be converted: {_INERT}")
    found = _names_on_disk(changed, old, shapes)
    tensors = []
    for name in changed:
        layout = _layout(name, old.get(name), new.get(name), heads, count, family)
        if layout is None:
            raise UnsupportedFamilyError(
                f"{model_type}: cannot be converted yet: tensor {name} follows the number of KV heads "
                f"({_shape(old.get(name))} → {_shape(new.get(name))}) and has no rule"
            )
        tensor = HeadTensor(found[name], layout, old[name], new[name])
        _check_head_size(tensor, heads, config, code)
        tensors.append(tensor)
    order = {name: position for position, name in enumerate(shapes)}
    return sorted(tensors, key=lambda tensor: order[tensor.name])


def check_shapes(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], code: Path | None = None
) -> None:
    """Refuse tensors that contradict the config, before a model of its size is built.

    Raises:
        CheckpointError: If there are fewer tensors than layers, a tensor has another shape than the
            config asks for, or layers that the config does not know have KV heads.
    """
    layers = getattr(parse_config(config, code), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(shapes):
        raise CheckpointError(
            f"config.json: num_hidden_layers is {layers}, the checkpoint has {len(shapes)} tensors; "
            "config and weights do not belong together, fetch both again"
        )
    expected = tensor_shapes(config, code)
    patterns = {re.sub(r"\d+", "0", name) for name in expected}
    for name, shape in shapes.items():
        if name in expected and shape != expected[name]:
            raise CheckpointError(
                f"tensor {name} has shape {_shape(shape)}, config.json asks for {_shape(expected[name])}; "
                "config and weights do not belong together, fetch both again"
            )
        if name not in expected and re.sub(r"\d+", "0", name) in patterns:
            raise CheckpointError(
                f"tensor {name} belongs to a layer that config.json does not have; "
                "config and weights do not belong together, fetch both again"
            )


def kv_cache_bytes_per_token(config: Mapping[str, Any], code: Path | None = None) -> int:
    """Count the bytes that one token takes in the KV cache, in the checkpoint's own dtype.

    Counted from the rows of the key and value projections; for a family without a number of KV
    heads, from the hidden sizes that the config states.
    """
    try:
        heads = read_heads(config, code)
        other = _another_count(config, heads, code)
        changed = head_tensors(config, other, tensor_shapes(config, code), code)
        rows = sum(_cached_rows(tensor, heads) for tensor in changed if tensor.is_projection)
    except UnsupportedFamilyError:
        parsed = parse_config(config, code)
        text = parsed.get_text_config(decoder=True)
        if not getattr(text, "num_attention_heads", None):
            return 0  # no attention, as in a state-space model
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        count = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        rows = 2 * text.num_hidden_layers * count * size
    return rows * checkpoint_dtype(config).itemsize


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Read the dtype that a config states for its weights; float32 where it states none."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def model_class(config: Mapping[str, Any]) -> Any:
    """Find the transformers class that a config's `architectures` names, else the causal one."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else ""
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    return cls if hasattr(cls, "from_pretrained") else AutoModelForCausalLM


def tensor_shapes(
    config: Mapping[str, Any], code: Path | None = None
) -> Mapping[str, tuple[int, ...]]:
    """Ask transformers for the name and shape of every tensor of a checkpoint with this config.

    The class is built on the meta device: no memory is taken, no weight is read. Names are those of
    the files, which differ from those in memory for families that transformers renames while loading.

    Raises:
        CheckpointError: If transformers cannot build a model from the config.
    """
    return _tensor_shapes(json.dumps(config), code)


@lru_cache(maxsize=16)
def _tensor_shapes(config_json: str, code: Path | None) -> Mapping[str, tuple[int, ...]]:
    model = build_on_meta(json.loads(config_json), code)
    return {name: tuple(tensor.shape) for name, tensor in _names_as_saved(model).items()}


def build_on_meta(config: Mapping[str, Any], code: Path | None = None) -> Any:
    """Build the transformers model of a config on the meta device: no memory, no weights.

    Raises:
        CheckpointError: If transformers cannot build a model from the config.
    """
    parsed = copy.deepcopy(parse_config(config, code))  # model classes write into it
    try:
        with quiet(), torch.device("meta"):
            cls = model_class(config)
            if cls is AutoModelForCausalLM:
                return cls.from_config(parsed, trust_remote_code=code is not None)
            return cls._from_config(parsed)
    except Exception as error:  # model classes fail in their own ways
        raise CheckpointError(
            f"config.json: transformers {transformers.__version__} cannot build {config['model_type']} "
            f"from it ({one_line(error)}); check its values"
        ) from error


def names_in_memory(model: Any, disk_names: Iterable[str]) -> dict[str, str]:
    """Map the names of a checkpoint's files to a model's own.

    Several tensors of the files can lead to one in memory (experts that transformers stacks): those
    share a name here. Names that the model does not know are left out.
    """
    expected = model.state_dict()
    rename, _ = _renaming(model, expected)
    found = {}
    for disk in disk_names:
        name = disk if disk in expected else rename(disk)[0]
        if name in expected:
            found[disk] = name
    return found


def load_into_memory(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bring tensors of a checkpoint's files into the form that a model has in memory.

    Args:
        model: As `build_on_meta` gives it.
        tensors: By name in the files; complete for every tensor in memory that they lead to.

    Returns:
        The tensors by name in memory.
    """
    expected = model.state_dict()
    rename, converters = _renaming(model, expected)
    loaded: dict[str, torch.Tensor] = {}
    pending: dict[str, Any] = {}
    for disk in sorted(tensors, key=_natural):
        name, pattern = (disk, None) if disk in expected else rename(disk)
        if pattern is None:
            loaded[name] = tensors[disk]
            continue
        pending.setdefault(name, copy.deepcopy(converters[pattern]))
        pending[name].add_tensor(name, disk, pattern, tensors[disk])
    for name, converter in pending.items():
        made = converter.convert(name, model=model, config=model.config)
        loaded |= {
            key: value[0] if isinstance(value, list) else value for key, value in made.items()
        }
    return {name: tensor for name, tensor in loaded.items() if name in expected}


def _renaming(
    model: Any, expected: Mapping[str, Any]
) -> tuple[Callable[[str], tuple[str, str | None]], dict[str, Any]]:
    """Get transformers' own renaming of a file's names, and its converters by pattern."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # transformers 4 keeps the names of the file
        return lambda name: (name, None), {}
    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", "")

    def rename(name: str) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rename_source_key(
            name, renamings, converters, prefix, expected
        )
        return renamed

    return rename, {pattern: c for c in converters for pattern in c.source_patterns}


def _natural(name: str) -> list[tuple[int, str]]:
    """Order `experts.10` behind `experts.9`, as stacking them needs."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _names_as_saved(model: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 keeps the names of the file
        return dict(state)
    return dict(revert_weight_conversion(model, state))


def _names_on_disk(
    changed: list[str], old: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Match tensors by name, else by what follows the stack of layers (`layers.3.self_attn…`)."""
    by_tail: dict[str, list[str]] = {}
    for name in shapes:
        by_tail.setdefault(_tail(name), []).append(name)
    found = {}
    for name in changed:
        candidates = [name] if name in shapes else by_tail.get(_tail(name), [])
        if len(candidates) != 1:
            finding = f"has {len(candidates)} that could be" if candidates else "lacks"
            raise CheckpointError(
                f"the checkpoint {finding} tensor {name}, which its config.json asks for; "
                "config and weights do not belong together"
            )
        found[name] = candidates[0]
        if name in old and shapes[candidates[0]] != old[name]:
            raise CheckpointError(
                f"tensor {candidates[0]} has shape {_shape(shapes[candidates[0]])}, config.json asks for "
                f"{_shape(old[name])}; config and weights do not belong together"
            )
    return found


def _tail(name: str) -> str:
    match = re.search(r"[^.]+\.\d+\..*", name)
    return match.group() if match else name


def _layout(
    name: str,
    old: tuple[int, ...] | None,
    new: tuple[int, ...] | None,
    heads: Heads,
    count: int,
    family: Family,
) -> Layout | None:
    if old is None or new is None or len(old) != len(new) or old[1:] != new[1:]:
        return None
    for module, layout in family.fused.items():
        if f".{module}." in name:
            return layout
    K = heads.num_key_value_heads
    is_rows_of_heads = old[0] % K == 0 and old[0] // K * count == new[0]
    return Layout.SEPARATE if is_rows_of_heads else None


def _check_head_size(
    tensor: HeadTensor, heads: Heads, config: Mapping[str, Any], code: Path | None
) -> None:
    """Refuse layers whose number of KV heads is a multiple of the config's, as in mimo_v2_flash."""
    if tensor.layout is not Layout.SEPARATE or not tensor.is_projection:
        return
    parsed = parse_config(config, code)
    sizes = {
        getattr(parsed, key, None)
        for key in ("head_dim", "v_head_dim", "swa_head_dim", "global_head_dim")
    }
    sizes.add(parsed.hidden_size // heads.num_attention_heads)
    rows = tensor.source_shape[0] // heads.num_key_value_heads
    if rows not in sizes:
        raise UnsupportedFamilyError(
            f"{config['model_type']}: cannot be converted yet: tensor {tensor.name} has {rows} rows for each "
            "KV head, which is no head size of the config; layers with different numbers of KV heads are "
            "not covered"
        )


def _another_count(config: Mapping[str, Any], heads: Heads, code: Path | None) -> int:
    """Find a number of KV heads, other than its own, that the family can be built with."""
    H, K = heads.num_attention_heads, heads.num_key_value_heads
    for count in (1, H, *(n for n in range(2, H) if H % n == 0)):
        if count != K and _builds(with_key_value_heads(config, count, code), code):
            return count
    raise UnsupportedFamilyError(
        f"{config['model_type']}: has a single possible number of KV heads"
    )


def _cached_rows(tensor: HeadTensor, heads: Heads) -> int:
    H, K = heads.num_attention_heads, heads.num_key_value_heads
    rows = tensor.source_shape[0]
    return rows if tensor.layout is Layout.SEPARATE else rows // (H + 2 * K) * 2 * K


def _builds(config: Mapping[str, Any], code: Path | None) -> bool:
    try:
        tensor_shapes(config, code)
    except CheckpointError:
        return False
    return True


def _lookup(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part, None)
    return config


def _part_with_heads(config: Any) -> str | None:
    for part in getattr(type(config), "sub_configs", {}):
        if getattr(getattr(config, part, None), "num_key_value_heads", None) is not None:
            return f"{part}.num_key_value_heads"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks on configs away: what matters of them is raised here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " × ".join(map(str, shape))


def _or_list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))

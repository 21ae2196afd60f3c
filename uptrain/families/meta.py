"""The model of a config on the meta device, without weights, and the names of its tensors."""

import copy
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from uptrain.errors import CheckpointError, one_line
from uptrain.families import carried
from uptrain.families.registry import parse_config, quiet

_AUTO = (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModel,
)


def build_on_meta(config: Mapping[str, Any], code: Path | None = None) -> Any:
    """Build the transformers model of a config on the meta device: no memory, no weights.

    Raises:
        CheckpointError: If transformers cannot build a model from the config.
    """
    parsed = copy.deepcopy(parse_config(config, code))  # model classes write into it
    try:
        with quiet(), torch.device("meta"):
            cls = model_class(config, parsed)
            if cls in _AUTO:
                return cls.from_config(parsed, trust_remote_code=code is not None)
            return cls._from_config(parsed)
    except Exception as error:  # model classes fail in their own ways
        raise CheckpointError(
            f"config.json: transformers {transformers.__version__} cannot build {config['model_type']} "
            f"from it ({one_line(error)}); check its values"
        ) from error


def model_class(config: Mapping[str, Any], parsed: Any) -> Any:
    """Find the transformers class that a config's `architectures` names, else the one that generates."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else ""
    cls = None
    if isinstance(name, str):
        cls = getattr(transformers, name, None) or carried.find_class(name)
    if hasattr(cls, "from_pretrained"):
        return cls
    known = (auto for auto in _AUTO if type(parsed) in auto._model_mapping)
    return next(known, AutoModelForCausalLM)


def tensor_shapes(
    config: Mapping[str, Any], code: Path | None = None
) -> Mapping[str, tuple[int, ...]]:
    """Ask transformers for the name and shape of every tensor of a checkpoint with this config.

    The class is built on the meta device: no memory is taken, no weight is read. Names are those of
    the files, which differ from those in memory for families that transformers renames while loading.

    Raises:
        CheckpointError: If transformers cannot build a model from the config.
    """
    return _tensors(json.dumps(config), code)[0]


def tied_tensors(config: Mapping[str, Any], code: Path | None = None) -> Mapping[str, str]:
    """Map each tensor that several names share to the first of its names, itself included.

    Args:
        config: The content of `config.json`.
        code: The checkpoint's folder if its own Python code may be executed.

    Raises:
        CheckpointError: If transformers cannot build a model from the config.
    """
    return _tensors(json.dumps(config), code)[1]


@lru_cache(maxsize=16)
def _tensors(
    config_json: str, code: Path | None
) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, str]]:
    saved = _names_as_saved(build_on_meta(json.loads(config_json), code))
    names: dict[int, list[str]] = {}
    for name, tensor in saved.items():
        names.setdefault(id(tensor), []).append(name)
    tied = {name: group[0] for group in names.values() if len(group) > 1 for name in group}
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}, tied


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


def names_on_disk(
    needed: list[str],
    config: Mapping[str, Any],
    disk_names: Collection[str],
    code: Path | None = None,
) -> dict[str, str]:
    """Find tensors in a checkpoint's files, in which older versions may have other names.

    They are found by name, by the name that transformers loads them under, or by their place in a
    stack of layers. One that shares its weights with another may be absent, and is left out then.

    Args:
        needed: Names as in `tensor_shapes`.
        config: The content of `config.json`.
        disk_names: All names of the files.
        code: The checkpoint's folder if its own Python code may be executed.

    Raises:
        CheckpointError: If one is not there, or several could be it.
    """
    found = {name: name for name in needed if name in disk_names}
    if len(found) == len(needed):
        return found
    loaded = names_in_memory(build_on_meta(config, code), [*needed, *disk_names])
    _match(found, [name for name in needed if name in loaded], disk_names, loaded.get)
    tied = tied_tensors(config, code)
    there = {tied[name] for name in found if name in tied}
    alone = [name for name in needed if tied.get(name) not in there]
    _match(found, alone, disk_names, _tail)
    for name in alone:
        if name not in found:
            raise CheckpointError(
                f"the checkpoint lacks tensor {name}, which its config.json asks for; config and weights "
                "do not belong together"
            )
    return found


def _match(
    found: dict[str, str],
    needed: Collection[str],
    disk_names: Collection[str],
    key: Callable[[str], str | None],
) -> None:
    """Add those of the needed names that have a key in common with one name of the files."""
    free: dict[str | None, list[str]] = {}
    for disk in set(disk_names) - set(found.values()):
        free.setdefault(key(disk), []).append(disk)
    for name in needed:
        candidates = free.get(key(name), []) if name not in found else []
        if len(candidates) > 1:
            raise CheckpointError(
                f"the checkpoint has {len(candidates)} tensors that could be {name}, which its config.json "
                "asks for; config and weights do not belong together"
            )
        if candidates:
            found[name] = candidates[0]


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


def bring_to_files(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bring tensors in memory into the form of a checkpoint's files; the inverse of `load_into_memory`.

    Args:
        model: As `build_on_meta` gives it.
        tensors: By name in memory; complete for every tensor of the files that they lead to.

    Returns:
        By the name that transformers would save them under.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 keeps the names of the file
        return dict(tensors)
    return dict(revert_weight_conversion(model, dict(tensors)))


def stored_otherwise(model: Any, disk_names: Iterable[str]) -> set[str]:
    """Find tensors of the files that loading computes with: joined, split, transposed."""
    expected = model.state_dict()
    rename, _ = _renaming(model, expected)
    return {name for name in disk_names if name not in expected and rename(name)[1] is not None}


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


def _tail(name: str) -> str:
    """Give what follows the stack of layers (`layers.3.self_attn…`)."""
    match = re.search(r"[^.]+\.\d+\..*", name)
    return match.group() if match else name


def _natural(name: str) -> list[tuple[int, str]]:
    """Order `experts.10` behind `experts.9`, as stacking them needs."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _names_as_saved(model: Any) -> dict[str, torch.Tensor]:
    return bring_to_files(model, model.state_dict(keep_vars=True))  # tied ones are the same object

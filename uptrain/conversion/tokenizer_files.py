"""Keep a tokenizer what it is when `config.json` changes its `model_type`.

transformers chooses a tokenizer's class by the model's type as well as by the tokenizer's own files.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from uptrain.checkpoint.files import CONFIG
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.remote_tokenizers import class_with_code, without_code
from uptrain.errors import CheckpointError
from uptrain.loading import has_tokenizer, load_tokenizer

_SETTINGS = (
    "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces",
    "chat_template",
)  # fmt: skip


def tokenizer_files(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, bytes]:
    """Find the tokenizer files that a checkpoint needs once its config is another one.

    Args:
        checkpoint: The source.
        config: Content of the new `config.json`.

    Returns:
        Content by name: none if the source's own files give the same tokenizer with the new config,
        or if it has no tokenizer that transformers can load without code; else `tokenizer.json` and a
        `tokenizer_config.json` that names a class which any config leaves alone.
    """
    if not has_tokenizer(checkpoint):
        return {}
    try:
        tokenizer = load_tokenizer(checkpoint)
    except CheckpointError:
        return {}
    if not tokenizer.is_fast or _state(tokenizer) == _state(_with_config(checkpoint, config)):
        return {}
    settings = {key: getattr(tokenizer, key, None) for key in _SETTINGS}
    stated = {key: value for key, value in settings.items() if value is not None}
    if others := list(map(str, tokenizer.extra_special_tokens)):
        stated["additional_special_tokens"] = others  # the name that transformers 4 reads, too
    return _written(tokenizer.backend_tokenizer, {**stated, **tokenizer.special_tokens_map})


def files_without_code(checkpoint: Checkpoint) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Make the files of a tokenizer that needs code of its checkpoint's own, so that they need none.

    Returns:
        Content by name as `tokenizer_files`, and what is lost: a sentence if the code is still needed.

    Raises:
        CheckpointError: If `tokenizer_config.json` cannot be read.
    """
    name = class_with_code(checkpoint.folder)
    if name is None:
        return {}, ()
    try:
        return _written(*without_code(checkpoint.folder, name)), ()
    except CheckpointError as error:
        way_out = "load it with trust_remote_code=True, or put a tokenizer.json beside the weights"
        return {}, (f"its tokenizer still needs its own code ({error}): {way_out}",)


def load_from(checkpoint: Checkpoint, files: Mapping[str, bytes]) -> Any:
    """Load the tokenizer that is in some files, by name.

    Raises:
        CheckpointError: If transformers cannot load it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return load_tokenizer(replace(checkpoint, folder=folder))


def _written(tokenizer: Any, settings: Mapping[str, Any]) -> dict[str, bytes]:
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (
            json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        ).encode(),
    }


def _with_config(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        for path in checkpoint.companions:
            target = folder / checkpoint.companion_name(path)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(path.resolve())
        try:
            return load_tokenizer(replace(checkpoint, folder=folder))
        except CheckpointError:
            return None


def _state(tokenizer: Any) -> tuple[Any, ...] | None:
    """What decides a tokenizer's output, and which tokens it knows as special."""
    if tokenizer is None or not tokenizer.is_fast:
        return None
    settings = tuple(getattr(tokenizer, key, None) for key in _SETTINGS)
    special = tokenizer.special_tokens_map, tokenizer.all_special_tokens
    return tokenizer.backend_tokenizer.to_str(), special, settings

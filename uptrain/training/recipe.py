"""The recipe of a run: typed, strict, from YAML with `key=value` overrides."""

import contextlib
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from uptrain.errors import RecipeError, one_line
from uptrain.training.options import SECTIONS, Recipe
from uptrain.training.shipped import (
    copy_recipe,
    describe_shipped,
    recipe_files,
    shipped_folder,
    shipped_recipes,
)
from uptrain.training.strict_yaml import parse_yaml

__all__ = ["Recipe", "copy_recipe", "load_recipe", "shipped_recipes"]

EXAMPLES_PREFIX = "examples:"
_MAX_BYTES = 2**18  # of which YAML takes seconds already
_LIKE = 0.6  # from here on one key may have been meant for another
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MOST_ID_CHARACTERS = 96  # the hub's own limit
PATHS = (
    "source",
    "output",
    "data.train",
    "data.validation",
    "data.tokens",
    "evaluate.data",
    "evaluate.tasks_folder",
    "convert.calibration",
    "train.teacher",
)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path_or_name: A YAML file, or the name of a recipe that is shipped with uptrain.
        overrides: `key=value` with a dotted key and a YAML value, such as `train.steps=20`.

    Returns:
        The recipe with its paths made absolute: those of a file are relative to its folder, those
        of a shipped recipe and of overrides to the current one. `examples:NAME` is an example
        that is shipped with uptrain. A hub id stays as it is.

    Raises:
        RecipeError: If there is no such recipe, it is no plain YAML, or a key or value is not one
            that a recipe can have; the message names the nearest right key.
    """
    path, base = _find(path_or_name)
    content = parse_yaml(_read(path), str(path))
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: holds no keys; expected source, data, train and output")
    _resolve_paths(content, base)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"{override}: expected key=value, such as train.learning_rate=1e-3")
        nested: Any = parse_yaml(value, override)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _resolve_paths(nested, Path.cwd())
        _merge(content, nested, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error)}") from error


def _find(path_or_name: str | Path) -> tuple[Path, Path]:
    """Return the recipe's file and the folder that its paths are relative to."""
    path = Path(path_or_name)
    if path.is_file():
        return path, path.absolute().parent
    recipes = recipe_files()
    if str(path_or_name) in recipes:
        return recipes[str(path_or_name)], Path.cwd()
    found = "is a folder" if path.is_dir() else "no such file"
    raise RecipeError(f"{path}: {found}, and {describe_shipped(str(path_or_name))}")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{path}: is too large for a recipe; expected some lines of YAML")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path}: cannot be read as UTF-8 text ({one_line(error)[:120]}); correct it"
        ) from error


def _merge(content: dict[Any, Any], nested: dict[Any, Any], override: str) -> None:
    for key, value in nested.items():
        if isinstance(value, dict) and content.get(key) is not None:
            if not isinstance(content[key], dict):
                raise RecipeError(f"{override}: {key} has no keys of its own")
            _merge(content[key], value, override)
        else:
            content[key] = value


def _at(content: Any, dotted: str) -> tuple[dict[Any, Any], str] | None:
    """Find the section that holds a dotted key, if it does."""
    *sections, key = dotted.split(".")
    for section in sections:
        content = content.get(section) if isinstance(content, dict) else None
    return (content, key) if isinstance(content, dict) and key in content else None


def _resolve_paths(content: dict[Any, Any], base: Path) -> None:
    for dotted in PATHS:
        if (found := _at(content, dotted)) is None:
            continue
        section, key = found
        value = section[key]
        if isinstance(value, list):
            section[key] = [_resolve_item(item, base, dotted) for item in value]
        else:
            section[key] = _resolve(value, base, dotted)


def _resolve_item(item: Any, base: Path, dotted: str) -> Any:
    if not isinstance(item, dict):
        return _resolve(item, base, dotted)
    places = {key: _resolve(item[key], base, key) for key in ("path", "dataset") if key in item}
    return item | places


def _resolve(value: Any, base: Path, dotted: str) -> Any:
    if not isinstance(value, str) or not value or (dotted, value) == ("train.teacher", "none"):
        return value
    if value.startswith(EXAMPLES_PREFIX):
        return str(shipped_folder("examples") / value.removeprefix(EXAMPLES_PREFIX))
    with contextlib.suppress(RuntimeError):  # no home folder is known
        value = str(Path(value).expanduser())
    may_be_id = dotted in ("source", "train.teacher", "dataset")
    is_short = len(value) <= _MOST_ID_CHARACTERS
    if may_be_id and is_short and _HUB_ID.fullmatch(value) and not (base / value).exists():
        return value
    return str(base / value)


def _explain(error: ValidationError) -> str:
    """Say what is wrong, unknown keys first (they cause other errors), and the way out."""
    errors = error.errors(include_url=False)
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    dotted = one_line(".".join(map(str, first["loc"])))[:100]
    if first["type"] == "extra_forbidden":
        return f"unknown key {dotted}; {_suggest(dotted)}"
    if first["type"] == "missing":
        return f"{dotted} is missing; add it"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "model_type":
        return f"{dotted} is {_shown(first['input'])}; expected a section with keys of its own"
    if first["type"] in ("too_short", "too_long"):
        least, most = (first["ctx"].get(key) for key in ("min_length", "max_length"))
        limit = f"at least {least}" if most is None else f"at most {most}"
        return f"{dotted}: {first['ctx']['actual_length']} given; expected {limit}"
    text = first["msg"][0].lower() + first["msg"][1:].removeprefix("Input ")
    text = (
        text.removeprefix("input ")
        .replace("should be", "expected")
        .replace("should", "expected to")
    )
    return f"{dotted} is {_shown(first['input'])}; {text}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'section' if isinstance(value, dict) else 'list'}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _suggest(dotted: str) -> str:
    """Name the right key that is nearest to an unknown one, in its own section if there is one."""
    *section, key = dotted.split(".")
    keys = {name: list(options.model_fields) for name, options in SECTIONS.items()}
    keys[""] = list(Recipe.model_fields)
    home = ".".join(part for part in section if not part.isdecimal())
    near = [
        (difflib.SequenceMatcher(None, key, each).ratio() + 0.1 * (name == home), name, each)
        for name, options in keys.items()
        for each in options
    ]
    likeness, name, each = max(near)
    if likeness >= _LIKE:
        return f"did you mean {f'{name}.' if name else ''}{each}?"
    known = ", ".join(keys.get(home, keys[""]))
    return f"the keys of {home or 'a recipe'} are {known}"

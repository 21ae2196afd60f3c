"""The recipes and examples that travel with the package."""

import difflib
from pathlib import Path

from uptrain.errors import RecipeError


def shipped_recipes() -> list[dict[str, str]]:
    """Give `name` and `description` (the first line) of each shipped recipe."""
    return [
        {
            "name": name,
            "description": path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "),
        }
        for name, path in recipe_files().items()
    ]


def recipe_files() -> dict[str, Path]:
    """Give the files of the shipped recipes, by name."""
    return {path.stem: path for path in sorted(shipped_folder("recipes").glob("*.yaml"))}


def copy_recipe(name: str, path: str | Path | None = None) -> Path:
    """Copy a shipped recipe, to be edited.

    Args:
        name: Of the recipe.
        path: The file to create, or a folder for it; the current folder if not given.

    Returns:
        The file written.

    Raises:
        RecipeError: If there is no such recipe, or the file exists already.
    """
    recipes = recipe_files()
    if name not in recipes:
        raise RecipeError(f"{name}: no such recipe; {describe_shipped(name)}")
    target = Path(path or ".")
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(recipes[name].read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise RecipeError(f"{target}: exists already; choose another name") from error
    except OSError as error:
        raise RecipeError(f"{target}: cannot be written ({error.strerror})") from error
    return target


def shipped_folder(kind: str) -> Path:
    """Give the folder of the shipped `recipes` or `examples`."""
    package = Path(__file__).resolve().parents[1]
    inside = package / kind  # of an installed wheel; in a checkout they lie beside the package
    return inside if inside.is_dir() else package.parent / kind


def describe_shipped(name: str) -> str:
    """Say which recipes there are, and which one `name` may have meant."""
    recipes = recipe_files()
    near = difflib.get_close_matches(name, recipes, 1)
    question = f" (did you mean {near[0]}?)" if near else ""
    return f"the shipped recipes are {', '.join(recipes)}{question}"

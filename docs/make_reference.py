"""Write docs/recipes.md from the recipe's own types, and docs/command-line.md from the command line's."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from uptrain.cli import main as command_line
from uptrain.training.options import SECTIONS, Recipe
from uptrain.training.recipe import PATHS
from uptrain.training.shipped import recipe_files

HERE = Path(__file__).parent
RANGE = re.compile(r" \[x>=?\d\]|; x>=?\d(?=\])|x>=?\d; ")

RECIPES_HEAD = """# Recipes

A recipe is the YAML file of a run: `uptrain run RECIPE` converts, uptrains, evaluates and reports as it says,
`uptrain finetune RECIPE` only uptrains. RECIPE is a file, or the name of one of the [shipped](#shipped-recipes) ones.

```bash
uptrain recipes list
uptrain recipes copy quickstart mine.yaml
uptrain run mine.yaml train.learning_rate=3e-4 output=elsewhere
```

* Any key can be given behind it as `key=value`, with a dotted key and a YAML value.
* Paths in a file are relative to the file, those on the command line and in shipped recipes to the current folder.
  `examples:NAME` is an example that travels with the package; `owner/name` is a hub id where there is no such folder.
* An unknown key, a wrong type or an impossible value is refused before anything starts, with the nearest right key.
* Text that has a format is known by its name: `.jsonl` and `.jsonl.gz` (a `{"text": …}` a line), `.parquet`; anything
  else is plain text.

Written by `python docs/make_reference.py` from the types that check a recipe (`uptrain/training/options.py`).

"""

COMMANDS_HEAD = """# Command line

Written by `python docs/make_reference.py` from the commands themselves; `uptrain COMMAND --help` says the same.

* Results go to standard output, progress to standard error; `--json` prints exactly one JSON object, and
  nothing on an error (what `verify` finds is none).
* Exit codes: 0 done; 1 an error of data or machine, in one line ([Troubleshooting](troubleshooting.md));
  2 wrong usage or recipe; 130 interrupted, with everything resumable.
* `uptrain --debug COMMAND` shows the traceback of an error, `uptrain --version` the version.
* From a checkout, `python cli.py` is the same as `uptrain`; under `accelerate launch` or `torchrun` it is `-m uptrain`.

"""


def main() -> None:
    """Write both pages."""
    (HERE / "recipes.md").write_text(recipes_page(), encoding="utf-8")
    (HERE / "command-line.md").write_text(commands_page(), encoding="utf-8")


def recipes_page() -> str:
    """Make the page of the keys of a recipe."""
    text = RECIPES_HEAD + section("", Recipe)
    for name, options in SECTIONS.items():
        text += f"## `{name}`\n\n{inspect.getdoc(options)}\n\n" + section(f"{name}.", options)
    text += "## Shipped recipes\n\n`uptrain recipes copy NAME` copies one, to change it.\n\n"
    for name, path in recipe_files().items():
        text += f"### {name}\n\n```yaml\n{path.read_text('utf-8').strip()}\n```\n\n"
    return text.rstrip() + "\n"


def section(prefix: str, options: type[BaseModel]) -> str:
    """Make the table of one section's keys."""
    schema = options.model_json_schema()
    meanings = dict(meanings_of(options))
    text = "| key | type | default | meaning |\n|---|---|---|---|\n"
    for key, field in options.model_fields.items():
        form = schema["properties"][key]
        kind = "path" if prefix + key in (*PATHS, "data.train.path") else kind_of(form)
        default = "**required**" if field.is_required() else shown(form.get("default"))
        if prefix + key == "data.train":
            kind = "list of paths, or of keys as [below](#datatrain)"
        text += f"| `{key}` | {kind} | {default} | {meanings[key]} |\n"
    return text + "\n"


def meanings_of(options: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Give the docstring of each key of a section."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(options))).body
    assert isinstance(body, ast.ClassDef)
    for field, docstring in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(docstring, ast.Expr), f"{field.target.id} has no docstring"
            yield field.target.id, " ".join(ast.literal_eval(docstring.value).split())


def kind_of(form: Mapping[str, Any]) -> str:
    """Say in words which values a key takes, from its JSON schema."""
    if "anyOf" in form:
        kinds = [kind_of(each) for each in form["anyOf"] if each.get("type") != "null"]
        return " or ".join(kinds)
    if "$ref" in form:
        return "section"
    if "enum" in form or "const" in form:
        return ", ".join(f"`{value}`" for value in form.get("enum", [form.get("const")]))
    if form["type"] == "array":
        return f"list of {kind_of(form['items'])}"
    kind = {"integer": "whole number", "number": "number", "string": "text", "boolean": "boolean"}
    bounds = [
        f"{sign} {form[bound]:g}"
        for bound, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if bound in form and abs(form[bound]) < 2**62
    ]
    return " ".join([kind[form["type"]], ", ".join(bounds)]).strip()


def shown(default: Any) -> str:
    """Show a default as YAML has it."""
    if default is None:
        return "–"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:_}`" if isinstance(default, int) else f"`{default}`"


def commands_page() -> str:
    """Make the page of the commands and their options."""
    text = COMMANDS_HEAD
    for context in contexts(click.Context(command_line, info_name="uptrain")):
        command = context.command
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        text += f"## {context.command_path}\n\n{inspect.cleandoc(command.help or '')}\n\n"
        text += f"```text\n{usage}\n```\n\n"
        for option in command.params:
            record = option.get_help_record(context)
            if isinstance(option, click.Option) and record:
                names = record[0].replace("INTEGER RANGE", "N").replace("FLOAT RANGE", "X")
                meaning = RANGE.sub("", record[1]).replace("  ", " ").strip()
                text += f"* `{names}`: {meaning}\n"
        text += "\n"
    return text.rstrip() + "\n"


def contexts(context: click.Context) -> Iterator[click.Context]:
    """Give a context for each command below one, groups apart."""
    command = context.command
    if not isinstance(command, click.Group):
        yield context
        return
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from contexts(click.Context(found, info_name=name, parent=context))


if __name__ == "__main__":
    main()

"""A report as one HTML page that needs nothing else, and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import uptrain
from uptrain.checkpoint.card import escape, printable
from uptrain.report.canvas import Figure, colour_rules
from uptrain.report.making import commands
from uptrain.report.sections import sections
from uptrain.report.summary import compare_sections, ranked, tiles, title

Run = Mapping[str, Any]


def pages(
    runs: Sequence[Run], figures: Sequence[Figure], note: str | None = None
) -> dict[str, str]:
    """Write a report of one run, or of several compared.

    Args:
        runs: From `read_runs`, each with its `verdict`.
        figures: That were drawn of them.
        note: To be said at the end.

    Returns:
        The content of `report.html` and `report.md`.
    """
    environment = Environment(
        loader=PackageLoader("uptrain.report"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = escape
    alone = len(runs) == 1
    content: dict[str, Any] = {
        "figures": figures,
        "note": note,
        "version": uptrain.__version__,
        "colour_rules": colour_rules(":root"),
    }
    if alone:
        content |= {"title": title(runs[0]), "lead": [runs[0]["verdict"]]}
        content |= {"tiles": tiles(runs[0]), "sections": _sections(runs[0]), "runs": []}
    else:
        told = [
            {"name": run["name"], "verdict": run["verdict"], "sections": _sections(run)}
            for run in ranked(runs)
        ]
        content |= {"title": f"{len(runs)} runs compared", "lead": [], "tiles": []}
        content |= {"sections": compare_sections(ranked(runs)), "runs": told}
    return {
        name: environment.get_template(name).render(content)
        for name in ("report.html", "report.md")
    }


def _sections(run: Run) -> list[Any]:
    return sections(run, [printable(line) for line in commands(run)])

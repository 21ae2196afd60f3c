"""The log of a run: one JSON object a line, cut back to the step that a run resumes from."""

import json
from pathlib import Path
from typing import Any


def append_log(path: Path, row: dict[str, Any]) -> None:
    """Add one row."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read all whole rows; what a kill left of the last one is passed over."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def cut_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the rows behind `step`; returns those that stay."""
    rows = [row for row in read_log(path) if row["step"] <= step]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
    return rows

"""The log of a run: one JSON object a line, cut back to the step that a run resumes from."""

import json
from pathlib import Path
from typing import Any

from uptrain.checkpoint.staging import replace_file
from uptrain.errors import TrainingError


def append_log(path: Path, row: dict[str, Any]) -> None:
    """Add one row.

    Raises:
        TrainingError: If it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written ({error.strerror}); make room, then add --resume to go on"
        ) from error


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
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows

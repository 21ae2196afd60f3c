"""Text in, documents out, whatever holds them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uptrain.data.files import open_file
from uptrain.data.source import Documents, Source
from uptrain.data.tables import is_saved, open_dataset, open_parquet
from uptrain.errors import DataError

__all__ = ["Documents", "Source", "open_source", "read_documents"]


def read_documents(source: Source | str | Path, tokenizer: Any) -> Iterator[str]:
    """Read the documents of a source, one at a time.

    Args:
        source: What to read; a path stands for the source that only has this path.
        tokenizer: The transformers tokenizer whose chat template is used.

    Yields:
        The text of each document; the template's text for messages.

    Raises:
        DataError: As `open_source`.
    """
    parts: list[str] = []
    for fragment in open_source(source).read(tokenizer):
        parts.append(fragment.text)
        if fragment.is_last:
            yield "".join(parts)
            parts = []


def open_source(source: Source | str | Path) -> Documents:
    """Find out what a source consists of, and how to read it.

    A line of jsonl or a row of a table is one document, any other file is one as a whole.

    Raises:
        DataError: If the source does not exist, is damaged or has no such column, or an extra is
            not installed. While reading: if text is not UTF-8, or a line or row holds no text; the
            message names it.
    """
    source = source if isinstance(source, Source) else Source.model_validate(source)
    path = Path(source.name)
    if source.dataset is not None or is_saved(path):
        return open_dataset(source)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {found}; expected a .jsonl, .parquet or plain text file")
    for key in ("config", "split"):
        if getattr(source, key) is not None:
            raise DataError(f"{path}: a file has no {key}; leave it out")
    return (open_parquet if path.suffix == ".parquet" else open_file)(source, path)

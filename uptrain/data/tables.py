"""Documents of parquet files and of data sets: one a row; both need the extra `data`."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from uptrain.data.source import Documents, Fragment, Source, to_text, unreadable
from uptrain.errors import DataError, one_line

_READ_BYTES = 2**20
_ROWS = 64  # in memory at once; a row may be a whole book


def open_parquet(source: Source, path: Path) -> Documents:
    """Open a parquet file, which is read a few rows at a time.

    Raises:
        DataError: If the extra is not installed, the file is damaged or has no such column.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _needs_extra(path, "a parquet file") from error
    damage = (OSError, pyarrow.ArrowException, UnicodeDecodeError)

    def open_it() -> Any:
        # Without these two, whole row groups would be held in memory.
        return ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)

    try:
        with open_it() as file:
            key = _pick_column(source, file.schema_arrow.names)
            row_bytes = path.stat().st_size / max(file.metadata.num_rows, 1)
    except damage as error:
        raise unreadable(path, error) from error

    def read(tokenizer: Any) -> Iterator[Fragment]:
        try:
            with open_it() as file:
                batches = file.iter_batches(_ROWS, columns=[key])
                columns = (batch.column(key).to_pylist() for batch in batches)
                yield from _read_rows(columns, key, path, row_bytes, tokenizer)
        except damage as error:
            raise unreadable(path, error) from error

    return Documents(source, (path,), read)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_dataset(source: Source) -> Documents:
    """Open a data set of the hub or of a folder; its rows are mapped into memory, not loaded.

    Raises:
        DataError: If the extra is not installed, or there is no such data set, split or column.
    """
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise _needs_extra(source.name, "a data set") from error
    name, split = source.name, source.split or "train"
    try:
        if not is_saved(Path(name)):
            found = load_dataset(name, source.config, split=split)
        elif source.config is not None:
            raise DataError(f"{name}: a saved data set has no config; leave it out")
        elif isinstance(found := load_from_disk(name), DatasetDict):
            if split not in found:
                raise DataError(f"{name}: has no split {split}; choose one of {', '.join(found)}")
            found = found[split]
        elif source.split is not None:
            raise DataError(f"{name}: holds one data set without splits; leave split out")
    except DataError:
        raise
    except Exception as error:  # of the hub, the network, a damaged file
        raise DataError(
            f"{name}: cannot be loaded as a data set ({one_line(error)}); "
            "check its name, config and split"
        ) from error
    key = _pick_column(source, found.column_names)
    files = tuple(dict.fromkeys(Path(entry["filename"]) for entry in found.cache_files))
    row_bytes = sum(file.stat().st_size for file in files) / max(len(found), 1)
    tables = found.select_columns([key]).with_format("arrow")

    def read(tokenizer: Any) -> Iterator[Fragment]:
        columns = (table.column(key).to_pylist() for table in tables.iter(_ROWS))
        return _read_rows(columns, key, name, row_bytes, tokenizer)

    return Documents(source, files, read)


def _needs_extra(name: str | Path, what: str) -> DataError:
    return DataError(
        f"{name}: the package that reads {what} is not installed; pip install 'uptrain-gqa[data]'"
    )


def _pick_column(source: Source, names: Iterable[str]) -> str:
    found = list(names)
    wanted = [source.column] if source.column else ["text", "messages"]
    for name in wanted:
        if name in found:
            return name
    shown = ", ".join(found)[:200] or "none"
    raise DataError(
        f"{source.name}: has no column {' or '.join(wanted)}; set column to one of {shown}"
    )


def _read_rows(
    columns: Iterable[list[Any]], key: str, name: str | Path, row_bytes: float, tokenizer: Any
) -> Iterator[Fragment]:
    number = 0
    for values in columns:
        for value in values:
            number += 1
            text = to_text(value, key, f"{name}: row {number}", tokenizer)
            yield Fragment(text, True, row_bytes)

"""Where text comes from, and what counts as the text of a line or row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from uptrain.errors import DataError, one_line


class Source(BaseModel):
    """Where text comes from: a file, or a data set of the `datasets` library."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    path: str | None = Field(None, min_length=1)
    """`.jsonl` (one object a line), `.parquet`, `.jsonl.gz`, a folder that `save_to_disk` wrote, or
    any other file as plain UTF-8 text."""
    dataset: str | None = Field(None, min_length=1)
    """A data set's hub id, or a folder of one."""
    config: str | None = Field(None, min_length=1)
    """Which configuration of the data set, if it has several."""
    split: str | None = Field(None, min_length=1)
    """Which split of the data set; `train` if not given."""
    column: str | None = Field(None, min_length=1)
    """Key or column of the text, or of a list of messages for the tokenizer's chat template;
    `text`, else `messages`, if not given."""
    weight: float | None = Field(None, gt=0)
    """Its part of the tokens that are trained on, relative to the other weights."""

    @model_validator(mode="before")
    @classmethod
    def _read_path(cls, value: Any) -> Any:
        return {"path": str(value)} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _check_place(self) -> "Source":
        if (self.path is None) == (self.dataset is None):
            found = "neither path nor" if self.path is None else "both path and"
            raise ValueError(f"a source has {found} dataset; give it one of the two")
        return self

    @property
    def name(self) -> str:
        """The path or hub id, for messages."""
        return self.path or self.dataset or ""


class Fragment(NamedTuple):
    """A document, or a part of it if it is long."""

    text: str
    is_last: bool = True
    """Of its document."""
    read_bytes: float = 0
    """Bytes of the source that it took."""


@dataclass(frozen=True)
class Documents:
    """An opened source."""

    source: Source
    files: tuple[Path, ...]
    """What its text is read from."""
    read: Callable[[Any], Iterator[Fragment]]
    """Give the documents, in bounded memory; takes the tokenizer for its chat template."""


def to_text(value: Any, key: str, where: str, tokenizer: Any) -> str:
    """Check the text of a line or row, or make it of its messages.

    Args:
        value: What was found at `key`: a string, or a list of messages.
        key: The name of the column.
        where: The line or row, for messages.
        tokenizer: The transformers tokenizer whose chat template is used.

    Raises:
        DataError: If it is neither, no Unicode text, or the chat template refuses it.
    """
    is_chat = isinstance(value, list) and value and isinstance(value[0], dict)
    if key == "messages" or is_chat:
        text = _apply_template(value, key, where, tokenizer)
    elif isinstance(value, str):
        text = value
    else:
        kind = type(value).__name__
        raise DataError(
            f"{where}: {key} is a {kind}, no string; correct it, or name another column"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair, which is no character; remove or replace it"
        ) from error
    return text


def _apply_template(messages: Any, key: str, where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} has messages, but the model's tokenizer has no chat template; "
            "give plain text, or add chat_template.jinja to the model's folder"
        )
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, dict) and "role" in message for message in messages)
    ):
        raise DataError(
            f'{where}: {key} is no list of {{"role": …, "content": …}} objects; correct it'
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (
        Exception
    ) as error:  # a template is a program of the model's author: it may raise anything
        raise DataError(
            f"{where}: the model's chat template refuses the messages ({one_line(error)[:120]}); "
            "correct them"
        ) from error


def unreadable(path: str | Path, error: Exception) -> DataError:
    """Say that a file is damaged or cannot be opened."""
    return DataError(
        f"{path}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)}); "
        "check the disk, or fetch the file again"
    )

"""Check a converted checkpoint against its record, against transformers and against its source."""

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from uptrain.checkpoint.reader import (
    CONFIG,
    MODEL_CARD,
    RECORD,
    Checkpoint,
    open_checkpoint,
    read_json,
    tensor_chunks,
)
from uptrain.conversion.convert import merge_tensor
from uptrain.conversion.plan import plan_conversion
from uptrain.errors import CheckpointError
from uptrain.families import registry
from uptrain.progress import progress


def verify(
    target: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Check that a checkpoint is what its `uptrain.json` says.

    Args:
        target: A checkpoint that `convert` or `finetune` wrote.
        source: The checkpoint it was converted from. Given, every tensor is compared with it byte for
            byte: those without KV heads directly, the merged ones by merging again. Of an uptrained
            checkpoint only names, dtypes and shapes can be compared.
        trust_remote_code: Let transformers execute Python code that lies in the checkpoints.

    Returns:
        `target`, `checks` (what was checked and found right) and `problems` (empty if all is well).

    Raises:
        CheckpointError: If a folder cannot be read, or `target` has no `uptrain.json`.
    """
    folder = Path(target)
    checks: list[str] = []
    problems: list[str] = []
    if folder.is_dir() and not (folder / RECORD).is_file():
        raise CheckpointError(
            f"{folder}: has no {RECORD}; expected a checkpoint that uptrain converted or trained"
        )
    checkpoint = open_checkpoint(folder)
    record = read_json(folder / RECORD)
    code = folder if trust_remote_code else None
    try:
        hashes: dict[str, str] = record["files"]
        heads = record["num_key_value_heads"]["target"]
        method, seed = record["method"], record["seed"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / RECORD}: lacks {error}; it was damaged or written by another version"
        ) from error

    _check_files(folder, hashes, checks, problems)
    _check_shapes(checkpoint, heads, code, checks, problems)
    if source is not None:
        original = open_checkpoint(source)
        is_uptrained = "uptraining" in record
        _compare(original, checkpoint, heads, method, seed, is_uptrained, code, checks, problems)
    return {"target": str(target), "checks": checks, "problems": problems}


def _check_files(
    folder: Path, hashes: dict[str, str], checks: list[str], problems: list[str]
) -> None:
    before = len(problems)
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    problems += [f"{name} is missing" for name in sorted(hashes.keys() - present)]
    extra = present - hashes.keys() - {RECORD, MODEL_CARD}
    problems += [f"{name} is not in the record" for name in sorted(extra)]
    there = sorted(hashes.keys() & present)
    with progress(
        "hash", sum((folder / name).stat().st_size for name in there), "bytes"
    ) as advance:
        for name in there:
            digest = hashlib.sha256()
            with (folder / name).open("rb") as file:
                while chunk := file.read(8 * 2**20):
                    digest.update(chunk)
                    advance(len(chunk))
            if digest.hexdigest() != hashes[name]:
                problems.append(f"{name} was changed: its SHA-256 is not the recorded one")
    if len(problems) == before:
        checks.append(f"{len(there)} files have the recorded SHA-256, none is missing or added")


def _check_shapes(
    checkpoint: Checkpoint, heads: int, code: Path | None, checks: list[str], problems: list[str]
) -> None:
    found = registry.read_heads(checkpoint.config, code).num_key_value_heads
    if found != heads:
        problems.append(f"{CONFIG} says {found} KV heads, the record {heads}")
    before = len(problems)
    expected = registry.tensor_shapes(checkpoint.config, code)
    known = [name for name in checkpoint.tensors if name in expected]
    for name in known:
        shape = checkpoint.tensors[name].shape
        if shape != expected[name]:
            problems.append(f"{name} has shape {shape}, transformers expects {expected[name]}")
    if len(problems) == before:
        checks.append(f"{len(known)} tensors have the shapes that transformers expects")


def _compare(
    source: Checkpoint,
    target: Checkpoint,
    heads: int,
    method: str,
    seed: int,
    is_uptrained: bool,
    code: Path | None,
    checks: list[str],
    problems: list[str],
) -> None:
    plan = plan_conversion(source, heads, source.folder if code else None)
    if json.dumps(plan.config) != json.dumps(target.config):
        problems.append(f"{CONFIG} differs from the source's in more than the number of KV heads")
    else:
        checks.append(f"{CONFIG} differs from the source's only in the number of KV heads")
    companions = {path.name: path for path in source.companions}
    before = len(problems)
    for path in target.companions:
        if path.name in companions and path.read_bytes() != companions.pop(path.name).read_bytes():
            problems.append(f"{path.name} differs from the source's")
    problems += [f"{name} of the source is missing" for name in companions]
    if len(problems) == before:
        checks.append(f"{len(target.companions)} companion files equal the source's")

    before = len(problems)
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in plan.specs}
    found = {entry.name: (entry.dtype, entry.shape) for entry in target.tensors.values()}
    for name in sorted(wanted.keys() ^ found.keys()):
        problems.append(f"{name} is in {'the source' if name in wanted else 'the target'} only")
    common = [name for name in wanted if name in found]
    problems += [
        f"{name} is {found[name]}, expected {wanted[name]}"
        for name in common
        if found[name] != wanted[name]
    ]
    if len(problems) > before:
        return
    if is_uptrained:
        checks.append(
            f"{len(common)} tensors have the source's names and dtypes (values were trained)"
        )
        return
    with progress("compare", plan.nbytes, "bytes") as advance:
        for name in common:
            tensor = plan.head_tensors.get(name)
            right = (
                source.chunks(name)
                if tensor is None
                else tensor_chunks(merge_tensor(plan, tensor, method, seed))
            )
            if not _equal(target.chunks(name), right):
                problems.append(f"{name} is not what {method} makes of the source")
            advance(target.tensors[name].nbytes)
    if len(problems) == before:
        checks.append(
            f"{len(common) - len(plan.head_tensors)} tensors equal the source's byte for byte, "
            f"{len(plan.head_tensors)} equal its merged heads"
        )


def _equal(left: Iterator[memoryview], right: Iterator[memoryview]) -> bool:
    # Both sides come in chunks of the same size, so they can be compared pairwise.
    return all(a == b for a, b in zip_longest(left, right))

"""Check a converted checkpoint against its record, against transformers and against its source."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from uptrain.checkpoint.files import CONFIG, MODEL_CARD, RECORD, file_chunks, read_json
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.checkpoint.tensors import tensor_chunks
from uptrain.conversion.convert import pooled_tensor
from uptrain.conversion.options import METHODS
from uptrain.conversion.plan import Plan, plan_conversion
from uptrain.conversion.pooling import POOLS
from uptrain.conversion.rewritten import RewrittenCheckpoint, as_architecture
from uptrain.errors import CheckpointError, UnsupportedFamilyError
from uptrain.families import meta, registry
from uptrain.progress import progress

_DAMAGED = "is damaged, or was written by another version of uptrain; convert the source again"


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
    checkpoint = open_checkpoint(target)
    folder = checkpoint.folder
    record = read_json(folder / RECORD)
    code = folder if trust_remote_code else None
    try:
        hashes: dict[str, str] = record["files"]
        heads = record["num_key_value_heads"]["target"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / RECORD}: {_DAMAGED}") from error
    if not (
        isinstance(hashes, dict)
        and type(heads) is int
        and heads > 0
        and record.get("method") in (*METHODS, "none")
        and type(record.get("seed")) is int
        and isinstance(record.get("layers"), list)
        and isinstance(record.get("changed"), list)
        and _is_rewrite(record.get("rewrite"))
    ):
        raise CheckpointError(f"{folder / RECORD}: {_DAMAGED}")

    _check_files(folder, hashes, checks, problems)
    _check_shapes(checkpoint, heads, code, checks, problems)
    if source is not None:
        original = open_checkpoint(source)
        own_code = original.folder if code else None
        rewrite = record.get("rewrite")
        family = rewrite.get("source") if rewrite else record.get("model_type")
        # First the family, then how much of it: what differs in these is another model.
        found: tuple[Any, Any] = original.config["model_type"], family
        if family in (None, found[0]):
            architecture = rewrite["target"] if rewrite else "keep"
            original = as_architecture(original, architecture, heads, own_code)
            size = _weight_bytes(record)
            found = f"{original.nbytes:,} bytes", f"{size:,} bytes" if size else None
        if found[1] not in (None, found[0]):
            problems.append(
                f"{original.name} is not the source: it is {found[0]}, the record says {found[1]}"
            )
            return {"target": str(target), "checks": checks, "problems": problems}
        plan = plan_conversion(
            original, heads, own_code, encoder=bool(record.get("encoder", False))
        )
        _compare_files(plan, checkpoint, checks, problems)
        _compare_tensors(plan, checkpoint, record, checks, problems)
    return {"target": str(target), "checks": checks, "problems": problems}


def _weight_bytes(record: dict[str, Any]) -> int | None:
    source = record.get("source")
    size = source.get("weight_bytes") if isinstance(source, dict) else None
    return size if type(size) is int else None


def _is_rewrite(content: Any) -> bool:
    return content is None or (isinstance(content, dict) and isinstance(content.get("target"), str))


def _check_files(
    folder: Path, hashes: dict[str, str], checks: list[str], problems: list[str]
) -> None:
    before = len(problems)
    present = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.name.startswith(".") and (path.is_file() or path.name in hashes)
    }
    files = {name for name in present if (folder / name).is_file()}
    problems += [f"{name} is missing" for name in sorted(hashes.keys() - files)]
    extra = present - hashes.keys() - {RECORD, MODEL_CARD}
    problems += [f"{name} is not in the record" for name in sorted(extra)]
    there = sorted(hashes.keys() & files)
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
    try:
        found = registry.read_heads(checkpoint.config, code).num_key_value_heads
        expected = meta.tensor_shapes(checkpoint.config, code)
        tied = meta.tied_tensors(checkpoint.config, code)
    except (CheckpointError, UnsupportedFamilyError) as error:
        problems.append(str(error))
        return
    if found != heads:
        problems.append(f"{CONFIG} says {found} KV heads, the record {heads}")
    before = len(problems)
    known = [name for name in checkpoint.tensors if name in expected]
    # A tied tensor may be absent, but not one that other layers have of their own.
    there = {tied[name] for name in known if name in tied}
    kinds = {re.sub(r"\d+", "0", name) for name in known}
    for name in expected.keys() - checkpoint.tensors.keys():
        if re.sub(r"\d+", "0", name) in kinds and tied.get(name) not in there:
            problems.append(f"{name} is missing, {CONFIG} asks for it")
    for name in known:
        shape = checkpoint.tensors[name].shape
        if shape != expected[name]:
            problems.append(f"{name} has shape {shape}, transformers expects {expected[name]}")
    if len(problems) == before:
        checks.append(f"{len(known)} tensors have the shapes that transformers expects")


def _compare_files(plan: Plan, target: Checkpoint, checks: list[str], problems: list[str]) -> None:
    whose = f"{_source(plan)}'s"
    if json.dumps(plan.config) != json.dumps(target.config):
        problems.append(f"{CONFIG} differs from the {whose} in more than the number of KV heads")
    else:
        checks.append(f"{CONFIG} differs from the {whose} only in the number of KV heads")
    before = len(problems)
    found = {target.companion_name(path): path for path in target.companions}
    count = 0
    for name, chunks in plan.checkpoint.companion_files():
        count += 1
        if name not in found:
            problems.append(f"{name} of the source is missing")
        elif not _equal(file_chunks(found[name]), chunks):
            problems.append(f"{name} differs from the {whose}")
    if len(problems) == before:
        checks.append(f"{count} companion files equal the {whose}")


def _compare_tensors(
    plan: Plan,
    target: Checkpoint,
    record: dict[str, Any],
    checks: list[str],
    problems: list[str],
) -> None:
    source, before = plan.checkpoint, len(problems)
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
    if "uptraining" in record:
        checks.append(
            f"{len(common)} tensors have the source's names and dtypes (values were trained)"
        )
        return
    pooled = {
        name for name in plan.head_tensors if record["method"] in POOLS and not record["layers"]
    }
    changed = set(record["changed"]) - pooled
    with progress("compare", plan.nbytes, "bytes") as advance:
        for name in common:
            advance(target.tensors[name].nbytes)
            if name in changed:
                continue
            right = source.chunks(name)
            if name in pooled:
                weight = pooled_tensor(plan, name, record["method"], record["seed"])
                right = tensor_chunks(weight)
            if not _equal(target.chunks(name), right):
                problems.append(f"{name} is not what {record['method']} makes of the source")
    if len(problems) == before:
        same = len(common) - len(pooled) - len(changed)
        checks.append(f"{same} tensors equal the {_source(plan)}'s byte for byte")
        if pooled:
            checks.append(f"{len(pooled)} tensors equal the {_source(plan)}'s merged heads")
        if changed:
            checks.append(
                f"{len(changed)} tensors were fitted to text or to each other and have the right shape"
            )


def _source(plan: Plan) -> str:
    is_rewritten = isinstance(plan.checkpoint, RewrittenCheckpoint)
    return "rewritten source" if is_rewritten else "source"


def _equal(left: Iterator[memoryview], right: Iterator[memoryview]) -> bool:
    # Both sides come in chunks of the same size, so they can be compared pairwise.
    return all(a == b for a, b in zip_longest(left, right))

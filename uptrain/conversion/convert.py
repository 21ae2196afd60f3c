"""convert(): from a checkpoint with many KV heads to one with few, in one streaming pass."""

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import uptrain
from uptrain.checkpoint.card import inherited_metadata, model_card
from uptrain.checkpoint.reader import CONFIG, MODEL_CARD, RECORD, open_checkpoint, tensor_chunks
from uptrain.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    TensorSpec,
    check_target,
    copy_companions,
    staged_folder,
    write_bytes,
    write_json,
    write_tensors,
)
from uptrain.conversion.plan import Plan, plan_conversion
from uptrain.conversion.pooling import pool_heads, random_heads
from uptrain.errors import CheckpointError
from uptrain.families import registry
from uptrain.families.layouts import join_heads, split_heads
from uptrain.families.schema import Heads, HeadTensor
from uptrain.progress import progress


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    num_key_value_heads: int,
    *,
    method: str = "mean",
    seed: int = 0,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Merge the key/value heads of a checkpoint and write the result as a checkpoint.

    Tensors that carry no KV head are copied byte for byte, one at a time; of `config.json` only the
    number of KV heads changes. The target appears whole or not at all.

    Args:
        source: Checkpoint folder or hub id.
        target: Folder to create.
        num_key_value_heads: G of the target, a divisor of the source's; 1 makes multi-query attention.
        method: `mean`, `first` or `random`.
        seed: Seed of `random`.
        max_shard_bytes: Largest size of a weight file.
        overwrite: Replace an existing checkpoint at `target`.
        trust_remote_code: Let transformers execute Python code that lies in the source.
        dry_run: Check everything and write nothing.

    Returns:
        What changes: heads, tensors, bytes. The full record is the target's `uptrain.json`.

    Raises:
        CheckpointError: If the source cannot be read, the target cannot be written, or the disk is
            too small.
        HeadCountError: If the source cannot go to that number of KV heads.
        UnsupportedFamilyError: If the family cannot be converted.

    Source: Ainslie et al. 2023, arXiv:2305.13245, section 2.1.
    """
    target = Path(target)
    checkpoint = open_checkpoint(source)
    _check_apart(checkpoint.folder, target)
    check_target(target, overwrite)
    code = checkpoint.folder if trust_remote_code else None
    plan = plan_conversion(checkpoint, num_key_value_heads, code)
    _check_disk(plan, target)
    result = {**plan.summary(), "target": str(target), "method": method, "seed": seed}
    if dry_run:
        return result
    with (
        staged_folder(target, overwrite) as folder,
        progress("convert", plan.nbytes, "bytes") as advance,
    ):

        def data(spec: TensorSpec) -> Iterator[memoryview]:
            tensor = plan.head_tensors.get(spec.name)
            if tensor is None:
                return checkpoint.chunks(spec.name)
            return tensor_chunks(merge_tensor(plan, tensor, method, seed))

        files = write_tensors(folder, plan.specs, data, max_shard_bytes, advance)
        files[CONFIG] = write_json(folder / CONFIG, plan.config)
        files |= copy_companions(checkpoint, folder)
        record = _record(plan, method, seed, files)
        write_json(folder / RECORD, record)
        write_bytes(folder / MODEL_CARD, model_card(record).encode())
    return result


def merge_tensor(plan: Plan, tensor: HeadTensor, method: str, seed: int) -> torch.Tensor:
    """Compute one tensor of the target whose shape follows the number of KV heads.

    Args:
        plan: The conversion.
        tensor: Which tensor of the source to merge.
        method: `mean`, `first` or `random`.
        seed: Seed of `random`.

    Returns:
        The tensor in its target shape and the source's dtype.

    Raises:
        CheckpointError: If it has NaN or infinite values.
    """
    weight = plan.checkpoint.read(tensor.name)
    query, key_value = split_heads(weight, tensor.layout, plan.heads)
    std = float(plan.config.get("initializer_range") or 0.02)
    merged = []
    for part, heads in enumerate(key_value):
        pooled = pool_heads(
            heads, plan.num_key_value_heads, "first" if method == "first" else "mean"
        )
        # Norms over heads keep their mean: there is no sense in a random gain.
        if method == "random" and plan.group_size > 1 and "norm" not in tensor.name.split(".")[-2]:
            is_bias = tensor.name.endswith("bias")
            pooled = random_heads(pooled, f"{tensor.name}:{part}", seed, 0.0 if is_bias else std)
        merged.append(pooled)
    result = join_heads(query, merged, tensor.layout)
    if not torch.isfinite(result).all():
        raise CheckpointError(
            f"{plan.checkpoint.tensors[tensor.name].path}: tensor {tensor.name} has NaN or infinite values; "
            "the checkpoint is damaged, fetch it again"
        )
    assert tuple(result.shape) == tensor.target_shape
    return result


def _record(plan: Plan, method: str, seed: int, files: dict[str, str]) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    return {
        "uptrain_version": uptrain.__version__,
        "source": {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "weight_bytes": checkpoint.nbytes,
            "card": inherited_metadata(checkpoint.folder),
        },
        "model_type": checkpoint.config["model_type"],
        "num_attention_heads": plan.heads.num_attention_heads,
        "num_key_value_heads": {
            "source": plan.heads.num_key_value_heads,
            "target": plan.num_key_value_heads,
        },
        "method": method,
        "grouping": "contiguous",
        "seed": seed,
        "calibration": None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "files": dict(sorted(files.items())),
    }


def _check_apart(source: Path, target: Path) -> None:
    a, b = source.resolve(), target.resolve()
    if a == b:
        raise CheckpointError(f"{target}: is the source itself; choose another target")
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise CheckpointError(
            f"{target}: source and target lie inside one another; choose a target beside the source"
        )


def _check_disk(plan: Plan, target: Path) -> None:
    parent = Path(os.path.abspath(target)).parent
    while not parent.exists():
        parent = parent.parent
    needed = plan.nbytes + sum(path.stat().st_size for path in plan.checkpoint.companions)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{target}: needs {needed / 2**30:.2f} GiB, its disk has {free / 2**30:.2f} GiB free; "
            "free some space or choose a target on another disk"
        )

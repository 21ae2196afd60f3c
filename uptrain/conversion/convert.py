"""convert(): from a checkpoint with many KV heads to one with few, in one streaming pass."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import uptrain
from uptrain.checkpoint.card import inherited_metadata, model_card
from uptrain.checkpoint.files import CONFIG, MODEL_CARD, RECORD
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.staging import (
    check_room,
    check_target,
    side_folders,
    staged_folder,
    write_bytes,
    write_json,
)
from uptrain.checkpoint.tensors import entry_chunks, tensor_chunks
from uptrain.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    TensorSpec,
    copy_companions,
    write_tensors,
)
from uptrain.conversion.calibrate import check_layers, merge_layers, survey
from uptrain.conversion.finished import LayerReport, finished_tensors, resumable
from uptrain.conversion.options import DEFAULT_TOKENS, Options, make_options
from uptrain.conversion.plan import Plan, plan_conversion
from uptrain.conversion.pooling import pool_tensor
from uptrain.conversion.rewritten import as_architecture, describe_rewrite
from uptrain.errors import CheckpointError, OptionError
from uptrain.families.carried import loading_class
from uptrain.families.registry import parse_config
from uptrain.progress import progress


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    num_key_value_heads: int,
    *,
    method: str | None = None,
    grouping: str | None = None,
    architecture: str = "auto",
    encoder: bool = False,
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    refit: bool = True,
    reconstruct_steps: int | None = None,
    activation_bytes: int | None = None,
    device: str | None = None,
    seed: int = 0,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Merge the key/value heads of a checkpoint and write the result as a checkpoint.

    With `mean`, `first` and `random`, tensors that carry no KV head are copied byte for byte, one at a
    time. `align` and `factorize` also change what reads the heads, and a calibration repairs each layer
    by text; both take one layer at a time into memory. Of `config.json` only the number of KV heads
    changes. The target appears whole or not at all; an interrupted calibration goes on behind its last
    finished layer when it is called again. A family without a number of KV heads is first rewritten into
    one that has it and computes the same; then all tensors may differ.

    Args:
        source: Checkpoint folder or hub id.
        target: Folder to create.
        num_key_value_heads: G of the target, a divisor of the source's; 1 makes multi-query attention.
        method: `mean`, `first`, `random`, `align` or `factorize`; by default `factorize` with a
            calibration, else `mean`.
        architecture: `auto` to rewrite a family without a number of KV heads exactly into one that has
            it, `keep` to refuse it, or the `model_type` to rewrite into.
        grouping: `contiguous`, or `search` for groups of heads that lose least (`align` and
            `factorize`); by default `search` with a calibration, else `contiguous`.
        encoder: Convert the encoder of an encoder-decoder, too; else it is left alone, as in the paper.
        calibration: Text or jsonl file; rows with `audio` and `text` for a model that hears.
        calibration_tokens: How much of it to use.
        refit: Solve each output projection anew.
        reconstruct_steps: Steps in which each layer's weights are fitted; 0 for none, by default
            enough for six passes over the tokens.
        activation_bytes: Most bytes of activations on the device.
        device: Where to calibrate; by default a GPU if there is one.
        seed: Of everything that is drawn.
        max_shard_bytes: Largest size of a weight file.
        overwrite: Replace an existing checkpoint at `target`.
        trust_remote_code: Let transformers execute Python code that lies in the source.
        dry_run: Check everything and write nothing; with a calibration, say what each possible number of
            KV heads would discard.

    Returns:
        What changes: heads, tensors, bytes, and a report for each layer that was merged by `align`,
        `factorize` or with a calibration. The full record is the target's `uptrain.json`. Of a dry run
        also `disk_bytes`, the most that it would write; what only the layers can tell is None.

    Raises:
        CheckpointError: If the source cannot be read, the target cannot be written, or the disk is
            too small.
        HeadCountError: If the source cannot go to that number of KV heads.
        UnsupportedFamilyError: If the family cannot be converted in this way.
        DataError: If the calibration text cannot be used.
        OptionError: If a choice is unknown, or excluded by another one or by the source.
        Interrupted: If Ctrl-C came and there are finished layers to go on behind.

    Source: Ainslie et al. 2023, arXiv:2305.13245, section 2.1, and docs/methods.md.
    """
    target = Path(target)
    options = make_options(
        method=method,
        grouping=grouping,
        architecture=architecture,
        encoder=encoder,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        refit=refit,
        reconstruct_steps=reconstruct_steps,
        activation_bytes=activation_bytes,
        device=device,
        seed=seed,
    )
    checkpoint = open_checkpoint(source)
    _check_apart(checkpoint.folder, target)
    check_target(target, overwrite)
    code = checkpoint.folder if trust_remote_code else None
    checkpoint = as_architecture(checkpoint, architecture, num_key_value_heads, code)
    plan = plan_conversion(checkpoint, num_key_value_heads, code, encoder=encoder)
    if encoder and not parse_config(checkpoint.config, code).is_encoder_decoder:
        raise OptionError(f"encoder: {checkpoint.name} is no encoder-decoder; leave it out")
    needed = _needed_bytes(plan, options)
    check_room(target, needed)
    rewrite = describe_rewrite(checkpoint, num_key_value_heads)
    result = {
        **plan.summary(), "rewrite": rewrite, "auto_class": loading_class(plan.config),
        "target": str(target), **options.describe(),
    }  # fmt: skip
    by_layer = options.by_layer and plan.group_size > 1
    if dry_run:
        result["disk_bytes"] = needed
        if by_layer:
            result["tensors"] = result["working_memory_bytes"] = None  # the layers decide
        if options.calibration is not None:
            result["choices"] = survey(plan, options, code)
        elif by_layer:
            check_layers(plan, options, code)
        return result
    partial = side_folders(Path(os.path.abspath(target)))[2]
    with staged_folder(target, overwrite) as folder:
        layers: list[LayerReport] = []
        used = None
        if by_layer:
            try:
                layers, used = merge_layers(plan, options, partial, code)
            finally:
                if not finished_tensors(partial):  # nothing to go on from
                    shutil.rmtree(partial, ignore_errors=True)
        finished = finished_tensors(partial) if layers else {}
        changed = finished.keys() | plan.head_tensors.keys()
        with (
            resumable(partial) if layers else nullcontext(),
            _one_thread(),
            progress("write", plan.nbytes, "bytes") as advance,
        ):

            def data(spec: TensorSpec) -> Iterator[memoryview]:
                if spec.name in finished:
                    return entry_chunks(finished[spec.name])
                if spec.name in plan.head_tensors:
                    return tensor_chunks(pooled_tensor(plan, spec.name, options.method, seed))
                return checkpoint.chunks(spec.name)

            files = write_tensors(folder, plan.specs, data, max_shard_bytes, advance)
        files[CONFIG] = write_json(folder / CONFIG, plan.config)
        files |= copy_companions(checkpoint, folder)
        record = _record(plan, options, layers, used, sorted(changed), files)
        write_json(folder / RECORD, record)
        write_bytes(folder / MODEL_CARD, model_card(record).encode())
    if layers:
        result["tensors"] = {"changed": len(changed), "copied": len(plan.specs) - len(changed)}
        result["layers"] = [asdict(layer) for layer in layers]
        result["calibration_used"] = used
    return result


def pooled_tensor(plan: Plan, name: str, method: str, seed: int) -> torch.Tensor:
    """Pool one tensor of a planned conversion.

    Raises:
        CheckpointError: If it has NaN or infinite values.
    """
    tensor = plan.head_tensors[name]
    weights = []
    for member in tensor.members:
        weight = plan.checkpoint.read(member)
        if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
            raise CheckpointError(
                f"{plan.checkpoint.tensors[member].path}: tensor {member} has NaN or infinite values; "
                "the checkpoint is damaged, fetch it again"
            )
        weights.append(weight)
    std = float(plan.config.get("initializer_range") or plan.config.get("init_std") or 0.02)
    whole = weights[0] if len(weights) == 1 else torch.cat(weights)
    return pool_tensor(whole, tensor, method, seed=seed, std=std)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Pool with one thread: a second one only gets in the way of hashing and writing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _record(
    plan: Plan,
    options: Options,
    layers: list[LayerReport],
    used: dict[str, int] | None,
    changed: list[str],
    files: dict[str, str],
) -> dict[str, Any]:
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
        "auto_class": loading_class(plan.config),
        "num_attention_heads": plan.heads.num_attention_heads,
        "num_key_value_heads": {
            "source": plan.heads.num_key_value_heads,
            "target": plan.num_key_value_heads,
        },
        "rewrite": describe_rewrite(checkpoint, plan.num_key_value_heads),
        **options.describe(),
        "calibration_used": used,
        "layers": [asdict(layer) for layer in layers],
        "changed": changed,
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
    if any(a.is_relative_to(side) for side in side_folders(b)):
        raise CheckpointError(
            f"{target}: the source lies where it would be staged; choose another target"
        )
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise CheckpointError(
            f"{target}: source and target lie inside one another; choose a target beside the source"
        )


def _needed_bytes(plan: Plan, options: Options) -> int:
    """Count what a conversion writes at most before anything of it can be removed."""
    companions = sum(path.stat().st_size for path in plan.checkpoint.companions)
    # Finished layers are kept until all are done: whole, or at least what belongs to their attention.
    is_kept = options.by_layer and plan.group_size > 1
    return plan.nbytes * (2 if is_kept else 1) + companions

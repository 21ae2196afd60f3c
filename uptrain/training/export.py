"""Write a trained model as a plain checkpoint, in the form of the one it was made of."""

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

import uptrain
from uptrain.checkpoint.card import inherited_metadata, model_card
from uptrain.checkpoint.files import CONFIG, MODEL_CARD, RECORD, file_chunks, read_json
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.staging import (
    check_room,
    staged_folder,
    write_bytes,
    write_chunks,
    write_json,
)
from uptrain.checkpoint.tensors import DTYPES, tensor_chunks
from uptrain.checkpoint.writer import TensorSpec, copy_companions, write_tensors
from uptrain.errors import TrainingError, UnsupportedFamilyError
from uptrain.families.registry import read_heads
from uptrain.progress import progress
from uptrain.training import processes
from uptrain.training.shard import gather


def export_checkpoint(
    model: torch.nn.Module, source: Checkpoint, target: Path, uptraining: dict[str, Any]
) -> dict[str, Any]:
    """Write `model` to `target` with the source's tensor names, shapes and dtypes.

    Everything else of the source (config, tokenizer, tensors that the model does not hold) is
    copied byte for byte; the target appears whole or not at all. All processes take part; the main
    one gathers a sharded model in its memory, not on its device, in the source's dtype.

    Args:
        model: The trained model, as transformers loaded it from `source`, sharded or not.
        source: What it was made of.
        target: Folder to create, or to replace if it is a checkpoint.
        uptraining: What to record of the training.

    Returns:
        The content of the target's `uptrain.json`.

    Raises:
        TrainingError: If a trained tensor has no place in the source.
        CheckpointError: If the target cannot be written.
    """
    stored = {DTYPES[entry.dtype] for entry in source.tensors.values()}
    whole = gather(model, stored.pop() if len(stored) == 1 else None)
    return processes.in_main(lambda: _write(model, whole, source, target, uptraining))


def _write(
    model: torch.nn.Module,
    whole: dict[str, torch.Tensor],
    source: Checkpoint,
    target: Path,
    uptraining: dict[str, Any],
) -> dict[str, Any]:
    trained = _source_tensors(model, whole, source)
    specs = [TensorSpec(e.name, e.dtype, e.shape) for e in source.tensors.values()]
    companions = sum(path.stat().st_size for path in source.companions)
    check_room(target, source.nbytes + companions)

    def data(spec: TensorSpec) -> Iterable[memoryview]:
        if spec.name not in trained:
            return source.chunks(spec.name)
        return tensor_chunks(trained[spec.name].to(DTYPES[spec.dtype]))

    with (
        staged_folder(target, overwrite=True) as folder,
        progress("export", source.nbytes, "bytes") as advance,
    ):
        files = write_tensors(folder, specs, data, progress=advance)
        files[CONFIG] = write_chunks(folder / CONFIG, file_chunks(source.folder / CONFIG))
        files |= copy_companions(source, folder)
        record = {
            **_source_record(source),
            "uptraining": {**uptraining, "versions": _versions()},
            "files": dict(sorted(files.items())),
        }
        write_json(folder / RECORD, record)
        write_bytes(folder / MODEL_CARD, model_card(record).encode())
    return record


def _source_tensors(
    model: torch.nn.Module, whole: dict[str, torch.Tensor], source: Checkpoint
) -> dict[str, torch.Tensor]:
    """Give the model's whole tensors by the names they have in the source's files.

    transformers renames and merges tensors while it loads; this undoes it.
    """
    state = revert_weight_conversion(model, whole)
    trained = {name: tensor for name, tensor in state.items() if name in source.tensors}
    for name, tensor in trained.items():
        if tuple(tensor.shape) != source.tensors[name].shape:
            raise TrainingError(
                f"{source.folder}: tensor {name} is {list(source.tensors[name].shape)} there and "
                f"{list(tensor.shape)} after training; this family cannot be exported"
            )
    # A tied tensor is stored once, a buffer perhaps never; but no parameter may be lost.
    stored = {tensor.data_ptr() for tensor in trained.values()}
    buffers = {buffer.data_ptr() for buffer in model.buffers()}
    for name, tensor in state.items():
        if name not in trained and tensor.data_ptr() not in stored | buffers:
            raise TrainingError(
                f"{source.folder}: holds no tensor {name}, which was trained; "
                "this family cannot be exported"
            )
    return trained


def _source_record(source: Checkpoint) -> dict[str, Any]:
    """Give what the source's own record says of its making, or the like if it has none."""
    if (source.folder / RECORD).is_file():
        record = read_json(source.folder / RECORD)
        earlier = {"before": record["uptraining"]} if "uptraining" in record else {}
        return {key: value for key, value in record.items() if key != "files"} | earlier
    try:
        heads = read_heads(source.config)
        counts: Any = (heads.num_attention_heads, heads.num_key_value_heads)
    except UnsupportedFamilyError:  # a family that is trained but cannot be converted
        config = source.config.get("text_config") or source.config
        counts = (config.get("num_attention_heads"), config.get("num_key_value_heads"))
    return {
        "uptrain_version": uptrain.__version__,
        "source": {
            "name": source.name,
            "revision": source.revision,
            "weight_bytes": source.nbytes,
            "card": inherited_metadata(source.folder),
        },
        "model_type": source.config["model_type"],
        "num_attention_heads": counts[0],
        "num_key_value_heads": {"source": counts[1], "target": counts[1]},
        "method": "none",
        "grouping": "contiguous",
        "seed": 0,
        "calibration": None,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "uptrain": uptrain.__version__,
    }

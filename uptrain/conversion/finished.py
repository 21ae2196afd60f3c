"""Finished layers of a conversion by layers, kept beside the target until it is written."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import uptrain
from uptrain.checkpoint.files import read_json
from uptrain.checkpoint.staging import replace_file
from uptrain.checkpoint.tensors import TensorEntry, read_header
from uptrain.conversion.options import Options
from uptrain.conversion.plan import Plan
from uptrain.errors import CheckpointError

_MANIFEST = "manifest.json"


@dataclass
class LayerReport:
    """What happened to one layer."""

    layer: int
    """An encoder-decoder's are numbered from the first that was converted on, its encoder's first."""
    freedom: dict[str, Any] | None = None
    """Of the first attention block."""
    groups: list[list[int]] = field(default_factory=list)
    """Of the first attention block."""
    discarded_energy: dict[str, float] = field(default_factory=dict)
    """Parts of the layer's whole energy, for `value` and `key`; a mean over its attention blocks."""
    error: dict[str, float] = field(default_factory=dict)
    """Relative error of the residual stream behind the layer, by step; of the last block's steps."""
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The first three for each attention block, by its name, where there are several."""

    def add(self, blocks: dict[str, dict[str, Any]]) -> None:
        """Report on the attention blocks: `freedom`, `groups` and `discarded_energy` by name."""
        first, *others = blocks.values()
        self.freedom, self.groups = first["freedom"], first["groups"]
        lost = [block["discarded_energy"] for block in blocks.values()]
        self.discarded_energy = {
            part: sum(each[part] for each in lost) / len(lost) for part in lost[0]
        }
        self.blocks = blocks if others else {}


def finished_tensors(partial: Path) -> dict[str, TensorEntry]:
    """Find the tensors of all finished layers, by name in the files, in the files' dtype."""
    found: dict[str, TensorEntry] = {}
    for path in sorted(partial.glob("layer-*.safetensors")):
        found |= read_header(path)
    return found


def layer_path(partial: Path, layer: int) -> Path:
    """Where a finished layer is written."""
    return partial / f"layer-{layer:05d}.safetensors"


def fingerprint(plan: Plan, options: Options, data: Iterable[Tensor]) -> dict[str, Any]:
    """What a finished layer depends on."""
    checkpoint = plan.checkpoint
    entries = [
        (e.name, e.dtype, e.shape, e.path.name, e.path.stat().st_mtime_ns)
        for e in checkpoint.tensors.values()
    ]
    digests = [hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in data]
    return {
        "source": hashlib.sha256(repr((checkpoint.config, entries)).encode()).hexdigest(),
        "num_key_value_heads": plan.num_key_value_heads,
        "options": {
            key: value
            for key, value in asdict(options).items()
            if key not in ("calibration", "activation_bytes", "device")
        },
        "data": digests,
        "versions": [uptrain.__version__, torch.__version__],
    }


def open_partial(partial: Path, wanted: dict[str, Any]) -> None:
    """Take over the finished layers of the same work; remove those of any other."""
    if _is_usable(partial, wanted):
        return
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    replace_file(partial / _MANIFEST, (json.dumps(wanted) + "\n").encode())


def _is_usable(partial: Path, wanted: dict[str, Any]) -> bool:
    if not (partial / _MANIFEST).is_file():
        return False
    try:
        finished_tensors(partial)
        reports = [LayerReport(**read_json(path)) for path in partial.glob("layer-*.json")]
        is_whole = all(
            layer_path(partial, r.layer).is_file() for r in reports if r.groups or r.error
        )
        return is_whole and read_json(partial / _MANIFEST) == json.loads(json.dumps(wanted))
    except (CheckpointError, TypeError, ValueError) as error:
        if isinstance(error.__cause__, OSError):
            raise  # a disk that fails now and then must not cost hours of work
        return False

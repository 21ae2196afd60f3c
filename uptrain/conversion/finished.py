"""Finished layers of a conversion by layers, kept beside the target until it is written."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import uptrain
from uptrain.checkpoint.files import read_json
from uptrain.checkpoint.staging import replace_file
from uptrain.checkpoint.tensors import TensorEntry, read_header
from uptrain.conversion.options import Options
from uptrain.conversion.plan import Plan
from uptrain.errors import CheckpointError, Interrupted

_MANIFEST = "manifest.json"
_MATHEMATICS = 3
"""Raised when a layer becomes another one from the same input: what was finished before is not taken over."""


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


def save_layer(partial: Path, layer: int, tensors: dict[str, Tensor]) -> None:
    """Write the tensors of a finished layer, by name in the files."""
    replace_file(_path(partial, layer), safetensors.torch.save(tensors))


def load_layer(partial: Path, layer: int) -> dict[str, Tensor]:
    """Read what `save_layer` wrote; empty where no tensor was changed."""
    path = _path(partial, layer)
    return safetensors.torch.load_file(path) if path.is_file() else {}


def save_report(partial: Path, report: LayerReport) -> None:
    """Write a report, by which its layer is finished."""
    content = json.dumps(asdict(report)) + "\n"
    replace_file(_path(partial, report.layer, ".json"), content.encode())


def load_report(partial: Path, layer: int) -> LayerReport | None:
    """Read the report of a finished layer; None if it is not."""
    path = _path(partial, layer, ".json")
    return LayerReport(**read_json(path)) if path.is_file() else None


def _path(partial: Path, layer: int, ending: str = ".safetensors") -> Path:
    return partial / f"layer-{layer:05d}{ending}"


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
        "versions": [_MATHEMATICS, uptrain.__version__, torch.__version__],
    }


def open_partial(partial: Path, wanted: dict[str, Any]) -> None:
    """Take over the finished layers of the same work; remove those of any other."""
    if _is_usable(partial, wanted):
        return
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    replace_file(partial / _MANIFEST, (json.dumps(wanted) + "\n").encode())


@contextmanager
def resumable(partial: Path) -> Iterator[None]:
    """Say of work that is interrupted where its finished layers are, if there are any.

    Raises:
        Interrupted: In the place of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if not any(partial.glob("layer-*.json")):
            raise
        raise Interrupted(
            f"interrupted; the same command goes on behind the layers in {partial}"
        ) from error


def _is_usable(partial: Path, wanted: dict[str, Any]) -> bool:
    if not (partial / _MANIFEST).is_file():
        return False
    try:
        finished_tensors(partial)
        reports = [LayerReport(**read_json(path)) for path in partial.glob("layer-*.json")]
        is_whole = all(_path(partial, r.layer).is_file() for r in reports if r.groups or r.error)
        return is_whole and read_json(partial / _MANIFEST) == json.loads(json.dumps(wanted))
    except (CheckpointError, TypeError, ValueError) as error:
        if isinstance(error.__cause__, OSError):
            raise  # a disk that fails now and then must not cost hours of work
        return False

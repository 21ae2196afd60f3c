"""What a conversion will do: heads, bytes, tensors. Nothing is written or read but headers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.tensors import DTYPE_NAMES, DTYPES
from uptrain.checkpoint.writer import TensorSpec
from uptrain.conversion.rewritten import all_architectures
from uptrain.errors import CheckpointError, HeadCountError, UnsupportedFamilyError
from uptrain.families import registry
from uptrain.families.head_tensors import (
    can_have_heads,
    check_shapes,
    head_tensors,
    kv_cache_bytes_per_token,
    possible_head_counts,
)
from uptrain.families.runtimes import runtimes
from uptrain.families.schema import Heads, HeadTensor


@dataclass(frozen=True)
class Plan:
    """A conversion that was checked and can be carried out."""

    checkpoint: Checkpoint
    heads: Heads
    """Of the source."""
    num_key_value_heads: int
    """Of the target."""
    head_tensors: dict[str, HeadTensor]
    config: dict[str, Any]
    """Of the target."""
    specs: list[TensorSpec]
    kv_cache_bytes_per_token: dict[str, int]
    """Of the `source` and of the `target`."""

    @property
    def group_size(self) -> int:
        """Number of source KV heads merged into one."""
        return self.heads.num_key_value_heads // self.num_key_value_heads

    @property
    def nbytes(self) -> int:
        """Bytes of all target tensors."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def working_bytes(self) -> int:
        """Most bytes of tensors that are in memory at once (the interpreter and libraries apart)."""
        largest = max(
            (self.checkpoint.tensors[name].nbytes for name in self.head_tensors), default=0
        )
        # The tensor, its pooled copy, and one group in the wider dtype.
        return 3 * largest + self.checkpoint.making_bytes

    def summary(self) -> dict[str, Any]:
        """Describe the plan as JSON."""
        K, G = self.heads.num_key_value_heads, self.num_key_value_heads
        return {
            "source": self.checkpoint.name,
            "model_type": self.checkpoint.config["model_type"],
            "num_attention_heads": self.heads.num_attention_heads,
            "num_key_value_heads": {"source": K, "target": G},
            "group_size": self.group_size,
            "tensors": {
                "changed": len(self.head_tensors),
                "copied": len(self.specs) - len(self.head_tensors),
            },
            "weight_bytes": {"source": self.checkpoint.nbytes, "target": self.nbytes},
            "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token,
            "working_memory_bytes": self.working_bytes,
            "left_out": [path.name for path in self.checkpoint.left_out],
        }


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Put the folder before what the registry says, which sees configs and shapes only."""
    try:
        yield
    except (CheckpointError, UnsupportedFamilyError) as error:
        raise type(error)(f"{folder}: {error}") from error


def plan_conversion(
    checkpoint: Checkpoint,
    num_key_value_heads: int,
    code: Path | None = None,
    *,
    encoder: bool = False,
) -> Plan:
    """Check that a checkpoint can be converted and say what would change.

    Args:
        checkpoint: The source.
        num_key_value_heads: G of the target, a divisor of the source's.
        code: The checkpoint's folder if its own Python code may be executed.
        encoder: Whether to convert the encoder of an encoder-decoder, too.

    Raises:
        HeadCountError: If the count does not divide the source's, or the family forbids it.
        UnsupportedFamilyError: If the family, or one of its tensors, has no rule.
        CheckpointError: If config and weights contradict each other.
    """
    config, G = checkpoint.config, num_key_value_heads
    with _naming(checkpoint.folder):
        heads = registry.read_heads(config, code, encoder=encoder)
        shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
        check_shapes(config, shapes, code)
        K = heads.num_key_value_heads
        if not can_have_heads(config, G, code, encoder=encoder):
            possible = possible_head_counts(config, code, encoder=encoder)
            raise HeadCountError(
                f"num_key_value_heads={G}: cannot be had from the {K} KV heads of {checkpoint.name}; "
                f"choose one of {', '.join(map(str, possible))}"
            )
        found = head_tensors(config, G, shapes, code, encoder=encoder)
        tensors = {tensor.name: tensor for tensor in found}
        members = dict.fromkeys(name for tensor in tensors.values() for name in tensor.members)
        for name in members:
            dtype = DTYPES[checkpoint.tensors[name].dtype]
            if not dtype.is_floating_point or dtype.itemsize < 2:
                raise UnsupportedFamilyError(
                    f"tensor {name} is stored as {DTYPE_NAMES[dtype]}, expected 16-bit or wider "
                    "floats; packed or quantised rows are not heads, take the unquantised original"
                )
    specs = [
        TensorSpec(
            name, entry.dtype, tensors[name].target_shape if name in tensors else entry.shape
        )
        for name, entry in checkpoint.tensors.items()
        if name in tensors or name not in members
    ]
    return Plan(
        checkpoint=checkpoint,
        heads=heads,
        num_key_value_heads=G,
        head_tensors=tensors,
        config=registry.with_key_value_heads(config, G, code, encoder=encoder)
        if G != K
        else dict(config),
        specs=specs,
        kv_cache_bytes_per_token={
            "source": kv_cache_bytes_per_token(config, code),
            "target": kv_cache_bytes_per_token(config, code, G),
        },
    )


def inspect(checkpoint: Checkpoint, code: Path | None = None) -> dict[str, Any]:
    """Describe a checkpoint: family, heads, and the numbers of KV heads it can go to.

    Each number comes with the family that the checkpoint has then, and the runtimes that accept it.

    Raises:
        UnsupportedFamilyError: If the family cannot be converted.
        CheckpointError: If its config is not valid.
    """
    targets: dict[int, dict[str, Any]] = {}
    for view in all_architectures(checkpoint, code):
        config = view.config
        shapes = {name: entry.shape for name, entry in view.tensors.items()}
        with _naming(checkpoint.folder):
            heads = registry.read_heads(config, code)
            check_shapes(config, shapes, code)
            possible = possible_head_counts(config, code)
            head_tensors(config, possible[0], shapes, code)
            for G in possible:
                target = {
                    "num_key_value_heads": G,
                    "kv_cache_bytes_per_token": kv_cache_bytes_per_token(config, code, G),
                    "model_type": config["model_type"],
                    "runtimes": runtimes(config, G),
                }
                targets.setdefault(G, target)
            layers = getattr(registry.parse_config(config, code), "num_hidden_layers", None)
    return {
        "model": checkpoint.name,
        "model_type": checkpoint.config["model_type"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads.num_attention_heads,
        "num_key_value_heads": heads.num_key_value_heads,
        "parameters": sum(
            entry.nbytes // DTYPES[entry.dtype].itemsize for entry in checkpoint.tensors.values()
        ),
        "weight_bytes": checkpoint.nbytes,
        "dtype": str(registry.checkpoint_dtype(view.config)).removeprefix("torch."),
        "targets": [targets[G] for G in sorted(targets, reverse=True)],
    }

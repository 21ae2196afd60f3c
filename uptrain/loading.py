"""Load a checkpoint through transformers, quietly, and refuse whatever does not fit its class."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import CheckpointError, UnsupportedFamilyError, UptrainError, one_line
from uptrain.families.registry import parse_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_OTHER_TASKS = ("Classification", "QuestionAnswering", "MultipleChoice")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def pick_device(device: str | torch.device | None) -> torch.device:
    """Name the device to work on: the one asked for, else a GPU, else the CPU.

    Raises:
        UptrainError: If there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise UptrainError(
            f"device {device!s}: not available here; expected one of {here}"
        ) from error
    return found


def load_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> "PretrainedConfig":
    """Read a checkpoint's config as transformers understands it.

    Raises:
        UnsupportedFamilyError: If transformers does not know the architecture, or it is none that
            continues a text.
        CheckpointError: If transformers does not accept a value.
    """
    config = parse_config(checkpoint.config, checkpoint.folder if trust_remote_code else None)
    if config.is_encoder_decoder:
        raise UnsupportedFamilyError(
            f"{checkpoint.folder}: {config.model_type} is an encoder-decoder; expected a model "
            "that continues a text"
        )
    for name in config.architectures or ():
        if any(task in name for task in _OTHER_TASKS):
            raise UnsupportedFamilyError(
                f"{checkpoint.folder}: {name} does not continue a text; expected a causal language model "
                "(`uptrain verify` checks what was converted)"
            )
    # A config may ask for a kernel that is not here, or that would be downloaded; the default of
    # the class is sdpa, or eager where attention logits are soft-capped.
    config._attn_implementation = None
    return config


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    config: "PretrainedConfig | None" = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load a checkpoint as the causal language model that its config names.

    Args:
        checkpoint: An opened checkpoint; its files were checked.
        device: Where to put the model.
        config: What `load_config` gave, if it was called already.
        dtype: Of the parameters; the checkpoint's own if not given.
        trust_remote_code: Run the code that the checkpoint brings along.

    Returns:
        The model in eval mode, every parameter of it from the checkpoint.

    Raises:
        UnsupportedFamilyError: As `load_config`.
        CheckpointError: If a tensor is missing, left over or not of the shape the class expects.
    """
    config = config or load_config(checkpoint, trust_remote_code)
    is_pickled = any(entry.path.suffix == ".bin" for entry in checkpoint.tensors.values())
    model_class = _model_class(checkpoint, config, trust_remote_code)
    extra = {"trust_remote_code": trust_remote_code} if _is_auto(model_class) else {}
    with _quiet():
        try:
            model, info = model_class.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=not is_pickled,
                ignore_mismatched_sizes=True,  # reported in `info`, and refused below by name
                output_loading_info=True,
                **extra,
            )
        except Exception as error:  # transformers documents no closed set of errors
            raise CheckpointError(
                f"{checkpoint.folder}: transformers cannot load it ({one_line(error)})"
            ) from error
    _check_loading(checkpoint, type(model).__name__, info)
    return model.to(device)


def empty_model(checkpoint: Checkpoint, config: "PretrainedConfig") -> "PreTrainedModel":
    """Build the model that `load_model` loads, without weights.

    Args:
        checkpoint: An opened checkpoint.
        config: From `load_config`.

    Returns:
        The model in eval mode; its parameters are on the meta device, its buffers on the CPU.

    Raises:
        CheckpointError: If transformers cannot build it.
    """
    from accelerate import init_empty_weights

    model_class = _model_class(checkpoint, config, trust_remote_code=False)
    config = copy.deepcopy(config)  # model classes write into it
    with _quiet(), init_empty_weights(include_buffers=False):
        try:
            build = model_class.from_config if _is_auto(model_class) else model_class._from_config
            model: PreTrainedModel = build(config)
        except Exception as error:  # transformers documents no closed set of errors
            raise CheckpointError(
                f"{checkpoint.folder}: transformers cannot build its model ({one_line(error)})"
            ) from error
    model.tie_weights()
    return model.eval()


def load_tokenizer(
    checkpoint: Checkpoint, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that lies in a checkpoint's folder.

    Raises:
        CheckpointError: If there is none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(checkpoint):
        raise CheckpointError(
            f"{checkpoint.folder}: has no tokenizer; copy tokenizer.json and tokenizer_config.json "
            "of the original checkpoint into it"
        )
    with _quiet():
        try:
            return AutoTokenizer.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # malformed files raise whatever their parser raises
            raise CheckpointError(
                f"{checkpoint.folder}: its tokenizer cannot be loaded ({one_line(error)}); "
                "take the tokenizer files of the original checkpoint"
            ) from error


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Say whether a checkpoint's folder holds a tokenizer."""
    return any((checkpoint.folder / name).is_file() for name in _TOKENIZER_FILES)


def context_length(config: "PretrainedConfig") -> int | None:
    """Give the number of positions that a model was made for, in tokens, if its config says so."""
    text = config.get_text_config()
    for key in _CONTEXT_KEYS:
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def vocabulary_size(config: "PretrainedConfig") -> int | None:
    """Give the size of a model's vocabulary, if its config says so."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def decoder_layers(model: Any) -> list[nn.Module]:
    """Give the layers of a model, as its class names them: the units of compilation and sharding."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _model_class(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> Any:
    import transformers

    own_code = trust_remote_code and "auto_map" in checkpoint.config
    for name in () if own_code else config.architectures or ():
        named: Any = getattr(transformers, name, None)
        is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        if is_model and named.can_generate() and isinstance(config, named.config_class):
            return named
    return transformers.AutoModelForCausalLM


def _is_auto(model_class: Any) -> bool:
    return bool(model_class.__name__.startswith("Auto"))


def _check_loading(checkpoint: Checkpoint, class_name: str, info: dict[str, Any]) -> None:
    where = f"{checkpoint.folder}: "
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{where}tensor {key} is {list(found)}, {class_name} expects {list(expected)} by its "
            "config.json; weights and config belong to different checkpoints"
        )
    for verb, keys in (
        ("lacks tensor", info["missing_keys"]),
        ("holds tensor", info["unexpected_keys"]),
    ):
        if keys:
            first, *others = sorted(keys)
            more = f" and {len(others)} more" if others else ""
            expected = "expects" if verb == "lacks tensor" else "does not know"
            raise CheckpointError(
                f"{where}{verb} {first}{more}, which {class_name} {expected}; "
                "weights and config.json belong to different checkpoints"
            )
    if info["error_msgs"]:
        raise CheckpointError(f"{where}cannot be loaded ({one_line(info['error_msgs'][0])})")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and notes off the terminal: what matters is checked and raised."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def check_same_vocabulary(
    checkpoint: Checkpoint,
    config: "PretrainedConfig",
    other: Checkpoint,
    other_config: "PretrainedConfig",
    trust_remote_code: bool = False,
    role: str = "reference",
) -> None:
    """Refuse two checkpoints whose predictions cannot be compared token by token.

    Args:
        checkpoint: One of them.
        config: Its own.
        other: The other one.
        other_config: Its own.
        trust_remote_code: Run the code that their tokenizers bring along.
        role: What the other one is, for the message.

    Raises:
        CheckpointError: If their vocabularies differ.
    """
    sizes = vocabulary_size(config), vocabulary_size(other_config)
    same = sizes[0] == sizes[1]
    found = f"a vocabulary of {sizes[1]} tokens, {checkpoint.name} one of {sizes[0]}"
    if same and has_tokenizer(other) and not _same_file(checkpoint, other, "tokenizer.json"):
        vocabularies = [
            load_tokenizer(each, trust_remote_code).get_vocab() for each in (checkpoint, other)
        ]
        same = vocabularies[0] == vocabularies[1]
        found = f"other tokens than {checkpoint.name}"
    if not same:
        raise CheckpointError(
            f"{other.folder}: the {role} has {found}; only models with one tokenizer can be "
            "compared token by token"
        )


def _same_file(checkpoint: Checkpoint, other: Checkpoint, name: str) -> bool:
    paths = checkpoint.folder / name, other.folder / name
    return all(path.is_file() for path in paths) and paths[0].read_bytes() == paths[1].read_bytes()

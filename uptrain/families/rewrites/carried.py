"""Families without a number of KV heads into the same with one, by a modeling file of the project's own."""

from collections.abc import Mapping
from typing import Any

from uptrain.errors import UnsupportedFamilyError
from uptrain.families import carried
from uptrain.families.registry import parse_config
from uptrain.families.rewrites.recipe import Rewrite

_LOST = "transformers needs trust_remote_code=True to load it, or `import uptrain` before"


def to_gqa(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite into the family of the modeling file: all tensors stay as they are.

    Raises:
        UnsupportedFamilyError: If the model attends in a way that the file does not have.
    """
    parsed = parse_config(config)
    if getattr(parsed, "add_cross_attention", False):
        raise UnsupportedFamilyError("it attends to the output of another model")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UnsupportedFamilyError(
            f"it has positions of the kind {config['position_embedding_type']}, expected absolute"
        )
    names = carried.auto_classes(config["model_type"])
    heads = {"num_key_value_heads": parsed.num_attention_heads}
    if parsed.is_encoder_decoder:
        decoder = getattr(parsed, "decoder_attention_heads", parsed.num_attention_heads)
        if decoder != parsed.num_attention_heads:
            raise UnsupportedFamilyError(
                f"its encoder has {parsed.num_attention_heads} heads, its decoder {decoder}"
            )
        heads["encoder_num_key_value_heads"] = decoder
    changed = {
        **config,
        "model_type": carried.find_class(names["AutoConfig"]).model_type,
        "architectures": [_architecture(config, names)],
        "auto_map": {auto: f"{carried.MODELING}.{name}" for auto, name in names.items()},
        **heads,
    }
    path = carried.modeling_file()
    return Rewrite(changed, None, lost=(_LOST,), files={path.name: path.read_bytes()})


def _architecture(config: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Name the class of the modeling file that a checkpoint is of."""
    stated = config.get("architectures")
    stock = str(stated[0]) if isinstance(stated, list) and stated else ""
    if stock and (name := f"{carried.PREFIX}{stock}") in names.values():
        return name
    if stock and carried.find_class(f"{carried.PREFIX}{stock}") is not None:
        return f"{carried.PREFIX}{stock}"
    return next(name for auto, name in names.items() if auto != "AutoConfig")

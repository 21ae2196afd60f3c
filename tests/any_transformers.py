"""Makes and runs tiny checkpoints in the transformers of whatever Python runs this file; no uptrain needed.

`python tests/any_transformers.py` answers requests, a JSON object a line, until its input ends.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import save, tiny_config, tiny_model


def version() -> Any:
    """Of transformers."""
    return transformers.__version__


def make(folder: str, model_type: str, overrides: dict[str, Any]) -> Any:
    """Save a random model as this version writes it, and say whether it knows the family."""
    if model_type not in transformers.CONFIG_MAPPING:
        return False
    save(tiny_model(tiny_config(model_type, **overrides)), Path(folder))
    return True


def run(
    folder: str,
    inputs: str,
    outputs: str,
    attention: str | None = None,
    dtype: str = "float64",
    generations: list[dict[str, Any]] | None = None,
) -> Any:
    """Save the logits, and what is generated; return the keys that did not load as they should."""
    config = json.loads((Path(folder) / "config.json").read_text())
    name, autos = config["architectures"][0], config.get("auto_map", {})
    auto = next((auto for auto, path in autos.items() if path.endswith(f".{name}")), name)
    model, info = getattr(transformers, auto).from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        trust_remote_code=bool(autos),
        output_loading_info=True,
        **({} if version().startswith("4.") else {"experts_implementation": "eager"}),
    )
    given = torch.load(inputs)
    with torch.no_grad():
        output = model.eval()(**given)
    found = [output.logits if "logits" in output else output[0]]
    given.pop("decoder_input_ids", None)
    found += [model.generate(**given, **options) for options in generations or ()]
    torch.save(found, outputs)
    return {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}


def tokenize(folder: str, text: str) -> Any:
    """Encode a text with a checkpoint's tokenizer, and say what it is set to."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = tokenizer.model_max_length, tokenizer.padding_side, tokenizer.all_special_tokens
    return tokenizer(text).input_ids, settings


CALLS = {call.__name__: call for call in (version, make, run, tokenize)}


def main() -> None:
    """Answer each line with one, kept apart from what the libraries print."""
    answers, sys.stdout = sys.stdout, sys.stderr
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        call, arguments = json.loads(line)
        try:
            answer = {"answer": CALLS[call](**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""What cannot be converted is refused by name, in one line: what was found, what it means, the way out."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from family_list import FAMILIES, POOLED_ONLY
from tiny import save, tiny_config, tiny_model

from uptrain.cli import main

MEAN = ["--method", "mean"]
ALIGN = ["--method", "align"]
NOTHING_FOLLOWS = (
    "no tensor follows its number of KV heads (latent attention, or no attention layer"
)

# Model type, what its config needs, how it is converted, what is said. Without weights the config decides.
CASES: dict[str, tuple[str, dict[str, Any] | None, str, str]] = {
    "latent attention": ("minicpm3", {}, "mean", "no tensor follows its number of KV heads (latent att"),
    "experts": ("jetmoe", None, "mean", "its attention is a mixture of experts whose query heads are"),
    "queries by KV heads": ("moonshine", None, "mean", "reshapes its queries by the number of KV heads"),
    "convolved keys": ("zaya", None, "mean", "it convolves queries and keys together"),
    "norms behind": ("openai-gpt", None, "mean", "its norms stand behind the residuals and its positions"),
    "no KV heads": ("bloom", None, "mean", "transformers has no number of KV heads for this family"),
    "adapters": (
        "zamba2", {**FAMILIES["zamba2"], "use_shared_attention_adapter": True}, "mean",
        "its shared attention has adapters for each place",
    ),
    **{
        name: (name, FAMILIES[name], "align", POOLED_ONLY[name].replace("\\", ""))
        for name in ("blt", "csm", "diffusion_gemma", "gemma3n_text", "kyutai_speech_to_text", "voxtral_realtime")
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of the model classes themselves
@pytest.mark.parametrize("case", CASES)
def test_a_family_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    model_type, overrides, method, message = CASES[case]
    source, target = tmp_path / model_type, tmp_path / "target"
    if overrides is None:
        source.mkdir()
        (source / "config.json").write_text(json.dumps({"model_type": model_type}))
        safetensors.torch.save_file({"x": torch.ones(1)}, source / "model.safetensors")
    else:
        save(tiny_model(tiny_config(model_type, **overrides)), source)
    heads = ["--num-key-value-heads", "2", "--method", method]
    shown = CliRunner().invoke(main, ["convert", str(source), str(target), *heads])
    assert shown.exit_code == 1
    assert shown.stderr.count("\n") == 1
    assert model_type in shown.stderr.partition(message)[0]
    assert "; " in shown.stderr.partition(message)[2]  # the way out
    assert not target.exists()

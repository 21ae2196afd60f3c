"""What runtimes accept: the rules by hand, and transformers itself on several processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save, tiny_config, tiny_model

from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.plan import inspect
from uptrain.evaluation.serving import describe_serving, split_over


def describe(folder: Path) -> dict:
    checkpoint = open_checkpoint(folder)
    return describe_serving(inspect(checkpoint), checkpoint)


def test_a_multi_head_llama(tmp_path: Path) -> None:
    found = describe(save(tiny_model(tiny_config("llama")), tmp_path / "llama"))
    assert (found["architecture"], found["head_dim"], found["context"]) == (
        "LlamaForCausalLM",
        16,
        64,
    )
    for target in found["targets"]:
        G = target["num_key_value_heads"]
        one = 2 * 2 * G * 16 * 8 * 64  # keys and values, layers, heads, head size, float64, context
        assert target["kv_cache_bytes"] == {"1": one, "16": 16 * one}
        runtimes = {each["runtime"]: each for each in target["runtimes"]}
        assert set(runtimes) == {"transformers", "vLLM", "llama.cpp", "CTranslate2", "TGI"}
        even = [n for n in (1, 2, 4) if G % n == 0]
        assert runtimes["transformers"]["tensor_parallel"] == even
        assert runtimes["vLLM"]["tensor_parallel"] == [1, 2, 4]
        assert runtimes["vLLM"]["copied"] == [n for n in (1, 2, 4) if n > G]
        assert runtimes["llama.cpp"]["tensor_parallel"] is None


@pytest.mark.parametrize(
    ("runtime", "heads", "even", "copied"),
    [
        ("vLLM", (32, 8), [1, 2, 4, 8], [16]),
        ("vLLM", (32, 1), [1], [2, 4, 8, 16]),
        ("vLLM", (12, 3), [1], []),  # 2 and 4 GPUs neither divide 3 KV heads nor are multiples
        ("vLLM", (12, 6), [1, 2], []),
        ("vLLM", (28, 4), [1, 2, 4], []),  # 8 does not divide the query heads
        ("TGI", (32, 8), [1, 2, 4, 8], []),
        ("TGI", (32, 1), [1], []),
        ("CTranslate2", (32, 4), [1, 2, 4], []),
        ("transformers", (32, 4), [1, 2, 4], []),
    ],
)
def test_over_how_many_gpus_heads_are_split(
    runtime: str, heads: tuple[int, int], even: list[int], copied: list[int]
) -> None:
    found = split_over(runtime, "llama", *heads)
    assert found == {"tensor_parallel": even + copied, "copied": copied}


def test_a_family_that_transformers_cannot_split() -> None:
    assert split_over("transformers", "stablelm", 32, 32)["tensor_parallel"] == [1]


SPLIT = """
import sys, torch, torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
dist.init_process_group("gloo")
tokens = torch.arange(10)[None]
with torch.no_grad():
    whole = LlamaForCausalLM.from_pretrained(sys.argv[1])(tokens).logits
    split = LlamaForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")(tokens).logits
split = split.full_tensor() if hasattr(split, "full_tensor") else split
assert torch.allclose(whole, split, atol=1e-5)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_transformers_splits_over_two_processes_what_is_said(heads: int, tmp_path: Path) -> None:
    config = tiny_config("llama", num_key_value_heads=heads)
    model = tiny_model(config).float()
    model.config.dtype = "float32"
    save(model, tmp_path / "model")
    (tmp_path / "split.py").write_text(SPLIT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "split.py"), str(tmp_path / "model")],
        capture_output=True,
        check=False,
        timeout=300,
    )
    said = split_over("transformers", "llama", 4, heads)["tensor_parallel"]
    assert (done.returncode == 0) == (2 in (said or []))

"""Runtimes that serve: the logits and continuations that they make of a converted checkpoint.

What they need is in no extra of the package; a test skips where it is not installed and says how to. With
BOOKS_14M=FOLDER the model of the recipes is converted and run, too. Other families are tiny and random.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny import save, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import uptrain
from uptrain.families.runtimes import RAN

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

CT2_CONVERTER = Path(sysconfig.get_path("scripts")) / "ct2-transformers-converter"
needs_ctranslate2 = pytest.mark.skipif(
    not CT2_CONVERTER.is_file(), reason="CTranslate2 is not installed: pip install ctranslate2"
)
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
needs_llama_cpp = pytest.mark.skipif(
    not (LLAMA_CPP and all(map(importlib.util.find_spec, ("llama_cpp", "gguf", "sentencepiece")))),
    reason="llama.cpp is not there: pip install llama-cpp-python gguf sentencepiece; its converter is in the "
    "source of the former: pip download --no-deps --no-binary llama-cpp-python llama-cpp-python; unpack that, "
    "and set LLAMA_CPP to its folder vendor/llama.cpp",
)

TEXT = (
    "It was a dark evening when the old doctor came home. He had thought of nothing in particular, and the "
    "wind was in the trees; “who is there?” he asked, for there were 3 letters on the table — none for him.\n\n"
)
NEW_TOKENS = 24
# Both sides compute in float32 with sums in another order, on logits of about 10: 2e-5 apart. llama.cpp looks GELU up
# in a table of float16: 2e-3. Unlike heads move logits by ones.
TOLERANCE, GELU_TOLERANCE = 1e-3, 5e-3
GELU = ("falcon", "gpt_bigcode", "starcoder2")

EXAMPLES = Path(__file__).parent.parent / "examples"
VOCABULARY = 2048  # of the tokenizer there
FALCON = {"num_kv_heads": 4, "new_decoder_architecture": True, "multi_query": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "falcon": {**FALCON, "ffn_hidden_size": 256, "alibi": False, "bias": False},
    "gpt_bigcode": {"n_inner": 256, "multi_query": False},
    "mistral": {},
    "olmo2": {},
    "qwen2": {},
    "qwen3": {},
    "stablelm": {},
    "starcoder2": {},
}


class Served(NamedTuple):
    """A converted checkpoint, and what transformers makes of a text with it."""

    folder: Path
    num_key_value_heads: int
    tokens: list[int]
    logits: np.ndarray
    """[tokens, vocabulary]"""
    original_logits: np.ndarray
    """Of the checkpoint that was converted."""
    continuation: list[int]


def serve(source: Path, folder: Path, heads: int, method: str, most_tokens: int) -> Served:
    uptrain.convert(source, folder, heads, method=method, architecture="keep")
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids[:most_tokens]
    logits, continuation = compute(folder, tokens)
    return Served(folder, heads, tokens, logits, compute(source, tokens)[0], continuation)


def compute(folder: Path, tokens: list[int]) -> tuple[np.ndarray, list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(given).logits[0].numpy()
    made = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return logits, made[0, len(tokens) :].tolist()


@pytest.fixture(
    scope="module",
    params=[("books-1m", 2), ("books-1m", 1), ("books-14m", 4), ("books-14m", 1)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    name, heads = request.param
    source = EXAMPLES / name
    if name == "books-14m":
        if "BOOKS_14M" not in os.environ:
            pytest.skip("BOOKS_14M does not name the folder of books-14m")
        source = Path(os.environ["BOOKS_14M"])
    # Factorized heads: better than the mean's, and what is written to q and o counts as well.
    return serve(source, tmp_path_factory.mktemp("converted") / name, heads, "factorize", 200)


def serve_tiny(family: str, folder: Path) -> Served:
    """A random model; the text stays within its sliding window."""
    model = tiny_model(tiny_config(family, vocab_size=VOCABULARY, **FAMILIES[family])).float()
    model.config.dtype = "float32"
    source = save(model, folder / "source")
    for path in (EXAMPLES / "books-1m").glob("tokenizer*"):
        shutil.copy(path, source)
    heads = 1 if family == "gpt_bigcode" else 2
    return serve(source, folder / family, heads, "mean", 30)


def check(logits: np.ndarray, served: Served, tolerance: float = TOLERANCE) -> None:
    difference = np.abs(logits - served.logits).max()
    print(f"largest difference of a logit: {difference:.1e}, of {np.abs(served.logits).max():.1f}")
    assert difference < tolerance
    assert np.abs(logits - served.original_logits).max() > 20 * tolerance


def load_in_ctranslate2(served: Served, folder: Path) -> Any:
    import ctranslate2

    command = [CT2_CONVERTER, "--model", served.folder, "--output_dir", folder / "model"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
    return ctranslate2.Generator(str(folder / "model"), compute_type="float32")


@needs_ctranslate2
def test_ctranslate2(served: Served, tmp_path: Path) -> None:
    generator = load_in_ctranslate2(served, tmp_path)
    check(np.array(generator.forward_batch([served.tokens]))[0], served)
    names = AutoTokenizer.from_pretrained(served.folder).convert_ids_to_tokens(served.tokens)
    (made,) = generator.generate_batch(
        [names], max_length=NEW_TOKENS, include_prompt_in_result=False
    )
    assert made.sequences_ids[0] == served.continuation


@needs_ctranslate2
@pytest.mark.parametrize("family", sorted({*RAN["CTranslate2"]} - {"llama"}))
def test_families_in_ctranslate2(family: str, tmp_path: Path) -> None:
    served = serve_tiny(family, tmp_path)
    generator = load_in_ctranslate2(served, tmp_path)
    check(np.array(generator.forward_batch([served.tokens]))[0], served)


# The converter knows pre-tokenizers by the tokens that they make of a text; a vocabulary of one's own it has
# never seen, though this one is cut as GPT-2's is. Otherwise this is `python convert_hf_to_gguf.py …`.
CONVERT = """
import runpy, sys
sys.path[0] = sys.argv[1]
del sys.argv[0]
sys.argv[0] += "/convert_hf_to_gguf.py"
sys.path.insert(1, sys.path[0] + "/gguf-py")
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def load_in_llama_cpp(served: Served, folder: Path) -> Any:
    import llama_cpp

    file = folder / "model.gguf"
    options = [str(served.folder), "--outfile", str(file), "--outtype", "f32"]
    command = [sys.executable, "-c", CONVERT, LLAMA_CPP, *options]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    model = llama_cpp.Llama(
        str(file),
        n_ctx=256,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,  # a cache of float16 unless asked
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=1,
        verbose=False,
    )
    assert llama_cpp.llama_model_n_head_kv(model.model) == served.num_key_value_heads
    return model


@needs_llama_cpp
def test_llama_cpp(served: Served, tmp_path: Path) -> None:
    model = load_in_llama_cpp(served, tmp_path)
    assert model.tokenize(TEXT.encode(), add_bos=False, special=True) == served.tokens
    model.eval(served.tokens)
    check(np.array(model.scores[: len(served.tokens)]), served)
    made = model.generate(served.tokens, top_k=1, temp=0.0, repeat_penalty=1.0)
    assert [next(made) for _ in range(NEW_TOKENS)] == served.continuation
    model.close()


@needs_llama_cpp
@pytest.mark.parametrize("family", sorted({*RAN["llama.cpp"]} - {"llama"}))
def test_families_in_llama_cpp(family: str, tmp_path: Path) -> None:
    served = serve_tiny(family, tmp_path)
    model = load_in_llama_cpp(served, tmp_path)
    model.eval(served.tokens)
    tolerance = GELU_TOLERANCE if family in GELU else TOLERANCE
    check(np.array(model.scores[: len(served.tokens)]), served, tolerance)
    model.close()

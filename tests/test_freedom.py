"""What each family's attention allows, as the modeling code of transformers says it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from family_list import COUNTS, POOLED_ONLY
from family_list import TEXT as FAMILIES
from test_families import logits, make_heads_equal
from tiny import save, tiny_config, tiny_model

import uptrain
from uptrain.conversion.attention import AttentionHeads
from uptrain.conversion.freedom import Basis, find_freedom
from uptrain.errors import UnsupportedFamilyError

# V, K, rotary_dim, interleaved, reorder; None: a layer without attention. One row for all layers that
# have attention, in which any difference between layers is a finding.
Row = tuple[str, str, int, bool, bool]
PLAIN: Row = ("full", "scaled", 16, False, True)
INTERLEAVED: Row = ("full", "scaled", 16, True, True)
NORMED: Row = ("full", "signed", 16, False, True)
WHOLE_NORM: Row = ("full", "signed", 16, False, False)  # gains of each head, moved by no reordering
SINKS: Row = ("full", "scaled", 16, False, False)
UNROTATED: Row = ("full", "full", 0, False, True)
ROWS: dict[str, Row] = {
    **dict.fromkeys(
        [
            "arcee",
            "aria_text",
            "cwm",
            "falcon",
            "falcon_h1",
            "gemma",
            "gemma2",
            "granite",
            "granitemoe",
            "granitemoeshared",
            "hyperclovax",
            "internlm3",
            "iquestcoder",
            "jais2",
            "llama",
            "minimax",
            "ministral",
            "ministral3",
            "mistral",
            "moshi",
            "mixtral",
            "olmo",
            "phi3",
            "phimoe",
            "qwen2",
            "qwen2_moe",
            "seed_oss",
            "smollm3",
            "solar_open",
            "starcoder2",
            "vaultgemma",
            "dbrx",
        ],
        PLAIN,
    ),
    **dict.fromkeys(
        ["cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "helium"], INTERLEAVED
    ),
    **dict.fromkeys(
        [
            "apertus",
            "dots1",
            "exaone4",
            "exaone_moe",
            "gemma3_text",
            "hunyuan_v1_dense",
            "hunyuan_v1_moe",
            "hy_v3",
            "kolibri1",
            "lfm2",
            "lfm2_moe",
            "mellum",
            "minimax_m3_vl_text",
            "qwen3",
            "qwen3_moe",
        ],
        NORMED,
    ),
    **dict.fromkeys(
        ["flex_olmo", "minimax_m2", "olmo2", "olmo3", "olmo_hybrid", "olmoe"], WHOLE_NORM
    ),
    **dict.fromkeys(["gpt_oss", "granite_swa", "granitemoe_swa"], SINKS),
    **dict.fromkeys(["granitemoehybrid", "jamba", "nemotron_h"], UNROTATED),
    "gpt_bigcode": ("full", "full", 0, False, False),  # goes to one head: all heads are equal here
    # Half or a quarter of each head is rotated.
    **dict.fromkeys(
        ["bamba", "glm4_moe", "nemotron", "phi", "recurrent_gemma"],
        ("full", "scaled", 8, False, True),
    ),
    **dict.fromkeys(["glm", "glm4"], ("full", "scaled", 8, True, True)),
    "stablelm": ("full", "scaled", 4, False, True),
    # Norms without gains.
    "nanochat": ("full", "turned", 16, False, True),
    "llama4_text": ("full", "turned", 16, True, True),
    # A norm by head, and a sink (flint) or gate (lfm3, laguna) for each query head.
    **dict.fromkeys(["flint", "lfm3"], ("full", "signed", 16, False, False)),
    "laguna": ("full", "signed", 8, False, False),
    # Gates by channel on the attention's output; those of qwen lie beside their queries.
    **dict.fromkeys(["afmoe", "beam"], ("fixed", "signed", 16, False, False)),
    **dict.fromkeys(
        ["qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"], ("fixed", "signed", 4, False, True)
    ),
    # Norms on queries, keys and, without gains, on values.
    **dict.fromkeys(["gemma4_text", "gemma4_unified_text"], ("turned", "signed", 16, False, True)),
    # Convolutions by channel behind keys and values.
    "inkling_text": ("fixed", "signed", 16, False, False),
    # A norm in front of the output projection, values shared by pairs of heads.
    **dict.fromkeys(["bitnet", "diffllama"], ("fixed", "scaled", 16, False, False)),
}


def found_in(report: dict[str, Any]) -> set[Row]:
    freedoms = [layer["freedom"] for layer in report["layers"] if layer["freedom"]]
    for freedom in freedoms:
        # No family here has sinks, and channels that are not rotated and under no norm.
        unrotated = freedom["rotary_dim"] < 16 and freedom["key"] in ("full", "scaled")
        assert freedom["shift"] == unrotated
    return {
        (found["value"], found["key"], found["rotary_dim"], found["interleaved"], found["reorder"])
        for found in freedoms
    }


@pytest.mark.filterwarnings("ignore")  # of the model classes themselves
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_allows_what_its_code_says(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(model_type, **FAMILIES[model_type]))
    source, target = save(model, tmp_path / "source"), tmp_path / "target"
    count = COUNTS.get(model_type, [2])[0]
    if model_type in POOLED_ONLY:
        with pytest.raises(
            UnsupportedFamilyError, match=f"{POOLED_ONLY[model_type]}.*use --method mean"
        ):
            uptrain.convert(source, target, count, method="factorize")
        return
    assert model_type in ROWS, f"{model_type} has no row: read its attention and add one"
    make_heads_equal(source, json.loads((source / "config.json").read_text()), count)
    report = uptrain.convert(source, target, count, method="factorize")
    assert found_in(report) == {ROWS[model_type]}
    # And equal heads merge without a trace, whatever it is that they allow.
    reference = logits(source)
    assert (logits(target) - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "overrides", "row"),
    [
        ("qwen3", {}, ("full", "turned", 16, False, True)),  # gains of one: see the test
        ("olmo", {"clip_qkv": 0.3}, ("fixed", "signed", 16, False, True)),
        ("smollm3", {"no_rope_layers": [0, 0]}, UNROTATED),
        ("llama4_text", {"no_rope_layers": [0, 0]}, UNROTATED),
        ("phi", {"qk_layernorm": True}, ("full", "fixed", 0, False, True)),
        ("glm4_moe", {"use_qk_norm": True}, ("full", "signed", 8, False, True)),
        ("cohere", {"use_qk_norm": True}, ("full", "fixed", 0, False, False)),  # norms with a mean
        ("llama", {"attention_bias": True}, PLAIN),
        ("llama", {"num_key_value_heads": 2}, PLAIN),
    ],
)
def test_settings_change_what_is_allowed(
    model_type: str, overrides: dict[str, Any], row: Row, tmp_path: Path
) -> None:
    model = tiny_model(tiny_config(model_type, **overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model_type == "qwen3" and ("q_norm" in name or "k_norm" in name):
                parameter.fill_(1.25)
    save(model, tmp_path / "source")
    report = uptrain.convert(tmp_path / "source", tmp_path / "target", 1, method="factorize")
    assert found_in(report) == {row}


@pytest.mark.filterwarnings("ignore")
def test_layers_with_another_number_of_query_heads_are_refused(tmp_path: Path) -> None:
    save(
        tiny_model(tiny_config("laguna", num_attention_heads_per_layer=[4, 8])), tmp_path / "source"
    )
    with pytest.raises(UnsupportedFamilyError, match="another number of query heads"):
        uptrain.convert(tmp_path / "source", tmp_path / "target", 2, method="factorize")


# The probe itself, on attention written out.


HEADS, QUERIES, SIZE, WIDTH, LENGTH = 4, 2, 8, 24, 12


def draw(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) / WIDTH**0.5


def some_heads(heads: int = HEADS) -> AttentionHeads:
    return AttentionHeads(
        query=draw(heads, QUERIES, SIZE, WIDTH, seed=0) * 3,
        key=draw(heads, SIZE, WIDTH, seed=1) * 3,
        value=draw(heads, SIZE, WIDTH, seed=2),
        output=draw(heads, QUERIES, WIDTH, SIZE, seed=3),
        gate=None,
    )


def attend(
    parts: AttentionHeads,
    added: torch.Tensor | None = None,
    rotated: int = 0,
    bias: float = 0.0,
    sink: bool = False,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention in its own words; pairs m, m + rotated / 2 turn by 0.3 · (m + 1) a position."""
    inputs = draw(LENGTH, WIDTH, seed=4) * WIDTH**0.5
    query, key = parts.query @ inputs.T, parts.key @ inputs.T
    if added is not None:
        key = key + added.repeat(1, 1, LENGTH // 2)

    def turn(rows: torch.Tensor) -> torch.Tensor:
        half = rotated // 2
        angle = 0.3 * torch.outer(torch.arange(half) + 1.0, torch.arange(float(LENGTH)))
        a, b, rest = rows[..., :half, :], rows[..., half:rotated, :], rows[..., rotated:, :]
        first = a * angle.cos() - b * angle.sin()
        return torch.cat([first, a * angle.sin() + b * angle.cos(), rest], dim=-2)

    query, key = turn(query), turn(key)
    scores = torch.einsum("kqdt,kds->kqts", query, key)
    slope = torch.arange(scores.shape[0] * QUERIES, dtype=torch.float64).view(-1, QUERIES, 1, 1)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = (scores - bias * slope * distance).masked_fill(distance < 0, -torch.inf)
    if sink:
        scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
    chosen = scores.softmax(-1)[..., :LENGTH]
    seen = torch.einsum("kqts,kds->kqdt", chosen, parts.value @ inputs.T)
    return torch.einsum("kqhd,kqdt->th", parts.output, seen)


@pytest.mark.parametrize("rotated", [0, 4, 8])
def test_the_probe_on_attention_written_out(rotated: int) -> None:
    freedom = find_freedom(some_heads(), partial(attend, rotated=rotated), [8, 4])
    assert freedom.value is Basis.FULL
    assert freedom.key is (Basis.SCALED if rotated else Basis.FULL)
    assert freedom.rotary_dim == rotated
    assert not freedom.interleaved
    assert freedom.reorder
    assert freedom.shift == (rotated < SIZE)


@pytest.mark.parametrize("rotated", [0, 4])
@pytest.mark.parametrize("feature", [{"sink": True}, {"softcap": 2.0}])
def test_a_sink_or_a_softcap_notices_a_shift_of_all_keys(
    feature: dict[str, Any], rotated: int
) -> None:
    freedom = find_freedom(some_heads(), partial(attend, rotated=rotated, **feature), [8, 4])
    assert freedom.key is (Basis.SCALED if rotated else Basis.FULL)
    assert freedom.rotary_dim == rotated
    assert not freedom.shift


def test_a_bias_by_position_does_not_notice_a_shift_of_all_keys() -> None:
    assert find_freedom(some_heads(), partial(attend, bias=0.05), [8]).shift


def test_a_bias_by_position_and_head_forbids_reordering() -> None:
    freedom = find_freedom(some_heads(), partial(attend, bias=0.05), [8])
    assert not freedom.reorder
    assert freedom.key is Basis.FULL


@pytest.mark.parametrize("gap", [0.01, 1.0])
def test_a_small_difference_between_heads_forbids_reordering(gap: float) -> None:
    # As sinks do that differ little from head to head.
    scale = (
        1 + gap * torch.arange(HEADS * QUERIES, dtype=torch.float64).view(HEADS, QUERIES, 1, 1) / 8
    )

    def run(parts: AttentionHeads, added: torch.Tensor | None = None) -> torch.Tensor:
        return attend(replace(parts, output=parts.output * scale), added)

    assert not find_freedom(some_heads(), run, [8]).reorder


def test_one_head_has_nothing_to_reorder() -> None:
    assert not find_freedom(some_heads(1), attend, [8]).reorder


def test_an_attention_that_reports_no_number_allows_nothing() -> None:
    def run(parts: AttentionHeads, added: torch.Tensor | None = None) -> torch.Tensor:
        return attend(parts, added) * torch.nan

    freedom = find_freedom(some_heads(), run, [8])
    assert (freedom.value, freedom.key) == (Basis.FIXED, Basis.FIXED)

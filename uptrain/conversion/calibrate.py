"""Merge and repair a checkpoint layer by layer: a decoder's, an encoder's, or both, one after the other."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from uptrain.conversion.arguments import blank_inputs
from uptrain.conversion.finished import LayerReport, fingerprint, open_partial, resumable
from uptrain.conversion.options import Options
from uptrain.conversion.plan import Plan, plan_conversion
from uptrain.conversion.residual import MOMENT_TOKENS
from uptrain.conversion.sample import Sample, draw_text
from uptrain.conversion.speech import draw_speech
from uptrain.conversion.stacks import find_stacks
from uptrain.conversion.walk import Walk
from uptrain.errors import UptrainError
from uptrain.families.head_tensors import kv_cache_bytes_per_token, possible_head_counts
from uptrain.families.meta import build_on_meta
from uptrain.loading import pick_device
from uptrain.progress import progress


def merge_layers(
    plan: Plan, options: Options, partial: Path, code: Path | None = None
) -> tuple[list[LayerReport], dict[str, int] | None]:
    """Merge and repair all layers; each becomes a file in `partial`.

    Args:
        plan: The conversion.
        options: How.
        partial: Folder for finished layers; those of an earlier run with the same source, options
            and data are taken over, any others removed.
        code: The checkpoint's folder if its own Python code may be executed.

    Returns:
        A report for each layer; and of a calibration the `tokens` that its layers were given and the
        `reconstruct_steps` of each, of the decoder's if there are two lists.

    Raises:
        UnsupportedFamilyError: If the layers cannot be taken apart.
        CheckpointError: If a weight or an activation is not finite.
        DataError: If the calibration text cannot be used.
        UptrainError: If the device is missing or its memory too small.
        Interrupted: If there are finished layers to go on behind.
    """
    device = _device(options)
    sample = _draw(plan, options, code) if options.calibration else None
    if sample is not None and options.reconstruct_steps == 0:
        # Only second moments are taken then.
        sample = sample.first(max(1, MOMENT_TOKENS // sample.tokens.shape[1]))
    open_partial(partial, fingerprint(plan, options, sample.tensors if sample is not None else ()))
    reports: list[LayerReport] = []
    used = None
    try:
        with resumable(partial):
            for walk in _walks(plan, options, partial, device, sample, code):
                with progress("calibrate", len(walk) * max(1, walk.steps), "steps") as advance:
                    reports += walk.run(advance)
                if walk.streams is not None:
                    used = {"tokens": walk.streams.tokens, "reconstruct_steps": walk.steps}
        return reports, used
    except torch.OutOfMemoryError as error:
        raise UptrainError(
            f"device {device}: its memory is too small for a layer and the activations; lower "
            "--activation-bytes or --calibration-tokens, or use --device cpu"
        ) from error


def check_layers(plan: Plan, options: Options, code: Path | None = None) -> None:
    """Refuse what `merge_layers` refuses, as far as all layers' shapes and the first attention tell.

    Args:
        plan: The conversion.
        options: How, without calibration text.
        code: The checkpoint's folder if its own Python code may be executed.

    Raises:
        UnsupportedFamilyError: If the layers cannot be taken apart.
        CheckpointError: If a weight that is looked at is not finite.
        UptrainError: If the device is missing.
    """
    for walk in _walks(plan, options, Path(), _device(options), None, code):
        walk.check()


def survey(plan: Plan, options: Options, code: Path | None = None) -> list[dict[str, Any]]:
    """Say what each possible number of KV heads would discard.

    Args:
        plan: A conversion of the checkpoint; its own number of KV heads plays no part.
        options: Method, grouping and calibration text; at most `MOMENT_TOKENS` of it are used.
        code: The checkpoint's folder if its own Python code may be executed.

    Returns:
        From most to fewest: `num_key_value_heads`, `kv_cache_bytes_per_token`, and the parts of the
        `value` and `key` energy that are discarded, averaged over the layers.
    """
    if plan.group_size == 1:  # changes no tensor, and what follows KV heads would not be known
        fewest = possible_head_counts(plan.checkpoint.config, code, encoder=options.encoder)[0]
        plan = plan_conversion(plan.checkpoint, fewest, code, encoder=options.encoder)
    options = replace(options, calibration_tokens=min(options.calibration_tokens, MOMENT_TOKENS))
    device, config = pick_device(options.device), plan.checkpoint.config
    sample = _draw(plan, options, code)
    counts = possible_head_counts(config, code, encoder=options.encoder)
    lost: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for walk in _walks(plan, options, Path(), device, sample, code):
        with progress("survey", len(walk), "layers") as advance:
            for count, found in walk.lost(counts, advance).items():
                lost[count] += found
    return [
        {
            "num_key_value_heads": count,
            "kv_cache_bytes_per_token": kv_cache_bytes_per_token(config, code, count),
            "discarded_energy": {
                "value": sum(value for value, _ in lost[count]) / len(lost[count]),
                "key": sum(key for _, key in lost[count]) / len(lost[count]),
            },
        }
        for count in reversed(counts)
    ]


def _draw(plan: Plan, options: Options, code: Path | None) -> Sample:
    """Draw what the model reads, or hears."""
    model = build_on_meta(plan.checkpoint.config, code)
    hears = model.config.is_encoder_decoder and model.main_input_name != "input_ids"
    if hears:
        encoder = model.get_encoder()
        name = f"{plan.checkpoint.name}: {plan.checkpoint.config['model_type']}"
        blank_inputs(name, encoder.main_input_name, encoder.config, 1, 1)  # is known
    return (draw_speech if hears else draw_text)(plan.checkpoint, options, code)


def _device(options: Options) -> torch.device:
    """Where to work: without text a GPU has little to do, and is used only if asked for."""
    return pick_device(options.device if options.calibration or options.device else "cpu")


def _walks(
    plan: Plan,
    options: Options,
    partial: Path,
    device: torch.device,
    sample: Sample | None,
    code: Path | None,
) -> Iterator[Walk]:
    """Prepare the lists of layers one after the other: a decoder is given what its encoder became."""
    walk = None
    for stack in find_stacks(plan.checkpoint, plan.head_tensors, code).items():
        walk = Walk(plan, options, partial, device, sample, stack, walk, code)
        yield walk

"""Merge and repair a checkpoint layer by layer, with one layer of each model in memory.

Two residual streams run side by side over the calibration text: that of the original, and that of
the converted model as far as it is converted. A finished layer is written down at once, so that
interrupted work goes on behind the last finished one.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from uptrain.checkpoint.reader import DTYPES, read_json
from uptrain.checkpoint.staging import replace_file
from uptrain.conversion import repair
from uptrain.conversion.attention import (
    AttentionHeads,
    add_to_keys,
    find_layers,
    read_heads,
    write_heads,
)
from uptrain.conversion.finished import LayerReport, fingerprint, layer_path, open_partial
from uptrain.conversion.freedom import Freedom, find_freedom, rotary_dims
from uptrain.conversion.merge import Losses, merge_heads, merge_norms
from uptrain.conversion.moments import balanced_signs, input_moments
from uptrain.conversion.options import Options
from uptrain.conversion.plan import Plan, plan_conversion
from uptrain.conversion.residual import MOMENT_TOKENS, ResidualStreams
from uptrain.conversion.sample import draw_calibration
from uptrain.conversion.stream import LayerStream
from uptrain.errors import CheckpointError, UptrainError
from uptrain.families.head_tensors import kv_cache_bytes_per_token, possible_head_counts
from uptrain.loading import pick_device
from uptrain.progress import progress

PASSES = 6
"""Passes over the calibration tokens for each layer, if no number of steps is given."""
_PROBE_TOKENS = 32


def merge_layers(
    plan: Plan, options: Options, partial: Path, code: Path | None = None
) -> list[LayerReport]:
    """Merge and repair all layers; each becomes a file in `partial`.

    Args:
        plan: The conversion.
        options: How.
        partial: Folder for finished layers; those of an earlier run with the same source, options
            and data are taken over, any others removed.
        code: The checkpoint's folder if its own Python code may be executed.

    Returns:
        A report for each layer.

    Raises:
        UnsupportedFamilyError: If the layers cannot be taken apart.
        CheckpointError: If a weight or an activation is not finite.
        DataError: If the calibration text cannot be used.
        UptrainError: If the device is missing or its memory too small.
    """
    device = _device(options)
    tokens = draw_calibration(plan.checkpoint, options, code) if options.calibration else None
    if tokens is not None and options.reconstruct_steps == 0:
        # Only second moments are taken then.
        tokens = tokens[: max(1, MOMENT_TOKENS // tokens.shape[1])]
    open_partial(partial, fingerprint(plan, options, tokens))
    try:
        return _Work(plan, options, partial, device, tokens, code).run()
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
    _Work(plan, options, Path(), _device(options), None, code).check()


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
        fewest = possible_head_counts(plan.checkpoint.config, code)[0]
        plan = plan_conversion(plan.checkpoint, fewest, code)
    options = replace(options, calibration_tokens=min(options.calibration_tokens, MOMENT_TOKENS))
    device = pick_device(options.device)
    return _Work(
        plan, options, Path(), device, draw_calibration(plan.checkpoint, options, code), code
    ).survey()


def _device(options: Options) -> torch.device:
    """Where to work: without text a GPU has little to do, and is used only if asked for."""
    return pick_device(options.device if options.calibration or options.device else "cpu")


class _Work:
    """The state that goes from layer to layer: two models, two residual streams."""

    def __init__(
        self,
        plan: Plan,
        options: Options,
        partial: Path,
        device: torch.device,
        tokens: Tensor | None,
        code: Path | None,
    ) -> None:
        self.plan, self.options, self.partial, self.device = plan, options, partial, device
        checkpoint = plan.checkpoint
        self.names, self.stack = find_layers(checkpoint, plan.head_tensors, plan.heads, code)
        self.source = LayerStream(checkpoint, checkpoint.config, self.stack, device, code)
        self.target = LayerStream(checkpoint, plan.config, self.stack, device, code, self.source)
        self.code = code
        self.streams: ResidualStreams | None = None
        if tokens is not None:
            self.streams = ResidualStreams(
                self.source, self.target, tokens, options.activation_bytes
            )
        self.rotary_dims = rotary_dims(checkpoint.config, code)
        probe = (
            torch.arange(_PROBE_TOKENS) % 17 + 1 if tokens is None else tokens[0, :_PROBE_TOKENS]
        )
        entering = self.source.embed(probe[None])
        noise = torch.randn(entering.shape, generator=torch.Generator().manual_seed(0))
        self.probe = entering + noise.to(device) * entering.std()

    @torch.no_grad()
    def check(self) -> None:
        first = min(self.names)
        self._examine(first, self.source.layer(first))

    def run(self) -> list[LayerReport]:
        reports: list[LayerReport] = []
        units = len(self.source) * max(1, self._steps())
        with progress("calibrate", units, "steps") as self.advance:
            for index in range(len(self.source)):
                report_path = self.partial / f"layer-{index:05d}.json"
                if report_path.is_file():
                    reports.append(LayerReport(**read_json(report_path)))
                    self.advance(max(1, self._steps()), f"layer {index}, done before")
                    if self.streams is not None:
                        self.streams.move(index, self.source.layer(index), self._load_done(index))
                    continue
                report = self._layer(index)
                content = json.dumps(asdict(report)) + "\n"
                replace_file(report_path, content.encode())
                reports.append(report)
        return reports

    def _steps(self) -> int:
        if self.streams is None:
            return 0
        if self.options.reconstruct_steps is not None:
            return self.options.reconstruct_steps
        return PASSES * (len(self.streams.original) // self.streams.batch)

    @torch.no_grad()
    def survey(self) -> list[dict[str, Any]]:
        """What each possible number of KV heads would discard, averaged over the layers."""
        counts = possible_head_counts(self.plan.checkpoint.config, self.code)
        lost: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
        with progress("survey", len(self.source), "layers") as advance:
            for index in range(len(self.source)):
                source = self.source.layer(index)
                if index in self.names:
                    parts, freedom = self._examine(index, source)
                    losses = Losses(parts, freedom, *self._moments(source, index))
                    for count in counts:
                        groups = losses.choose_groups(count, self.options.grouping, index)
                        lost[count].append(losses.discarded(groups))
                if self.streams is not None:
                    self.streams.move(index, source, source)
                advance(1)
        config = self.plan.checkpoint.config
        return [
            {
                "num_key_value_heads": count,
                "kv_cache_bytes_per_token": kv_cache_bytes_per_token(config, self.code, count),
                "discarded_energy": {
                    "value": sum(value for value, _ in lost[count]) / len(lost[count]),
                    "key": sum(key for _, key in lost[count]) / len(lost[count]),
                },
            }
            for count in reversed(counts)
        ]

    def _examine(self, index: int, source: nn.Module) -> tuple[AttentionHeads, Freedom]:
        """Take a layer's attention block apart and probe what may be done to it."""
        names = self.names[index]
        parts = read_heads(source.state_dict(), names, self.plan.heads)

        def run_with(changed: AttentionHeads, added: Tensor | None = None) -> Tensor:
            state_now = {n: t.float() for n, t in write_heads(changed, names).items()}
            source.load_state_dict(state_now, strict=False)
            with nullcontext() if added is None else add_to_keys(source, names, parts, added):
                return self.source.run(source, index, self.probe)

        freedom = find_freedom(parts, run_with, self.rotary_dims)
        run_with(parts)  # puts the original weights back
        return parts, freedom

    @torch.no_grad()
    def _layer(self, index: int) -> LayerReport:
        report = LayerReport(index)
        source = self.source.layer(index)
        if index not in self.names:  # no attention here
            self.advance(max(1, self._steps()), f"layer {index}, no attention")
            if self.streams is not None:
                self.streams.move(index, source, source)
            return report
        names = self.names[index]
        parts, freedom = self._examine(index, source)
        report.freedom = asdict(freedom)
        moment, covariance = self._moments(source, index)
        merged = merge_heads(
            parts,
            freedom,
            moment,
            self.plan.num_key_value_heads,
            covariance=covariance,
            method=self.options.method,
            grouping=self.options.grouping,
            seed=self.options.seed + 1000 * index,
        )
        report.groups = merged.groups
        report.discarded_energy = {"value": merged.discarded_value, "key": merged.discarded_key}
        gains = merge_norms(source.state_dict(), names, self.plan.heads, merged.groups)
        written = {**write_heads(merged.parts, names), **gains}
        replaced = {name: tensor.float() for name, tensor in written.items()}
        layer = self.target.layer(index, replaced)
        if self.streams is None:
            self.advance(1, f"layer {index}")
            self._save(index, layer, source)
            return report
        report.error, original = repair.repair_layer(
            self.streams,
            index,
            source,
            layer,
            names,
            self.probe,
            refit=self.options.refit,
            steps=self._steps(),
            seed=self.options.seed,
            advance=self.advance,
        )
        self._save(index, layer, source)
        self.streams.move(index, source, layer, original)
        if not bool(self.streams.converted.isfinite().all()):
            raise CheckpointError(
                f"{self.plan.checkpoint.name}: layer {index} gives activations that are not finite; "
                "check the checkpoint, or lower --reconstruct-steps"
            )
        return report

    def _load_done(self, index: int) -> nn.Module:
        disk = {disk: name for name, disk in self.target.names(index).items()}
        path = layer_path(self.partial, index)
        done = safetensors.torch.load_file(path) if path.is_file() else {}
        return self.target.layer(index, {disk[name]: tensor for name, tensor in done.items()})

    def _moments(self, layer: nn.Module, index: int) -> tuple[Tensor, Tensor]:
        """Second moment and covariance of the attention block's input, or what stands for them."""
        names = self.names[index]
        if self.streams is not None:
            some = self.streams.some_batches(self.streams.converted)
            run = self.streams.run_source(layer, index)
            return input_moments(layer, names, run, (batch.to(self.probe) for batch in some))
        run = partial_of(self.source.run, layer, index)
        signs = balanced_signs(self.probe.shape[-1]).to(self.probe)
        moment, covariance = input_moments(layer, names, run, [signs[None]])
        if self.options.method == "align":
            # Jin et al. align without weights; measured, weighting by the gain makes that worse.
            identity = torch.eye(len(moment)).to(moment)
            return identity, identity
        return moment.diagonal().diag(), covariance.diagonal().diag()

    def _save(self, index: int, layer: nn.Module, source: nn.Module) -> None:
        """Write down the tensors that the conversion changed, rounded to the dtype of the files.

        The layer goes on with the rounded weights, so that what follows is fitted to what is written.
        """
        known = self.target.names(index)
        before, changed = source.state_dict(), {}
        for name, tensor in layer.state_dict().items():
            is_same = name in before and torch.equal(tensor, before[name])
            if name in known and not is_same:
                dtype = DTYPES[self.plan.checkpoint.tensors[known[name]].dtype]
                rounded = tensor.detach().to(dtype)
                tensor.copy_(rounded)
                changed[known[name]] = rounded.cpu().contiguous()
        replace_file(layer_path(self.partial, index), safetensors.torch.save(changed))

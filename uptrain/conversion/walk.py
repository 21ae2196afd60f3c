"""Go through one list of layers: merge and repair each, with one layer of each model in memory.

Two residual streams run side by side over the calibration text: that of the original, and that of
the converted model as far as it is converted. A finished layer is written down at once, so that
interrupted work goes on behind the last finished one.
"""

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from uptrain.conversion import finished, repair
from uptrain.conversion.attention import (
    AttentionHeads,
    AttentionNames,
    add_to_keys,
    read_heads,
    write_heads,
)
from uptrain.conversion.encoder import Encoded, encode, encoded_by, unseen
from uptrain.conversion.finished import LayerReport
from uptrain.conversion.freedom import Freedom, find_freedom, noisy, rotary_dims
from uptrain.conversion.merge import Losses, Merged, merge_beside, merge_heads
from uptrain.conversion.moments import Moments, balanced_signs, input_moments
from uptrain.conversion.options import Options
from uptrain.conversion.plan import Plan
from uptrain.conversion.residual import ResidualStreams
from uptrain.conversion.sample import Sample, usable_length
from uptrain.conversion.stacks import ENCODER, Blocks
from uptrain.conversion.stream import LayerStream
from uptrain.errors import CheckpointError
from uptrain.progress import Advance

PASSES = 6
"""Passes over the calibration tokens for each layer, if no number of steps is given."""
_PROBE_TOKENS = 32


class Walk:
    """The state that goes from layer to layer: two models, two residual streams."""

    def __init__(
        self,
        plan: Plan,
        options: Options,
        partial: Path,
        device: torch.device,
        sample: Sample | None,
        stack: tuple[str, Blocks],
        before: "Walk | None" = None,
        code: Path | None = None,
    ) -> None:
        """Load what lies outside the layers.

        Args:
            plan: The conversion.
            options: How.
            partial: Folder for finished layers.
            device: Where to work.
            sample: Calibration text, or None.
            stack: Name of the list of layers, and where their attention blocks are.
            before: Through the encoder, if that is converted too.
            code: The checkpoint's folder if its own Python code may be executed.
        """
        self.plan, self.options, self.partial = plan, options, partial
        self.name, self.blocks = stack
        self.first: int = 0 if before is None else before.first + len(before)
        """Of the numbers that these layers have among all."""
        checkpoint = plan.checkpoint
        self.source = LayerStream(checkpoint, checkpoint.config, self.name, device, code)
        self.target = LayerStream(checkpoint, plan.config, self.name, device, code, self.source)
        self.encoded: Encoded | None = None
        if before is not None:
            self.encoded = encoded_by(before.source, before.target, before.streams)
        elif self.source.encoder is not None:
            encoder = LayerStream(checkpoint, checkpoint.config, self.source.encoder, device, code)
            given = None if sample is None else sample.encoder
            self.encoded = encode(encoder, given, options.activation_bytes)
        self.streams: ResidualStreams | None = None
        inputs = None
        if sample is not None:
            inputs = sample.encoder if self.source.half == ENCODER else sample.tokens
        if inputs is not None:
            by_sequence = None if self.encoded is None else self.encoded.by_sequence
            self.streams = ResidualStreams(
                self.source, self.target, inputs, options.activation_bytes, by_sequence
            )
        self.rotary_dims = rotary_dims(checkpoint.config, code)
        self._read = self._probe_inputs(inputs)
        self.probe = noisy(self.source.embed(self._read))
        unread = [str(index) for index in range(len(self.source)) if not self.source.reaches(index)]
        if unread:
            self.encoded = unseen(self.probe.shape[-1], device)
        if unread and sample is not None:
            print(
                f"{checkpoint.name}: text does not reach layers {', '.join(unread)}, which attend to images; "
                "they are merged without it",
                file=sys.stderr,
            )
        self._finished: dict[str, Tensor] = {}
        """What several layers share, by its first name, once the first of them is done."""

    def _probe_inputs(self, inputs: Tensor | None) -> Tensor:
        length = min(_PROBE_TOKENS, usable_length(self.source.config) or _PROBE_TOKENS)
        blank = self.source.blank_inputs(1, length)
        if blank.is_floating_point():
            return blank if inputs is None else inputs[:1]
        return (torch.arange(length) % 17 + 1)[None] if inputs is None else inputs[:1, :length]

    def __len__(self) -> int:
        """Count the layers."""
        return len(self.source)

    @property
    def steps(self) -> int:
        """Steps in which each layer's weights are fitted."""
        if self.streams is None:
            return 0
        if self.options.reconstruct_steps is not None:
            return self.options.reconstruct_steps
        return PASSES * (len(self.streams.original) // self.streams.batch)

    @torch.no_grad()
    def check(self) -> None:
        """Probe the first attention block of each kind."""
        first = min(self.blocks)
        source = self.source.layer(first)
        for names in self.blocks[first]:
            self._examine(first, names, source)

    def run(self, advance: Advance) -> list[LayerReport]:
        """Merge and repair all layers; each becomes a file.

        Args:
            advance: Progress, in steps.
        """
        self.advance = advance
        reports: list[LayerReport] = []
        for index in range(len(self.source)):
            done = finished.load_report(self.partial, self.first + index)
            if done is not None:
                reports.append(done)
                advance(max(1, self.steps), f"layer {index}, done before")
                # A block that layers share is merged with the first of them.
                if self.streams is not None or self.target.shared(index):
                    layer = self._load_done(index)
                if self.streams is not None:
                    self.streams.move(index, self.source.layer(index), layer)
                continue
            reports.append(self._layer(index))
            finished.save_report(self.partial, reports[-1])
        return reports

    @torch.no_grad()
    def lost(self, counts: list[int], advance: Advance) -> dict[int, list[tuple[float, float]]]:
        """Say what each number of KV heads would discard of V and K, block by block.

        Args:
            counts: Numbers of KV heads; a block that has fewer keeps its own.
            advance: Progress, in layers.
        """
        found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
        seen: set[str] = set()
        for index in range(len(self.source)):
            source, shared = self.source.layer(index), self.source.shared(index)
            known = {name for name, first in shared.items() if first in seen}
            seen |= {*shared.values()}
            for names in self.blocks.get(index, ()):
                if names.is_among(known):  # counted where it first stands
                    continue
                parts, freedom = self._examine(index, names, source)
                losses = Losses(parts, freedom, *self._moments(source, index, names))
                for count in counts:
                    fewer = min(count, names.heads.num_key_value_heads)
                    groups = losses.choose_groups(fewer, self.options.grouping, index)
                    found[count].append(losses.discarded(groups))
            if self.streams is not None:
                self.streams.move(index, source, source)
            advance(1)
        return found

    def _run_probe(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        encoded = None if self.encoded is None else self.encoded.probe
        return self.source.run(layer, index, hidden, encoded, self._read)

    def _examine(
        self, index: int, names: AttentionNames, source: nn.Module
    ) -> tuple[AttentionHeads, Freedom]:
        """Take an attention block apart and probe what may be done to it."""
        parts = read_heads(source.state_dict(), names, names.heads)

        def run_with(changed: AttentionHeads, added: Tensor | None = None) -> Tensor:
            state_now = {n: t.float() for n, t in write_heads(changed, names).items()}
            source.load_state_dict(state_now, strict=False)
            with nullcontext() if added is None else add_to_keys(source, names, parts, added):
                return self._run_probe(source, index, self.probe)

        freedom = find_freedom(parts, run_with, self.rotary_dims)
        run_with(parts)  # puts the original weights back
        return parts, freedom

    def _merge(
        self, index: int, names: AttentionNames, source: nn.Module
    ) -> tuple[Merged, Freedom]:
        parts, freedom = self._examine(index, names, source)
        moments = self._moments(source, index, names)
        place = self.blocks[index].index(names)
        merged = merge_heads(
            parts,
            freedom,
            moments.moment,
            names.num_key_value_heads,
            covariance=moments.covariance,
            query_moment=moments.query_moment,
            method=self.options.method,
            grouping=self.options.grouping,
            seed=self.options.seed + 1000 * index + 500 * place,
        )
        return merged, freedom

    @torch.no_grad()
    def _layer(self, index: int) -> LayerReport:
        report = LayerReport(self.first + index)
        source = self.source.layer(index)
        shared = self.source.shared(index)
        replaced = {
            n: self._finished[first] for n, first in shared.items() if first in self._finished
        }
        # A block that layers share is merged where it first stands, and not fitted to any of them alone.
        blocks = [each for each in self.blocks.get(index, ()) if not each.is_among(replaced)]
        if not blocks and not replaced:  # no attention here
            self.advance(max(1, self.steps), f"layer {index}, no attention")
            if self.streams is not None:
                self.streams.move(index, source, source)
            return report
        reports = {}
        for names in blocks:
            merged, freedom = self._merge(index, names, source)
            reports[names.module] = {
                "freedom": asdict(freedom),
                "groups": merged.groups,
                "discarded_energy": {"value": merged.discarded_value, "key": merged.discarded_key},
            }
            beside = merge_beside(source.state_dict(), names, merged.groups)
            written = {**write_heads(merged.parts, names), **beside}
            replaced |= {name: tensor.float() for name, tensor in written.items()}
        if reports:
            report.add(reports)
        layer = self.target.layer(index, replaced)
        if self.streams is None or not self.source.reaches(index):
            self.advance(max(1, self.steps), f"layer {index}")
            self._save(index, layer, source)
            return report
        report.error, original = repair.repair_layer(
            self.streams,
            index,
            source,
            layer,
            [each for each in blocks if not each.is_among(shared)],
            lambda hidden, rows: self._run_probe(source, index, hidden),
            self.probe,
            refit=self.options.refit,
            steps=self.steps,
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
        done = finished.load_layer(self.partial, self.first + index)
        shared = self.target.shared(index).items()
        replaced = {n: self._finished[first] for n, first in shared if first in self._finished}
        layer = self.target.layer(index, replaced | self.target.from_files(index, done))
        self._keep_shared(index, layer)
        return layer

    def _keep_shared(self, index: int, layer: nn.Module) -> None:
        """Keep of a finished layer what others share with it."""
        state = layer.state_dict()
        self._finished |= {first: state[n] for n, first in self.target.shared(index).items()}

    def _moments(self, layer: nn.Module, index: int, names: AttentionNames) -> Moments:
        """Second moments of an attention block's input, or what stands for them."""
        if self.streams is not None and self.source.reaches(index):
            converted = self.streams.converted
            batches = (
                (converted[rows].to(self.probe), rows) for rows in self.streams.some_batches()
            )
            return input_moments(layer, names, self.streams.run_source(layer, index), batches)
        gains = None if self.encoded is None else self.encoded.gains
        signs = balanced_signs(self.probe.shape[-1]).to(self.probe)
        found = input_moments(
            layer,
            names,
            lambda hidden, rows: self.source.run(layer, index, hidden, gains),
            [(signs, slice(None))],
        )
        is_wider = len(found.moment) - names.has_bias != signs.shape[-1]
        if self.options.method == "align" or (is_wider and gains is None):
            # Jin et al. align without weights; measured, weighting by the gain makes that worse. And what
            # a block reads beside hidden states has no gain that these would show.
            return found.map(lambda moment: torch.eye(len(moment)).to(moment))
        return found.map(lambda moment: moment.diagonal().diag())

    def _save(self, index: int, layer: nn.Module, source: nn.Module) -> None:
        """Write down the tensors that the conversion changed, rounded to the dtype of the files.

        The layer goes on with the rounded weights, so that what follows is fitted to what is written.
        """
        before, state = source.state_dict(), layer.state_dict()
        changed = {n for n, t in state.items() if n not in before or not torch.equal(t, before[n])}
        tensors = self.target.to_files(index, state, changed)
        finished.save_layer(self.partial, self.first + index, tensors)
        self._keep_shared(index, layer)

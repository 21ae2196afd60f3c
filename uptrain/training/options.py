"""What a recipe can say: sections, keys, types, defaults."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from uptrain.data import Source


def _whole(value: Any) -> Any:
    """Let 2e12 stand for a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ConvertOptions(_Section):
    """How heads are merged; the flags of `uptrain convert`."""

    num_key_value_heads: Count
    method: Literal["mean", "first", "random", "align", "factorize"] | None = None
    grouping: Literal["contiguous", "search"] | None = None
    architecture: Text = "auto"
    """`auto`, `keep`, or the model type to rewrite the source into."""
    calibration: Text | None = None
    """A text, jsonl or parquet file."""
    calibration_tokens: Count = 262_144
    refit: bool = True
    reconstruct_steps: Annotated[int, Field(ge=0)] | None = None
    activation_bytes: Count | None = None
    device: Text | None = None
    seed: Seed = 0


class DataOptions(_Section):
    """What is trained on."""

    train: Annotated[list[Source], Field(min_length=1)]
    """Files and data sets, each a path or keys of its own. Each is trained on in proportion to its
    tokens, or to its weight if all have one."""
    validation: Text | None = None
    """A file that the loss is measured on while training."""
    repeat: bool = False
    """Go over the text more than once, in another order each time."""
    seed: Seed = 0
    """Of the order of the text."""
    tokens: Text | None = None
    """A folder for the tokens that several runs share; `tokens` in the output if not given."""
    attention_within_documents: bool = False
    """Whether a token sees its own document only, not the one before it in the same sequence."""

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Of each source, if they have any."""
        given = tuple(source.weight for source in self.train if source.weight is not None)
        return given or None

    @model_validator(mode="after")
    def _check_weights(self) -> "DataOptions":
        if len(self.weights or self.train) != len(self.train):
            raise ValueError(
                f"data.train: {len(self.weights or ())} of {len(self.train)} sources have a weight; "
                "give one to all, or to none"
            )
        return self


class TrainOptions(_Section):
    """How it is trained, for as long as one of alpha, steps and tokens says."""

    alpha: Annotated[float, Field(gt=0)] | None = None
    """Fraction of the pretraining tokens to train on; 0.05 in the paper."""
    pretraining_tokens: Count | None = None
    """What the original model was pretrained on."""
    steps: Count | None = None
    tokens: Count | None = None
    learning_rate: Annotated[float, Field(gt=0)]
    """The peak. It has no default: what suits a small model would wreck a large one."""
    teacher: Text | None = None
    """A checkpoint to distil from, mostly the original; `none` for none."""
    distillation_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Of KL(teacher ‖ student) on every token's whole distribution; cross-entropy has the rest. It
    counts where there is a teacher."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up; cosine goes down to the floor all the way, wsd at its end."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The last step's learning rate as a fraction of the peak; of cosine and wsd."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Fraction of the steps in which wsd goes down."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of the steps, at least two of them unless it is 0."""
    batch_tokens: Count
    """Tokens of one step over all devices; that of the pretraining, if known."""
    micro_batch_tokens: Count | None = None
    """Tokens that go through a device at once; they divide its share of a step."""
    sequence_length: Count | None = None
    """Tokens of one sequence; the model's context, at most 2048, if not given."""
    optimizer: Literal["adamw", "adafactor", "muon", "adamw8bit"] = "adamw"
    """What adafactor is given as learning rate is relative to each tensor's own size."""
    trainable: Literal["all", "attention", "attention-first"] = "all"
    """What is trained: everything, the attention blocks alone, or these first and all later."""
    attention_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of the steps after which attention-first trains everything."""
    betas: Annotated[
        list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)
    ] = [
        0.9,
        0.95,
    ]
    """Of adamw and adamw8bit, and of what muon leaves to adamw."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """On matrices; vectors (norms, biases) are not decayed."""
    gradient_clipping: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null for none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Replaces all dropouts of the model's config while it trains."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the arithmetic; the weights are float32. `auto` is bfloat16 where the device has it."""
    gradient_checkpointing: bool = False
    compile: bool = False
    save_every_steps: Count = 100
    evaluate_every_steps: Count | None = None
    """How often data.validation is measured; at the start and the end if not given."""
    keep_best: bool = False
    """Export the step with the lowest loss on data.validation, not the last one."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    seed: Seed = 0
    """Of dropout."""

    @field_validator("teacher")
    @classmethod
    def _no_teacher(cls, value: str | None) -> str | None:
        return None if value == "none" else value

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        if self.steps is not None:
            return self.steps
        tokens = self.tokens
        if self.alpha is not None and self.pretraining_tokens is not None:
            return round(self.alpha * self.pretraining_tokens / self.batch_tokens)
        assert tokens is not None
        return round(tokens / self.batch_tokens)

    @model_validator(mode="after")
    def _check_budget(self) -> "TrainOptions":
        ways = "give train.alpha with train.pretraining_tokens, or train.steps, or train.tokens"
        given = [
            f"train.{key}"
            for key in ("alpha", "pretraining_tokens", "steps", "tokens")
            if getattr(self, key) is not None
        ]
        if given not in (
            ["train.alpha", "train.pretraining_tokens"],
            ["train.steps"],
            ["train.tokens"],
        ):
            found = f"{' and '.join(given)} given" if given else "no budget"
            raise ValueError(f"{found}, expected exactly one way to say how long to train; {ways}")
        if self.total_steps < 1:
            raise ValueError(
                f"the budget is less than one step of train.batch_tokens={self.batch_tokens}; "
                "raise the budget or lower the batch"
            )
        return self


class EvaluateOptions(_Section):
    """What the finished checkpoint is measured on; the flags of `uptrain evaluate`."""

    data: Text
    max_tokens: Count | None = None
    sequence_length: Count | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    long_context: bool = False
    copying: bool = False
    continuations: bool = False
    tasks: list[Text] = []
    tasks_folder: Text | None = None
    decode: bool = False
    """Of the final checkpoint and the original; the converted one is as fast as the final one."""
    decode_batches: list[Count | Literal["max"]] | None = None
    decode_contexts: list[Count] | None = None


class Recipe(_Section):
    """One run: convert `source`, train it, evaluate it; everything goes to `output`."""

    source: Text
    """A checkpoint folder or hub id; `finetune` reads it as already converted."""
    convert: ConvertOptions | None = None
    data: DataOptions
    train: TrainOptions
    evaluate: EvaluateOptions | None = None
    output: Text


SECTIONS: dict[str, type[BaseModel]] = {
    "convert": ConvertOptions,
    "data": DataOptions,
    "data.train": Source,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
}

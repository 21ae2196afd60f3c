"""What a recipe can say: sections, keys, types, defaults."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from uptrain.data import Source


def _whole(value: Any) -> Any:
    """Let 2e12 stand for a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole)]
Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ConvertOptions(_Section):
    """How heads are merged; the flags of `uptrain convert`."""

    num_key_value_heads: Count
    """KV heads of the target; 1 makes multi-query attention."""
    method: Literal["mean", "first", "random", "align", "factorize"] | None = None
    """How the heads of a group become one; mean if not given, with a calibration factorize."""
    grouping: Literal["contiguous", "search"] | None = None
    """Which heads become one; contiguous if not given, with a calibration search."""
    architecture: Text = "auto"
    """`auto`, `keep`, or the model type to rewrite the source into."""
    calibration: Text | None = None
    """A text, jsonl or parquet file to repair every layer on."""
    calibration_tokens: Count = 262_144
    """Tokens that are drawn from it."""
    refit: bool = True
    """Solve output projections anew."""
    reconstruct_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps in which each layer is fitted, 0 for none; six passes over the tokens if not given."""
    activation_bytes: Count | None = None
    """Most bytes of activations on the device; the host holds them if they are more."""
    device: Text | None = None
    """Where to calibrate: cpu, cuda, …; a GPU if there is one."""
    seed: Seed = 0
    """Of the draw of the text, the search and the random bases."""


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
    """How long to train, in steps."""
    tokens: Count | None = None
    """How long to train, in tokens."""
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
    """Compute the layers' activations again instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile the layers, and on a GPU what follows the logits."""
    save_every_steps: Count = 100
    """How often a checkpoint is written; the latest two stay, and the best."""
    evaluate_every_steps: Count | None = None
    """How often data.validation is measured; at the start and the end if not given."""
    keep_best: bool = False
    """Export the step with the lowest loss on data.validation, not the last one."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Who is told the figures of each step besides the log; install them yourself."""
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
    """A text, jsonl or parquet file that no training has seen."""
    max_tokens: Count | None = None
    """Tokens to predict; all if not given."""
    sequence_length: Count | None = None
    """Tokens of a block; the model's context, at most 2048, if not given."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and arithmetic; `auto` is float32 on a CPU, else the checkpoint's own."""
    long_context: bool = False
    """Also the loss by position in a whole context."""
    copying: bool = False
    """Also the loss on a random span that comes again."""
    continuations: bool = False
    """Also how the models go on from five prompts."""
    tasks: list[Text] = []
    """Also these tasks of the lm-evaluation-harness, which is an extra."""
    tasks_folder: Text | None = None
    """Where more tasks are, as YAML files."""
    decode: bool = False
    """Of the final checkpoint and the original; the converted one is as fast as the final one."""
    decode_batches: list[Count | Literal["max"]] | None = None
    """Sequences at once, `max` for as many as fit; 1, 4, 16 on a GPU, else 1, 4."""
    decode_contexts: list[Count] | None = None
    """Tokens of the full context; 1024, 4096 on a GPU, else 256."""


class Recipe(_Section):
    """One run: convert `source`, train it, evaluate it; everything goes to `output`."""

    source: Text
    """A checkpoint folder or hub id; `finetune` reads it as already converted."""
    convert: ConvertOptions | None = None
    """How to convert it; `finetune` leaves it aside."""
    data: DataOptions
    """What to train on."""
    train: TrainOptions
    """How to train."""
    evaluate: EvaluateOptions | None = None
    """What to measure the result on; `finetune` leaves it aside."""
    output: Text
    """The folder that comes to hold `converted/`, `checkpoints/`, `final/` and `report/`."""


SECTIONS: dict[str, type[BaseModel]] = {
    "convert": ConvertOptions,
    "data": DataOptions,
    "data.train": Source,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
}

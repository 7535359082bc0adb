"""Typed settings of the model and of training. Standard library only: plans are made without torch."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from model.checks import Count, CountOrOff, Dtype, FactorOrOff, PositiveOrOff, Seed, check_named
from model.errors import ModelError

HEAD_DIM = 128
WIDTH_PER_LAYER = 64
WINDOW_MULTIPLE = 128
GATE_CHANNELS = 12  # channels of x that steer the gate of a value embedding
SMEAR_CHANNELS = 24  # channels of x that steer the smear gate
OPTIMISERS = ("muon", "adamw", "lion", "sgd")  # built in

# The largest sizes accepted, far above what trains: a file that claims more is wrong, and building it would hang.
MOST = {
    "depth": 1024,
    "width": 1 << 16,
    "head_dim": 1024,
    "kv_heads": 1 << 15,
    "vocab_size": 1 << 24,
    "sequence_len": 1 << 20,
}


@dataclass(frozen=True)
class Switches:
    """The values that `arch` gives to every switch left null. All of Switches() together change nothing."""

    rope_theta: float = 10_000.0
    qk_gain: float = 1.0
    lambdas: bool = False
    value_embeddings: bool = False
    window_pattern: str = "L"
    backout: bool = False
    smear: bool = False


MODERN = Switches(
    rope_theta=100_000.0,
    qk_gain=1.2,
    lambdas=True,
    value_embeddings=True,
    window_pattern="SSSL",
    backout=True,
    smear=True,
)


@dataclass(frozen=True)
class GPTConfig:
    """One dial, depth: every other size follows from it unless it is given.

    A switch left null takes the value of `arch`; setting it is an ablation. `arch` is base, modern, or the import path
    of a class that is built as Class(config) and offers what model.gpt.GPT offers; it gets base's values.
    """

    arch: str = "base"  # base | modern | import path of a class of your own
    depth: int = 20  # layers
    width: int | None = None  # null: 64 * depth
    head_dim: int = HEAD_DIM
    kv_heads: int | None = None  # null: as many as query heads; fewer is grouped-query attention
    vocab_size: int | None = None  # null: the tokenizer's
    sequence_len: int = 2048  # context, in tokens
    dropout: float = 0.0
    rope_theta: float | None = None
    qk_gain: float | None = None  # q and k are multiplied by it after their norm
    lambdas: bool | None = None  # learned weights of residual stream and embedding before each block
    value_embeddings: bool | None = None  # every second layer adds an embedding of the token to v
    window_pattern: str | None = None  # one letter a layer, repeated: L = whole context, S = a quarter of it
    backout: bool | None = None  # a learned part of the middle layer's residual is subtracted at the end
    smear: bool | None = None  # a gated part of the previous token's embedding is added

    def resolved(self, vocab_size: int | None = None) -> "ResolvedConfig":
        """The same model with nothing left null, checked.

        Raises ModelError when sizes do not fit each other, or vocab_size contradicts the one that is set.
        """
        self._check_values()
        if "." in self.arch:
            check_named(self.arch, "model.arch")
        defaults = dataclasses.asdict(MODERN if self.arch == "modern" else Switches())
        values = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        width = self.width or WIDTH_PER_LAYER * self.depth
        values |= {"width": width, "kv_heads": self.kv_heads or max(1, width // self.head_dim)}
        config = ResolvedConfig(**{**vars(self), **values, "vocab_size": self.vocab_size or vocab_size})
        config.check()
        if vocab_size is not None and config.vocab_size != vocab_size:
            raise ModelError(
                f"model.vocab_size is {config.vocab_size}, but the tokenizer has {vocab_size} tokens: leave it null"
            )
        return config

    @staticmethod
    def from_json(values: dict[str, Any]) -> "ResolvedConfig":
        """The resolved config that `values` describe. Raises ModelError for what is unknown, missing or cannot work."""
        unknown = set(values) - {f.name for f in dataclasses.fields(GPTConfig)}
        if unknown:
            raise ModelError(f"holds {sorted(unknown)!a:.80}, which this version does not know")
        config = ResolvedConfig(**vars(GPTConfig(**values)))  # null where a value is missing, which check() reports
        config.check()
        return config

    def _check_values(self) -> None:
        """Check each number by itself, whether resolved or not."""
        sizes = ["depth", "width", "head_dim", "kv_heads", "vocab_size", "sequence_len"]
        _check_numbers(self, "model", sizes, at_least=1)
        _check_numbers(self, "model", ["rope_theta", "qk_gain"], above=0)
        _check_numbers(self, "model", ["dropout"], at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(GPTConfig):
    """A GPTConfig with nothing left null: what a model is built from and what model.json holds."""

    width: int
    kv_heads: int
    vocab_size: int
    rope_theta: float
    qk_gain: float
    lambdas: bool
    value_embeddings: bool
    window_pattern: str
    backout: bool
    smear: bool

    def check(self) -> None:
        """Raises ModelError naming the first value that cannot work."""
        if not self.vocab_size:
            raise ModelError("model.vocab_size is not known: set it, or build the model with a tokenizer")
        for setting in dataclasses.fields(self):
            value, expected = getattr(self, setting.name), setting.type
            if type(value) is not expected and not (type(value) is int and expected is float):  # a bool is no number
                raise ModelError(f"model.{setting.name} is {value!a:.80}; expected {getattr(expected, '__name__', '')}")
        if "." not in self.arch and self.arch not in ("base", "modern"):
            raise ModelError(f"model.arch {self.arch!a:.80} is not base, modern or the import path of a class")
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ModelError(f"model.{name} is {getattr(self, name)}; it must be from 1 to {most}")
        self._check_values()
        if self.sequence_len * self.head_dim > MOST["sequence_len"] * HEAD_DIM:
            raise ModelError(
                f"model.sequence_len {self.sequence_len} with model.head_dim {self.head_dim} takes gigabytes for the "
                f"angles of rotary embeddings alone. Their product must be at most {MOST['sequence_len'] * HEAD_DIM}"
            )
        if self.head_dim % 2:
            raise ModelError(f"model.head_dim is {self.head_dim}: rotary embeddings need an even number")
        if self.width % self.head_dim:
            raise ModelError(
                f"model.width {self.width} is not a multiple of model.head_dim {self.head_dim}; "
                f"choose a head_dim that divides it (depth {self.depth} gives width {WIDTH_PER_LAYER * self.depth})"
            )
        if self.heads % self.kv_heads:
            raise ModelError(f"model.kv_heads {self.kv_heads} does not divide the {self.heads} query heads")
        if not self.window_pattern or set(self.window_pattern.upper()) - {"S", "L"}:
            raise ModelError(f"model.window_pattern {self.window_pattern!a:.80} may hold only the letters S and L")

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def windows(self) -> list[int]:
        """Tokens that each layer's queries see, themselves included; the last layer always sees the whole context."""
        quarter = -(-self.sequence_len // 4)
        short = min(-(-quarter // WINDOW_MULTIPLE) * WINDOW_MULTIPLE, self.sequence_len)
        pattern = self.window_pattern.upper()
        letters = [pattern[layer % len(pattern)] for layer in range(self.depth - 1)] + ["L"]
        return [short if letter == "S" else self.sequence_len for letter in letters]

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer, counted so that the last one has it."""
        return self.value_embeddings and (self.depth - 1 - layer) % 2 == 0

    def matmul_params(self) -> int:
        """Parameters of the matrices that every token is multiplied with: the blocks' and lm_head's."""
        attention = self.width * (2 * self.width + 2 * self.kv_width)
        return self.vocab_size * self.width + self.depth * (attention + 8 * self.width**2)

    def num_params(self) -> int:
        """All parameters. Base: 2 * vocab * width + 12 * depth * width^2."""
        total = self.matmul_params() + self.vocab_size * self.width
        value_layers = sum(self.has_value_embedding(layer) for layer in range(self.depth))
        total += value_layers * (self.vocab_size * self.kv_width + GATE_CHANNELS * self.kv_heads)
        total += 2 * self.depth * self.lambdas + self.backout
        return total + (SMEAR_CHANNELS + 1) * self.smear

    def flops_per_token(self) -> float:
        """Training FLOPs, forward and backward: 6 per matmul parameter and 12 * width per token seen by attention."""
        return 6.0 * self.matmul_params() + 12.0 * self.width * sum(self.windows())


@dataclass(frozen=True)
class OptimConfig:
    """Which optimiser and its rates. Muon updates the blocks' matrices and AdamW the rest; the others update all.

    A rate is multiplied by the schedule, and AdamW's by (width / width_ref)^-0.5.
    """

    name: str = "muon"  # muon | adamw | lion | sgd | import path of a torch optimiser class
    rates_for: str | None = field(
        default=None, compare=False, metadata={"key": False}
    )  # the optimiser that these rates suit; null: any
    matrix_lr: float = 0.02  # times sqrt(max(1, rows / columns)) with muon
    embedding_lr: float = 0.2
    unembedding_lr: float = 0.004
    value_embedding_lr: float = 0.15
    scalar_lr: float = 0.5  # x0 lambdas, backout, smear; the residual lambdas learn at a hundredth of it
    width_ref: int | None = 768  # AdamW's rates times (width / width_ref)^-0.5; null: they do not depend on the width
    init_lr_frac: float = 1.0  # multiplies every rate
    betas: tuple[float, float] = (0.8, 0.95)  # of AdamW and Lion
    embedding_betas: tuple[float, float] | None = None  # null: betas
    unembedding_betas: tuple[float, float] | None = None
    scalar_betas: tuple[float, float] | None = None
    eps: float = 1e-10
    weight_decay: float = 0.0  # of the matrices, decoupled: p -= lr * weight_decay * p
    cautious: bool = False  # decay only where the update has the sign of the weight
    iterations: int = 5  # of the orthogonalisation
    # classic: the iteration of Muon's first version, as in nanochat's
    coefficients: Literal["polar_express", "classic"] = "polar_express"
    orthogonal_dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 on GPUs, else float32
    normuon: bool = False  # divide each row of an update by the root of its running mean square
    normuon_beta2: float = 0.9
    args: dict[str, Any] = field(default_factory=dict)  # further arguments of a class named by import path

    def __post_init__(self) -> None:
        if "." not in self.name and self.name not in OPTIMISERS:
            raise ModelError(f"optim.name {self.name!r} is not {', '.join(OPTIMISERS)} or the import path of a class")
        if "." in self.name:
            check_named(self.name, "optim.name")
        rates = [f.name for f in dataclasses.fields(self) if f.name.endswith("_lr")]
        _check_numbers(self, "optim", [*rates, "weight_decay"], at_least=0)
        _check_numbers(self, "optim", ["init_lr_frac", "eps"], above=0)
        _check_numbers(self, "optim", ["iterations", "width_ref"], at_least=1)
        betas = ["betas", "embedding_betas", "unembedding_betas", "scalar_betas", "normuon_beta2"]
        _check_numbers(self, "optim", betas, at_least=0, below=1)
        self._check_rates()

    def _check_rates(self) -> None:
        """Raises ModelError for rates of another optimiser: at Muon's, the losses of Lion and Adam explode."""
        theirs = self.rates_for
        if theirs in (None, self.name) or ("." in self.name and theirs != "muon"):
            return
        own = f"optim=adamw optim.name={self.name}" if "." in self.name else f"optim={self.name}"
        raise ModelError(
            f"optim.name {self.name!r} would train at the rates of {theirs} (matrix_lr {self.matrix_lr:g}, "
            f"embedding_lr {self.embedding_lr:g}), which do not fit it. Set {own}"
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: linear warm-up, constant, linear warm-down. Momentum and weight decay over the same steps."""

    warmup_steps: int = 0
    warmdown_frac: float = 0.2  # part of all steps, over which the rates fall
    final_lr_frac: float = 0.0  # the rate that the warm-down ends at, as a part of the full one
    momentum: tuple[float, float] = (0.85, 0.95)  # Muon's and SGD's, first and last value of its own warm-up
    momentum_steps: int = 300  # of that warm-up
    momentum_final: float | None = None  # null: no change in the warm-down
    weight_decay_to_zero: bool = False  # linear over all steps
    scale_lr_with_batch: bool = False  # every rate times sqrt(total_batch_tokens / 2^19); starves small runs

    def __post_init__(self) -> None:
        amounts = ["warmup_steps", "warmdown_frac", "final_lr_frac", "momentum_steps"]
        _check_numbers(self, "schedule", amounts, at_least=0)
        _check_numbers(self, "schedule", ["momentum", "momentum_final"], at_least=0, below=1)
        if self.warmdown_frac > 1:
            raise ModelError(f"schedule.warmdown_frac is {self.warmdown_frac}; it is a part of all steps, at most 1")


@dataclass
class TrainConfig:
    """Settings that pretrain, midtrain and sft have in common.

    Their Params extend it, and it goes whole to the trainer: a new setting is declared here and used where it counts.
    """

    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    total_batch_tokens: Count = 524_288  # of one step over all devices, masked ones included
    steps: Count | None = None  # null: what the stage's horizon comes to
    seed: Seed = 0  # of the order of rows and, in pretrain, of the weights
    grad_clip: PositiveOrOff = 1.0  # norm of the global gradients; null: off
    skip_spikes: FactorOrOff = None  # drop steps whose gradient norm is this many times the usual
    dtype: Dtype = "auto"  # of the computations; auto: bfloat16 on GPUs that have it, else float32
    fp8: bool = False  # matmuls of the blocks in 8 bits
    eval_every: CountOrOff = 250  # steps between measurements of val_bpb; the end is always measured
    val_tokens: Count | None = 10_485_760  # of the validation shard, from its start; null: all
    init: str | None = None  # KEY@STEP: go on from a checkpoint of another run of the same stage


def _check_numbers(
    config: "GPTConfig | OptimConfig | ScheduleConfig",
    group: str,
    names: list[str],
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raises ModelError for the first setting that is out of these bounds or not finite; null is allowed."""
    bounds = {"at least": at_least, "above": above, "below": below}
    words = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    for name in names:
        setting = getattr(config, name)
        values = setting if isinstance(setting, tuple) else [] if setting is None else [setting]
        if not all(at_least <= value < below and above < value < math.inf for value in values):
            raise ModelError(f"{group}.{name} is {setting}; it must be {words}")

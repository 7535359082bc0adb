"""A base model from packed text.

Reads   tokens (tokenize), pack, tokenizer
Writes  model.safetensors, model.json, checkpoints/
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model.checks import Count, Positive
from model.config import GPTConfig, ResolvedConfig, TrainConfig
from model.errors import ModelError
from model.training.batch_size import check_split
from pipeline.job import Job, Launch
from pipeline.stage import Inputs, params_of
from pipeline.stages import download, pack, tokenizer
from pipeline.stages.training import training_seconds

if TYPE_CHECKING:
    from data.tokens.packing import PackedRows

RANKS = True

BEST_FIT_KEEPS = 0.65  # of the tokens, at a context of 2,048


@dataclass
class Params(TrainConfig):
    model: GPTConfig = field(default_factory=GPTConfig)
    tokens_per_param: Positive = 20.0  # the horizon, unless tokens or steps is set
    tokens: Count | None = None
    max_epochs: Positive = 1.0  # more text than this is an error, not silently repeated


def main(job: Job[Params]) -> dict[str, Any]:
    """Raises ModelError when sizes do not fit each other or there is too little text, Diverged, Stopped."""
    import numpy as np
    import torch

    from data.tokens.packing import BatchOrder, PackedRows, ValidationRows, window_rows
    from model.gpt import new_model
    from pipeline.stages.training import Work, train

    params = job.params
    token_bytes = np.load(job.inputs["tokenizer"] / "token_bytes.npy")
    config = params.model.resolved(vocab_size=len(token_bytes))
    rows = PackedRows(job.inputs["tokens"], job.inputs["pack"])
    if rows.sequence_len != config.sequence_len:
        raise ModelError(
            f"{job.stage}: the text is packed in rows of {rows.sequence_len} tokens, but model.sequence_len is "
            f"{config.sequence_len}; set both to the same"
        )
    steps = count_steps(params, config)
    check_horizon(job, rows, steps)
    validation = ValidationRows(job.inputs["tokens"], config.sequence_len, params.val_tokens)
    metrics = train(
        job,
        Work(
            model=new_model(config, params.seed),
            rows=rows,
            order=lambda per_step: BatchOrder(len(rows), per_step, params.seed, window_rows(rows.sequence_len)),
            steps=steps,
            config=params,
            validation=(validation, torch.from_numpy(token_bytes)),
            gentler=f"{job.stage}.params.optim.init_lr_frac={params.optim.init_lr_frac / 2}",
        ),
    )
    return metrics | {"flops": steps * params.total_batch_tokens * config.flops_per_token()}


def check(params: Params, inputs: Inputs) -> None:
    """Raises ModelError for what can be known to fail before anything is fetched or made."""
    text = params_of(inputs, "tokens.shards", download.Params)
    packed = params_of(inputs, "pack", pack.Params)
    config, length = expected_model(params, inputs), params.model.sequence_len
    if params.total_batch_tokens % length:
        raise ModelError(
            f"total_batch_tokens={params.total_batch_tokens} is not a multiple of model.sequence_len={length}"
        )
    if packed and packed.sequence_len != length:
        raise ModelError(
            f"model.sequence_len={length}, but pack.params.sequence_len={packed.sequence_len}; set both to the same"
        )
    if config is None:
        return
    needed = count_steps(params, config) * params.total_batch_tokens / params.max_epochs
    if text and text.shard_tokens and text.train_shards:
        kept = BEST_FIT_KEEPS if packed and packed.method == "bestfit" else 1.0
        there = text.train_shards * text.shard_tokens * kept
        if needed > there:
            raise ModelError(
                f"{needed * params.max_epochs:,.0f} tokens are to be trained on, but {text.train_shards} shards hold "
                f"about {there:,.0f}: set data.train_shards={-(-needed // (text.shard_tokens * kept)):.0f}, or allow "
                "repetition with max_epochs"
            )


def check_launch(params: Params, launch: Launch, inputs: Inputs) -> None:
    """Raises ModelError for processes and rows that do not divide a step."""
    check_split(params.total_batch_tokens, params.model.sequence_len, launch.nproc, launch.device_batch_size)


def estimate(params: Params, launch: Launch, inputs: Inputs) -> float | None:
    """Expected seconds, by the model's FLOPs; None for a tokenizer of the user's own."""
    config = expected_model(params, inputs)
    return training_seconds(config, count_steps(params, config) * params.total_batch_tokens, launch) if config else None


def expected_model(params: Params, inputs: Inputs) -> ResolvedConfig | None:
    """The model that planning assumes; None where a tokenizer of the user's own decides how many tokens it knows."""
    made = params_of(inputs, "tokenizer", tokenizer.Params)
    vocab_size = params.model.vocab_size or (made.most_tokens if made else None)
    return params.model.resolved(vocab_size) if vocab_size else None


def count_steps(params: Params, config: ResolvedConfig) -> int:
    """Steps of the horizon. The ratio counts the parameters of the base architecture, so that switches compare at the
    same tokens. Raises ModelError when both steps and tokens are set, or not one step comes out."""
    if params.steps is not None and params.tokens is not None:
        raise ModelError("set steps or tokens, not both")
    if params.steps is not None:
        steps = params.steps
    else:
        base = config.matmul_params() + config.vocab_size * config.width
        tokens = params.tokens if params.tokens is not None else params.tokens_per_param * base
        steps = int(tokens // params.total_batch_tokens)
    if steps < 1:
        raise ModelError(f"the horizon is shorter than one step of {params.total_batch_tokens} tokens")
    return steps


def check_horizon(job: Job[Params], rows: "PackedRows", steps: int) -> None:
    """Raises ModelError with the numbers when the text would have to be read more than max_epochs times."""
    there = len(rows) * rows.sequence_len
    needed = steps * job.params.total_batch_tokens
    if needed > there * job.params.max_epochs:
        name = f"{job.stage}.params"
        fitting = int(there * job.params.max_epochs // job.params.total_batch_tokens)
        shorter = f"a shorter horizon ({name}.steps={fitting})" if fitting else f"a smaller {name}.total_batch_tokens"
        raise ModelError(
            f"{steps} steps need {needed:,} tokens, but the packed text has {there:,} ({needed / there:.2f} epochs): "
            f"take more shards, or {shorter}, or allow repetition ({name}.max_epochs={-(-needed // there)})"
        )

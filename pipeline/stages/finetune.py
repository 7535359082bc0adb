"""A chat model from a trained one and conversation rows: midtrain and sft, which differ in their data and rates.

Reads   model, rows (render), tokenizer; tokens (tokenize) if val_bpb is to be measured
Writes  model.safetensors, model.json, checkpoints/
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.config import TrainConfig
from model.errors import ModelError
from model.training.batch_size import check_split
from pipeline.job import Job, Launch
from pipeline.stages.expected import training_seconds
from pipeline.typed import CountOrOff, Part, Positive

if TYPE_CHECKING:
    from data.tokens.packing import ValidationRows
    from model.gpt import GPT

RANKS = True


@dataclass
class Params(TrainConfig):
    lr_frac: Positive = 1.0  # every rate times this
    epochs: Positive = 1.0  # the horizon, unless steps is set
    dropout: Part | None = None  # null: the model's
    eval_every: CountOrOff = 150  # steps between measurements of val_bpb, if tokens is an input


def main(job: Job[Params]) -> dict[str, Any]:
    """Raises ModelError when rows, model and batch do not fit each other, Diverged, Stopped."""
    import numpy as np
    import torch

    from data.chat.rows import ConversationRows
    from pipeline.stages.training import Work, train

    params = job.params
    rows = ConversationRows(job.inputs["rows"])
    token_bytes = torch.from_numpy(np.load(job.inputs["tokenizer"] / "token_bytes.npy"))
    model = load_trainable(job, rows.sequence_len, len(token_bytes))
    rows_per_step = max(1, params.total_batch_tokens // rows.sequence_len)
    steps = params.steps if params.steps is not None else max(1, -int(-params.epochs * len(rows) // rows_per_step))
    validation = open_validation(job, rows.sequence_len)
    return train(
        job,
        Work(
            model=model,
            rows=rows,
            order=lambda per_step: rows.order(per_step, params.seed),
            steps=steps,
            config=params,
            lr_frac=params.lr_frac,
            validation=(validation, token_bytes) if validation else None,
            gentler=f"{job.stage}.params.lr_frac={params.lr_frac / 2:g}",
        ),
    )


def check(params: Params, upstream: dict[str, Any]) -> None:
    """Raises ModelError for a batch that is no whole number of rows, before anything is trained."""
    length = row_tokens(upstream)
    if length and params.total_batch_tokens % length:
        raise ModelError(
            f"total_batch_tokens={params.total_batch_tokens} is no multiple of the {length} tokens of a row of "
            "conversations (model.sequence_len)"
        )


def check_launch(params: Params, launch: Launch, upstream: dict[str, Any]) -> None:
    """What of `launch` cannot work, as check() does. Raises ModelError."""
    if length := row_tokens(upstream):
        check_split(params.total_batch_tokens, length, launch.nproc, launch.device_batch_size)


def row_tokens(upstream: dict[str, Any]) -> int | None:
    """Of the rows that are read; None where a stage of the user's own makes them and does not say."""
    return getattr(upstream.get("rows"), "sequence_len", None)


def load_trainable(job: Job[Params], sequence_len: int, vocab_size: int) -> "GPT":
    """The input model in float32, with the dropout that params ask for."""
    import dataclasses

    from model.saved import load_model, read_config

    folder = job.inputs["model"]
    config = read_config(folder)
    if sequence_len > config.sequence_len:
        raise ModelError(
            f"{job.stage}: the rows have {sequence_len} tokens, more than the model's context of "
            f"{config.sequence_len}; make the rows shorter"
        )
    if config.vocab_size != vocab_size:
        raise ModelError(f"{job.stage}: the model knows {config.vocab_size} tokens, the tokenizer has {vocab_size}")
    if job.params.dropout is not None:
        config = dataclasses.replace(config, dropout=job.params.dropout)
    return load_model(folder, config=config)


def open_validation(job: Job[Params], sequence_len: int) -> "ValidationRows | None":
    from data.tokens.packing import ValidationRows

    tokens = job.inputs.get("tokens")
    return ValidationRows(tokens, sequence_len, job.params.val_tokens) if tokens else None


def estimate(params: Params, upstream: dict[str, Any], device: str, nproc: int) -> float | None:
    """Expected seconds, from how many and how long the conversations usually are; None for a model not of this run, and
    for rows that a stage of the user's own makes.

    upstream: params of what it reads, by input name, and of all stages behind it, by stage name.
    """
    from data.tasks.spec import usual_tokens

    model = next((p.model for p in upstream.values() if hasattr(p, "model")), None)
    mixture = getattr(upstream.get("rows"), "mixture", None)
    if model is None or mixture is None:
        return None
    if params.steps is not None:
        tokens = float(params.steps * params.total_batch_tokens)
    else:
        tokens = params.epochs * usual_tokens(mixture)
    return training_seconds(
        model.resolved(model.vocab_size or upstream["tokenizer"].most_tokens), tokens, device, nproc
    )

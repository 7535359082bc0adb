"""A chat model from a trained one and conversation rows: midtrain and sft, which differ in their data and rates.

Reads   model, rows (render), tokenizer; tokens (tokenize) if val_bpb is to be measured
Writes  model.safetensors, model.json, checkpoints/
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.checks import CountOrOff, Part, Positive
from model.config import TrainConfig
from model.errors import ModelError
from model.training.batch_size import check_split
from pipeline.job import Job, Launch
from pipeline.stage import Inputs, params_of
from pipeline.stages import pretrain, render
from pipeline.stages.training import training_seconds

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


def check(params: Params, inputs: Inputs) -> None:
    """Raises ModelError for a batch that is not a whole number of rows, before anything is trained."""
    rows = params_of(inputs, "rows", render.Params)
    if rows and params.total_batch_tokens % rows.sequence_len:
        raise ModelError(
            f"total_batch_tokens={params.total_batch_tokens} is not a multiple of the {rows.sequence_len} tokens of a "
            "row of conversations (model.sequence_len)"
        )


def check_launch(params: Params, launch: Launch, inputs: Inputs) -> None:
    """Raises ModelError for processes and rows that do not divide a step."""
    if rows := params_of(inputs, "rows", render.Params):
        check_split(params.total_batch_tokens, rows.sequence_len, launch.nproc, launch.device_batch_size)


def estimate(params: Params, launch: Launch, inputs: Inputs) -> float | None:
    """Expected seconds, from how many and how long the conversations usually are; None for a model not of this run, and
    for rows that a stage of the user's own makes."""
    from data.tasks.mixture import usual_tokens

    rows, source = params_of(inputs, "rows", render.Params), inputs.get("model")
    while source and not isinstance(source.params, pretrain.Params):
        source = source.inputs.get("model")
    if source is None or rows is None:
        return None
    if params.steps is not None:
        tokens = float(params.steps * params.total_batch_tokens)
    else:
        tokens = params.epochs * usual_tokens(rows.mixture)
    config = pretrain.expected_model(source.params, source.inputs)
    return training_seconds(config, tokens, launch) if config else None


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

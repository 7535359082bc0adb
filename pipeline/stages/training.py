"""Shared by stages that train: from a model, rows and rates to a trained model in job.out."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import ResolvedConfig, TrainConfig
from pipeline.job import Job, Launch, Stopped

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from data.tokens.packing import BatchOrder, Rows
    from model.distributed import World
    from model.gpt import GPT
    from model.training.checkpoint import Checkpointer
    from model.training.loop import Hooks, Loop, LoopProgress, Pace
    from model.training.prefetch import Batches
    from model.training.resume import Checkpoint
    from model.training.trainer import Progress, Settings


H100_FLOPS, USUAL_MFU = 989e12, 0.45  # of GPUs whose kind is not known while planning


def training_seconds(config: ResolvedConfig, tokens: float, launch: Launch) -> float | None:
    """Expected seconds on launch.nproc H100-like GPUs; None on CPUs, which differ too much."""
    if launch.device != "cuda":
        return None
    return tokens * config.flops_per_token() / (H100_FLOPS * USUAL_MFU * launch.nproc)


@dataclass
class Work:
    """A training job as its stage describes it.

    model: on the CPU, float32, with its first weights. order: rows of a step -> the order in which steps read `rows`.
    steps: the horizon. config: the stage's settings. lr_frac: every rate times this. validation: rows whose bits per
    byte are measured every eval_every steps, and the bytes of each token (vocab,). gentler: the override that halves
    the rates, printed when the loss becomes NaN.
    """

    model: "GPT"
    rows: "Rows"
    order: "Callable[[int], BatchOrder]"
    steps: int
    config: TrainConfig
    validation: "tuple[Rows, Tensor] | None"
    gentler: str
    lr_frac: float = 1.0


def train(job: Job[Any], work: Work) -> dict[str, Any]:
    """Train, evaluate and write model.safetensors, model.json and checkpoints/ into job.out; returns the metrics.

    Raises ModelError for settings that do not fit each other, Diverged, and Stopped after saving.
    """
    from model.distributed import seed_everything, start
    from model.optim.optimiser import Optimizer
    from model.optim.schedule import Schedule, batch_factor
    from model.training.resume import restore
    from model.training.trainer import Progress, Trainer

    world = start(job.rank, job.local_rank, job.world_size, job.launch.device)
    own = find_own_checkpoint(job, world)
    config = work.config
    start_from = own or find_start(job, config.init, work.steps)
    set_up_process(job, own)
    seed_everything(config.seed, world.rank)
    model = work.model.to(world.device)
    factor = work.lr_frac * batch_factor(config.schedule, config.total_batch_tokens)
    optimizer = Optimizer(model, config.optim, model.config.width, world, factor)
    settings = make_settings(job, work, world, own)  # after the optimiser, whose memory counts for what fits
    progress = Progress()
    if start_from:
        restore(start_from, model, optimizer, world)
        progress = Progress(**start_from.progress)
    if job.launch.compile:
        model.use_compiler()
    trainer = Trainer(
        model,
        optimizer,
        Schedule(config.schedule, work.steps),
        make_batches(work, settings, world),
        settings,
        world,
        make_hooks(job, work, model, settings, world),
        make_saver(job, model, settings.micro_batch, world, own),
    )
    run(trainer, progress, job, work.gentler)
    if world.is_main:
        write_model(job.out, model)
    world.close()
    return describe(work, model, progress, settings, trainer.peak)


def find_own_checkpoint(job: Job[Any], world: "World") -> "Checkpoint | None":
    """The checkpoint of this work to resume from, as launch.resume says; later measurements are dropped."""
    from model.errors import ModelError
    from model.training.checkpoint import folder_of, remove, steps_in
    from model.training.resume import find

    folder = job.out / "checkpoints"
    wanted = job.launch.resume
    wanted = wanted if wanted in ("latest", "never") else int(wanted)
    own = find(folder, wanted, world, job.say)
    if own and own.about["key"] != job.key:
        raise ModelError(f"{folder} belongs to other work, with the key {own.about['key']}: move it away")
    at = own.step if own else -1
    if world.is_main:
        for step in steps_in(folder):
            if step > at:
                remove(folder_of(folder, step))
        job.rewind(at - 1)
    if own:
        job.say(f"continues from the checkpoint of step {own.step}")
    return own


def find_start(job: Job[Any], init: str | None, steps: int) -> "Checkpoint | None":
    """The checkpoint that params.init names, of a published run of the same module or of one that did not finish.

    Raises ModelError when there is none, or it does not lie before the end.
    """
    from model.errors import ModelError
    from model.training.checkpoint import folder_of, steps_in
    from model.training.resume import Checkpoint, damage_of, read_about

    if init is None:
        return None
    module = type(job.params).__module__.rpartition(".")[2]
    key, _, step = init.partition("@")
    folders = [job.store / "artifacts" / module / key, job.store / "work" / f"{module}-{key}" / "out"]
    there = [(folder / "checkpoints", n) for folder in folders for n in steps_in(folder / "checkpoints")]
    folder = next((folder for folder, n in there if str(n) == step), None)
    if folder is None:
        known = ", ".join(str(n) for _, n in there) or "none"
        raise ModelError(f"{job.stage}.params.init={init}: no such KEY@STEP; steps of that key: {known}")
    if int(step) >= steps:
        raise ModelError(f"{job.stage}.params.init={init} is not before the end, step {steps}: train for more steps")
    checkpoint = folder_of(folder, int(step))
    if damage := damage_of(checkpoint):
        raise ModelError(f"{job.stage}.params.init={init} is damaged: {damage}")
    return Checkpoint(checkpoint, read_about(checkpoint))


def set_up_process(job: Job[Any], own: "Checkpoint | None") -> None:
    """Set threads (as many as before the resume, unless launch.threads says otherwise), determinism and memory."""
    import torch

    from model.device import keep_freed_memory

    before = own.conditions["threads"] if own and own.conditions["world_size"] == job.world_size else None
    torch.set_num_threads(job.launch.threads or before or max(1, len(os.sched_getaffinity(0)) // job.world_size))
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if job.launch.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to repeat its sums
        torch.use_deterministic_algorithms(True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def make_settings(job: Job[Any], work: Work, world: "World", own: "Checkpoint | None") -> "Settings":
    """Decide what is left open, compute dtype and micro-batch, and tell the model."""
    from model.attention import choose_backend
    from model.kernels.fp8 import has_units
    from model.precision import resolve_dtype
    from model.training.batch_size import micro_batch, rows_per_process
    from model.training.trainer import Settings
    from pipeline.numbers import plural

    launch, model, length = job.launch, work.model, work.rows.sequence_len
    dtype = model.compute_dtype = resolve_dtype(work.config.dtype, world.device)
    model.grad_checkpoint = launch.grad_checkpoint
    if work.config.fp8:
        model.use_fp8()
        emulated = "" if has_units(world.device) else " (emulated: this device has no FP8 hardware)"
        job.say(f"GEMMs of the blocks in 8 bits{emulated}")
    config = dataclasses.replace(model.config, sequence_len=length)
    model.attention_backend, why = choose_backend(world.device, dtype, config.windows(), length)
    rows = rows_per_process(work.config.total_batch_tokens, length, world.size)
    wanted = launch.device_batch_size
    if wanted == "auto" and own and rows % own.conditions["micro_batch"] == 0:
        wanted = own.conditions["micro_batch"]
    size = micro_batch(wanted, rows, length, model, world)
    split = f"{size} rows x {length} tokens x {plural(world.size, 'process')} x {rows // size} passes"
    job.say(f"{work.steps} steps of {work.config.total_batch_tokens} tokens: {split}, {dtype}".replace("torch.", ""))
    job.say(f"attention: {model.attention_backend} ({why})")
    return Settings(
        config=work.config,
        pace=make_pace(job, work.steps, work.config.eval_every),
        micro_batch=size,
        rows=rows,
        dtype=dtype,
        epoch_rows=len(work.rows),
        vocab_size=config.vocab_size,
        flops_per_token=config.flops_per_token(),
    )


def make_pace(job: Job[Any], steps: int, eval_every: int | None) -> "Pace":
    from model.training.loop import Pace

    launch, trace = job.launch, job.out / "profile" if job.launch.profile else None
    return Pace(steps, eval_every, launch.log_every, launch.save_every, launch.save_minutes, trace)


def make_saver(
    job: Job[Any], model: "GPT", micro_batch: int, world: "World", own: "Checkpoint | None"
) -> "Checkpointer":
    """The checkpointer. It notes the conditions under which a resume is exact, and the log names those that changed."""
    import torch

    from model.kernels import matmul
    from model.training.checkpoint import Checkpointer, Keep

    keep = Keep(job.launch.keep_last, job.launch.keep_every)
    saver = Checkpointer(job.out / "checkpoints", world, job.key, keep, job.say)
    cuda = world.device.type == "cuda"
    saver.conditions = {
        "world_size": world.size,
        "micro_batch": micro_batch,
        "threads": torch.get_num_threads(),
        "dtype": str(model.compute_dtype),
        "device": torch.cuda.get_device_name(world.device) if cuda else world.device.type,
        "gemm": "torch's" if cuda or not matmul.available() else "oneDNN's",
        "attention": model.attention_backend,
        "torch": torch.__version__,
        "compile": job.launch.compile,
        "deterministic": job.launch.deterministic,
    }
    if own:
        saver.last_step = own.step
        changed = [
            f"{n} {own.conditions.get(n)} -> {v}" for n, v in saver.conditions.items() if own.conditions.get(n) != v
        ]
        if changed:
            job.say(f"matches an uninterrupted run only up to rounding: {', '.join(changed)}")
    return saver


def make_batches(work: Work, settings: "Settings", world: "World") -> "Batches":
    """A function from the step to this rank's part of its rows."""
    import torch

    order = work.order(settings.rows * world.size)

    def batch(step: int) -> "tuple[Tensor, Tensor]":
        mine = order.step_rows(step)[world.rank * settings.rows : (world.rank + 1) * settings.rows]
        tokens, targets = work.rows.gather(mine)
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    return batch


def make_hooks(job: Job[Any], work: Work, model: "GPT", settings: "Settings", world: "World") -> "Hooks":
    from model.training.loop import Hooks

    def evaluate() -> dict[str, float]:
        assert work.validation is not None
        return {"val_bpb": validation_bpb(model, *work.validation, settings.micro_batch, world)}

    return Hooks(job.log, job.progress, job.say, lambda: job.should_stop, evaluate if work.validation else None)


def validation_bpb(model: "GPT", rows: "Rows", token_bytes: "Tensor", batch_rows: int, world: "World") -> float:
    """Bits per byte of all rows, each rank measuring its share; every rank gets the same number."""
    import numpy as np
    import torch

    from data.tokens.packing import in_order
    from evals.metrics import bits_per_byte, nats_and_bytes

    def on_device(array: "np.ndarray", filler: int) -> "Tensor":  # padded, so that a compiled model sees one shape
        padded = np.pad(array, ((0, batch_rows - len(array)), (0, 0)), constant_values=filler)
        return torch.from_numpy(padded).to(world.device)

    arrays = in_order(rows, batch_rows, world.rank, world.size)
    batches = ((on_device(tokens, 0), on_device(targets, -1)) for tokens, targets in arrays)
    nats, count = world.sum_floats(list(nats_and_bytes(model, batches, token_bytes.to(world.device))))
    return bits_per_byte(nats, int(count))


def run(loop: "Loop", progress: "LoopProgress", job: Job[Any], gentler: str) -> None:
    """Raises Stopped, and Diverged with the overrides that continue from the last good checkpoint at half the rate."""
    from model.errors import Diverged

    try:
        if not loop.run(progress):
            raise Stopped(f"checkpoint at step {loop.saver.last_step} of {loop.pace.steps}")
    except Diverged as error:
        saved = loop.saver.last_step
        branch = f"{job.stage}.params.init={job.key}@{saved} " if saved is not None else ""
        raise Diverged(f"{error}. With half the rate: {branch}{gentler}") from error


def write_model(folder: Path, model: "GPT") -> None:
    """model.safetensors appears whole or not at all; model.json holds its config."""
    from safetensors.torch import save_file

    from model.saved import write_config
    from model.training.checkpoint import to_host

    save_file(to_host(model.state_dict()), folder / "model.tmp")
    os.replace(folder / "model.tmp", folder / "model.safetensors")
    write_config(model.config, folder)


def describe(work: Work, model: "GPT", progress: "Progress", settings: "Settings", peak: float) -> dict[str, Any]:
    """The metrics of the artifact. tok_s and mfu are over all training steps, without saving and evaluating."""
    rate = work.steps * work.config.total_batch_tokens / max(progress.seconds, 1e-9)
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "loss": progress.loss,
        **progress.evaluated,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "tok_s": rate,
        "mfu": rate * settings.flops_per_token / peak,
        "train_seconds": progress.seconds,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "empty_steps": progress.empty,
        "dropped_steps": progress.dropped,
    }

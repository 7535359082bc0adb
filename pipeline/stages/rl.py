"""Reinforcement learning on problems that grade themselves: the model answers, and learns from its better answers.

Reads   model (sft), tokenizer, the data sets of tasks
Writes  model.safetensors, model.json, checkpoints/, rollouts.jsonl (some answers of each step
        and, marked held_out, of each evaluation)
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data.tasks.mixture import TaskSpec
from model.checks import Amount, Count, CountOrOff, Dtype, Natural, Positive, PositiveOrOff, Seed
from model.config import OptimConfig, ScheduleConfig
from model.errors import ModelError
from pipeline.job import Job, Launch
from pipeline.stage import Inputs
from pipeline.stages.programs import Programs, open_sandbox, without_programs

if TYPE_CHECKING:
    from model.distributed import World
    from model.training.policy_trainer import PolicyTrainer
    from model.training.resume import Checkpoint
    from pipeline.stages.rollout_worker import Problem

RANKS = True


@dataclass
class Params:
    tasks: list[TaskSpec] = field(default_factory=list)  # to train on; each must be graded, not multiple choice
    eval_tasks: list[TaskSpec] = field(default_factory=list)  # held-out problems for the curve
    eval_items: Count = 400  # the first so many of each
    eval_every: CountOrOff = 60  # steps; the start and the end are always measured
    problems: Count = 16  # of one step
    samples: Count = 16  # answers to each problem: a group
    steps: Count | None = None  # null: epochs
    epochs: Positive = 1.0  # of all problems
    temperature: Positive = 1.0  # of rollouts; what is trained is the model at this temperature
    top_k: CountOrOff = 50
    max_new_tokens: Count = 256  # of an answer
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmdown_frac=1.0))
    lr_frac: Positive = 0.05  # every rate of optim times this
    divide_by_std: bool = False  # advantage (r - mean) / std instead of r - mean
    kl: Amount = 0.0  # weight of the divergence from the model it started with
    clip: PositiveOrOff = None  # of the probability ratio; matters with several updates a step
    updates: Count = 1  # of the optimiser on the rollouts of one step, each on a part of the groups
    grad_clip: PositiveOrOff = None  # norm of the global gradients; null: off
    programs: Programs = "run"  # skip: leave out tasks that run programs which the model wrote
    advisory: bool = False  # train also on tasks whose programs report their own verdicts (Task.advisory)
    seed: Seed = 0
    dtype: Dtype = "auto"  # of the computations; auto: bfloat16 on GPUs that have it, else float32
    keep: Natural = 2  # rollouts of each step, and answers to each held-out task at each evaluation, in rollouts.jsonl
    init: str | None = None  # KEY@STEP: continue from a checkpoint of another run of this stage


def main(job: Job[Params]) -> dict[str, Any]:
    """Raises UserError where the programs of a task cannot be confined, DataError for tasks that cannot be used,
    ModelError, Diverged, Stopped after saving."""
    from model.distributed import seed_everything, start
    from model.training.policy_trainer import PolicyProgress
    from model.training.resume import restore
    from pipeline.stages.rollout_worker import drop_rollouts
    from pipeline.stages.training import find_own_checkpoint, find_start, run, set_up_process, write_model

    params = job.params
    world = start(job.rank, job.local_rank, job.world_size, job.launch.device)
    own = find_own_checkpoint(job, world)
    set_up_process(job, own)
    seed_everything(params.seed, world.rank)
    trainer, progress = set_up(job, world, own), PolicyProgress()
    if start_from := own or find_start(job, params.init, trainer.pace.steps):
        restore(start_from, trainer.model, trainer.optimizer, world)
        progress = PolicyProgress(**start_from.progress)
    if world.is_main:
        drop_rollouts(job.out, progress.step)
    run(trainer, progress, job, f"{job.stage}.params.lr_frac={params.lr_frac / 2:g}")
    if world.is_main:
        write_model(job.out, trainer.model)
    world.close()
    shown = ("reward", "pass@1", f"pass@{params.samples}", "response_tokens", "entropy", "kl")
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "skipped_groups": progress.skipped,
        **{name: progress.record[name] for name in shown if name in progress.record},
        **accuracies(progress.evaluated),
        "train_seconds": progress.seconds,
    }


def accuracies(measured: dict[str, Any]) -> dict[str, Any]:
    """Without the bounds of their intervals."""
    return {name: value for name, value in measured.items() if not name.startswith(("eval_low/", "eval_high/"))}


def check(params: Params, inputs: Inputs) -> None:
    """Raises DataMistake where all tasks would be left out."""
    from data.errors import DataMistake

    tasks, left_out = without_programs(params.tasks, params.programs)
    if left_out and not tasks:
        raise DataMistake(
            f"rl has no task to train on: programs=skip leaves out {', '.join(left_out)}. Add another task, or set "
            "rl.params.programs=run"
        )
    if tasks and not params.advisory and all(spec.advisory for spec in tasks):
        names = ", ".join(spec.label for spec in tasks)
        raise DataMistake(
            f"rl has no task to train on: programs of {names} report their own verdicts, which a model would learn to "
            "forge. Add another task, or set rl.params.advisory=true"
        )


def check_launch(params: Params, launch: Launch, inputs: Inputs) -> None:
    """Raises ModelError for processes that would have nothing to do. Any number up to the problems of a step works, and
    any launch.device_batch_size."""
    if launch.nproc > params.problems:
        raise ModelError(
            f"launch.nproc={launch.nproc} processes cannot share the {params.problems} problems of a step "
            f"(params.problems); use at most {params.problems}"
        )


def set_up(job: Job[Params], world: "World", own: "Checkpoint | None") -> "PolicyTrainer":
    """The trainer with the model that it starts from, and a worker that generates with the very weights it trains."""
    from data.chat.calculator import calculate
    from data.tokens.tokenizer import Tokenizer
    from model.decoding.engine import Engine, rows_that_fit
    from model.optim.optimiser import Optimizer
    from model.optim.schedule import Schedule
    from model.precision import resolve_dtype
    from model.saved import load_model
    from model.training.loop import Hooks
    from model.training.policy import Objective
    from model.training.policy_trainer import PolicySettings, PolicyTrainer
    from pipeline.stages.rollout_worker import RolloutWorker
    from pipeline.stages.training import make_pace, make_saver

    params = job.params
    sandbox = open_sandbox(job, [*chosen(job, params.tasks), *chosen(job, params.eval_tasks)])
    model = load_model(job.inputs["model"]).to(world.device)
    model.compute_dtype = resolve_dtype(params.dtype, world.device)
    model.grad_checkpoint = job.launch.grad_checkpoint
    problems = load_problems(job, params.tasks)
    held_out = load_problems(job, params.eval_tasks, params.eval_items)
    steps = params.steps or max(1, round(params.epochs * len(problems) / params.problems))

    tok = Tokenizer.load(job.inputs["tokenizer"])
    rows = params.problems * params.samples
    if world.device.type == "cuda":
        rows = min(rows, rows_that_fit(model))
    engine = Engine(model, tok.special, tok.decode_bytes, tok.encode, calculate, rows)
    worker = RolloutWorker(job, world, engine, tok, sandbox, problems, held_out)

    rows_per_pass = job.launch.device_batch_size
    if rows_per_pass == "auto":
        batch_tokens = 4_096 if world.device.type == "cpu" else 16_384
    else:
        batch_tokens = int(rows_per_pass) * model.config.sequence_len
    objective = Objective(params.clip, params.kl)
    settings = PolicySettings(
        params.problems, params.samples, params.updates, params.temperature, objective, params.grad_clip, batch_tokens
    )

    def show(done: int, total: int, **shown: Any) -> None:
        job.progress(done, total, **accuracies(shown))

    trainer = PolicyTrainer(
        model,
        Optimizer(model, params.optim, model.config.width, world, params.lr_frac),
        Schedule(params.schedule, steps),
        worker,
        settings,
        make_pace(job, steps, params.eval_every),
        world,
        Hooks(job.log, show, job.say, lambda: job.should_stop),
        make_saver(job, model, batch_tokens, world, own),
    )
    if held_out:
        trainer.hooks.evaluate = lambda: worker.evaluate(trainer.progress.step)
    return trainer


def chosen(job: Job[Params], specs: list[TaskSpec]) -> list[TaskSpec]:
    """The tasks without those that params leave out."""
    specs, _ = without_programs(specs, job.params.programs)
    return [spec for spec in specs if job.params.advisory or not spec.advisory]


def load_problems(job: Job[Params], specs: list[TaskSpec], limit: int | None = None) -> "list[Problem]":
    """All items of the chosen tasks, each as often as its task is repeated; the others are named in the log.

    Raises DataError for tasks without grades.
    """
    from data.errors import DataMistake
    from data.tasks.mixture import load_tasks
    from pipeline.stages.rollout_worker import Problem

    problems = []
    used = chosen(job, specs)
    for spec in specs:
        if spec in used:
            continue
        if job.params.programs == "skip":
            job.say(f"{spec.label} is left out, because {job.stage}.params.programs=skip")
        else:
            job.say(
                f"{spec.label} is left out: its programs report their own verdicts. To train on it, set "
                f"{job.stage}.params.advisory=true"
            )
    for spec, task in zip(used, load_tasks(used, lambda name: job.inputs[f"dataset/{name}"])):
        if task.kind != "generate":
            raise DataMistake(
                f"{job.stage}: {spec.label} is multiple choice; rl trains on tasks that are answered in text"
            )
        items = range(min(len(task), limit or len(task)))
        problems += [Problem(task, spec.label, item) for _ in range(spec.repeat) for item in items]
    if not problems and limit is None:
        raise DataMistake(
            f"{job.stage}: there is nothing to train on; name at least one task in {job.stage}.params.tasks"
        )
    return problems

"""The loop itself, with batches made up on the spot."""

import gc
import math
import threading
from dataclasses import asdict, fields

import pytest
import torch
from small import ALONE, CPU, batch, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import OptimConfig, ScheduleConfig, TrainConfig
from model.device import choose_device
from model.errors import Diverged, ModelError
from model.optim.optimiser import Optimizer
from model.optim.schedule import Schedule
from model.precision import LossScale, resolve_dtype
from model.training.batch_size import micro_batch, rows_per_pass, rows_per_process
from model.training.checkpoint import Checkpointer, Keep, steps_in
from model.training.loop import Hooks, Pace
from model.training.prefetch import Prefetcher
from model.training.spikes import NormGuard
from model.training.trainer import Progress, Settings, Trainer


def batches(step):
    return batch(rows=4, seed=step)


class Session:
    """A trainer, and everything that it says."""

    def __init__(
        self,
        folder,
        batches=batches,
        evaluate=None,
        stop=lambda: False,
        compile=False,
        optim=None,
        schedule=None,
        **settings,
    ):
        self.logged, self.words, self.events = [], [], []
        self.model = small_model()
        if compile:
            self.model.use_compiler()
        optimizer = Optimizer(self.model, optim or OptimConfig(), 32, ALONE)
        values = {
            "steps": 6,
            "log_every": 2,
            "rows": 4,
            "micro_batch": 2,
            "dtype": torch.float32,
            "flops_per_token": 1.0,
        }
        values |= {"eval_every": None} | settings
        pace, config, own = (
            {f.name: values[f.name] for f in fields(cls) if f.name in values} for cls in (Pace, TrainConfig, Settings)
        )
        self.settings = Settings(TrainConfig(**config), Pace(**pace), **own)
        self.saver = Checkpointer(folder, ALONE, "key", Keep(), self.words.append)
        hooks = Hooks(self.log, lambda *_, **__: None, self.words.append, stop, evaluate and self.evaluated(evaluate))
        schedule = Schedule(schedule or ScheduleConfig(), self.settings.pace.steps)
        self.trainer = Trainer(self.model, optimizer, schedule, batches, self.settings, ALONE, hooks, self.saver)
        self.progress = Progress()

    def log(self, step, **metrics):
        self.logged.append((step, metrics))
        self.events.append(("log", step, *sorted(set(metrics) & {"loss", "bpb"})))

    def evaluated(self, evaluate):
        def measure():
            self.saver.wait()
            self.events.append(("evaluate", max(steps_in(self.saver.folder), default=0)))
            return evaluate()

        return measure

    def run(self):
        return self.trainer.run(self.progress)


def masked(steps):
    """Batches whose targets are all masked in the given steps."""

    def make(step):
        tokens, targets = batches(step)
        return tokens, torch.full_like(targets, -1) if step in steps else targets

    return make


def test_gradients_do_not_depend_on_how_a_batch_is_split_and_masked_targets_count_for_nothing(tmp_path):
    def half_masked(step):
        tokens, targets = batches(step)
        targets[0, :] = targets[2, 5:] = -1
        return tokens, targets

    split, whole = (Session(tmp_path / str(n), half_masked, micro_batch=n) for n in (1, 4))
    assert split.run() and whole.run()
    for (_, one), (_, other) in zip(split.logged, whole.logged):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert split.progress.tokens == 6 * (24 + 24 + 5)


def test_a_step_with_nothing_to_train_on_is_skipped_and_counted(tmp_path):
    session = Session(tmp_path, masked({1, 3}))
    assert session.run() and session.progress.empty == 2
    assert all(weight.isfinite().all() for weight in session.model.parameters())
    assert "step 2 had no target" in session.words[0]


def test_steps_with_nothing_to_train_on_are_no_loss_of_zero_and_no_reason_to_see_a_jump_after_them(tmp_path):
    session = Session(tmp_path, masked(range(12, 34)), steps=40, log_every=1)
    assert session.run() and [step for step, _ in session.logged] == [*range(1, 13), *range(35, 41)]
    assert all(metrics["loss"] > 3 for _, metrics in session.logged)


def test_each_step_is_logged_then_saved_then_evaluated(tmp_path):
    session = Session(tmp_path, evaluate=lambda: {"bpb": 1.0}, eval_every=4, save_every=4)
    session.run()
    assert session.events == [
        ("log", 2, "loss"),
        ("log", 4, "loss"),
        ("evaluate", 4),
        ("log", 4, "bpb"),
        ("log", 6, "loss"),
        ("evaluate", 6),
        ("log", 6, "bpb"),
    ]
    assert steps_in(tmp_path) == [4, 6]


def test_the_model_is_evaluated_in_eval_mode_and_trained_in_training_mode(tmp_path):
    seen = []
    session = Session(tmp_path, evaluate=lambda: seen.append(session.model.training) or {}, eval_every=2)
    session.run()
    assert seen == [False] * 3 and session.model.training


def test_a_stop_is_obeyed_before_the_next_step_and_saves(tmp_path):
    session = Session(tmp_path, stop=lambda: session.progress.step >= 3)
    assert not session.run()
    assert session.progress.step == 3 and steps_in(tmp_path) == [3]


def test_time_alone_can_make_a_checkpoint_due(tmp_path):
    session = Session(tmp_path, save_minutes=-1.0)
    session.run()
    assert steps_in(tmp_path) == [5, 6]


def test_a_model_without_gradients_is_stopped_with_what_was_seen(tmp_path):
    session = Session(tmp_path, steps=80, log_every=10)
    loss = session.model.loss
    session.model.loss = lambda *batch: loss(*batch) * 0 + 3.0
    with pytest.raises(
        ModelError, match=r"gradient norm has been exactly 0 from step 10 to 60 \(loss .*, highest rate 0\.\d+"
    ):
        session.run()
    assert session.progress.step == 60


def test_a_loss_that_stays_that_of_guessing_is_stopped_after_warm_up_alone(tmp_path):
    vocab = small_model().config.vocab_size
    still = {"optim": OptimConfig(init_lr_frac=1e-12), "log_every": 10, "vocab_size": vocab}
    stopped, warming = (
        Session(tmp_path / str(warm), steps=80, schedule=ScheduleConfig(warmup_steps=warm), **still) for warm in (0, 70)
    )
    for session in (stopped, warming):
        session.model.lm_head.weight.data.zero_()
    with pytest.raises(ModelError, match=rf"ln\({vocab}\), that of guessing, from step 10 to 60 .*until step 0"):
        stopped.run()
    assert warming.run()


def test_a_resumed_run_has_not_forgotten_since_when_it_stands_still(tmp_path):
    session = Session(tmp_path, steps=80, log_every=10, stop=lambda: session.progress.step >= 40)
    session.model.loss = lambda tokens, targets: session.model.lm_head.weight.sum() * 0 + 1
    assert not session.run()
    again = Session(tmp_path, steps=80, log_every=10)
    again.model.loss = lambda tokens, targets: again.model.lm_head.weight.sum() * 0 + 1
    again.progress = Progress(**(asdict(session.progress)))
    with pytest.raises(ModelError, match="from step 10 to 60"):
        again.run()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batches": "masked"},
        {"optim": OptimConfig(matrix_lr=0, embedding_lr=0, unembedding_lr=0, scalar_lr=0)},
        {"optim": OptimConfig(name="sgd", matrix_lr=0.1, embedding_lr=0.1, unembedding_lr=0.1)},
    ],
    ids=["learns", "rows that are masked", "rates of 0", "sgd"],
)
def test_runs_that_may_stand_still_or_learn_are_not_stopped(tmp_path, settings):
    if settings.get("batches"):
        settings = {"batches": masked(set(range(60)))}
    vocab = small_model().config.vocab_size
    assert Session(tmp_path, steps=70, log_every=1, vocab_size=vocab, **settings).run()


def test_a_model_that_has_learnt_everything_is_not_stopped(tmp_path):
    session = Session(tmp_path, steps=70, log_every=1)
    session.model.loss = lambda tokens, targets: session.model.lm_head.weight.sum() * 0
    assert session.run()


def test_a_loss_that_is_no_number_is_found_at_the_next_logged_step(tmp_path):
    def poisoned(step):
        if step == 2:
            session.model.lm_head.weight.data.fill_(math.nan)
        return batches(step)

    session = Session(tmp_path, poisoned, save_every=1)
    with pytest.raises(Diverged, match=r"nan at step \d; (the last good checkpoint is of step|there is no checkpoint)"):
        session.run()
    assert all(math.isfinite(metrics["loss"]) for _, metrics in session.logged)


def test_a_loss_that_jumps_ends_the_run_before_it_is_saved(tmp_path):
    def shaken(step):
        if step == 14:
            session.model.embed_tokens.weight.data.neg_()
            session.model.lm_head.weight.data.mul_(50).neg_()
        return batches(0)

    session = Session(tmp_path, shaken, steps=30, log_every=1, save_every=1)
    with pytest.raises(Diverged, match=r"the loss jumped from about \S+ to \S+ at step 1\d; the last good"):
        session.run()
    assert session.logged[-1][0] == steps_in(tmp_path)[-1] < 17


def test_steps_with_gradients_far_above_the_usual_are_dropped_and_counted(tmp_path):
    def shaken(step):
        """One batch whose gradients are large: all of it is one token that is never right."""
        tokens, targets = batches(step % 3)
        return (torch.zeros_like(tokens), torch.full_like(targets, 60)) if step == 24 else (tokens, targets)

    runs = [Session(tmp_path / str(n), shaken, steps=28, skip_spikes=factor) for n, factor in enumerate([1.2, None])]
    for session in runs:
        session.run()
    assert runs[0].progress.dropped >= 1 and any("step 25 was dropped" in word for word in runs[0].words)
    assert runs[1].progress.dropped == 0 and not torch.equal(*(r.model.lm_head.weight for r in runs))
    assert runs[0].progress.norm_count == 28


def test_a_lasting_change_of_gradients_is_followed_in_the_end():
    guard = NormGuard(2.0)
    for _ in range(50):
        guard.note(1.0)
    for norm in (math.nan, math.inf):
        guard.note(norm)
    assert guard.limit() == 2.0
    for _ in range(200):
        guard.note(10.0)
    assert guard.limit() > 10.0


def test_an_error_of_the_data_comes_out_of_the_loop_and_no_thread_stays(tmp_path):
    def broken(step):
        if step == 3:
            raise OSError("shard is gone")
        return batches(step)

    with pytest.raises(OSError, match="shard is gone"):
        Session(tmp_path, broken).run()
    assert not [t for t in threading.enumerate() if t.name == "prefetcher"]


def test_batches_come_in_order_and_a_prefetcher_can_be_closed_in_the_middle():
    prefetcher = Prefetcher(lambda step: (torch.full((2, 3), step), torch.full((2, 3), step)), 5, 500, 1, CPU)
    assert [int(prefetcher.next().tokens[0, 0]) for _ in range(4)] == [5, 6, 7, 8]
    prefetcher.close()
    assert not prefetcher.thread.is_alive()


class HostReads(TorchDispatchMode):
    """The finished steps at which the program read a number from a tensor: where a GPU would be waited for."""

    READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)

    def __init__(self, progress):
        super().__init__()
        self.progress, self.steps = progress, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.READS:
            self.steps.add(self.progress.step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("skip_spikes, steps", [(None, {3, 6, 7}), (1e9, set(range(8)))])
def test_the_device_is_waited_for_where_a_step_is_logged_and_where_steps_can_be_dropped(tmp_path, skip_spikes, steps):
    session = Session(tmp_path, steps=7, log_every=3, skip_spikes=skip_spikes)
    with HostReads(session.progress) as reads:
        session.run()
    assert reads.steps == steps


def test_no_garbage_collection_falls_into_a_step(tmp_path):
    session, seen = Session(tmp_path), []
    session.trainer.hooks.progress = lambda *_, **__: seen.append(gc.isenabled())
    session.run()
    assert seen == [False] * 6 and gc.isenabled()


def test_in_float16_a_scale_that_overflows_drops_steps_and_halves_and_a_small_one_changes_nothing(tmp_path):
    runs = {}
    for scale in (1.0, 16.0, 2.0**60):
        session = runs[scale] = Session(tmp_path / str(scale), dtype=torch.float16)
        session.model.compute_dtype = torch.float16
        session.start = session.model.lm_head.weight.detach().clone()
        session.progress.loss_scale = scale
        session.run()
    plain, scaled, overflowing = runs.values()
    assert overflowing.progress.dropped == 6 and overflowing.progress.loss_scale == 2.0**54
    assert torch.equal(overflowing.model.lm_head.weight, overflowing.start)
    assert scaled.progress.dropped == 0 and scaled.progress.loss_scale == 16.0
    moved, apart = plain.model.lm_head.weight - plain.start, scaled.model.lm_head.weight - plain.model.lm_head.weight
    assert float(apart.detach().norm()) < 0.02 * float(moved.detach().norm())


@pytest.mark.full
def test_compiled_training_is_eager_training_and_compiles_once(tmp_path):
    """Once for training and once for evaluating, of which each is done several times, in turns."""
    torch._dynamo.reset()
    counters, graphs = torch._dynamo.utils.counters, []

    def session(compile):
        @torch.inference_mode()
        def evaluate():
            graphs.append(counters["stats"]["unique_graphs"])
            return {"nats": float(made.model.loss(*batches(0)))}

        made = Session(tmp_path / str(compile), evaluate=evaluate, eval_every=2, compile=compile)
        return made

    eager, compiled = session(False), session(True)
    try:
        eager.run()
        counters.clear()
        graphs.clear()
        compiled.run()
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"needs a C++ compiler: {str(error).splitlines()[0]}")
    # The model alone; on CPUs not the loss.
    assert graphs == [1, 2, 2] and counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    for (_, one), (_, other) in zip(eager.logged, compiled.logged, strict=True):
        for name in set(one) & {"loss", "nats"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3)


def test_micro_batches_divide_the_rows_of_a_process():
    model = small_model()
    assert micro_batch(4, 16, 24, model, ALONE) == 4
    assert micro_batch("auto", 12, 1024, model, ALONE) in (1, 2, 3, 4, 6, 12)
    assert micro_batch("auto", 7, 1 << 20, model, ALONE) == 1
    with pytest.raises(ModelError, match=r"device_batch_size=3 .* 1, 2, 4, 8, 16"):
        micro_batch(3, 16, 24, model, ALONE)


def test_more_rows_a_pass_than_a_process_has_are_all_of_them():
    """So that one setting for all stages, as against running out of memory, does for those with small batches too."""
    assert rows_per_pass(8, 4) == 4 and rows_per_pass(8, 16) == 8


def test_the_batch_is_shared_out_over_processes_or_refused():
    assert rows_per_process(512, 32, 2) == 8
    with pytest.raises(ModelError, match=r"nproc=3 .* 14 rows .*; use 2 or 7"):
        rows_per_process(32 * 14, 32, 3)
    with pytest.raises(ModelError, match=r"nproc=8 .*; use 7$"):
        rows_per_process(32 * 7, 32, 8)
    with pytest.raises(ModelError, match="nearest that is: 32"):
        rows_per_process(10, 32, 2)


def test_devices_and_dtypes_are_found_or_refused():
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ModelError, match=r"launch\.device=tpu"):
        choose_device("tpu")
    assert resolve_dtype("auto", CPU) == torch.float32 and resolve_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ModelError, match="not one of auto"):
        resolve_dtype("int4", CPU)


def test_the_loss_scale_halves_on_overflow_and_doubles_after_patience():
    scale = LossScale(torch.float16)
    scale.update(finite=False)
    assert scale.value == 0.5
    for _ in range(LossScale.patience):
        scale.update(finite=True)
    assert scale.value == 1.0 and not LossScale(torch.bfloat16).active

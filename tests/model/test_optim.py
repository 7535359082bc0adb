"""The optimiser against plain references, and against itself on other numbers of processes."""

import math
import subprocess
import sys
from collections import Counter
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small import ALONE, batch, small_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import GPTConfig, OptimConfig
from model.distributed import World
from model.errors import ModelError
from model.gpt import GPT
from model.optim import optimiser, rules
from model.optim.optimiser import Optimizer, kind_of, learning_rate
from model.optim.rules import POLAR_EXPRESS, orthogonalise, quintics
from model.optim.schedule import Rates

ROOT = Path(__file__).resolve().parents[2]
RATES = Rates(lr=1.0, momentum=0.9, weight_decay=1.0)
ADAM = {"embedding", "unembedding", "value_embedding", "scalar", "residual"}


def reference_step(parameters, gradients, state, config, step):
    """Muon and AdamW as published, one matrix after the other, in float64."""
    for name, p in parameters.items():
        g, kind = gradients[name], kind_of(name, p)
        lr = learning_rate(kind, config, 32) * RATES.lr
        if kind in ADAM:
            m, v = state.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
            m.mul_(0.8).add_(0.2 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            p -= lr * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + config.eps)
            continue
        m, v = state.setdefault(name, (torch.zeros_like(p), torch.zeros(1, dtype=p.dtype)))
        m.mul_(RATES.momentum).add_((1 - RATES.momentum) * g)
        x = (1 - RATES.momentum) * g + RATES.momentum * m
        x = x / (x.norm() * 1.02)
        for a, b, c in POLAR_EXPRESS:
            x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
        if config.normuon:
            v = state[name][1] * config.normuon_beta2 + (1 - config.normuon_beta2) * x.square().mean(
                1 if len(x) >= len(x.T) else 0, keepdim=True
            )
            state[name] = m, v
            x = x / v.sqrt() * x.norm() / (x / v.sqrt()).norm()
        lr *= math.sqrt(max(1, p.size(0) / p.size(1)))
        shrinks = (x * p >= 0) if config.cautious else torch.ones_like(p)
        p -= lr * config.weight_decay * p * shrinks + lr * x


def gradients_of(model, step):
    """Each parameter's, drawn from the step; the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, generator=generator).to(p.dtype) for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"normuon": True}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "cautious": True}],
    ids=["plain", "normuon", "decay", "cautious"],
)
def test_twenty_steps_are_those_of_the_reference(settings):
    model = small_model(depth=3, arch="modern").double()
    config = OptimConfig(orthogonal_dtype="float64", **settings)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, state = Optimizer(model, config, 32, ALONE), {}
    for step in range(1, 21):
        gradients = gradients_of(model, step)
        for name, p in model.named_parameters():
            p.grad += gradients[name]
        optimizer.step(RATES)
        reference_step(expected, gradients, state, config, step)
    for name, p in model.named_parameters():
        assert float((p.detach() - expected[name]).norm() / expected[name].norm()) < 1e-9, name


def test_adamw_is_torchs_to_the_bit():
    ours, theirs = small_model(), small_model()
    config = OptimConfig(name="adamw", weight_decay=0.1, matrix_lr=1e-3, width_ref=None)
    optimizer = Optimizer(ours, config, 32, ALONE)
    groups = [
        {
            "params": [p],
            "lr": learning_rate(kind_of(n, p), config, 32),
            "weight_decay": 0.1 * (kind_of(n, p) == "matrix"),
        }
        for n, p in theirs.named_parameters()
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10)
    for step in range(1, 6):
        for model in (ours, theirs):
            gradients = gradients_of(model, step)
            for name, p in model.named_parameters():
                p.grad = gradients[name] if model is theirs else p.grad.copy_(gradients[name])
        optimizer.step(RATES)
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_lion_is_the_published_algorithm():
    """Program 1 of Chen et al. 2023, written down once more in float64."""
    model = small_model().double()
    config = OptimConfig(name="lion", weight_decay=0.1, matrix_lr=1e-3, betas=(0.9, 0.99), width_ref=None)
    rates = {n: learning_rate(kind_of(n, p), config, 32) for n, p in model.named_parameters()}
    decays = {n: 0.1 * (kind_of(n, p) == "matrix") for n, p in model.named_parameters()}
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    means = {n: torch.zeros_like(p) for n, p in expected.items()}
    optimizer = Optimizer(model, config, 32, ALONE)
    for step in range(1, 8):
        gradients = gradients_of(model, step)
        for name, p in model.named_parameters():
            p.grad.copy_(gradients[name])
            update = torch.sign(0.9 * means[name] + 0.1 * gradients[name])
            expected[name] -= rates[name] * (update + decays[name] * expected[name])
            means[name] = 0.99 * means[name] + 0.01 * gradients[name]
        optimizer.step(RATES)
    for name, p in model.named_parameters():
        assert torch.allclose(p.detach(), expected[name], rtol=0, atol=1e-12), name


def test_one_classic_step_in_bfloat16_is_torchs_muon():
    model = small_model(width=64, head_dim=32)
    config = OptimConfig(coefficients="classic", orthogonal_dtype="bfloat16")
    optimizer = Optimizer(model, config, 64, ALONE)
    weight = model.layers[0].self_attn.q_proj.weight
    theirs = torch.nn.Parameter(weight.detach().clone())
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.0)
    before = weight.detach().clone()
    theirs.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight.grad.copy_(theirs.grad)
    reference.step()
    optimizer.step(RATES)
    ours, expected = weight.detach() - before, theirs.detach() - before
    assert float((ours - expected).norm() / expected.norm()) < 1e-2  # 0.014 in float32, as theirs is in bfloat16


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (4, 24, 24)])
def test_polar_express_brings_singular_values_near_one_and_keeps_directions(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalise(x, "polar_express", 5, torch.float64)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.85 and float(values.max()) < 1.15
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    assert float((found - u @ vt).norm() / (u @ vt).norm()) < 0.1
    assert not orthogonalise(torch.zeros(shape), "polar_express", 5, torch.float32).any()


def test_the_quintics_are_as_many_as_iterations():
    assert quintics("classic", 3) == (quintics("classic", 1)[0],) * 3
    assert quintics("polar_express", 7)[4:] == (POLAR_EXPRESS[-1],) * 3


def test_the_norm_is_global_and_gradients_are_clipped_to_it():
    model, free = small_model(), small_model()
    rates = Rates(1.0, 0.0, 1.0)
    config = OptimConfig(name="sgd", matrix_lr=1.0, embedding_lr=1.0, unembedding_lr=1.0, width_ref=None)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    norms = []
    for m, clip in ((model, 1.0), (free, None)):
        optimizer = Optimizer(m, config, 32, ALONE)
        for name, gradient in gradients_of(m, 1).items():
            dict(m.named_parameters())[name].grad.copy_(gradient * 8)
        norms.append(float(optimizer.step(rates, grad_scale=0.125, clip=clip)))
    expected = math.sqrt(sum(float(g.square().sum()) for g in gradients_of(model, 1).values()))
    assert norms == pytest.approx([expected] * 2, rel=1e-5)
    moved = math.sqrt(sum(float((p.detach() - start[n]).square().sum()) for n, p in model.named_parameters()))
    assert moved == pytest.approx(1.0, rel=1e-4)


def test_the_rates_of_a_step_are_told_by_kind_of_parameter():
    config = OptimConfig(width_ref=32, matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, scalar_lr=0.5)
    optimizer = Optimizer(small_model(depth=3, arch="modern"), config, 32, ALONE, lr_factor=0.5)
    found = optimizer.learning_rates(Rates(0.1, 0.9, 1.0))
    expected = {"matrix": 0.001, "embedding": 0.01, "unembedding": 0.0002, "value_embedding": 0.0075}
    expected |= {"scalar": 0.025, "residual": 0.00025}
    assert found == pytest.approx({f"lr/{kind}": rate for kind, rate in expected.items()})


def test_a_step_whose_gradients_are_too_large_is_dropped_where_that_is_asked_for():
    model = small_model()
    optimizer = Optimizer(model, OptimConfig(), 32, ALONE)
    before = [p.detach().clone() for p in model.parameters()]
    model.lm_head.weight.grad[0, 0] = float("inf")
    assert not optimizer.step(RATES, drop_above=math.inf).isfinite()
    model.lm_head.weight.grad.fill_(1.0)
    assert float(optimizer.step(RATES, drop_above=3.0)) > 3.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not any(p.grad.any() for p in model.parameters())
    model.lm_head.weight.grad.fill_(1e-3)
    optimizer.step(RATES, drop_above=3.0)
    assert not torch.equal(before[-1], model.lm_head.weight)


def test_a_step_that_needs_no_norm_is_the_one_whose_limits_are_out_of_reach():
    """Without them each bucket is updated as its gradients arrive; with them all gradients come first."""
    models, norms = [small_model(arch="modern"), small_model(arch="modern")], []
    for model, limits in zip(models, [{}, {"clip": 1e9, "drop_above": 1e9}]):
        optimizer = Optimizer(model, OptimConfig(normuon=True), 32, ALONE)
        for step in range(3):
            for name, gradient in gradients_of(model, step).items():
                dict(model.named_parameters())[name].grad.copy_(gradient)
            norms.append(float(optimizer.step(RATES, 0.5, **limits)))
    assert norms[:3] == norms[3:]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


class Noted:
    """Two processes of which only this one exists: collectives do nothing but leave a note, numbered by bucket."""

    rank, size, is_main, device = 0, 2, True, torch.device("cpu")

    def __init__(self):
        self.notes, self.counts = [], Counter()

    def start(self, what):
        name = f"{what} {self.counts[what]}"
        self.counts[what] += 1
        self.notes.append(f"send {name}")
        return SimpleNamespace(wait=lambda: self.notes.append(f"wait for {name}"))

    def reduce_scatter(self, own, whole):
        return self.start("gradients")

    def all_gather(self, whole, own):
        return self.start("weights")

    def sum(self, tensor, wait=True):
        return SimpleNamespace(wait=lambda: None)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_travel_while_others_are_used_and_weights_while_others_are_made(clip):
    world = Noted()
    optimizer = Optimizer(small_model(), OptimConfig(), 32, world)
    optimizer.step(RATES, clip=clip)
    numbers, notes = range(len(optimizer.parts)), world.notes
    sent, waited = ([f"{verb} gradients {n}" for n in numbers] for verb in ("send", "wait for"))
    assert notes[: len(sent)] == sent  # all at once
    assert notes[-len(sent) :] == [f"wait for weights {n}" for n in numbers]  # when all are made
    if clip is None:
        assert notes[len(sent) : -len(sent)] == [note for n in numbers for note in (waited[n], f"send weights {n}")]
    else:  # clipping needs the norm of all gradients before anything is updated
        assert notes[len(sent) : -len(sent)] == waited + [f"send weights {n}" for n in numbers]


class PeakBytes(TorchDispatchMode):
    """The most memory that new tensors hold at once, of tensors on any device, also one without memory."""

    def __init__(self, there):
        super().__init__()
        self.there = {tensor.untyped_storage()._cdata for tensor in there}
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.there:
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {at: held for at, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result


def peak_of_d32() -> int:
    """Bytes beside weights, gradients and state that one process needs for a step; nothing is computed."""
    with torch.device("meta"):
        model = GPT(GPTConfig(depth=32).resolved(65_536))
        config = OptimConfig(orthogonal_dtype="bfloat16", normuon=True, weight_decay=0.1, cautious=True)
        optimizer = Optimizer(model, config, 2048, World(0, 1, torch.device("meta")))
        there = [tensor for bucket, _ in optimizer.parts for tensor in (bucket.params, bucket.grads)]
        there += [tensor for _, rule in optimizer.parts for tensor in rule.state.values()]
        with PeakBytes(there) as peak:
            optimizer.step(RATES, 0.5, clip=1.0)
    return peak.peak


def test_a_step_of_d32_needs_no_more_memory_than_one_stacked_group(monkeypatch):
    group = 32 * 2048 * 8192 * 2  # bytes of the matrices of one shape, in bfloat16
    assert peak_of_d32() < group
    monkeypatch.setattr(rules, "STACK_ELEMENTS", 1 << 40)
    assert peak_of_d32() > 3 * group  # what it would be if all were orthogonalised at once


def test_matrices_are_updated_as_well_in_small_stacks(monkeypatch):
    models = []
    for limit in (1 << 40, 2 * 32 * 32):
        monkeypatch.setattr(rules, "STACK_ELEMENTS", limit)
        monkeypatch.setattr(optimiser, "SQUARED_AT_ONCE", limit)
        model = small_model(depth=3).double()
        config = OptimConfig(orthogonal_dtype="float64", normuon=True, weight_decay=0.1, cautious=True)
        optimizer = Optimizer(model, config, 32, ALONE)
        for step in range(3):
            for name, gradient in gradients_of(model, step).items():
                dict(model.named_parameters())[name].grad.copy_(gradient)
            optimizer.step(RATES, clip=1.0)
        models.append({name: p.detach() for name, p in model.named_parameters()})
    for name, weight in models[0].items():
        assert float((models[1][name] - weight).norm() / weight.norm()) < 1e-12, name


def test_a_class_of_a_compiled_module_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "quick").mkdir()
    for name in ("__init__.py", f"kernels{EXTENSION_SUFFIXES[0]}"):
        (tmp_path / "quick" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert OptimConfig(name="quick.kernels.Adam").name == "quick.kernels.Adam"
    with pytest.raises(ModelError, match=r"no module quick\.kernel;"):
        OptimConfig(name="quick.kernel.Adam")


def test_any_torch_optimiser_is_named_by_its_import_path():
    model = small_model()
    optimizer = Optimizer(model, OptimConfig(name="torch.optim.Adagrad", args={"eps": 1e-3}), 32, ALONE)
    losses = []
    for _ in range(5):
        loss = model.loss(*batch())
        loss.backward()
        optimizer.step(RATES, grad_scale=1 / 72)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for wrong in ("torch.optim.Nothing", "nowhere.Adam", "momentum"):
        with pytest.raises(ModelError, match=r"optim\.name"):
            Optimizer(small_model(), OptimConfig(name=wrong), 32, ALONE)


def train_together(folder: Path, processes: int, dtype: str, name: str = "muon") -> tuple[dict, list[int]]:
    """20 steps of tests/model/together.py; the weights, and the elements of state of each process."""
    out = folder / f"{processes}-{dtype}-{name}"
    script = str(Path(__file__).with_name("together.py"))
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(runner if processes > 1 else [sys.executable]), script, str(out), dtype, name]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return load_file(out / "weights.safetensors"), [int((out / f"state-{r}").read_text()) for r in range(processes)]


def assert_equal_weights(found, wanted, tolerance):
    for name, weight in wanted.items():
        assert float((found[name] - weight).norm() / weight.norm()) < tolerance, name


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.full)])
def test_more_processes_make_the_same_weights_and_hold_less_state_each(tmp_path, processes):
    wanted, alone = train_together(tmp_path, 1, "float32")
    found, held = train_together(tmp_path, processes, "float32")
    assert_equal_weights(found, wanted, 1e-5)
    assert max(held) < 1.05 * alone[0] / processes
    if processes == 4:
        exact = [train_together(tmp_path, n, "float64")[0] for n in (1, 2, 4)]
        for other in exact[1:]:
            assert_equal_weights(other, exact[0], 1e-10)


@pytest.mark.full
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "torch.optim.Adam"])
def test_the_other_optimisers_agree_on_two_processes_too(tmp_path, name):
    wanted, _ = train_together(tmp_path, 1, "float64", name)
    assert_equal_weights(train_together(tmp_path, 2, "float64", name)[0], wanted, 1e-10)

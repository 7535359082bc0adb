"""Comparison of this device with a CPU: logits, loss and the first training steps of a small model.

Errors are relative: those of logits and products to their norms, those of losses to how far training changed the loss.
In float32 (TF32 off) only the order of sums differs. In 16 and 8 bits the bounds leave room for rounding; a wrong mask,
scale or gradient exceeds them.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.bench import configs
from pipeline.bench.phases import one_pass
from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench, Skipped
from pipeline.bench.timing import Ceiling
from pipeline.bench.trainings import StopWatch, Training, prepared, run_trainer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


STEPS, TINY_STEPS = 20, 6
# Rates so low that a difference of one bit stays small: at the usual ones, training on so small a batch is chaotic.
GENTLE = "optim.init_lr_frac=0.02 launch.log_every=1 launch.device_batch_size=2"
ARCHITECTURES = {"base": "", "modern": configs.MODERN}
EXACT = "pretrain.params.dtype=float32 optim.orthogonal_dtype=float32"
DTYPES = {"float32": EXACT, "bfloat16": "pretrain.params.dtype=bfloat16"}
BOUNDS = {
    "float32": {"logits": 1e-4, "loss": 1e-5, "steps": 5e-3},
    "bfloat16": {"logits": 5e-2, "loss": 5e-3, "steps": 5e-2},
}
EIGHT_BITS = "pretrain.params.dtype=bfloat16 pretrain.params.fp8=true"
EIGHT_BITS_BOUND = 5e-2  # of the losses of steps
PRODUCT_BOUND = 1e-2  # against the exact product of what the 8-bit tensors hold: fast sums and a bfloat16 result


@dataclass
class Observed:
    """logits (B, T, vocab) and loss with weights that are the same on every device; losses of training steps."""

    logits: "Tensor"
    loss: "Tensor"
    steps: "Tensor"


def steps(bench: Bench) -> Result:
    """This device against a CPU in float32, by architecture, dtype and quantity."""
    import torch

    on_cpu = replace(bench, device=torch.device("cpu"))
    result: Result = {}
    for arch, overrides in ARCHITECTURES.items():
        exact = observe(on_cpu, overrides, EXACT)
        for dtype, words in DTYPES.items():
            found = observe(bench, overrides, words)
            for quantity, bound in BOUNDS[dtype].items():
                error = difference(getattr(found, quantity), getattr(exact, quantity))
                result[f"{arch} {dtype} {quantity}"] = judged(error, bound)
            bench.save(result)
    return result


def compiled(bench: Bench) -> Result:
    """Compiled steps against eager ones on this device."""
    from pipeline.bench.compiling import why_not

    if bench.settings.compile is False:
        raise Skipped("bench.compile=false")
    if cannot := why_not(bench.device):
        raise Skipped(f"torch.compile does not work here: {cannot}")
    bounds = {name: bounds["steps"] for name, bounds in BOUNDS.items()} | {"8 bits": EIGHT_BITS_BOUND}
    ways = DTYPES | ({"8 bits": EIGHT_BITS} if has_eight_bits(bench.device) else {})
    if bench.settings.tiny:
        ways = {"float32": EXACT}  # a CPU's compiler takes minutes for each
    result: Result = {}
    for name, words in ways.items():
        eager, fused = (losses(bench, configs.MODERN, words, compiled=way) for way in (False, True))
        result[f"modern {name} steps"] = judged(difference(fused, eager), bounds[name])
        bench.save(result)
    return result


def eight_bits(bench: Bench) -> Result:
    """Steps in 8 bits against steps in bfloat16, and the products of a layer against exact ones."""
    if not has_eight_bits(bench.device):
        raise Skipped("this GPU has no FP8 hardware")
    result: Result = {name: judged(error, PRODUCT_BOUND) for name, error in product_errors(bench).items()}
    bench.save(result)
    for arch, overrides in ARCHITECTURES.items():
        eight, sixteen = (losses(bench, overrides, words) for words in (EIGHT_BITS, DTYPES["bfloat16"]))
        result[f"{arch} steps"] = judged(difference(eight, sixteen), EIGHT_BITS_BOUND)
        bench.save(result)
    return result


def has_eight_bits(device: "torch.device") -> bool:
    """Return True if 8-bit products run at all: in hardware on a GPU, or emulated on a CPU."""
    from model.kernels.fp8 import has_units

    return device.type == "cpu" or has_units(device)


def judged(error: float, bound: float) -> dict[str, Any]:
    return {"error": error, "bound": bound, "within": error <= bound}


def difference(found: "Tensor", wanted: "Tensor") -> float:
    """The norm of the difference, relative to that of what is wanted."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).norm() / wanted.norm())


@contextlib.contextmanager
def exact_matmuls() -> Iterator[None]:
    """Multiply float32 exactly on GPUs that would otherwise round to TF32."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def trained(bench: Bench, overrides: str, words: str, compiled: bool = False) -> Iterator[tuple[Training, "Tensor"]]:
    """A training after its steps, and what they changed of the loss (steps,), which starts at ln(vocab) exactly."""
    import torch

    job = configs.JOBS["tiny" if bench.settings.tiny else "small"]
    config = configs.compose(bench, job, GENTLE, overrides, words)
    steps = TINY_STEPS if bench.settings.tiny else STEPS
    with prepared(bench, config, steps, compiled) as training, exact_matmuls():
        run_trainer(training, StopWatch(Ceiling(bench.device, torch.float32, tiny=True)))
        lines = (training.job.work / "metrics.jsonl").read_text().splitlines()
        found = torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)
        yield training, found - math.log(training.model.config.vocab_size or 1)


def losses(bench: Bench, overrides: str, words: str, compiled: bool = False) -> "Tensor":
    with trained(bench, overrides, words, compiled) as (_, found):
        return found


def observe(bench: Bench, overrides: str, words: str) -> Observed:
    import torch

    with trained(bench, overrides, words) as (training, found):
        fill_weights(training)
        tokens, targets = one_pass(training)
        loss = training.model.loss(tokens, targets)
        with torch.no_grad():
            return Observed(training.model(tokens).cpu(), loss.detach().cpu(), found)


def fill_weights(training: Training) -> None:
    """Draw all weights on the CPU, so that devices agree, also those that start as zeros and would hide differences."""
    import torch

    from model.gpt import fill_normal

    generator = torch.Generator().manual_seed(1)
    training.model.init_weights(generator)
    with torch.no_grad():
        for parameter in training.model.parameters():
            if not parameter.any():
                fill_normal(parameter, parameter.size(-1) ** -0.5, generator)


def product_errors(bench: Bench) -> dict[str, float]:
    """Errors of a layer's forward product and of both gradients."""
    import torch

    from model.kernels import fp8

    rows, fan_in, fan_out = (32, 32, 48) if bench.settings.tiny else (512, 256, 1024)
    shapes = {"x": (rows, fan_in), "weight": (fan_out, fan_in), "gradient": (rows, fan_out)}
    dtype = torch.bfloat16
    tensors = {name: torch.randn(shape, device=bench.device, dtype=dtype) for name, shape in shapes.items()}
    x, weight, gradient = (tensor.requires_grad_(name != "gradient") for name, tensor in tensors.items())
    y = fp8.linear(x, weight)
    d_x, d_weight = torch.autograd.grad(y, (x, weight), gradient)
    formats = (fp8.FORWARD, fp8.FORWARD, fp8.BACKWARD)
    quantised = [fp8.quantise(tensor.detach(), kind) for tensor, kind in zip((x, weight, gradient), formats)]
    held_x, held_weight, held_gradient = (eight.cpu().double() * scale.cpu().double() for eight, scale in quantised)
    return {
        "products forward": difference(y, held_x @ held_weight.T),
        "products of the input's gradient": difference(d_x, held_gradient @ held_weight),
        "products of the weight's gradient": difference(d_weight, held_gradient.T @ held_x),
    }

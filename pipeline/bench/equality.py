"""Agreement of this device with a CPU, and of different ways to the same result on this device.

Errors are relative: those of logits, products and attention to their norms, those of losses to how far training changed
the loss. In float32 (TF32 off) only the order of sums differs. In 16 and 8 bits the bounds leave room for rounding; a
wrong mask, scale or gradient exceeds them.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.attention import attend
from model.gpt import GPT, fill_normal
from model.kernels import fp8
from model.kernels.decoder import Decoder
from model.precision import resolve_dtype
from pipeline.bench import jobs
from pipeline.bench.decoding import D4, TINY, build, generate
from pipeline.bench.jobs import JOBS, MODERN, StepTimer, prepared, run_trainer
from pipeline.bench.kernels import attention_backends
from pipeline.bench.registry import Bench, Result, Skipped
from pipeline.bench.training import first_pass

STEPS, TINY_STEPS = 20, 6
# Rates so low that a difference of one bit stays small: at the usual ones, training on so small a batch is chaotic.
GENTLE = "optim.init_lr_frac=0.02 launch.log_every=1 launch.device_batch_size=2"
ARCHITECTURES = {"base": "", "modern": MODERN}
FLOAT32 = "pretrain.params.dtype=float32 optim.orthogonal_dtype=float32"
BFLOAT16 = "pretrain.params.dtype=bfloat16"
FP8 = f"{BFLOAT16} pretrain.params.fp8=true"
BOUNDS = {
    "float32": {"logits": 1e-4, "loss": 1e-5, "steps": 5e-3},
    "bfloat16": {"logits": 5e-2, "loss": 5e-3, "steps": 5e-2},
}
FP8_BOUND = 5e-2  # of the losses of steps
PRODUCT_BOUND = 1e-2  # against the exact product of what the 8-bit tensors hold: fast sums and a bfloat16 result
VALUE_BOUND, GRADIENT_BOUND = 1e-2, 2e-2  # of attention; bfloat16 rounds each number to 0.4%
# Share of tokens that may differ. A replay runs the same kernels on the same memory. Other kernels round differently,
# and a row that drew one other token continues differently.
SAME, ROUNDED = 0.0, 0.1
DECODED_ROWS = 16


def steps(bench: Bench) -> Result:
    """Logits, loss and training steps on this device against a CPU in float32, by architecture and dtype."""
    on_cpu = replace(bench, device=torch.device("cpu"))
    result: Result = {}
    for arch, overrides in ARCHITECTURES.items():
        exact = observe(on_cpu, overrides, FLOAT32)
        for dtype, words in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
            found = observe(bench, overrides, words)
            for quantity, bound in BOUNDS[dtype].items():
                result[f"{arch} {dtype} {quantity}"] = judged(difference(found[quantity], exact[quantity]), bound)
            bench.save(result)
    return result


def compiled(bench: Bench) -> Result:
    """Compiled training steps against eager ones on this device."""
    if bench.settings.compile is False:
        raise Skipped("bench.compile=false")
    if error := jobs.compile_error(bench.device):
        raise Skipped(f"torch.compile does not work here: {error}")
    modes = [("float32", FLOAT32, BOUNDS["float32"]["steps"])]
    if not bench.settings.tiny:  # a CPU's compiler takes minutes for each
        modes.append(("bfloat16", BFLOAT16, BOUNDS["bfloat16"]["steps"]))
        if _has_fp8(bench.device):
            modes.append(("8 bits", FP8, FP8_BOUND))
    result: Result = {}
    for name, words, bound in modes:
        eager, fused = (observe(bench, MODERN, words, compiled=way)["steps"] for way in (False, True))
        result[f"modern {name} steps"] = judged(difference(fused, eager), bound)
        bench.save(result)
    return result


def eight_bits(bench: Bench) -> Result:
    """Products of a layer in 8 bits against exact ones, and training steps in 8 bits against bfloat16."""
    if not _has_fp8(bench.device):
        raise Skipped("this GPU has no FP8 hardware")
    result: Result = {name: judged(error, PRODUCT_BOUND) for name, error in _product_errors(bench).items()}
    bench.save(result)
    for arch, overrides in ARCHITECTURES.items():
        eight, sixteen = (observe(bench, overrides, words)["steps"] for words in (FP8, BFLOAT16))
        result[f"{arch} steps"] = judged(difference(eight, sixteen), FP8_BOUND)
        bench.save(result)
    return result


def _has_fp8(device: torch.device) -> bool:
    """Return True if 8-bit products run at all: in hardware on a GPU, or emulated on a CPU."""
    return device.type == "cpu" or fp8.has_units(device)


def judged(error: float, bound: float) -> dict[str, Any]:
    return {"error": error, "bound": bound, "within": error <= bound}


def difference(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, relative to that of `wanted`."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).norm() / wanted.norm())


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def observe(bench: Bench, overrides: str, words: str, compiled: bool = False) -> dict[str, Tensor]:
    """steps: how far each training step changed the loss, which starts at ln(vocab) exactly. Without compiling also
    logits (B, T, vocab) and loss with weights that are the same on every device."""
    config = jobs.compose(bench, JOBS["tiny" if bench.settings.tiny else "small"], GENTLE, overrides, words)
    count = TINY_STEPS if bench.settings.tiny else STEPS
    found: list[float] = []
    with prepared(bench, config, count, compiled) as trainer, _without_tf32():
        gpt: Any = trainer.model
        trainer.hooks.log = lambda step, loss, **metrics: found.append(loss - math.log(gpt.config.vocab_size))
        run_trainer(trainer, StepTimer(bench.device))
        changes = torch.tensor(found, dtype=torch.float64)
        if compiled:
            return {"steps": changes}
        _fill_weights(gpt)
        tokens, targets = first_pass(trainer)
        loss = gpt.loss(tokens, targets).detach().cpu()
        with torch.no_grad():
            return {"logits": gpt(tokens).cpu(), "loss": loss, "steps": changes}


def _fill_weights(model: GPT) -> None:
    """Draw all weights on the CPU, so that devices agree, also those that start as zeros and would hide differences."""
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                fill_normal(parameter, parameter.size(-1) ** -0.5, generator)


def _product_errors(bench: Bench) -> dict[str, float]:
    """Errors of a layer's forward product and of both gradients."""
    rows, fan_in, fan_out = (32, 32, 48) if bench.settings.tiny else (512, 256, 1024)
    shapes = [(rows, fan_in), (fan_out, fan_in), (rows, fan_out)]
    x, weight, gradient = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for shape in shapes)
    x.requires_grad_(), weight.requires_grad_()
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


def attention(bench: Bench) -> Result:
    """Each backend against float64 on the CPU: grouped queries, the whole context and windows, documents and none."""
    rows, length, heads, kv_heads, head_dim = (2, 64, 4, 2, 16) if bench.settings.tiny else (2, 512, 4, 2, 128)
    dtype = resolve_dtype("auto", bench.device)
    shapes = [(rows, length, heads, head_dim)] + [(rows, length, kv_heads, head_dim)] * 2
    q_k_v, gradient = [torch.randn(shape).to(dtype) for shape in shapes], torch.randn(shapes[0]).to(dtype)
    cuts = torch.tensor([[length // 3], [length // 2 + 1]])
    result: Result = {}
    for window in (length, length // 4):
        for documents in (None, (torch.arange(length) >= cuts).long()):
            wanted = _attend([*q_k_v, gradient], window, documents, "sdpa", torch.device("cpu"), torch.float64)
            for backend in attention_backends(bench.device):
                case = f"{backend} window {window}" + ("" if documents is None else ", documents")
                try:
                    found = _attend([*q_k_v, gradient], window, documents, backend, bench.device, dtype)
                    value, *gradients = map(difference, found, wanted)
                    result[case] = judged(value, VALUE_BOUND)
                    result[f"{case}, gradients"] = judged(max(gradients), GRADIENT_BOUND)
                except Exception as error:  # does not hide what the other backends compute
                    result[case] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
                bench.save(result)
    return result


def _attend(
    tensors: list[Tensor],
    window: int,
    documents: Tensor | None,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The result of attention of q, k, v, and their gradients for the gradient of the result: the four tensors."""
    q, k, v, gradient = (tensor.to(device, dtype) for tensor in tensors)
    q_k_v = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    y = attend(q_k_v[0], q_k_v[1], q_k_v[2], window, None if documents is None else documents.to(device), backend)
    return [y, *torch.autograd.grad(y, q_k_v, gradient)]


def graphs(bench: Bench) -> Result:
    """Tokens drawn by replayed CUDA graphs, by the same steps called one by one, and with a plain cache."""
    config, new_tokens = (TINY, 12) if bench.settings.tiny else (D4, 96)
    gpt = build(config, bench.device)
    result: Result = {}
    if bench.device.type == "cuda":
        result["replayed and called"] = _compare_decoding(gpt, new_tokens, SAME, "replayed", "called")
    else:
        result["replayed"] = {"skipped": "needs CUDA"}
    bench.save(result)
    gpt.compute_dtype = torch.float32
    gpt = gpt.float()
    with _without_tf32():
        result["float32, called and plain"] = _compare_decoding(gpt, new_tokens, ROUNDED, "called", "plain")
        if bench.device.type == "cuda":
            result["float32, replayed and plain"] = _compare_decoding(gpt, new_tokens, ROUNDED, "replayed", "plain")
    return result


def _compare_decoding(gpt: GPT, new_tokens: int, bound: float, one: str, other: str) -> dict[str, Any]:
    """Judge the share of tokens on which two ways to decode disagree."""
    first, second = (_decode(gpt, new_tokens, way) for way in (one, other))
    differing = sum(a != b for some, others in zip(first, second) for a, b in zip(some, others))
    return judged(differing / sum(map(len, first)), bound)


def _decode(gpt: GPT, new_tokens: int, way: str) -> list[list[int]]:
    decoder = Decoder(copy.deepcopy(gpt), in_place=True)
    decoder.replays = way != "plain"
    if replay := decoder.borrow(DECODED_ROWS, gpt.config.sequence_len):  # None with a plain cache
        replay.captures = way == "replayed"
        decoder.give_back(replay)
    return [completion.tokens for completion in generate(decoder, new_tokens, DECODED_ROWS)()]

"""Comparison of different ways to the same result on this device: attention backends, and decoding by CUDA graphs."""

import copy
from typing import TYPE_CHECKING

from pipeline.bench import decode
from pipeline.bench.attention import backends
from pipeline.bench.equality import difference, exact_matmuls, judged
from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model.gpt import GPT


VALUE_BOUND, GRADIENT_BOUND = 1e-2, 2e-2  # by norms; bfloat16 rounds each number to 0.4%
# Share of tokens that may differ. A replay runs the same kernels on the same memory; other kernels round otherwise, and
# a row that drew one other token continues differently.
SAME, ROUNDED = 0.0, 0.1
DECODED = decode.Case(4, 8192, 512, (), 96)
DECODED_TINY = decode.Case(2, 64, 64, (), 12, width=32, head_dim=16)
ROWS = 16


def attention(bench: Bench) -> Result:
    """Each backend against float64 on the CPU: grouped queries, the whole context and windows, documents and none."""
    import torch

    from model.precision import resolve_dtype

    rows, length, heads, kv_heads, head_dim = (2, 64, 4, 2, 16) if bench.settings.tiny else (2, 512, 4, 2, 128)
    dtype = resolve_dtype("auto", bench.device)
    shapes = [(rows, length, heads, head_dim)] + [(rows, length, kv_heads, head_dim)] * 2
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    gradient = torch.randn(shapes[0]).to(dtype)
    cuts = torch.tensor([[length // 3], [length // 2 + 1]])
    result: Result = {}
    for window in (length, length // 4):
        for documents in (None, (torch.arange(length) >= cuts).long()):
            case = f"window {window}" + ("" if documents is None else ", documents")
            exact = [tensor.double() for tensor in tensors]
            wanted = _passed(exact, gradient.double(), window, documents, "sdpa")
            for backend in backends(bench.device):
                result |= _compared(f"{backend} {case}", bench.device, tensors, gradient, window, documents, wanted)
                bench.save(result)
    return result


def _compared(
    case: str,
    device: "torch.device",
    tensors: "list[Tensor]",
    gradient: "Tensor",
    window: int,
    documents: "Tensor | None",
    wanted: "list[Tensor]",
) -> Result:
    """One backend that fails does not hide what the others compute."""
    there = [tensor.to(device) for tensor in tensors]
    documents = None if documents is None else documents.to(device)
    try:
        found = _passed(there, gradient.to(device), window, documents, case.split()[0])
    except Exception as error:
        return {case: {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}}
    value, *gradients = (difference(one, other) for one, other in zip(found, wanted))
    return {case: judged(value, VALUE_BOUND), f"{case}, gradients": judged(max(gradients), GRADIENT_BOUND)}


def _passed(
    tensors: "list[Tensor]", gradient: "Tensor", window: int, documents: "Tensor | None", backend: str
) -> "list[Tensor]":
    """The result of attention, and the gradients of q, k and v."""
    import torch

    from model.attention import attend

    q, k, v = (tensor.clone().requires_grad_() for tensor in tensors)
    y = attend(q, k, v, window, documents, backend)
    return [y, *torch.autograd.grad(y, (q, k, v), gradient)]


def graphs(bench: Bench) -> Result:
    """Tokens drawn by replayed CUDA graphs, by the same steps called one by one, and with a plain cache."""
    import torch

    case = DECODED_TINY if bench.settings.tiny else DECODED
    model = decode.build(case, bench.device)
    result: Result = {}
    if bench.device.type == "cuda":
        result["replayed and called"] = _drawn_alike(model, case, SAME, "replayed", "called")
    else:
        result["replayed"] = {"skipped": "needs CUDA"}
    bench.save(result)
    model.compute_dtype = torch.float32
    model = model.float()
    with exact_matmuls():
        result["float32, called and plain"] = _drawn_alike(model, case, ROUNDED, "called", "plain")
        if bench.device.type == "cuda":
            result["float32, replayed and plain"] = _drawn_alike(model, case, ROUNDED, "replayed", "plain")
    return result


def _drawn_alike(model: "GPT", case: decode.Case, bound: float, one: str, other: str) -> dict[str, object]:
    """The share of tokens on which two ways to decode disagree."""
    first, second = (_drawn(model, case, way) for way in (one, other))
    differing = sum(a != b for some, others in zip(first, second) for a, b in zip(some, others))
    return judged(differing / sum(map(len, first)), bound)


def _drawn(model: "GPT", case: decode.Case, way: str) -> list[list[int]]:
    from model.kernels.decoder import Decoder

    decoder = Decoder(copy.deepcopy(model), in_place=True)
    decoder.replays = way != "plain"
    if replay := decoder.borrow(ROWS, case.context):  # None with a plain cache
        replay.captures = way == "replayed"
        decoder.give_back(replay)
    return [completion.tokens for completion in decode.generate(decoder.model, decoder, case, ROWS)()]

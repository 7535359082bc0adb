"""Generating text: the engine's tokens/s, prompts and all, against bounds measured in the same turns.

`tok_s` is model.decoding.engine.Engine.generate on random weights laid out as evaluation does, with ends that never
come: new tokens of all rows over the seconds of the whole call. A bound is one token's matmuls, attention over half of
what a row holds in the end and top-k sampling, called one after the other on tensors that are there already, without
anything between them; on GPUs replayed as a graph. `of_torch_bound` and `of_torch_matmuls` are the engine's speed in
parts of that bound, and of the matmuls alone, with torch's own products. The decoder's can be faster, so that these may
pass 1; `of_bound` and `of_matmuls` are taken with the faster products. `of_bandwidth` compares the speed with reading
the matrices, and half of what the caches hold in the end, at the rate of a copy; it may pass 1 if these fit into a
processor's caches.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.timing import in_turns, medians
from pipeline.typed import unknown

if TYPE_CHECKING:
    import torch

    from model.decoding.engine import Completion
    from model.gpt import GPT
    from model.kernels.decoder import Decoder


Products = list[Callable[[], object]]

PROMPT_TOKENS = 16
TOP_K = 50
DRAWS = 8  # different logits: a processor learns to foresee which of the same ones are the likeliest
COPIED = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes, more than caches hold


@dataclass(frozen=True)
class Case:
    depth: int
    vocab_size: int
    context: int
    batches: tuple[int, ...]
    new_tokens: int
    width: int | None = None
    head_dim: int = 128


CASES = {
    "tiny": {"tiny": Case(2, 64, 64, (1, 3), 8, width=32, head_dim=16)},
    "cpu": {"d4": Case(4, 8192, 512, (1, 16, 64), 128), "d20": Case(20, 65_536, 2048, (1, 16), 64)},
    "cuda": {"d4": Case(4, 8192, 512, (1, 16, 64), 128), "d20": Case(20, 65_536, 2048, (1, 16, 64, 256), 256)},
}


def measure(bench: Bench) -> Result:
    """By model and batch."""
    from model.kernels.decoder import Decoder

    result: Result = {}
    for name, case in chosen(bench).items():
        model = build(case, bench.device)
        decoder = Decoder(model, in_place=True)
        for rows in case.batches:
            copied, copy = _copy(bench)
            cases = {"engine": generate(model, decoder, case, rows), "copy": copy}
            for way, products in _ways_to_multiply(model, decoder, rows).items():
                cases[f"bound, {way}"] = captured(_one_token(model, products, case, rows), bench.device)
                cases[f"matmuls, {way}"] = captured(_all_of(products), bench.device)
            seconds = medians(in_turns(cases, bench.settings.repeats, bench.device))
            token = seconds["engine"] / case.new_tokens
            bound, matmuls = (min(seconds[c] for c in cases if c.startswith(what)) for what in ("bound", "matmuls"))
            bandwidth = 2 * copied / seconds["copy"]  # bytes read and bytes written
            result[f"{name} batch {rows}"] = {
                "tok_s": rows / token,
                "of_bound": bound / token,
                "of_matmuls": matmuls / token,
                "of_torch_bound": seconds["bound, torch"] / token,
                "of_torch_matmuls": seconds["matmuls, torch"] / token,
                "of_bandwidth": bytes_read(model, case, rows) / bandwidth / token,
                "copy_gb_s": bandwidth / 1e9,
                "new_tokens": case.new_tokens,
            }
            bench.save(result)
    return result


def chosen(bench: Bench) -> dict[str, Case]:
    """Models and batches to measure. Raises UserError for an unknown model."""
    settings = bench.settings
    if settings.tiny:
        return CASES["tiny"]
    known = CASES[bench.device.type]
    for name in settings.models or []:
        if name not in known:
            raise unknown(name, list(known), "bench.models")
    cases = {name: case for name, case in known.items() if name in (settings.models or known)}
    return {name: replace(case, batches=tuple(settings.batches or case.batches)) for name, case in cases.items()}


def _copy(bench: Bench) -> tuple[int, Callable[[], object]]:
    """A number of bytes, and a function that copies as many."""
    import torch

    size = 1 << 16 if bench.settings.tiny else COPIED.get(bench.device.type, COPIED["cpu"])
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return size, lambda: target.copy_(source)


def bytes_read(model: "GPT", case: Case, rows: int) -> int:
    """Bytes read for one token of each row: every matrix once, and a row's keys and values, half full."""
    config, element = model.config, model.lm_head.weight.element_size()
    held = PROMPT_TOKENS + case.new_tokens // 2
    return (config.matmul_params() + 2 * config.depth * config.kv_width * held * rows) * element


def build(case: Case, device: "torch.device") -> "GPT":
    """Random weights in the dtype of inference; none is zero, so that sampling has something to choose from."""
    import torch

    from model.config import GPTConfig
    from model.gpt import build_model
    from model.precision import resolve_dtype

    config = GPTConfig(
        depth=case.depth,
        width=case.width,
        head_dim=case.head_dim,
        vocab_size=case.vocab_size,
        sequence_len=case.context,
    ).resolved()
    dtype = resolve_dtype("auto", device)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.size(-1) ** -0.5)
    model.compute_dtype = dtype
    return model.to(device=device, dtype=dtype).eval()


def generate(model: "GPT", decoder: "Decoder", case: Case, rows: int) -> "Callable[[], list[Completion]]":
    """A function that draws case.new_tokens for each of `rows` prompts, the same tokens each time."""
    from data.tokens.tokenizer import SPECIAL_TOKENS
    from model.decoding.engine import Engine
    from model.decoding.sampling import Sampling

    never = {name: -1 - place for place, name in enumerate(SPECIAL_TOKENS)}
    engine = Engine(model, never, lambda ids: b"", lambda text: [], rows=rows, decoder=decoder)
    prompts = [[(row + at) % case.vocab_size for at in range(PROMPT_TOKENS)] for row in range(rows)]
    samplings = [Sampling(top_k=TOP_K, max_tokens=case.new_tokens, seed=row) for row in range(rows)]

    def call() -> "list[Completion]":
        made = engine.generate(prompts, samplings)
        assert all(len(completion.tokens) == case.new_tokens for completion in made)
        return made

    return call


def _ways_to_multiply(model: "GPT", decoder: "Decoder", rows: int) -> dict[str, Products]:
    """All products of one token, by torch alone and as the decoder makes them."""
    import torch
    from torch.nn import functional as F

    head = model.lm_head.weight
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    widths = {linear.in_features for linear in linears}
    x = {width: torch.randn(rows, width, device=head.device, dtype=head.dtype) for width in widths}
    step = decoder.step(rows)
    own = [(step.head, decoder.lm_head)]
    for layer in decoder.layers:
        own += [(step.joint, layer.joint), (step.residual, layer.out), (step.up, layer.up), (step.residual, layer.down)]
    return {
        "torch": [partial(F.linear, x[linear.in_features], linear.weight) for linear in linears],
        "decoder": [partial(product, x[matrix.whole.size(1)], matrix) for product, matrix in own],
    }


def _all_of(products: Products) -> Callable[[], object]:
    import torch

    @torch.inference_mode()
    def multiply() -> None:
        for product in products:
            product()

    return multiply


def _one_token(model: "GPT", products: Products, case: Case, rows: int) -> Callable[[], object]:
    import torch
    from torch.nn import functional as F

    config, head = model.config, model.lm_head.weight
    assert config.kv_heads
    held = PROMPT_TOKENS + case.new_tokens // 2

    def drawn(*shape: int) -> "torch.Tensor":
        return torch.randn(shape, device=head.device, dtype=head.dtype)

    q = drawn(rows, config.heads, 1, config.head_dim)
    pairs = drawn(config.depth, 2, rows, config.kv_heads, held, config.head_dim)
    logits = itertools.cycle(drawn(DRAWS, rows, case.vocab_size).float().unbind())
    multiply = _all_of(products)

    @torch.inference_mode()
    def token() -> None:
        multiply()
        for k, v in pairs:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=config.heads != config.kv_heads)
        best, ids = next(logits).topk(TOP_K)
        reached = best.softmax(-1).cumsum(-1)
        ids.gather(1, (reached <= 0.5).sum(-1, keepdim=True).clamp(max=TOP_K - 1))

    return token


def captured(call: Callable[[], object], device: "torch.device") -> Callable[[], object]:
    """On GPUs the replay of a graph of the call, without the time that launching its kernels takes."""
    if device.type != "cuda":
        return call
    from model.kernels.graphs import WARM, capture

    for _ in range(WARM):
        call()
    return capture(call)[0].replay

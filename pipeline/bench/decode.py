"""Generating text: the engine's tokens/s, prompts and all, against bounds measured in the same turns.

`tok_s` is model.engine.Engine.generate on random weights laid out as evaluation does, with ends that never come: new
tokens of all rows over the seconds of the whole call. `bound_tok_s` is one token's matmuls, attention over half of
what a row holds in the end and top-k sampling, called one after the other on tensors that are there already, without
anything between them; on GPUs replayed as a graph. `matmul_tok_s` is the matmuls alone. Both multiply as torch does by
itself, so that an engine that shares a product out better (see model.decoder) can pass them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.timing import in_turns, medians

if TYPE_CHECKING:
    import torch

    from model.decoder import Decoder
    from model.gpt import GPT

RESULT_NEUTRAL = "measures; makes nothing"

PROMPT_TOKENS = 16
TOP_K = 50


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
    "cpu": {"d4": Case(4, 8192, 512, (1, 16, 64), 128), "d20": Case(20, 65_536, 2048, (1, 16), 16)},
    "cuda": {"d4": Case(4, 8192, 512, (1, 16, 64), 128), "d20": Case(20, 65_536, 2048, (1, 16, 64, 256), 256)},
}


def measure(bench: Bench) -> Result:
    """By model and batch."""
    from model.decoder import lay_out_for_decoding

    result: Result = {}
    for name, case in CASES["tiny" if bench.settings.tiny else bench.device.type].items():
        model = build(case, bench.device)
        decoder = lay_out_for_decoding(model)
        for rows in case.batches:
            cases = {
                "engine": _generate(model, decoder, case, rows),
                "bound": captured(_one_token(model, case, rows, everything=True), bench.device),
                "matmuls": captured(_one_token(model, case, rows, everything=False), bench.device),
            }
            seconds = medians(in_turns(cases, bench.settings.repeats, bench.device))
            rate = rows * case.new_tokens / seconds["engine"]
            result[f"{name} batch {rows}"] = {
                "tok_s": rate,
                "bound_tok_s": rows / seconds["bound"],
                "of_bound": rate * seconds["bound"] / rows,
                "matmul_tok_s": rows / seconds["matmuls"],
                "of_matmuls": rate * seconds["matmuls"] / rows,
                "new_tokens": case.new_tokens,
            }
    return result


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


def _generate(model: "GPT", decoder: "Decoder | None", case: Case, rows: int) -> Callable[[], object]:
    from data.tokenizer import SPECIAL_TOKENS
    from model.engine import Engine
    from model.sampling import Sampling

    never = {name: -1 - place for place, name in enumerate(SPECIAL_TOKENS)}
    engine = Engine(model, never, lambda ids: b"", lambda text: [], rows=rows, decoder=decoder)
    prompts = [[(row + at) % case.vocab_size for at in range(PROMPT_TOKENS)] for row in range(rows)]
    samplings = [Sampling(top_k=TOP_K, max_tokens=case.new_tokens, seed=row) for row in range(rows)]

    def generate() -> None:
        made = engine.generate(prompts, samplings)
        assert all(len(completion.tokens) == case.new_tokens for completion in made)

    return generate


def _one_token(model: "GPT", case: Case, rows: int, everything: bool) -> Callable[[], object]:
    import torch
    from torch.nn import functional as F

    config, head = model.config, model.lm_head.weight
    assert config.kv_heads
    held = PROMPT_TOKENS + case.new_tokens // 2

    def drawn(*shape: int) -> "torch.Tensor":
        return torch.randn(shape, device=head.device, dtype=head.dtype)

    inputs = {matrix.in_features: drawn(rows, matrix.in_features) for matrix in _matrices(model)}
    weights = [(inputs[matrix.in_features], matrix.weight) for matrix in _matrices(model)]
    q = drawn(rows, config.heads, 1, config.head_dim)
    pairs = drawn(config.depth, 2, rows, config.kv_heads, held, config.head_dim)
    logits = drawn(rows, case.vocab_size).float()

    @torch.inference_mode()
    def matmuls() -> None:
        for x, weight in weights:
            F.linear(x, weight)

    @torch.inference_mode()
    def token() -> None:
        matmuls()
        for k, v in pairs:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=config.heads != config.kv_heads)
        best, ids = logits.topk(TOP_K)
        reached = best.softmax(-1).cumsum(-1)
        ids.gather(1, (reached <= 0.5).sum(-1, keepdim=True).clamp(max=TOP_K - 1))

    return token if everything else matmuls


def _matrices(model: "GPT") -> "list[torch.nn.Linear]":
    import torch

    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def captured(call: Callable[[], object], device: "torch.device") -> Callable[[], object]:
    """On GPUs the replay of a graph of the call, without the time that launching its kernels takes."""
    if device.type != "cuda":
        return call
    from model.graphs import WARM, capture

    for _ in range(WARM):
        call()
    return capture(call)[0].replay

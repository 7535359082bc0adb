"""Generating text with random weights: the engine alone, and rollouts of a step of rl."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from data.tokens.tokenizer import SPECIAL_TOKENS
from model.config import GPTConfig
from model.decoding.engine import Completion, Engine
from model.decoding.sampling import Sampling
from model.gpt import GPT, build_model
from model.kernels.decoder import Decoder
from model.precision import resolve_dtype
from pipeline.bench.registry import Bench, Result, check_names
from pipeline.bench.timing import Cases, median_seconds

PROMPT_TOKENS = 16
TOP_K = 50
DRAWS = 8  # different logits: a processor learns to predict branches on the same ones
FEW = 2  # problems, and answers, of the slower ways to make rollouts: enough for a rate

Gemms = list[Callable[[], object]]


TINY = GPTConfig(depth=2, width=32, head_dim=16, vocab_size=64, sequence_len=64)
D4 = GPTConfig(depth=4, vocab_size=8192, sequence_len=512)
D20 = GPTConfig(depth=20, vocab_size=65_536, sequence_len=2048)


def decode(bench: Bench) -> Result:
    """tokens/s of model.decoding.engine.Engine.generate, by model and batch, compared with bounds measured in the same
    turns.

    tok_s: new tokens of all rows over the seconds of the whole call, prompts included; no row ends early.

    A bound is the GEMMs, attention and top-k sampling of one token, called one after the other on tensors that exist
    already, with rows half full; on GPUs replayed as a graph. of_torch_bound and of_torch_matmuls are the engine's
    speed as a share of that bound, and of the GEMMs alone, with torch's own GEMMs. The decoder has faster ones, so
    these may exceed 1; of_bound and of_matmuls use the faster of the two. of_bandwidth compares with reading the
    matrices and half-full caches at the speed of a copy; it may exceed 1 if these fit into a processor's caches.
    """
    settings = bench.settings
    sizes = bench.choose(  # model, new tokens, rows side by side
        tiny={"tiny": (TINY, 8, [1, 3])},
        cpu={"d4": (D4, 128, [1, 16, 64]), "d20": (D20, 64, [1, 16])},
        cuda={"d4": (D4, 128, [1, 16, 64]), "d20": (D20, 256, [1, 16, 64, 256])},
    )
    models = None if settings.tiny else settings.models
    check_names(models or [], sizes, "bench.models")
    result: Result = {}
    for name in models or sizes:
        config, new_tokens, batches = sizes[name]
        decoder = Decoder(build(config, bench.device), in_place=True)
        for rows in batches if settings.tiny else settings.batches or batches:
            source = torch.ones(bench.choose(1 << 16, 1 << 28, 1 << 31), dtype=torch.uint8, device=bench.device)
            copy = partial(torch.empty_like(source).copy_, source)  # of more bytes than caches hold
            cases: dict[str, Callable[[], object]] = {"engine": generate(decoder, new_tokens, rows), "copy": copy}
            held = PROMPT_TOKENS + new_tokens // 2  # in a row's cache when half of its new tokens are drawn
            for way, gemms in _gemms(decoder, rows).items():
                cases[f"bound, {way}"] = _captured(_one_token(decoder.model, gemms, held, rows), bench.device)
                cases[f"matmuls, {way}"] = _captured(_all_of(gemms), bench.device)
            seconds = median_seconds(bench, cases)
            token = seconds["engine"] / new_tokens
            bandwidth = 2 * len(source) / seconds["copy"]  # bytes read and bytes written
            result[f"{name} batch {rows}"] = {
                "tok_s": rows / token,
                "of_bound": min(seconds["bound, torch"], seconds["bound, decoder"]) / token,
                "of_matmuls": min(seconds["matmuls, torch"], seconds["matmuls, decoder"]) / token,
                "of_torch_bound": seconds["bound, torch"] / token,
                "of_torch_matmuls": seconds["matmuls, torch"] / token,
                "of_bandwidth": _bytes_per_token(decoder.model, held, rows) / bandwidth / token,
                "copy_gb_s": bandwidth / 1e9,
                "new_tokens": new_tokens,
            }
            bench.save(result)
    return result


def build(config: GPTConfig, device: torch.device) -> GPT:
    """A model in the dtype of inference. No weight is zero, so that sampling has something to choose from."""
    model = build_model(config.resolved())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.size(-1) ** -0.5)
    model.compute_dtype = resolve_dtype("auto", device)
    return model.to(device=device, dtype=model.compute_dtype).eval()


def new_engine(model: GPT, rows: int, decoder: Decoder | None = None) -> Engine:
    """An engine whose rows never end early, because special tokens have ids that are never drawn."""
    never = {name: -1 - place for place, name in enumerate(SPECIAL_TOKENS)}
    return Engine(model, never, lambda ids: b"", lambda text: [], rows=rows, decoder=decoder)


def prompts(count: int, config: GPTConfig) -> list[list[int]]:
    return [[(row + at) % (config.vocab_size or 1) for at in range(PROMPT_TOKENS)] for row in range(count)]


def generate(decoder: Decoder, new_tokens: int, rows: int) -> Callable[[], list[Completion]]:
    """A function that draws new_tokens for each of `rows` prompts, the same tokens each time."""
    engine = new_engine(decoder.model, rows, decoder)
    asked = prompts(rows, decoder.config)
    samplings = [Sampling(top_k=TOP_K, max_tokens=new_tokens, seed=row) for row in range(rows)]

    def call() -> list[Completion]:
        completions = engine.generate(asked, samplings)
        assert all(len(completion.tokens) == new_tokens for completion in completions)
        return completions

    return call


def _gemms(decoder: Decoder, rows: int) -> dict[str, Gemms]:
    """All GEMMs of one token, by torch alone and as the decoder computes them."""
    head = decoder.model.lm_head.weight
    linears = [module for module in decoder.model.modules() if isinstance(module, torch.nn.Linear)]
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


def _all_of(gemms: Gemms) -> Callable[[], object]:
    @torch.inference_mode()
    def multiply() -> None:
        for gemm in gemms:
            gemm()

    return multiply


def _one_token(model: GPT, gemms: Gemms, held: int, rows: int) -> Callable[[], object]:
    config, head = model.config, model.lm_head.weight

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=head.device, dtype=head.dtype)

    q = drawn(rows, config.heads, 1, config.head_dim)
    pairs = drawn(config.depth, 2, rows, config.kv_heads, held, config.head_dim)
    logits = itertools.cycle(drawn(DRAWS, rows, config.vocab_size).float().unbind())
    multiply = _all_of(gemms)

    @torch.inference_mode()
    def token() -> None:
        multiply()
        for k, v in pairs:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=config.heads != config.kv_heads)
        best, ids = next(logits).topk(TOP_K)
        reached = best.softmax(-1).cumsum(-1)
        ids.gather(1, (reached <= 0.5).sum(-1, keepdim=True).clamp(max=TOP_K - 1))

    return token


def _bytes_per_token(model: GPT, held: int, rows: int) -> int:
    """Bytes read for one token of each row: every matrix once, and the keys and values of `held` tokens per row."""
    config, element = model.config, model.lm_head.weight.element_size()
    return (config.matmul_params() + 2 * config.depth * config.kv_width * held * rows) * element


def _captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On GPUs the replay of a graph of the call, without the time that launching its kernels takes."""
    if device.type != "cuda":
        return call
    from model.kernels.graphs import WARM, capture

    for _ in range(WARM):
        call()
    return capture(call)[0].replay


def rollouts(bench: Bench) -> Result:
    """Rollouts of a step of rl: tokens/s for all problems and answers in one pass of the engine.

    one_prompt_tok_s: one problem after the other, each with all of its answers. one_answer_tok_s: one answer after the
    other. The model is that of recipe=tiny on CPUs and d20 on GPUs, not laid out for decoding, as rl trains it.
    """
    recipe_tiny = GPTConfig(depth=4, width=128, head_dim=32, vocab_size=2048, sequence_len=256)
    name, config, new_tokens, problems, samples = bench.choose(
        tiny=("smallest", TINY, 8, 3, 2), cpu=("tiny", recipe_tiny, 48, 16, 16), cuda=("d20", D20, 256, 16, 16)
    )
    engine = new_engine(build(config, bench.device), problems * samples)
    asked, sampling = prompts(problems, config), Sampling(top_k=TOP_K, max_tokens=new_tokens)

    def one_by_one(answers: int) -> None:
        for prompt in asked[:FEW]:
            engine.generate([prompt], sampling, answers)

    ways: Cases = {
        "all": lambda: engine.generate(asked, sampling, samples),
        "one_prompt": partial(one_by_one, samples),
        "one_answer": partial(one_by_one, 1),
    }
    answers = {"all": problems * samples, "one_prompt": FEW * samples, "one_answer": FEW}
    rate = {way: answers[way] * new_tokens / seconds for way, seconds in median_seconds(bench, ways).items()}
    return {
        name: {
            "tok_s": rate["all"],
            "one_prompt_tok_s": rate["one_prompt"],
            "times_one_prompt": rate["all"] / rate["one_prompt"],
            "one_answer_tok_s": rate["one_answer"],
            "times_one_answer": rate["all"] / rate["one_answer"],
            "answers": answers["all"],
        }
    }

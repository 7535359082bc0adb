"""From two artifacts to a model that answers: the only file of the user interface that knows the engine."""

from collections.abc import Callable, Iterator
from pathlib import Path

from data.chat.calculator import calculate
from data.tokens.tokenizer import Tokenizer
from model.decoding.engine import Engine
from model.decoding.sampling import Sampling
from model.kernels.decoder import decoder_of
from model.precision import resolve_dtype
from model.saved import load_model
from model.training.distributed import choose_device
from pipeline.artifacts.store import Store
from pipeline.commands.exported import read_marker
from pipeline.ui.chat import ChatSettings, End, Event, Generate, Text, ToolCall, ToolOutput


def load(model: Path, tokenizer: Path, device: str = "auto") -> tuple[Generate, Tokenizer, int, bool]:
    """What a ChatSession is made of. Raises ModelError, DataError."""
    vocabulary = Tokenizer.load(tokenizer)
    where = choose_device(device)
    network = load_model(model, where, resolve_dtype("auto", where))
    codec = vocabulary.decode_bytes, vocabulary.encode
    engine = Engine(network, vocabulary.special, *codec, calculate, rows=1, decoder=decoder_of(network, in_place=True))

    def generate(prompt: list[int], settings: ChatSettings, should_stop: Callable[[], bool]) -> Iterator[Event]:
        sampling = Sampling(
            temperature=settings.temperature,
            top_k=settings.top_k or None,
            top_p=settings.top_p if settings.top_p < 1 else None,
            seed=settings.seed or 0,
            max_tokens=settings.max_tokens,
        )
        for event in engine.stream(prompt, sampling, should_stop):
            if event.kind == "text":
                yield Text(event.text)
            elif event.kind == "tool_call":
                yield ToolCall(event.text)
            elif event.kind == "tool_output":
                yield ToolOutput(event.text)
            else:
                reason = {"cancelled": "stop", "length": "length"}.get(event.finish, "end")
                yield End(reason, event.tokens, 0.0)  # type: ignore[arg-type]

    context = int(network.config.sequence_len)  # type: ignore[union-attr, arg-type]
    origin = Store.read(model) or read_marker(model)
    return generate, vocabulary, context, origin is not None and origin.module == "pretrain"

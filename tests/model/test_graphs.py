"""Replayed steps do what steps do. A tape stands for the GPU: it repeats calls on the memory they were made on."""

import copy

import pytest
import torch
from engines import BOS, EXACT, PAST_WINDOWS, make_engine, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.decoding.sampling import Sampling
from model.kernels import graphs
from model.kernels.decoder import Decoder

ASKS_OR_SENDS = {"_local_scalar_dense", "nonzero", "lift_fresh", "_to_copy", "equal"}  # what no graph can hold


class Tape(TorchDispatchMode):
    """What torch.cuda.CUDAGraph is to a GPU. As there, capturing leaves no trace in what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.overwritten, self.replays = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in ASKS_OR_SENDS or (name == "_to_copy" and kwargs.get("device") is None), name
        assert "device" not in {a.name for a in func._schema.arguments} or kwargs.get("device") is not None, name
        by_name = dict(zip([argument.name for argument in func._schema.arguments], args)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten.append((by_name[argument.name], by_name[argument.name].clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def rewind(self) -> None:
        for tensor, before in reversed(self.overwritten):
            tensor.copy_(before)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)

    def pool(self) -> None:
        return None

    def outside(self) -> set[int]:
        """The memory it works on that it did not make."""
        made = {memory(tensor) for *_, result in self.calls for tensor in tree_leaves(result)}
        read = [tree_leaves((args, kwargs)) for _, args, kwargs, _ in self.calls]
        return {memory(leaf) for leaves in read for leaf in leaves if isinstance(leaf, torch.Tensor)} - made


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def memory_of(thing: object, seen: set[int]) -> set[int]:
    """Of all tensors that something holds on to, but for its graphs."""
    if isinstance(thing, torch.Tensor):
        return {memory(thing)}
    if id(thing) in seen or isinstance(thing, Tape):
        return set()
    seen.add(id(thing))
    parts = [thing.values() if isinstance(thing, dict) else thing] if isinstance(thing, dict | list | tuple) else []
    parts += [vars(thing).values()] if hasattr(thing, "__dict__") and not isinstance(thing, type) else []
    return set().union(*(memory_of(part, seen) for some in parts for part in some))


def record(call, pool=None):
    tape = Tape()
    with tape:
        result = call()
    tape.rewind()
    return tape, result


def laid_out(name: str, monkeypatch, captured=record) -> Decoder:
    """A decoder that replays, with spans small enough for many of them."""
    monkeypatch.setattr(graphs, "capture", captured)
    monkeypatch.setattr(graphs, "SMALLEST_SPAN", 8)
    decoder = Decoder(copy.deepcopy(EXACT[name]), in_place=True)
    decoder.replays = True
    return decoder


def tapes(decoder: Decoder) -> dict:
    """Of the batch that came last."""
    return {key: tape for key, (tape, _) in decoder.kept[0].graphs.items()}


@pytest.fixture(scope="module")
def patch():
    """Of a whole module, as generated examples share a decoder, and so its graphs, as they do in use."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


@pytest.fixture(scope="module", params=EXACT)
def decoder(request, patch) -> Decoder:
    return laid_out(request.param, patch)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    limits=st.lists(st.integers(1, 30), min_size=6, max_size=6),
    rows=st.integers(1, 5),
)
def test_greedy_is_a_full_forward_at_each_step_for_any_batch(decoder, lengths, limits, rows):
    prompts = [[BOS, *(place * (7 + row) % 251 for place in range(length))] for row, length in enumerate(lengths)]
    engine = make_engine(decoder.model, rows, decoder=decoder)

    made = engine.generate(prompts, [Sampling(temperature=0, max_tokens=limit) for _, limit in zip(prompts, limits)])

    wanted = [reference(decoder.model, prompt, limit) for prompt, limit in zip(prompts, limits)]
    assert [completion.tokens for completion in made] == wanted


def test_graphs_are_made_once_and_replayed(monkeypatch):
    decoder = laid_out("base", monkeypatch)
    engine = make_engine(decoder.model, decoder=decoder)
    ask = [[BOS, 5], [BOS, 6, 7], [BOS]], Sampling(temperature=0, max_tokens=40)

    first = engine.generate(*ask)
    after_one = tapes(decoder)
    spans = {span for _, span, *_ in after_one}
    assert {rows for rows, *_ in after_one} <= {1, 2, 4} and spans <= {8, 16, 24, 32, 40, 48} and len(spans) > 2
    assert all(tape.replays for tape in after_one.values())
    assert engine.generate(*ask) == first
    again = tapes(decoder)
    assert all(again[key] is tape for key, tape in after_one.items())
    assert sum(tape.replays for tape in again.values()) > 60  # steps of two calls; but for the first of each kind


@pytest.mark.parametrize("name", EXACT)
def test_what_a_graph_works_on_is_kept(name, monkeypatch):
    """A GPU's graph knows addresses alone: memory that nobody else holds would be given to somebody."""
    decoder = laid_out(name, monkeypatch)
    engine = make_engine(decoder.model, decoder=decoder)
    penalised = Sampling(repetition_penalty=1.2, top_p=0.9, min_p=0.01, max_tokens=20)
    for _ in range(2):
        engine.generate([[BOS], [BOS, 5]], [penalised, Sampling(temperature=0.0)], samples=4)
        engine.generate([[BOS, 7]], Sampling(top_k=None, temperature=0.7, max_tokens=20))
    kept = memory_of(decoder, set())
    assert all(tape.outside() and tape.outside() <= kept for tape in tapes(decoder).values())


def test_windows_that_have_left_the_prompt_behind(monkeypatch):
    decoder = laid_out("modern", monkeypatch)
    prompts = [[BOS, *(place * 7 % 251 for place in range(length))] for length in (PAST_WINDOWS, 3, 120)]
    made = make_engine(decoder.model, decoder=decoder).generate(prompts, Sampling(temperature=0, max_tokens=25))
    assert min(decoder.model.config.windows()) == 128 and tapes(decoder)
    assert [c.tokens for c in made] == [reference(decoder.model, prompt, 25) for prompt in prompts]


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        [{}, {}, {}],
        [{"top_k": None}, {"top_k": 3}, {"temperature": 0.0}],
        [{"top_p": 0.8}, {"min_p": 0.05}, {"temperature": 1.7}],
        [{"repetition_penalty": 1.4}, {"repetition_penalty": 1.1, "temperature": 0.0}, {"top_k": None}],
    ],
    ids=["alike", "limits", "shapes", "penalties"],
)
def test_draws_are_those_of_an_engine_without_graphs(changes, logprobs, monkeypatch):
    decoder = laid_out("modern", monkeypatch)
    wanted = [Sampling(seed=row, max_tokens=30 - 5 * row, **change) for row, change in enumerate(changes)]
    prompts = [[BOS, *range(10 * row)] for row in range(3)]
    plain = make_engine(decoder.model).generate(prompts, wanted, samples=3, logprobs=logprobs)

    engine = make_engine(decoder.model, rows=5, decoder=decoder)
    for _ in range(2):
        made = engine.generate(prompts, wanted, samples=3, logprobs=logprobs)
        assert [completion.tokens for completion in made] == [completion.tokens for completion in plain]
        for one, other in zip(made, plain):
            assert not logprobs or one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert any(tape.replays for tape in tapes(decoder).values())


def test_a_tool_result_is_forced_into_a_replayed_row(monkeypatch):
    decoder = laid_out("base", monkeypatch)
    ask = [[BOS, 1], [BOS, 2]], Sampling(temperature=2.0, top_k=None, max_tokens=60)
    written = make_engine(decoder.model).generate(*ask)[0].tokens
    start, end = written[3], next(token for token in written[8:] if token not in (written[3], BOS))

    def made(**changes):
        engine = make_engine(decoder.model, tools=lambda text: "42", **changes)
        engine.python_start, engine.python_end = start, end
        return engine.generate(*ask, samples=8)

    plain = made()
    assert any(any(completion.forced) for completion in plain)
    assert made(decoder=decoder) == plain and any(tape.replays for tape in tapes(decoder).values())


def test_two_conversations_at_once_do_not_share_memory(monkeypatch):
    decoder = laid_out("base", monkeypatch)
    engine = make_engine(decoder.model, rows=1, decoder=decoder)
    one, other = ([BOS, *text] for text in (b"first", b"the second"))
    wanted = [reference(decoder.model, prompt, 20) for prompt in (one, other)]
    rows = [engine.row(0, 0, prompt, Sampling(temperature=0, max_tokens=20)) for prompt in (one, other)]
    for _ in zip(engine.decode([rows[0]]), engine.decode([rows[1]])):
        pass
    assert [row.tokens for row in rows] == wanted
    assert len(decoder.kept) == 1


def test_a_batch_that_does_not_fit_gets_a_larger_place_and_then_stays_in_it(monkeypatch):
    decoder = laid_out("base", monkeypatch)
    engine, greedy = make_engine(decoder.model, rows=4, decoder=decoder), Sampling(temperature=0, max_tokens=9)
    sizes = []
    for prompts in ([[BOS]] * 3, [[BOS, *range(60)]], [[BOS]] * 5, [[BOS, *range(50)]] * 2):
        assert [c.tokens for c in engine.generate(prompts, greedy)] == [reference(decoder.model, p, 9) for p in prompts]
        sizes.append((decoder.kept[0].rows, decoder.kept[0].length))
    assert sizes == [(4, 16), (4, 80), (4, 80), (4, 80)]


def test_where_nothing_can_be_captured_decoding_goes_on_and_says_so_once(monkeypatch):
    def refuse(call, pool=None):
        raise RuntimeError("no graphs here")

    decoder = laid_out("base", monkeypatch, refuse)
    engine, ask = make_engine(decoder.model, decoder=decoder), ([[BOS, 3]], Sampling(temperature=0, max_tokens=30))
    with pytest.warns(UserWarning, match="without CUDA graphs, more slowly: no graphs here") as said:
        made = [engine.generate(*ask)[0].tokens for _ in range(2)]
    assert made == [reference(decoder.model, [BOS, 3], 30)] * 2 and len(said) == 1


def test_only_so_many_graphs_are_kept(monkeypatch):
    decoder = laid_out("base", monkeypatch)
    monkeypatch.setattr(graphs, "MOST", 3)
    engine = make_engine(decoder.model, decoder=decoder)
    for top_k in (3, 4, 5, 6):
        ask = [[BOS]], Sampling(top_k=top_k, max_tokens=20)
        assert engine.generate(*ask) == make_engine(decoder.model).generate(*ask)
        assert 0 < len(tapes(decoder)) <= 3


def test_numbers_that_went_wrong_do_not_stay_for_the_next_batch(monkeypatch):
    decoder = laid_out("base", monkeypatch)
    engine, ask = make_engine(decoder.model, decoder=decoder), ([[BOS]], Sampling(temperature=0, max_tokens=9))
    made = engine.generate(*ask)
    with torch.inference_mode():
        decoder.kept[0].cache.pairs.fill_(torch.nan)
    assert engine.generate(*ask) == made


def test_only_weights_that_stay_are_replayed():
    model = copy.deepcopy(EXACT["base"])
    assert not Decoder(model).replays and not Decoder(model, in_place=True).replays  # in training; on a CPU


@given(st.integers(1, 4096))
def test_a_span_is_never_much_longer_than_it_must_be(places):
    span = graphs.span_for(places)
    assert places <= span <= max(places * 1.25 + 1, places + 63)


def test_rows_are_powers_of_two():
    assert [graphs.rows_for(rows) for rows in (1, 2, 3, 4, 5, 17, 256)] == [1, 2, 4, 4, 8, 32, 256]

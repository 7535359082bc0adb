"""The engine generates what a full forward pass at each step would, whatever is generated beside it."""

import copy

import pytest
import torch
from engines import BOS, EXACT, MODELS, PAST_WINDOWS, SPECIAL, VOCAB, decode_bytes, encode, make_engine, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import GPTConfig
from model.decoding.engine import Engine, drop_oldest_turns
from model.decoding.sampling import Sampler, Sampling, likeliest, uniforms
from model.errors import ModelError
from model.gpt import GPT

prompts_strategy = st.lists(
    st.lists(st.integers(0, 255), min_size=1, max_size=60).map(lambda ids: [BOS, *ids]), min_size=1, max_size=6
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None)
@given(prompts=prompts_strategy, rows=st.integers(1, 4), data=st.data())
def test_greedy_is_a_full_forward_at_each_step_for_any_batch(name, prompts, rows, data):
    model = EXACT[name]
    limits = [data.draw(st.integers(1, 20)) for _ in prompts]

    made = make_engine(model, rows).generate(prompts, [Sampling(temperature=0, max_tokens=n) for n in limits])

    assert [c.tokens for c in made] == [reference(model, p, n) for p, n in zip(prompts, limits)]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_greedy_is_a_full_forward_where_windows_have_left_the_prompt_behind(rows):
    model = EXACT["modern"]
    prompts = [[BOS, *(n * 7 % 251 for n in range(length))] for length in (PAST_WINDOWS, 3, 120, 133, 40)]
    limits = [20, 30, 20, 25, 12]
    wild = Sampling(temperature=1.5, top_k=None, repetition_penalty=1.3, max_tokens=9)
    greedy = [Sampling(temperature=0, max_tokens=n) for n in limits]

    made = make_engine(model, rows).generate([[BOS, 5], *prompts], [wild, *greedy])

    assert min(model.config.windows()) == 128 and model.config.smear and model.config.value_embeddings
    assert [c.tokens for c in made[1:]] == [reference(model, p, n) for p, n in zip(prompts, limits)]


class Contrary(GPT):
    """Its head does not keep the order of what lm_head gives."""

    def head(self, hidden):
        return -super().head(hidden)


def test_a_subclass_with_a_head_of_its_own_is_decoded_by_that_head():
    model = Contrary(MODELS["base"].config).eval()
    model.load_state_dict(MODELS["base"].state_dict())
    made = make_engine(model).generate([[BOS, 1, 2]], Sampling(temperature=0, max_tokens=8))
    assert made[0].tokens == reference(model, [BOS, 1, 2], 8)


def test_an_engine_follows_the_weights_of_a_model_in_training():
    model = copy.deepcopy(EXACT["base"])
    engine, prompt, greedy = make_engine(model), [BOS, 1, 2], Sampling(temperature=0, max_tokens=12)
    before = engine.generate([prompt], greedy)[0].tokens
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    after = engine.generate([prompt], greedy)[0].tokens
    assert after == reference(model, prompt, 12) != before


settings_strategy = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 4, 50, 1000]),
    top_p=st.sampled_from([None, 0.5, 0.95]),
    min_p=st.sampled_from([None, 0.02, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    seed=st.integers(-3, 3),
    max_tokens=st.integers(1, 14),
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=15, deadline=None)
@given(asked=st.lists(st.tuples(st.integers(1, 20), settings_strategy), min_size=2, max_size=6), rows=st.integers(1, 5))
def test_a_seeded_completion_does_not_depend_on_its_neighbours(name, asked, rows):
    model = EXACT[name]
    prompts, wanted = [[BOS, *range(length)] for length, _ in asked], [sampling for _, sampling in asked]

    together = make_engine(model, rows).generate(prompts, wanted)

    alone = [make_engine(model).generate([prompt], one)[0] for prompt, one in zip(prompts, wanted)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_samples_of_one_prompt_differ_from_the_first_token_on():
    made = make_engine(MODELS["base"]).generate(
        [[BOS, 5]], Sampling(temperature=2.0, top_k=None, max_tokens=3), samples=16
    )

    assert len({c.tokens[0] for c in made}) > 4
    assert (
        make_engine(MODELS["base"], rows=3).generate([[BOS, 5]], Sampling(2.0, None, max_tokens=3), samples=16) == made
    )


def test_logprobs_are_those_of_the_whole_distribution_at_the_temperature():
    model, prompt = MODELS["base"], [BOS, 9, 8]
    made = make_engine(model).generate([prompt], Sampling(temperature=0.7, top_k=5, max_tokens=6), logprobs=True)[0]

    with torch.inference_mode():
        logits = model(torch.tensor([prompt + made.tokens]))[0, len(prompt) - 1 : -1]
    expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(made.tokens)[:, None])[:, 0]

    torch.testing.assert_close(torch.tensor(made.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_penalty_is_of_what_the_model_says_whether_logprobs_are_asked_for_or_not(temperature):
    model, prompt = copy.deepcopy(EXACT["base"]), [BOS, *range(40)]
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # far up, where a cap weighs
    asked = Sampling(temperature=temperature, top_k=None, repetition_penalty=1.4, max_tokens=1)

    made = [make_engine(model).generate([prompt], asked, 16, logprobs) for logprobs in (False, True)]
    assert [c.tokens for c in made[0]] == [c.tokens for c in made[1]]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]))[0, -1].clone()
        seen = logits[prompt]
        logits[prompt] = torch.where(seen < 0, seen * 1.4, seen / 1.4)
    assert temperature or made[0][0].tokens == [int(logits.argmax())]


@pytest.mark.parametrize("nearly_greedy", [{"temperature": 1e-300}, {"top_p": 1e-60}, {"max_tokens": 10**12}])
def test_settings_at_their_limits_draw_what_is_likeliest(nearly_greedy):
    asked = Sampling(**{"temperature": 1e-5, "top_k": None, "max_tokens": 6} | nearly_greedy)
    made = make_engine(EXACT["base"]).generate([[BOS, 5]], asked)[0]
    assert made.tokens[:6] == reference(EXACT["base"], [BOS, 5], 6)


class Scripted(torch.nn.Module):
    """Writes a fixed text after any prompt of a given length, whatever it is fed."""

    def __init__(self, script: list[int], prompt_len: int) -> None:
        super().__init__()
        self.config = GPTConfig(depth=1, width=16, head_dim=16, sequence_len=256).resolved(VOCAB)
        self.compute_dtype = torch.float32
        self.lm_head = torch.nn.Linear(VOCAB, VOCAB, bias=False)
        self.script, self.prompt_len = script, prompt_len
        self.read: list[int] = []

    def hidden(self, tokens, cache):
        self.read += tokens.flatten().tolist()
        at = cache.positions(tokens.size(1)) - self.prompt_len + 1
        following = torch.tensor(self.script)[at.clamp(0, len(self.script) - 1)]
        return torch.nn.functional.one_hot(following, VOCAB).float()

    def head(self, hidden):
        return hidden * 20


CALL, CALL_END = SPECIAL["<|python_start|>"], SPECIAL["<|python_end|>"]
OUT, OUT_END, END = SPECIAL["<|output_start|>"], SPECIAL["<|output_end|>"], SPECIAL["<|assistant_end|>"]


def test_a_tool_is_asked_once_and_its_answer_is_forced_and_flagged():
    asked = []
    script = [*b"so ", CALL, *b"1+2", CALL_END, 0, 0, 0, *b"it is", END]  # three zeros: overridden by the result
    model = Scripted(script, prompt_len=2)

    made = make_engine(model, tools=lambda text: asked.append(text) or "3").generate(
        [[BOS, 1]], Sampling(temperature=0)
    )[0]

    assert asked == ["1+2"]
    assert made.tokens == [*b"so ", CALL, *b"1+2", CALL_END, OUT, *b"3", OUT_END, *b"it is", END]
    assert [token for token, forced in zip(made.tokens, made.forced) if forced] == [OUT, *b"3", OUT_END]
    assert made.finish == "end" and made.written == made.tokens[:-1]
    assert model.read == [BOS, 1, *made.tokens[:-1]]  # the model reads the result like its own words


def test_a_call_without_a_result_is_left_to_the_model():
    script = [CALL, *b"?", CALL_END, *b"hm", END]

    made = make_engine(Scripted(script, 1), tools=lambda text: None).generate([[BOS]], Sampling(temperature=0))[0]

    assert made.tokens == script and not any(made.forced)


def test_streaming_sends_whole_characters_calls_and_results():
    script = [*"é🙂".encode(), CALL, *b"2*3", CALL_END, 0, 0, 0, *b"six", END]
    events = list(make_engine(Scripted(script, 1), tools=lambda text: "6").stream([BOS], Sampling(temperature=0)))

    texts = [(e.kind, e.text) for e in events]
    assert texts == [
        ("text", "é"),
        ("text", "🙂"),
        ("tool_call", "2*3"),
        ("tool_output", "6"),
        *(("text", c) for c in "six"),
        ("end", ""),
    ]
    assert (events[-1].finish, events[-1].tokens) == ("end", len(script))


def test_a_result_that_the_model_makes_up_is_not_shown_as_a_tool_s():
    script = [CALL, *b"?", CALL_END, OUT, *b"7", OUT_END, *b"!", END]
    events = list(make_engine(Scripted(script, 1), tools=lambda text: None).stream([BOS], Sampling(temperature=0)))

    assert [(e.kind, e.text) for e in events[:-1]] == [("tool_call", "?"), ("text", "7"), ("text", "!")]


def test_a_broken_character_at_the_end_is_shown_as_such():
    events = list(make_engine(Scripted([*"🙂".encode()[:2], END], 1)).stream([BOS], Sampling(temperature=0)))

    assert "".join(e.text for e in events) == "\ufffd"


@pytest.mark.parametrize("stop", [("lo w",), ("zzz", "o world"), ("low", "o w")])
def test_stop_texts_end_the_completion_and_are_not_streamed(stop):
    script = [*b"hello world", END]
    sampling = Sampling(temperature=0, stop=stop)

    made = make_engine(Scripted(script, 1)).generate([[BOS]], sampling)[0]
    events = list(make_engine(Scripted(script, 1)).stream([BOS], sampling))

    matched = next(text for text in stop if text in "hello world")
    assert made.finish == "stop" and decode_bytes(made.tokens).decode().endswith(matched)
    assert "".join(e.text for e in events) == "hello world".split(matched)[0]


def test_a_stop_text_is_looked_for_in_what_is_said_alone():
    """Not in calls, their results or the names of special tokens; streaming and generating agree."""
    names = {number: name.encode() for name, number in SPECIAL.items()}
    script = [*b"so ", CALL, *b"6*7", CALL_END, 0, 0, 0, 0, *b"42 is it", END]
    asked = Sampling(temperature=0, stop=("python", "|", "*", "2 is", "a stop text that is longer than all of it"))

    def engine():
        decode = lambda ids: b"".join(names.get(token, bytes([token % 256])) for token in ids)  # noqa: E731
        return Engine(Scripted(script, 1), SPECIAL, decode, encode, lambda text: "42")

    made, events = engine().generate([[BOS]], asked)[0], list(engine().stream([BOS], asked))

    assert made.tokens == [*b"so ", CALL, *b"6*7", CALL_END, OUT, *b"42", OUT_END, *b"42 is"] and made.finish == "stop"
    assert "".join(event.text for event in events if event.kind == "text") == "so 4" and events[-1].finish == "stop"


def test_generation_can_be_cancelled_and_keeps_what_there_is():
    calls = iter([False, False, True])
    made = make_engine(Scripted([*b"abcdefgh", END], 1)).generate(
        [[BOS]], Sampling(temperature=0), should_stop=lambda: next(calls)
    )

    assert made[0].finish == "cancelled" and decode_bytes(made[0].tokens) == b"abc"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_context_is_never_exceeded_and_the_completion_says_so(temperature):
    model = MODELS["base"]
    prompt = [BOS, *(n % 250 for n in range(70))]

    made = make_engine(model).generate([prompt], Sampling(temperature=temperature, max_tokens=500))[0]

    assert made.finish in ("length", "end") and len(made.prompt) + len(made.tokens) <= 96


def test_the_oldest_turns_go_first():
    user, end = SPECIAL["<|user_start|>"], SPECIAL["<|user_end|>"]
    turns = [[user, *[n] * 10, end, SPECIAL["<|assistant_start|>"], *[100 + n] * 5, END] for n in range(4)]
    prompt = [BOS, *turns[0], *turns[1], *turns[2], *turns[3]]

    assert drop_oldest_turns(prompt, 200, SPECIAL) == (prompt, 0)
    assert drop_oldest_turns(prompt, 50, SPECIAL) == ([BOS, *turns[2], *turns[3]], 2)
    shortened, dropped = drop_oldest_turns(prompt, 10, SPECIAL)
    assert shortened == [BOS, user, *prompt[-8:]] and dropped == 4


@given(st.lists(st.integers(250, VOCAB - 1), min_size=1, max_size=40), st.integers(1, 30))
def test_a_shortened_prompt_always_fits_and_keeps_its_first_token(prompt, limit):
    shortened, dropped = drop_oldest_turns(prompt, limit, SPECIAL)

    assert 1 <= len(shortened) <= max(limit, 1) and shortened[0] == prompt[0]
    assert (dropped == 0) == (shortened == prompt)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 2}, {"max_tokens": 0}, {"stop": ("",)}]
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ModelError, match=next(iter(wrong))):
        make_engine(MODELS["base"]).generate([[BOS]], Sampling(**wrong))


def draws(logits: torch.Tensor, sampling: Sampling, count: int = 4000) -> torch.Tensor:
    """How often each token is drawn."""
    sampler = Sampler(count, 1, logits.numel(), "cpu")
    for row in range(count):
        sampler.assign(row, sampling, row, [0])
    sampler.ready()
    return torch.bincount(sampler.draw(logits.expand(count, -1), list(range(count))), minlength=logits.numel()) / count


def test_draws_follow_the_distribution_and_its_limits():
    probabilities = torch.tensor([0.05, 0.4, 0.3, 0.2, 0.05])
    logits = probabilities.log()

    assert (draws(logits, Sampling(top_k=None, max_tokens=1)) - probabilities).abs().max() < 0.03
    top_two = draws(logits, Sampling(top_k=2, max_tokens=1))
    assert (top_two - torch.tensor([0, 4 / 7, 3 / 7, 0, 0])).abs().max() < 0.03
    assert (draws(logits, Sampling(top_k=None, top_p=0.6, max_tokens=1)) > 0).tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert (draws(logits, Sampling(top_k=None, min_p=0.45, max_tokens=1)) > 0).tolist() == [
        False,
        True,
        True,
        True,
        False,
    ]
    cold = draws(logits, Sampling(temperature=0.5, top_k=None, max_tokens=1))
    assert (cold - probabilities**2 / (probabilities**2).sum()).abs().max() < 0.03


def test_the_limits_of_a_row_hold_beside_rows_without_any():
    logits = torch.tensor([0.05, 0.4, 0.3, 0.2, 0.05]).log()
    sampler = Sampler(500, 1, 5, "cpu")
    for row in range(500):
        sampler.assign(row, Sampling(top_k=2 if row % 2 else None, max_tokens=1), row, [0])
    sampler.ready()

    tokens = sampler.draw(logits.expand(500, -1), list(range(500)))

    assert set(tokens[1::2].tolist()) == {1, 2} and set(tokens[::2].tolist()) == {0, 1, 2, 3, 4}


def drawn_first(logits: torch.Tensor, *settings: Sampling, cap=None) -> list[int]:
    """60 draws of the first row, with the others beside it."""
    sampler, rows = Sampler(len(settings), 60, logits.numel(), "cpu"), list(range(len(settings)))
    for row, one in enumerate(settings):
        sampler.assign(row, one, 0, [0])
    sampler.ready()
    return [int(sampler.draw(logits.repeat(len(rows), 1), rows, cap)[0]) for _ in range(60)]


def test_which_of_equal_logits_is_drawn_does_not_depend_on_the_neighbours():
    logits = (3 * torch.randn(2048, generator=torch.Generator().manual_seed(0))).bfloat16().float()
    one = Sampling(top_k=50, max_tokens=60)
    for other in (Sampling(top_k=1500, max_tokens=60), Sampling(top_k=None, top_p=0.9, max_tokens=60)):
        assert drawn_first(logits, one, other) == drawn_first(logits, one)


def test_logits_that_a_cap_makes_equal_are_drawn_alike_whoever_stands_beside():
    logits, cap = 100 + 50 * torch.randn(300, generator=torch.Generator().manual_seed(0)), MODELS["base"].cap
    assert len(set(cap(logits).tolist())) < 200
    one = Sampling(top_k=40, max_tokens=60)
    for other in (Sampling(repetition_penalty=1.3), Sampling(top_p=0.9), Sampling(min_p=0.1, top_k=None)):
        assert drawn_first(logits, one, other, cap=cap) == drawn_first(logits, one, cap=cap)


def test_a_repetition_penalty_makes_seen_tokens_less_likely():
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    sampler = Sampler(1, 4, 3, "cpu")
    sampler.assign(0, Sampling(temperature=0, repetition_penalty=1.5, max_tokens=4), 0, [0])
    sampler.ready()

    drawn = []
    for _ in range(3):
        drawn.append(int(sampler.draw(logits, [0])))
        sampler.saw([0], drawn[-1:])

    assert drawn == [1, 0, 0]


def test_a_penalty_counts_what_the_completion_holds_and_not_what_a_tool_result_took_the_place_of():
    script = [CALL, *b"1", CALL_END, *b"xxx", *b"yz", END]  # of xxx, two stand where the result is put

    class Unsure(Scripted):
        """Would nearly as soon write a w."""

        def head(self, hidden):
            logits = 20 * hidden
            logits[:, ord("w")] += 15
            return logits

    sampling = Sampling(temperature=0, repetition_penalty=1.5)
    made = make_engine(Unsure(script, 1), tools=lambda text: "").generate([[BOS]], sampling)[0]

    assert bytes(made.tokens[-4:-1]) == b"xyz"


def test_uniforms_are_a_function_of_seed_and_sample():
    assert torch.equal(uniforms(3, 1, 8), uniforms(3, 1, 8))
    assert all(torch.equal(uniforms(3, 1, 600)[:count], uniforms(3, 1, count)) for count in range(1, 600, 7))
    assert not torch.equal(uniforms(3, 1, 8), uniforms(-3, 1, 8))
    assert not torch.equal(uniforms(3, 1, 8), uniforms(3, 2, 8))


@pytest.mark.parametrize(
    ("size", "count"), [(2048, 50), (512, 16), (512, 32), (513, 16), (2048, 500), (8192, 50), (64, 64)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_likeliest_are_those_of_topk(size, count, turned):
    logits = torch.randn(size, 9).t() if turned else torch.randn(9, size)
    values, places = likeliest(logits, count)
    wanted = logits.topk(count)
    assert torch.equal(values, wanted.values) and torch.equal(places, wanted.indices)
    few = torch.randint(0, 5, logits.shape).float()  # many are equal: any of them will do, but each only once
    values, places = likeliest(few, count)
    assert torch.equal(values, few.topk(count).values) and torch.equal(few.gather(1, places), values)
    assert all(len(set(row)) == count for row in places.tolist())

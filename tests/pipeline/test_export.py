"""export: what transformers loads from the folder is the model, the tokenizer and the template that we have."""

import json
import os
import pickle
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data.chat.conversation import render, render_prompt
from data.tokens.tokenizer import SPECIAL_TOKENS, Tokenizer
from model.decoding.engine import Engine
from model.decoding.sampling import Sampling
from model.errors import ModelError
from model.saved import load_model
from pipeline.commands.export import write
from pipeline.errors import UserError
from tests.conftest import tries
from tests.pipeline.small_store import model_of, put_model, small_store

QUESTION = {"role": "user", "content": "What is 1 + 1? "}
TOOL_USE = [
    {"type": "text", "text": "Let me see: "},
    {"type": "python", "text": "1 + 1"},
    {"type": "python_output", "text": "2"},
    {"type": "text", "text": "\nIt is 2.\n"},
]
CONVERSATIONS = {
    "a question": [QUESTION],
    "an answer": [QUESTION, {"role": "assistant", "content": "2"}],
    "a system message": [{"role": "system", "content": "Be brief."}, QUESTION, {"role": "assistant", "content": " 2 "}],
    "tool use": [QUESTION, {"role": "assistant", "content": TOOL_USE}],
    "several turns": [
        {"role": "system", "content": "\n"},
        QUESTION,
        {"role": "assistant", "content": TOOL_USE},
        {"role": "user", "content": "  And\n\n2 + 2?\t"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "日本 \U0001f600 {{ braces }} {% tag %} <b>'\"&"},
    ],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = small_store(tmp_path_factory.mktemp("store"))
    put_model(store, "pretrain", "grouped", {}, kv_heads=1)
    put_model(store, "pretrain", "modern", {}, arch="modern")
    return store


@pytest.fixture(scope="module")
def exported(store, tmp_path_factory):
    """Folders by the name of a model."""
    root = tmp_path_factory.mktemp("exported")
    for name in ("sft", "grouped"):
        write(model_of(store, name), root / name)
    pytest.importorskip("transformers")
    return root


@pytest.fixture(scope="module")
def theirs(exported):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exported / "sft")


@pytest.fixture(scope="module")
def ours(store):
    return Tokenizer.load(model_of(store, "sft").tokenizer)


@pytest.mark.parametrize("name", ["sft", "grouped"])
def test_transformers_gives_the_same_logits_and_the_same_tokens_greedily(store, exported, ours, name):
    from transformers import AutoModelForCausalLM

    their_model = AutoModelForCausalLM.from_pretrained(exported / name)
    our_model = load_model(model_of(store, name).folder)
    engine = Engine(our_model, ours.special, ours.decode_bytes, ours.encode, tools=None)
    tokens = torch.randint(ours.vocab_size, (3, 128), generator=torch.Generator().manual_seed(0))
    prompts = [[ours.bos, *ours.encode(text)] for text in ("The mill grinds", "def", "Who are you? " * 4)]

    with torch.no_grad():
        logits = their_model(tokens).logits
    completions = engine.generate(prompts, Sampling(temperature=0.0, max_tokens=48))

    assert type(their_model).__name__ == "NanoChatForCausalLM" and their_model.dtype == torch.float32
    torch.testing.assert_close(logits, our_model(tokens), rtol=0, atol=1e-4)
    for prompt, completion in zip(prompts, completions):
        written = their_model.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)
        assert written[0, len(prompt) :].tolist() == completion.tokens


WORDS = ["a", "The", " mill", "\n", "  ", "1 + 1", "é", "日本", "\U0001f600", "don't", "{{ x }}", "<b>", "\t2,000"]


def conversation(random: Random) -> list[dict]:
    """Varied messages: with and without a system message, one to four turns, calls and their results in any place."""

    def text(least: int = 0) -> str:
        return "".join(random.choices(WORDS, k=random.randint(least, 8)))

    def answer() -> str | list[dict]:
        kinds = random.choices(["text", "python", "python_output"], k=random.randint(1, 6))
        parts = [{"type": kind, "text": text()} for kind in kinds]
        return text() if random.random() < 0.5 else parts

    turns = [({"role": "user", "content": text()}, {"role": "assistant", "content": answer()}) for _ in range(4)]
    system = [{"role": "system", "content": text()}] if random.random() < 0.3 else []
    return system + [message for turn in turns[: random.randint(1, 4)] for message in turn]


@pytest.mark.parametrize("count", [50, pytest.param(2000, marks=pytest.mark.full)])
def test_ids_and_the_mask_of_what_is_trained_on_are_ours(theirs, ours, count):
    for number in range(count):
        messages = conversation(Random(number))
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (found["input_ids"], found["assistant_masks"]) == render({"messages": messages}, ours)


def test_a_turn_ends_there_where_the_engine_ends_it(exported, ours):
    generation = json.loads((exported / "sft" / "generation_config.json").read_text())

    assert set(generation["eos_token_id"]) == {ours.special["<|assistant_end|>"], ours.bos}
    assert not any("max" in name for name in generation)  # the caller decides how long an answer may get


texts = st.text(st.characters(codec="utf-8"), max_size=60) | st.text(" \n\t\r12345'saZ.é", max_size=60)


@settings(max_examples=tries(200), deadline=None)
@given(text=texts.filter(lambda text: not any(name in text for name in SPECIAL_TOKENS)))
def test_the_tokenizer_gives_the_same_ids_and_the_text_back(theirs, ours, text):
    ids = ours.encode(text)

    assert theirs(text)["input_ids"] == theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == text


def test_special_tokens_have_the_same_ids_and_can_be_kept_from_being_read_out_of_text(theirs, ours):
    assert [theirs.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS] == [*ours.special.values()]
    assert theirs("<|bos|>", split_special_tokens=True)["input_ids"] == ours.encode("<|bos|>")


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_the_chat_template_gives_the_ids_that_we_render(theirs, ours, messages):
    conversation = {"messages": messages}
    if messages[-1]["role"] == "assistant":
        found = theirs.apply_chat_template(messages, return_dict=True)
        assert found["input_ids"] == render(conversation, ours)[0]
        messages = messages[:-1]
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert found["input_ids"] == render_prompt(conversation, ours)


def test_the_command_exports_by_stage_key_and_folder_and_replaces_an_earlier_export(chatmill, store, tmp_path):
    chatmill.store = store.root
    model, target = model_of(store, "pretrain"), tmp_path / "deep" / "model"

    said = chatmill.run("export", "pretrain", "--format", "hf", str(target))
    before = (target / "model.safetensors").read_bytes()
    chatmill.run("export", str(model_of(store, "sft").folder), str(target))
    after = (target / "model.safetensors").read_bytes()
    again = chatmill.run("export", model.key[:12], str(target))

    assert f"Replaced the export of sft {model_of(store, 'sft').key} in {target} (5 files)" in again
    assert f"from_pretrained('{target}')" in said
    assert before != after and (target / "model.safetensors").read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["model"]  # nothing is left beside it


def test_modern_weights_say_which_switches_are_in_the_way_and_leave_nothing(chatmill, store, tmp_path):
    chatmill.store = store.root

    said = chatmill.run("export", "modern", str(tmp_path / "out"), code=2)

    for switch in ("qk_gain=1.2", "lambdas=true", "value_embeddings=true", "backout=true", "smear=true"):
        assert switch in said
    assert "cannot be exported" in said and list(tmp_path.iterdir()) == []


def test_nanochat_finds_its_checkpoint_and_tokenizer_with_plain_tensors_by_its_names(store, ours, tmp_path):
    for stage, place in (("sft", "chatsft_checkpoints"), ("pretrain", "base_checkpoints")):
        base = tmp_path / stage
        write(model_of(store, stage), base, "nanochat")
        network = load_model(model_of(store, stage).folder)

        weights = torch.load(base / place / "d2" / "model_000000.pt", weights_only=True)
        meta = json.loads((base / place / "d2" / "meta_000000.json").read_text())
        with open(base / "tokenizer" / "tokenizer.pkl", "rb") as file:
            encoding = pickle.load(file)
        token_bytes = torch.load(base / "tokenizer" / "token_bytes.pt", weights_only=True)

        assert torch.equal(weights["transformer.h.1.mlp.c_fc.weight"], network.layers[1].mlp.fc1.weight)
        assert (
            len(weights) == len(network.state_dict()) and {"lm_head.weight", "transformer.wte.weight"} <= weights.keys()
        )
        sizes = {"sequence_len": 128, "vocab_size": 400, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
        assert meta["model_config"] == sizes
        assert encoding.encode_ordinary("The mill grinds 1234") == ours.encode("The mill grinds 1234")
        assert token_bytes.tolist() == ours.token_bytes.tolist()
        # mlx-lm reads the folder itself
        assert load_file(base / "model.safetensors").keys() == weights.keys()
        assert json.loads((base / "config.json").read_text())["rope_theta"] == 10_000.0


def test_what_nanochat_has_not_is_named(store, tmp_path):
    put_model(store, "pretrain", "far", {}, rope_theta=100_000.0)

    with pytest.raises(ModelError, match="nanochat has no rope_theta=100000"):
        write(model_of(store, "far"), tmp_path / "out", "nanochat")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", ["notes.txt", "model.safetensors"])
def test_a_folder_that_is_no_export_is_left_alone(store, tmp_path, kept):
    (tmp_path / kept).write_text("mine")

    with pytest.raises(UserError, match=r"is neither empty nor an earlier export\. Name a new folder"):
        write(model_of(store, "sft"), tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == [kept]


def test_an_earlier_export_is_replaced_and_files_of_others_stay_as_they_are(store, tmp_path):
    target = tmp_path / "out"
    write(model_of(store, "grouped"), target, "nanochat")
    (target / "README.md").write_text("mine")
    (target / "tokenizer" / "notes.txt").write_text("mine")

    write(model_of(store, "sft"), target)

    names = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    ours = ["chatmill.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert names == sorted(["README.md", "tokenizer/notes.txt", *ours, "tokenizer_config.json"])
    assert (target / "README.md").read_text() == (target / "tokenizer" / "notes.txt").read_text() == "mine"


def test_a_file_of_the_users_is_not_replaced_by_one_of_the_export(store, tmp_path):
    target = tmp_path / "out"
    write(model_of(store, "sft"), target)
    (target / "tokenizer").write_text("mine")
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    with pytest.raises(UserError, match="holds files of yours that the export would replace: tokenizer"):
        write(model_of(store, "sft"), target, "nanochat")

    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_was_cut_off_is_not_loaded_and_can_be_written_again(store, tmp_path, monkeypatch):
    target = tmp_path / "out"
    write(model_of(store, "sft"), target)

    replace = os.replace

    def fail(source, destination):
        if Path(destination).name == "tokenizer.json":
            raise OSError("cut off")
        replace(source, destination)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="cut off"):
        patch.setattr("os.replace", fail)
        write(model_of(store, "pretrain"), target)

    assert not (target / "config.json").exists()
    write(model_of(store, "pretrain"), target)
    assert (target / "config.json").exists()


def test_a_marker_that_names_files_elsewhere_makes_no_export(store, tmp_path):
    target, other = tmp_path / "out", tmp_path / "precious.txt"
    other.write_text("mine")
    write(model_of(store, "sft"), target)
    marker = json.loads((target / "chatmill.json").read_text())
    (target / "chatmill.json").write_text(json.dumps(marker | {"files": ["../precious.txt"]}))

    with pytest.raises(UserError, match="nor an earlier export"):
        write(model_of(store, "sft"), target)

    assert other.read_text() == "mine"


def test_an_empty_folder_is_filled_and_a_file_is_not_replaced(store, tmp_path):
    write(model_of(store, "sft"), tmp_path / "new")
    (tmp_path / "file").write_text("mine")

    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "new").iterdir()}
    with pytest.raises(UserError, match="is a file"):
        write(model_of(store, "sft"), tmp_path / "file")

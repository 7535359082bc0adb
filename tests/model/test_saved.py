"""Models on disk: whole ones load, and a folder that is wrong says so in one line before memory is taken for it."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from small import batch, small_model

from model.errors import ModelError
from model.saved import load_model, read_config, write_config


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def folder(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    write_config(model.config, tmp_path)
    return tmp_path


def change(folder, **values):
    described = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(described | values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"depth": 10**6}, "depth is 1000000; it must be from 1 to 1024"),
        ({"sequence_len": 2 * 10**9}, "sequence_len is 2000000000; it must be from 1 to 1048576"),
        ({"sequence_len": 1 << 20, "head_dim": 1024, "width": 1024}, "angles of rotary embeddings"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"width": 0}, "width is 0"),
        ({"depth": "2"}, "depth is '2'; expected int"),
        ({"depth": 2.0}, "depth is 2.0; expected int"),
        ({"depth": True}, "depth is True; expected int"),
        ({"kv_heads": None}, "kv_heads is None; expected int"),
        ({"rope_theta": "big"}, "rope_theta is 'big'; expected float"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be above 0"),
        ({"qk_gain": float("inf")}, "qk_gain is inf; it must be above 0"),
        ({"smear": 1}, "smear is 1; expected bool"),
        ({"window_pattern": ["L"]}, r"window_pattern is \['L'\]; expected str"),
        ({"arch": "other"}, "arch 'other' is not base, modern"),
        ({"arch": {"a": 1}}, "arch is {'a': 1}; expected str"),
        ({"eval": "x"}, "which this version does not know"),
    ],
)
def test_a_description_that_cannot_be_is_refused_at_once(folder, values, said):
    change(folder, **values)

    with pytest.raises(ModelError, match=said) as error:
        load_model(folder)

    assert str(folder / "model.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", '{"depth": 2', "[]", "[" * 100_000, "\x00"])
def test_a_damaged_description_is_one_line(folder, content):
    (folder / "model.json").write_text(content)

    with pytest.raises(ModelError, match=r"model.json (cannot be read|holds a list)"):
        read_config(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"depth": 1000}, r"'layers.2.self_attn.q_proj.weight' is absent, expected \[32, 32\]"),
        ({"depth": 1}, r"'layers.1..*' is \[.*\], expected absent"),
        ({"vocab_size": 1 << 24}, r"'embed_tokens.weight' is \[61, 32\], expected \[16777216, 32\]"),
    ],
)
def test_weights_of_another_shape_are_found_in_the_header_before_memory_is_taken(folder, values, said):
    change(folder, **values)

    with pytest.raises(ModelError, match=said):
        load_model(folder)


def test_damaged_weights_are_one_line(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:20], whole[:-4], b"\xff" * 8 + whole[8:], struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"model.safetensors cannot be read") as error:
            load_model(folder)
        assert "\n" not in str(error.value)


def test_numbers_that_are_not_floats_are_refused(folder, model):
    weights = {name: weight.to(torch.int32) for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")

    with pytest.raises(ModelError, match="as I32, expected floats"):
        load_model(folder)


def split(folder, model):
    """The weights in two files and an index, as save_pretrained leaves what is large."""
    (folder / "model.safetensors").unlink()
    listed = {}
    for number, names in enumerate((list(model.state_dict())[::2], list(model.state_dict())[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({f"model.{name}": model.state_dict()[name] for name in names}, folder / file)
        listed |= {f"model.{name}": file for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return listed


def test_weights_in_several_files_are_one_model(folder, model):
    split(folder, model)
    tokens, _ = batch()

    with torch.no_grad():
        assert torch.equal(load_model(folder)(tokens), model.eval()(tokens))


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "model.json", "gone.safetensors", 3, None]
)
def test_an_index_names_files_of_its_own_folder_alone(folder, model, name):
    listed = split(folder, model)
    other = folder.parent / "other"
    other.mkdir(exist_ok=True)
    save_file(model.state_dict(), other / "model.safetensors")
    listed[next(iter(listed))] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))

    with pytest.raises(ModelError, match=r"which is not a .safetensors file beside it"):
        load_model(folder)


def test_an_architecture_of_ones_own_keeps_its_names(folder, monkeypatch):
    (folder / "mine.py").write_text(
        "import torch\n"
        "class Mine(torch.nn.Module):\n"
        "    def __init__(self, config):\n"
        "        super().__init__()\n"
        "        self.model = torch.nn.Linear(2, 3)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    change(folder, arch="mine.Mine")
    weights = {"model.weight": torch.ones(3, 2), "model.bias": torch.ones(3)}
    save_file(weights, folder / "model.safetensors")

    assert torch.equal(load_model(folder).model.weight, weights["model.weight"])


def test_what_else_is_saved_there_says_what_to_do(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model.safetensors does not exist"):
        load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="Merge it into its model"):
        load_model(folder)

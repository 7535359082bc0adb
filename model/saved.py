"""Models on disk: folders of artifacts, and folders in the layouts of other tools (model/huggingface.py).

The config of a folder is compared with the headers of its weights before any memory is allocated for them.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import GPTConfig, ResolvedConfig
from model.errors import ModelError
from model.gpt import GPT, build_model
from model.huggingface import CONFIG, WEIGHTS, Layout, config_from_json, layout_name, own_name

MODEL = "model.json"
INDEX = "model.safetensors.index.json"  # of weights that were split over several files
FLOATS = {"F64", "F32", "F16", "BF16"}


def write_config(config: ResolvedConfig, folder: Path) -> None:
    (folder / MODEL).write_text(json.dumps(asdict(config), indent=1) + "\n")


def read_config(folder: Path) -> ResolvedConfig:
    """The config in model.json or, if there is none, in another tool's config.json. Raises ModelError."""
    foreign = not (folder / MODEL).exists() and (folder / CONFIG).exists()
    path = folder / (CONFIG if foreign else MODEL)
    parse: Callable[[dict[str, Any]], ResolvedConfig] = config_from_json if foreign else GPTConfig.from_json
    try:
        return parse(_read_json(path))
    except ModelError as error:
        raise ModelError(f"{path} {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError("does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"holds a {type(content).__name__}, expected an object")
    return content


def load_model(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ResolvedConfig | None = None,
) -> GPT:
    """The model in a folder, in eval mode, weights and compute in `dtype`; config: other than the folder's own.

    Raises ModelError if the folder does not hold a whole model.
    """
    own, files = inspect(folder)
    config = config or own
    model = build_model(config)
    try:
        weights = {name: weight for path in files for name, weight in load_file(path).items()}
        if "." not in config.arch:
            weights = {own_name(name): weight for name, weight in weights.items()}
        model.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} does not hold the weights of its model: {' '.join(str(error).split())}") from None
    model.compute_dtype = dtype
    return model.to(device=device, dtype=dtype).eval()


def inspect(folder: Path) -> tuple[ResolvedConfig, list[Path]]:
    """The config of the model in a folder, and the files of its weights, whose headers fit it. Raises ModelError."""
    config = read_config(folder)
    files = weight_files(folder)
    if "." not in config.arch:  # other architectures name and shape their weights as they like
        check_shapes(config, files)
    return config, files


def weight_files(folder: Path) -> list[Path]:
    """The files of weights. Names that an index lists count only where they are in the folder's own listing."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        if (folder / "adapter_config.json").exists():
            raise ModelError(f"{folder} holds an adapter. Merge it into its model (merge_and_unload) and save that.")
        raise ModelError(f"{folder / WEIGHTS} does not exist, nor does {INDEX}")
    try:
        listed = _read_json(folder / INDEX).get("weight_map")
    except ModelError as error:
        raise ModelError(f"{folder / INDEX} {error}") from None
    names = list(listed.values()) if isinstance(listed, dict) else []
    here = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    if wrong := [name for name in names if not isinstance(name, str) or name not in here]:
        raise ModelError(f"{folder / INDEX} names {wrong[0]!a:.80}, which is not a .safetensors file beside it")
    if not names:
        raise ModelError(f"{folder / INDEX} names no files")
    return [path for name, path in here.items() if name in names]


def check_shapes(config: ResolvedConfig, files: list[Path]) -> None:
    """Raises ModelError for the first weight that is missing, unexpected, or shaped otherwise in the model of `config`.

    Reads only the headers.
    """
    with torch.device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    found: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (a handle is not a mapping)
                    part = weights.get_slice(name)
                    if part.get_dtype() not in FLOATS:
                        raise ModelError(f"{path} holds {name!a:.80} as {part.get_dtype()}, expected floats")
                    found[own_name(name)] = part.get_shape()
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
    where = files[0] if len(files) == 1 else files[0].parent
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            wanted, is_there = (f"{shape}" if shape else "absent" for shape in (expected.get(name), found.get(name)))
            raise ModelError(
                f"{where} is not the model that the folder describes: {name!a:.80} is {is_there}, expected {wanted}"
            )


def write_weights(weights: dict[str, Tensor], folder: Path, layout: Layout) -> None:
    """Write weights, given by our names, under the layout's names and in the dtype that they have."""
    path = folder / WEIGHTS
    save_file({layout_name(name, layout): weight for name, weight in weights.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors keeps what it writes to its owner

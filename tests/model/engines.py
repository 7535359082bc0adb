"""Engines over small models that write bytes, which the tests of generation share."""

import copy

import torch

from model.config import GPTConfig
from model.decoding.engine import Engine
from model.gpt import GPT

NAMES = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
NAMES += ("python_start", "python_end", "output_start", "output_end")
SPECIAL = {f"<|{name}|>": 256 + place for place, name in enumerate(NAMES)}
BOS = SPECIAL["<|bos|>"]
VOCAB = 256 + len(NAMES)


def decode_bytes(ids: list[int]) -> bytes:
    return bytes(token for token in ids if token < 256)


def encode(text: str) -> list[int]:
    return list(text.encode())


def make_model(**changes) -> GPT:
    """A small model whose next token depends on everything before it."""
    config = GPTConfig(**{"depth": 2, "width": 32, "head_dim": 16, "sequence_len": 96} | changes).resolved(VOCAB)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


MODELS = {
    "base": make_model(),
    "grouped": make_model(kv_heads=1),
    "modern": make_model(arch="modern", depth=4, window_pattern="SSSL", sequence_len=192, kv_heads=1),
}
# In float32 a batch of another size rounds otherwise, and two all but equally likely tokens may change places.
EXACT = {name: copy.deepcopy(model).double() for name, model in MODELS.items()}
for exact in EXACT.values():
    exact.compute_dtype = torch.float64
PAST_WINDOWS = 140  # tokens: the short windows of "modern" are 128


def make_engine(model: GPT, rows: int = 64, tools=None, **changes) -> Engine:
    return Engine(model, SPECIAL, decode_bytes, encode, tools, rows=rows, **changes)


def reference(model: GPT, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache; before GPT.cap, which in float32 can make two all but equal logits one."""
    ids = list(prompt)
    head = (lambda hidden: model.lm_head(hidden).float()) if type(model) is GPT else model.head
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(head(model.hidden(torch.tensor([ids]))[:, -1])[0].argmax()))
            if ids[-1] in (BOS, SPECIAL["<|assistant_end|>"]):
                break
    return ids[len(prompt) :]

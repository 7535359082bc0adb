"""Causal attention: one function, several backends that give the same numbers."""

import functools
import importlib
import inspect

import torch
from torch import Tensor
from torch.nn import attention
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.kernels.autograd import attend_in_blocks

BLOCKED_CONTEXT = 1024  # tokens; for longer rows the scores that are kept take too much memory


def attend(
    q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None = None, backend: str = "sdpa"
) -> Tensor:
    """Softmax attention of each query over the `window` latest positions up to its own, scaled by head_dim^-0.5.

    q: (B, T, H, D). k, v: (B, T, H_kv, D), H a multiple of H_kv. documents: (B, T) ids, contiguous per document; a
    position sees only its own document. backend: sdpa | flex | varlen | blocked. Returns (B, T, H, D) in q's dtype.
    """
    return BACKENDS[backend](q, k, v, min(window, q.size(1)), documents)


def choose_backend(device: torch.device, dtype: torch.dtype, windows: list[int], context: int) -> tuple[str, str]:
    """The fastest backend on this machine for a model's windows, and the reason, for the log."""
    if device.type == "cpu" and dtype in (torch.float32, torch.float64) and context <= BLOCKED_CONTEXT:
        return "blocked", "skips keys outside the window, keeps the scores of a short context"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa", "the only one for this device and dtype"
    kernels = _activate_newest_flash(device)
    if has_varlen() and (kernels != "FA2" or min(windows) < context):
        return "varlen", f"{kernels} kernels, windows without a mask"
    if min(windows) < context:
        return "flex", "windows, and this torch has no varlen attention with windows"
    return "sdpa", "every layer sees the whole context"


@functools.cache
def has_varlen() -> bool:
    """Return True if torch has attention.varlen with windows. Importing it takes a second."""
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen.varlen_attn).parameters


def _activate_newest_flash(device: torch.device) -> str:
    """FA4 on Blackwell, FA3 on Hopper, if they are installed. Nothing is downloaded."""
    wanted = {9: "FA3", 10: "FA4"}.get(torch.cuda.get_device_capability(device)[0])
    activate = getattr(attention, "activate_flash_attention_impl", None)
    if wanted is None or activate is None:
        return "FA2"
    try:
        activate(wanted)
    except (ImportError, RuntimeError, ValueError):
        return "FA2"
    return wanted


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
    mask = None
    if documents is not None or window < q.size(1):
        mask = band(q.size(1), window, q.device)
        if documents is not None:
            mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
    if documents is None:
        mask = _window_blocks(q.size(1), window, q.device)
    else:
        mask = _document_blocks(documents, window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    kernel = _compiled_flex() if q.is_cuda else flex_attention
    return kernel(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, length = q.shape[:2]
    if documents is None:
        edges = torch.arange(0, rows * length + 1, length, device=q.device, dtype=torch.int32)
    else:
        edges = document_edges(documents)
    y = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        edges,
        edges,
        length,
        length,
        window_size=(window - 1, 0),
        enable_gqa=q.size(2) != k.size(2),
    )
    # torch returns a tuple only where it is asked for one.
    return y.unflatten(0, (rows, length))  # type: ignore[union-attr]


BACKENDS = {"sdpa": _sdpa, "flex": _flex, "varlen": _varlen, "blocked": attend_in_blocks}


def band(length: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: True where the key is not after the query and less than `window` before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def document_edges(documents: Tensor) -> Tensor:
    """Starts of documents (B, T) in the concatenated rows, and the end: (N + 1,) int32. Rows share no document."""
    change = torch.ones_like(documents, dtype=torch.bool)
    change[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = change.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([documents.numel()])]).int()


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=64)
def _window_blocks(length: int, window: int, device: torch.device) -> BlockMask:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return create_block_mask(visible, None, None, length, length, device=device)


def _document_blocks(documents: Tensor, window: int) -> BlockMask:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window) & (documents[batch, query] == documents[batch, key])

    rows, length = documents.shape
    return create_block_mask(visible, rows, None, length, length, device=documents.device)

"""One token at a time, a decoder computes what the model does."""

import copy

import pytest
import torch
from small import small_model
from torch.nn import functional as F

from model.decoding import kvcache
from model.decoding.kvcache import KVCache
from model.gpt import GPT
from model.kernels.decoder import FEW, SHARED_OUT, Decoder, Gemm, Matrix, decoder_of

ARCHES = {
    "base": {"depth": 4},
    "grouped": {"depth": 3, "kv_heads": 2, "width": 64},
    "modern": {"depth": 4, "arch": "modern", "window_pattern": "SSSL", "sequence_len": 192},
    "modern, grouped": {"depth": 4, "arch": "modern", "kv_heads": 1},
}
LENGTHS = {"together": [9, 9, 9], "ragged": [3, 17, 9], "with a row of nobody": [-1, 9, 9]}


def exact(**settings) -> GPT:
    model = small_model(**settings).double().eval()
    model.compute_dtype = torch.float64
    return model


def filled(model: GPT, lengths: list[int], room: int) -> KVCache:
    """A cache of which each row has read as many tokens as lengths says."""
    longest = max(lengths)
    cache = KVCache(model.config, len(lengths), longest + room, "cpu", model.compute_dtype)
    generator = torch.Generator().manual_seed(3)
    model.hidden(torch.randint(0, 61, (len(lengths), longest), generator=generator), cache)
    cache.advance([max(0, length) for length in lengths])
    for row, length in enumerate(lengths):
        if length < 0:
            cache.clear(row)
    return cache


@pytest.mark.parametrize("many", [0, 10**6])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("arch", ARCHES)
@torch.inference_mode()
def test_it_continues_rows_as_the_model_does(arch, lengths, many, monkeypatch):
    monkeypatch.setattr(kvcache, "MANY", many)  # rows from which on attention is batched GEMMs
    steps = 160 if "window_pattern" in ARCHES[arch] else 4  # past the windows
    model = exact(**ARCHES[arch])
    caches = filled(model, lengths, steps), filled(model, lengths, steps)
    decoder = Decoder(model).step(len(lengths))
    counts = [int(length >= 0) for length in lengths]
    for step in range(steps):
        tokens = torch.tensor([(7 * step + row) % 61 for row in range(len(lengths))])
        wanted = model.hidden(tokens[:, None], caches[0])[:, 0]
        found = decoder.hidden(tokens, caches[1])
        for cache in caches:
            cache.advance(counts)
        alive = torch.tensor(counts).bool()
        torch.testing.assert_close(found[alive], wanted[alive], atol=1e-10, rtol=0)
        torch.testing.assert_close(model.cap(decoder.logits(found)), model.head(found), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rows", [1, 3, FEW + 1, SHARED_OUT + 1])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@torch.inference_mode()
def test_a_gemm_is_the_same_however_it_is_split_over_threads(threads, rows, dense, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layers = [torch.nn.Linear(32, out, bias=False, dtype=torch.float64) for out in (192, 64, 128)]
    weight = torch.cat([layer.weight for layer in layers])
    matrix = Matrix(layers, torch.float64, in_place=True)
    assert torch.equal(torch.cat([layer.weight for layer in layers]), weight)
    assert len(matrix.parts) == {1: 1, 2: 2, 3: 3, 8: 6}[threads]
    gemm, total, wanted = Gemm(matrix, rows, dense=dense), Gemm(matrix, rows), torch.zeros(rows, 384).double()
    total.place.zero_()
    x = torch.randn(rows, 32).double()
    for given in (x, x, x.t().contiguous().t(), x + 1):  # of the second, the views are there
        torch.testing.assert_close(gemm(given, matrix), given @ weight.t(), atol=1e-12, rtol=0)
        assert gemm.place.is_contiguous() or not dense
        total.add(given, matrix)
        wanted += given @ weight.t()
        torch.testing.assert_close(total.place, wanted, atol=1e-12, rtol=0)
    given.zero_()
    assert not gemm(given, matrix).any()  # the memory that the views show may change


@torch.inference_mode()
def test_a_model_shares_its_matrices_with_its_decoder():
    model = exact(**ARCHES["modern"])
    before, tokens = copy.deepcopy(model.state_dict()), torch.arange(12)[None]
    logits = model(tokens)

    decoder = Decoder(model, in_place=True)

    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    torch.testing.assert_close(model(tokens), logits, atol=1e-5, rtol=0)
    layer, kept = model.layers[0], decoder.layers[0]
    for weight, matrix in (
        (layer.self_attn.v_proj, kept.joint),
        (layer.mlp.fc1, kept.up),
        (model.lm_head, decoder.lm_head),
    ):
        assert weight.weight.untyped_storage().data_ptr() == matrix.whole.untyped_storage().data_ptr()


@torch.inference_mode()
def test_a_decoder_of_a_model_in_training_leaves_it_as_it_is():
    model = exact(**ARCHES["base"])
    strides = [parameter.stride() for parameter in model.parameters()]
    Decoder(model)
    assert [parameter.stride() for parameter in model.parameters()] == strides
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.inference_mode()
def test_weights_are_cast_to_the_dtype_of_the_computation():
    model = small_model(**ARCHES["modern, grouped"]).eval()
    model.compute_dtype = torch.bfloat16
    caches = filled(model, [9, 9], 1), filled(model, [9, 9], 1)
    tokens = torch.tensor([5, 6])
    found, wanted = Decoder(model).step(2).hidden(tokens, caches[0]), model.hidden(tokens[:, None], caches[1])[:, 0]
    assert found.dtype == torch.bfloat16
    assert float((found - wanted).float().norm() / wanted.float().norm()) < 0.03


def test_a_model_that_may_compute_something_else_has_none():
    class Own(GPT):
        def hidden(self, tokens, cache=None, documents=None):
            return -super().hidden(tokens, cache, documents)

    own = Own(small_model().config)
    own.init_weights(torch.Generator().manual_seed(0))
    before = [weight.clone() for weight in own.state_dict().values()]
    assert decoder_of(own) is None
    assert all(torch.equal(a, b) for a, b in zip(before, own.state_dict().values()))


@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_attention_of_one_query_is_that_of_torch(masked):
    q, keys, values = (torch.randn(3, 2, length, 8).double() for length in (1, 12, 12))
    keys, values, mask = keys[:, :, :9], values[:, :, :9], None
    if masked:
        mask = torch.where(torch.rand(3, 1, 1, 9) < 0.5, 0.0, -torch.inf).double()
        mask[..., 0] = 0.0
    wanted = F.scaled_dot_product_attention(q, keys, values, mask)
    torch.testing.assert_close(kvcache.attend_once(q, keys, values, mask), wanted, atol=1e-12, rtol=0)

"""GEMMs by oneDNN are exact up to rounding, forwards and backwards, for any layout in memory."""

import pytest
import torch
from small import small_model
from torch.nn import functional as F

from model.decoding.kvcache import KVCache
from model.kernels import matmul
from model.kernels.decoder import Decoder

here = matmul.available.__wrapped__
has_operators = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def onednn(monkeypatch):
    """Let oneDNN compute all GEMMs of float32, on any machine whose torch has the operators."""
    if not has_operators:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matmul, "available", lambda: True)
    monkeypatch.setattr(matmul, "WORTH", 0)


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype == torch.float32 and found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 64, 48), (33, 20, 90)])
@pytest.mark.parametrize("turned_a", [False, True])
@pytest.mark.parametrize("turned_b", [False, True])
def test_mm(shape, turned_a, turned_b, onednn):
    rows, inner, columns = shape
    a = torch.randn(inner, rows).t() if turned_a else torch.randn(rows, inner)
    b = torch.randn(columns, inner).t() if turned_b else torch.randn(inner, columns)
    exact = a.double() @ b.double()
    close(matmul.mm(a, b), exact)
    total = torch.ones(rows, columns)
    matmul.add_mm(total, a, b)
    close(total, 1 + exact)
    if not turned_a:
        close(matmul.onednn(a, matmul.pack(b.t().contiguous())), exact)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(6, 20, 12), (6, 12, 20)])
def test_linear_has_the_gradients_of_torch(shape, wanted, onednn):
    rows, inputs, outputs = shape
    x, weight = torch.randn(2, rows, inputs), torch.randn(outputs, inputs)
    slope = torch.randn(2, outputs, rows).mT  # as attention's backward pass may leave it
    found = [tensor.clone().requires_grad_(needs) for tensor, needs in zip((x, weight), wanted)]
    exact = [tensor.double().requires_grad_(needs) for tensor, needs in zip((x, weight), wanted)]
    for (some_x, some_weight), gemm in ((found, matmul.linear), (exact, F.linear)):
        made = gemm(some_x, some_weight)
        made.backward(slope.to(made.dtype))
    for one, other in zip(found, exact):
        assert (one.grad is None) == (other.grad is None)
        if other.grad is not None:
            close(one.grad, other.grad)


def test_a_model_has_the_loss_and_gradients_of_torch(onednn, monkeypatch):
    tokens = torch.randint(0, 61, (3, 17))

    def trained() -> list[torch.Tensor]:
        model = small_model(arch="modern")
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    found = trained()
    monkeypatch.setattr(matmul, "available", lambda: False)
    for one, other in zip(found, trained()):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("lengths", [[9, 9], [4, 11, 7]])
@torch.inference_mode()
def test_a_decoder_multiplies_packed_weights(lengths, onednn):
    model = small_model(depth=3, arch="modern").eval()
    caches = [KVCache(model.config, len(lengths), 20, "cpu", torch.float32) for _ in range(2)]
    for cache in caches:
        model.hidden(torch.arange(max(lengths)).repeat(len(lengths), 1), cache)
        cache.advance(lengths)
    step = Decoder(model).step(len(lengths))
    assert step.joint.packs and step.residual.packs and step.head.packs
    for token in range(4):
        tokens = torch.full((len(lengths),), token)
        found, wanted = step.hidden(tokens, caches[0]), model.hidden(tokens[:, None], caches[1])[:, 0]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.cap(step.logits(found)), model.head(wanted), atol=1e-4, rtol=1e-4)
        for cache in caches:
            cache.advance(1)


def test_it_computes_large_gemms_of_float32_on_processors_where_it_is_faster(monkeypatch):
    large, few = torch.empty(1024, 64), 2
    monkeypatch.setattr(matmul, "available", lambda: True)
    assert matmul.suits(large, matmul.WORTH // 2**16) and not matmul.suits(large, few)
    assert not matmul.suits(large.double(), 10**6) and not matmul.suits(large.bfloat16(), 10**6)
    assert not matmul.suits(large.to("meta"), 10**6)


@pytest.mark.parametrize(
    "capability, vendor, wanted",
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_where_it_is_the_faster_one(capability, vendor, wanted, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(matmul, "_by_intel", lambda: vendor == "GenuineIntel")
    assert here() == (wanted and has_operators)

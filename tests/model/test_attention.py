from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention import BACKENDS, attend, choose_backend, document_edges, has_varlen
from model.kernels import autograd


def dense(q, k, v, window, documents=None):
    """The definition, in float64: (B, T, H, D)."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.size(-1) ** 0.5
    place = torch.arange(q.size(1))
    hidden = (place[:, None] < place) | (place[:, None] - place >= window)
    if documents is not None:
        hidden = hidden | (documents[:, None, :, None] != documents[:, None, None, :])
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def inputs(rows, length, heads, kv_heads, head_dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, length, heads, head_dim)] + [(rows, length, kv_heads, head_dim)] * 2
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def relative(found, wanted):
    return float((found.detach().double() - wanted).norm() / wanted.norm())


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 40),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    window=st.integers(1, 50),
    cuts=st.lists(st.integers(0, 40), max_size=3) | st.none(),
    backend=st.sampled_from(["sdpa", "blocked"]),
)
def test_backends_are_the_definition_for_windows_groups_and_documents(
    rows, length, kv_heads, group, window, cuts, backend
):
    q, k, v = inputs(rows, length, kv_heads * group, kv_heads, 8)
    documents = None
    if cuts is not None:
        documents = sum((torch.arange(length) >= cut).long() for cut in [0, *cuts]).expand(rows, -1)
    with mock.patch.object(autograd, "BLOCK", 16):
        found = attend(q, k, v, window, documents, backend)
    assert relative(found, dense(q, k, v, window, documents)) < 2e-6


CASES = [(64, False), (17, False), (64, True), (17, True)]


def two_documents(wanted):
    return torch.tensor([[0] * 30 + [1] * 34, [4] * 64]) if wanted else None


@pytest.mark.parametrize("window, with_documents", CASES)
def test_flex_is_the_definition(window, with_documents):
    documents = two_documents(with_documents)
    tensors = [t.detach() for t in inputs(2, 64, 4, 2, 16)]
    assert relative(attend(*tensors, window, documents, "flex"), dense(*tensors, window, documents)) < 2e-6


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("window, with_documents", CASES)
def test_gradients_are_those_of_the_definition(window, with_documents, backend):
    documents = two_documents(with_documents)
    tensors = inputs(2, 64, 4, 2, 16)
    expected = dense(*tensors, window, documents)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    with mock.patch.object(autograd, "BLOCK", 24):
        found = torch.autograd.grad((attend(*tensors, window, documents, backend) * weight).sum(), tensors)
    for gradient, reference in zip(found, wanted):
        assert relative(gradient, reference.double()) < 5e-6


def test_blocks_are_one_graph_for_a_compiler():
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    results = []
    for call in (attend, compiled):
        tensors = inputs(2, 64, 4, 2, 16)
        found = call(*tensors, 24, two_documents(True), "blocked")
        results.append([found, *torch.autograd.grad(found.square().sum(), tensors)])
    assert all(relative(one, other.double()) < 2e-6 for one, other in zip(*results))


def packed_reference(q, k, v, edges, other_edges, longest, other_longest, window_size, enable_gqa):
    """varlen_attn as torch documents it: sequences (T, H, D) laid end to end, cut at edges, window_size (left, 0)."""
    assert torch.equal(edges, other_edges) and edges.dtype == torch.int32 and window_size[1] == 0
    assert enable_gqa == (q.size(1) != k.size(1)) and longest == other_longest
    pieces = []
    for start, stop in zip(edges.tolist(), edges.tolist()[1:]):
        assert 0 < stop - start <= longest
        pieces.append(dense(*(t[None, start:stop] for t in (q, k, v)), window_size[0] + 1)[0])
    return torch.cat(pieces).to(q.dtype)


@pytest.mark.skipif(not has_varlen(), reason="this torch has no varlen attention with windows")
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("window, with_documents", CASES)
def test_varlen_is_asked_for_the_definition(monkeypatch, window, with_documents, kv_heads):
    """Its kernels are for GPUs alone; what they are asked for is checked anywhere."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", packed_reference)
    documents = two_documents(with_documents)
    tensors = [t.detach() for t in inputs(2, 64, 4, kv_heads, 16)]
    assert relative(attend(*tensors, window, documents, "varlen"), dense(*tensors, window, documents)) < 2e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen and compiled flex kernels need a GPU")
@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"blocked"}))
@pytest.mark.parametrize("window, with_documents", [(256, False), (64, False), (256, True), (64, True)])
def test_gpu_backends_agree_in_bfloat16(backend, window, with_documents):
    """Values to 1% of the reference's norm, gradients to 2%: bfloat16 rounds to 0.4%."""
    if backend == "varlen" and not has_varlen():
        pytest.skip("this torch has no varlen attention with windows")
    documents = torch.tensor([[0] * 100 + [1] * 156, [4] * 256]) if with_documents else None
    tensors = inputs(2, 256, 4, 2, 64, dtype=torch.bfloat16)
    expected = dense(*tensors, window, documents)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    there = [t.detach().cuda().requires_grad_() for t in tensors]
    found = attend(*there, window, documents.cuda() if with_documents else None, backend)
    gradients = torch.autograd.grad((found.float() * weight.cuda()).sum(), there)
    assert relative(found.cpu(), expected.detach()) < 1e-2
    for gradient, reference in zip(gradients, wanted):
        assert relative(gradient.cpu(), reference.double()) < 2e-2


def test_documents_are_cut_where_they_change_and_at_every_row():
    edges = document_edges(torch.tensor([[5, 5, 6], [6, 6, 6]]))
    assert edges.tolist() == [0, 2, 3, 6]


@pytest.mark.parametrize(
    "dtype, context, chosen",
    [(torch.float32, 512, "blocked"), (torch.float32, 4096, "sdpa"), (torch.bfloat16, 512, "sdpa")],
)
def test_cpus_keep_the_scores_of_short_contexts_and_say_so(dtype, context, chosen):
    backend, why = choose_backend(torch.device("cpu"), dtype, [128, context], context)
    assert backend == chosen and why

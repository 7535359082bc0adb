import pytest
import torch

from model.kernels.autograd import norm, rotate, squared_relu


def angles(length: int, half: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.linspace(0, 9, length * half, dtype=dtype).view(length, 1, half)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize(
    "function",
    [norm, lambda x: rotate(x, *angles(5, 4)), squared_relu],
    ids=["norm", "rotate", "squared_relu"],
)
def test_gradients_are_the_derivatives(function):
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_inference_give_the_same_values(dtype):
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    tables = tuple(t.to(dtype) for t in angles(5, 4))
    for function in (norm, lambda x: rotate(x, *tables), squared_relu):
        trained = function(x.clone().requires_grad_()).detach()
        with torch.no_grad():
            difference = (trained - function(x)).float().norm() / trained.float().norm()
        assert float(difference) < (5e-3 if dtype == torch.bfloat16 else 1e-6)

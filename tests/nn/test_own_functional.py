"""The functional core: derivatives, the running update, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from freezekit.nn import functional

SHAPES = [(4, 3), (3, 2, 3), (2, 3, 2, 2), (2, 2, 1, 2, 2)]


def operands(shape: tuple[int, ...], affine: bool) -> tuple[torch.Tensor | None, ...]:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if not affine:
        return x, None, None
    weight, bias = (torch.randn(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2))
    return x, weight, bias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_first_and_second_derivatives_in_training(shape: tuple[int, ...], affine: bool) -> None:
    inputs = operands(shape, affine)
    # All three results: the mean and the variance may enter a loss too.
    assert gradcheck(lambda *a: functional.batch_norm_train(*a, 1e-5), inputs)
    assert gradgradcheck(lambda *a: functional.batch_norm_train(*a, 1e-5), inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_first_and_second_derivatives_in_eval(shape: tuple[int, ...], affine: bool) -> None:
    x, weight, bias = operands(shape, affine)
    mean, var = torch.randn(shape[1], dtype=torch.float64), torch.rand(shape[1], dtype=torch.float64) + 0.3

    def function(*a: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm_eval(a[0], mean, var, a[1], a[2], 1e-5)

    assert gradcheck(function, (x, weight, bias))
    assert gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_at_least_float32(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 10.0], [3.0, 20.0], [8.0, 0.0]], dtype=dtype)
    output, mean, var = functional.batch_norm_train(x, None, None, 1e-5)
    assert output.dtype == dtype
    assert mean.dtype == var.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var(0, unbiased=False), rtol=1e-6, atol=0)


def test_a_constant_channel_has_variance_zero() -> None:
    x = torch.full((7, 1), 0.1) * 3e4  # a mean that float32 rounds
    output, mean, var = functional.batch_norm_train(x, None, None, 1e-5)
    assert torch.equal(var, torch.zeros(1))
    assert torch.equal(output, torch.zeros(7, 1))
    assert torch.equal(mean, x[0])


@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3)])
def test_running_update_in_place_and_unbiased(factor: float | torch.Tensor) -> None:
    mean, var = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
    functional.update_running_stats(mean, var, torch.tensor([2.0, 3.0]), torch.tensor([8.0, 1.0]), 5, factor)
    torch.testing.assert_close(mean, torch.tensor([0.7 * 1 + 0.3 * 2, 0.7 * -2 + 0.3 * 3]))
    torch.testing.assert_close(var, torch.tensor([0.7 * 0.5 + 0.3 * 10, 0.7 * 4 + 0.3 * 1.25]))


def test_running_update_of_half_statistics_rounds_once() -> None:
    mean, var = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    functional.update_running_stats(mean, var, torch.tensor([3.3]), torch.tensor([7.7]), 4, 0.1)
    assert torch.equal(mean, torch.tensor([0.9 + 0.33]).bfloat16())
    assert torch.equal(var, torch.tensor([0.9 + 0.77 * 4 / 3]).bfloat16())


def test_running_update_leaves_no_trace_in_autograd() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    _, mean, var = functional.batch_norm_train(x, None, None, 1e-5)
    running_mean, running_var = torch.zeros(2), torch.ones(2)
    functional.update_running_stats(running_mean, running_var, mean, var, 4, 0.1)
    assert not running_mean.requires_grad
    assert not running_var.requires_grad


def test_running_update_with_no_or_one_value() -> None:
    mean, var = torch.tensor([1.0]), torch.tensor([2.0])
    functional.update_running_stats(mean, var, torch.tensor([5.0]), torch.tensor([5.0]), 0, 0.5)
    assert (mean.item(), var.item()) == (1.0, 2.0)
    with pytest.raises(ValueError, match="from 1 value per channel"):
        functional.update_running_stats(mean, var, torch.tensor([5.0]), torch.tensor([0.0]), 1, 0.5)


def test_what_broadcasting_would_hide_is_refused() -> None:
    x, one, two = torch.randn(4, 2), torch.ones(1), torch.ones(2)
    for name, given in (("running_var", (two, one, two, two)), ("bias", (two, two, two, one))):
        with pytest.raises(RuntimeError, match=rf"^{name} should contain 2 elements not 1: .*\(4, 2\) has 2"):
            functional.batch_norm_eval(x, *given, 1e-5)
    with pytest.raises(
        RuntimeError, match=r"weight is torch.float16, but a torch.float32 input takes torch.float32$"
    ):
        functional.batch_norm_train(x, two.half(), two, 1e-5)
    with pytest.raises(RuntimeError, match=r"a torch.float16 input takes torch.float16 or torch.float32$"):
        functional.batch_norm_train(x.half(), two.double(), two, 1e-5)

"""The worked numbers of the source documents (batch normalisation), on the own layers.

They were printed with four decimals, so are compared to half of the last one; a little more where what they
were computed from was itself printed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from freezekit.nn import batchnorm as own
from freezekit.nn import functional

PRINTED = {"rtol": 0, "atol": 6e-5}
FC_OUTPUT = torch.tensor([[-0.7556, 2.9349, -0.3017], [-0.8537, 6.3545, -1.4271]])


def dummy_bn_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, mean: Any = None, var: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Document 000, 2.1.2, with its `[..., None, None]`."""
    mean = x.mean([0, 2, 3]) if mean is None else mean
    var = x.var([0, 2, 3], unbiased=False) if var is None else var
    x = (x - mean[None, ..., None, None]) / torch.sqrt(var[None, ..., None, None] + eps)
    return mean, var, x * weight[..., None, None] + bias[..., None, None]


def constant_features(features: int, shape: tuple[int, ...], batch: int = 3) -> torch.Tensor:
    """Document 003: feature i is i + 1 everywhere."""
    return torch.stack([torch.ones(shape) * (i + 1) for i in range(features)]).expand(batch, features, *shape)


def test_000_fc_then_bn() -> None:
    fc, bn = nn.Linear(3, 3), own.BatchNorm1d(3)
    with torch.no_grad():
        fc.weight.copy_(
            torch.tensor([[0.0193, 0.3252, -0.3773], [0.3813, 0.2321, 0.5265], [-0.3829, -0.1440, 0.1517]])
        )
        fc.bias.copy_(torch.tensor([-0.2935, 0.5100, -0.0860]))
        hidden = fc(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        torch.testing.assert_close(hidden, FC_OUTPUT, rtol=0, atol=1e-3)
        torch.testing.assert_close(
            bn(hidden), torch.tensor([[0.9979, -1.0, 1.0], [-0.9979, 1.0, -1.0]]), **PRINTED
        )


def test_000_data_mean_var_out() -> None:
    output, mean, var = functional.batch_norm_train(FC_OUTPUT, None, None, 1e-5)
    torch.testing.assert_close(mean, torch.tensor([-0.8046, 4.6447, -0.8644]), rtol=0, atol=1e-4)
    assert mean[0].item() == pytest.approx(-0.80465, abs=1e-6)
    torch.testing.assert_close(var, torch.tensor([2.4059e-03, 2.9234e00, 3.1663e-01]), rtol=3e-5, atol=0)
    printed = torch.tensor([[0.9979, -1.0, 1.0], [-0.9979, 1.0, -1.0]])
    torch.testing.assert_close(output, printed, **PRINTED)
    torch.testing.assert_close(own.BatchNorm1d(3)(FC_OUTPUT).detach(), printed, **PRINTED)


def test_000_eval_with_running_stats() -> None:
    data = torch.tensor([[-1.5318, -2.0604, 0.2636], [-1.5732, -4.3626, -0.4648]])
    mean, var = torch.tensor([-0.1553, -0.3212, -0.0101]), torch.tensor([0.9001, 1.1650, 0.9265])
    printed = torch.tensor([[-1.4509, -1.6113, 0.2843], [-1.4945, -3.7443, -0.4724]])
    torch.testing.assert_close(
        functional.batch_norm_eval(data, mean, var, None, None, 1e-5), printed, **PRINTED
    )
    # The printed statistics are those of one training step on the same data, and eval then uses them.
    bn = own.BatchNorm1d(3)
    bn(data)
    torch.testing.assert_close(bn.running_mean, mean, **PRINTED)
    torch.testing.assert_close(bn.running_var, var, **PRINTED)
    torch.testing.assert_close(bn.eval()(data).detach(), printed, rtol=0, atol=2e-4)


def test_000_dummy_bn_forward() -> None:
    torch.manual_seed(0)
    bn, inputs = own.BatchNorm2d(3), torch.randn(8, 3, 20, 20)
    _, _, expected = dummy_bn_forward(inputs, bn.weight, bn.bias, bn.eps)
    torch.testing.assert_close(bn(inputs), expected)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_000_dummy_bn_running_stats_over_10_iterations(momentum: float | None) -> None:
    # The document's inputs were not seeded: its printed values can be approached (randn), not reproduced.
    torch.manual_seed(0)
    mean, var = torch.zeros(3), torch.ones(3)
    bn = own.BatchNorm2d(3, momentum=momentum)
    for step in range(10):
        inputs = torch.randn(8, 3, 20, 20)
        bn(inputs)
        batch_mean, batch_var, _ = dummy_bn_forward(inputs, bn.weight, bn.bias, bn.eps)
        factor = 1.0 / (step + 1) if momentum is None else momentum
        n = inputs.numel() / inputs.size(1)
        var = var * (1 - factor) + factor * batch_var * n / (n - 1)
        mean = mean * (1 - factor) + factor * batch_mean
    torch.testing.assert_close(bn.running_mean, mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(bn.running_var, var)
    printed = {0.1: [0.9857, 0.9883, 1.0205], None: [1.0097, 1.0086, 0.9815]}[momentum]
    torch.testing.assert_close(bn.running_var, torch.tensor(printed), rtol=0, atol=0.05)
    assert bn.num_batches_tracked == 10
    bn.eval()
    inputs = torch.randn(8, 3, 20, 20)
    _, _, expected = dummy_bn_forward(inputs, bn.weight, bn.bias, bn.eps, mean, var)
    torch.testing.assert_close(bn(inputs), expected)


def test_001_first_channel_by_hand() -> None:
    torch.manual_seed(0)
    m, x = own.BatchNorm2d(2, affine=True), torch.randn(2, 2, 3, 4)
    output = m(x)
    mean, var = torch.mean(x[:, 0]), torch.var(x[:, 0], unbiased=False)
    by_hand = (x[:, 0] - mean) / torch.pow(var + m.eps, 0.5) * m.weight[0] + m.bias[0]
    torch.testing.assert_close(output[:, 0], by_hand)
    with_bessel = (x[:, 0] - mean) / torch.pow(torch.var(x[:, 0]) + m.eps, 0.5)
    assert not torch.allclose(output[:, 0], with_bessel)


def test_003_batchnorm1d_3_5_1_momentum_0_3() -> None:
    x, bn = constant_features(5, (1,)), own.BatchNorm1d(5, momentum=0.3)
    assert x.shape == (3, 5, 1)
    for means, var in (([0.3, 0.6, 0.9, 1.2, 1.5], 0.7), ([0.51, 1.02, 1.53, 2.04, 2.55], 0.49)):
        assert torch.equal(bn(x), torch.zeros(3, 5, 1))
        torch.testing.assert_close(bn.running_mean, torch.tensor(means))
        torch.testing.assert_close(bn.running_var, torch.full((5,), var))


def test_003_batchnorm2d_3_3_2_2_momentum_0_3() -> None:
    x, bn = constant_features(3, (2, 2)), own.BatchNorm2d(3, momentum=0.3)
    for means, var in (([0.3, 0.6, 0.9], 0.7), ([0.51, 1.02, 1.53], 0.49)):
        bn(x)
        torch.testing.assert_close(bn.running_mean, torch.tensor(means))
        torch.testing.assert_close(bn.running_var, torch.full((3,), var))
        assert bn.weight.tolist() == [1, 1, 1]
        assert bn.bias.tolist() == [0, 0, 0]


@pytest.mark.parametrize("features", [2, 3])  # the text has two features, its code three
def test_003_batchnorm3d_shapes_2_2_3(features: int) -> None:
    x, bn = constant_features(features, (2, 2, 3)), own.BatchNorm3d(features, momentum=0.3)
    for _ in range(2):
        assert bn(x).shape == (3, features, 2, 2, 3)
        for tensor in (bn.running_mean, bn.running_var, bn.weight, bn.bias):
            assert tensor.shape == (features,)


def test_003_bn_before_each_relu_keeps_the_deviation_at_0_58() -> None:
    torch.manual_seed(
        1
    )  # on the document's machine 0.58 to 0.59; here torch's own layer gives 0.567 to 0.591
    linears = [nn.Linear(256, 256, bias=False) for _ in range(100)]
    x, deviations = torch.randn(16, 256), []
    for linear in linears:
        x = torch.relu(own.BatchNorm1d(256)(linear(x)))
        deviations.append(x.std().item())
    assert sum(deviations) / 100 == pytest.approx(0.58, abs=0.005)
    assert min(deviations) > 0.56
    assert max(deviations) < 0.60


def test_004_requires_grad_false_does_not_lock_bn_but_eval_does() -> None:
    torch.manual_seed(0)
    bn = own.BatchNorm2d(3).requires_grad_(False)
    bn(torch.randn(4, 3, 2, 2) + 1)
    moved = bn.running_mean.clone()
    assert not torch.equal(moved, torch.zeros(3))
    bn.eval()(torch.randn(4, 3, 2, 2) + 1)
    assert torch.equal(bn.running_mean, moved)

"""What the tests of frozen parts share: a network with a backbone, batches, gradients, bits."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

SHARDS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)
"""Whether fully_shard runs on the CPU: before, it asks for a stream there."""


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a convolutional network, nothing of it at its default, most sizes not to be divided evenly."""
    torch.manual_seed(3)
    first = nn.Sequential(nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7), nn.ReLU(), nn.Dropout(0.3))
    second = nn.Sequential(nn.Conv2d(7, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    backbone = nn.Sequential(OrderedDict(first=first, second=second, flat=nn.Flatten()))
    model = nn.Sequential(OrderedDict(backbone=backbone, fc=nn.Linear(24, 5)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked.fill_(11)
    return model.to(dtype)


def batch(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(4, 3, 9, 9, generator=generator, dtype=torch.double).to(dtype)


def joined(world_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([batch(rank, dtype) for rank in range(world_size)])


def shard(model: nn.Module, **how: Any) -> nn.Module:
    """Shard as is usual: each stage by itself, and the rest as a whole."""
    fully_shard(model.backbone.first, **how)
    fully_shard(model.backbone.second, **how)
    return fully_shard(model, **how)


def whole(tensor: Tensor) -> Tensor:
    """The full value of a sharded tensor, by torch alone."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def reshard(model: nn.Module) -> None:
    """Have the parts of a model show their shards, which after a forward alone some do not."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def bits(model: nn.Module) -> dict[str, str]:
    """A digest of every parameter and buffer, persistent or not."""
    reshard(model)
    return {
        name: hashlib.sha256(whole(t).reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }


def in_backbone(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith("backbone.")}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 3) -> None:
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()

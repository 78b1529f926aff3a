"""The models that the promises are tested on, each with nothing left at its default value."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig


def _convnext() -> nn.Module:
    blocks = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    return torchvision.models.ConvNeXt(blocks, stochastic_depth_prob=0.5, num_classes=10)


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
        dropout=0.3, attention_dropout=0.3, num_classes=10,
    )  # fmt: skip


#: name -> (maker, image size, head)
ZOO: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 32, "fc"),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 32, "classifier"),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(num_classes=10), 32, "classifier"),
    "convnext": (_convnext, 32, "classifier"),
    "vit": (_vit, 32, "heads"),
}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return scramble(ZOO[name][0]())


def scramble(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic a random value, since a default hides many a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                if getattr(module, "num_batches_tracked", None) is not None:
                    module.num_batches_tracked.fill_(int(torch.randint(1, 100, ())))
    return model


def images(name: str, batch: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = ZOO[name][1]
    return torch.randn(batch, 3, size, size, generator=generator)


def features(model: nn.Module, head: str, x: Tensor) -> Tensor:
    """What the backbone hands to the head."""
    caught: list[Tensor] = []
    handle = model.get_submodule(head).register_forward_pre_hook(
        lambda _, inputs: caught.append(inputs[0].clone())  # dropout works in place
    )
    try:
        model(x)
    finally:
        handle.remove()
    return caught[0]


def snapshot(model: nn.Module) -> dict[str, bytes]:
    """Bits of every parameter and buffer, the non-persistent ones too."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in tensors}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

"""Tells which norm layers kept their statistics while the weights before them were trained (FK407, FK408)."""

from __future__ import annotations

from collections.abc import Collection

from freezekit.audit.bits import same_bits
from freezekit.audit.findings import Finding
from freezekit.audit.state import OptimizerState, StateTable, TensorState, counter_value, joined

__all__ = ["feeders", "stale", "trained_past"]


def feeders(table: StateTable) -> dict[str, str]:
    """Return by norm layer the weight that makes its input, as far as the order of the names tells.

    It is the last weight before the layer with as many outputs as the layer has channels: of the
    convolution or linear layer beside it.
    """
    found: dict[str, str] = {}
    layers = set(table.norm_layers())
    last: str | None = None
    outputs = 0
    for name, tensor in table.items():
        layer, _, own = name.rpartition(".")
        if tensor.role == "parameter" and len(tensor.shape) > 1:
            last, outputs = name, tensor.shape[0]
        elif own == "running_mean" and layer in layers and last is not None and outputs == tensor.numel:
            found[layer] = last
    return found


def trained_past(table: StateTable) -> list[Finding]:
    """Tell of layers that counted fewer batches than the optimizer in the file stepped the weights before.

    In train mode each step is of a batch at least, so the counter was set back or stood still meanwhile.

    Args:
        table: the state, with what its file tells of the optimizers.
    """
    steps = _steps(table)
    if not steps:
        return []
    feeding = feeders(table)
    groups: dict[tuple[int, int], list[str]] = {}
    for layer in table.norm_layers():
        count = table.count(layer)
        own = [name for part in ("weight", "bias") if (name := joined(layer, part)) in table]
        taken = steps.get(feeding.get(layer, ""), 0)
        # what was frozen, or had its statistics held on purpose, was not stepped with what feeds it
        if count is None or count >= taken or any(steps.get(name, 0) <= count for name in own):
            continue
        groups.setdefault((count, taken), []).append(layer)
    return [
        Finding(
            "FK407",
            layers[0],
            f"num_batches_tracked is {count:,}{_of(layers)}, while the weights before were stepped {taken:,} "
            "times: it was set back (reset or calibrated), or in eval mode meanwhile",
            "nothing if it was calibrated last, as after weight averaging; otherwise calibrate it: "
            "freezekit.update_bn(loader, model)",
        )
        for (count, taken), layers in groups.items()
    ]


def stale(base: StateTable, table: StateTable, meant: Collection[str] = ()) -> list[Finding]:
    """Tell of layers that have the base's statistics bit for bit, while the weight before has changed.

    Args:
        base: the state before.
        table: the state after.
        meant: names of tensors that are said to be frozen; a layer among them is left out.
    """
    found = []
    for layer, weight in feeders(base).items():
        stats = [joined(layer, own) for own in ("running_mean", "running_var")]
        if weight not in table or any(name not in table or name in meant for name in stats):
            continue
        if base[weight].shape != table[weight].shape or base[weight].dtype != table[weight].dtype:
            continue
        if all(_same(base, table, name) for name in stats) and _same(base, table, weight) is False:
            found.append(layer)
    if not found:
        return []
    message = (
        f"the statistics{_of(found)} are the base's bit for bit, while the weights before were trained: "
        "in eval mode during training"
    )
    fix = (
        "nothing if it was meant (norm_eval, FrozenBatchNorm2d); otherwise calibrate: "
        "freezekit.update_bn(loader, model), or train with model.train()"
    )
    return [Finding("FK408", found[0], message, fix)]


def _steps(table: StateTable) -> dict[str, int]:
    """Return by parameter how often it was stepped; the most, where several optimizers have it."""
    found: dict[str, int] = {}
    for optimizer in table.training.optimizers:
        names = _names(optimizer, table)
        for key, step in optimizer.steps.items():
            name = names.get(key)
            if name is not None and name in table:
                count = counter_value(step) if isinstance(step, TensorState) else step
                found[name] = max(found.get(name, 0), count or 0)
    return found


def _names(optimizer: OptimizerState, table: StateTable) -> dict[int | str, str]:
    """Return the parameters' names by key: as told, or by order where one group has them all."""
    keys = [key for group in optimizer.groups for key in group]
    if optimizer.names or any(isinstance(key, str) for key in keys):
        return {**{key: key for key in keys if isinstance(key, str)}, **optimizer.names}
    parameters = {name: tensor.shape for name, tensor in table.items() if tensor.role == "parameter"}
    shapes = [optimizer.shapes.get(key) for key in keys]
    if len(optimizer.groups) != 1 or shapes != list(parameters.values()):
        return {}
    return dict(zip(keys, parameters, strict=True))


def _same(base: StateTable, table: StateTable, name: str) -> bool | None:
    """Tell whether a tensor has the same bits in both; ``None`` where one cannot be read."""
    if base[name].unsupported or table[name].unsupported:
        return None
    return same_bits(base[name], table[name])


def _of(layers: list[str]) -> str:
    return (
        f" here and in {len(layers) - 1} other layer{'' if len(layers) == 2 else 's'}" if layers[1:] else ""
    )

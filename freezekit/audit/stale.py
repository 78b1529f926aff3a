"""Tells which norm layers kept their statistics while the weights before them were trained (FK407, FK408)."""

from __future__ import annotations

from collections.abc import Collection

from freezekit.audit.findings import Finding
from freezekit.audit.state import OptimizerState, StateTable, TensorState, counter_value, joined

__all__ = ["feeders", "stale", "trained_past"]

#: values of weights that are looked at, since what was fine-tuned shows in the first
_MOST_BYTES = 64 * 2**20


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


def trained_past(table: StateTable, names: dict[int | str, str] | None = None) -> list[Finding]:
    """Tell of layers that counted fewer batches than the optimizer in the file stepped the weights before.

    In train mode each step is of a batch at least, so the counter was set back or stood still meanwhile.

    Args:
        table: the state, with what its file tells of the optimizers.
        names: by key of the optimizer the parameter's name, where the file does not tell it.
    """
    steps = _steps(table, names)
    if not steps:
        return []
    feeding = feeders(table)
    groups: dict[tuple[int, int], list[str]] = {}
    for layer in table.norm_layers():
        count = counter_value(table.get(joined(layer, "num_batches_tracked")))
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
    budget = _MOST_BYTES
    found = []
    seen = 0
    for layer, weight in feeders(base).items():
        stats = [joined(layer, own) for own in ("running_mean", "running_var")]
        if weight not in table or any(name not in table or name in meant for name in stats):
            continue
        if not all(_same(base[name], table[name]) for name in stats):
            continue
        budget -= base[weight].numel * 4
        if seen and budget < 0:
            break
        seen += 1
        if base[weight].shape == table[weight].shape and not _same(base[weight], table[weight]):
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


def _steps(table: StateTable, names: dict[int | str, str] | None) -> dict[str, int]:
    """Return by parameter how often it was stepped; the most, where several optimizers have it."""
    found: dict[str, int] = {}
    for optimizer in table.training.optimizers:
        known = {**_own_names(optimizer), **(names or {})}
        for key, step in optimizer.steps.items():
            name = known.get(key)
            count = counter_value(step) if isinstance(step, TensorState) else step
            if name is not None and name in table and count is not None:
                found[name] = max(found.get(name, 0), count)
    return found


def _own_names(optimizer: OptimizerState) -> dict[int | str, str]:
    keys: dict[int | str, str] = {
        key: key for group in optimizer.groups for key in group if isinstance(key, str)
    }
    return {**keys, **optimizer.names}


def _same(before: TensorState, after: TensorState) -> bool:
    if before.unsupported or after.unsupported or before.sha256 is not None:
        return False
    return (before.dtype, before.shape) == (after.dtype, after.shape) and before.read() == after.read()


def _of(layers: list[str]) -> str:
    return (
        f" here and in {len(layers) - 1} other layer{'' if len(layers) == 2 else 's'}" if layers[1:] else ""
    )

"""An auditor that goes on after something was unfrozen, or frozen, on purpose."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

from freezekit import DriftAuditor, DriftError, freeze, unfreeze


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
    return zoo.scramble(nn.Sequential(*layers, nn.Linear(4, 2)))  # type: ignore[return-value]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


def test_what_is_unfrozen_may_move_and_the_rest_may_not() -> None:
    model = net()
    freeze(model, ["0", "1", "2", "3"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = {name: t.clone() for name, t in model.state_dict().items() if name[0] in "01"}
    with DriftAuditor(model, optimizer, watch="all") as auditor:
        step(model, optimizer)
        unfreeze(model, ["2", "3"])
        auditor.renew()
        step(model, optimizer)
        assert auditor.step == 2
    report = auditor.report()
    assert report.clean
    assert report.compared == 14  # what was frozen at any time
    assert report.notes == ("7 of them were unfrozen meanwhile, and are no longer compared",)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in frozen.items())


def test_without_renewal_it_is_a_finding_with_the_call_to_make() -> None:
    model = net()
    freeze(model, ["0", "1"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(DriftError, match=r"requires a gradient by now.*auditor\.renew\(\)"):  # noqa: SIM117
        with DriftAuditor(model, optimizer, watch="all"):
            unfreeze(model, "*")
            step(model, optimizer)


def test_drift_of_what_stays_frozen_is_found_after_it() -> None:
    model = net()
    model[:4].requires_grad_(False)
    model[:4].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        model[2:4].requires_grad_(True)
        auditor.renew()
        step(model, optimizer)  # its model.train() undoes eval()
    report = auditor.report()
    assert [(f.code, f.name, f.step) for f in report.findings] == [("FK101", "1", 1)]
    assert report.findings[0].cause is not None
    assert report.findings[0].cause.kind == "train-mode forward"


def test_what_moved_before_it_raises_there_and_stays_in_the_report() -> None:
    model = net()
    model[:4].requires_grad_(False)
    model[:4].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    auditor = DriftAuditor(model, optimizer)
    model[1].running_mean.add_(1.0)  # type: ignore[union-attr, operator]
    with pytest.raises(DriftError, match="FK101 1"):
        auditor.renew()
    auditor.on_drift = "record"
    with auditor:
        model[1].running_mean.add_(1.0)  # type: ignore[union-attr, operator]
        step(model, optimizer)
        moved = next(layer for layer in auditor.report().layers if layer.name == "1")
        model[:4].requires_grad_(True)
        auditor.renew()
    report = auditor.report()
    first = next(f for f in report.findings if f.name == "1")
    assert "requires a gradient" not in first.message
    assert (
        next(layer for layer in report.layers if layer.name == "1").mean_shift_sigma == moved.mean_shift_sigma
    )
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(report.changed)


def test_nothing_is_left_frozen_and_then_something_is_again() -> None:
    model = net()
    handle = freeze(model, ["0", "1"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DriftAuditor(model, optimizer, probe=1) as auditor:
        step(model, optimizer)
        handle.undo()
        auditor.renew()
        step(model, optimizer)
        freeze(model, ["0", "1", "2"])
        auditor.renew()
        step(model, optimizer)
    assert auditor.report().clean
    assert auditor.step == 3
    with pytest.raises(DriftError, match=r"FK103 2\.bias"), auditor:
        with torch.no_grad():
            model[2].bias.add_(1)  # type: ignore[union-attr, operator]
        auditor.check()


def test_another_base_after_it_is_told_apart_from_the_first() -> None:
    """What moved in record mode is a finding once, with its first step."""
    model = net()
    model[:2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        step(model, optimizer)
        auditor.renew()
        step(model, optimizer)
    assert [(f.code, f.name, f.step) for f in auditor.report().findings] == [("FK101", "1", 1)]


def test_after_the_error_it_goes_on_with_what_is_frozen_now() -> None:
    model = net()
    model[:4].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    auditor = DriftAuditor(model, optimizer).attach()
    model[2:4].requires_grad_(True)
    model[0].weight.data.add_(1)  # type: ignore[operator, union-attr]
    with pytest.raises(DriftError, match=r"FK103 0\.weight"):
        auditor.renew()
    model.eval()(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()  # moves what trains, which is no finding
    auditor.detach()
    assert auditor.report().changed == ("0.weight",)

"""Views of what optimizers hold: kept while the tensors stay, never keeping a dropped gradient alive."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import freezekit
from freezekit.audit.live.calls import callees
from freezekit.audit.live.columns import Column, Views, row_of


def spread(tensor: Tensor) -> Tensor | None:
    return row_of(tensor, 16)


def seen(views: Views, tensors: list[Tensor | None]) -> list[bool | None]:
    rows, spans = views.look(tensors)
    column = Column([row != 0 for row in rows], spans)
    found = [column.any(at) for at in range(len(tensors))]
    return [None if one is None else bool(one) for one in found]


def test_kept_views_see_what_is_written_and_what_is_put_in_place() -> None:
    tensors: list[Tensor | None] = [torch.ones(300, 3), None, torch.ones(8, 3, 3, 3), torch.ones(0)]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)  # type: ignore[union-attr]
    views = Views(spread)
    for _ in range(3):
        assert seen(views, tensors) == [True, None, True, None]
    tensors[2].zero_()  # type: ignore[union-attr]
    assert seen(views, tensors) == [True, None, False, None]
    tensors[0].data = torch.zeros(300, 3)  # type: ignore[union-attr]
    assert seen(views, tensors) == [False, None, False, None]


def test_gradients_dropped_after_each_step_are_not_kept() -> None:
    parameter, views = nn.Parameter(torch.ones(300)), Views(spread)
    for _ in range(3):
        parameter.grad = torch.ones(300)
        assert seen(views, [parameter.grad]) == [True]
        assert views._layout is None


def test_a_copy_is_never_kept_as_a_view() -> None:
    strided, views = torch.ones(40, 40)[:, ::2], Views(spread)
    for _ in range(3):
        assert seen(views, [strided]) == [True]
    strided.zero_()
    assert seen(views, [strided]) == [False]


def test_a_layer_is_no_longer_watched_once_all_it_holds_is_explained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with freezekit.DriftAuditor(model, optimizer, on_drift="record") as auditor:
        assert id(model[0]) in callees
        for _ in range(2):
            model.train()
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
            assert id(model[0]) not in callees
        causes = {f.cause.kind for f in auditor.report().findings if f.cause is not None}
    assert causes == {"train-mode forward"}

"""audit_checkpoint: what counts as frozen, what is drift, and what is only training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import Tensor, nn

import freezekit
from freezekit import CheckpointError, FreezekitError, SelectionError, audit_checkpoint

State = dict[str, Tensor]
NORMS = 20  # BN layers of a ResNet-18


@pytest.fixture
def state() -> State:
    return zoo.make("resnet18").state_dict()


def trained(how: str) -> State:
    """The same network after fine-tuning its head."""
    model = zoo.make("resnet18")
    if how == "ours":
        freezekit.freeze_backbone(model)
    elif how == "naive":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("fc"))
    zoo.train(model, torch.optim.SGD(freezekit.trainable_parameters(model), lr=0.1), zoo.images("resnet18"))
    return model.state_dict()


def save(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def test_naive_freezing_is_drift_in_every_layer(tmp_path: Path, state: State) -> None:
    naive = trained("naive")
    report = audit_checkpoint(save(naive, tmp_path / "naive.pth"), save(state, tmp_path / "base.pth"))
    assert not report.clean
    assert len(report.findings) == NORMS
    assert {f.code for f in report.findings} == {"FK101"}
    assert [f.name for f in report.findings] == [
        n.rpartition(".")[0] for n in state if n.endswith("running_mean")
    ]
    assert report.scope == "inferred: 20 of 20 BN layers kept their parameters bit for bit"
    assert set(report.changed) == {n for n in state if not torch.equal(state[n], naive[n]) and "fc" not in n}
    assert report.notes == ("2 of 22 other tensors differ, as trained ones do: fc.weight, fc.bias",)
    layer = report.layers[0]
    sigma = (state["bn1.running_var"].double() + 1e-5).sqrt()
    shift = ((naive["bn1.running_mean"].double() - state["bn1.running_mean"].double()).abs() / sigma).max()
    assert layer.mean_shift_sigma == pytest.approx(float(shift))
    assert layer.batches == 3


def test_proper_freezing_is_clean(tmp_path: Path, state: State) -> None:
    report = audit_checkpoint(
        save(trained("ours"), tmp_path / "ours.pth"), save(state, tmp_path / "base.pth")
    )
    assert report.clean
    assert report.changed == ()
    assert len(report.layers) == NORMS


def test_full_fine_tuning_is_not_drift(tmp_path: Path, state: State) -> None:
    paths = save(trained("all"), tmp_path / "all.pth"), save(state, tmp_path / "base.pth")
    report = audit_checkpoint(*paths)
    assert report.clean
    assert report.scope.startswith("inferred: 0 of 20 BN layers")
    assert str(report).startswith(
        "NOTHING TO COMPARE: no BN layer looks frozen; say what was frozen with --frozen"
    )
    # unless one says what should have been frozen
    report = audit_checkpoint(*paths, frozen=["layer1"])
    assert {f.code for f in report.findings} == {"FK101", "FK103"}
    assert all(f.name.startswith("layer1") for f in report.findings)


@pytest.mark.parametrize("how", ["naive", "ours"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_state_dict": s, "optimizer": {"state": {}}},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()} | {"loss.weight": torch.ones(2)}},
        lambda s: {f"encoder.net.{k}": v for k, v in s.items()},
    ],
    ids=["state_dict", "model_state_dict", "ddp", "compiled", "lightning", "deep"],
)
def test_wrappings_and_prefixes(
    tmp_path: Path, state: State, how: str, wrap: Callable[[State], object]
) -> None:
    base = save(state, tmp_path / "base.pth")
    wrapped = save(wrap(trained(how)), tmp_path / "wrapped.pth")
    assert len(audit_checkpoint(wrapped, base).findings) == (NORMS if how == "naive" else 0)
    # and the other way about: a wrapped base
    assert len(audit_checkpoint(base, wrapped).findings) == (NORMS if how == "naive" else 0)


@pytest.mark.parametrize("how", ["naive", "ours"])
@pytest.mark.parametrize("old", ["base", "checkpoint"])
def test_files_without_counters(tmp_path: Path, state: State, how: str, old: str) -> None:
    """torchvision's first ResNet weights have none; loading them starts the counters at 0."""
    new = trained(how)
    strip = state if old == "base" else new
    for name in [n for n in strip if n.endswith("num_batches_tracked")]:
        del strip[name]
    paths = save(new, tmp_path / "new.pth"), save(state, tmp_path / "base.pth")
    for frozen in (None, ["bn1", "layer*"]):
        report = audit_checkpoint(*paths, frozen=frozen)
        assert {f.code for f in report.findings} == ({"FK101"} if how == "naive" else set())
    assert any("20 num_batches_tracked are in one of the files only" in note for note in report.notes)


def test_a_half_precision_copy_is_recast(tmp_path: Path, state: State) -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in trained("ours").items()}
    report = audit_checkpoint(save(half, tmp_path / "half.pth"), save(state, tmp_path / "base.pth"))
    assert {f.code for f in report.findings} == {"FK105"}
    assert report.findings[0].message == "was recast from float32 to float16"
    assert {f.name.rpartition(".")[0] for f in report.findings} == {layer.name for layer in report.layers}
    assert not any(layer.changed for layer in report.layers)
    assert report.scope == "inferred: 20 of 20 BN layers kept their parameters bit for bit but for a cast"
    assert report.notes == (
        "2 of 22 other tensors differ, as trained ones do: fc.weight, fc.bias",
        "20 of 22 other tensors were only cast: conv1.weight, layer1.0.conv1.weight, layer1.0.conv2.weight, "
        "layer1.1.conv1.weight, ...",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_drift_is_seen_through_a_cast(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    naive = trained("naive")
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in naive.items()}
    base = save(state, tmp_path / "base.pth")
    report = audit_checkpoint(save(cast, tmp_path / "cast.pth"), base)
    plain = audit_checkpoint(save(naive, tmp_path / "naive.pth"), base)
    assert [f.name for f in report.findings if f.code == "FK101"] == [f.name for f in plain.findings]
    recast = [f.name for f in report.findings if f.code == "FK105"]
    assert recast == [n for n in state if "bn" in n or "downsample.1" in n if n.endswith(("weight", "bias"))]
    for layer, other in zip(report.layers, plain.layers, strict=True):
        assert layer.changed
        assert layer.batches == other.batches
        assert layer.mean_shift_sigma == pytest.approx(other.mean_shift_sigma, rel=0.05)


def test_a_parameter_that_changed_by_more_than_a_cast(tmp_path: Path, state: State) -> None:
    new = {
        **state,
        "conv1.weight": (state["conv1.weight"] * 1.5).half(),
        "fc.weight": state["fc.weight"].half(),
    }
    paths = save(new, tmp_path / "new.pth"), save(state, tmp_path / "base.pth")
    report = audit_checkpoint(*paths, frozen=["conv1", "fc"])
    assert [f.message for f in report.findings] == [
        "was recast from float32 to float16, and changed by more than that",
        "was recast from float32 to float16",
    ]


def test_the_two_files_mixed_up(tmp_path: Path, state: State) -> None:
    paths = save(trained("naive"), tmp_path / "naive.pth"), save(state, tmp_path / "base.pth")
    mixed = "the base counted more batches than the checkpoint in every layer: are the two mixed up?"
    assert mixed in audit_checkpoint(paths[1], paths[0]).notes
    assert mixed not in audit_checkpoint(*paths).notes


def test_across_formats(tmp_path: Path, state: State) -> None:
    naive = trained("naive")
    torch.save(naive, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "base.safetensors")
    report = audit_checkpoint(tmp_path / "legacy.pth", tmp_path / "base.safetensors")
    assert len(report.findings) == NORMS


def change(**edits: Callable[[Tensor], Tensor | None]) -> Callable[[State], State]:
    def apply(state: State) -> State:
        out = dict(state)
        for key, edit in edits.items():
            name = key.replace("__", ".")
            value = edit(out[name].clone())
            if value is None:
                del out[name]
            else:
                out[name] = value
        return out

    return apply


@pytest.mark.parametrize(
    ("edit", "codes"),
    [
        (change(bn1__num_batches_tracked=lambda t: t + 1), ["FK102 bn1"]),
        (change(bn1__running_mean=lambda t: t + 1), ["FK101 bn1"]),
        (change(bn1__running_mean=lambda t: None), ["FK105 bn1.running_mean"]),
        (change(bn1__running_var=lambda t: t[:5].clone()), ["FK105 bn1.running_var"]),
        (change(bn1__running_var=lambda t: t.double()), ["FK105 bn1.running_var"]),
        (change(bn1__running_mean=lambda t: t.fill_(torch.nan)), ["FK101 bn1", "FK401 bn1"]),
        (change(bn1__running_var=lambda t: -t), ["FK101 bn1", "FK402 bn1"]),
        (change(bn1__num_batches_tracked=lambda t: t.float()), []),  # some files keep it so
        (change(fc__weight=lambda t: t[:3].clone(), fc__bias=lambda t: None), []),  # a new head
    ],
)
def test_each_kind_of_change(
    tmp_path: Path, state: State, edit: Callable[[State], State], codes: list[str]
) -> None:
    report = audit_checkpoint(save(edit(state), tmp_path / "new.pth"), save(state, tmp_path / "base.pth"))
    assert [f"{f.code} {f.name}" for f in report.findings] == codes
    json.loads(report.to_json())


def test_a_network_without_its_bn_is_not_clean(tmp_path: Path, state: State) -> None:
    stripped = {n: t for n, t in state.items() if "bn" not in n}
    report = audit_checkpoint(save(stripped, tmp_path / "new.pth"), save(state, tmp_path / "base.pth"))
    assert {f.code for f in report.findings} == {"FK105"}


def test_frozen_names_a_whole_part(tmp_path: Path, state: State) -> None:
    edit = change(
        conv1__weight=lambda t: t + 1,
        layer1__0__conv1__weight=lambda t: t.half(),
        bn1__running_var=lambda t: t * 2,
    )
    paths = save(edit(state), tmp_path / "new.pth"), save(state, tmp_path / "base.pth")
    found = [
        f"{f.code} {f.name}" for f in audit_checkpoint(*paths, frozen=["conv1", "bn1", "layer1"]).findings
    ]
    assert found == ["FK103 conv1.weight", "FK101 bn1", "FK105 layer1.0.conv1.weight"]
    assert audit_checkpoint(*paths, frozen="layer2*").clean
    with pytest.raises(SelectionError, match=r"frozen: no layer or tensor matches .got 'layr2'.*'layer2'"):
        audit_checkpoint(*paths, frozen="layr2")


def test_affine_free_bn_goes_with_its_neighbours(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), nn.Linear(3, 2))
    state = zoo.scramble(net).state_dict()
    base = save(state, tmp_path / "base.pth")
    moved = change(**{"0__1__running_mean": lambda t: t + 1})
    assert len(audit_checkpoint(save(moved(state), tmp_path / "a.pth"), base).findings) == 1
    also_trained = change(**{"0__1__running_mean": lambda t: t + 1, "0__0__weight": lambda t: t + 1})
    assert audit_checkpoint(save(also_trained(state), tmp_path / "b.pth"), base).clean


class TestAlone:
    def test_a_good_file(self, tmp_path: Path, state: State) -> None:
        for name in state:
            if name.endswith("num_batches_tracked"):
                state[name].fill_(7)
        report = audit_checkpoint(save(state, tmp_path / "a.pth"))
        assert report.clean
        assert report.findings == ()
        assert [layer.name for layer in report.layers][:2] == ["bn1", "layer1.0.bn1"]
        assert {layer.num_batches_tracked for layer in report.layers} == {7}
        assert all(layer.mean_shift_sigma is None for layer in report.layers)

    def test_bad_statistics(self, tmp_path: Path) -> None:
        state = zoo.scramble(nn.ModuleDict({name: nn.BatchNorm1d(4) for name in "abcde"})).state_dict()
        for name in "abcde":
            state[f"{name}.num_batches_tracked"].fill_(9)
        state["a.running_mean"][1] = torch.inf
        state["b.running_var"][:2] = -1
        state["c.running_mean"].zero_()
        state["c.running_var"].fill_(1)
        state["d.num_batches_tracked"].fill_(10)
        report = audit_checkpoint(save(state, tmp_path / "a.pth"))
        assert not report.clean
        assert [(f.code, f.name, f.message) for f in report.findings] == [
            ("FK401", "a", "1 of 8 values are NaN or infinite"),
            ("FK402", "b", "2 of 4 variances are negative, down to -1"),
            ("FK403", "c", "running_mean is all 0 and running_var all 1 (num_batches_tracked is 9)"),
            ("FK404", "d", "a, b, c and 1 more: 9; d: 10"),
        ]

    def test_counters_that_disagree_are_only_a_warning(self, tmp_path: Path) -> None:
        state = zoo.scramble(nn.ModuleDict({name: nn.BatchNorm1d(4) for name in "ab"})).state_dict()
        report = audit_checkpoint(save(state, tmp_path / "a.pth"))
        assert [f.code for f in report.findings] == ["FK404"]
        assert report.clean

    def test_no_norm_layers(self, tmp_path: Path) -> None:
        report = audit_checkpoint(save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pth"))
        assert report.clean
        assert "no layer keeps running statistics" in report.notes


def test_zero_and_denormal_variances_give_finite_drift(tmp_path: Path) -> None:
    state = nn.BatchNorm1d(4).state_dict()
    state["running_var"][:] = torch.tensor([0.0, 5e-45, 1.0, 3e38])
    after = {**state, "running_mean": torch.tensor([3e38, 1.0, 0.0, 0.0]), "running_var": torch.zeros(4)}
    report = audit_checkpoint(save(after, tmp_path / "b.pth"), save(state, tmp_path / "a.pth"))
    (layer,) = report.layers
    content = json.loads(report.to_json())  # strict JSON would refuse infinity
    assert content["layers"][0]["mean_shift_sigma"] == layer.mean_shift_sigma > 1e40
    assert 0 < layer.var_ratio < 1e-20


def test_wrong_use(tmp_path: Path, state: State) -> None:
    path = save(state, tmp_path / "a.pth")
    with pytest.raises(FreezekitError, match="nothing to compare the frozen layers with"):
        audit_checkpoint(path, frozen="bn1")
    other = save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(FreezekitError, match="no tensor name in common"):
        audit_checkpoint(path, other)
    with pytest.raises(CheckpointError, match="no such file"):
        audit_checkpoint(path, tmp_path / "missing.pth")


def test_json_schema(tmp_path: Path, state: State) -> None:
    report = audit_checkpoint(save(trained("naive"), tmp_path / "n.pth"), save(state, tmp_path / "b.pth"))
    content = json.loads(report.to_json())
    assert content["schema_version"] == 1
    assert content["clean"] is False
    assert {
        "name",
        "kind",
        "channels",
        "num_batches_tracked",
        "mean_shift_sigma",
        "var_ratio",
        "changed",
    } <= set(content["layers"][0])
    assert {"code", "name", "message", "fix"} <= set(content["findings"][0])
    assert sum(layer["changed"] for layer in content["layers"]) == NORMS


def norms(names: str = "ab") -> State:
    """BN layers with one counter, and nothing at its default."""
    state = zoo.scramble(nn.ModuleDict({name: nn.BatchNorm1d(4) for name in names})).state_dict()
    for name in names:
        state[f"{name}.num_batches_tracked"].fill_(9)
    return state


def test_what_differs_outside_the_frozen_part_is_told(tmp_path: Path) -> None:
    base = {
        "lin.weight": torch.zeros(2, 3),
        "lin.bias": torch.zeros(2),
        "lin.gone": torch.ones(1),
        "lin.same": torch.ones(1),
    }
    new = {"lin.weight": torch.zeros(3, 2), "lin.bias": torch.zeros(2).half(), "lin.same": torch.ones(1)}
    report = audit_checkpoint(save(new, tmp_path / "new.pth"), save(base, tmp_path / "base.pth"))
    assert report.notes == (
        "2 of 4 other tensors differ, as trained ones do: lin.weight, lin.gone",
        "1 of 4 other tensors were only cast: lin.bias",
    )


def test_a_mean_without_a_variance_is_a_buffer(tmp_path: Path) -> None:
    base, new = {"m.running_mean": torch.zeros(3)}, {"m.running_mean": torch.ones(3)}
    report = audit_checkpoint(save(new, tmp_path / "new.pth"), save(base, tmp_path / "base.pth"), frozen="m")
    assert [(f.code, f.name) for f in report.findings] == [("FK104", "m.running_mean")]


def test_nan_in_a_variance(tmp_path: Path) -> None:
    state = norms()
    state["a.running_var"][1] = torch.nan
    report = audit_checkpoint(save(state, tmp_path / "a.pth"))
    assert [(f.code, f.name, f.message) for f in report.findings] == [
        ("FK401", "a", "1 of 8 values are NaN or infinite")
    ]


def test_statistics_that_are_odd_but_possible(tmp_path: Path) -> None:
    state = norms()
    state["a.running_var"][1] = 0  # a dead channel
    state["b.running_mean"].zero_()  # over a layer whose output is centred
    report = audit_checkpoint(save(state, tmp_path / "a.pth"))
    assert report.clean
    assert [(f.code, f.name) for f in report.findings] == [("FK405", "a")]


def test_a_counter_that_is_no_number(tmp_path: Path) -> None:
    state = norms()
    state["a.num_batches_tracked"] = torch.zeros(0, dtype=torch.int64)
    report = audit_checkpoint(save(state, tmp_path / "a.pth"))
    assert [layer.num_batches_tracked for layer in report.layers] == [None, 9]


def test_statistics_that_cannot_be_read_are_not_judged(tmp_path: Path) -> None:
    state = norms()
    state["a.running_mean"] = state["a.running_mean"].to_sparse()
    report = audit_checkpoint(save(state, tmp_path / "a.pth"))
    assert report.findings == ()
    assert [layer.name for layer in report.layers] == ["a", "b"]


def test_tensors_that_cannot_be_read_are_not_compared(tmp_path: Path) -> None:
    state = norms("a") | {"lin.weight": torch.eye(3).to_sparse()}
    paths = save(state, tmp_path / "a.pth"), save(state, tmp_path / "b.pth")
    blind = "1 tensor has no values that can be compared: lin.weight (sparse layout)"
    report = audit_checkpoint(*paths)
    assert report.clean
    assert report.notes == (blind,)
    named = audit_checkpoint(*paths, frozen="*")
    assert named.compared == len(state) - 1
    assert named.scope == "as given, but for 1 that cannot be compared"
    assert named.notes == (blind,)
    alone = audit_checkpoint(*paths, frozen="lin")
    assert str(alone).startswith("NOTHING TO COMPARE: what is named as frozen has no values that can be")
    other = save(state | {"lin.weight": torch.eye(3)}, tmp_path / "c.pth")
    assert [f.name for f in audit_checkpoint(other, paths[0], frozen="*").findings] == ["lin.weight"]


def test_a_channel_that_was_infinite_is_left_out_of_the_size(tmp_path: Path) -> None:
    base, new = norms(), norms()
    new["a.running_mean"].copy_(base["a.running_mean"])
    for name in base:
        new[name] = base[name].clone()
    base["a.running_mean"][1] = torch.inf
    report = audit_checkpoint(save(new, tmp_path / "new.pth"), save(base, tmp_path / "base.pth"))
    assert [f.code for f in report.findings] == ["FK101"]
    assert json.loads(report.to_json())["layers"][0]["mean_shift_sigma"] == 0


def test_a_layer_that_trained_is_not_marked(tmp_path: Path, state: State) -> None:
    report = audit_checkpoint(save(trained("all"), tmp_path / "all.pth"), save(state, tmp_path / "base.pth"))
    assert not any(layer.changed for layer in report.layers)
    assert all(layer.mean_shift_sigma for layer in report.layers)


def test_what_the_base_had_already_is_not_held_against_the_file(tmp_path: Path) -> None:
    state = norms()
    state["a.running_mean"][1] = torch.nan
    state["b.running_var"][1] = -1
    path = save(state, tmp_path / "a.pth")
    assert audit_checkpoint(path, path).findings == ()


def test_full_fine_tuning_without_counters_is_not_drift(tmp_path: Path, state: State) -> None:
    new = {n: t for n, t in trained("all").items() if not n.endswith("num_batches_tracked")}
    report = audit_checkpoint(save(new, tmp_path / "new.pth"), save(state, tmp_path / "base.pth"))
    assert report.clean
    assert report.compared == 0


@pytest.mark.parametrize("how", ["naive", "ours"])
def test_absent_counters_are_told_of_once(tmp_path: Path, state: State, how: str) -> None:
    new = {n: t for n, t in trained(how).items() if not n.endswith("num_batches_tracked")}
    report = audit_checkpoint(save(new, tmp_path / "new.pth"), save(state, tmp_path / "base.pth"))
    assert "2 of 22 other tensors differ, as trained ones do: fc.weight, fc.bias" in report.notes


def test_a_prefix_ends_at_a_dot(tmp_path: Path) -> None:
    base, new = {"layer.0.weight": torch.ones(2)}, {"mylayer.0.weight": torch.ones(2)}
    with pytest.raises(FreezekitError, match="no tensor name in common"):
        audit_checkpoint(save(new, tmp_path / "new.pth"), save(base, tmp_path / "base.pth"))


def test_a_counter_alone_is_drift(tmp_path: Path, state: State) -> None:
    edit = change(bn1__num_batches_tracked=lambda t: t + 1)
    assert not audit_checkpoint(save(edit(state), tmp_path / "n.pth"), save(state, tmp_path / "b.pth")).clean


def test_statistics_never_trained_are_not_clean(tmp_path: Path) -> None:
    assert not audit_checkpoint(save(nn.BatchNorm1d(4).state_dict(), tmp_path / "a.pth")).clean

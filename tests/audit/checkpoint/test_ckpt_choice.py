"""Every state in a file is listed with its BN layers, and the one that is asked for is read."""

import pytest
import torch
from safetensors.torch import save_file

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.errors import SelectionError


def net(layers=2):
    torch.manual_seed(layers)
    model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(3) for _ in range(layers)))
    model(torch.randn(8, 3))
    return model


def state(layers=2, prefix=""):
    return {prefix + name: tensor for name, tensor in net(layers).state_dict().items()}


def told(table):
    return [(root.path, root.norms) for root in table.roots]


EMA_OF_MMENGINE = ["state_dict", "ema_state_dict"]
EMA_OF_TIMM = ["state_dict", "state_dict_ema"]


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("saved", "read", "roots"),
    [
        ({"state_dict": state(2), "callbacks": {"EMA": state(3)}}, "state_dict", ["state_dict"]),
        ({"model": None, "ema": net(2)}, "ema", ["ema"]),
        ({"model": net(2), "ema": net(3)}, "model", ["model", "ema"]),
        (
            {"state_dict": state(2), "ema_state_dict": state(3)},
            "state_dict",
            ["state_dict", "ema_state_dict"],
        ),
        (
            {"state_dict": state(2), "state_dict_ema": state(3)},
            "state_dict",
            ["state_dict", "state_dict_ema"],
        ),
        ({"student": state(2), "teacher": state(3)}, "student", ["student", "teacher"]),
        ({"nets": [state(2), state(3)]}, "nets.1", ["nets.0", "nets.1"]),
        (state(2), "", [""]),
        (net(2), "", [""]),
    ],
)  # fmt: skip
def test_layouts(saved, read, roots, form, tmp_path):
    torch.save(saved, tmp_path / "a", _use_new_zipfile_serialization=form == "zip")
    table = read_checkpoint(tmp_path / "a")
    assert table.root == read
    assert [root.path for root in table.roots] == roots
    for root in table.roots:
        one = read_checkpoint(tmp_path / "a", root=root.path)
        assert one.root == root.path
        assert (len(one), len(one.norm_layers())) == (root.tensors, root.norms)


def test_the_values_are_those_of_the_root(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(net(2))
    torch.save({"model": state(2), "model_ema": averaged.state_dict()}, tmp_path / "a")
    averaged.module[0].running_mean.fill_(7)
    torch.save({"model": state(2), "model_ema": averaged.state_dict()}, tmp_path / "a")
    assert read_checkpoint(tmp_path / "a")["0.running_mean"].values().tolist() != [7, 7, 7]
    assert read_checkpoint(tmp_path / "a", root="model_ema")["0.running_mean"].values().tolist() == [7, 7, 7]


@pytest.mark.parametrize("form", ["zip", "safetensors"])
@pytest.mark.parametrize("outer", ["", "model.", "module.lit."])
def test_networks_in_one_state_dict(outer, form, tmp_path):
    teacher = {name: tensor + 1 for name, tensor in state(2, f"{outer}teacher.backbone.").items()}
    saved = {**state(2, f"{outer}student.backbone."), **teacher, f"{outer}loss.weight": torch.ones(2)}
    (save_file if form == "safetensors" else torch.save)(saved, tmp_path / "a")
    table = read_checkpoint(tmp_path / "a")
    assert told(table) == [("", 4), (f":{outer}student", 2), (f":{outer}teacher", 2)]
    assert table.root == ""
    assert f"also holds: :{outer}student (2 BN layers), :{outer}teacher (2 BN layers)" in table.notes[0]
    one = read_checkpoint(tmp_path / "a", root="teacher")
    assert one.root == f":{outer}teacher"
    assert set(one) == {f"backbone.{name}" for name in state(2)}
    for name, tensor in one.items():
        assert tensor.values().tolist() == teacher[f"{outer}teacher.{name}"].tolist()


def test_blocks_are_no_networks(tmp_path):
    blocks = {**state(2, "layer1."), **state(2, "layer2."), **state(2, "layer3.")}
    torch.save({"state_dict": blocks}, tmp_path / "a")
    assert told(read_checkpoint(tmp_path / "a")) == [("state_dict", 6)]


def test_what_is_not_there(tmp_path):
    torch.save({"gan": {"gen": state(2), "dis": state(3)}, "other": {"gen": state(1)}}, tmp_path / "a")
    with pytest.raises(
        SelectionError, match=r"no such root \(got 'gne'\).*'gan.gen' \(2 BN layers\)"
    ) as caught:
        read_checkpoint(tmp_path / "a", root="gne")
    assert caught.value.exit_code == 2
    with pytest.raises(SelectionError, match="several roots of the file end so"):
        read_checkpoint(tmp_path / "a", root="gen")
    assert read_checkpoint(tmp_path / "a", root="dis").root == "gan.dis"


def test_names_that_only_end_in_a_statistics_name(tmp_path):
    """They are no layers, so no networks either; this was a KeyError once."""
    names = [f"bn{index}_running_{what}" for index in (1, 2) for what in ("mean", "var")]
    names += [f"{layer}running_{what}" for layer in ("", ".", "a.") for what in ("mean", "var")]
    torch.save({name: torch.full((2,), index + 0.5) for index, name in enumerate(names)}, tmp_path / "a")
    table = read_checkpoint(tmp_path / "a")
    assert list(table) == names
    assert table.norm_layers() == ["", "a"]

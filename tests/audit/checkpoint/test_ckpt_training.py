"""What a checkpoint tells of its training: steps, epochs, and what the optimizers in it held."""

import struct

import pytest
import torch

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.errors import CheckpointError

SHAPES = ((4, 3), (4,), (2, 4), (2,))


def trained(kind=torch.optim.AdamW, named=False, steps=3, **options):
    """A model and an optimizer that held all but its last bias, and stepped all but its first layer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    held = list(model.named_parameters())[:3]
    optimizer = kind(held if named else [p for _, p in held], lr=0.1, **options)
    model[0].requires_grad_(False)
    for _ in range(steps):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def read(obj, path, form="zip"):
    torch.save(obj, path, _use_new_zipfile_serialization=form == "zip")
    return read_checkpoint(path)


def step_of(value):
    return value if isinstance(value, int) else int(value.values())


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("key", "path", "wrap"),
    [
        ("optimizer", "optimizer", lambda state: state),
        ("optimizer_state_dict", "optimizer_state_dict", lambda state: state),
        ("optim", "optim", lambda state: state),
        ("opt", "opt", lambda state: state),
        ("optimizer_states", "optimizer_states.0", lambda state: [state]),
        ("optimizers", "optimizers.generator", lambda state: {"generator": state}),
        ("trainer", "trainer.optimizer", lambda state: {"optimizer": state}),
    ],
)
def test_places(key, path, wrap, form, tmp_path):
    model, optimizer = trained()
    table = read({"state_dict": model.state_dict(), key: wrap(optimizer.state_dict())}, tmp_path / "a", form)
    (state,) = table.training.optimizers
    assert state.path == path
    assert state.groups == ((0, 1, 2),)
    assert state.names == {}
    assert state.shapes == {2: (2, 4)}
    assert {key: step_of(step) for key, step in state.steps.items()} == {2: 3}
    assert list(table) == list(model.state_dict())


@pytest.mark.parametrize(
    ("kind", "options", "counted"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, False),
        (torch.optim.Adam, {"amsgrad": True}, True),
        (torch.optim.RMSprop, {}, True),
        (torch.optim.Adadelta, {}, True),
        (torch.optim.Adamax, {}, True),
        (torch.optim.NAdam, {}, True),
        (torch.optim.RAdam, {}, True),
        (torch.optim.Rprop, {}, True),
        (torch.optim.ASGD, {}, True),
    ],
)
def test_kinds(kind, options, counted, tmp_path):
    model, optimizer = trained(kind, **options)
    (state,) = read(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a"
    ).training.optimizers
    assert state.shapes == {2: (2, 4)}
    assert [step_of(step) for step in state.steps.values()] == [3] * counted


def test_adagrad_has_its_state_from_the_start(tmp_path):
    model, optimizer = trained(torch.optim.Adagrad)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    (state,) = read(saved, tmp_path / "a").training.optimizers
    assert state.shapes == {0: (4, 3), 1: (4,), 2: (2, 4)}
    assert [step_of(step) for step in state.steps.values()] == [0, 0, 3]


def test_names_where_torch_wrote_them(tmp_path):
    model, optimizer = trained(named=True)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    (state,) = read(saved, tmp_path / "a").training.optimizers
    assert state.names == {0: "0.weight", 1: "0.bias", 2: "1.weight"}


def test_keyed_by_name(tmp_path):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = trained()
    model[0].requires_grad_(True)
    optimizer.param_groups[0]["params"].append(model[1].bias)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    state_dict, by_name = get_state_dict(model, optimizer)
    (state,) = read({"model": state_dict, "optim": by_name}, tmp_path / "a").training.optimizers
    assert state.groups == (("0.weight", "0.bias", "1.weight", "1.bias"),)
    assert state.names == {name: name for name in state.groups[0]}
    assert tuple(state.shapes.values()) == SHAPES
    assert {name: step_of(step) for name, step in state.steps.items()} == {
        "0.weight": 1,
        "0.bias": 1,
        "1.weight": 4,
        "1.bias": 1,
    }


def test_several_groups_and_ints(tmp_path):
    groups = [{"params": [0, 2], "lr": 0.1}, {"params": [1], "step": 7}]
    saved = {
        "model": torch.nn.Linear(2, 1).state_dict(),
        "optimizer": {"state": {0: {"step": 5, "exp_avg": torch.ones(2)}}, "param_groups": groups},
    }
    (state,) = read(saved, tmp_path / "a").training.optimizers
    assert state.groups == ((0, 2), (1,))
    assert state.shapes == {0: (2,)}
    assert state.steps == {0: 5, 1: 7}


@pytest.mark.parametrize(
    ("extra", "step", "epoch"),
    [
        ({}, None, None),
        ({"global_step": 40, "epoch": 3, "pytorch-lightning_version": "2.5"}, 40, 3),
        ({"meta": {"iter": 50, "epoch": 2}, "message_hub": {"a": torch.ones(1)}}, 50, 2),
        ({"step": 12.0}, 12, None),
        ({"iteration": 8, "epoch": 0}, 8, 0),
        ({"n_iter": 9}, 9, None),
        ({"trainer_state": {"global_step": 11, "epoch": 1.5}}, 11, None),
        ({"epoch": -1, "step": True}, None, None),
        ({"step": 2**5000, "epoch": "3", "iter": float("nan")}, None, None),
        ({"step": torch.ones(1), "iter": 4}, 4, None),
    ],
)
def test_step_and_epoch(extra, step, epoch, tmp_path):
    table = read({"state_dict": torch.nn.Linear(2, 1).state_dict(), **extra}, tmp_path / "a")
    assert (table.training.step, table.training.epoch) == (step, epoch)
    assert table.training.optimizers == ()
    assert table.notes == ()


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        ({"foreign": 1}, "a dict with 'foreign', not what torch's optimizers write"),
        ({"param_groups": 3, "state": {}}, "a dict with 'param_groups', 'state', not what torch's"),
        ({"param_groups": [3], "state": {}}, "a group of it has no list of parameters"),
        ({"param_groups": [{"params": [1.5]}], "state": {}}, "it holds its parameters themselves"),
        ({"param_groups": [{"params": 2}], "state": []}, "a group of it has no list of parameters"),
    ],
)
def test_what_is_not_understood_is_left_out_with_a_note(optimizer, why, tmp_path):
    table = read({"state_dict": torch.nn.Linear(2, 1).state_dict(), "optimizer": optimizer}, tmp_path / "a")
    assert table.training.optimizers == ()
    assert len(table.notes) == 1
    assert table.notes[0].startswith(f"the optimizer state at 'optimizer' was left out: {why}")


def test_the_progress_of_lightning_s_loops_is_no_optimizer(tmp_path):
    optimizer = trained()[1]
    counts = {"total": {"ready": 4, "completed": 4}, "current": {"ready": 4, "completed": 4}}
    progress = {"optimizer": {"step": counts, "zero_grad": counts}}
    loops = {
        "fit_loop": {
            "epoch_loop.automatic_optimization.optim_progress": progress,
            "epoch_loop.manual_optimization.optim_step_progress": counts,
        }
    }
    state = {"state_dict": torch.nn.Linear(2, 1).state_dict(), "global_step": 4, "loops": loops}
    table = read({**state, "optimizer_states": [optimizer.state_dict()]}, tmp_path / "a")
    assert [one.path for one in table.training.optimizers] == ["optimizer_states.0"]
    assert table.notes == ()


def test_odd_states_fail_nothing(tmp_path):
    groups = [{"params": [0, 1, 2, 3], "param_names": ["a"], "step": None}]
    state = {
        0: None,
        1: {"step": "x", "exp_avg": 3},
        2: {"step": -1, "momentum_buffer": None},
        "3": {"step": 1},
    }
    saved = {
        "model": torch.nn.Linear(2, 1).state_dict(),
        "optimizer": {"state": state, "param_groups": groups},
    }
    (found,) = read(saved, tmp_path / "a").training.optimizers
    assert (found.groups, found.names, found.shapes, found.steps) == (((0, 1, 2, 3),), {}, {}, {})


def test_none_is_no_optimizer(tmp_path):
    saved = {"state_dict": torch.nn.Linear(2, 1).state_dict(), "optimizer": None, "lr_schedulers": [{"a": 1}]}
    table = read(saved, tmp_path / "a")
    assert table.training.optimizers == table.notes == ()


def test_a_damaged_step_is_told_when_it_is_read(tmp_path):
    model, optimizer = trained()
    optimizer.state[model[1].weight]["step"].fill_(12345.0)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a")
    raw = (tmp_path / "a").read_bytes()
    assert raw.count(struct.pack("<f", 12345.0)) == 1
    (tmp_path / "a").write_bytes(raw.replace(struct.pack("<f", 12345.0), struct.pack("<f", 12346.0)))
    table = read_checkpoint(tmp_path / "a")
    (state,) = table.training.optimizers
    with pytest.raises(CheckpointError, match=r"checksum of storage \d+ \(tensor optimizer.state.2.step\)"):
        state.steps[2].values()


def flat(optimizer, names):
    """As torch's ``StateDictOptions(flatten_optimizer_state_dict=True)`` has it."""
    state, made = optimizer.state_dict(), {}
    for k, entry in state["state"].items():
        made |= {f"state.{names[k]}.{key}": value for key, value in entry.items()}
    for group in state["param_groups"]:
        held = [names[k] for k in group["params"]]
        made |= {f"param_groups.{name}.{key}": group[key] for name in held for key in ("lr", "eps")}
    return made


def test_a_flat_state(tmp_path):
    model, optimizer = trained()
    saved = {"model": model.state_dict(), "optimizer": flat(optimizer, ["0.weight", "0.bias", "1.weight"])}
    table = read(saved, tmp_path / "a")
    (state,) = table.training.optimizers
    assert state.path == "optimizer"
    assert state.groups == (("0.weight", "0.bias", "1.weight"),)
    assert state.shapes == {"1.weight": (2, 4)}
    assert {key: step_of(step) for key, step in state.steps.items()} == {"1.weight": 3}
    assert table.notes == ()


@pytest.mark.parametrize("key", ["state.1.weight.0.exp_avg", "more", "state.1", 7])
def test_a_flat_state_that_is_not_understood(key, tmp_path):
    model, optimizer = trained()
    saved = {"model": model.state_dict(), "optimizer": flat(optimizer, ["0.weight", "0.bias", "1.weight"])}
    saved["optimizer"][key] = torch.zeros(2)
    table = read(saved, tmp_path / "a")
    assert table.training.optimizers == ()
    assert "the optimizer state at 'optimizer' was left out" in table.notes[0]

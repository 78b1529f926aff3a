"""A folder's checkpoints are found in the order of training, whatever tool left them there."""

import os
import shutil
import time
import tracemalloc

import pytest
import torch

from freezekit.audit.checkpoint import folders
from freezekit.audit.checkpoint.folders import checkpoints_in, find_run, place_of
from freezekit.errors import CheckpointError


def touch(top, *names):
    for name in names:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def found(top):
    return [os.path.relpath(path, top) for path in checkpoints_in(top)]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (
            "checkpoint-1000/model.safetensors checkpoint-500/model.safetensors checkpoint-500/optimizer.pt"
            " checkpoint-500/rng_state.pth checkpoint-500/trainer_state.json runs/x/events.out",
            "checkpoint-500 checkpoint-1000",
        ),
        (
            "checkpoint-20/model.safetensors.index.json checkpoint-20/model-00001-of-00002.safetensors"
            " checkpoint-20/model-00002-of-00002.safetensors checkpoint-3/pytorch_model.bin"
            " model.safetensors",
            "checkpoint-3 checkpoint-20 model.safetensors",
        ),
        (
            "lightning_logs/version_10/checkpoints/epoch=0-step=8.ckpt"
            " lightning_logs/version_9/checkpoints/epoch=9-step=100.ckpt"
            " lightning_logs/version_9/checkpoints/epoch=10-step=110.ckpt"
            " lightning_logs/version_9/checkpoints/epoch=9-step=100-v1.ckpt"
            " lightning_logs/version_9/checkpoints/last.ckpt lightning_logs/version_9/hparams.yaml",
            "lightning_logs/version_9/checkpoints/epoch=9-step=100.ckpt"
            " lightning_logs/version_9/checkpoints/epoch=9-step=100-v1.ckpt"
            " lightning_logs/version_9/checkpoints/epoch=10-step=110.ckpt"
            " lightning_logs/version_9/checkpoints/last.ckpt"
            " lightning_logs/version_10/checkpoints/epoch=0-step=8.ckpt",
        ),
        (
            "epoch_10.pth epoch_2.pth best_acc_epoch_2.pth last_checkpoint"
            " 20260101_000000/vis_data/config.py",
            "epoch_2.pth best_acc_epoch_2.pth epoch_10.pth",
        ),
        ("iter_500.pth iter_1000.pth", "iter_500.pth iter_1000.pth"),
        (
            "weights/last.pt weights/best.pt weights/epoch0.pt weights/epoch10.pt weights/epoch9.pt",
            "weights/epoch0.pt weights/epoch9.pt weights/epoch10.pt weights/best.pt weights/last.pt",
        ),
        ("model_10.pth model_9.pth model_final.pth", "model_9.pth model_10.pth model_final.pth"),
        (
            "last.pth.tar model_best.pth.tar checkpoint-12.pth.tar checkpoint-9.pth.tar summary.csv",
            "checkpoint-9.pth.tar checkpoint-12.pth.tar model_best.pth.tar last.pth.tar",
        ),
        (
            "global_step200/mp_rank_00_model_states.pt global_step90/mp_rank_00_model_states.pt latest"
            " global_step90/zero_pp_rank_0_mp_rank_00_optim_states.pt zero_to_fp32.py",
            "global_step90 global_step200",
        ),
        (
            "epoch=0-step=9.ckpt/checkpoint/mp_rank_00_model_states.pt epoch=0-step=9.ckpt/latest"
            " epoch=1-step=18.ckpt/checkpoint/mp_rank_00_model_states.pt",
            "epoch=0-step=9.ckpt/checkpoint epoch=1-step=18.ckpt/checkpoint",
        ),
        (
            "checkpoint-9/pytorch_model_fsdp_0/.metadata checkpoint-9/optimizer_0/.metadata"
            " checkpoint-10/pytorch_model_fsdp_0/.metadata checkpoint-10/optimizer_0/.metadata",
            "checkpoint-9/pytorch_model_fsdp_0 checkpoint-10/pytorch_model_fsdp_0",
        ),
        (
            "step-2/.metadata step-2/__0_0.distcp step-10/__0_0.distcp step-1/__0.metadata",
            "step-1 step-2 step-10",
        ),
        ("adapter_model.safetensors adapter_config.json", "."),
        ("models--a/snapshots/c0ffee/model.safetensors models--a/blobs/123", "models--a/snapshots/c0ffee"),
        ("model.fp16.safetensors", "."),
        (".metadata __0_0.distcp model.pth", "."),
        ("mp_rank_00_model_states.pt", "."),
        (".git/model.pth a/model.pth", "a/model.pth"),
    ],
)
def test_layouts(tmp_path, names, order):
    touch(tmp_path, *names.split())
    assert found(tmp_path) == order.split()


def test_steps_and_epochs_are_told(tmp_path):
    touch(tmp_path, "epoch=0-step=9.ckpt/checkpoint/mp_rank_00_model_states.pt", "epoch=1-step=18.ckpt")
    assert [(c.step, c.epoch) for c in find_run(tmp_path).checkpoints] == [(9, 0), (18, 1)]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("global_step100", (100, None)),
        ("epoch0.pt", (None, 0)),
        ("Epoch-07_STEP_31.pth", (31, 7)),
        ("model_step-2000.bin", (2000, None)),
        ("checkpoint-500", (500, None)),
        ("checkpoint-12.pth.tar", (None, None)),  # timm counts epochs, others steps
        ("resnet50-0676ba61.pth", (None, None)),
        ("deep2.pth", (None, None)),
        ("iter_" + "9" * 400 + ".pth", (None, None)),
    ],
)
def test_place_of(name, place):
    assert place_of(f"run/{name}") == place


def test_a_file_is_its_own_run(tmp_path):
    touch(tmp_path, "iter_7.pth")
    assert checkpoints_in(tmp_path / "iter_7.pth") == [str(tmp_path / "iter_7.pth")]
    assert checkpoints_in(str(tmp_path)) == [str(tmp_path / "iter_7.pth")]


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_copies_are_left_out(tmp_path, form):
    """The zip's members bear its name, and Lightning's hold paths: neither makes it another."""
    for epoch in range(3):
        state = {"epoch": epoch, "state_dict": {"w": torch.full((99,), float(epoch))}, "path": "x" * epoch}
        torch.save(state, tmp_path / f"epoch_{epoch}.pth", _use_new_zipfile_serialization=form == "zip")
    shutil.copy(tmp_path / "epoch_1.pth", tmp_path / "best.pth")
    (tmp_path / "latest.pth").symlink_to("epoch_2.pth")
    again = torch.load(tmp_path / "epoch_2.pth")
    again["path"] += "longer"
    if form == "zip":
        torch.save(again, tmp_path / "last.pth")
    else:
        shutil.copy(tmp_path / "epoch_2.pth", tmp_path / "last.pth")
    again["state_dict"]["w"][7] += 1
    torch.save(again, tmp_path / "model_final.pth", _use_new_zipfile_serialization=form == "zip")
    assert found(tmp_path) == ["epoch_0.pth", "epoch_1.pth", "epoch_2.pth", "model_final.pth"]
    assert find_run(tmp_path).notes == (
        "left out best.pth: the same as epoch_1.pth",
        "left out last.pth: the same as epoch_2.pth",
        "left out latest.pth: the same as epoch_2.pth",
    )


def test_two_copies_of_nothing_else_are_one(tmp_path):
    torch.save({"w": torch.randn(3)}, tmp_path / "best.pt")
    shutil.copy(tmp_path / "best.pt", tmp_path / "last.pt")
    assert found(tmp_path) == ["best.pt"]


def test_the_final_model_of_a_trainer_is_left_out_if_it_is_the_last_checkpoint(tmp_path):
    touch(tmp_path, "checkpoint-5/model.safetensors", "checkpoint-6/model.safetensors")
    shutil.copy(tmp_path / "checkpoint-6/model.safetensors", tmp_path)
    assert found(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    touch(tmp_path, "model.safetensors")
    assert found(tmp_path) == ["checkpoint-5", "checkpoint-6", "model.safetensors"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("log.txt", "in which no checkpoint was found"),
        ("", "in which no checkpoint was found"),
        ("optimizer.pt scheduler.pt rng_state_0.pth training_args.bin", "in which no checkpoint was found"),
        ("model-00001-of-00002.safetensors", r"without their index.*got model-00001.*\.index\.json"),
        ("model_index.json unet/diffusion_pytorch_model.safetensors", "diffusers pipeline.*such as unet"),
    ],
)
def test_folders_without_checkpoints(tmp_path, names, says):
    touch(tmp_path, *names.split())
    with pytest.raises(CheckpointError, match=says) as caught:
        checkpoints_in(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_links_and_fifos_are_not_entered(tmp_path):
    touch(tmp_path, "run/epoch_1.pth", "elsewhere/epoch_2.pth")
    run = tmp_path / "run"
    (run / "loop").symlink_to(run)
    (run / "out").symlink_to(tmp_path / "elsewhere")
    (run / "self.pth").symlink_to("self.pth")
    os.mkfifo(run / "epoch_3.pth")
    os.mkfifo(run / "last.pth")
    (run / "gone.pth").symlink_to("nowhere")
    assert found(run) == ["epoch_1.pth"]


def test_a_folder_of_too_many_files(tmp_path):
    for index in range(20_001):  # of 100,000 no more are looked at
        os.mknod(tmp_path / f"{index}.pth")
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="too many files.*more than 20000.*give the checkpoint itself"):
        checkpoints_in(tmp_path)
    assert time.perf_counter() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()
    (tmp_path / ".metadata").touch()  # a checkpoint with a file for each tensor need not be listed
    assert found(tmp_path) == ["."]


def test_depth_is_bounded(tmp_path):
    touch(tmp_path, "/".join("abcdefghij") + "/epoch_1.pth", "a/b/epoch_2.pth")
    assert found(tmp_path) == ["a/b/epoch_2.pth"]


def test_many_names_are_counted_across_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_ENTRIES", 10)
    touch(tmp_path, *(f"{a}/{b}.pth" for a in range(3) for b in range(4)))
    with pytest.raises(CheckpointError, match="too many files"):
        checkpoints_in(tmp_path)

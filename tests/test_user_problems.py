"""The twenty problems that users of naive freezing report, each shown first and then gone.

Every test runs one scenario twice: with what people do (``requires_grad_(False)``, ``.eval()``, or the
library they report), where the problem must show, and with freezekit, where it must not.

Two of the twenty are about what a distributed wrapper did when it was made, and freezing alone solves
neither: that a layer unfrozen after DDP wrapped the model trains without its gradients being synchronised
(7; freezekit refuses to freeze a model that DDP has wrapped already), and that FSDP wants one
``requires_grad`` for all parameters of a unit (13).
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import zoo
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import freezekit

Freezing = Callable[[nn.Module], object]


def small() -> nn.Sequential:
    """A backbone with BN and dropout, and a head, none of it at its default values."""
    layers = OrderedDict(
        conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4, eps=1e-3), relu=nn.ReLU(), drop=nn.Dropout(0.5),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4, 2),
    )  # fmt: skip
    return zoo.scramble(nn.Sequential(layers))  # type: ignore[return-value]


def images(seed: int = 1) -> Tensor:
    return torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def no_gradients(model: nn.Module) -> None:
    """Freeze as most people do."""
    for name, parameter in model.named_parameters():
        if not name.startswith("fc."):
            parameter.requires_grad_(False)


def eval_mode(model: nn.Module) -> None:
    """Freeze as those do who know about statistics."""
    no_gradients(model)
    for name, child in model.named_children():
        child.train(name == "fc")


def kit(model: nn.Module) -> object:
    return freezekit.freeze_backbone(model, head="fc")


def backbone(model: nn.Module) -> dict[str, bytes]:
    return {name: b for name, b in zoo.snapshot(model).items() if not name.startswith("fc.")}


def head_only(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.get_submodule("fc").parameters(), lr=0.1)


def features(model: nn.Module, x: Tensor) -> Tensor:
    return zoo.features(model, "fc", x).detach()


def depends_on_batch_mates(model: nn.Module) -> bool:
    x, other = images(1), images(2) * 5
    other[0] = x[0]
    return not torch.equal(features(model, x)[0], features(model, other)[0])


# -- 1 to 5: statistics and modes ----------------------------------------------------------------------


def test_01_requires_grad_false_still_moves_statistics() -> None:
    def moved(freeze: Freezing) -> set[str]:
        model = small()
        freeze(model)
        before = backbone(model)
        zoo.train(model, head_only(model), images())
        return {name for name, bits in backbone(model).items() if bits != before[name]}

    assert moved(no_gradients) == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert moved(kit) == set()


def test_02_train_undoes_eval() -> None:
    def survives(freeze: Freezing) -> bool:
        model = small()
        freeze(model)
        before, expected = backbone(model), features(model, images())
        model.train()
        return torch.equal(features(model, images()), expected) and backbone(model) == before

    assert not survives(eval_mode)
    assert survives(kit)


class Classifier(nn.Module):
    """What the trainer of transformers takes for a model."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 2)
        zoo.scramble(self)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.fc(self.bn(x)), labels)}


def test_02_the_trainer_of_transformers_calls_train_every_step(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"x": torch.randn(3) + 4, "labels": torch.tensor(k % 2)} for k in range(8)]

    def moved(freeze: Freezing) -> bool:
        model = Classifier()
        freeze(model)
        before, head = backbone(model), model.fc.weight.detach().clone()
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
        assert not torch.equal(model.fc.weight, head)
        return backbone(model) != before

    assert moved(eval_mode)
    assert not moved(kit)


def lightning_module() -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = zoo.scramble(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.backbone(x))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self(batch[0]).square().mean()

        def train_dataloader(self) -> Any:
            data = torch.utils.data.TensorDataset(torch.randn(8, 3) * 2 + 1)
            return torch.utils.data.DataLoader(data, batch_size=4)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.fc.parameters(), lr=0.1)

    return Module()


def fit(module: Any, folder: Path, epochs: int, *callbacks: Any, resume: Path | None = None) -> Any:
    import lightning

    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", default_root_dir=folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=resume)
    return trainer


def test_03_lightnings_finetuning_callback_normalises_by_the_batch() -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    def as_in_eval_mode(freeze: Freezing) -> bool:
        model = small()
        model.drop.p = 0.0
        expected = features(model.eval(), images())
        freeze(model)
        model.train()
        return torch.equal(features(model, images()), expected)

    def lightning(model: nn.Module) -> None:
        rest = [child for name, child in model.named_children() if name != "fc"]
        callbacks.BackboneFinetuning.freeze(rest, train_bn=False)

    assert not as_in_eval_mode(lightning)
    assert as_in_eval_mode(kit)


def test_04_track_running_stats_false_normalises_by_the_batch() -> None:
    def untracked(model: nn.Module) -> None:
        no_gradients(model)
        model.get_submodule("bn").track_running_stats = False

    def both(model: nn.Module) -> None:
        untracked(model)
        kit(model)

    def mixes(freeze: Freezing) -> bool:
        model = small()
        model.drop.p = 0.0
        freeze(model)
        before = backbone(model)
        mixed = depends_on_batch_mates(model.train())
        assert backbone(model) == before  # there is no drift to be seen
        return mixed

    assert mixes(untracked)
    assert not mixes(kit)
    assert not mixes(both)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_05_resuming_freezes_again_what_was_unfrozen(tmp_path: Path) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    saved = tmp_path / "saved"

    def backbone_after(module: Any) -> dict[str, bytes]:
        return zoo.snapshot(module.backbone)

    def schedule() -> Any:
        return callbacks.BackboneFinetuning(1, backbone_initial_lr=0.1, should_align=False, verbose=False)

    first, resumed = lightning_module(), lightning_module()
    start = backbone_after(first)["0.weight"]
    fit(first, tmp_path, 2, schedule()).save_checkpoint(saved)
    assert backbone_after(first)["0.weight"] != start  # unfrozen in epoch 1
    fit(resumed, tmp_path, 4, schedule(), resume=saved)
    assert backbone_after(resumed)["0.weight"] == backbone_after(first)["0.weight"]  # and frozen again


def test_05_what_is_frozen_travels_with_the_model(tmp_path: Path) -> None:
    def thaw(model: nn.Module) -> None:
        model.get_submodule("conv").requires_grad_(True)

    def moved_after_loading(freeze: Freezing, unfreeze: Freezing | None) -> set[str]:
        model = small()
        freeze(model)
        if unfreeze is not None:
            unfreeze(model)
        torch.save(model, tmp_path / "saved")
        again = torch.load(tmp_path / "saved", weights_only=False)
        before = zoo.snapshot(again)
        zoo.train(again, torch.optim.SGD(freezekit.trainable_parameters(again), lr=0.1), images())
        after = zoo.snapshot(again)
        return {name.partition(".")[0] for name in after if after[name] != before[name]}

    assert moved_after_loading(eval_mode, None) == {"fc", "bn"}
    assert moved_after_loading(eval_mode, thaw) == {"fc", "bn", "conv"}
    assert moved_after_loading(kit, None) == {"fc"}
    assert moved_after_loading(kit, lambda model: freezekit.unfreeze(model, "conv")) == {"fc", "conv"}


def test_05_resume_freezes_what_was_frozen_when_the_checkpoint_was_saved() -> None:
    """A script that runs anew: it builds, loads, and freezes; the optimizer goes on where it was."""

    def moved_after_resume(restore: Callable[[nn.Module, torch.optim.Optimizer, str], object]) -> set[str]:
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        handle = freezekit.freeze_backbone(model, optimizer=optimizer)
        freezekit.unfreeze(model, "conv")
        zoo.train(model, optimizer, images())
        resumed = small()
        resumed.load_state_dict(model.state_dict())
        again = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9)
        restore(resumed, again, handle.manifest().to_json())
        if len(again.param_groups[0]["params"]) == len(optimizer.param_groups[0]["params"]):
            again.load_state_dict(optimizer.state_dict())
        before = zoo.snapshot(resumed)
        zoo.train(resumed, again, images())
        after = zoo.snapshot(resumed)
        return {name.partition(".")[0] for name in after if after[name] != before[name]}

    assert moved_after_resume(lambda model, *_: no_gradients(model)) == {"bn", "fc"}
    assert moved_after_resume(lambda model, *_: kit(model)) == {"fc"}  # all is frozen anew
    assert moved_after_resume(
        lambda model, optimizer, text: freezekit.Manifest.from_json(text).restore(model, optimizer=optimizer)
    ) == {"conv", "fc"}


# -- 6, 8 and 9: subclasses and optimizers -------------------------------------------------------------


def test_06_a_subclass_of_bn_loses_its_activation() -> None:
    layers = pytest.importorskip("timm.layers")
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")

    def error(freeze: Freezing) -> float:
        model = zoo.scramble(nn.Sequential(OrderedDict(
            conv=nn.Conv2d(3, 4, 3), bn=layers.BatchNormAct2d(4), pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(), fc=nn.Linear(4, 2),
        )))  # fmt: skip
        expected = features(model.eval(), images())
        with torch.no_grad():
            freeze(model)
        return float((features(model.train(), images()) - expected).abs().max())

    assert error(detr.replace_batch_norm) > 0.1
    assert error(no_gradients) > 0.1  # keeps the activation, and normalises by the batch
    assert error(kit) == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_08_a_stale_gradient_or_momentum_moves_frozen_weights(set_to_none: bool) -> None:
    def moved(freeze: Freezing) -> bool:
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        zoo.train(model, optimizer, images())
        if set_to_none:
            model(images()).sum().backward()  # a gradient that nobody has cleared
        else:
            optimizer.zero_grad(set_to_none=False)  # none is left, but the momentum is
        freeze(model)
        before = model.conv.weight.detach().clone()
        optimizer.step()
        return not torch.equal(model.conv.weight, before)

    assert moved(no_gradients)
    assert moved(eval_mode)
    assert not moved(kit)


class DecaysAll(torch.optim.Optimizer):
    """Weight decay for every parameter it has, as some third-party optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])


def test_09_an_optimizer_decays_parameters_without_gradient() -> None:
    def moved(freeze: Callable[[nn.Module, torch.optim.Optimizer], object]) -> bool:
        model = small()
        optimizer = DecaysAll(model.parameters())
        freeze(model, optimizer)
        before, head = backbone(model), model.fc.weight.detach().clone()
        model.fc(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        assert not torch.equal(model.fc.weight, head)
        return backbone(model) != before

    assert moved(lambda model, _: no_gradients(model))
    assert not moved(lambda model, optimizer: freezekit.freeze_backbone(model, optimizer=optimizer))


# -- 10 to 12: what runs the model in another way ------------------------------------------------------


@pytest.mark.parametrize("update_bn", [swa_utils.update_bn, freezekit.update_bn], ids=["torch", "freezekit"])
def test_10_update_bn_wipes_a_frozen_model(update_bn: Callable[[list[Tensor], nn.Module], None]) -> None:
    def moved(freeze: Freezing) -> bool:
        model = small()
        freeze(model)
        before = backbone(model)
        update_bn([images(1), images(2)], model)
        return backbone(model) != before

    assert moved(no_gradients)
    assert moved(eval_mode)
    assert not moved(kit)


@pytest.mark.parametrize("reentrant", [False, True])
def test_11_activation_checkpointing_updates_statistics_twice(reentrant: bool) -> None:
    def batches_counted(freeze: Freezing) -> int:
        model = small()
        freeze(model)
        before = int(model.bn.num_batches_tracked)
        model.train()
        checkpoint(model, images().requires_grad_(), use_reentrant=reentrant).sum().backward()
        return int(model.bn.num_batches_tracked) - before

    assert batches_counted(no_gradients) == 2  # in one step
    assert batches_counted(kit) == 0


TWO_PROCESSES = """
import os
import sys
import torch
from torch import nn
import freezekit

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", store=torch.distributed.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
)
for freezing in ("eval", "freezekit"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    if freezing == "freezekit":
        freezekit.freeze(model, "0")
    else:
        model[0].requires_grad_(False)
    parallel = nn.parallel.DistributedDataParallel(model)
    model.train()
    if freezing == "eval":
        model[0].eval()
    if rank == 0:  # a pass that only the first process makes, say to log a figure
        model.train()
        with torch.no_grad():
            model(torch.randn(4, 3) + 5)
        if freezing == "eval":
            model[0].eval()
    before = model[0].running_mean.clone()
    parallel(torch.randn(4, 3)).sum().backward()
    print(freezing, "stays" if torch.equal(before, model[0].running_mean) else "moves", flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # the threads of gloo sometimes outlive the interpreter, which then aborts
"""


def test_12_ddp_broadcasts_statistics_over_those_of_an_eval_bn(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    # nothing on the second process was ever in train mode
    assert outputs[1][0].splitlines() == ["eval moves", "freezekit stays"]


# -- 14 to 16: checkpoints, teachers, frozen BN classes ------------------------------------------------


def test_14_an_adapters_checkpoint_omits_the_drifted_statistics() -> None:
    peft = pytest.importorskip("peft")
    config = {"target_modules": ["fc"], "r": 2}

    def same_after_loading(freeze: Freezing) -> bool:
        base = small()
        fresh = copy.deepcopy(base)
        freeze(base)
        tuned = peft.get_peft_model(base, peft.LoraConfig(**config))
        parameters = [p for p in tuned.parameters() if p.requires_grad]
        zoo.train(tuned, torch.optim.SGD(parameters, lr=0.1), images())
        adapter = peft.get_peft_model_state_dict(tuned)
        assert all("lora" in key for key in adapter)
        loaded = peft.get_peft_model(fresh, peft.LoraConfig(**config))
        peft.set_peft_model_state_dict(loaded, adapter)
        return torch.equal(loaded.eval()(images()), tuned.eval()(images()))

    assert not same_after_loading(no_gradients)
    assert not same_after_loading(eval_mode)
    assert same_after_loading(kit)


def test_15_a_pass_without_gradients_still_drifts() -> None:
    def moved(freeze: Freezing) -> bool:
        distillation = nn.ModuleDict({"teacher": small(), "student": small()})
        freeze(distillation["teacher"])
        before = backbone(distillation["teacher"])
        distillation.train()
        with torch.no_grad():
            distillation["teacher"](images())
        return backbone(distillation["teacher"]) != before

    assert moved(no_gradients)
    assert moved(eval_mode)
    assert not moved(kit)


def test_16_a_frozen_bn_class_changes_eps_and_keys() -> None:
    frozen_class = torchvision.ops.FrozenBatchNorm2d

    def torchvisions(model: nn.Sequential) -> None:
        state = model.bn.state_dict()
        model.bn = frozen_class(4)
        model.bn.load_state_dict(state)

    def changes(freeze: Freezing) -> tuple[float, bool, bool]:
        model, loaded = small(), small()
        expected, counter = features(model.eval(), images()), model.bn.num_batches_tracked
        keys = list(model.state_dict())
        freeze(model)
        error = float((features(model.eval(), images()) - expected).abs().max())
        loaded.load_state_dict(model.state_dict(), strict=True)
        lost = not torch.equal(loaded.bn.num_batches_tracked, counter)
        return error, list(model.state_dict()) != keys, lost

    error, *others = changes(torchvisions)
    assert error > 1e-4
    assert others == [True, True]
    assert changes(kit) == (0, False, False)


# -- 17 to 20: everything else that moves --------------------------------------------------------------


def test_17_frozen_dropout_stays_active() -> None:
    def random(freeze: Freezing) -> bool:
        model = small()
        freeze(model)
        model.train()
        return not torch.equal(features(model, images()), features(model, images()))

    assert random(no_gradients)
    assert random(eval_mode)
    assert not random(kit)


def mul_add(average: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    return average.mul(0.999).add_(new, alpha=0.001)


def test_18_an_average_drifts_from_a_constant() -> None:
    def largest_drift(freeze: Freezing, average: type[swa_utils.AveragedModel]) -> float:
        model = nn.Sequential(OrderedDict(body=nn.Linear(64, 64), fc=nn.Linear(64, 2)))
        zoo.scramble(model)
        freeze(model)
        averaged = average(model, avg_fn=mul_add)
        for _ in range(2000):
            averaged.update_parameters(model)
        return float(((averaged.module.body.weight - model.body.weight) / model.body.weight).abs().max())

    assert largest_drift(no_gradients, swa_utils.AveragedModel) > 1e-6
    assert largest_drift(kit, swa_utils.AveragedModel) > 1e-6
    assert largest_drift(kit, freezekit.AveragedModel) == 0
    assert largest_drift(no_gradients, freezekit.AveragedModel) == 0


class Router(nn.Module):
    """A mixture of experts balanced by a bias that follows the load, without a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.register_buffer("bias", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        if self.training:
            load = torch.bincount((scores + self.bias).argmax(-1).flatten(), minlength=4).float()
            self.bias += 0.1 * (load.mean() - load).sign()
        return scores.softmax(-1)


def codebook() -> nn.Module:
    vq = pytest.importorskip("vector_quantize_pytorch")

    class Quantize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vq = vq.VectorQuantize(dim=4, codebook_size=8)

        def forward(self, x: Tensor) -> Tensor:
            return self.vq(x)[0]

    return Quantize()


MOVING = {
    "codebook": codebook,
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "parametrized spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "router": Router,
    "instance norm": lambda: nn.InstanceNorm1d(4, track_running_stats=True),
    "observer": lambda: torch.ao.quantization.MovingAverageMinMaxObserver(),
    "fake quantization": lambda: torch.ao.quantization.FakeQuantize(),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max to specify the range:UserWarning")
@pytest.mark.parametrize("kind", list(MOVING))
def test_19_other_state_moves_too(kind: str) -> None:
    def moved(freeze: Freezing) -> bool:
        torch.manual_seed(0)
        model = nn.Sequential(OrderedDict(body=MOVING[kind](), fc=nn.Linear(4, 4)))
        x = torch.randn(5, 4, 4)
        with torch.no_grad():
            model.eval()(x)  # observers take their shapes from what they see first
        freeze(model)
        before = backbone(model)
        model.train()
        if freeze is eval_mode:  # those who do it again after every train()
            model.body.eval()
        model(x * 3 + 2).sum().backward()
        return backbone(model) != before

    assert moved(no_gradients)
    assert moved(eval_mode) == (kind in ("observer", "fake quantization"))
    assert not moved(kit)


class NormEval(nn.Sequential):
    """Keeps its BN in eval mode by a train() of its own."""

    def train(self, mode: bool = True) -> NormEval:
        super().train(mode)
        self.bn.eval()
        return self


def norm_eval(model: nn.Module) -> None:
    no_gradients(model)
    model.__class__ = NormEval
    model.train()


def test_20_assigning_training_bypasses_train() -> None:
    def moved(freeze: Freezing) -> bool:
        model = small()
        freeze(model)
        before = backbone(model)
        model.train()
        model(images())
        assert backbone(model) == before
        for module in model.modules():
            module.training = True
        model(images())
        return backbone(model) != before

    assert moved(norm_eval)
    assert not moved(kit)


def replaced_train(model: nn.Module) -> None:
    no_gradients(model)
    bn = model.get_submodule("bn").eval()
    bn.train = lambda mode=True: bn  # type: ignore[assignment,method-assign]


def test_20_a_replaced_train_breaks_pickles_and_copies() -> None:
    def whole(freeze: Freezing) -> tuple[bool, bool]:
        model = small()
        freeze(model)
        try:
            pickled = not pickle.loads(pickle.dumps(model)).train().bn.training
        except (pickle.PicklingError, AttributeError):
            pickled = False
        twin = copy.deepcopy(model)
        return pickled, twin.bn.train() is twin.bn

    assert whole(replaced_train) == (False, False)  # the copy's function still answers for the original
    assert whole(kit) == (True, True)

"""fastai's callbacks in real learners, beside fastai's own ways to freeze."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from freezekit import DriftError, FreezekitError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fastai's own, of torch.jit.script and of pandas' options
    from fastai.basics import SGD, DataLoaders, Learner, OptimWrapper, params, ranger
    from fastai.callback.all import (
        BnFreeze,
        Callback,
        CancelFitException,
        GradientAccumulation,
        MixedPrecision,
        SaveModelCallback,
    )  # fmt: skip
    from fastai.callback.tensorboard import TensorBoardCallback

    from freezekit.hooks.fastai import DriftAudit, FreezeBackbone

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")  # learn.load

BODY = [
    "0.0.weight",
    "0.0.bias",
    "0.1.weight",
    "0.1.bias",
    "0.4.weight",
    "0.4.bias",
    "0.5.weight",
    "0.5.bias",
]
HEAD = ["1.weight", "1.bias"]


def watched() -> bool:
    """Tell whether an auditor looks at who sets the mode of a BN layer."""
    return "__setattr__" in vars(nn.BatchNorm1d)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = [
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
    ]
    return zoo.scramble(nn.Sequential(nn.Sequential(*body), nn.Linear(8, 2)))  # type: ignore[return-value]


def split(model: Any) -> list[Any]:
    return [params(model[0][:4]), params(model[0][4:]), params(model[1])]


def learner(path: Path, *cbs: Any, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator)
    items = list(zip(x, (x[:, 0] > 0).long(), strict=True))
    loaders = DataLoaders.from_dsets(
        items, items, bs=8, shuffle=False, drop_last=False, num_workers=0, device="cpu"
    )
    options = {"splitter": split, "path": path, **options}
    made = Learner(loaders, net(), loss_func=nn.CrossEntropyLoss(), cbs=list(cbs), **options)
    made.remove_cb(made.progress)
    made.logger = lambda _: None
    return made


def moved(learn: Any, before: dict[str, torch.Tensor]) -> list[str]:
    return [
        name for name, tensor in learn.model.state_dict().items() if not torch.equal(tensor, before[name])
    ]


def state_of(learn: Any) -> dict[str, torch.Tensor]:
    return copy.deepcopy(learn.model.state_dict())


def torch_sgd(parameters: Any, **options: Any) -> Any:
    return OptimWrapper(parameters, torch.optim.SGD, **options)


class Bf16(MixedPrecision):  # type: ignore[misc]
    """fastai's is for CUDA alone."""

    def before_fit(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().before_fit()
        self.autocast = torch.autocast("cpu", torch.bfloat16)

    def after_pred(self) -> None:
        assert self.learn.pred.dtype == torch.bfloat16
        super().after_pred()


@pytest.mark.parametrize(
    ("cbs", "options", "steps"),
    [
        ([], {}, 8),
        ([], {"opt_func": torch_sgd}, 8),
        ([], {"opt_func": ranger}, 8),
        ([lambda: GradientAccumulation(16)], {}, 4),
        ([lambda: GradientAccumulation(16)], {"opt_func": torch_sgd}, 4),
        ([lambda: Bf16(amp_mode="bf16")], {}, 8),
    ],
)
def test_nothing_frozen_moves(tmp_path: Path, cbs: list[Any], options: dict[str, Any], steps: int) -> None:
    learn = learner(tmp_path, DriftAudit(watch="all"), FreezeBackbone(), *(make() for make in cbs), **options)
    before = state_of(learn)
    learn.fit_one_cycle(2, slice(1e-3, 1e-2))
    assert moved(learn, before) == HEAD
    report = learn.drift_audit.report
    assert report.clean
    assert report.source == f"Sequential after {steps} steps"
    assert learn.recorder.metric_names == ["epoch", "train_loss", "valid_loss", "frozen_changed", "time"]
    assert [row[2] for row in learn.recorder.values] == [0, 0]
    assert list(learn.metrics) == []
    assert len(learn.validate()) == 1
    assert not watched()


def test_fine_tune_freezes_at_first_and_trains_all_of_it_then(tmp_path: Path) -> None:
    frozen: list[Any] = []

    class Look(Callback):  # type: ignore[misc]
        def after_epoch(self) -> None:
            frozen.append((state_of(self.learn), len(self.learn.freeze_backbone.handle.frozen)))

    learn = learner(tmp_path, FreezeBackbone(), DriftAudit(watch="all"), Look())
    before = state_of(learn)
    learn.fine_tune(1)
    assert [count for _, count in frozen] == [14, 0]
    assert [name for name in before if not torch.equal(frozen[0][0][name], before[name])] == HEAD
    # a bias before a BN layer has no gradient to speak of
    assert set(moved(learn, frozen[0][0])) > {name for name in BODY if "bias" not in name} | {
        "0.1.running_mean"
    }


@pytest.mark.parametrize("train_bn", [True, False])
def test_learn_freeze_lets_bn_move(tmp_path: Path, train_bn: bool) -> None:
    """With ``train_bn`` it says so; without, statistics move all the same."""
    learn = learner(tmp_path, DriftAudit(on_drift="record", frozen="0"), train_bn=train_bn)
    before = state_of(learn)
    learn.freeze()
    learn.fit(1)
    stats = {
        f"0.{k}.{name}" for k in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    trained = {name for name in BODY if name[:3] in ("0.1", "0.5")} if train_bn else set()
    assert set(moved(learn, before)) == stats | trained | set(HEAD)
    report = learn.drift_audit.report
    found = {f.name: f.cause.kind for f in report.findings if f.code == "FK101"}
    assert found == {"0.1": "train-mode forward", "0.5": "train-mode forward"}
    assert [row[2] for row in learn.recorder.values] == [len(stats | trained)]


def test_learn_freeze_after_training_decays_the_weights(tmp_path: Path) -> None:
    """fastai's zero_grad leaves zeros, and its optimizers decay whatever has a gradient."""
    learn = learner(tmp_path, train_bn=False)
    learn.fit(1)
    learn.freeze()
    before = state_of(learn)
    learn.fit(1, 1e-2, cbs=DriftAudit(on_drift="record"))
    assert {"0.0.weight", "0.4.weight"} < set(moved(learn, before))
    assert not hasattr(learn, "drift_audit")
    learn = learner(tmp_path, FreezeBackbone(), DriftAudit())
    with learn.removed_cbs([learn.freeze_backbone, learn.drift_audit]):
        learn.fit(1)
    before = state_of(learn)
    learn.fit(1, 1e-2)
    assert moved(learn, before) == HEAD


def test_bn_freeze_is_undone_within_the_epoch(tmp_path: Path) -> None:
    class Train(Callback):  # type: ignore[misc]
        def after_batch(self) -> None:
            self.learn.model.train(self.learn.training)

    naive = learner(tmp_path, BnFreeze(), Train(), DriftAudit(), train_bn=False)
    naive.freeze()
    with pytest.raises(
        DriftError, match=r"(?s)DriftAudit.*FK101 0\.1 at step 2: .*cause: train-mode forward"
    ):
        naive.fit(1)
    assert not watched()
    right = learner(tmp_path, FreezeBackbone(), Train(), DriftAudit())
    before = state_of(right)
    right.fit(1)
    assert moved(right, before) == HEAD


def test_drift_goes_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardCallback(tmp_path / "runs", trace_model=False, log_preds=False)
    learn = learner(tmp_path, DriftAudit(on_drift="record"), board, train_bn=False)
    learn.freeze()
    learn.fit(2)
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    layers = {f"freezekit/0.{k}/{value}" for k in (1, 5) for value in ("mean_shift_sigma", "var_ratio")}
    assert {tag for tag in tags if tag.startswith("freezekit/")} == {"freezekit/changed", *layers}
    assert [event.value for event in events.Scalars("frozen_changed")] == [6.0, 6.0]


STAGES = {1: "0.4", 2: ["0.0", "0.1"]}


@pytest.mark.parametrize("opt_func", [SGD, torch_sgd])
@pytest.mark.parametrize("at", [1, 2])
def test_a_resumed_run_ends_as_the_whole_one(tmp_path: Path, opt_func: Any, at: int) -> None:
    def setup() -> Any:
        return learner(tmp_path, FreezeBackbone(unfreeze=STAGES), DriftAudit(watch="all"), opt_func=opt_func)

    class Keep(Callback):  # type: ignore[misc]
        def after_epoch(self) -> None:
            if self.learn.epoch == at - 1:
                self.learn.save("checkpoint")
                torch.save(self.learn.freeze_backbone.state_dict(), tmp_path / "freeze.pth")

    learn = setup()
    learn.fit(3, 1e-2, cbs=Keep())
    assert [n for n, p in learn.model.named_parameters() if not p.requires_grad] == BODY[6:]
    assert learn.drift_audit.report.clean
    again = setup()
    again.load("checkpoint")
    again.freeze_backbone.load_state_dict(torch.load(tmp_path / "freeze.pth", weights_only=True))
    again.fit(3, 1e-2, start_epoch=at)
    assert moved(again, state_of(learn)) == []
    assert again.drift_audit.report.clean


def test_a_resume_with_values_that_had_drifted_is_refused(tmp_path: Path) -> None:
    learn = learner(tmp_path, FreezeBackbone(unfreeze=STAGES))
    learn.fit(1)
    again = learner(tmp_path, FreezeBackbone(unfreeze=STAGES))
    again.freeze_backbone.load_state_dict(learn.freeze_backbone.state_dict())
    again.model[0][1].running_mean += 1
    with pytest.raises(FreezekitError, match=r"other values in the model.*0\.1\.running_mean"):
        again.fit(2, start_epoch=1)


def test_groups_are_unfrozen_by_fastais_own_verbs_and_not_by_a_search_for_a_rate(tmp_path: Path) -> None:
    learn = learner(tmp_path, FreezeBackbone(unfreeze={1: "0.0"}))
    learn.lr_find(num_it=10, show_plot=False, suggest_funcs=None)
    handle = learn.freeze_backbone.handle
    assert len(handle.frozen) == 14
    learn.freeze_to(-2)
    learn.fit(1)
    assert {name[:3] for name in handle.frozen} == {"0.0", "0.1"}
    assert type(learn.model[0][5]) is nn.BatchNorm1d
    learn.freeze()  # and BN of what is frozen here does not train by it
    learn.fit(1)
    assert {name[:3] for name in handle.frozen} == {"0.0", "0.1"}
    learn.unfreeze()
    learn.fit(1)
    assert handle.frozen == []
    assert type(learn.model[0][3]) is nn.Dropout


def test_an_optimizer_without_what_is_frozen_says_what_to_do(tmp_path: Path) -> None:
    learn = learner(tmp_path, FreezeBackbone(unfreeze={1: "0.4"}), splitter=lambda model: params(model[1]))
    with pytest.raises(
        FreezekitError, match=r"takes no parameters later.*make the optimizer of model\.parameters\(\)"
    ):
        learn.fit(1)


def test_a_validation_before_the_fit_changes_nothing_of_it(tmp_path: Path) -> None:
    learn = learner(tmp_path, FreezeBackbone(unfreeze={1: "0.4"}), DriftAudit())
    assert len(learn.validate()) == 1
    assert learn.get_preds()[0].shape == (32, 2)
    learn.fit(2)
    assert learn.drift_audit.report.clean
    assert learn.model[0][4].weight.requires_grad


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt("no")])
@pytest.mark.parametrize("given", ["learner", "fit"])
def test_an_error_leaves_no_hook_behind(tmp_path: Path, error: BaseException, given: str) -> None:
    class Fail(Callback):  # type: ignore[misc]
        def after_loss(self) -> None:
            if self.learn.iter == 2:
                assert watched()
                raise error

    audit = DriftAudit(on_drift="record")
    learn = learner(tmp_path, Fail(), *([audit] if given == "learner" else []), train_bn=False)
    learn.freeze()
    with pytest.raises(type(error)):
        learn.fit(1, cbs=[audit] if given == "fit" else None)
    assert not watched()
    assert audit.auditor is None
    assert len(audit.report.findings) == 2
    assert list(learn.metrics) == []


def test_a_cancelled_fit_is_audited_to_its_end(tmp_path: Path) -> None:
    class Cancel(Callback):  # type: ignore[misc]
        def after_batch(self) -> None:
            self.learn.model[0][0].weight.data += 1
            raise CancelFitException

    learn = learner(tmp_path, FreezeBackbone(), Cancel(), DriftAudit())
    with pytest.raises(DriftError, match=r"FK103 0\.0\.weight"):
        learn.fit(1)
    assert not watched()


def test_the_best_model_is_saved_loaded_and_pickled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn = learner(tmp_path, FreezeBackbone(), DriftAudit(), SaveModelCallback(with_opt=True))
    before = state_of(learn)
    learn.fit(2)
    assert "Better model found" in capsys.readouterr().out
    assert moved(learn, before) == HEAD
    learn.dls = None
    learn.loss_func, learn.logger, learn.splitter = None, print, None
    again = pickle.loads(pickle.dumps(learn))
    assert again.drift_audit.report.clean
    assert len(again.freeze_backbone.handle.frozen) == 14


def test_without_fastai_the_error_has_the_command() -> None:
    code = "import sys; sys.modules['fastai'] = None; import freezekit.hooks.fastai"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "FreezekitError: freezekit.hooks.fastai: fastai cannot be imported" in done.stderr
    assert done.stderr.rstrip().endswith("Remedy: pip install 'freezekit[fastai]'")


def test_to_be_taken_from_no_learner_is_no_error(tmp_path: Path) -> None:
    audit = DriftAudit()
    learn = learner(tmp_path, audit)
    learn.remove_cb(audit)
    learn.remove_cb(audit)
    assert audit.learn is None

"""The pytest plug-in, by test suites that use it: each is run, and what it says is compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from freezekit import DriftAuditor, DriftError, FreezekitError, SelectionError
from freezekit.hooks.pytest import NotFrozenError, assert_frozen

pytest_plugins = ["pytester"]

STEPS = """
import torch
from torch import nn

import freezekit


class Net(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 4), *layers)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


def naive(*layers):
    model = Net(*layers or [nn.BatchNorm1d(4)])
    model.backbone.requires_grad_(False)
    return model, torch.optim.SGD(model.head.parameters(), lr=0.1)


def right(*layers):
    model, optimizer = naive(*layers)
    freezekit.freeze_backbone(model)
    return model, optimizer


def train_step(model, optimizer):
    model.train()
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
"""
SINCE = 1 + STEPS.strip().split("\n").index("    model.train()")  # the line that is to blame

HEAD = """
import pytest, torch
from torch import nn
from freezekit.hooks.pytest import assert_frozen
from steps import *
"""

FORMS = {
    "block": """
def test_it():
    model, optimizer = {model}
    with assert_frozen(model{more}):
        {step}
""",
    "fixture": """
def test_it(frozen):
    model, optimizer = {model}
    frozen(model{more})
    {step}
""",
}


class Suite:
    """Runs the tests of a user's."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        pytester.makepyfile(steps=STEPS)

    def run(self, tests: str, *options: str, **outcomes: int) -> pytest.RunResult:
        self.pytester.makepyfile(test_suite=HEAD + tests)
        before = touched()
        plugins = "-p", "freezekit.hooks.pytest", "-p", "no:cacheprovider"
        result = self.pytester.runpytest_inprocess(*plugins, *(options or ("-W", "error")))
        for name in "steps", "test_suite":
            sys.modules.pop(name, None)
        assert touched() == before, "something of torch's stayed wrapped"
        result.assert_outcomes(**outcomes)
        return result


def touched() -> list[Any]:
    """What an auditor wraps while it is attached."""
    kinds = nn.Module, nn.BatchNorm1d, nn.Linear, nn.Dropout
    hooks = torch_optimizer._global_optimizer_post_hooks, nn.modules.module._global_forward_pre_hooks
    return [*(dict(vars(kind)) for kind in kinds), *map(len, hooks)]


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # ours as given, whether it is installed or not
    for name in "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "CI", "BUILD_NUMBER":
        monkeypatch.delenv(name, raising=False)  # with CI set, pytest prints the text of a failure twice
    # what torch imports late must stay, as it cannot be imported twice
    monkeypatch.setattr("_pytest.pytester.SysModulesSnapshot.restore", lambda self: None)
    return Suite(pytester)


form = pytest.mark.parametrize("form", FORMS)


def guarded(form: str, model: str, step: str = "train_step(model, optimizer)", more: str = "") -> str:
    """A test that guards a step, as a block or with the fixture."""
    return FORMS[form].format(model=model, step=step, more=more)


def text_of(result: pytest.RunResult) -> str:
    """What a run printed, without what marks the lines of an exception."""
    lines = (line.removeprefix("E       ").rstrip() for line in result.outlines)
    return "\n".join(line.removeprefix("freezekit.hooks.pytest.NotFrozenError: ") for line in lines)


@form
@pytest.mark.parametrize("layers", ["nn.BatchNorm1d(4), nn.Dropout()", "nn.LayerNorm(4)", "nn.ReLU()"])
def test_what_is_frozen_right_passes(suite: Suite, form: str, layers: str) -> None:
    suite.run(guarded(form, f"right({layers})"), passed=1)


@form
def test_requires_grad_alone_fails_and_is_explained(suite: Suite, form: str) -> None:
    result = suite.run(guarded(form, "naive()"), failed=1)
    said = text_of(result)
    assert (
        "Net did not stay frozen (FK101, FK201)\nDRIFT: 3 of 7 frozen tensors changed, 1 of 1 layer " in said
    )
    assert (
        f"    backbone.1: in train mode since steps.py:{SINCE} in train_step\n    fix: requires_grad=" in said
    )
    assert "\nFK101 running statistics moved\n  backbone.1 since step 1: running mean moved by up to " in said
    assert "\nFK201 the output depends on what else is in the batch\n  backbone.1 since step 1: " in said
    assert "freezekit.freeze_backbone(model)" in said
    # and nothing of how it was found out
    assert "hooks/pytest.py" not in said
    assert "contextlib" not in said
    assert "site-packages" not in said
    assert (">       with assert_frozen(model):" in said) == (form == "block")


@form
@pytest.mark.parametrize(
    ("made", "cause"),
    [("momentum=0.9", "momentum"), ("weight_decay=0.1", "weight decay")],
)
def test_the_optimizer_moves_what_is_frozen(suite: Suite, form: str, made: str, cause: str) -> None:
    tests = f"""
def model_and_optimizer():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, {made})
    train_step(model, optimizer)
    optimizer.zero_grad(set_to_none=False)
    model.backbone.requires_grad_(False)
    return model, optimizer

def step(model, optimizer):
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()

{guarded(form, "model_and_optimizer()", "step(model, optimizer)")}
"""
    said = text_of(suite.run(tests, failed=1))
    assert "Net did not stay frozen (FK103)\nDRIFT: 2 of 2 frozen tensors changed\n" in said
    assert f"\n  {cause}: 2 tensors since step 1\n    backbone.0.weight: " in said
    assert (
        "\nFK103 a frozen parameter changed (2)\n  backbone.0.weight since step 1: parameter changed: "
        in said
    )
    assert "freezekit.freeze_backbone(model, optimizer=optimizer)" in said
    # frozen with the optimizer, the same step moves nothing
    right = tests.replace(
        "model.backbone.requires_grad_(False)", "freezekit.freeze_backbone(model, optimizer=optimizer)"
    )
    suite.run(right, passed=1)


@form
def test_dropout_that_is_on_fails_unless_it_is_wanted(suite: Suite, form: str) -> None:
    said = text_of(suite.run(guarded(form, "naive(nn.Dropout())"), failed=1))
    assert "Net did not stay frozen (FK202)\nNet after 1 step against its state" in said
    assert "\nFK202 dropout is active in the frozen part\n  backbone.1 since step 1: " in said
    assert "CLEAN" not in said
    suite.run(guarded(form, "naive(nn.Dropout())", more=", probe=None"), passed=1)
    suite.run(guarded(form, "right(nn.Dropout())"), passed=1)


@form
def test_a_norm_that_takes_its_statistics_from_the_batch(suite: Suite, form: str) -> None:
    model = "naive(nn.BatchNorm1d(4, track_running_stats=False))"
    said = text_of(suite.run(guarded(form, model), failed=1))
    assert "Net did not stay frozen (FK201)\nBAD: 1 finding; none of 4 frozen tensors changed\n" in said
    assert "\n  fix: it has no running statistics to go by: " in said
    suite.run(guarded(form, model, more=", probe=None"), passed=1)  # no comparison of state can tell


@form
def test_a_step_must_be_made(suite: Suite, form: str) -> None:
    said = text_of(suite.run(guarded(form, "right()", "model.train()(torch.ones(8, 4))"), failed=1))
    assert (
        "Net: no optimizer step was seen, so nothing was guarded. Remedy: train while it is guarded; give "
        "optimizer= if that has no parameter of the model\n"
    ) in said
    assert "hooks/pytest.py" not in said
    # what moved without a step is the better news
    said = text_of(suite.run(guarded(form, "naive()", "model.train()(torch.ones(8, 4))"), failed=1))
    assert "Net did not stay frozen (FK101)\n" in said
    assert "no optimizer step" not in said


@form
def test_a_model_whose_parameters_the_optimizer_has_not(suite: Suite, form: str) -> None:
    steps = "train_step(model, optimizer)"
    apart = "(lambda m, o: (m.backbone, (m, o)))(*right())"
    step = "train_step(*optimizer)"
    assert "Sequential: no optimizer step was seen" in text_of(
        suite.run(guarded(form, apart, step), failed=1)
    )
    suite.run(guarded(form, apart, step, ", optimizer=optimizer[1]"), passed=1)
    apart = apart.replace("right", "naive")
    said = text_of(suite.run(guarded(form, apart, step, ", optimizer=optimizer[1]"), failed=1))
    assert "Sequential did not stay frozen (FK101, FK201)\n" in said
    assert steps not in apart


@form
@pytest.mark.parametrize(
    ("model", "more", "expected"),
    [
        ("(Net(), None)", "", "FreezekitError: model: nothing in the model is frozen: every "),
        ("naive()", ", frozen='bakcbone'", "SelectionError: frozen=: no layer or tensor matches"),
        ("naive()", ", probe=0", "FreezekitError: probe=: not a number of steps (got 0)"),
    ],
)  # fmt: skip
def test_what_cannot_be_guarded_is_told_at_the_users_line(
    suite: Suite, form: str, model: str, more: str, expected: str
) -> None:
    said = text_of(suite.run(guarded(form, model, more=more), failed=1))
    assert f"freezekit.errors.{expected}" in said
    assert "site-packages" not in said
    assert "freezekit/" not in said
    assert f"frozen(model{more})" in said


def test_names_say_what_is_frozen(suite: Suite) -> None:
    model = "(lambda m: (m, torch.optim.SGD(m.head.parameters(), lr=0.1)))(Net(nn.BatchNorm1d(4)))"
    suite.run(guarded("block", model, more=", frozen='backbone.0'"), passed=1)
    said = text_of(suite.run(guarded("block", model, more=", frozen='backbone'"), failed=1))
    assert "Net did not stay frozen (FK101, FK201)\n" in said


@form
def test_a_test_that_fails_by_itself_keeps_its_own_failure(suite: Suite, form: str) -> None:
    step = "train_step(model, optimizer); assert model.head.bias is None, 'mine'"
    result = suite.run(guarded(form, "naive()", step), failed=1)
    said = text_of(result)
    assert "AssertionError: mine" in said
    assert "FK101" not in said
    said = text_of(suite.run(guarded(form, "right()", "raise ValueError('mine')"), failed=1))
    assert "ValueError: mine" in said
    assert "no optimizer step" not in said


@form
def test_skipped_and_expected_failures_are_what_they_were(suite: Suite, form: str) -> None:
    suite.run(guarded(form, "naive()", "train_step(model, optimizer); pytest.skip()"), skipped=1)
    suite.run(guarded(form, "naive()", "train_step(model, optimizer); pytest.xfail()"), xfailed=1)
    suite.run(f"@pytest.mark.xfail(strict=True)\n{guarded(form, 'naive()')}", xfailed=1)


def test_several_models(suite: Suite) -> None:
    said = text_of(
        suite.run(
            """
class Teacher(Net):
    pass

def test_both(frozen):
    model, optimizer = naive()
    teacher = Teacher(nn.BatchNorm1d(4)).requires_grad_(False)
    frozen(model)
    frozen(teacher, optimizer)
    teacher.train()(torch.randn(8, 4))
    train_step(model, optimizer)
""",
            failed=1,
        )
    )
    assert "Net did not stay frozen (FK101, FK201)\n" in said
    assert "\n\nTeacher did not stay frozen (FK101, FK201)\n" in said


def test_the_auditor_is_at_hand(suite: Suite) -> None:
    suite.run(
        """
def test_fixture(frozen):
    model, optimizer = right()
    auditor = frozen(model)
    for step in range(3):
        train_step(model, optimizer)
        assert auditor.report().clean
    assert auditor.step == 3

def test_block():
    model, optimizer = right()
    with assert_frozen(model) as auditor:
        train_step(model, optimizer)
    assert auditor.step == 1
""",
        passed=2,
    )


def test_a_guard_that_is_never_put_up(suite: Suite) -> None:
    said = text_of(suite.run("def test_it(frozen):\n    pass\n", failed=1))
    assert "\nfrozen was not called, so nothing was guarded. Remedy: frozen(model)\n" in said
    tests = "def test_it():\n    model, optimizer = naive()\n    assert_frozen(model)\n"
    said = text_of(suite.run(tests, "-W", "default", passed=1, warnings=1))
    line = 1 + (HEAD + tests).strip().count("\n")
    assert f"test_suite.py:{line}: RuntimeWarning: guards nothing; use: with assert_frozen(model):\n" in said


def test_classes_and_fixtures_of_the_users(suite: Suite) -> None:
    suite.run(
        """
import unittest

class TestSteps:
    @pytest.fixture
    def guarded(self, frozen):
        model, optimizer = naive()
        frozen(model)
        return model, optimizer

    @pytest.mark.parametrize("steps", [1, 2])
    def test_naive(self, guarded, steps):
        for step in range(steps):
            train_step(*guarded)

    def test_right(self, frozen):
        model, optimizer = right()
        frozen(model)
        train_step(model, optimizer)

class Case(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _fixtures(self, frozen):
        self.frozen = frozen

    def step(self, model, optimizer):
        self.frozen(model)
        train_step(model, optimizer)

    def test_naive(self):
        self.step(*naive())

    def test_right(self):
        self.step(*right())

    def test_block(self):
        with self.assertRaises(AssertionError), assert_frozen((made := naive())[0]):
            train_step(*made)
        self.step(*right())

    def test_fails(self):
        self.step(*naive())
        self.fail("mine")
""",
        failed=4,
        passed=3,
    )


def test_another_fixture_that_fails_leaves_nothing_behind(suite: Suite) -> None:
    tests = """
@pytest.fixture
def broken(frozen):
    frozen(naive()[0])
    raise ValueError("mine")

def test_it(broken):
    pass
"""
    assert "ValueError: mine" in text_of(suite.run(tests, errors=1))


@form
def test_nan_in_what_is_frozen_is_no_drift(suite: Suite, form: str) -> None:
    tests = f"""
def with_nan():
    model, optimizer = right()
    with torch.no_grad():
        model.backbone[0].bias[1] = float("nan")
        model.backbone[1].running_mean[2] = float("nan")
    return model, optimizer

{guarded(form, "with_nan()")}
"""
    suite.run(tests, passed=1)
    other = 'step(model, optimizer); model.backbone[1].running_mean[3] = float("nan")'
    said = text_of(suite.run(tests.replace("step(model, optimizer)", other, 1), failed=1))
    assert "Net did not stay frozen (FK101" in said


@form
def test_lightning(suite: Suite, form: str) -> None:
    tests = f"""
import lightning

class Module(lightning.LightningModule):
    def __init__(self, made):
        super().__init__()
        self.net, self.optimizer = made

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return self.optimizer

def fit(module):
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=8))

{guarded(form, "(Module(right()), None)", "fit(model)")}
"""
    suite.run(tests, "-W", "ignore", passed=1)
    said = text_of(suite.run(tests.replace("right()", "naive()"), "-W", "ignore", failed=1))
    assert "Module did not stay frozen (FK101, FK201)\n" in said
    assert "Module after 2 steps against its state" in said


def test_under_xdist(suite: Suite) -> None:
    tests = "".join(
        guarded(form, f"{how}()").replace("test_it", f"test_{form}_{how}")
        for form in FORMS
        for how in ("naive", "right")
    )
    suite.pytester.makepyfile(test_suite=HEAD + tests)
    result = suite.pytester.runpytest_subprocess(
        "-p", "xdist.plugin", "-p", "freezekit.hooks.pytest", "-n", "2"
    )
    result.assert_outcomes(failed=2, passed=2)
    assert text_of(result).count("Net did not stay frozen (FK101, FK201)\nDRIFT: 3 of 7 ") == 2


def test_suites_without_torch_do_not_pay(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import sys\ndef test_it():\n    assert not {'torch', 'numpy', 'rich'} & set(sys.modules)\n"
    )
    pytester.runpytest_subprocess("-p", "no:freezekit", "-p", "freezekit.hooks.pytest").assert_outcomes(
        passed=1
    )


def test_without_running_pytest(tmp_path: Path) -> None:
    """As a function among others, in a script or with another runner."""
    script = """
from steps import *
from freezekit.hooks.pytest import assert_frozen

model, optimizer = right()
with assert_frozen(model):
    train_step(model, optimizer)
model, optimizer = naive()
try:
    with assert_frozen(model):
        train_step(model, optimizer)
except AssertionError as error:
    print(error)
"""
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "Net did not stay frozen (FK101, FK201)\nDRIFT: 3 of 7 frozen tensors changed"
    )


def test_errors_are_those_of_freezekit() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with pytest.raises(FreezekitError, match="nothing in the model is frozen"):
        assert_frozen(model)
    model[0].requires_grad_(False)
    with pytest.raises(SelectionError, match="no layer or tensor matches"):
        assert_frozen(model, frozen="bn")
    with (
        pytest.raises(FreezekitError, match="^Sequential: no optimizer step was seen") as none,
        assert_frozen(model),
    ):
        pass
    # what expects an assertion to fail is not content with a test of nothing
    assert not isinstance(none.value, AssertionError)
    with pytest.raises(AssertionError, match="FK101") as moved, assert_frozen(model, optimizer) as auditor:
        model(torch.randn(4, 2)).sum().backward()
        optimizer.step()
    assert isinstance(moved.value, NotFrozenError)
    assert isinstance(moved.value, DriftError)
    assert isinstance(auditor, DriftAuditor)
    assert [finding.code for finding in moved.value.report.findings] == ["FK101", "FK201"]

"""fastai's callbacks: its events translated to the plain loop's hooks."""

from __future__ import annotations

import warnings
from functools import partial
from importlib import import_module
from typing import Any

from freezekit.hooks import loop

with loop.needs("fastai"), warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of torch.jit.script, which fastai uses
    _fastai: Any = import_module("fastai.learner")

__all__ = ["DriftAudit", "FreezeBackbone"]
_COLUMN = "frozen_changed"


class FreezeBackbone(loop.FreezeBackbone, _fastai.Callback):  # type: ignore[misc]
    """Freeze a learner's backbone, and unfreeze parts of it as the epochs of a fit go.

    Takes what :class:`freezekit.hooks.loop.FreezeBackbone` does, in the place of ``learn.freeze()``. The
    optimizer keeps all parameters, in the groups of the ``splitter``. ``learn.unfreeze()`` and ``freeze_to``
    unfreeze what is frozen here too, so does ``fine_tune`` after its frozen epochs. To resume: ``learn.load``
    and ``fit(n, start_epoch=k)``; the values are checked if :meth:`state_dict` was saved, and is loaded.

    >>> hook = FreezeBackbone(unfreeze={1: "0.*"})
    >>> hook.name, hook.handle  # a learner has it as learn.freeze_backbone
    ('freeze_backbone', None)

    Source: fastai documentation, Callback, Learner.freeze_to and Optimizer.
    """

    order = -20  # before what wraps the model

    def before_fit(self) -> None:
        """Freeze, or let go of what fastai has unfrozen since."""
        learn, model = self.learn, self.learn.model
        if learn.opt is None:
            learn.create_opt()  # while it gets all parameters
        if learn.opt.frozen_idx and (self.handle is None or self.handle.model is not model):
            learn.opt.freeze_to(0)  # or what is unfrozen later would come back as that left it
        self.freeze(model)
        # learn.freeze() lets BN train
        self.follow(but=[p for group in learn.opt.param_lists[: learn.opt.frozen_idx] for p in group])

    def before_train(self) -> None:
        """Take up the optimizer at the fit's first epoch, and unfreeze what is due."""
        if self.learn.train_iter == 0:
            self.start(self.learn.opt, self.learn.model)
        if not hasattr(self.learn, "lr_finder"):
            self.start_epoch(self.learn.epoch)


class DriftAudit(loop.DriftAudit, _fastai.Callback):  # type: ignore[misc]
    """Audit a learner's fits; the progress table gets a column ``frozen_changed``.

    Takes what :class:`freezekit.hooks.loop.DriftAudit` does. How far each layer moved goes to fastai's
    ``TensorBoardCallback`` if there is one. The last fit's report is ``learn.drift_audit.report``.
    """

    order = 45  # before the Recorder takes the names of the columns

    @property
    def learn(self) -> Any:
        """The learner; to be taken from it ends the audit, and so does an error in its ``fit``."""
        return self.__dict__.get("_learn")

    @learn.setter
    def learn(self, learn: Any) -> None:
        if learn is None and self.learn is not None:
            self._end()
        elif learn is not None:
            learn.fit = partial(_fit, learn)  # after an error fastai calls no callback
        self.__dict__["_learn"] = learn

    def before_fit(self) -> None:
        """Add the column, unless this is a validation, which shows no bars."""
        if self.learn.create_mbar:
            value = _fastai.ValueMetric(lambda: int(self.scalars().get("freezekit/changed", 0)), _COLUMN)
            self.learn.metrics = [*self.learn.metrics, value]

    def before_train(self) -> None:
        """Watch from a fit's first epoch on; later take note of what was unfrozen."""
        first = self.learn.train_iter == 0
        self.start(self.learn.model, self.learn.opt) if first else self.start_epoch()

    after_step = loop.DriftAudit.stepped

    def after_epoch(self) -> None:
        """Give TensorBoard the scalars."""
        board: Any = getattr(self.learn, "tensor_board", None)
        for name, value in self.scalars().items() if board and board.run else ():
            board.writer.add_scalar(name, value, self.learn.train_iter)

    def after_fit(self) -> None:
        """Compare everything once more."""
        self.finish()
        self._end()

    def _end(self) -> None:
        self.stop()
        self.learn.metrics = [m for m in self.learn.metrics if m.name != _COLUMN]


def _fit(learn: Any, *args: Any, **kwargs: Any) -> None:
    """Fit, after which nothing is watched, whatever happened."""
    try:
        type(learn).fit(learn, *args, **kwargs)
    finally:
        for audit in learn._grab_cbs(DriftAudit):
            audit._end()

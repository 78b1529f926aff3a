"""Timelines: how each layer's statistics went in the course of a run, in bounded memory. No torch here."""

from __future__ import annotations

from itertools import pairwise

from freezekit.audit.findings import Moment

__all__ = ["MOST", "Timeline"]

MOST = 256
"""How many moments of a layer are kept."""


class Timeline:
    """Keeps moments of each layer as they are recorded, however long the run.

    All of them are kept until there are too many; then every other one is dropped, and from there on only
    moments at least as far apart as the rest are kept. The first and the last recorded are always there.

    Args:
        most: how many moments of a layer to keep, at least 3.

    >>> timeline = Timeline(most=8)
    >>> for step in range(1, 13):
    ...     timeline.record("bn1", Moment(step, 0.1 * step, 1.0, step))
    >>> [moment.step for moment in timeline.of("bn1")]
    [1, 3, 5, 7, 9, 11, 12]
    >>> timeline.due("bn1", 12), timeline.due("bn1", 13)
    (False, True)
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._moments: dict[str, list[Moment]] = {}
        self._strides: dict[str, int] = {}

    def due(self, layer: str, step: int) -> bool:
        """Tell whether a moment at this step would stay; another is kept only until the next one comes.

        Args:
            layer: the layer.
            step: the step at which it could be measured.
        """
        moments = self._moments.get(layer)
        if not moments:
            return True
        last = moments[-2 if self._passing(layer) else -1]
        return step - last.step >= self._strides[layer]

    def record(self, layer: str, moment: Moment) -> None:
        """Take a moment in.

        Args:
            layer: the layer it is of.
            moment: how the layer is now. Those of the same step and later go: they were measured again.
        """
        moments = self._moments.setdefault(layer, [])
        self._strides.setdefault(layer, 1)
        while moments and moments[-1].step >= moment.step:
            moments.pop()
        if moments and self._passing(layer):
            moments.pop()
        moments.append(moment)
        # one less than there is room for, which is for one that passes
        if len(moments) == self.most and not self._passing(layer):
            self._thin(layer)

    def _thin(self, layer: str) -> None:
        """Drop every other moment, but neither the first nor the last."""
        moments = self._moments[layer]
        last = moments[-1]
        del moments[1::2]
        # at least twice what it was; more where checks come less often than that
        self._strides[layer] = min(later.step - earlier.step for earlier, later in pairwise(moments))
        if moments[-1] is not last:
            moments.append(last)

    def of(self, layer: str) -> tuple[Moment, ...]:
        """Return what was kept of a layer, oldest first."""
        return tuple(self._moments.get(layer, ()))

    def _passing(self, layer: str) -> bool:
        """Tell whether the last moment is only there because nothing came after it."""
        moments = self._moments[layer]
        return len(moments) > 1 and moments[-1].step - moments[-2].step < self._strides[layer]

"""How a layer went from checkpoint to checkpoint, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Point", "course"]

#: where the last is no further than this times what was reached halfway, a layer is not under way any more
_FURTHER = 1.2


@dataclass(frozen=True)
class Point:
    """A layer, or a tensor, at one checkpoint.

    Args:
        step: of the checkpoint.
        moved: whether it differs from the base.
        mark: the same for two points if nothing moved in between.
        shift: how far the mean has moved, in standard deviations, where that is known.
        counter: ``num_batches_tracked``, likewise.
    """

    step: int
    moved: bool
    mark: object = None
    shift: float | None = None
    counter: int | None = None

    def differs(self, other: Point) -> bool:
        """Tell whether something moved between the two."""
        return self.moved != other.moved or (self.moved and self.mark != other.mark)

    def counted_less_than(self, other: Point) -> bool:
        """Tell whether the counter is behind the other's."""
        return None not in (self.counter, other.counter) and (self.counter or 0) < (other.counter or 0)


def course(points: Sequence[Point], unit: str) -> str:
    """Tell when it began, and how it went on: a jump, steady, stopped, back; and how fast.

    The speed is how much further the mean was at the last move than at the last checkpoint before it
    moved, by the steps in between; of the first checkpoint where it had moved by then.

    Args:
        points: one a checkpoint, in order; one at least has moved.
        unit: what their steps count.

    >>> steady = [Point(500 * k, k > 1, k, max(0, k - 1) * 0.1) for k in range(5)]
    >>> course(steady, "step")
    'moved first between step 500 and step 1,000; steady since, about 0.2 sigma per 1,000 steps'
    >>> course([Point(1, False), Point(2, True, 7), Point(3, True, 7)], "epoch")
    'moved between epoch 1 and epoch 2, and not since: a jump, as loading or calibrating makes'
    """
    first = next(k for k, point in enumerate(points) if point.moved)
    last = len(points) - 1
    since = f"between {_at(points, first - 1, unit)} and {_at(points, first, unit)}"
    since = since if first else f"by {_at(points, 0, unit)}, the first checkpoint"
    changes = [k for k in range(first + 1, last + 1) if points[k - 1].differs(points[k])]
    if not points[last].moved:
        back = next(k for k in range(last, first, -1) if points[k - 1].moved)
        return f"moved first {since}; as it was again at {_at(points, back, unit)}"
    known = all(point.mark is not None for point in points if point.moved)
    if known and last > first and not changes:
        return f"moved {since}, and not since: a jump, as loading or calibrating makes"
    told = [f"moved first {since}"]
    fallen = [k for k in range(max(first, 1), last + 1) if points[k].counted_less_than(points[k - 1])]
    end = fallen[0] - 1 if fallen else last
    changes = [k for k in changes if k <= end]
    if known and changes:
        told.append(_pace(points[: end + 1], first, changes, unit, "until then" if fallen else "since"))
    if fallen:
        between = f"between {_at(points, end, unit)} and {_at(points, end + 1, unit)}"
        told.append(f"counter set back {between}, as resetting, calibrating or loading does")
    return "; ".join(told)


def _pace(points: Sequence[Point], first: int, changes: list[int], unit: str, since: str) -> str:
    """Tell how it went on after it first moved, and how fast."""
    last, end = len(points) - 1, changes[-1]
    if end < last:
        how = f"stopped at {_at(points, end, unit)}"
    elif len(changes) == last - first:
        how = f"steady {since}"
    else:
        how = f"moved on in {len(changes)} of {last - first} times {since}"
    begin = max(first - 1, 0)
    before, halfway, now = (points[k].shift for k in (begin, (first + end) // 2, end))
    steps = points[end].step - points[begin].step
    if before is None or halfway is None or now is None or steps <= 0 or now <= before:
        return how
    if now < _FURTHER * halfway:
        return f"{how}, levelling off" if end == last else how
    rate = (now - before) / steps
    scale = 10 ** min(3, int(math.log10(steps))) if unit == "step" else 1
    return f"{how}, about {rate * scale:.2g} sigma per {f'{scale:,} steps' if scale > 1 else unit}"


def _at(points: Sequence[Point], index: int, unit: str) -> str:
    return f"{unit} {points[index].step:,}"

"""A timeline: bounded, evenly thinned, with its first and last moment."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freezekit.audit.findings import Moment
from freezekit.audit.timeline import MOST, Timeline


def at(step: int) -> Moment:
    return Moment(step, 0.001 * step, 1.0 + step, step)


def steps(timeline: Timeline, layer: str = "bn") -> list[int]:
    return [moment.step for moment in timeline.of(layer)]


def recorded(at_steps: list[int], most: int = 8) -> Timeline:
    timeline = Timeline(most)
    for step in at_steps:
        timeline.record("bn", at(step))
    return timeline


GAPS = st.lists(st.integers(1, 50), min_size=1, max_size=300)


@given(GAPS, st.integers(3, 9))
def test_bounded_and_in_order_with_first_and_last(gaps: list[int], most: int) -> None:
    every = [sum(gaps[: k + 1]) for k in range(len(gaps))]
    timeline = Timeline(most)
    for step in every:
        timeline.record("bn", at(step))
        kept = steps(timeline)
        assert len(kept) <= most
        assert (kept[0], kept[-1]) == (every[0], step)
        assert kept == sorted(set(kept) & set(every))
    assert all(moment == at(moment.step) for moment in timeline.of("bn"))


@given(every=st.integers(1, 40), first=st.integers(0, 1000), count=st.integers(1, 2000))
@settings(deadline=None)
def test_regular_checks_are_thinned_evenly(every: int, first: int, count: int) -> None:
    timeline = recorded([first + every * k for k in range(count)], most=16)
    kept = steps(timeline)
    gaps = [b - a for a, b in pairwise(kept)]
    assert len(set(gaps[:-1])) <= 1  # all but the one to the last
    assert not gaps or gaps[-1] <= gaps[0]
    assert len(kept) >= min(count, 8)


@given(GAPS, st.integers(3, 9))
def test_what_is_due_is_what_stays(gaps: list[int], most: int) -> None:
    every = [sum(gaps[: k + 1]) for k in range(len(gaps))]
    lazy, eager = Timeline(most), Timeline(most)
    for step in every:
        assert lazy.due("bn", step) == eager.due("bn", step)
        eager.record("bn", at(step))
        if lazy.due("bn", step):
            lazy.record("bn", at(step))
            assert steps(lazy) == steps(eager)
    lazy.record("bn", at(every[-1]))  # as a report at the end does
    assert lazy.of("bn") == eager.of("bn")


def test_a_million_steps() -> None:
    timeline = Timeline()
    taken = 0
    for step in range(1, 1_000_001):
        if timeline.due("bn", step):
            timeline.record("bn", at(step))
            taken += 1
    assert taken < MOST * 8
    assert MOST // 2 <= len(timeline.of("bn")) <= MOST == 256
    assert sys.getsizeof(timeline.of("bn")) < 4096


def test_layers_are_apart() -> None:
    timeline = recorded(list(range(1, 100)))
    assert timeline.due("other", 5)
    timeline.record("other", at(5))
    assert (steps(timeline, "other"), timeline.due("other", 6)) == ([5], True)
    assert timeline.of("none") == ()


@pytest.mark.parametrize("again", [7, 4])
def test_a_step_that_comes_again_replaces(again: int) -> None:
    timeline = recorded([1, 3, 5, 7])
    newer = Moment(again, 9.0, 9.0, 9)
    timeline.record("bn", newer)
    assert timeline.of("bn")[-1] == newer
    assert steps(timeline) == sorted({*(step for step in (1, 3, 5, 7) if step < again), again})

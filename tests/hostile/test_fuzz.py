"""A few hundred mutations of each format; ``fuzz.py`` makes as many as one likes."""

import fuzz
import pytest


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_a_short_run(name):
    outcome = fuzz.run(name, range(300), seed=7)
    assert outcome.failures == []
    # else nothing was tested
    assert outcome.counts["read"] > 30
    assert outcome.counts["compared"] > 10 or fuzz.FORMATS[name].every > 1
    assert outcome.counts["refused"] > 10


def test_a_difference_is_found():
    """Else there being none would prove nothing."""
    ours = {"w": ["float32", [2], "0a"]}
    assert fuzz.differs(ours, [{"module.w": ["float32", [2], "0a"]}]) is None
    assert fuzz.differs(ours, [{"w": ["float32", [2], "unsupported"]}]) is None
    for other in (["float32", [2], "0b"], ["float32", [1, 2], "0a"], ["int32", [2], "0a"]):
        assert fuzz.differs(ours, [{"w": other}]).startswith("w: ours")
    assert fuzz.differs(ours, [{"v": ["float32", [2], "0a"]}]).startswith("names: ")
    assert fuzz.differs(ours, [{"w": ours["w"], "v": ours["w"]}]).startswith("names: ")
    assert fuzz.differs(ours, []) == "the oracle has no tensors at all"


def test_a_mutation_depends_on_its_number_alone():
    seeds: list[fuzz.Sample] = [{"file": bytes(range(256))}, {"file": bytes(100)}]
    form = fuzz.FORMATS["zip"]
    assert fuzz.mutated(form, seeds, 0, 5) == fuzz.mutated(form, seeds, 0, 5)
    assert len({fuzz.mutated(form, seeds, 0, number)["file"] for number in range(50)}) > 40

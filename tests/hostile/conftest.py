"""Puts this folder on the path, so that the tests here and elsewhere import ``build_hostile``."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _only_what_the_reader_makes() -> Iterator[None]:
    """Spare the collector what other tests have loaded: the time limits are for the reader."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

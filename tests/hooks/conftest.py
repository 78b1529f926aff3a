"""What the hooks' tests share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def nobody_watches() -> None:
    """An auditor that an error left behind ends when it is collected; the other modules' are by now."""
    gc.collect()

"""What makes measuring in the process of the tests quick."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Spares the collector, which every measured phase calls, what the tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

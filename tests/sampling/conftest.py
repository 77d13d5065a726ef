"""Products that were chosen for one test are not another's."""

from collections.abc import Iterator

import pytest

from mixture_of_depths.sampling.native import FASTEST


@pytest.fixture
def nothing_chosen() -> Iterator[None]:
    """As in a new process, which has measured nothing."""
    kept = dict(FASTEST)
    FASTEST.clear()
    yield
    FASTEST.clear()
    FASTEST.update(kept)

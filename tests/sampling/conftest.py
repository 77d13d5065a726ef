"""Products that were chosen for one test are not another's, and a step that is not the first choice here."""

from collections.abc import Iterator

import pytest

from mixture_of_depths.sampling import stream
from mixture_of_depths.sampling.native import FASTEST, READY


@pytest.fixture
def nothing_chosen() -> Iterator[None]:
    """As in a new process, which has measured nothing."""
    kept, was_ready = dict(FASTEST), list(READY)
    FASTEST.clear()
    READY.clear()
    yield
    FASTEST.clear()
    FASTEST.update(kept)
    READY[:] = was_ready


@pytest.fixture
def compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast step is the compiled one, as where the library's products are faster than those in C++."""
    monkeypatch.setattr(stream, "is_own", lambda model, batch_size: False)

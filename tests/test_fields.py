"""A field is held against the range that its annotation states."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Ge, Len, Lt

from mixture_of_depths import SamplingOptions
from mixture_of_depths.fields import validate_fields


@dataclass(frozen=True)
class Sizes:
    width: Annotated[int, Ge(1)] = 2
    share: Annotated[float, Ge(0), Lt(1)] | None = None
    kind: Literal["round", "square"] = "round"
    is_open: bool = False
    names: tuple[Annotated[str, Len(1)], ...] = ()
    ends: int | list[int] | None = None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width=0 is out of range: it must be greater than or equal to 1"),
        ({"width": 1.5}, "width=1.5 is out of range: it must be a valid integer"),
        ({"width": 10**30}, rf"width={10**30} is out of range: it must be less than 1e\+30"),
        ({"ends": [1, 10**400]}, r"ends=\[1, 10+\] is out of range: it must be less than 1e\+30"),
        ({"width": True}, "width=True is out of range: it must be a valid integer"),
        ({"width": "3"}, "width='3' is out of range: it must be a valid integer"),
        ({"share": 1.0}, "share=1.0 is out of range: it must be less than 1"),
        ({"share": float("nan")}, "share=nan is out of range: it must be a finite number"),
        ({"kind": "flat"}, "kind='flat' is out of range: it must be 'round' or 'square'"),
        ({"is_open": 1}, "is_open=1 is out of range: it must be a valid boolean"),
        ({"names": ("",)}, r"names=\(''\,\) is out of range: it must have at least 1 character"),
        ({"ends": "one"}, "ends='one' is out of range: it must be a valid integer or be a valid list"),
    ],
)
def test_a_field_out_of_its_range_is_named_with_its_value_and_the_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_fields(Sizes(**changes))


@pytest.mark.parametrize("changes", [{}, {"width": 1}, {"share": 0}, {"share": 0.5, "kind": "square", "is_open": True}])
def test_a_field_within_its_range_is_taken(changes: dict[str, Any]) -> None:
    validate_fields(Sizes(**changes))


def test_sampling_takes_whole_numbers_of_numpy_and_lists() -> None:
    settings: dict[str, Any] = {"max_new_tokens": np.int64(9), "seed": np.int64(3), "stop": ["e"]}
    options = SamplingOptions(**settings)
    assert (options.max_new_tokens, options.seed, options.stop) == (9, 3, ("e",))
    assert type(options.seed) is int

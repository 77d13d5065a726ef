"""Fields of a dataclass held against the types and ranges that their annotations state, by pydantic."""

import re
from dataclasses import fields
from functools import cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# No count of anything comes near it, and sizes derived from it still fit into a float.
LARGEST = 10**30


def validate_fields(instance: Any) -> None:
    """Holds every field that the instance's own class annotates against its annotation; one at its default is right.

    Raises:
        ValueError: naming the field, its value and what is expected.
    """
    kind = type(instance)
    for field in fields(kind):
        value = getattr(instance, field.name)
        if field.name in kind.__annotations__ and not (type(value) is type(field.default) and value == field.default):
            _validate(kind, field.name, value)


def make_plain(instance: Any) -> None:
    """Turns what Python's users have at hand into what a field of options holds: NumPy's whole numbers, and lists."""
    for field in fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, list):
            object.__setattr__(instance, field.name, tuple(value))
        elif isinstance(value, Integral) and not isinstance(value, bool):
            object.__setattr__(instance, field.name, int(value))


def refuse_without_use(options: Any, where: str, *names: str) -> None:
    """Raises ValueError for the first of these fields that is not at its default, and has no use beside others."""
    defaults = {field.name: field.default for field in fields(options)}
    for name in names:
        if (value := getattr(options, name)) != defaults[name]:
            raise ValueError(f"{name}={value} has no use {where}; leave out one of them")


def _validate(kind: type, name: str, value: Any) -> None:
    from pydantic import ValidationError

    numbers = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, int) and abs(number) >= LARGEST for number in numbers):
        raise ValueError(f"{name}={value!r} is out of range: it must be less than {LARGEST:.0e}")
    try:
        _adapter(kind, name).validate_python(value)
    except ValidationError as error:
        # Of a tuple those of its entries say more than that of their number, which counts the right ones.
        problems = [problem for problem in error.errors() if problem["loc"]] or error.errors()
        # A field of several kinds has a message for each.
        messages = dict.fromkeys(re.sub(r"^\w+ should ", "", problem["msg"]) for problem in problems)
        raise ValueError(f"{name}={value!r} is out of range: it must {' or '.join(messages)}") from error


@cache
def _adapter(kind: type, name: str) -> "TypeAdapter[Any]":
    # Loaded when it is needed: it would take a third of the time in which the command line answers.
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind.__annotations__[name], config=ConfigDict(strict=True, allow_inf_nan=False))

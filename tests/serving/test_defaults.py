"""The defaults of a request are OpenAI's, under the model's own settings."""

from typing import Any

import pytest
from transformers import GenerationConfig

from mixture_of_depths.serving.defaults import NEUTRAL_SETTINGS, default_options


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"temperature": 1.0, "top_k": 0, "stop": ()}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "stop": ()},
        ),
        ({"do_sample": False}, {"temperature": 0.0, "top_k": 0, "stop": ()}),
        (
            {"max_new_tokens": 7, "stop_strings": "end"},
            {"temperature": 1.0, "top_k": 0, "max_new_tokens": 7, "stop": ("end",)},
        ),
    ],
)
def test_settings_of_generate_are_defaults_of_requests(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert default_options(GenerationConfig(**settings)) == expected


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"top_k": -3}])
def test_a_setting_of_generate_that_cannot_be_followed_is_refused(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value} is"):
        default_options(GenerationConfig(**settings))


@pytest.mark.parametrize(("name", "value"), NEUTRAL_SETTINGS.items())
def test_a_setting_of_generate_that_asks_for_nothing_is_left_out(name: str, value: Any) -> None:
    config = GenerationConfig()
    setattr(config, name, value)
    assert default_options(config) == default_options(GenerationConfig())


def test_what_generate_itself_takes_where_nothing_is_written_asks_for_nothing() -> None:
    for name, value in GenerationConfig._get_default_generation_params().items():
        if name not in ("top_k", "max_length"):
            assert default_options(GenerationConfig(**{name: value}))["top_k"] == 0

"""How a request is sampled that says nothing of it: OpenAI's defaults under the model's own."""

from typing import Any

from transformers import GenerationConfig

from mixture_of_depths.options import SamplingOptions

# What a generation configuration may say beside the fields of `SamplingOptions`.
KNOWN = ("max_length", "do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "stop_strings", "use_cache")
# Its settings that are not followed, with the values that ask for nothing: transformers' defaults, and what is empty.
NEUTRAL_SETTINGS: dict[str, Any] = {
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "bad_words_ids": [],
    "sequence_bias": {},
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}


def default_options(config: GenerationConfig) -> dict[str, Any]:
    """The fields of `SamplingOptions` for a request that says nothing: OpenAI's defaults under the model's own.

    Raises:
        ValueError: for a setting that the sampler does not have, or that is out of its range.
    """
    # What is written there by default is off, or tells where the configuration comes from.
    settings = {name: value for name, value in config.to_diff_dict().items() if not (value is None or value is False)}
    settings = {name: value for name, value in settings.items() if name[0] != "_" and name != "transformers_version"}
    options = {name: value for name, value in settings.items() if name in SamplingOptions.__dataclass_fields__}
    for name in sorted(set(settings) - set(options) - set(KNOWN)):
        if name not in NEUTRAL_SETTINGS or settings[name] != NEUTRAL_SETTINGS[name]:
            raise ValueError(f"{name}={settings[name]} is not supported; leave it out")
    if config.do_sample is False:
        options["temperature"] = 0.0
    strings = settings.get("stop_strings", ())
    options["stop"] = (strings,) if isinstance(strings, str) else tuple(strings)
    options = {"temperature": 1.0, "top_k": 0, **options}
    SamplingOptions(**options)
    return options

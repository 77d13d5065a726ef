"""Options out of their range are refused by name."""

from typing import Any

import pytest

from mixture_of_depths.options import RetrofitOptions, SamplingOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops_share": 1.0}, r"flops_share=1\.0 is out of range"),
        ({"capacity": (0.0,)}, r"capacity=\(0\.0,\)"),
        ({"routed_layers": ()}, "routed_layers="),
        ({"routed_layers": (1, 2, 1)}, r"routed_layers=\(1, 2, 1\) names a block twice; name each of them once"),
        ({"distillation": 1.5}, r"distillation=1\.5"),
        ({"lowering_fraction": 1.0}, r"lowering_fraction=1\.0"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"measure_sequences": 0}, "measure_sequences=0"),
        ({"fit_sequences": 0}, "fit_sequences=0"),
        ({"flops_share": 0.5, "routed_layers": (1,)}, r"flops_share=0\.5 has no use with routed_layers; leave out one"),
        ({"measure_sequences": 2, "routed_layers": (1,)}, "measure_sequences=2 has no use with routed_layers"),
        ({"lora_rank": 2}, "lora_rank=2 has no use with tune=all"),
        ({"causal_router": "predictor", "router_type": "random"}, "causal_router=predictor has no use with"),
        (
            {"fit_sequences": 2, "router_type": "random", "bypass_rank": 0},
            "fit_sequences=2 has no use with router_type=random and bypass_rank=0",
        ),
        ({"tune": "routers", "router_type": "random"}, "tune=routers leaves nothing to tune with router_type=random"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrofitOptions(**changes)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_a_setting_out_of_its_range_is_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* is out of range"):
        SamplingOptions(**setting)

"""The model under peft's adapters."""

from typing import TYPE_CHECKING, Any, Union

from mixture_of_depths.model.modeling import MoDForCausalLM

if TYPE_CHECKING:
    from peft import LoraModel, PeftModel

Adapted = Union[MoDForCausalLM, "PeftModel", "LoraModel"]


def without_adapters(model: Adapted) -> MoDForCausalLM:
    """The model under peft's adapters, which stay in its layers; a model without any as it is.

    Raises:
        ValueError: when the adapters are not in its layers, or it is another model.
    """
    if isinstance(model, MoDForCausalLM):
        return model
    # A second of loading, which few need.
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    inner: Any = model
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"peft_type={model.active_peft_config.peft_type} puts tokens before the text: not supported"
            )
        inner = model.get_base_model()
    elif isinstance(model, BaseTuner):
        inner = model.model
    if not isinstance(inner, MoDForCausalLM):
        raise ValueError(
            f"model={type(inner).__name__} has no routers; give a MoDForCausalLM, with peft's adapters or not"
        )
    return inner

"""PEFT's names, to be imported in its place: `from peftc.peft import LoraConfig, get_peft_model`.

A script written for PEFT keeps its other lines. What differs is in docs/from-peft.md. Configs are PEFT's own classes
where PEFT is installed, and classes with the same fields where it is not; everything else is peftc's.

Never here: work of its own: every name is a few lines over `peftc.compiler`.
"""

from typing import Any

from peftc.peft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from peftc.peft.configs import TaskType, named
from peftc.peft.functions import (
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_config,
    get_peft_model,
    hotswap_adapter,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    inject_adapter_in_model,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)
from peftc.peft.models import (
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peftc.runtime.model.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TaskType",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    return named(name)

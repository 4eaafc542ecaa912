"""PEFT's own classes, where it is installed: of models and of configurations, and what these are called."""

import importlib.util
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from importlib import import_module
from typing import Any

_WORDS = (
    "TaskType",
    "PeftType",
    "PromptTuningInit",
    "MultitaskPromptTuningInit",
    "PromptEncoderReparameterizationType",
)

CONFIG_NAMES = {
    "ADALORA": "AdaLoraConfig",
    "ADAPTION_PROMPT": "AdaptionPromptConfig",
    "BEFT": "BeftConfig",
    "BOFT": "BOFTConfig",
    "C3A": "C3AConfig",
    "CARTRIDGE": "CartridgeConfig",
    "CPT": "CPTConfig",
    "DEFT": "DeftConfig",
    "DELORA": "DeloraConfig",
    "FOURIERFT": "FourierFTConfig",
    "FROD": "FrodConfig",
    "GLORA": "GloraConfig",
    "GRALORA": "GraloraConfig",
    "HIRA": "HiraConfig",
    "HRA": "HRAConfig",
    "IA3": "IA3Config",
    "LN_TUNING": "LNTuningConfig",
    "LOHA": "LoHaConfig",
    "LOKR": "LoKrConfig",
    "LORA": "LoraConfig",
    "MISS": "MissConfig",
    "MULTITASK_PROMPT_TUNING": "MultitaskPromptTuningConfig",
    "OFT": "OFTConfig",
    "PEANUT": "PeanutConfig",
    "POLY": "PolyConfig",
    "PREFIX_TUNING": "PrefixTuningConfig",
    "PROMPT_TUNING": "PromptTuningConfig",
    "PSOFT": "PsoftConfig",
    "PVERA": "PveraConfig",
    "P_TUNING": "PromptEncoderConfig",
    "RANDLORA": "RandLoraConfig",
    "ROAD": "RoadConfig",
    "SHIRA": "ShiraConfig",
    "SUPERTUNING": "SupertuningConfig",
    "TINYLORA": "TinyLoraConfig",
    "TRAINABLE_TOKENS": "TrainableTokensConfig",
    "UNILORA": "UniLoraConfig",
    "VBLORA": "VBLoRAConfig",
    "VERA": "VeraConfig",
    "WAVEFT": "WaveFTConfig",
    "XLORA": "XLoraConfig",
}


@cache
def is_installed() -> bool:
    """Whether PEFT can be imported here. Nothing of ours needs it."""
    return importlib.util.find_spec("peft") is not None


def model_class() -> Any | None:
    """PEFT's class of models; None where it is not installed."""
    return import_module("peft").PeftModel if is_installed() else None


def config_class(peft_type: str) -> Any | None:
    """PEFT's class of configurations for a type; None where it is not installed, or has no such type."""
    if not is_installed():
        return None
    return import_module("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)


def config_fields(kind: Any) -> frozenset[str]:
    """What a class of configurations takes."""
    return frozenset(each.name for each in fields(kind))


def tuner_name(peft_types: Sequence[str]) -> str:
    """What PEFT calls the class of models with adapters of these types."""
    if len(set(peft_types)) != 1:
        return "MixedModel"
    found = import_module("peft.mapping").PEFT_TYPE_TO_TUNER_MAPPING.get(peft_types[0]) if is_installed() else None
    return found.__name__ if found is not None else f"{peft_types[0].title()}Model"


def config_named(name: str) -> Any | None:
    """What PEFT calls so, if it says what an adapter is or is a word for it; None for its other names."""
    found = getattr(import_module("peft"), name, None) if is_installed() else None
    return found if isinstance(found, type) and (name.endswith("Config") or name in _WORDS) else None


def is_of_unknown_method(found: Any) -> bool:
    """Whether a class of configurations is of a method that peftc has not."""
    kinds = import_module("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    return any(kind is found and getattr(name, "value", name) not in CONFIG_NAMES for name, kind in kinds.items())

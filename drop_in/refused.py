"""What PEFT has and this package has not, with the reason and what to do instead."""

_TUNER = "there is one class of adapted models for all methods, and the adapters are nodes of its graphs"
_MODULE = "it is a module that PEFT puts into a model; here nothing is put in"
_TABLE = "it maps PEFT's own classes to one another"

REFUSED = {
    "PEFT_TYPE_TO_TUNER_MAPPING": _TABLE,
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": _TABLE,
    "PEFT_TYPE_TO_CONFIG_MAPPING": _TABLE,
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": _TABLE,
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": _TABLE,
    "CPTEmbedding": _MODULE,
    "CartridgeEncoder": _MODULE,
    "PrefixEncoder": _MODULE,
    "PromptEmbedding": _MODULE,
    "PromptEncoder": _MODULE,
    "bloom_model_postprocess_past_key_value": "caches are given to every model as its own layers make them",
    "shift_tokens_right": "it is a helper of PEFT's for encoder-decoders; transformers' models have their own",
    "cast_mixed_precision_params": "adapters are float32 unless autocast_adapter_dtype=False says otherwise",
    "compose_cartridge_adapters": "activate several: set_adapter([...]) puts them in front one after the other",
    "convert_to_lora": "export or save the adapter as it is; a conversion to LoRA loses what it cannot say",
    "save_as_lora": "export or save the adapter as it is; a conversion to LoRA loses what it cannot say",
    "create_arrow_model": "its router reads what each layer is given; set_route(...) weighs adapters before layers run",
    "find_kappa_target_modules": "name the modules: target_modules, or 'on' in a spec",
    "get_eva_state_dict": 'use init_lora_weights="eva" and apply(..., calibration=batches)',
    "initialize_lora_eva_weights": 'use init_lora_weights="eva" and apply(..., calibration=batches)',
    "preprocess_loraga": 'use init_lora_weights="lora_ga" and apply(..., calibration=batches)',
    "prompt_embeddings_from_past_key_values": "use initialize_kv_prefix_from_past_key_values",
    "replace_lora_weights_loftq": 'use init_lora_weights="loftq" and apply(..., dense=model)',
    "NoMatchingPeftModuleError": "errors here are peftc.compiler.AdapterError, which is a ValueError",
    "PeftError": "errors here are peftc.compiler.AdapterError, which is a ValueError",
    "PeftWarning": "warnings here are UserWarning",
}


def is_tuner(name: str) -> bool:
    """Whether a name is that of one of PEFT's classes of adapted models, one for each method."""
    return name.endswith("Model") and not name.startswith(("Peft", "AutoPeft"))


def reason(name: str) -> str:
    """Why a name of PEFT's is not here; empty for others."""
    return REFUSED.get(name) or (_TUNER if is_tuner(name) else "")

"""PEFT's names for a route of its own: the fields of its configuration, and the keys of its tensors."""

ROUTED_TYPE = "XLORA"
EXPERTS = "adapters"  # the field that has where the adapters are, by name

# What a classifier is made of, and PEFT's field for it.
SETTINGS = {
    "hidden_size": "hidden_size",
    "depth": "xlora_depth",
    "size": "xlora_size",
    "dropout": "xlora_dropout_p",
    "by_place": "layerwise_scalings",
    "softmax": "enable_softmax",
    "temperature": "softmax_temperature",
    "top_k": "top_k_lora",
    "softmax_top_k": "enable_softmax_topk",
    "weight": "global_scaling_weight",
    "first_pass": "scaling_pass_value",
    "trains_adapters": "use_trainable_adapters",
}
KEYS = "base_model.internal_xlora_classifier."  # how the keys of its tensors begin
WHOLE = "base_model.lora_model."  # how those of an adapter do that PEFT saved with the base, and without some numbers

# Of every configuration, and of no meaning for a route.
COMMON = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
)

# Methods of PEFT's model with such a route, and the classifier's own.
METHODS = {
    "set_topk_lora": "set_top_k",
    "set_global_scaling_weight": "set_global_scaling_weight",
    "get_global_scaling_weight": "get_global_scaling_weight",
    "set_scaling_pass_value": "set_scaling_pass_value",
    "get_latest_scalings": "get_latest_scalings",
    "get_scalings_log": "get_scalings_log",
    "enable_scalings_logging": "enable_scalings_logging",
    "disable_scalings_logging": "disable_scalings_logging",
    "clear_scalings_log": "clear_scalings_log",
    "get_bucketed_scalings_log": "get_bucketed_scalings_log",
}

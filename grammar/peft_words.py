"""Words of PEFT's configs for which a spec has clauses, or no need: what the help of an error says instead of them."""

_CLAUSES = {
    "target_modules": "on q_proj, v_proj",
    "target_parameters": "on experts.gate_up_proj",
    "exclude_modules": "skip lm_head",
    "modules_to_save": "train lm_head",
    "layers_to_transform": "on layers[0..8].q_proj",
    "layers_pattern": "on layers[0..8].q_proj",
    "trainable_token_indices": "tokens [5, 6]",
    "token_indices": "tokens [5, 6]",
    "rank_pattern": "on v_proj with rank = 4",
    "alpha_pattern": "on v_proj with alpha = 4",
    "ensure_weight_tying": "train lm_head tied",
    "bias": "bias all",
}
_UNSAID = {
    "task_type": "the model's class says it; commands have --task",
    "base_model_name_or_path": "it is written when the adapter is saved",
    "revision": "it is written when the adapter is saved",
    "peft_type": "it is the method's",
    "peft_version": "it is written when the adapter is saved",
    "inference_mode": "it is written when the adapter is saved",
    "auto_mapping": "it is written when the adapter is saved",
    "fan_in_fan_out": "each module says itself how its weight is stored",
}


def instead_of(word: str) -> str:
    """How a spec says what this field of PEFT's configs says; empty for other words."""
    if word in _CLAUSES:
        return f"PEFT's '{word}' is a clause here: {{ {_CLAUSES[word]} }}"
    if word in _UNSAID:
        return f"leave PEFT's '{word}' out: {_UNSAID[word]}"
    return ""

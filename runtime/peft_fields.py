"""What is known of adapter_config.json beyond a method's own fields: facts of PEFT's format, as data."""

import re

PEFT_VERSION = "0.21.2"  # the version whose format is written

# Read by peft_config itself, for every method.
HANDLED = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "bias",
        "rank_pattern",
        "alpha_pattern",
    }
)

# Whatever they say, the outputs of a loaded adapter are the same.
HARMLESS = frozenset(
    {
        "peft_version",
        "fan_in_fan_out",  # sites know how their weight is stored
        "runtime_config",
        "megatron_core",  # read only beside megatron_config
        "qalora_group_size",  # read only beside use_qalora
        "loftq_config",  # these four are read only by the initialisation of the same name
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }
)

# Features that change the mathematics and are not supported; anything but none, false, empty is refused by name.
REFUSED = {
    "use_dora": "",
    "use_qalora": "",
    "lora_bias": "",
    "layer_replication": "",
    "trainable_token_indices": "",
    "ensure_weight_tying": "",
    "alora_invocation_tokens": "",
    "megatron_config": "",
    "velora_config": "set it to null to load the adapter: it only changes how gradients are computed",
    "monteclora_config": "",
    "use_bdlora": "",
    "arrow_config": "",
    "kasa_config": "",
}

# Fields like init_lora_weights matter only where the initialisation also changed the base weights.
INIT_FIELD = re.compile(r"init_(\w+_)?weights")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

ALL_LINEAR = "all-linear"
NO_MODULES = "dummy-target-modules"  # how PEFT says that no module is adapted

# The modules PEFT trains unasked for a task, by string suffix.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

RANK_FIELD = "r"
RANK_PATTERN_TYPES = frozenset({"LORA", "LOHA", "LOKR", "HIRA", "DELORA", "OSF"})
ALPHA_PATTERN_TYPES = frozenset({"LORA", "LOHA", "LOKR"})


def is_alpha_field(name: str) -> bool:
    """Whether a method's field is the one alpha_pattern varies."""
    return name == "alpha" or name.endswith("_alpha")


def pattern_field(peft_type: str, name: str) -> str | None:
    """The field that holds this field's exceptions by module, or None where PEFT has none."""
    if name == RANK_FIELD and peft_type in RANK_PATTERN_TYPES:
        return "rank_pattern"
    if is_alpha_field(name) and peft_type in ALPHA_PATTERN_TYPES:
        return "alpha_pattern"
    return None


def only_adapter_bias(peft_type: str) -> str:
    """How PEFT spells "the biases of adapted modules" for a type: `lora_only`."""
    return f"{peft_type.lower()}_only"

"""What PEFT calls things: fields of adapter_config.json beyond a method's own, and arguments that it adds to calls.

Its classes are in `peft_classes`: those need the library, and its format does not.
"""

import re
from collections.abc import Mapping, Sequence

PEFT_VERSION = "0.21.2"  # the version whose format is written
BY_ROW = "adapter_names"  # of rows, each its adapter
BASE_ROWS = "__base__"  # what stands there for a row without an adapter
TASK_IDS = "task_ids"  # of rows, each its task
TOKEN_TYPES = "input_type_mask"  # of tokens, for context-aware prompts

OWN_TYPE = "PEFTC"  # the type of a method that PEFT has not: the file holds the spec's text

TYPE = "peft_type"  # the field that makes a config of a mapping, and of an object that has it
NOT_IN_FILES = ("_custom_modules", "mask_fn")  # what a config object has that its fields, as a file has them, leave out

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
        "ensure_weight_tying",
    }
)

# Those that choose modules and tune them.
OF_MODULES = frozenset(
    {
        *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern", "bias"),
        *("rank_pattern", "alpha_pattern"),
    }
)

# Whatever they say, the outputs of a loaded adapter are the same.
HARMLESS = frozenset(
    {
        "peft_version",
        "fan_in_fan_out",  # sites know how their weight is stored
        "runtime_config",
        "megatron_core",  # read only beside megatron_config
        *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # ms-swift's own: how an adapter was trained
    }
)

# Features of PEFT that methods share and that change what an adapter computes.
UNSUPPORTED = frozenset(
    {
        *NOT_IN_FILES,
        *("layer_replication", "trainable_token_indices", "megatron_config", "use_qalora"),
        *("alora_invocation_tokens", "velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
    }
)

# Of a fresh adapter, too, these change nothing, whatever they say. Others that change nothing of a loaded one may.
IDLE = {
    "qalora_group_size": "PEFT reads it with use_qalora",
    "loftq_config": "PEFT reads it with init_lora_weights='loftq'",
    "corda_config": "PEFT reads it with init_lora_weights='corda'",
    "lora_ga_config": "PEFT reads it with init_lora_weights='lora_ga'",
    "eva_config": "PEFT reads it with init_lora_weights='eva', and then it is checked",
    "r": "PEFT's AdaLoRA reads init_r and target_r",
    "use_rslora": "PEFT's AdaLoRA does not read it",
    "lora_bias": "PEFT's AdaLoRA does not read it",
    "lora_dropout": "PEFT's SuperTuning reads it with a rank",
    "mini_r": "PEFT reads it with init_weights='mini'",
    "module_dropout": "PEFT's OFT makes a dropout and never applies it",
    "psoft_alpha": "PEFT divides by it what it multiplies with it",
    "progressbar": "it is shown or not",
    "runtime_offload_base_weight": "where the weight is held while PEFT computes",
    "cpt_mask": "PEFT does not read it",
    "opt_loss_decay_factor": "PEFT reads it with opt_weighted_loss_type='decay'",
    "num_virtual_tokens": "PEFT counts the tokens of cpt_token_ids",
    "tokenizer_name_or_path": "PEFT reads it for a start from a text",
    "prompt_tuning_init_text": "PEFT reads it for a start from a text",
    "prompt_tuning_init_state_dict_path": "PEFT reads it for a start from a file",
    "prompt_tuning_init_task": "PEFT reads it for a start from a file",
    "encoder_num_layers": "PEFT's MLP has two hidden layers, whatever it says",
    "encoder_dropout": "PEFT's MLP has none",
    "init_logits_std": "PEFT reads it for logits, which this form has not",
}

# What these may say of a fresh adapter, and what to do instead of anything else.
FRESH_ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "mask_type": (("random",), "the places are drawn at random here; a file with other places can be loaded"),
    "generator_seed": ((None,), "it seeds noise that is not added here: leave it out"),
    "encoder_reparameterization_type": (("MLP",), 'say "MLP"'),
    "tokenizer_kwargs": ((None, {}), "leave it out, and pass the tokenizer itself as tokenizer="),
    "save_only_topk_weights": ((None, False), "train without it: a file that holds the choice alone trains no choice"),
}

START_FIELD, DECOMPOSED, MEASURED = "init_lora_weights", "pissa", "eva"
MEASURED_CONFIG = "eva_config"
NEARLY_DECOMPOSED = re.compile(r"pissa_niter_\d+")

# Starts that no fresh adapter of a config has, and what to do instead.
OTHER_STARTS = {
    "loftq": "a spec says it: base { quantize = nf4 } with the method 'loftq', which keeps the base quantized",
    "corda": "a spec says it: the method 'corda', with calibration= batches in place of PEFT's preprocessing",
    "lora_ga": "it starts from gradients, which are not taken here: 'pissa' and 'eva' start from weights and inputs",
    "mica": "it freezes one factor, which is not done here: 'pissa' and 'olora' start from the weight",
}

# Whether parameters were set to zero at the start matters to no loaded adapter.
INIT_FIELD = re.compile(r"init_(\w+_)?weights")

# The fields of low-rank methods that settle by how much a product of factors is multiplied.
RANK, ALPHA, ROOT_SCALED = "r", "lora_alpha", "use_rslora"

# The types with a field that says that what is tied stays so.
TYING = frozenset({"LORA", "ADALORA"})

# The types whose configs have a field that is written for others too; elsewhere what it means by default is not said.
HAVING = {
    "bias": frozenset(
        {
            *("ADALORA", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HRA", "LORA"),
            *("MISS", "OFT", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
        }
    ),
    "fan_in_fan_out": frozenset(
        {
            *("ADALORA", "BOFT", "DEFT", "FOURIERFT", "FROD", "GRALORA", "HIRA", "IA3", "LORA", "OFT", "PSOFT"),
            *("PVERA", "RANDLORA", "SHIRA", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
        }
    ),
    "target_parameters": frozenset({"ADALORA", "LORA"}),
}
NO_COPIES = frozenset({"ADAPTION_PROMPT", "TRAINABLE_TOKENS"})  # these have no field for trained modules
HEADS_AND_WIDTH = ("num_attention_heads", "token_dim")  # the fields with those of a model's cache

ALL_LINEAR = "all-linear"
NO_MODULES = "dummy-target-modules"  # how PEFT says that no module is adapted

# The modules that PEFT takes for embeddings of tokens where they are targets.
EMBEDDINGS = ("embed_tokens", "lm_head")

# The modules PEFT trains unasked for a task, by string suffix.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def is_written(peft_type: str, name: str, value: object) -> bool:
    """Whether a field is written for a type: where its configs have it, or where it says what is not the default."""
    if name == "modules_to_save" and peft_type in NO_COPIES:
        return value is not None
    if name not in HAVING or peft_type in HAVING[name]:
        return True
    return name not in HARMLESS and value not in (None, "none")


def only_adapter_bias(peft_type: str) -> str:
    """How PEFT spells "the biases of adapted modules" for a type: `lora_only`."""
    return f"{peft_type.lower()}_only"


# What PEFT calls the task of a model class, by the end of its name. Prompts and prefixes need one.
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

# The class of transformers for a task, in the order in which PEFT lists them.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

# The tensors that a low-rank update has at a module, as PEFT saves them.
LOW_RANK_TENSORS = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}


def low_rank_config(
    modules: Sequence[str],
    rank: tuple[int, Mapping[str, int]],
    alpha: tuple[float, Mapping[str, float]],
    *,
    bias: bool,
    magnitude: bool,
) -> dict[str, object]:
    """The fields of a low-rank adapter of these modules; rank and alpha with the exceptions by module."""
    return {
        "peft_type": "LORA",
        "target_modules": list(modules),
        "r": rank[0],
        "rank_pattern": dict(rank[1]),
        "lora_alpha": alpha[0],
        "alpha_pattern": dict(alpha[1]),
        "lora_bias": bias,
        "use_dora": magnitude,
        "inference_mode": True,
    }


def task_of(classes: Sequence[str], *, encoder_decoder: bool = True) -> str:
    """The task of a model of these classes, the most derived first.

    What generates from pictures too, and has no encoder of text (`encoder_decoder` is False), is one of text to PEFT.
    """
    found = next((task for name in classes for end, task in TASKS.items() if name.endswith(end)), "FEATURE_EXTRACTION")
    return "CAUSAL_LM" if found == "SEQ_2_SEQ_LM" and not encoder_decoder else found


def auto_task_of(classes: Sequence[str], *, encoder_decoder: bool, bare: bool) -> str | None:
    """The task by which PEFT's auto classes find the model's class; None where they find it by its name alone.

    `bare` says that the model has no head.
    """
    task = task_of(classes)
    if task == "SEQ_2_SEQ_LM":
        return task if encoder_decoder else None
    return task if task != "FEATURE_EXTRACTION" or bare else None


def auto_mapping(base_class: type) -> dict[str, str]:
    """How a config without a task names the class of its base."""
    return {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}


# Kinds of what is adapted beside a method's own modules.
TRAINED_MODULES = "modules_to_save"
TRAINED_TOKENS = "trainable_tokens"

"""What transformers calls things. Known to hold for 5.23 and 5.24.

5.24 renamed the cache among a forward's arguments and a model's outputs; arguments are found by the type that a forward
says they have, outputs by the type that they are, and only where neither tells by name.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peftc.passes.ir.roles import Role, Stack

# --- arguments of a model's forward ---

_ROLES: Mapping[str, Role] = {
    "input_ids": Role.TOKENS,
    "inputs_embeds": Role.EMBEDDINGS,
    "attention_mask": Role.MASK,
    "position_ids": Role.POSITIONS,
    "token_type_ids": Role.TYPES,
    "cache_position": Role.PLACES,
    "labels": Role.LABELS,
    "start_positions": Role.BOUNDS,
    "end_positions": Role.BOUNDS,
    "input_values": Role.SIGNAL,
}
_NAMES: Mapping[Role, str] = {role: name for name, role in _ROLES.items() if role != Role.BOUNDS}

# Of a model with two stacks these are the encoder's; the decoder's have a word in front.
_OF_TEXT = (Role.TOKENS, Role.EMBEDDINGS, Role.MASK, Role.POSITIONS, Role.TYPES)
_DECODER, _ENCODER = "decoder_", "encoder_"

LABELS = "labels"
TOKENS, MASK = "input_ids", "attention_mask"  # of what tokenizers and users hand over
ENCODER_OUTPUT = "encoder_outputs"
USE_CACHE, LOGITS_TO_KEEP = "use_cache", "logits_to_keep"
IMAGES, FEATURES = "pixel_values", "input_features"
COUNTS = ("num_items_in_batch",)  # another number at each step

GENERATION = "generation_config"
_SEVERAL = ("num_beams", "num_return_sequences")
_INPUTS = (TOKENS, _NAMES[Role.EMBEDDINGS], FEATURES, _NAMES[Role.SIGNAL], IMAGES)

_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "cache_params")
_CACHE_TYPE = re.compile(r"\w*Cache\b")

# The exporter drops an input called `labels`; under another name the loss is traced like everything else.
_TRACED = {"labels": "target_labels", "future_values": "target_future_values"}
_UNTRACED = {traced: name for name, traced in _TRACED.items()}

# What a config answers where a call leaves it open.
FLAGS = (USE_CACHE, "output_attentions", "output_hidden_states", "return_dict", "_attn_implementation")

WINDOWED = ("sliding_attention", "chunked_attention")  # kinds of layers, in a dictionary of masks

# --- what a model returns ---

ENCODED = "encoder_last_hidden_state"
LAST_HIDDEN_STATE = "last_hidden_state"
LOGITS = "logits"

ARGUMENTS = frozenset(
    (
        *(*_ROLES, *(f"{_DECODER}{name}" for name, role in _ROLES.items() if role in _OF_TEXT), *_TRACED, *COUNTS),
        *(*_CACHE_NAMES, *FLAGS, ENCODER_OUTPUT, LOGITS_TO_KEEP, IMAGES, FEATURES, f"{_ENCODER}{MASK}"),
    )
)
OUTPUTS = frozenset((*_CACHE_NAMES, ENCODED, LAST_HIDDEN_STATE, LOGITS))
"""Every name that is known here: none of them stands anywhere else."""

# --- attributes of models and modules ---

HAS_ADAPTERS = "_hf_peft_config_loaded"  # by which it knows that a quantized model has something to train
REENTRANT = "use_reentrant"

SAVING = frozenset({"save_function", "max_shard_size", "token", "variant", "save_peft_format"})
"""What transformers and accelerate give `save_pretrained` that is nothing to an adapter."""

CHECKPOINTING = "gradient_checkpointing"
INDICES = ("layer_idx", "layer_id", "layer_index")  # a layer's own number, by which it finds its part of a cache
QUANTIZER, QUANTIZED, QUANTIZED_BY = "hf_quantizer", "is_quantized", "quantization_method"
QUANTIZED_BITS = ("is_loaded_in_4bit", "is_loaded_in_8bit")
OFFLOADED = "_hf_hook"  # what accelerate has on a module whose tensors it keeps elsewhere
IN_FLOAT32 = "_keep_in_fp32_modules"
TIED = "all_tied_weights_keys"  # names of tensors, and of those that they share
EMBEDDINGS_IN, EMBEDDINGS_OUT = "get_input_embeddings", "get_output_embeddings"
SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")  # what an attention module is told by
PACKED, PACKED_QUERY = "c_attn", "q_attn"  # GPT-2's, whose three projections are one

ATTRIBUTES = frozenset(
    (
        *(HAS_ADAPTERS, CHECKPOINTING, *INDICES, QUANTIZER, QUANTIZED, QUANTIZED_BY, *QUANTIZED_BITS, IN_FLOAT32, TIED),
        *(EMBEDDINGS_IN, EMBEDDINGS_OUT),
    )
)


@dataclass(frozen=True)
class Argument:
    """What an argument of a forward is for, and of which stack."""

    role: Role
    stack: Stack = Stack.ONLY


@dataclass(frozen=True)
class Forward:
    """What a model's forward takes: the names of its arguments, and which of them is the cache."""

    names: frozenset[str]
    cache: str | None

    def takes(self, name: str) -> bool:
        """Whether there is an argument of this name."""
        return name in self.names

    def only(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the arguments that the forward takes."""
        return {name: value for name, value in arguments.items() if name in self.names}


def forward_of(forward: Callable[..., Any]) -> Forward:
    """What a forward takes, by its signature. The cache is the argument whose type is one, or has a known name."""
    parameters = inspect.signature(forward).parameters
    typed = [name for name, each in parameters.items() if _is_cache(each.annotation)]
    known = [name for name in _CACHE_NAMES if name in parameters]
    return Forward(frozenset(parameters), next(iter((*typed, *known)), None))


def argument_of(path: str, encoder_decoder: bool) -> Argument:
    """What a tensor among a call's arguments is for; `path` is its name, or `name.key` inside of a container.

    The names that inputs of programs have are understood too.
    """
    root = path.partition(".")[0]
    root = _UNTRACED.get(root, root)
    bare = root.removeprefix(_DECODER)
    role = _ROLES.get(bare)
    if role is not None and (bare == root or role in _OF_TEXT):
        own = Stack.ENCODER if role in _OF_TEXT and bare == root else Stack.DECODER
        return Argument(role, own if encoder_decoder else Stack.ONLY)
    if root.startswith(_ENCODER):
        masks = root.endswith(_NAMES[Role.MASK])
        return Argument(Role.OTHER_MASK if masks else Role.ENCODED, Stack.ENCODER)
    if root.endswith(_NAMES[Role.MASK]):
        return Argument(Role.OTHER_MASK, _stack(root, encoder_decoder))
    if root.endswith(_NAMES[Role.POSITIONS]):
        return Argument(Role.POSITIONS, _stack(root, encoder_decoder))
    return Argument(Role.IDS if root.endswith("_ids") else Role.OTHER, _stack(root, encoder_decoder))


def name_of(role: Role, stack: Stack = Stack.ONLY) -> str:
    """What an argument of this role is called."""
    return f"{_DECODER * (stack == Stack.DECODER and role in _OF_TEXT)}{_NAMES[role]}"


def traced_name(path: str) -> str:
    """What an argument is called while it is traced, and as the input of a program."""
    return _TRACED.get(path, path.replace(".", "_"))


def rows_of(arguments: Mapping[str, Any]) -> int | None:
    """How many rows a call has: of its tokens, or of what stands for them, or else of the first tensor."""
    found = (arguments.get(f"{stack}{name}") for stack in (_DECODER, "") for name in _INPUTS)
    tensors = (each for each in (*found, *arguments.values()) if hasattr(each, "shape") and len(each.shape))
    return next((int(each.shape[0]) for each in tensors), None)


def text_of(model: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The modules that compute with rows of a text, where a call has images beside it; empty where it has none."""
    pictures = any(name.startswith(IMAGES) and value is not None for name, value in arguments.items())
    if not pictures or not hasattr(model, "get_decoder"):
        return ()
    found = (model.get_decoder(), getattr(model, EMBEDDINGS_IN)(), getattr(model, EMBEDDINGS_OUT)())
    return tuple(each for each in found if each is not None and each is not model)


def repeats_of(arguments: Mapping[str, Any], config: object) -> frozenset[int]:
    """How many times as many rows as texts generation may call a model with, its beams or sequences in a row."""
    beams, sequences = (arguments.get(name) or getattr(config, name, None) or 1 for name in _SEVERAL)
    return frozenset((1, beams, sequences, beams * sequences))


def renamed_cache(arguments: Mapping[str, Any], forward: Forward, name: str) -> Mapping[str, Any]:
    """The arguments with the cache, which is called `name` there, under the name that the forward has for it.

    transformers takes the names of earlier releases too, and two names must not make two graphs.
    """
    if forward.cache is None or name in forward.names or arguments.get(forward.cache) is not None:
        return arguments
    return {forward.cache if each == name else each: value for each, value in arguments.items()}


# --- tokenizers ---

CHAT_AS_IDS: Mapping[str, bool] = {"tokenize": True, "add_generation_prompt": False, "return_dict": False}

# --- fields of configs ---

QUANTIZATION, COMPRESSION = "quantization_config", "compression_config"
TIES = "tie_word_embeddings"
LABEL_COUNT = "num_labels"
AUTO_MODEL = "AutoModel"  # for a model without a head

# What a config.json may hold beside its class's own fields: names of earlier versions, and what loading looks at.
ALWAYS_IN_CONFIG = frozenset(
    (
        *("architectures", "auto_map", "model_type", "rope_scaling", "rope_theta", "torch_dtype"),
        *("transformers_version", "_attn_implementation", "_name_or_path", "attn_implementation"),
        *("custom_pipelines", "pruned_heads"),
    )
)
ALSO_IN_CONFIG = ALWAYS_IN_CONFIG | {QUANTIZATION, "task_specific_params", "tokenizer_class", USE_CACHE}


_BY_LAYER = "_heterogeneity_spec"  # what of a config is another for each layer
_HEADS = frozenset(("num_attention_heads", "num_key_value_heads", "head_dim", "d_kv"))


def origin_of(model: object) -> tuple[str | None, str | None]:
    """Where a model came from, a name or a directory, and which revision of it."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    return name or None, getattr(config, "_commit_hash", None)


def is_encoder_decoder(config: object) -> bool:
    """Whether a model has an encoder and a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def text_config(config: Any, *, decoder: bool = False) -> Any:
    """The part of a config that is about text."""
    if not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config(decoder=True) if decoder else config.get_text_config()


def vocabulary_size(config: object) -> int:
    """How many tokens a model knows as its config says; two where it says nothing."""
    return int(getattr(text_config(config), "vocab_size", None) or 2)


def vocabulary_in(fields: object) -> int | None:
    """How many tokens a model knows as the fields of its config.json say, read as they are."""
    if not isinstance(fields, dict):
        return None
    sizes = (part.get("vocab_size") for part in (fields, fields.get("text_config")) if isinstance(part, dict))
    return next((size for size in sizes if isinstance(size, int)), None)


def tells_parts(config: object) -> bool:
    """Whether a model tells parts of a text apart, by the types of tokens."""
    return (_number(config, "type_vocab_size") or 0) > 1


def most_positions(config: object) -> int | None:
    """How many tokens a text may have, as a config says."""
    found = getattr(text_config(config), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def uses_cache(config: object) -> bool:
    """Whether a model that is not asked returns a cache."""
    return bool(getattr(config, USE_CACHE, True))


def special_tokens(config: Any) -> dict[str, Any]:
    """What a generation config says of tokens that end a text, fill it up, or begin a decoder's."""
    ends = config.eos_token_id
    return {
        "eos_token_id": [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends],
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }


def pads_with_zero(config: object) -> bool:
    """Whether the token for padding is the first of the vocabulary."""
    return getattr(config, "pad_token_id", None) == 0


def decoder_layers(config: object) -> int | None:
    """How many layers a decoder beside an encoder has."""
    return _number(config, "num_decoder_layers", "decoder_layers")


def decoder_heads(config: object) -> int | None:
    """How many heads a decoder beside an encoder has."""
    return _number(config, "decoder_attention_heads")


def layers(config: object) -> int | None:
    """How many layers a model has."""
    return _number(config, "num_hidden_layers", "num_layers")


def heads(config: object) -> int | None:
    """How many heads of queries each layer has."""
    return _number(config, "num_attention_heads")


def key_heads(config: object) -> int | None:
    """How many heads of keys each layer has, where they are fewer."""
    return _number(config, "num_key_value_heads")


def head_size(config: object) -> int | None:
    """How many numbers a head has, where the config says it."""
    return _number(config, "head_dim", "d_kv")


def heads_vary(config: object) -> bool:
    """Whether layers have heads of their own, in number or in size, so that the config has no one answer, and none to
    give: it raises.
    """
    spec = getattr(config, "__dict__", {}).get(_BY_LAYER)
    return not _HEADS.isdisjoint(getattr(spec, "per_layer_attributes", ()))


def width(config: object) -> int | None:
    """How many numbers a token has between layers."""
    return _number(config, "hidden_size", "d_model")


def image_shape(config: object) -> tuple[int, int, int]:
    """Channels, height and width of a model's images."""
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    height, across = size if isinstance(size, list | tuple) else (size, size)
    return int(getattr(vision, "num_channels", 3)), int(height), int(across)


def feature_shape(config: object) -> tuple[int, int]:
    """Bins and frames of a model's spectrograms: its encoder's convolutions halve the frames."""
    positions = getattr(config, "max_source_positions", None)
    return int(getattr(config, "num_mel_bins", 80)), 2 * int(positions or 100)


def is_idle_hook(hook: object) -> bool:
    """Whether a hook is one of transformers' own that has nothing to do while a graph runs.

    `enable_input_require_grads` puts one on embeddings, for checkpointing's sake (peft's has the same name, but for its
    last letter). Those that gather hidden states stay on layers once these were asked for; they act where the model's
    own forward runs, which is while it is traced.
    """
    gathers = getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
    return gathers or getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


def embedding_scale(module: object) -> tuple[Any, float]:
    """What an embedding multiplies its rows by, a tensor or a number; and as a number, where it is a tensor."""
    return getattr(module, "embed_scale", 1.0), float(getattr(module, "scalar_embed_scale", 1.0))


def _stack(root: str, encoder_decoder: bool) -> Stack:
    if not encoder_decoder:
        return Stack.ONLY
    return Stack.DECODER if root.startswith(_DECODER) else Stack.ENCODER


def _number(config: object, *names: str) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _is_cache(annotation: object) -> bool:
    if isinstance(annotation, type):
        return _CACHE_TYPE.fullmatch(annotation.__name__) is not None
    return (isinstance(annotation, str) and _CACHE_TYPE.search(annotation) is not None) or any(
        _is_cache(each) for each in getattr(annotation, "__args__", ())
    )

"""Tiny configs of any type: what a config's class has by default, with every kind of size made small by its name."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, TOKENS, FEW = 64, 4, 128, 4

# The first pattern that a whole name matches says what a number of that name becomes, if it is larger.
SIZES: tuple[tuple[str, int], ...] = (
    (r"num_hidden_layers|(num_)?(encoder|decoder)_(num_)?layers|num_(encoder|decoder)_layers|n_layers?|num_layers", 2),
    (r"depth|layers|num_blocks|\w*_(hidden_)?layers|num_kv_shared_layers|num_mem_blocks|first_k_dense_replace", 2),
    (r"num_key_value_heads|num_kv_heads|num_query_groups|\w*num_key_value_heads|multi_query_group_num", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"n_groups|mamba_n_groups", 2),
    (r"(\w+_)?(num|n)_(\w+_)?heads?|\w*attention_heads|n_head|heads|decoder_cross_attention_heads|n_heads", HEADS),
    (r"qk_rope_head_dim|rotary_dim|qk_pos_emb_head_dim", 8),
    (r"qk_head_dim", 24),
    (r"\w*head_dim|d_kv|head_size|dim_head|d_head|kv_channels|global_head_dim|attention_head_size", 16),
    (r"(kv|q|o|index_q|index_kv)_lora_rank|\w*_rank|mamba_d_state|ssm_state_size|state_size|d_state", 16),
    (r"moe_intermediate_size|\w*expert\w*_(intermediate|ffn_hidden|hidden)_(size|dim)", 32),
    (r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|d_ff|dff", 2 * WIDTH),
    (r"dim_ff|n_inner|d_inner|ffn_hidden_size|mlp_dim", 2 * WIDTH),
    (r"n_routed_experts|num_(local_)?experts|moe_num_experts|n_experts", FEW),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k", 2),
    (r"top_k_experts|n_group|topk_group|n_shared_experts|num_shared_experts", 2),
    (r"\w*(layer|sliding_window|attention)_(period|interval|pattern|freq|every_n)|\w*interval", 2),
    (r"\w*_layer_offset", 1),
    (r"num_codevectors_per_group", 8),
    (r"num_conv_pos_embedding_groups|num_conv_pos_embeddings", 4),
    (r"codevector_dim|proj_codevector_dim|classifier_proj_size|xvector_output_dim", WIDTH),
    (r"hidden_size|d_model|n_embd|(\w+_)?embed_dim|dim|hidden_dim|model_dim|(\w+_)?hidden_(size|dim)|emb_dim", WIDTH),
    (r"adapter_(in|out)_dim|adapter_input_size|backbone_hidden_size|lru_width|attention_hidden_size", WIDTH),
    (r"word_embed_proj_dim|embedding_size|embedding_dim|true_hidden_size|dim_model", WIDTH),
    (r"(projection|(projector_)?(output|input)|vision_output|prompt_mid|conv_output)_(dim|size)", WIDTH),
    (r"(\w+_)?vocab_size(_per_layer_input)?|encoder_hash_byte_group_vocab", TOKENS),
    (r"entity_emb_size|pooler_output_size|output_hidden_size", WIDTH),
    (r"text_hidden_size|conv_channels|intra_bottleneck_size", WIDTH),
    (r"n_positions|max_position_embeddings|max_sequence_length|max_seq_len|n_ctx|max_target_positions", 128),
    (r"max_source_positions", 64),
    (r"sliding_window(_size)?|local_attention|attention_window(_size)?|attention_chunk_size|window_size", 8),
    (r"block_size|chunk_size|mamba_chunk_size", 8),
    (r"image_size|crop_size|max_image_size|max_img_size|pretrain_image_size|resolution|min_image_size", 32),
    (r"patch_size|encoder_stride", 8),
    (r"num_mel_bins|n_mel_bins|num_mel_channels|input_feat_per_channel", 16),
    (r"num_queries|num_query_tokens|num_denoising|num_detection_tokens|two_stage_num_proposals", 8),
    (r"index_topk|index_n_heads|index_topk_blocks|index_block_size", 4),
    (r"mm_tokens_per_image", 4),
    (r"resampler_n_latents|num_latents|latent_query_num", 8),
)  # fmt: skip
NONE = re.compile(r"\w*(dropout\w*|drop_(path|rate|prob)\w*|layer_?drop|mask_(time|feature)_prob|\w+_pdrop|jitter\w*)")
SPECIAL = re.compile(r"_?\w*(token_id|token_index|token_ids|_id|token_offset)")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth", "decoder_layers")
LAYERS = 4
"""At most so many layers, one for each kind of layer that there is; two where all are alike."""


class Shrink:
    """Makes tiny configs. Tokens of special meaning are counted down from the end of the vocabulary."""

    def __init__(self) -> None:
        self.special: dict[int, int] = {}

    def config(self, kind: type[PreTrainedConfig], own: Mapping[str, Any] | None = None) -> PreTrainedConfig:
        """A tiny config of a class; `own` are fields that are to be as they are said, those of parts with dots."""
        return self.like(kind(), own or {})

    def like(self, default: PreTrainedConfig, own: Mapping[str, Any]) -> PreTrainedConfig:
        """A tiny config of the class of this one, which has what its class has by default."""
        fields = {name: value for name, value in vars(default).items() if not name.startswith("_") or name in own}
        fields |= {name: value for name, value in own.items() if "." not in name}
        kept = kept_layers(fields)
        if staged(fields):
            fields = {
                name: value for name, value in fields.items() if name in own or name in STAGED or not plain(value)
            }
        made: dict[str, Any] = {}
        if fields.get("num_key_value_heads") in (fields.get("num_attention_heads"), None):
            fields.pop("num_key_value_heads", None)
            made["num_key_value_heads"] = HEADS
        for name, value in fields.items():
            if name in own:
                made[name] = own[name]
            elif isinstance(value, PreTrainedConfig):
                inner = {key.partition(".")[2]: each for key, each in own.items() if key.startswith(f"{name}.")}
                made[name] = self.like(value, inner)
            else:
                small = self.value(name, value, kept, default)
                if small is not value:
                    made[name] = small
        known = accepted(type(default))
        known = {*vars(default)} if known is None else known & {*vars(default)}
        return type(default)(**{name: value for name, value in made.items() if name in known})

    def value(self, name: str, value: Any, kept: list[int], default: Any) -> Any:
        """What a field becomes."""
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return 16 if name == "head_dim" and value is None else value
        if SPECIAL.fullmatch(name):
            return self.token(value)
        if NONE.fullmatch(name) and isinstance(value, float | int):
            return 0.0 if value else value
        if isinstance(value, int):
            return len(kept) if name in COUNTS[:1] and kept and value > len(kept) else smaller(name, value)
        if isinstance(value, list | tuple):
            return self.items(name, value, kept, default)
        if isinstance(value, dict) and "mrope_section" in value:  # halves of a head of 16, or of the part that turns
            half = int(8 * (value.get("partial_rotary_factor") or 1))
            half = 4 if getattr(default, "qk_rope_head_dim", None) else half
            return value | {"mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]}
        return value

    def items(self, name: str, value: Any, kept: list[int], default: Any) -> Any:
        """What a list becomes: those of the layers that are kept, small numbers, the layers that there are."""
        count = layer_count(vars(default))
        if NONE.fullmatch(name):
            return type(value)(0.0 for _ in value)
        if len(value) == count and count > len(kept) > 0:
            return type(value)(value[at] for at in kept)
        if all(isinstance(each, int) and not isinstance(each, bool) for each in value):
            if re.search(r"index|indices|idxs|(?<!proj_)layers|layer_ids", name):
                return type(value)(dict.fromkeys(min(each, 1) for each in value))
            if re.fullmatch(r"image_size|img_size", name):
                return type(value)(min(each, 32) for each in value)
            if name == "depths" or name.endswith("num_blocks"):
                return type(value)(min(each, 1 if name == "depths" else each) for each in value)
            if name in ("conv_dim", "tdnn_dim"):
                return type(value)(min(each, 16) for each in value)
        return value

    def token(self, value: Any) -> Any:
        """A token of special meaning, within the small vocabulary."""
        if isinstance(value, list | tuple):
            return type(value)(map(self.token, value))
        if not isinstance(value, int) or value < 100:
            return value
        return self.special.setdefault(value, TOKENS - 1 - len(self.special))


STAGED = ("depths", "image_size", "vocab_size")


def staged(fields: Mapping[str, Any]) -> bool:
    """Whether a config is of stages, each with sizes of its own in a list: only how deep they are is made small."""
    names = ("depths", "hidden_sizes", "stage_out_channels", "kernel_sizes", "conv_layer_strides", "block_configs")
    return any(isinstance(fields.get(each), list | tuple) for each in names)


def plain(value: Any) -> bool:
    """Whether a field is a size, or a list of them."""
    return isinstance(value, int | list | tuple) and not isinstance(value, bool)


def smaller(name: str, value: int) -> int:
    """A number of this name made small."""
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, size)
    return value


def layer_count(fields: Mapping[str, Any]) -> int:
    """How many layers a config says it has."""
    return next((fields[name] for name in COUNTS if isinstance(fields.get(name), int)), 0)


def kept_layers(fields: Mapping[str, Any]) -> list[int]:
    """The layers that a tiny model keeps: one of each kind, two at least."""
    count = layer_count(fields)
    named = [value for name, value in fields.items() if isinstance(value, list | tuple) and len(value) == count > 2]
    kinds = [tuple(str(each[at]) for each in named) for at in range(count)] if named else []
    first = sorted({kinds.index(each) for each in kinds})[:LAYERS]
    if len(first) < 2:
        first = list(range(min(2, count)))
    return first


def accepted(kind: type) -> set[str] | None:
    """The names that a config's class takes; None where it takes all."""
    fields = getattr(kind, "__dataclass_fields__", None)
    return None if fields is None else {name for name, each in fields.items() if each.init}

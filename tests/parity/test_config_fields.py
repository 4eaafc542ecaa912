"""Every field of every config class of peft, of a fresh adapter: followed, idle for a reason, or refused by name."""

import dataclasses
import enum

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peftc.grammar.diagnostics import CheckpointError
from peftc.grammar.spec.library import builtin_methods
from peftc.passes.foreign import peft as fields
from peftc.runtime.model.described import described
from peftc.runtime.peft_config.peft_rule import any_fields, placed_fields

# What a config of the type needs to be one.
NEEDED = {
    "ADALORA": {"total_step": 100},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2], "task_type": "CAUSAL_LM"},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
}

# Values other than what is there, where its type does not say any.
OTHERS: dict[str, tuple[object, ...]] = {
    "task_type": ("SEQ_CLS", "unheard_of"),
    "auto_mapping": ({"base_model_class": "Net", "parent_library": "net"},),
    "base_model_name_or_path": ("some/model",),
    "revision": ("main",),
    "target_modules": (["first"], ".*first", "all-linear"),
    "exclude_modules": (["first"], ".*first"),
    "target_parameters": (["first.weight"],),
    "layers_to_transform": ([0], 1),
    "layers_pattern": ("layers", ["layers"]),
    "modules_to_save": (["norm"],),
    "bias": ("all", "unheard_of"),
    "rank_pattern": ({"first": 2},),
    "alpha_pattern": ({"first": 2},),
    "lambda_pattern": ({"first": 2},),
    "n_frequency_pattern": ({"first": 2},),
    "block_size_pattern": ({"first": 2},),
    "megatron_config": ({"tensor_model_parallel_size": 2},),
    "megatron_core": ("other.core",),
    "trainable_token_indices": ([1], {"embed": [1]}),
    "loftq_config": ({"loftq_bits": 4, "loftq_iter": 5},),
    "eva_config": ({"rho": 1.5},),
    "corda_config": ({"corda_method": "kpm"},),
    "lora_ga_config": ({"direction": "ArBr"},),
    "velora_config": ({"scale": 2.0},),
    "alora_invocation_tokens": ([1, 2],),
    "monteclora_config": ({"num_samples": 2},),
    "layer_replication": ([[0, 2], [1, 2]],),
    "runtime_config": ({"ephemeral_gpu_offload": True},),
    "use_bdlora": ({"nblocks": 2},),
    "arrow_config": ({"top_k": 2},),
    "kasa_config": ({"beta": 0.1},),
    "feedforward_modules": (["first"], ".*first"),
    "alpha": (3,),
    "random_seed": (3,),
    "generator_seed": (3,),
    "cayley_neumann_eps": (0.5,),
    "r": (3,),
    "lora_alpha": (3,),
    "encoder_hidden_size": (16,),
    "token_dim": (16,),
    "num_attention_heads": (3,),
    "num_layers": (7,),
    "num_virtual_tokens": (5,),
    "num_transformer_submodules": (2,),
    "prompt_tuning_init_text": ("some text",),
    "prompt_tuning_init_state_dict_path": ("some.bin",),
    "tokenizer_name_or_path": ("some/tokenizer",),
    "tokenizer_kwargs": ({"use_fast": False},),
    "cpt_mask": ([1, 0],),
    "cpt_token_ids": ([3, 4, 5],),
    "cpt_tokens_type_mask": ([2, 2],),
    "token_indices": ([3],),
    "peft_version": ("0.1.0",),
    "init_weights": (False, "zero", "gaussian", "unheard_of", 3),
    "init_ia3_weights": (False, "unheard_of"),
    "init_lora_weights": (
        *(False, "gaussian", "pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva", "lora_ga", "mica"),
        *("orthogonal", "unheard_of"),
    ),
    "prompt_tuning_init": ("SAMPLE_VOCAB", "TEXT", "unheard_of"),
    "encoder_reparameterization_type": ("LSTM",),
    "variant": ("road_2", "unheard_of"),
    "wavelet_family": ("db2", "unheard_of"),
    "act_fn": ("gelu",),
    "decomposition_method": ("qr", "unheard_of"),
    "config_A_B": ("vector", "unheard_of"),
    "config_C": ("vector", "unheard_of"),
    "config_D_E": ("vector", "unheard_of"),
    "ab_svd_init": ("pissa_init", "unheard_of"),
    "psoft_svd": ("lowrank", "unheard_of"),
    "mask_type": ("unheard_of",),
    "opt_weighted_loss_type": ("decay",),
    "adapter_len": (5,),
    "adapter_layers": (2,),
}
TYPES = {rule.peft_type for rule in builtin_methods().values()}
KNOWN = {str(kind.value): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value in TYPES}
FOREIGN = {str(kind.value): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value not in TYPES}


def _plain(value):
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else value


def _defaults(kind):
    made = {}
    for each in dataclasses.fields(KNOWN[kind]):
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        made[each.name] = _plain(default)
    return {**made, "peft_type": kind, **NEEDED.get(kind, {})}


def _others(name, value):
    if name in OTHERS:
        return [each for each in OTHERS[name] if each != value]
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [value + 1, value / 2 + 0.25] if isinstance(value, float) else [value + 1]
        case str():
            return ["unheard_of"]
    raise AssertionError(f"no other value of {name!r} is known: {value!r}")


def _described(config):
    """What the config means, or why it is refused."""
    try:
        return described(config)
    except CheckpointError as error:
        return str(error)


PROBES = [
    pytest.param(kind, name, other, id=f"{kind}-{name}-{other}")
    for kind in sorted(KNOWN)
    for name, value in _defaults(kind).items()
    if name != "peft_type"
    for other in _others(name, value)
    if other != value
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name", "other"), PROBES)
def test_no_field_is_passed_over(kind, name, other):
    usual = described(_defaults(kind))
    found = _described(_defaults(kind) | {name: other})
    if isinstance(found, str):
        assert f"'{name}'" in found
        return
    (rule,) = {each.rule for each in found.spec.adapters}
    followed = found.spec != usual.spec or found.facts != usual.facts
    if name in fields.HARMLESS or (name in any_fields(rule) and name in fields.IDLE):
        assert found.spec == usual.spec
        return
    assert followed, f"{name} = {other!r} is passed over"


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_a_type_that_is_not_known_is_refused(kind):
    with pytest.raises(CheckpointError, match=r"E328.*" + kind):
        described({"peft_type": kind, "target_modules": ["first"]})


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_a_config_of_defaults_is_taken(kind):
    (adapter,) = described(_defaults(kind)).spec.adapters
    assert adapter.rule.peft_type == kind


@pytest.mark.parametrize("name", sorted({*fields.IDLE, *fields.FRESH_ONLY}))
def test_what_is_said_of_idle_fields_is_of_fields_that_there_are(name):
    held = {field for rule in builtin_methods().values() for field in any_fields(rule)}
    assert name in held or name == "save_only_topk_weights"


def test_sizes_of_a_place_are_checked_against_the_model():
    names = {name for rule in builtin_methods().values() for name in placed_fields(rule)}
    assert names == {"token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"}
    assert peft.PrefixTuningConfig(num_virtual_tokens=2, num_layers=3).num_layers == 3

"""From a PEFT configuration to sites and back: the same modules, ranks and keys as PEFT itself."""

import warnings

import peft
import pytest
from peft.utils.save_and_load import get_peft_model_state_dict

from peftc.grammar.spec.library import builtin_methods
from peftc.passes.plan.resolve import resolve, survey
from peftc.runtime.peft_config.peft_config import read_config, write_config
from peftc.runtime.peft_format.checkpoint import entries

CONFIGS = {
    "names": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "paths": ("llama", {"target_modules": ["layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]}),
    "a pattern": ("llama", {"target_modules": r".*layers\.1.*(q|up)_proj"}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "all linear but some": ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj", "0.mlp.up_proj"]}),
    "excluded by a pattern": ("llama", {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}),
    "one layer": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
    "layers, and one exactly": (
        "llama",
        {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"], "layers_to_transform": [0]},
    ),
    "layers by pattern": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    "defaults": ("llama", {"target_modules": None}),
    "defaults of bert": ("bert", {"target_modules": None}),
    "conv1d and embedding": ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "ranks": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 3, ".*layers.1.*": 4},
            "alpha_pattern": {"^model.layers.1.mlp.up_proj": 5},
        },
    ),
    "a classifier": (
        "bert",
        {"target_modules": "all-linear", "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
    ),
    "a trained head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "biases of adapted": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "modules named like parameters": ("qwen3_moe", {"target_modules": ["q_proj", "gate", "down_proj"]}),
    "parameters": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
            "rank_pattern": {"experts.down_proj": 2, "q_proj": 3},
        },
    ),
}

# For models whose experts became parameters, PEFT changes the configuration; what it saves is the changed one.
REWRITTEN_BY_PEFT = {"modules named like parameters"}


def shapes(adapted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def ours(model, config):
    saved = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    facts = read_config(saved, methods=builtin_methods(), adapter_name="default", where="adapter_config.json")
    return resolve(facts.spec, survey(model))


@pytest.mark.parametrize("case", CONFIGS)
def test_sites_values_and_keys_are_pefts(case, tiny):
    kind, options = CONFIGS[case]
    model = getattr(tiny, kind)()
    theirs = peft.get_peft_model(getattr(tiny, kind)(), peft.LoraConfig(r=6, lora_alpha=12, **options))
    expected = shapes(theirs)
    plan = ours(model, theirs.peft_config["default"].to_dict())
    if case not in REWRITTEN_BY_PEFT:
        given = ours(model, peft.LoraConfig(r=6, lora_alpha=12, **options).to_dict())
        assert (given.sites, given.copies) == (plan.sites, plan.copies)
    assert {key: entry.shape for key, entry in entries(plan).items()} == expected
    for planned in plan.sites:
        if planned.site.kind != "parameter":
            layer, values = theirs.base_model.model.get_submodule(planned.site.name), dict(planned.bound.values)
            assert (layer.r["default"], layer.lora_alpha["default"]) == (values["rank"], values["alpha"])

    written = write_config(
        plan,
        module_names=[name for name, _ in model.named_modules() if name],
        base_model_name_or_path=None,
        task_type=options.get("task_type"),
    )
    again = peft.get_peft_model(
        getattr(tiny, kind)(), peft.LoraConfig(**{name: each for name, each in written.items() if name != "peft_type"})
    )
    assert shapes(again) == expected
    reread = ours(model, written)
    assert [(each.site, dict(each.bound.values)) for each in reread.sites] == [
        (each.site, dict(each.bound.values)) for each in plan.sites
    ]
    assert reread.copies == plan.copies

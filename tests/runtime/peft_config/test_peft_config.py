"""adapter_config.json both ways, with peft as the judge."""

import json
import re

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from peftc.grammar.diagnostics import CheckpointError
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.spec import Target
from peftc.grammar.spec.values import complete
from peftc.grammar.syntax import tree
from peftc.passes.foreign import peft as peft_fields
from peftc.runtime.peft_config.peft_config import read_config, write_config
from peftc.runtime.peft_format.peft_names import layered_selector, minimal_endings, minimal_suffixes, value_pattern

MODULE = tree.Unary("not", tree.Name("parameter"))


@pytest.fixture
def read(plan):
    def reading(**config):
        return read_config(
            {"peft_type": "LORA", "target_modules": ["q_proj"], **config},
            methods={"lora": plan.rule},
            adapter_name="mine",
            where="adapter_config.json",
        )

    return reading


def path(*segments, **indices):
    return tree.PathSelector(
        tuple(
            tree.Segment((each,), indices=(tree.Index(indices[each]),) if each in indices else None)
            for each in segments
        )
    )


def module_names(model):
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def refusal(read, **config):
    with pytest.raises(CheckpointError) as caught:
        read(**config)
    return str(caught.value)


# --- reading ---


def test_fields_become_hyperparameters(read, plan):
    facts = read(r=4, lora_alpha=16, lora_dropout=0.1, use_rslora=True)
    given = {"rank": 4, "alpha": 16, "dropout": 0.1, "rslora": True}
    assert dict(facts.spec.values) == {**dict(complete(plan.rule, ())), **given}
    assert facts.spec.rule is plan.rule
    assert facts.spec.name == "mine"
    assert not facts.spec.strict


def test_absent_fields_take_the_methods_defaults(read, plan):
    assert read().spec.values == complete(plan.rule, ())


def test_facts_that_are_not_in_a_spec(read):
    facts = read(
        base_model_name_or_path="some/model",
        revision="abc",
        task_type="CAUSAL_LM",
        inference_mode=True,
        auto_mapping={"base_model_class": "X"},
        peft_version="99.1.0",
    )
    assert (facts.base_model_name_or_path, facts.revision, facts.task_type) == ("some/model", "abc", "CAUSAL_LM")
    assert facts.inference_mode
    assert facts.auto_mapping == {"base_model_class": "X"}
    assert "99.1" in facts.warnings[0]
    assert read(peft_version="0.7.0").warnings == ()


@pytest.mark.parametrize(
    ("given", "selectors"),
    [
        (["v_proj", "q_proj"], (path("q_proj"), path("v_proj"))),
        (["layers.3.self_attn.q_proj"], (path("layers", "self_attn", "q_proj", layers=3),)),
        (["to-k"], (tree.PatternSelector(r"(.*\.)?to\-k"),)),
        (["0.weird"], (tree.PatternSelector(r"(.*\.)?0\.weird"),)),
        ("all-linear", (tree.AllSelector("linear"),)),
        (".*(q|v)_proj", (tree.PatternSelector(".*(q|v)_proj"),)),
    ],
)
def test_target_modules(read, given, selectors):
    where = None if given == "all-linear" else MODULE
    assert read(target_modules=given).spec.on == (Target(selectors, where=where),)


def test_no_target_modules_mean_the_methods_defaults(read):
    assert read(target_modules=None).spec.on == ()


def test_target_parameters_choose_parameters(read):
    spec = read(target_modules=[], target_parameters=["experts.up", "experts.down"]).spec
    chosen = (path("experts", "down"), path("experts", "up"))
    held = tree.Binary("or", tree.Name("parameter"), tree.Name("multihead_attention"))
    assert spec.on == (Target(chosen, where=held),)


def test_target_parameters_choose_weights_of_linear_layers_too(read):
    on = read(target_modules=[], target_parameters=["experts.up", "gate.weight"]).spec.on
    assert on[1:] == (Target((path("gate"),), where=tree.Name("linear")),)


def test_other_clauses(read):
    spec = read(exclude_modules=["k_proj"], modules_to_save=["classifier", "score"], bias="lora_only").spec
    assert spec.skip == (Target((path("k_proj"),), where=MODULE),)
    assert spec.train == (tree.PatternSelector(".*classifier"), tree.PatternSelector(".*score"))
    assert spec.bias == "adapter"
    assert read(exclude_modules=".*k").spec.skip == (Target((tree.PatternSelector(".*k"),), where=MODULE),)


def test_patterns_are_turned_round_because_the_first_wins_in_peft(read):
    spec = read(rank_pattern={"layers.0.q_proj": 4, "^model.*q_proj": 2}, alpha_pattern={"q_proj": 32}).spec
    assert spec.refine == (
        Target((path("q_proj"),), overrides=(("alpha", 32),)),
        Target((tree.PatternSelector(r"(.*\.)?(^model.*q_proj)"),), overrides=(("rank", 2),)),
        Target((path("layers", "q_proj", layers=0),), overrides=(("rank", 4),)),
    )


def test_equal_pattern_keys_become_one_refinement(read):
    spec = read(rank_pattern={"a": 4, "b": 2}, alpha_pattern={"a": 8, "b": 9}).spec
    assert spec.refine == (
        Target((path("b"),), overrides=(("rank", 2), ("alpha", 9))),
        Target((path("a"),), overrides=(("rank", 4), ("alpha", 8))),
    )


NAMES = [
    "q_proj",
    "layers.0.q_proj",
    "layers.2.q_proj",
    "model.layers.0.q_proj",
    "model.layers.2.self_attn.q_proj",
    "model.layers.12.self_attn.q_proj",
    "model.layers.1.experts.0.q_proj",
    "model.layers.2.experts.1.q_proj",
    "encoder.block.0.layer.2.q_proj",
    "encoder.block.2.layer.0.q_proj",
    "a.0.b.2.q_proj",
    "model.layers.2.q_projection",
    "model.layers.2.my_q_proj",
    "model.layers.2",
    "model.v.q_proj",
    "x.layers.q_proj.2.q_proj",
    "model.h.2.k.0.v_proj",
]


@pytest.mark.parametrize("layers", [[0], [2], [0, 2], [1, 12]])
@pytest.mark.parametrize("patterns", [None, "layers", ["layer", "block"], ["block", "layer"], ["h", "layers"], "(h|k)"])
@pytest.mark.parametrize("targets", [["q_proj"], ["layers.2.q_proj", "v_proj"], ["model.layers.2.self_attn.q_proj"]])
def test_layers_are_those_peft_finds(layers, patterns, targets):
    config = peft.LoraConfig(target_modules=targets, layers_to_transform=layers, layers_pattern=patterns)
    listed = [patterns] if isinstance(patterns, str) else patterns or []
    selector = layered_selector(targets, layers, listed)
    for name in NAMES:
        assert bool(re.fullmatch(selector.pattern, name)) == bool(check_target_module_exists(config, name)), name


def test_layers_to_transform_are_read(read):
    (target,) = read(layers_to_transform=1, layers_pattern="layers").spec.on
    (selector,) = target.selectors
    assert re.fullmatch(selector.pattern, "model.layers.1.self_attn.q_proj")
    assert not re.fullmatch(selector.pattern, "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("field", "init"),
    [(True, "default"), (False, "random"), ("gaussian", "gaussian")],
)
def test_how_weights_started_is_kept_and_changes_nothing_else(read, field, init):
    found = dict(read(init_lora_weights=field).spec.values)
    assert found == {**dict(read().spec.values), "init": init}


def test_everything_peft_writes_by_default_is_read(read):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"]).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    assert read(**config).spec == read(r=4).spec


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORRA"}, "PEFT type \"LORRA\" is not supported yet\n  help: did you mean 'LORA'?"),
        ({"peft_type": None}, "not a PEFT adapter_config.json"),
        ({"peft_type": 3}, "PEFT type 3 is not supported yet\n  help: supported: LORA"),
        ({"r": "eight"}, "field 'r' = \"eight\" is not a whole number"),
        ({"r": True}, "field 'r' = true is not a whole number"),
        ({"r": 2.5}, "field 'r' = 2.5 is not a whole number"),
        ({"lora_alpha": float("inf")}, "field 'lora_alpha' = Infinity is not a number"),
        ({"use_rslora": 1}, "field 'use_rslora' = 1 is not true or false"),
        ({"target_modules": 5}, "field 'target_modules' = 5 is not a text or a list of texts"),
        ({"target_modules": ["q", 5]}, "field 'target_modules' = [\"q\", 5] is not a text or a list of texts"),
        ({"target_modules": "(q"}, "'(q' is not a regular expression"),
        ({"target_modules": []}, "the adapter adapts nothing"),
        ({"target_modules": None, "modules_to_save": ["x"]}, "'target_modules' is not given"),
        ({"target_parameters": "experts"}, "field 'target_parameters' = \"experts\" is not a list of texts"),
        ({"modules_to_save": "head"}, "field 'modules_to_save' = \"head\" is not a list of texts"),
        ({"bias": "some"}, "field 'bias' = \"some\" is not one of none, all, lora_only"),
        ({"rank_pattern": {"q": "x"}}, "field 'rank_pattern': 'q' = \"x\" is not a whole number"),
        ({"rank_pattern": {"(q": 2}}, "'(q' is not a regular expression"),
        ({"rank_pattern": [1]}, "field 'rank_pattern' = [1] is not an object"),
        ({"layers_to_transform": "all"}, "field 'layers_to_transform' = \"all\" is not a layer's index"),
        ({"layers_to_transform": 1, "target_modules": ".*q"}, "needs 'target_modules' to be a list"),
        ({"use_dora": True}, "field 'use_dora' = true is not supported by method 'lora': only false"),
        ({"layer_replication": [[0, 2]]}, "field 'layer_replication' = [[0, 2]] is not supported yet"),
        ({"trainable_token_indices": ["a"]}, "is not a list of whole numbers, or one for each module"),
        ({"init_lora_weights": "pissa_niter_4"}, "this initialisation may have changed the base weights"),
        ({"init_lora_weights": 3}, "field 'init_lora_weights' = 3 is not true, false or a text"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"use_dorra": True}, "unknown field 'use_dorra' = true\n  help: did you mean 'use_dora'"),
    ],
)
def test_refusals(read, config, message):
    text = refusal(read, **config)
    assert message in text
    assert text.startswith("adapter_config.json: error[E32")


def test_all_problems_are_reported_at_once(read):
    text = refusal(read, r="x", use_dora=True, bias=3, nonsense=1)
    assert text.count("error[") == 4


def test_unknown_fields_that_say_nothing_are_ignored(read):
    assert read(brand_new=None, another=False, third={}, fourth=[]).spec == read().spec


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["(", "all", "^.*q$"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted({*peft_fields.HANDLED, *peft_fields.HARMLESS, "r", "lora_alpha", "init_lora_weights", "nonsense"})


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6))
def test_any_json_is_read_or_refused(config):
    codes: list[str] = []
    try:
        read_config({"peft_type": "LORA", **config}, methods=builtin_methods(), adapter_name="a", where="it")
    except CheckpointError as error:
        codes = [each.code for each in error.diagnostics]
    assert all(each.startswith("E32") for each in codes)


# --- writing ---

Q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
UP = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]


def written(plan, model, task_type=None, **options):
    return write_config(
        plan, module_names=module_names(model), base_model_name_or_path="base", task_type=task_type, **options
    )


def test_written_fields(tiny, plan):
    model = tiny.llama()
    config = written(plan(model, Q, rank=4, alpha=16.0, dropout=0.05), model, "CAUSAL_LM", revision="abc")
    assert config == {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "revision": "abc",
        "inference_mode": True,
        "target_modules": ["q_proj"],
        "target_parameters": None,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "init_lora_weights": True,
    }
    assert isinstance(config["lora_alpha"], int)


@pytest.mark.parametrize(
    ("sites", "targets"),
    [
        ([*Q, *UP], ["q_proj", "up_proj"]),
        ([Q[0], *UP], ["0.self_attn.q_proj", "up_proj"]),
        ([UP[1]], ["1.mlp.up_proj"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_targets_are_minimal_and_peft_finds_exactly_them(tiny, plan, sites, targets):
    model = tiny.llama()
    config = written(plan(model, sites), model)
    assert config["target_modules"] == targets
    assert peft_sites(model, config) == set(sites)


def peft_sites(model, config):
    """The modules PEFT adapts, by their own names."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**without_type(config)))
    return set(adapted.targeted_module_names) | set(adapted.targeted_parameter_names)


def without_type(config):
    return {name: value for name, value in config.items() if name != "peft_type"}


def test_names_no_list_can_tell_apart_become_a_pattern():
    assert minimal_suffixes(["head"], ["head", "decoder.head"]) is None
    assert minimal_suffixes(["decoder.head"], ["head", "decoder.head"]) == ("decoder.head",)


def test_patterns_give_every_site_its_own_values(tiny, plan):
    model = tiny.llama()
    by_site = {Q[0]: {"rank": 4, "alpha": 1}, UP[0]: {"rank": 2}, UP[1]: {"rank": 2}}
    planned = plan(model, [*Q, *UP, "lm_head"], by_site=by_site, rank=8, alpha=16)
    config = written(planned, model)
    assert config["alpha_pattern"] == {"0.self_attn.q_proj": 1}
    assert config["rank_pattern"]["0.self_attn.q_proj"] == 4
    adapted = peft.get_peft_model(model, peft.LoraConfig(**without_type(config)))
    for each in planned.sites:
        layer = adapted.base_model.model.get_submodule(each.site.name)
        values = dict(each.bound.values)
        assert (layer.r["default"], layer.lora_alpha["default"]) == (values["rank"], values["alpha"])


@pytest.mark.parametrize(
    "values",
    [
        {"q": 1, "a.q": 2, "b.q": 2},
        {"m.1.q": 1, "m.11.q": 2, "m.21.q": 2, "n.1.q": 3},
        {"a.b": 1, "axb": 2, "c": 2, "d.axb": 2},
    ],
)
def test_pattern_keys_under_pefts_first_hit_rule(values):
    default, keys = value_pattern(values)
    for name, value in values.items():
        assert keys.get(get_pattern_key(keys, name), default) == value


def test_what_peft_cannot_hold_is_refused(tiny, plan):
    model = tiny.llama()
    with pytest.raises(CheckpointError, match=r"one 'lora_dropout' for all modules"):
        written(plan(model, Q, by_site={Q[0]: {"dropout": 0.5}}), model)


def test_modules_to_save_end_like_no_other_module(tiny, plan):
    model = tiny.llama()
    assert written(plan(model, Q, train=["lm_head"]), model)["modules_to_save"] == ["lm_head"]
    assert minimal_endings(["head"], ["head", "lm_head"], []) is None
    assert minimal_endings(["a.norm"], ["a.norm", "b.norm"], []) == ("a.norm",)
    assert minimal_endings(["x.mlp"], ["x.mlp", "x.mlp.up"], ["y.mlp.up"]) == ("x.mlp",)


def test_a_task_that_would_train_another_head_is_left_out(tiny, plan):
    model = tiny.bert()
    query = ["bert.encoder.layer.0.attention.self.query"]
    assert written(plan(model, query), model, "SEQ_CLS")["task_type"] is None
    assert written(plan(model, query, train=["classifier"]), model, "SEQ_CLS")["task_type"] == "SEQ_CLS"


def test_conv1d_and_parameters(tiny, plan):
    gpt2 = tiny.gpt2()
    config = written(plan(gpt2, ["transformer.wte", "transformer.h.0.attn.c_attn"]), gpt2)
    assert config["fan_in_fan_out"] is True
    model = tiny.qwen3_moe()
    sites = [f"model.layers.{i}.mlp.experts.{leaf}" for i in range(2) for leaf in ("gate_up_proj", "down_proj")]
    config = written(plan(model, sites, by_site={sites[1]: {"rank": 2}}), model)
    assert config["target_modules"] == []
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["rank_pattern"] == {"0.mlp.experts.down_proj": 2}
    assert peft_sites(model, config) == set(sites)
    only = written(plan(tiny.qwen3_moe(), [sites[0]]), model)
    assert only["target_parameters"] == ["0.mlp.experts.gate_up_proj"]


def test_what_is_written_is_read_back(tiny, plan, read):
    model = tiny.llama()
    planned = plan(model, Q, rank=4, train=["lm_head"], bias="adapter", by_site={Q[1]: {"rank": 2}})
    spec = read(**json.loads(json.dumps(written(planned, model)))).spec
    assert dict(spec.values) == dict(planned.spec.values)
    assert spec.on == (Target((path("q_proj"),), where=MODULE),)
    assert spec.bias == "adapter"
    assert spec.train == (tree.PatternSelector(".*lm_head"),)
    assert [dict(each.overrides) for each in spec.refine] == [{"rank": 2}]

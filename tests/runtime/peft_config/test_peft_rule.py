"""Fields of adapter_config.json and a method's hyperparameters, both ways."""

import pytest
import torch
from torch import nn

from peftc.grammar.diagnostics import CheckpointError, UsageError
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.library import builtin_methods
from peftc.passes.foreign.peft import task_of
from peftc.passes.plan.resolve import resolve, survey
from peftc.runtime.peft_config.peft_config import read_config, write_config
from peftc.runtime.peft_config.peft_rule import (
    constant_fields,
    decided_fields,
    deciding_value,
    listed_fields,
    mapped_fields,
    mismatches,
    pattern_fields,
    placed_fields,
    same,
    undecided,
    with_values,
)

TEXT = """method m(rank: int = 8, s: float = 2, deep: bool = false, how: text("plain", "odd", "even") = "plain") {
    on   linear
    param A[rank, in]  = zeros saved "A"
    param B[out, rank] = zeros saved "B"
    W'   = W + s * (B @ A) if deep or how == "odd" else W + (B @ A) / s
    peft M { r = rank by rank_pattern, scale = s by scale_pattern, deep_modules = modules(deep), note = any,
        kind = "m", old = none, odd = how == "odd", style = none if how == "plain" else how }
}"""


@pytest.fixture(scope="module")
def rule():
    return read_spec(f"{TEXT} adapter a = m {{ on q }}").adapters[0].rule


def read(rule, **config):
    config = {"peft_type": "M", "target_modules": ["q", "v"], **config}
    return read_config(config, methods={"m": rule}, adapter_name="a", where="it").spec


def refusal(rule, **config):
    with pytest.raises(CheckpointError) as caught:
        read(rule, **config)
    return str(caught.value)


def test_what_each_field_is(rule):
    assert {name: each.name for name, each in mapped_fields(rule).items()} == {"r": "rank", "scale": "s"}
    assert constant_fields(rule) == {"kind": "m", "old": None}
    assert {name: [each.name for each in found] for name, found in decided_fields(rule).items()} == {
        "how": ["odd", "style"]
    }
    assert listed_fields(rule) == {"deep_modules": "deep"}
    assert pattern_fields(rule) == {"r": "rank_pattern", "scale": "scale_pattern"}


@pytest.mark.parametrize(
    ("config", "value"),
    [
        ({}, "plain"),
        ({"odd": False}, "plain"),
        ({"odd": False, "style": None}, "plain"),
        ({"odd": True}, "odd"),
        ({"odd": True, "style": "odd"}, "odd"),
        ({"style": "even"}, "even"),
    ],
)
def test_a_value_that_explains_all_its_fields(rule, config, value):
    assert deciding_value(config, rule, "how") == (value,)
    assert dict(read(rule, **config).values)["how"] == value
    assert undecided(config, rule) == []


@pytest.mark.parametrize("config", [{"odd": True, "style": "even"}, {"odd": 1}, {"style": "new"}, {"style": [1]}])
def test_fields_that_nothing_explains(rule, config):
    assert undecided(config, rule) == list(config)
    for name in config:
        assert f"field '{name}' = " in refusal(rule, **config)
        assert "is not known to method 'm'" in refusal(rule, **config)


def test_constants(rule):
    assert mismatches({"kind": "m", "old": None}, rule) == []
    assert mismatches({"kind": "n", "old": 3}, rule) == [("kind", "m"), ("old", None)]
    assert "field 'kind' = \"n\" is not supported by method 'm': only \"m\"" in refusal(rule, kind="n")
    assert "field 'old' = 3 is not supported by method 'm': only null" in refusal(rule, old=3)


def test_any_takes_anything(rule):
    assert read(rule, note={"a": [1]}) == read(rule) == read(rule, note="x")


def test_one_is_not_true():
    assert same(1, 1.0)
    assert not same(True, 1)
    assert not same(0, False)


def test_modules_at_which_a_flag_is_true(rule):
    spec = read(rule, deep_modules=["v", "layers.0.q"])
    assert [each.overrides for each in spec.refine] == [(("deep", True),)]
    assert len(spec.refine[0].selectors) == 2
    assert [each.overrides for each in read(rule, deep_modules=".*v").refine] == [(("deep", True),)]
    assert read(rule, deep_modules=[]).refine == ()
    assert "field 'deep_modules' = 3 is not" in refusal(rule, deep_modules=3)


def test_patterns_of_its_own(rule):
    spec = read(rule, rank_pattern={"q": 2}, scale_pattern={"v": 3})
    assert sorted(each.overrides for each in spec.refine) == [(("rank", 2),), (("s", 3.0),)]
    assert "field 'alpha_pattern' is not supported for PEFT type M" in refusal(rule, alpha_pattern={"q": 2})
    assert "field 'scale_pattern': 'q' = \"x\" is not a number" in refusal(rule, scale_pattern={"q": "x"})


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(self.q(x))


def planned(clauses, **values):
    given = ", ".join(f"{name} = {value}" for name, value in values.items())
    spec = read_spec(f"{TEXT} adapter a = m({given}) {{ on q, v {clauses} }}").adapters[0]
    return resolve(spec, survey(Two()))


def written(plan):
    names = [name for name, _ in Two().named_modules() if name]
    return write_config(plan, module_names=names, base_model_name_or_path=None, task_type=None)


def test_written_and_read_back(rule):
    plan = planned("refine v with deep = true, rank = 2, s = 1.5", how='"odd"', rank=4)
    config = written(plan)
    assert {name: config[name] for name in ("r", "rank_pattern", "scale", "scale_pattern", "deep_modules")} == {
        "r": 4,
        "rank_pattern": {"v": 2},
        "scale": 2,
        "scale_pattern": {"v": 1.5},
        "deep_modules": ["v"],
    }
    assert (config["odd"], config["style"], config["kind"], config["old"]) == (True, "odd", "m", None)
    assert "note" not in config
    again = resolve(read(rule, **config), survey(Two()))
    assert [each.bound for each in again.sites] == [each.bound for each in plan.sites]


def test_what_one_field_cannot_say_of_two_sites():
    with pytest.raises(CheckpointError, match="one 'odd' for all modules, but 'how' differs between sites"):
        written(planned('refine v with how = "odd"', rank=2))


LISTS = read_spec(
    """method m(ids: ints = [0], types: ints = none) {
    on      prompt
    const   I[len(ids)]      = listed(ids)                               recomputed
    const   T[len(ids)]      = listed(types) if types != none else zeros recomputed
    param   P[len(ids), out] = zeros                                     saved "P"
    prompt' = P
    labels' = I + T
    peft    M { token_ids = ids, type_mask = types }
}
adapter a = m"""
)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({}, {"ids": (0,), "types": None}),
        ({"token_ids": [7, 3], "type_mask": None}, {"ids": (7, 3), "types": None}),
        ({"token_ids": [], "type_mask": [1]}, {"ids": (), "types": (1,)}),
    ],
)
def test_a_field_that_is_a_list(config, values):
    assert dict(read(LISTS.adapters[0].rule, **config).values) == values


@pytest.mark.parametrize("raw", [3, "x", [1.0], [True], ["3"], {"a": 1}])
def test_a_field_that_is_no_list(raw):
    assert "is not a list of whole numbers" in refusal(LISTS.adapters[0].rule, token_ids=raw)


def test_a_list_is_written_as_one():
    model = nn.Module()
    model.embed = nn.Embedding(9, 4)
    model.get_input_embeddings = lambda: model.embed
    spec = read_spec(LISTS.source.text + "(ids = [4, 2])").adapters[0]
    config = write_config(
        resolve(spec, survey(model)), module_names=["embed"], base_model_name_or_path=None, task_type=None
    )
    assert config["token_ids"] == [4, 2]
    assert config["type_mask"] is None


def test_other_values(rule):
    spec = read_spec(f"{TEXT} adapter a = m(rank = 4) {{ on q  refine q with s = 3 }}").adapters[0]
    found = with_values(spec, {"s": 5, "how": "odd", "deep": True})
    assert dict(found.values) == dict(spec.values) | {"s": 5.0, "how": "odd", "deep": True}
    assert isinstance(dict(found.values)["s"], float)
    assert (found.name, found.on, found.refine) == (spec.name, spec.on, spec.refine)
    assert with_values(spec, {}) == spec


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rnak": 2}, "method 'm' has no hyperparameter 'rnak'"),
        ({"rank": 2.5}, "rank = 2.5 is not a whole number"),
        ({"rank": True}, "rank = True is not a whole number"),
        ({"deep": 1}, "deep = 1 is not"),
        ({"how": "new"}, "how = 'new' is not one of plain, odd, even"),
        ({"s": float("inf")}, "s = inf is not a number"),
    ],
)
def test_other_values_that_are_refused(rule, values, says):
    spec = read_spec(f"{TEXT} adapter a = m {{ on q }}").adapters[0]
    with pytest.raises(UsageError) as caught:
        with_values(spec, values)
    (found,) = caught.value.diagnostics
    assert found.code == "E568"
    assert found.message.startswith(says)
    if "rnak" in values:
        assert found.help == "did you mean 'rank'?"


def test_sizes_of_the_place():
    """Fields whose name stands for no hyperparameter, but for what a method sees of the model."""
    methods = builtin_methods()
    assert placed_fields(methods["prefix"]) == {
        "token_dim": "in",
        "num_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_transformer_submodules": "num_stacks",
    }
    assert placed_fields(methods["prompt"])["token_dim"] == "out"
    assert "num_transformer_submodules" not in placed_fields(methods["prompt"]), "a hyperparameter there"
    assert placed_fields(methods["lora"]) == {}


@pytest.mark.parametrize(
    ("classes", "task"),
    [
        (("LlamaForCausalLM", "LlamaPreTrainedModel"), "CAUSAL_LM"),
        (("GPT2LMHeadModel",), "CAUSAL_LM"),
        (("T5ForConditionalGeneration",), "SEQ_2_SEQ_LM"),
        (("Mine", "BertForSequenceClassification", "BertModel"), "SEQ_CLS"),
        (("BertForTokenClassification",), "TOKEN_CLS"),
        (("BertForQuestionAnswering",), "QUESTION_ANS"),
        (("BertModel", "Module"), "FEATURE_EXTRACTION"),
        ((), "FEATURE_EXTRACTION"),
    ],
)
def test_the_task_of_a_class(classes, task):
    assert task_of(classes) == task

import json

import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.compiler.api import Compiler
from peftc.compiler.example_calls import call_like
from peftc.passes.cost import cost
from tests.compiler.commands.cli_help import peftc, write_model
from tests.zoo import make

SPEC = """adapter turned = dora(rank = 2) {
    on layers[*].self_attn.{q_proj, v_proj}
    on layers[1].mlp.down_proj with rank = 4
}
adapter mixed = loha(rank = 2) { on v_proj, mlp.down_proj }
adapter scaled = ia3(feedforward = true) { on mlp.down_proj }
adapter table = lora(rank = 2) { on embed_tokens }
"""
TOGETHER = SPEC + "activate turned + mixed + scaled + table\n"


@pytest.fixture(autouse=True)
def one_thread():
    """Times depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_trace(monkeypatch):
    def refuse(*_):
        raise AssertionError("explain traces nothing")

    monkeypatch.setattr(Compiler, "trace", refuse)
    monkeypatch.setattr(Compiler, "trace_region", refuse)


def test_the_table(place, golden):
    (place / "some.adapter").write_text(TOGETHER)
    done = peftc("explain", "some.adapter", "tiny", "--tokens", 1, "--tokens", 5000)
    assert done.code == 0, done.err
    golden("cli/explain.txt", done.out)


def test_the_table_while_training(place, golden):
    (place / "some.adapter").write_text(SPEC)
    done = peftc("explain", "some.adapter", "tiny", "--tokens", 100, "--train")
    assert done.code == 0, done.err
    golden("cli/explain_train.txt", done.out)


def test_json_has_what_the_table_has(place):
    (place / "some.adapter").write_text(TOGETHER)
    found = peftc("explain", "some.adapter", "tiny", "--json").json
    assert (found["architecture"], found["training"], found["tokens"]) == ("LlamaForCausalLM", False, [1, 32, 1024])
    (together,) = found["together"]
    assert together["adapters"] == ["turned", "mixed", "scaled", "table"]
    by_first = {each["sites"][0]: each for each in together["groups"]}
    q = by_first["model.layers.0.self_attn.q_proj"]
    assert q["sites"] == [f"model.layers.{index}.self_attn.q_proj" for index in (0, 1)]
    assert (q["kind"], q["out_features"], q["in_features"], q["dtype"]) == ("linear", 16, 16, "float32")
    assert q["terms"][0]["shapes"] == {"A": [2, 16], "B": [16, 2], "m": [16]}
    v = by_first["model.layers.0.self_attn.v_proj"]
    assert [each["adapter"] for each in v["terms"]] == ["turned", "mixed"]
    down = [by_first[f"model.layers.{index}.mlp.down_proj"] for index in (0, 1)]
    assert [each["sites"] for each in down] == [[f"model.layers.{index}.mlp.down_proj"] for index in (0, 1)]
    assert by_first["model.embed_tokens"]["terms"][0]["bias"] is None
    for group in together["groups"]:
        for call in group["calls"]:
            assert call["lowering"] in call["costs"]
            assert set(call["costs"]["pushed"]) == {"flops", "bytes", "calls", "seconds"}


def test_a_bias_is_shown(place):
    (place / "some.adapter").write_text("adapter a = lora(rank = 2, bias = true) { on q_proj }")
    write_model(place / "biased", attention_bias=True)
    done = peftc("explain", "some.adapter", "biased")
    assert "b + s * c" in done.out
    found = peftc("explain", "some.adapter", "biased", "--json").json
    assert found["together"][0]["groups"][0]["terms"][0]["bias"] == "b + s * c"


def test_adapters_that_start_inactive_are_explained_alone(place):
    (place / "some.adapter").write_text(SPEC)
    found = peftc("explain", "some.adapter", "tiny", "--json").json
    assert [each["adapters"] for each in found["together"]] == [["turned"], ["mixed"], ["scaled"], ["table"]]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["lora(rank = 4)", "dora(rank = 2)", "loha(rank = 2)", "ia3()", "fourierft()"])
def test_it_tells_what_the_engine_chooses(method, training):
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 256), nn.Linear(256, 512))
    spec = f"adapter a = {method} {{ on all linear }}"
    tokens = (1, 2, 7, 64, 300, 5000)
    facts = compiler.explain(spec, model, tokens=tokens, training=training)
    adapted = compiler.apply(model, spec)
    adapted.set_adapter("a", inference_mode=not training)
    for at, count in enumerate(tokens):
        with torch.set_grad_enabled(training):
            choice = adapted._adapter_state.engine._choice(call_like(adapted, (torch.zeros(count, 48),)))
        for group in facts.together[0].groups:
            for site in group.sites:
                chosen = "dense" if site in choice.dense else "kept" if site in choice.kept else "pushed"
                assert group.calls[at].lowering == chosen, (site, count)


def test_nothing_is_made_of_the_weights(monkeypatch):
    """Even where a method starts from a decomposition of the weight."""
    model = nn.Sequential(nn.Linear(2048, 2048))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    monkeypatch.setattr(torch.linalg, "svd", None)
    (together,) = compiler.explain("adapter a = pissa(rank = 4) { on all linear }", model).together
    assert len(together.groups) == 1
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_the_model_may_lie_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    (together,) = compiler.explain('adapter a = lora { on "0" }', model, tokens=[3]).together
    (call,) = together.groups[0].calls
    assert call.costs["pushed"].flops == 2 * 3 * (4096 * 4096 + 2 * 8 * 4096)
    assert json.loads(json.dumps(together.groups[0].terms[0].shapes)) == {"A": [8, 4096], "B": [4096, 8]}


REGIONS = {
    "alike": "adapter a = lora { on all linear }",
    "unlike": "adapter a = lora { on layers[0].mlp.up_proj, layers[*].self_attn.q_proj } adapter b = ia3 { on v_proj } "
    "activate a + b",
    "around": "adapter a = lora { on embed_tokens, lm_head train layers[1].mlp }",
    "prompt": "adapter a = prompt(length = 2)",
    "prefix": "adapter a = prefix(length = 2)",
    "beside": "adapter a = adaption_prompt(length = 2, layers = 1)",
}


@pytest.mark.parametrize("name", REGIONS)
def test_regions_are_those_of_the_adapted_model(name):
    model = make("llama", num_hidden_layers=2)
    (together,) = compiler.explain(REGIONS[name], model).together
    assert together.regions == compiler.apply(model, REGIONS[name]).region_partition()
    assert together.regions.regions


def test_regions_of_a_model_without_weights():
    with torch.device("meta"):
        model = make("llama", num_hidden_layers=3)
    (together,) = compiler.explain("adapter a = lora { on q_proj, lm_head }", model).together
    layers, head = together.regions.regions
    assert (layers.modules, layers.kind) == (tuple(f"model.layers.{each}" for each in range(3)), "LlamaDecoderLayer")
    assert (head.modules, head.why) == (("lm_head",), "adapted, outside of repeated layers")


def test_regions_in_json(place):
    (place / "some.adapter").write_text("adapter a = lora { on q_proj }")
    (together,) = peftc("explain", "some.adapter", "tiny", "--json").json["together"]
    assert together["regions"]["whole"] == ""
    (row,) = together["regions"]["regions"]
    assert row["modules"] == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("tokens", [[0], [4, -1]])
def test_a_call_has_tokens(tokens):
    with pytest.raises(compiler.UsageError, match="E553"):
        compiler.explain('adapter a = lora { on "0" }', nn.Sequential(nn.Linear(4, 4)), tokens=tokens)


def test_wrong_usage(place):
    (place / "typo.adapter").write_text("adapter a = lora { on q_porj }")
    assert peftc("explain", "typo.adapter", "tiny", "--json").codes == ["E201"]
    assert peftc("explain", "spec.adapter", "tiny", "--tokens", "0").code == 2
    assert peftc("explain", "spec.adapter", "./tinny", "--json").codes == ["E450"]


def test_costs_are_those_of_the_model():
    (together,) = compiler.explain('adapter a = lora { on "0" }', nn.Sequential(nn.Linear(8, 8)), tokens=[9]).together
    shown = together.groups[0].calls[0].costs["pushed"]
    adapted = compiler.apply(nn.Sequential(nn.Linear(8, 8)), 'adapter a = lora { on "0" }')
    tenant = adapted._adapter_state.engine._tenant
    (at,) = tenant.specialisation.structure.sites
    own = cost.estimate(at, cost.sizes_of(at, tenant.lookup), 9, "pushed", training=False, frozen=True)
    assert (shown.flops, shown.bytes, shown.calls) == (own.flops, own.bytes, own.calls)


def test_a_spec_that_says_where_regions_begin(place):
    (place / "some.adapter").write_text('base { regions = "modules" } adapter a = lora { on q_proj }')
    (together,) = peftc("explain", "some.adapter", "tiny", "--json").json["together"]
    (row,) = together["regions"]["regions"]
    assert row["modules"] == [f"model.layers.{each}.self_attn.q_proj" for each in range(2)]
    assert row["why"] == 'adapted, as regions = "modules" asks'
    (place / "wrong.adapter").write_text('base { regions = "modul" } adapter a = lora { on q_proj }')
    assert peftc("explain", "wrong.adapter", "tiny", "--json").codes == ["E151"]


def test_a_combination_is_explained_as_it_is_made():
    """It costs what an adapter of its own with that rank costs at these sites."""
    two = "adapter a = lora(rank = 2) { on q_proj }\nadapter b = lora(rank = 3) { on q_proj }\n"
    model = make("llama")
    found = compiler.explain(two + 'adapter new = combine(a, b, by = "cat")\nactivate new', model, tokens=[7])
    like = compiler.explain("adapter new = lora(rank = 5) { on q_proj }", model, tokens=[7])
    assert found.together[0].adapters == like.together[0].adapters == ("new",)
    assert found.together[0].groups == like.together[0].groups
    each = compiler.explain(two + 'adapter new = combine(a, b, by = "cat")', model, tokens=[7])
    assert [together.adapters for together in each.together] == [("a",), ("b",), ("new",)]

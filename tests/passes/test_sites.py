import torch
import transformers
from torch import nn

from peftc.passes.sites import collect, is_quantized, tied_names, universe


def by_name(model):
    return {site.name: site for site in collect(model)}


def test_every_kind(lab):
    sites = by_name(lab.model("Lookup"))
    assert list(sites) == ["embed", "conv", "bag.table"]
    assert {name: each.kind for name, each in sites.items()} == {
        "embed": "embedding",
        "conv": "conv1d",
        "bag.table": "parameter",
    }
    sizes = {name: (each.out_features, each.in_features, each.transposed) for name, each in sites.items()}
    assert sizes == {"embed": (4, 7, True), "conv": (6, 4, True), "bag.table": (5, 6, False)}
    assert [each.weight for each in sites.values()] == ["embed.weight", "conv.weight", "bag.table"]


def test_linear(lab):
    site = by_name(lab.model("Two"))["first"]
    assert (site.kind, site.out_features, site.in_features, site.transposed) == ("linear", 6, 4, False)
    assert (site.count, site.tied, site.dtype, site.device) == (1, (), torch.float32, torch.device("cpu"))


def test_a_stack_of_experts(lab):
    (site,) = collect(lab.model("Experts"))
    assert (site.name, site.count, site.out_features, site.in_features) == ("stack", 3, 4, 5)
    assert not site.transposed


def test_a_stack_that_says_it_is_transposed():
    module = nn.Module()
    module.is_transposed = True
    module.stack = nn.Parameter(torch.zeros(3, 5, 4))
    (site,) = collect(module)
    assert (site.count, site.out_features, site.in_features, site.transposed) == (3, 4, 5, True)


def test_what_is_no_site():
    module = nn.Sequential(nn.LayerNorm(4), nn.Conv2d(2, 2, 3))
    module[0].whole = nn.Parameter(torch.zeros(2, 2, dtype=torch.long), requires_grad=False)
    module[0].register_buffer("table", torch.zeros(2, 2))
    assert collect(module) == ()


def test_a_tied_weight_is_a_site_for_each_module(lab):
    sites = by_name(lab.model("Tied"))
    assert sites["embed"].tied == ("head.weight",)
    assert sites["head"].tied == ("embed.weight",)
    assert tied_names(lab.model("Tied"))["head.weight"] == ("embed.weight", "head.weight")


def test_one_module_under_two_names():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"one": shared, "two": shared})
    assert [site.name for site in collect(model)] == ["one", "two"]


def test_a_root_that_is_a_linear():
    """It has no name to be called by, so it is its parameter."""
    (site,) = collect(nn.Linear(3, 2))
    assert (site.name, site.weight, site.kind) == ("weight", "weight", "parameter")


def test_the_output_layer_of_a_language_model():
    config = transformers.GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1, n_positions=8)
    sites = by_name(transformers.GPT2LMHeadModel(config))
    assert [name for name, each in sites.items() if each.output] == ["lm_head"]


def test_the_output_layer_of_a_classifier():
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    sites = by_name(transformers.BertForSequenceClassification(config))
    assert [name for name, each in sites.items() if each.output] == ["classifier"]


def test_a_plain_module_has_no_output_layer(lab):
    assert not any(site.output for site in collect(lab.model("Two")))


def test_universe(lab):
    model = lab.model("Lookup")
    found = universe(model, collect(model))
    assert [each.name for each in found.candidates] == ["embed", "conv", "bag.table"]
    assert found.modules == ("embed", "conv", "bag")


def test_is_quantized():
    packed = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    assert is_quantized(packed(2, 2))
    assert not is_quantized(nn.Linear(2, 2))
    assert not is_quantized(type("Odd", (nn.Linear,), {"__module__": "my.bitsandbytes"})(2, 2))

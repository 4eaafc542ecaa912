import torch
import transformers
from torch import nn

from peftc.passes.plan.sites import collect, tied_names, universe


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


def test_convolutions(lab):
    sites = by_name(lab.model("Scan"))
    assert {name: (each.kind, each.out_features, each.in_features, each.kernel) for name, each in sites.items()} == {
        "strided": ("conv2d", 4, 3 * 3 * 2, (3, 2)),
        "grouped": ("conv2d", 6, 2 * 2 * 2, (2, 2)),
        "line": ("convolution1d", 5, 6 * 3, (3,)),
        "solid": ("conv3d", 2, 5 * 2, (1, 2, 1)),
    }
    assert {name: (each.channels, each.groups) for name, each in sites.items()} == {
        "strided": (3, 1),
        "grouped": (2, 2),
        "line": (6, 1),
        "solid": (5, 1),
    }


def test_the_projections_of_a_multihead_attention(lab):
    sites = by_name(lab.model("Packed"))
    assert list(sites) == ["own.in_proj_weight", "own.out_proj", "other.in_proj_weight", "other.out_proj"]
    packed, output = sites["own.in_proj_weight"], sites["own.out_proj"]
    assert (packed.kind, packed.out_features, packed.in_features) == ("multihead_attention", 24, 8)
    assert (output.kind, output.out_features, output.weight) == ("linear", 8, "own.out_proj.weight")
    assert {packed.user, output.user, packed.attention, output.attention} == {"own"}


def test_a_multihead_attention_of_several_widths():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True)})
    sites = by_name(model)
    kinds = {name.removeprefix("attn."): (each.kind, each.in_features) for name, each in sites.items()}
    assert {name: each for name, each in kinds.items() if each[0] == "multihead_attention"} == {
        "q_proj_weight": ("multihead_attention", 8),
        "k_proj_weight": ("multihead_attention", 6),
        "v_proj_weight": ("multihead_attention", 4),
    }
    assert {sites[f"attn.{each}"].attention for each in ("bias_k", "bias_v")} == {None}


def test_an_output_projection_of_something_else():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out_proj = nn.Linear(2, 2)

    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "own": Own()})
    assert by_name(model)["own.out_proj"].attention is None
    assert by_name(Own())["out_proj"].attention is None


def test_a_root_that_is_a_multihead_attention():
    sites = by_name(nn.MultiheadAttention(4, 2))
    assert {name: each.user for name, each in sites.items()} == {"in_proj_weight": "", "out_proj": ""}


def test_a_weight_that_is_computed_is_no_site():
    norm = nn.utils.parametrizations.weight_norm
    model = nn.ModuleDict({"conv": norm(nn.Conv2d(2, 2, 3)), "linear": norm(nn.Linear(2, 2)), "plain": nn.Linear(2, 2)})
    assert [name for name in by_name(model) if "parametrizations" not in name] == ["plain"]


def test_what_is_no_site():
    module = nn.Sequential(nn.LayerNorm(4), nn.ConvTranspose2d(2, 2, 3))
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

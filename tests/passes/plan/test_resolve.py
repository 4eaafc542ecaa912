import pytest
import torch
import transformers
from torch import nn

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.spec.elaborate import read_spec
from peftc.passes.plan.plan import PlannedCopy
from peftc.passes.plan.resolve import check_base, resolve, survey
from tests.passes.quantized.storages import STORES


@pytest.fixture(scope="module")
def ground():
    """GPT-2 with a classifier: Conv1D, LayerNorm, a buffer or two, a head without a bias."""
    config = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8, num_labels=3)
    return survey(transformers.GPT2ForSequenceClassification(config))


def plan(ground, clauses, arguments="rank = 2"):
    return resolve(read_spec(f"adapter a = lora({arguments}) {{ {clauses} }}").adapters[0], ground)


def names(found):
    return [each.site.name.removeprefix("transformer.") for each in found.sites]


def refused(ground, clauses, arguments="rank = 2"):
    with pytest.raises(SpecError) as caught:
        plan(ground, clauses, arguments)
    return caught.value.diagnostics


def test_sites_come_in_model_order(ground):
    assert names(plan(ground, "on mlp.c_fc  on h[1].attn.c_attn")) == [
        "h.0.mlp.c_fc",
        "h.1.attn.c_attn",
        "h.1.mlp.c_fc",
    ]


def test_parameters_have_the_sites_sizes(ground):
    (at,) = plan(ground, "on h[0].attn.c_attn").sites
    assert {param.role: param.shape for param in at.bound.params} == {"A": (2, 8), "B": (24, 2)}
    assert at.parameter_count == 2 * 8 + 24 * 2


def test_a_spec_like_one_before_has_its_plan(ground):
    """Under its own name, and only where nothing else differs."""
    first, again = plan(ground, "on c_attn"), plan(ground, "on  c_attn")
    other = resolve(read_spec("adapter b = lora(rank = 2) { on c_attn }").adapters[0], ground)
    assert again.sites is other.sites is first.sites
    assert (first.name, other.name, other.spec.name) == ("a", "b", "b")
    assert plan(ground, "on c_attn", "rank = 3").sites[0].bound.params != first.sites[0].bound.params
    assert names(plan(ground, "on c_fc")) != names(first)


def test_plans_are_of_one_survey(ground):
    wider = transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=8, num_labels=3)
    first, other = (
        plan(ground, "on c_attn"),
        plan(survey(transformers.GPT2ForSequenceClassification(wider)), "on c_attn"),
    )
    assert (first.sites[0].site.in_features, other.sites[0].site.in_features) == (8, 16)


def test_the_last_on_wins_then_refine(ground):
    found = plan(ground, "on c_attn  on h[1].attn.c_attn with rank = 5  refine c_attn with alpha = 3")
    values = {each.site.name: dict(each.bound.values) for each in found.sites}
    assert {name: (each["rank"], each["alpha"]) for name, each in values.items()} == {
        "transformer.h.0.attn.c_attn": (2, 3),
        "transformer.h.1.attn.c_attn": (5, 3),
    }


def test_refine_that_tunes_nothing(ground):
    (found,) = refused(ground, "on c_attn  refine c_fc with alpha = 3")
    assert found.code == "E223"


def test_skip_reaches_everything_inside(ground):
    assert names(plan(ground, "on c_attn, c_fc  skip h[0]")) == ["h.1.attn.c_attn", "h.1.mlp.c_fc"]


def test_skip_that_takes_nothing_away(ground):
    (found,) = refused(ground, "on c_attn  skip h[1].mlp")
    assert found.code == "E223"
    assert found.span.text.startswith("skip")


def test_defaults_of_the_architecture(ground):
    assert names(plan(ground, "")) == ["h.0.attn.c_attn", "h.1.attn.c_attn"]


def test_no_default_for_a_plain_module(lab):
    (found,) = refused(survey(lab.model("Two")), "")
    assert (found.code, found.message) == ("E221", "method 'lora' has no default targets for a plain module")
    assert "on all linear" in found.help


def test_all_linear_leaves_the_head_out(ground):
    assert "score" not in names(plan(ground, "on all linear"))
    assert names(plan(ground, "on score")) == ["score"]


def test_a_trained_module_is_not_adapted_too(ground):
    found = plan(ground, "on c_attn, c_fc  train h[0].attn")
    assert names(found) == ["h.0.mlp.c_fc", "h.1.attn.c_attn", "h.1.mlp.c_fc"]
    (copy,) = found.copies
    assert copy.module == "transformer.h.0.attn"
    assert {name for name, _, _ in copy.tensors} == {"c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias"}
    assert all(trained for _, _, trained in copy.tensors)


def test_only_the_outermost_trained_module_is_copied(ground):
    found = plan(ground, "train h[0].attn, h[0].attn.c_proj")
    assert [each.module for each in found.copies] == ["transformer.h.0.attn"]


def test_train_alone_needs_no_sites(ground):
    found = plan(ground, "train score")
    assert found.sites == ()
    assert found.copies == (PlannedCopy("score", (("weight", (3, 8), True),)),)
    assert found.parameter_count == 24


def test_saved_buffers_are_copied_and_not_trained():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    (copy,) = plan(survey(model), 'on "0"  train "1"').copies
    assert {name: trained for name, _, trained in copy.tensors} == {
        "weight": True,
        "bias": True,
        "running_mean": False,
        "running_var": False,
        "num_batches_tracked": False,
    }
    assert copy.parameter_count == 8


def test_a_module_with_nothing_to_train():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    (found,) = refused(survey(model), 'on "0"  train "1"')
    assert found.code == "E225"


@pytest.mark.parametrize(
    ("bias", "modules"),
    [("none", []), ("adapter", ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]), ("all", None)],
)
def test_biases(bias, modules, ground):
    found = plan(ground, f"on c_attn  bias {bias}")
    if modules is None:
        modules = sorted(name.removesuffix(".bias") for name in ground.tensors if name.endswith(".bias"))
        assert len(modules) == 13
    assert sorted(each.module for each in found.copies) == modules
    assert all(each.is_bias and [name for name, _, _ in each.tensors] == ["bias"] for each in found.copies)


def test_every_wrong_selector_is_told_at_once(ground):
    found = refused(ground, "on c_atn  on c_fcc")
    assert [each.code for each in found] == ["E201", "E201"]
    assert [each.span.text for each in found] == ["c_atn", "c_fcc"]


def test_a_wrong_value_is_told_once_and_not_for_every_layer(ground):
    found = refused(ground, "on c_attn", "rank = 0")
    assert len(found) == 1


def test_the_text_of_a_token_needs_a_tokenizer(ground):
    (found,) = refused(ground, 'on c_attn  tokens ["<a>"]')
    assert found.code == "E227"


@pytest.fixture(scope="module")
def stored():
    """A head that is packed, and an embedding and a norm that are not."""
    four_bit = STORES["nf4"]
    inner = nn.ModuleDict({"q_proj": four_bit(nn.Linear(64, 64)), "norm": nn.LayerNorm(64)})
    return survey(nn.ModuleDict({"embed": nn.Embedding(7, 64), "block": inner, "head": four_bit(nn.Linear(64, 64))}))


@pytest.mark.parametrize(
    ("clauses", "pointed_at", "method"),
    [
        ("on q_proj train head", "head", "lora"),
        ("on head train block", "block", "lora"),
        ("on q_proj, norm", "q_proj", "ln_tuning"),
        ("on q_proj tokens [1] in head", "tokens [1] in head", "lora"),
        ("tokens [1] in embed tokens [2] in head", "tokens [2] in head", "trainable_tokens"),
    ],
)
def test_what_is_packed_is_not_trained_as_a_whole(stored, clauses, pointed_at, method):
    with pytest.raises(SpecError) as caught:
        resolve(read_spec(f"adapter a = {method} {{ {clauses} }}").adapters[0], stored)
    (found,) = caught.value.diagnostics
    assert found.code == "E224"
    assert found.span.text == pointed_at
    assert "quantized (nf4)" in found.message


def test_what_is_beside_a_packed_weight_is_trained(stored):
    found = plan(stored, "on q_proj, head train norm tokens [1] in embed bias all")
    assert names(found) == ["block.q_proj", "head"]
    assert [(each.module, each.is_bias) for each in found.copies] == [
        ("block.norm", False),
        ("block.q_proj", True),
        ("head", True),
    ]
    assert [each.module for each in found.rows] == ["embed"]


def test_a_survey_changes_nothing(lab):
    model = lab.model("Lookup")
    before = {name: (each, each.clone()) for name, each in model.state_dict(keep_vars=True).items()}
    found = survey(model)
    assert found.class_names[0] == "Lookup"
    assert found.model_type == ""
    for name, (tensor, value) in before.items():
        assert model.state_dict(keep_vars=True)[name] is tensor
        assert torch.equal(tensor, value)


BASES = [
    ('architecture = "GPT2LMHeadModel"', "E241"),
    ("n_layr = 2", "E242"),
    ("n_layer = 3", "E243"),
]


@pytest.mark.parametrize(("entry", "code"), BASES)
def test_base_contract_broken(entry, code, ground):
    spec = read_spec(f"base {{ {entry} }} adapter a = lora() {{ on c_attn }}")
    with pytest.raises(SpecError) as caught:
        check_base(spec.base, ground)
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert found.span is not None


@pytest.mark.parametrize(
    "entry",
    ['architecture = "GPT2ForSequenceClassification"', 'architecture = "GPT2PreTrainedModel"', "n_layer = 2"],
)
def test_base_contract_kept(entry, ground):
    check_base(read_spec(f"base {{ {entry} }} adapter a = lora() {{ on c_attn }}").base, ground)


def test_no_base_no_contract(ground):
    check_base(None, ground)


def test_what_is_shared_must_be_the_same_everywhere(golden):
    text = """method m(rank: int = 2) {
    on linear
    shared param A[rank, max_in] = zeros saved "A"
    W' = W + sum(slice(A, 1, 0, in), 0)
}
adapter a = m {
    on q
    on v with rank = 3
}"""
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(3, 5)})
    with pytest.raises(SpecError) as caught:
        resolve(read_spec(text).adapters[0], survey(model))
    golden("diagnostics/shared_parameter.txt", f"{caught.value}\n")


# --- places that are no weight ---

OWN = (
    'method own(length: int = 2) { on attention param P[length, out] = normal saved "P" prompt\' = P } adapter a = own'
)


def placed(ground, text):
    return resolve(read_spec(text).adapters[0], ground)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("adapter a = prompt(length = 3)", {"@prompt": (3, 8)}),
        ("adapter a = prefix(length = 3)", {"@cache": (3, 2 * 2 * 8)}),
        (OWN, {"h.0.attn": (2, 8), "h.1.attn": (2, 8)}),
        (OWN + " { on h[-1].attn }", {"h.1.attn": (2, 8)}),
        (OWN + " { on h[1].attn, h[0].attn }", {"h.0.attn": (2, 8), "h.1.attn": (2, 8)}),
        (OWN + " { on attn  on h[1].attn with length = 5 }", {"h.0.attn": (2, 8), "h.1.attn": (5, 8)}),
    ],
)
def test_places_that_are_no_weight(ground, text, chosen):
    found = placed(ground, text).sites
    assert {each.site.name.removeprefix("transformer."): each.front for each in found} == chosen


def test_a_place_is_beside_what_is_trained(ground):
    found = placed(ground, "adapter a = prompt(length = 3) { train score  bias all }")
    assert [each.module for each in found.copies if not each.is_bias] == ["score"]
    assert sum(each.is_bias for each in found.copies) == 13


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("adapter a = prompt { on attn }", "E233"),
        ("adapter a = prefix { refine attn with length = 3 }", "E233"),
        ("adapter a = prefix { skip h[0] }", "E233"),
        (OWN + " { on attn skip h[0] }", "E233"),
        (OWN + " { on attn where in_features > 3 }", "E236"),
        (OWN + " { on mlp }", "E234"),
    ],
)
def test_places_that_cannot_be_chosen(ground, text, code):
    with pytest.raises(SpecError) as caught:
        placed(ground, text)
    assert [each.code for each in caught.value.diagnostics] == [code]


@pytest.mark.parametrize("text", ["adapter a = prompt", "adapter a = prefix", OWN])
def test_a_model_without_the_place(text):
    with pytest.raises(SpecError) as caught:
        placed(survey(nn.Linear(4, 4)), text)
    assert [each.code for each in caught.value.diagnostics] == ["E232"]


def test_a_layer_is_told_its_place_and_model(ground):
    sizes = 'let n = num_layers * num_heads * num_stacks param P[n, out] = normal saved "P" prompt\' = P'
    (found,) = placed(ground, f"method own() {{ on cache {sizes} }} adapter a = own").sites
    assert found.front == (2 * 2 * 1, 32)

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.source import Source
from peftc.grammar.spec.no_match import miss, misses
from peftc.grammar.spec.select import Candidate, Universe, matches_inside, select, select_modules
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse

LEAVES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def model(layers=4):
    candidates = [Candidate("model.embed_tokens", "embedding", 100, 8)]
    modules = ["", "model", "model.embed_tokens", "model.layers"]
    for layer in range(layers):
        base = f"model.layers.{layer}"
        modules += [base, f"{base}.self_attn", f"{base}.mlp", *(f"{base}.{leaf}" for leaf in LEAVES)]
        candidates += [Candidate(f"{base}.{leaf}", "linear", 8, 16 if "up" in leaf else 8) for leaf in LEAVES]
    candidates.append(Candidate("lm_head", "linear", 8, 100, output=True))
    return Universe(tuple(candidates), (*modules, "lm_head"))


def clause(text):
    (adapter,) = parse(Source("x", f"adapter a = m {{ on {text} }}")).statements
    assert isinstance(adapter, tree.Adapter)
    (found,) = adapter.clauses
    assert isinstance(found, tree.OnClause)
    return found


def chosen(text, universe=None):
    found = clause(text)
    (selector,) = found.selectors
    names = [each.name for each in select(selector, found.where, universe or model())]
    return [name.removeprefix("model.").replace("layers.", "").replace("self_attn.", "") for name in names]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj", ["0.q_proj", "1.q_proj", "2.q_proj", "3.q_proj"]),
        ("layers[0].self_attn.{q_proj, v_proj}", ["0.q_proj", "0.v_proj"]),
        ("layers[1..3].*.q_proj", ["1.q_proj", "2.q_proj"]),
        ("layers[-1..].**.q_proj", ["3.q_proj"]),
        ("layers[-1].**.q_proj", ["3.q_proj"]),
        ("layers[..1].**.q_proj", ["0.q_proj"]),
        ("layers[0, 2..3, -1].**.q_proj", ["0.q_proj", "2.q_proj", "3.q_proj"]),
        ("layers[*].self_attn.v_proj where in_features > 8", []),
        ("layers.0.self_attn.q_proj", ["0.q_proj"]),
        ("*[0].mlp.*", ["0.mlp.up_proj", "0.mlp.down_proj"]),
        ("layers[2].mlp.**", ["2.mlp.up_proj", "2.mlp.down_proj"]),
        (r'".*\.0\..*q_proj"', ["0.q_proj"]),
        ('"q_proj"', []),
        ("proj", []),
        ("all embedding", ["embed_tokens"]),
        ("** where embedding or out_features == 100", ["embed_tokens", "lm_head"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_a_selector_chooses(text, expected):
    assert chosen(text) == expected


def test_all_linear_leaves_the_output_out():
    assert len(chosen("all linear")) == 16


def test_negative_indices_count_from_the_end_of_each_list():
    names = [*(f"encoder.layers.{each}.q" for each in range(2)), *(f"decoder.layers.{each}.q" for each in range(5))]
    universe = Universe(tuple(Candidate(each, "linear", 4, 4) for each in names), ())
    assert chosen("layers[-1].q", universe) == ["encoder.1.q", "decoder.4.q"]


def test_modules_and_what_they_contain():
    (selector,) = clause("layers[0]").selectors
    assert select_modules(selector, model()) == ("model.layers.0",)
    assert matches_inside(selector, "model.layers.0.mlp.up_proj", model())
    assert matches_inside(selector, "model.layers.0", model())
    assert not matches_inside(selector, "model.layers.1.mlp.up_proj", model())
    assert not misses(selector, None, model(), modules=True)
    assert misses(selector, None, model())


part = st.sampled_from(("a", "b", "ab", "0", "1", "layers", "q_proj"))
dotted = st.lists(part, min_size=1, max_size=4).map(".".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(dotted, max_size=12, unique=True), dotted)
def test_a_path_is_a_suffix_as_in_a_list_of_peft(names, target):
    universe = Universe(tuple(Candidate(each, "linear", 4, 4) for each in names), tuple(names))
    selector = tree.PathSelector(tuple(tree.Segment((each,)) for each in target.split(".")))
    wanted = [each for each in names if each == target or each.endswith(f".{target}")]
    assert [each.name for each in select(selector, None, universe)] == wanted
    assert list(select_modules(selector, universe)) == wanted
    assert bool(misses(selector, None, universe)) == (not wanted)


@pytest.mark.parametrize(
    ("text", "code", "span", "help"),
    [
        ("layers[*].self_attn.{q_porj, v_proj}", "E201", "q_porj", "did you mean 'q_proj'? (4 modules match)"),
        ("layrs[*].mlp.up_proj", "E201", "layrs", "did you mean 'layers'? (4 modules match)"),
        ("layers[9].mlp.up_proj", "E201", "layers[9]", "'model.layers' has 4 entries, 0 to 3"),
        ("mlp.q_proj", "E201", "mlp", "'q_proj' is in: self_attn"),
        ("self_attn", "E201", "self_attn", "name what is inside: q_proj, v_proj"),
        ("q_proj[0]", "E201", "q_proj", "leave out the brackets"),
        ("q_proj where in_features > 8", "E202", "in_features > 8", "'q_proj' chooses linear of 8 -> 8"),
        ('"q_proj"', "E201", '"q_proj"', "a pattern matches the whole name, such as 'model.embed_tokens'"),
        ("all conv2d", "E201", "all conv2d", ""),
    ],
)
def test_a_miss_says_what_is_near(text, code, span, help):
    found = clause(text)
    diagnostic = miss(found.selectors[0], found.where, model())
    assert (diagnostic.code, diagnostic.help) == (code, help)
    assert diagnostic.span is not None
    assert diagnostic.span.text == span


def test_each_alternative_that_misses_is_told():
    (selector,) = clause("{q_proj, v_porj, up_porj}").selectors
    assert [each.message for each in misses(selector, None, model())] == [
        "no module matches 'v_porj'",
        "no module matches 'up_porj'",
    ]
    assert not misses(clause("{q_proj, v_proj}").selectors[0], None, model())


def test_ten_thousand_sites_are_quick():
    universe = model(2500)
    start = time.perf_counter()
    for text in ("layers[-4..].mlp.{up_proj, down_proj}", "**.q_proj", "layers[*].**"):
        assert chosen(text, universe)
    names = tuple(tree.PathSelector((tree.Segment((f"p{each}",)),)) for each in range(5000))
    assert not any(select(each, None, universe) for each in names)
    assert time.perf_counter() - start < 10


def test_a_pattern_that_no_parser_saw_is_told():
    with pytest.raises(SpecError, match="E149"):
        select(tree.PatternSelector("("), None, model())


ATTENTION = Universe(
    (
        Candidate("layers.0.attn.in_proj_weight", "multihead_attention", 8, 24, attention="layers.0.attn"),
        Candidate("layers.0.attn.out_proj", "linear", 8, 8, attention="layers.0.attn"),
        Candidate("layers.0.up", "linear", 8, 16),
        Candidate("conv", "conv2d", 27, 16),
    ),
    ("layers", "layers.0", "layers.0.attn", "layers.0.attn.out_proj", "layers.0.up", "conv"),
)
BOTH = ["0.attn.in_proj_weight", "0.attn.out_proj"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attn", BOTH),
        ("layers[*].attn", BOTH),
        (r'".*\.attn"', BOTH),
        ("layers[-1].**", [*BOTH, "0.up"]),
        ("all multihead_attention", BOTH),
        ("attn.in_proj_weight", BOTH[:1]),
        ("attn.out_proj", BOTH[1:]),
        ("all linear", [BOTH[1], "0.up"]),
        ("all linear where not multihead_attention", ["0.up"]),
        ("attn where linear", BOTH[1:]),
        ("all conv2d", ["conv"]),
        ("** where conv2d and in_features == 3 * 3 * 3", ["conv"]),
        ("all convolution1d", []),
    ],
)
def test_a_multihead_attention_is_chosen_by_its_own_name_or_in_parts(text, expected):
    assert chosen(text, ATTENTION) == expected


def test_no_miss_for_the_name_of_a_multihead_attention():
    (selector,) = clause("layers[0].attn").selectors
    assert misses(selector, None, ATTENTION) == ()
    (selector,) = clause("atn").selectors
    assert "did you mean 'attn'?" in misses(selector, None, ATTENTION)[0].help

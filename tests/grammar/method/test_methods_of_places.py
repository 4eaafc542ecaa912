"""Methods for places that are no weight: what they may say, what they see, and what they are at a model's places."""

from pathlib import Path

import pytest

from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import SpecError
from peftc.grammar.method.bind import Place, bind
from peftc.grammar.method.check import check_method
from peftc.grammar.method.rule import KINDS, PLACES, MethodRule
from peftc.grammar.source import Source
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.write import to_tree
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.format import format_file, format_source
from peftc.grammar.syntax.parse import parse

METHODS = Path(__file__).parents[3] / "grammar" / "methods"
PROMPT = Place("prompt", in_features=11, out_features=6, layers=3, heads=2, name="@prompt")
CACHE = Place("cache", in_features=4, out_features=24, layers=3, heads=2, stacks=2, name="@cache")
HEADS = Place("attention", in_features=6, out_features=6, layers=3, heads=2, name="layers.0.self_attn")


def check(text: str) -> MethodRule:
    (method,) = parse(Source("x", text)).statements
    assert isinstance(method, tree.Method)
    return check_method(method)


def structural(place: str, items: str, head: str = "length: int = 4") -> str:
    return f"method m({head}) {{ on {place} {items} }}"


ONE = 'param P[length, out] = normal saved "P"'


@pytest.mark.parametrize("place", PLACES)
def test_a_method_for_a_place_defines_what_is_put_in_front(place):
    rule = check(structural(place, f"{ONE} prompt' = P"))
    assert (rule.weight, rule.bias, rule.gate, rule.kinds) == (None, None, None, (place,))
    assert rule.prompt == tree.Name("P")


@pytest.mark.parametrize(
    ("place", "items", "code", "says"),
    [
        # kinds
        ("cache, prompt", f"{ONE} prompt' = P", "E139", "for nothing else"),
        ("linear, prompt", f"{ONE} prompt' = P", "E139", "for nothing else"),
        ("prompt", 'param P[length, out] = normal saved "P" on linear = zeros saved "Q" prompt\' = P', "E139", "fit"),
        ("promt", f"{ONE} prompt' = P", "E139", "promt"),
        # what is defined
        ("prompt", ONE, "E135", "does not define prompt'"),
        ("prompt", f"{ONE} prompt' = P W' = W", "E135", "cannot define W'"),
        ("prompt", f"{ONE} prompt' = P b' = b", "E135", "cannot define b'"),
        ("linear", "param A[3, out] = zeros saved \"A\" W' = W prompt' = A", "E135", "cannot define prompt'"),
        ("linear", "param g[1] = zeros saved \"g\" W' = W gate' = g", "E135", "cannot define gate'"),
        ("cache", f"{ONE} param g[1] = zeros saved \"g\" prompt' = P gate' = g", "E135", "cannot define gate'"),
        ("prompt", f"{ONE} prompt' = P prompt' = P", "E131", "prompt' is defined twice"),
        ("attention", f"{ONE} param g[1] = zeros saved \"g\" prompt' = P gate' = g gate' = g", "E131", "gate' is"),
        ("prompt", f"{ONE} promt' = P", "E144", "promt'"),
        # shapes
        ("prompt", "prompt' = length", "E133", "[length, out]"),
        ("prompt", 'param P[out] = normal saved "P" prompt\' = P', "E133", "[length, out]"),
        ("prompt", 'param P[out, length] = normal saved "P" prompt\' = P', "E133", "[length, out]"),
        ("prompt", 'param P[2, 3, length, out] = normal saved "P" prompt\' = P', "E133", "[length, out]"),
        ("cache", "prompt' = W", "E133", "[length, out]"),
        ("attention", f"{ONE} prompt' = P gate' = P", "E133", "gate' is of shape [1]"),
        ("attention", f"{ONE} prompt' = P gate' = 1", "E133", "gate' is of shape [1]"),
        ("attention", f"{ONE} param g[2] = zeros saved \"g\" prompt' = P gate' = g", "E133", "gate' is of shape [1]"),
        # what is saved as a value
        ("linear", 'param A[out, in] = zeros saved "A" let D = A + A saved "D" W\' = W + D', "E135", "prompt' only"),
        ("prompt", f'{ONE} let s = length saved "s" prompt\' = s * P', "E132", "only a tensor"),
        ("prompt", f'{ONE} let D = P saved "../D" prompt\' = D', "E137", "../D"),
        ("prompt", f'{ONE} let D = -P saved "D" let E = -D saved "E" prompt\' = E', "E131", "'D' is saved"),
        # words
        ("linear", "W' = W * num_layers", "E130", "num_layers"),
        ("prompt", f"{ONE} let num_heads = 3 prompt' = P * num_heads", "E131", "num_heads"),
        # what goes in and does nothing
        ("prompt", f'{ONE} param Q[length, out] = normal saved "Q" prompt\' = P', "E134", "'Q' is never used"),
    ],
)
def test_refused_where_it_is_defined(place, items, code, says):
    with pytest.raises(SpecError) as caught:
        check(structural(place, items))
    (found,) = caught.value.diagnostics
    assert (found.code, says in found.message) == (code, True), found.render()
    assert found.span is not None


def test_a_parameter_without_use_is_told_of_the_prompt():
    with pytest.raises(SpecError, match="that prompt' does not depend on"):
        check(structural("cache", f'{ONE} param Q[length, out] = normal saved "Q" prompt\' = P'))


def test_nobody_need_use_what_the_compiler_does():
    head = "length: int = 4, peft_compatible: bool = false"
    assert check(structural("prompt", f"{ONE} prompt' = P", head))
    with pytest.raises(SpecError, match="'peft_compatible' is never used"):
        check(f"method m({head}) {{ on linear {ONE.replace('length, out', 'out, in')} W' = W * length + P }}")


# --- at a place ---


def test_the_words_of_a_place():
    sizes = 'param P[num_layers * num_heads * num_stacks, out] = normal saved "P"'
    rule = check(structural("cache", f"{sizes} prompt' = P", ""))
    (param,) = bind(rule, (), CACHE).params
    assert param.shape == (12, 24)
    (param,) = bind(check(structural("cache", f"{ONE} prompt' = P")), (("length", 2),), CACHE).params
    assert param.shape == (2, 24)


def test_the_embeddings_are_the_weight_of_a_prompt():
    rule = check(structural("prompt", f"{ONE.replace('normal', 'slice(W.T, 0, 0, length)')} prompt' = P"))
    (param,) = bind(rule, (("length", 5),), PROMPT).params
    assert param.shape == (5, 6)
    assert any(isinstance(each, algebra.Weight) for each in algebra.walk(param.init.value))


@pytest.mark.parametrize(("place", "at"), [("cache", CACHE), ("attention", HEADS)])
def test_elsewhere_there_is_no_weight(place, at):
    rule = check(structural(place, f"{ONE} prompt' = P + sum(W, 1).T if length > 1 else P"))
    with pytest.raises(SpecError, match="there is no weight"):
        bind(rule, (("length", 2),), at)
    assert bind(rule, (("length", 1),), at).prompt


def test_sizes_that_only_a_place_tells():
    rule = check(structural("attention", 'param P[length, in] = normal saved "P" prompt\' = slice(P, 1, 0, out)'))
    assert bind(rule, (("length", 2),), HEADS).prompt
    rule = check(structural("cache", 'param P[length, in] = normal saved "P" prompt\' = slice(P, 1, 0, out)'))
    with pytest.raises(SpecError) as caught:
        bind(rule, (("length", 2),), CACHE)
    assert [each.code for each in caught.value.diagnostics] == ["E216"]
    assert "the model's cache" in str(caught.value)


def test_a_gate_is_bound_beside_the_prompt():
    rule = check(structural("attention", f"{ONE} param g[1] = zeros saved \"g\" prompt' = P gate' = tanh(g)"))
    bound = bind(rule, (("length", 3),), HEADS)
    assert {each.role for each in bound.params} == {"P", "g"}
    assert any(isinstance(each, algebra.Param) and each.role == "g" for each in algebra.walk(bound.gate))


def test_what_is_saved_as_a_value_has_its_shape_and_key():
    items = f'{ONE} let H = tanh(P) saved "H" prompt\' = slice(H, 0, 0, 2)'
    bound = bind(check(structural("prompt", items)), (("length", 3),), PROMPT)
    assert bound.settled is not None
    assert bound.settled[1:] == ((3, 6), "H")
    missing = f'{ONE} let H = tanh(P) saved "H" prompt\' = H if length > 2 else P'
    assert bind(check(structural("prompt", missing)), (("length", 2),), PROMPT).settled is None


def test_every_built_in_fits_its_place():
    at = {"prompt": PROMPT, "cache": CACHE, "attention": HEADS}
    found = {each.name: each for each in builtin_methods().values() if each.prompt is not None}
    assert {each.kinds[0] for each in found.values()} <= set(PLACES)
    assert not set(PLACES) & set(KINDS)
    assert len(found) >= 5
    for name, rule in found.items():
        (adapter,) = read_spec(f"adapter a = {name}").adapters
        bound = bind(rule, adapter.values, at[rule.kinds[0]])
        assert bound.prompt is not None, name
        assert any(each.trained for each in bound.params), name


# --- what PEFT is told ---


def test_fields_may_tell_the_sizes_of_the_place():
    sizes = "a = length, b = in, c = out, d = num_layers, e = num_heads, f = num_stacks"
    assert check(structural("cache", f"{ONE} prompt' = P peft M {{ {sizes} }}")).peft_fields
    with pytest.raises(SpecError):
        check('method m() { on linear param A[out, in] = zeros saved "A" W\' = W + A peft M { a = in } }')
    with pytest.raises(SpecError):
        check(structural("cache", f"{ONE} prompt' = P peft M {{ a = length, b = nmu_layers }}"))


# --- text and back ---

OWN = """method own(length: int = 4, tasks: int = 2) {
    on      attention
    param   P[tasks, length, out] = normal saved "P"
    param   g[1]                  = zeros  saved "g"
    let     H = tanh(P) saved "H"
    prompt' = H
    gate'   = tanh(g)
    peft    OWN { n = length, t = tasks, layers = num_layers }
}

adapter a = own(length = 3) { on layers[-2..].self_attn }
"""


def test_a_method_for_a_place_is_written_as_it_was_read():
    spec = read_spec(OWN)
    text = format_source(Source("x", OWN))
    assert read_spec(text) == spec
    assert format_source(Source("x", text)) == text
    assert parse(Source("x", text)) == parse(Source("x", OWN))
    (written,) = (each for each in to_tree(spec).statements if isinstance(each, tree.Method))
    assert check_method(written) == spec.adapters[0].rule


@pytest.mark.parametrize("name", [name for name, each in builtin_methods().items() if each.prompt is not None])
def test_a_built_in_method_is_written_as_it_was_read(name):
    text = next(METHODS.glob(f"*/{name}.adapter")).read_text(encoding="utf-8").replace(f"method {name}(", "method own(")
    spec = read_spec(f"{text}\nadapter a = own")
    assert read_spec(format_file(to_tree(spec))) == spec


def test_layers_of_a_method_for_attention_count_its_modules():
    counted = structural("attention", f"{ONE} prompt' = P", "length: int = 4, layers: int = none")
    assert [each.name for each in check(counted).hyperparameters] == ["length", "layers"]
    for place, head, code in (("cache", "layers: int = 2", "E134"), ("attention", "layers: float = 2", "E132")):
        with pytest.raises(SpecError) as refused:
            check(structural(place, f"{ONE} prompt' = P", f"length: int = 4, {head}"))
        assert refused.value.diagnostics[0].code == code


@pytest.mark.parametrize("place", [PROMPT, CACHE, HEADS])
def test_nothing_is_dropped_of_what_is_put_in_front(place):
    rule = check(structural(place.kind, f"{ONE} prompt' = drop(P, dropout)", "length: int = 4, dropout: float = 0.0"))
    assert bind(rule, (("length", 4), ("dropout", 0.0)), place).prompt == algebra.Param("P")
    with pytest.raises(SpecError, match=r"dropout = 0.5: what is put in front has no input to drop from"):
        bind(rule, (("length", 4), ("dropout", 0.5)), place)

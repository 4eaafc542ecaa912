"""Combinations in specs: what they mean, that they are written as they are read, and the place of every mistake."""

import pytest

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.spec.combined import OPTIONS
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.recipe import KINDS, Recipe
from peftc.grammar.spec.spec import CombinedAdapter, Part
from peftc.grammar.spec.write import to_tree
from peftc.grammar.syntax.format import format_file

BEFORE = 'adapter a = lora(rank = 2) { on q_proj }\nadapter "b c" = lora { on v_proj }\n'


def read(text):
    return read_spec(BEFORE + text)


def test_what_is_said_is_meant():
    spec = read('adapter both = combine(a, "b c", weights = [0.7, -1 / 4], by = "ties", density = 1 / 2)')
    parts = (Part("a", 0.7), Part("b c", -0.25))
    assert spec.combined == (CombinedAdapter("both", parts, Recipe("ties", density=0.5)),)
    assert [each.name for each in spec.adapters] == ["a", "b c"]
    assert spec.active == ()


def test_what_is_left_out():
    (found,) = read('adapter both = combine(a, "b c",)').combined
    assert found == CombinedAdapter("both", (Part("a", 1.0), Part("b c", 1.0)), Recipe("svd"))


def test_every_option_has_a_place():
    said = 'weights = [1, 2], by = "dare_ties_svd", density = 0.5, majority_sign_method = "frequency", svd_rank = 2.0'
    more = ', svd_clamp = 0.9, svd_full_matrices = false, svd_driver = "gesvd"'
    assert all(f"{option} = " in said + more for option in OPTIONS)
    (found,) = read(f'adapter both = combine(a, "b c", {said}{more})').combined
    assert found.recipe == Recipe("dare_ties_svd", 0.5, "frequency", 2, 0.9, "gesvd")
    assert type(found.recipe.rank) is int
    assert [each.weight for each in found.parts] == [1.0, 2.0]


def test_combinations_of_combinations_keep_their_order():
    spec = read('adapter x = combine(a) adapter d = lora adapter y = combine(x, d) adapter z = combine(y, "b c")')
    assert [each.name for each in spec.combined] == ["x", "y", "z"]
    assert [each.name for each in spec.adapters] == ["a", "b c", "d"]


def test_one_can_be_activated():
    spec = read('adapter both = combine(a, "b c") activate both - 0.5 * a')
    assert spec.active == (("both", 1.0), ("a", -0.5))
    assert read_spec("adapter a = lora adapter less = combine(a, weights = [0.5])").active == ()


@pytest.mark.parametrize(
    "text",
    [
        'adapter both = combine(a, "b c")',
        "adapter less = combine(a, weights = [0.5]) activate less",
        'adapter "not" = combine(a, weights = [2]) adapter none = combine("not", "b c", by = "cat")',
        'adapter x = combine("b c", a, weights = [1, 3], by = "ties", density = 1, majority_sign_method = "frequency")',
        'adapter both = combine(a, "b c", svd_rank = 3, svd_clamp = 0.99, svd_driver = "gesvdj")',
    ],
)
def test_a_combination_written_and_read_is_the_same(text):
    spec = read(text)
    written = format_file(to_tree(spec))
    assert read_spec(written) == spec
    assert format_file(to_tree(read_spec(written))) == written


def test_defaults_are_left_out():
    said = 'weights = [1, 1.0], by = "svd", svd_full_matrices = true'
    written = format_file(to_tree(read(f'adapter both = combine(a, "b c", {said})')))
    assert written.endswith('adapter both = combine(a, "b c")\n')


WRONG = {
    # what stands behind the adapters: code, what the caret is under, what is said
    "combine(a, z)": ("E146", "z", "no adapter called 'z'", "the adapters before it are a, b c"),
    "combine(A)": ("E146", "A", "no adapter called 'A'", "did you mean 'a'?"),
    "combine(a, late)": ("E160", "late", "'late' is combined before it is defined", "line 4"),
    "combine(a, both)": ("E160", "both", "'both' would be made of itself", ""),
    'combine(a, "b c", a)': ("E147", "a", "'a' is combined twice", "once"),
    "combine()": ("E161", "adapter both = combine()", "a combination of no adapters", "combine(a, b)"),
    'combine(a, "b c", weights = [1])': ("E161", "[1]", "2 adapters are given 1 weight", "each"),
    "combine(a, weights = 0.5)": ("E161", "0.5", "'weights' is a list of numbers", "weights = [0.5]"),
    "combine(a, weights = [true])": ("E161", "true", "a weight is a number", ""),
    "combine(a, weights = [x])": ("E161", "x", "a weight is a number", ""),
    "combine(a, weights = [1], weights = [1])": ("E143", "weights = [1]", "'weights' is given twice", ""),
    "combine(weights = [1], a)": ("E141", "a", "options of 'combine' are given by name", "the adapters come first"),
    'combine(a, "b c", densty = 1)': ("E141", "densty = 1", "has no option 'densty'", "'density'"),
    'combine(a, "b c", combination_type = "svd")': ("E141", 'combination_type = "svd"', "no option", "weights, by"),
    'combine(a, "b c", by = "tie")': ("E151", '"tie"', "not a choice for 'by'", "'ties'"),
    'combine(a, "b c", by = "best")': ("E151", '"best"', "not a choice for 'by'", "magnitude_prune_svd"),
    'combine(a, "b c", by = ties)': ("E162", "ties", "'by' is a text", 'by = "ties"'),
    'combine(a, "b c", by = "ties")': ("E162", 'by = "ties"', "which is not said", "density"),
    'combine(a, "b c", by = "ties", density = "x")': ("E162", '"x"', "'density' is a number", ""),
    'combine(a, "b c", by = "dare_ties", density = 0)': ("E162", "0", "more than 0", ""),
    'combine(a, "b c", by = "ties", density = 1, majority_sign_method = "sum")': ("E151", '"sum"', "choice", "total"),
    'combine(a, "b c", svd_rank = 1.5)': ("E162", "1.5", "'svd_rank' is a whole number", ""),
    'combine(a, "b c", svd_rank = 0)': ("E162", "0", "from 1 on", ""),
    'combine(a, "b c", svd_clamp = -1)': ("E162", "-1", "quantile", ""),
    'combine(a, "b c", svd_driver = "fast")': ("E151", '"fast"', "choice", "gesvdj"),
    'combine(a, "b c", svd_full_matrices = 1)': ("E162", "1", "true or false", ""),
    'combine(a, "b c", density = 0.5)': ("E163", "density = 0.5", "not read here", "ties"),
    'combine(a, "b c", by = "cat", svd_rank = 2)': ("E163", "svd_rank = 2", 'by = "cat"', "svd"),
    'combine(a, "b c", by = "cat", svd_full_matrices = true)': ("E163", "svd_full_matrices = true", "not read", "svd"),
    'combine(a, "b c", majority_sign_method = "total")': ("E163", 'majority_sign_method = "total"', "not", "ties"),
    "combine(a, svd_rank = 2)": ("E163", "svd_rank = 2", "a lone adapter is summed", "leave it out"),
    'combine(a, by = "ties", density = 0.5)': ("E163", 'by = "ties"', "a lone adapter is summed", "several"),
    "combine(a) { on q_proj }": ("E110", "{", "found '{'", "a combination has no clauses"),
    "combine": ("E110", "adapter", "expected '('", ""),
    "combin(a)": ("E140", "combin", "no method 'combin'", "'combine'"),
}


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_are_told_where_they_stand(text):
    code, place, message, help = WRONG[text]
    with pytest.raises(SpecError) as caught:
        read(f"adapter both = {text}\nadapter late = lora")
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert found.span is not None
    assert found.span.text == place
    assert message in found.message
    assert help in found.help


def test_a_name_is_given_once():
    for text, line in (("adapter a = combine(a)", 3), ('adapter x = combine(a) adapter x = combine("b c")', 3)):
        with pytest.raises(SpecError, match=r"E147.*there are two adapters called") as caught:
            read(text)
        assert caught.value.diagnostics[0].span.line == line


def test_no_method_is_called_so():
    with pytest.raises(SpecError, match="cannot be a method") as caught:
        read_spec("method combine() { on linear  W' = W }\nadapter a = lora")
    assert caught.value.diagnostics[0].span.text == "combine"


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_read(kind):
    density = ", density = 0.5" if Recipe(kind).reads("density") else ""
    (found,) = read(f'adapter both = combine(a, "b c", by = "{kind}"{density})').combined
    assert found.recipe.kind == kind

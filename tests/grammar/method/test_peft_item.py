"""What a `peft` item may say: whatever it is, an adapter_config.json has to be readable by it."""

import pytest

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.method.check import check_method
from peftc.grammar.method.peft_item import constant, domain, listed_flag, names_in, translated
from peftc.grammar.source import Source
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse

HEAD = 'rank: int = 8, s: float = 1, flag: bool = false, how: text("a", "b") = "a", free: text = "x"'
BODY = 'param A[rank, in] = zeros saved "A" W\' = W * s + sum(A, 0) if flag and how == "a" and free == "y" else W'


def fields(text):
    (method,) = parse(Source("x", f"method m({HEAD}) {{ on linear {BODY} peft M {{ {text} }} }}")).statements
    return check_method(method)


@pytest.mark.parametrize(
    "text",
    [
        "r = rank",
        "r = rank by rank_pattern",
        'a = 1, b = -2.5, c = true, d = none, e = "x"',
        "a = any",
        "a = modules(flag)",
        "a = not flag",
        'a = how == "b"',
        'a = true if how == "a" else how',
        'a = "yes" if flag else none',
        "a = 1 if flag else 0, b = flag",
    ],
)
def test_fields_that_can_be_read_back(text):
    assert fields(text).peft_type == "M"


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("r = rnk", "E130", "'rnk' is not known here"),
        ("r = rank, r = rank", "E131", "the field 'r' is given twice"),
        ("r = rank * 2", "E158", "a field's value is a hyperparameter, a literal, or decided by one hyperparameter"),
        ("r = 1 + 1", "E158", "a field's value is a hyperparameter, a literal, or decided by one hyperparameter"),
        ('r = free == "x"', "E158", "a field's value is a hyperparameter, a literal, or decided by one"),
        ('r = flag and how == "a"', "E158", "a field's value is a hyperparameter, a literal, or decided by one"),
        ("r = modules(rank)", "E158", "'modules' takes a hyperparameter that is true or false"),
        ("r = modules(other)", "E158", "'modules' takes a hyperparameter that is true or false"),
        ('r = how == "c"', "E151", '"c" is not one of the choices'),
        ('r = 1 if how == "c" else 2', "E151", '"c" is not one of the choices'),
        ("r = 1 if how else 2", "E132", "a condition takes true or false, and 'how' is a text"),
        ("r = fold(flag)", "E138", "there is no function 'fold'"),
        ("r = sqrt(flag)", "E132", "'sqrt' takes a number, and 'flag' is true or false"),
    ],
)
def test_fields_that_cannot(text, code, message):
    with pytest.raises(SpecError) as caught:
        fields(text)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == code
    assert diagnostic.message.startswith(message)
    assert diagnostic.span is not None


def test_a_hyperparameter_only_the_file_format_knows_is_used():
    text = f"method m({HEAD}, kept: bool = true) {{ on linear {BODY}"
    (method,) = parse(Source("x", f"{text} peft M {{ k = kept }} }}")).statements
    assert check_method(method)
    with pytest.raises(SpecError, match="E134"):
        check_method(parse(Source("x", f"{text} }}")).statements[0])


def field(text):
    return fields(text).peft_fields[0]


def test_values():
    assert translated(field('a = true if how == "a" else how'), "how", "a") is True
    assert translated(field('a = true if how == "a" else how'), "how", "b") == "b"
    assert translated(field("a = not flag"), "flag", False) is True
    rule = fields("")
    named = {each.name: each for each in rule.hyperparameters}
    assert domain(named["flag"]) == (False, True)
    assert domain(named["how"]) == ("a", "b")
    assert domain(named["free"]) == domain(named["rank"]) == ()
    assert [constant(field(f"a = {each}").value) for each in ("3", "-0.5", "none", '"x"', "false")] == [
        3,
        -0.5,
        None,
        "x",
        False,
    ]
    assert listed_flag(field("a = modules(flag)")) == "flag"
    assert listed_flag(field("a = flag")) == ""


def test_names():
    (method,) = parse(
        Source("x", "method m() { on linear let x = [a, -b.T] let y = f(c) if not d else e + 1 }")
    ).statements
    values = [each.value for each in method.items if isinstance(each, tree.LetItem)]
    assert [names_in(each) for each in values] == [{"a", "b"}, {"c", "d", "e"}]

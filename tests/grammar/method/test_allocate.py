"""The `allocate` item: what it may name, its settings, and schedules that cannot be."""

import pytest

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.method.bind import Place, bind
from peftc.grammar.method.check import check_method
from peftc.grammar.method.rule import MethodRule, Schedule, Value, Values
from peftc.grammar.source import Source
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.values import complete
from peftc.grammar.spec.write import to_tree
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.format import format_file, format_source
from peftc.grammar.syntax.parse import parse

METHOD = """
method pruned(rank: int = 4, kept: int = 2, steps: int = 0, weight: float = 0) {
    on       linear
    param    A[rank, in]  = normal(std = 1) saved "a"
    param    v[1, rank]   = zeros           saved "v"
    param    B[out, rank] = normal(std = 1) saved "b"
    W'       = W + (B * v) @ A
    allocate v with A, B { target = kept, steps = steps, every = 2, orthogonal = weight }
    peft     PRUNED { r = rank, kept = kept, steps = steps, weight = weight, kept_rows = masks(v) }
}
"""


def _rule(text: str = METHOD) -> MethodRule:
    (method,) = parse(Source("m.adapter", text)).statements
    assert isinstance(method, tree.Method)
    return check_method(method)


def _values(rule: MethodRule, **given: Value) -> Values:
    return tuple({**dict(complete(rule, ())), **given}.items())


def _changed(old: str, new: str) -> str:
    assert METHOD.count(old) == 1
    return METHOD.replace(old, new)


def test_an_item_says_the_axes_and_the_schedule() -> None:
    rule = _rule()
    assert rule.allocation is not None
    assert rule.allocation.axes == (("v", 1), ("A", 0), ("B", 1))
    values = _values(rule, rank=5, steps=30, weight=0.1)
    bound = bind(rule, values, Place("linear", 8, 16))
    assert bound.allocation is not None
    assert bound.allocation.target == 2
    assert bound.allocation.schedule == Schedule(steps=30, every=2, orthogonal=0.1)


def test_a_parameter_that_is_not_everywhere_keeps_no_budget_there() -> None:
    rule = _rule(
        _changed('zeros           saved "v"', 'zeros saved "v" if in > 9').replace("B * v", "B * v if in > 9 else B")
    )
    wide, narrow = (bind(rule, _values(rule), Place("linear", 8, each)) for each in (16, 8))
    assert wide.allocation is not None
    assert narrow.allocation is None


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("with A, B", "with A, C", r"E130.*'C' is not a parameter of a site"),
        ("allocate v with", "allocate rank with", r"E130.*'rank' is not a parameter of a site"),
        ("allocate v with A", "allocate B with A", r"E133.*'B' is not a vector"),
        ("param    A[rank, in]  =", "shared param A[rank, in] =", r"E130.*'A' is not a parameter of a site"),
        ("B[out, rank] =", "B[out, rank - 1 + 1] =", ""),
        ("target = kept, ", "", r"E157.*does not say its 'target'"),
        ("target = kept", "target = kept, target = 3", r"E131.*'target' is given twice"),
        ("every = 2", "evry = 2", r"E157.*'evry' is not a setting of 'allocate'"),
        ("every = 2", "every = weight", r"E132"),
        ("on       linear", "on       linear, parameter", r"E157.*'parameter' may be a stack"),
        ("masks(v)", "masks(A)", r"E158.*'masks' takes the vector"),
        ("allocate v with A", "allocate v with v, A", ""),
    ],
)
def test_what_an_item_may_name(old: str, new: str, told: str) -> None:
    text = _changed(old, new)
    if not told:
        assert _rule(text).allocation is not None
        return
    with pytest.raises(SpecError, match=told):
        _rule(text)


def test_an_entry_needs_one_axis_in_every_partner() -> None:
    text = _changed("B[out, rank]", "B[rank, rank]").replace("(B * v) @ A", "kron(diag(reshape(v, [rank])), B) * 0")
    with pytest.raises(SpecError, match=r"E13\d"):
        _rule(text)
    square = METHOD.replace('saved "b"\n', 'saved "b"\n    param C[rank, rank] = zeros saved "c"\n')
    square = square.replace("(B * v) @ A", "(B * v) @ C @ A").replace("with A, B", "with A, B, C")
    with pytest.raises(SpecError, match=r"E133.*one size of 'C' has to be rank"):
        _rule(square)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kept": 5}, "a target of 5 does not fit"),
        ({"kept": -1}, "a target of -1 does not fit"),
        ({"steps": -3}, "counted from 0"),
        ({"weight": -0.5}, "rewards what it is to prevent"),
    ],
)
def test_schedules_that_cannot_be(values: dict[str, int], told: str) -> None:
    rule, place = _rule(), Place("linear", 8, 16)
    with pytest.raises(SpecError, match=rf"E218.*{told}"):
        bind(rule, _values(rule, **values), place)
    # A checkpoint's schedule is history: what it computes does not depend on it.
    assert bind(rule, _values(rule, **values), place, strict=False).allocation is not None


def test_it_is_formatted_and_written() -> None:
    source = Source("m.adapter", METHOD)
    formatted = format_source(source)
    assert "    allocate v with A, B { target = kept, steps = steps, every = 2, orthogonal = weight }\n" in formatted
    assert format_source(Source("m.adapter", formatted)) == formatted
    spec = read_spec(f"{METHOD}\nadapter a = pruned(rank = 3) {{ on q }}")
    assert read_spec(format_file(to_tree(spec))) == spec

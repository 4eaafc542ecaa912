"""check tells everything that is wrong with a spec at once, each mistake once."""

from peftc.compiler.jobs.checking import check

SPEC = """adapter a = lora(rnak = 3)
adapter b = lora
adapter both = combine(a, c, d, weights = [1, 2])
adapter more = combine(both, bth, b, by = "tie")
adapter d = lora
activate both + mre
"""


def test_every_mistake_in_combinations_is_told_once():
    spec, found = check(SPEC)
    assert spec is None
    told = [(each.code, each.span.line, each.span.text) for each in found]
    assert told == [
        ("E141", 1, "rnak = 3"),
        ("E146", 3, "c"),
        ("E160", 3, "d"),
        ("E161", 3, "[1, 2]"),
        ("E146", 4, "bth"),
        ("E151", 4, '"tie"'),
        ("E146", 6, "mre"),
    ]


def test_a_name_that_is_there_twice_is_told_once():
    _, found = check("adapter a = lora\nadapter b = combine(a)\nadapter b = combine(a)\nadapter c = combine(b)")
    assert [(each.code, each.span.line) for each in found] == [("E147", 3)]


def test_a_sound_spec_has_no_mistakes():
    spec, found = check("adapter a = lora\nadapter b = combine(a, weights = [0.5])\nactivate b")
    assert found == ()
    assert [each.name for each in spec.combined] == ["b"]

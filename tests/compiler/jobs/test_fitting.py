"""Whether a spec fits a model, without a trace."""

from peftc import compiler
from tests import zoo

TWO = "adapter a = lora(rank = 2) { on q_proj }\nadapter b = lora(rank = 3) { on v_proj }\n"


def test_a_combination_is_told_as_it_is_made():
    """The sizes are those of what `apply` makes."""
    text = TWO + 'adapter new = combine(a, b, by = "cat")\nadapter more = combine(new, a)\nactivate 2 * new'
    model = zoo.make("llama", num_hidden_layers=2)
    facts, problems = compiler.check_fit(compiler.read_spec(text), model)
    assert problems == ()
    assert [each.name for each in facts] == ["a", "b", "new", "more"]
    assert [each.weight for each in facts] == [None, None, 2.0, None]
    adapted = compiler.apply(model, text)
    assert [each.parameters for each in facts] == [
        sum(tensor.numel() for tensor in adapted.adapter_bank.get_submodule(each.name).parameters()) for each in facts
    ]


def test_what_cannot_be_combined_is_told_with_the_rest():
    text = TWO + 'adapter c = lora { on zzz }\nadapter x = combine(a, b, by = "linear")\nadapter y = combine(c, x)'
    facts, problems = compiler.check_fit(compiler.read_spec(text), zoo.make("llama"))
    assert [each.name for each in facts] == ["a", "b"]
    assert [(each.code, each.span.line) for each in problems] == [("E201", 3), ("E583", 4)]

"""A method that trains copies of whole modules: what it may say, and which modules it takes."""

import pytest
import torch
import transformers

from peftc import compiler
from peftc.grammar.diagnostics import SpecError
from peftc.grammar.method.check import check_method
from peftc.grammar.source import Source
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse
from peftc.passes.plan.resolve import resolve, survey

SIZES = {"vocab_size": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).eval()


def plan(model, clauses=""):
    return resolve(read_spec(f"adapter a = ln_tuning() {{ {clauses} }}").adapters[0], survey(model))


def refused(model, clauses):
    with pytest.raises(SpecError) as caught:
        plan(model, clauses)
    return caught.value.diagnostics[0].code


def names(found):
    return [each.module.removeprefix("transformer.") for each in found.copies]


def test_by_default_all_norms(model):
    found = plan(model)
    assert names(found) == ["h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"]
    assert not found.sites
    assert found.parameter_count == 5 * 2 * 8


def test_skip_takes_some_away(model):
    assert names(plan(model, "on ln_1, ln_f  skip h[0].ln_1")) == ["h.1.ln_1", "ln_f"]


def test_a_bias_is_copied_once(model):
    found = plan(model, "on ln_1  bias all")
    assert names(found)[:2] == ["h.0.ln_1", "h.1.ln_1"]
    biases = [each.module for each in found.copies if each.is_bias]
    assert "transformer.ln_f" in biases
    assert not any(each.endswith("ln_1") for each in biases)


@pytest.mark.parametrize(
    ("clauses", "code"), [("on mlp", "E225"), ("on ln_3", "E201"), ("on ln_1 where linear", "E236")]
)
def test_what_it_cannot_take(model, clauses, code):
    found = refused(model, clauses)
    assert found == code


def test_training_it_changes_only_the_norms(model):
    adapted = compiler.apply(model, "adapter a = ln_tuning() { on ln_f }")
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    assert len(trained) == 2
    ids = torch.arange(6)[None]
    before = adapted(ids).logits
    assert torch.equal(before, model(ids).logits)
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if name in trained:
                each.add_(0.5)
    assert (adapted(ids).logits - before).abs().max() > 0.01
    adapted.delete_adapter("a")
    assert torch.equal(adapted(ids).logits, before)


def check(text):
    (method,) = parse(Source("x", text)).statements
    assert isinstance(method, tree.Method)
    return check_method(method)


def test_such_a_method_has_no_formula():
    rule = check('method m() { copies saved "norms" unread "old", "older" peft M { } }')
    assert (rule.copies, rule.unread, rule.kinds) == ("norms", ("old", "older"), ())
    for text in (
        'on linear copies saved "norms"',
        'copies saved "norms" b\' = b + b',
        'copies saved "no key!"',
    ):
        with pytest.raises(SpecError):
            check(f"method m() {{ {text} }}")

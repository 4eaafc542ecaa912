"""A model of the user's class: what is the user's own stays reachable, whatever stands in front of it."""

import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.compiler.api import AdaptedModel
from peftc.runtime.adapted.adapted_class import adapted_class
from peftc.runtime.adapted.adapted_module import AdaptedModule

SPEC = "adapter a = lora(rank = 2) { on first }"
X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Counting:
    """A mixin of the user's."""

    def requires_grad_(self, requires_grad=True):
        self.seen = [*getattr(self, "seen", []), requires_grad]
        return super().requires_grad_(requires_grad)


class Net(Counting, nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)

    def forward(self, x, *, scale=1):
        return self.first(x) * scale

    def load_state_dict(self, state_dict, *args, **options):
        self.loaded = sorted(state_dict)
        return super().load_state_dict(state_dict, *args, **options)

    def describe(self):
        return f"the user's, of {type(self).__name__}"


@pytest.fixture
def adapted():
    return compiler.apply(Net(), SPEC)


def test_the_user_s_own_methods_are_called(adapted):
    adapted.load_state_dict(adapted.state_dict())
    assert "first.weight" in adapted.loaded
    adapted.requires_grad_(False)
    assert adapted.seen == [False]


def test_inherited_is_the_user_s_class_under_any_class_of_ours(adapted):
    class Between(nn.Module):
        def describe(self):
            return "of a class beside ours"

    class More(AdaptedModel, Between):
        def load_state_dict(self, *args, **options):
            raise AssertionError("not this one")

    adapted.__class__ = adapted_class(Net, More)
    assert adapted.describe() == "of a class beside ours"
    assert adapted._inherited("describe")() == "the user's, of Net"
    assert adapted._inherited("load_state_dict").__func__ is Net.load_state_dict
    assert adapted._inherited("requires_grad_").__func__ is Counting.requires_grad_


def test_a_class_of_the_user_s_that_derives_from_it(adapted):
    class Derived(type(adapted)):
        def describe(self):
            return "further below"

    adapted.__class__ = Derived
    assert adapted._inherited("describe")() == "the user's, of Derived"


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X, 2), {}, "takes 2 positional arguments but 3 were given"),
        ((X,), {"x": X}, "got multiple values for argument 'x'"),
        ((X,), {"scle": 2}, "got an unexpected keyword argument 'scle'"),
    ],
)
def test_a_call_that_the_user_s_forward_refuses(args, kwargs, message, adapted):
    with pytest.raises(TypeError, match=message):
        adapted(*args, **kwargs)


def test_nothing_of_ours_is_a_stub():
    """Every class that ours derive from can do what it says without what derives from it."""
    ours = [each for each in AdaptedModel.__mro__ if each.__module__.startswith("peftc.")]
    assert ours[-1] is AdaptedModule
    assert [each.__bases__ for each in ours] == [*((each,) for each in ours[1:]), (nn.Module,)]
    made = object.__new__(adapted_class(Net, AdaptedModule))
    made.__dict__.update(compiler.apply(Net(), SPEC).__dict__)
    assert made(X).shape == (2, 5)
    assert made.gradient_checkpointing_disable() is None

"""Every built-in method that changes no weight, on the models it fits: what must hold whatever it puts in front."""

import copy
import functools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import transformers
from torch import nn

from peftc import compiler
from peftc.compiler.api import adapt
from peftc.grammar.spec.library import builtin_methods
from peftc.runtime.adapters.bank import AdapterParameters
from tests import zoo
from tests.matrix import wide

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(zoo.make, name) for name in ("llama", "gpt2", "t5")},
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    ),
}
FITS = {
    "llama": ("prompt", "cache", "attention"),
    "gpt2": ("prompt", "cache", "attention"),
    "t5": ("prompt", "cache"),
    "bert": ("prompt", "cache"),
    "vit": ("cache",),
}
IDS = torch.arange(3, 9).reshape(2, 3)

METHODS = {name: rule for name, rule in builtin_methods().items() if rule.prompt is not None}
# What a method cannot do without; the others are two tokens long.
ARGUMENTS = {"multitask_prompt": "length = 2, tasks = 3", "cpt": "ids = [5, 6, 7], types = [1, 2, 3]"}


def pairs() -> Iterator[tuple[str, str]]:
    for model, kinds in FITS.items():
        for name, rule in METHODS.items():
            if set(rule.kinds) & set(kinds):
                yield model, name


every_pair = pytest.mark.parametrize(("kind", "method"), wide(pairs(), ("gpt2", "bert", "vit")))


@functools.cache
def made(kind: str) -> tuple[nn.Module, compiler.AdaptedModel, torch.Tensor]:
    """A model, an adapted model of it that every method puts its adapters into, and what the model says."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        return model, adapt(model), model(**inputs(kind))[0]


def inputs(kind: str, method: str = "") -> dict[str, torch.Tensor]:
    given = (
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)} if kind == "vit" else {"input_ids": IDS}
    )
    if kind == "t5":
        given["decoder_input_ids"] = IDS
    if "tasks =" in ARGUMENTS.get(method, ""):
        given["task_ids"] = torch.tensor([2, 0])
    return given


@pytest.fixture
def ground(kind: str) -> Iterator[tuple[nn.Module, compiler.AdaptedModel, torch.Tensor]]:
    model, adapted, plain = made(kind)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    yield model, adapted, plain
    adapted.delete_adapter(adapted._adapter_state.names())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items()), "the base is as it was"
    assert all(each.grad is None for each in model.parameters())


def add(adapted: compiler.AdaptedModel, method: str, name: str, seed: int) -> AdapterParameters:
    torch.manual_seed(seed)
    adapted.add_adapter(f"adapter {name} = {method}({ARGUMENTS.get(method, 'length = 2')})")
    adapter = adapted._adapter_state.adapter(name)
    with torch.no_grad():
        for each in adapter.parameters():
            if each.requires_grad:
                each.add_(torch.randn_like(each) / 2)
    return adapter


def count(adapted: compiler.AdaptedModel) -> int:
    return sum(len(each.programs) for each in adapted._adapter_state.engine._specialisations.values())


@every_pair
def test_laws(kind: str, method: str, ground: tuple[nn.Module, compiler.AdaptedModel, torch.Tensor]) -> None:
    _, adapted, plain = ground
    given = inputs(kind, method)
    adapter = add(adapted, method, "a", 1)

    found = adapted(**given)[0]
    assert found.shape == plain.shape, "the output is of the user's own tokens"
    assert (found - plain).abs().max() > 1e-4, "the adapter does something"
    trained = [each for each in adapter.parameters() if each.requires_grad]
    assert trained
    for each in torch.autograd.grad(found.square().sum(), trained):
        assert each.abs().max() > 0, "a gradient reaches every parameter"

    with torch.no_grad():
        with adapted.disable_adapter():
            plainly = {name: each for name, each in given.items() if name != "task_ids"}
            assert torch.equal(adapted(**plainly)[0], plain), "without it the base speaks"
        assert torch.equal(adapted(**given)[0], found)

        programs = count(adapted)
        add(adapted, method, "b", 2)
        other = adapted(**given)[0]
        assert (other - found).abs().max() > 1e-4
        adapted.set_adapter("a")
        assert torch.equal(adapted(**given)[0], found), "switching back is exact"
        assert count(adapted) == programs, "adapters of equal structure share what was made"


@pytest.mark.parametrize(("kind", "method"), [each for each in pairs() if each[0] == "gpt2"])
def test_a_copy_has_adapters_of_its_own(
    kind: str, method: str, ground: tuple[nn.Module, compiler.AdaptedModel, torch.Tensor]
) -> None:
    _, adapted, _ = ground
    given = inputs(kind, method)
    adapter = add(adapted, method, "a", 1)
    with torch.no_grad():
        found = adapted(**given)[0]
        other = copy.deepcopy(adapted)
        for each in adapter.parameters():
            each.zero_()
        assert torch.equal(other(**given)[0], found)


def test_every_method_is_met() -> None:
    assert {method for _, method in pairs()} == set(METHODS)
    assert len(METHODS) >= 6

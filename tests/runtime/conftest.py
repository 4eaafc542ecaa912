"""Tiny models, PEFT's adapters on them, and the plans that say the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftc.grammar.method.bind import Place, bind
from peftc.grammar.method.rule import MethodRule
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.spec.values import complete
from peftc.passes.plan.plan import AdapterPlan, PlannedCopy, PlannedSite
from peftc.passes.plan.site import Site
from tests import zoo
from tests.peft_release import peft_as_oracle
from tests.shared_traces import shared_traces  # noqa: F401  (a fixture of every test here)


@pytest.fixture(scope="session", autouse=True)
def peft_computes_what_it_means() -> Iterator[None]:
    with peft_as_oracle():
        yield


# Files are spelled out in these tests, shapes and all: they are small, and two layers show names that differ.
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


def _site(model: nn.Module, name: str) -> Site:
    """The site of a module's weight, or of a parameter held directly."""
    modules = dict(model.named_modules())
    if name in modules:
        module = modules[name]
        if isinstance(module, nn.Embedding):
            return Site(name, "weight", "embedding", module.embedding_dim, module.num_embeddings, transposed=True)
        rows, columns = module.weight.shape
        if isinstance(module, Conv1D):
            return Site(name, "weight", "conv1d", columns, rows, transposed=True)
        return Site(name, "weight", "linear", rows, columns, dtype=module.weight.dtype)
    module, _, leaf = name.rpartition(".")
    *count, rows, columns = model.get_parameter(name).shape
    return Site(module, leaf, "parameter", rows, columns, count=count[0] if count else 1)


@dataclass
class Planner:
    """Plans of LoRA by names of sites, in the model's order."""

    rule: MethodRule = field(default_factory=lambda: builtin_methods()["lora"])

    def __call__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        train: Sequence[str] = (),
        bias: str = "none",
        by_site: Mapping[str, Mapping[str, object]] | None = None,
        adapter: str = "default",
        **values: object,
    ) -> AdapterPlan:
        defaults = {**dict(complete(self.rule, ())), **values}
        sites = [self._planned(_site(model, name), {**defaults, **(by_site or {}).get(name, {})}) for name in names]
        copies = [self._copy(model, module) for module in train]
        if bias != "none":
            adapted = {each.site.module for each in sites}
            for name, parameter in model.named_parameters():
                module, _, leaf = name.rpartition(".")
                if leaf == "bias" and module not in train and (bias == "all" or module in adapted):
                    copies.append(PlannedCopy(module, ((leaf, tuple(parameter.shape), True),), is_bias=True))
        spec = AdapterSpec(adapter, self.rule, tuple(defaults.items()), bias=bias)
        return AdapterPlan(spec, tuple(sites), tuple(copies))

    def _planned(self, site: Site, values: dict[str, object]) -> PlannedSite:
        place = Place(site.kind, site.out_features, site.in_features, site.count, site.has_bias, name=site.name)
        return PlannedSite(site, bind(self.rule, tuple(values.items()), place, strict=False))

    def _copy(self, model: nn.Module, module: str) -> PlannedCopy:
        tensors = model.get_submodule(module).named_parameters()
        return PlannedCopy(module, tuple((name, tuple(each.shape), True) for name, each in tensors))


@pytest.fixture
def tiny() -> SimpleNamespace:
    """Makers of tiny random models, the same weights at every call."""

    def llama(*, tied: bool = False, attention_bias: bool = False) -> nn.Module:
        return zoo.make("llama", **SIZES, tie_word_embeddings=tied, attention_bias=attention_bias)

    return SimpleNamespace(
        llama=llama,
        gpt2=partial(zoo.make, "gpt2", vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        bert=partial(zoo.make, "bert", **{**SIZES, "num_attention_heads": 2}),
        qwen3_moe=partial(zoo.make, "moe", **SIZES, moe_intermediate_size=8, head_dim=4),
    )


@pytest.fixture
def plan() -> Planner:
    """Makes LoRA plans by hand: `plan(model, ["model.layers.0.self_attn.q_proj"], rank=4)`."""
    return Planner()

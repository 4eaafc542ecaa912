"""Tiny models, PEFT's adapters on them, and the plans that say the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftc.grammar.method.bind import Place, bind
from peftc.grammar.method.rule import MethodRule
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.spec.values import complete
from peftc.passes.plan.plan import AdapterPlan, PlannedCopy, PlannedSite
from peftc.passes.plan.site import Site
from tests.shared_traces import shared_traces  # noqa: F401  (a fixture of every test here)


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
        return Site(name, "weight", "linear", rows, columns)
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


def _small(**more: int) -> dict[str, int]:
    return {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **more}


def _llama(tied: bool = False, attention_bias: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        **_small(),
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **_small())
    )


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **_small()
    )
    return transformers.BertForSequenceClassification(config)


def _qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        **_small(),
    )
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.fixture
def tiny() -> SimpleNamespace:
    """Makers of tiny random models, the same weights at every call."""

    def seeded(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def made(**options: bool) -> nn.Module:
            torch.manual_seed(0)
            return make(**options).eval()

        return made

    return SimpleNamespace(llama=seeded(_llama), gpt2=seeded(_gpt2), bert=seeded(_bert), qwen3_moe=seeded(_qwen3_moe))


@pytest.fixture
def plan() -> Planner:
    """Makes LoRA plans by hand: `plan(model, ["model.layers.0.self_attn.q_proj"], rank=4)`."""
    return Planner()

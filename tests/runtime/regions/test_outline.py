"""The partition that a model tells of itself is the one that runs."""

from typing import Any

import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.compiler import ModelError
from peftc.compiler.api import Compiler
from peftc.runtime.regions.partition import Partition
from peftc.runtime.regions.region import Bound, Split
from tests.quantized_models import dense, quantize
from tests.zoo import make

IDS = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 2, 1, 30]])
SPEC = 'adapter a = lora(rank = 2, init = "random") { on all linear, lm_head }'


def adapted_llama(spec: str = SPEC, **options: Any) -> Any:
    return compiler.apply(make("llama", num_hidden_layers=3), spec, **options).eval()


def regions_of(partition: Partition) -> set[str]:
    return {name for row in partition.regions for name in row.modules}


def ran(adapted: Any, kind: type) -> set[str]:
    """The modules that a call found a program for, or none: what happened, whatever is told."""
    tenant = adapted._adapter_state.engine.active
    return {
        path for path, local in tenant.regions.items() for each in local.programs.values() if isinstance(each, kind)
    }


def hook(adapted: Any) -> None:
    adapted.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)


def own_forward(adapted: Any) -> None:
    module = adapted.model.layers[0].self_attn
    module.forward = module.forward


def parametrization(adapted: Any) -> None:
    nn.utils.parametrize.register_parametrization(adapted.model.layers[2].input_layernorm, "weight", nn.Identity())


def mixed(adapted: Any) -> None:
    adapted.model.layers[0].mlp.train()


ATTACHED = {
    hook: ("model.layers.1", "a hook on mlp.act_fn"),
    own_forward: ("model.layers.0", "a forward of its own on self_attn"),
    parametrization: ("model.layers.2", "a parametrization of input_layernorm"),
    mixed: ("model.layers.0", "mlp is in training, and the rest is otherwise"),
}


@pytest.mark.parametrize("regions", ["layers", "modules"])
@pytest.mark.parametrize("attach", [None, *ATTACHED], ids=lambda each: each and each.__name__)
def test_what_is_told_is_what_runs(attach: Any, regions: Any) -> None:
    adapted = adapted_llama(regions=regions)
    if attach is not None:
        attach(adapted)
    before = adapted.region_partition()
    with torch.no_grad():
        adapted(IDS)
    assert regions_of(before) == ran(adapted, Bound)
    assert {name for row in before.splits for name in row.modules} == ran(adapted, Split)
    after = adapted.region_partition()
    assert regions_of(after) == regions_of(before)
    assert all(row.traces == 1 for row in after.regions)
    if attach is not None and regions == "layers":
        module, why = ATTACHED[attach]
        assert [row.why for row in before.splits if module in row.modules] == [why]
        assert not any(row.called or row.refused for row in before.splits)


def test_what_was_attached_and_is_no_more() -> None:
    adapted = adapted_llama()
    before = adapted.region_partition()
    handle = adapted.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    assert adapted.region_partition() != before
    handle.remove()
    assert adapted.region_partition() == before


def test_what_was_put_in_the_place_of_a_region() -> None:
    adapted = adapted_llama()
    adapted.model.layers[1] = make("llama").model.layers[0]
    partition = adapted.region_partition()
    assert [each.modules for each in partition.regions[:2]] == [
        ("model.layers.0", "model.layers.2"),
        ("model.layers.1",),
    ]
    assert not partition.splits
    with torch.no_grad():
        adapted(IDS)
    assert regions_of(partition) == ran(adapted, Bound)


def test_what_was_moved() -> None:
    adapted = adapted_llama()
    layers = list(adapted.model.layers)
    adapted.model.layers[0], adapted.model.layers[1] = layers[1], layers[0]
    partition = adapted.region_partition()
    assert partition.regions[0].modules == ("model.layers.2",)
    (split,) = partition.splits
    assert split.modules == ("model.layers.0", "model.layers.1")
    assert split.why == "it was moved here, with the adapters that it had"


def test_a_kind_says_how_many_there_are_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[nn.Module] = []
    original = Compiler.trace_region
    monkeypatch.setattr(
        Compiler, "trace_region", lambda self, module, call: traced.append(module) or original(self, module, call)
    )
    adapted = adapted_llama("adapter a = lora { on layers[0].mlp.up_proj, layers[*].self_attn.q_proj, lm_head }")
    with torch.no_grad():
        adapted(IDS), adapted(IDS[:1]), adapted.generate(IDS, max_new_tokens=3, do_sample=False)
    layers, head = adapted.region_partition().regions
    assert (layers.kind, len(layers.modules), layers.variants) == ("LlamaDecoderLayer", 3, 2)
    assert (head.kind, len(head.modules), head.variants) == ("Linear", 1, 1)
    assert layers.traces + head.traces == len(traced)
    assert layers.traces == sum(each is not adapted.lm_head for each in traced)


def test_kinds_of_one_class_have_numbers() -> None:
    kinds = [row.kind for row in adapted_llama("adapter a = lora { on q_proj, k_proj }", regions="modules")
             .region_partition().regions]  # fmt: skip
    assert kinds == ["Linear", "Linear 2"], "keys are narrower"


@pytest.mark.parametrize(
    ("spec", "regions", "why"),
    [
        (SPEC, "model", 'asked for by regions = "model"'),
        ("adapter a = prefix(length = 2)", "layers", "virtual tokens in front of the cache go into all of it"),
        ("adapter a = prompt(length = 2)", "modules", "virtual tokens in front of the text go into all of it"),
    ],
)
def test_one_graph(spec: str, regions: Any, why: str) -> None:
    adapted = adapted_llama(spec, regions=regions)
    (row,) = adapted.region_partition().regions
    assert (row.modules, row.kind, row.why, row.traces) == (("",), "LlamaForCausalLM", why, 0)
    with torch.no_grad():
        adapted(IDS)
    assert adapted.region_partition().regions[0].traces == 1
    assert ran(adapted, Bound) == set()


class Choosy(nn.Module):
    """Where it is told to, what it computes depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor, how: Any = None) -> torch.Tensor:
        x = self.norm(x)
        return self.fc(x) if how is None or (how == "choose" and x.sum() > -100) else self.fc(x) + 1


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, how: Any = None) -> torch.Tensor:
        for each in self.blocks:
            x = each(x) if how is None else each(x, how)
        return x


def test_what_only_a_call_finds_out() -> None:
    adapted = compiler.apply(Net(Choosy(), Choosy()), "adapter a = lora(rank = 2) { on fc }")
    x = torch.randn(3, 4)
    assert adapted.region_partition().splits == ()
    adapted(x)
    assert adapted.region_partition().splits == ()
    adapted(x, "choose")
    adapted(x, object())
    partition = adapted.region_partition()
    blocks, inner = partition.regions
    assert (blocks.modules, blocks.traces) == (("blocks.0", "blocks.1"), 1), "some calls of theirs have a graph"
    assert (inner.modules, inner.why) == (("blocks.0.fc", "blocks.1.fc"), "the module around it is split")
    untraced, opaque = partition.splits
    assert untraced.why.startswith("Choosy cannot be traced for this call: ")
    assert opaque.why == "it is called with a object"
    assert all(row.modules == blocks.modules and row.called and not row.refused for row in partition.splits)
    adapted.to(torch.float64)
    assert adapted.region_partition().splits == (), "another model, of which nothing is known"


class Holder(nn.Module):
    """Holds the weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.act = nn.Parameter(torch.randn(4, 4)), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x @ self.own)


def test_weights_of_its_own() -> None:
    adapted = compiler.apply(Net(Holder(), Holder()), "adapter a = lora(rank = 2) { on blocks[*].own }")
    adapted.blocks[1].act.register_forward_hook(lambda *_: None)
    (split,) = adapted.region_partition().splits
    assert (split.modules, split.why, split.owned, split.refused) == (("blocks.1",), "a hook on act", True, False)
    assert str(adapted.region_partition()).endswith("a hook on act, with its adapted weights computed for it")
    adapted(torch.randn(3, 4))


def test_what_is_refused() -> None:
    adapted = adapted_llama("adapter a = adaption_prompt(length = 2, layers = 3)")
    adapted.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    layer, attention = adapted.region_partition().splits
    assert (layer.modules, layer.refused) == (("model.layers.1",), False)
    assert (attention.modules, attention.why, attention.refused) == (
        ("model.layers.1.self_attn",), "a hook on q_proj", True,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"E465.*model\.layers\.1\.self_attn.*a hook"), torch.no_grad():
        adapted(IDS)


def test_weights_that_are_stored_packed() -> None:
    adapted = compiler.apply(quantize(dense("llama"), "nf4"), "adapter a = lora { on lm_head }").eval()
    layers, head = adapted.region_partition().regions
    assert layers.why == "a repeated layer of model.layers, with weights stored packed"
    assert head.modules == ("lm_head",)
    with torch.no_grad():
        adapted(IDS)
    assert regions_of(adapted.region_partition()) == ran(adapted, Bound)


def test_without_active_adapters_nothing_is_a_region() -> None:
    adapted = adapted_llama()
    adapted.disable_adapters()
    assert str(adapted.region_partition()) == "no module runs a graph"
    adapted.enable_adapters()
    assert len(adapted.region_partition().regions) == 2


def test_another_adapter_has_its_own() -> None:
    adapted = adapted_llama("adapter a = lora { on lm_head }", regions="modules")
    adapted.add_adapter("adapter b = lora { on layers[0].self_attn.q_proj }")
    assert regions_of(adapted.region_partition()) == {"model.layers.0.self_attn.q_proj"}
    adapted.set_adapter(["a", "b"])
    assert regions_of(adapted.region_partition()) == {"model.layers.0.self_attn.q_proj", "lm_head"}


def test_it_reads_well() -> None:
    adapted = adapted_llama()
    hook(adapted)
    with torch.no_grad():
        adapted(IDS)
    assert str(adapted.region_partition()).splitlines()[-3:] == [
        "lm_head: Linear 3, adapted, outside of repeated layers, traced once",
        "model.layers.1: split, a hook on mlp.act_fn",
        "model.layers.1.mlp: split, a hook on act_fn",
    ]

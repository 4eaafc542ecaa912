"""What sites of one category share, and what is computed from all their weights."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import SpecError
from peftc.grammar.spec.elaborate import read_spec
from peftc.passes.plan.site import category

METHOD = """
method pooled(seed: int = 3) {
    on     linear
    shared const mean[in] = reshape(sum(reshape(Ws, [members * tallest, in]), 0), [in])
        saved "mean" by category
    shared const noise[in] = normal(std = 1) seeded seed by category
    param  scale[in] = reshape(noise, [in]) saved "scale"
    W'     = W + scale * mean
}
"""


class Block(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.up, self.down = nn.Linear(4, out), nn.Linear(out, 4)

    def forward(self, x):
        return self.down(self.up(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.ModuleDict({"b": Block(out)}) for out in (3, 5)))

    def forward(self, x):
        for each in self.layers:
            x = each["b"](x)
        return x


def tensors(adapted):
    return {name.split("adapter_bank.a.")[1]: each for name, each in adapted.state_dict().items() if "_bank.a." in name}


def test_the_name_of_a_category():
    assert category("model.layers.3.self_attn.q_proj") == "self_attn_q_proj"
    assert category("bert.layer.1.attention.output.dense") == "attention_output"
    assert category("bert.layer.1.output.dense") == "output_dense"
    assert category("h.0") == "h_0"
    assert category("model.3.fc") == "fc"
    assert category("fc") == "fc"


def test_each_category_has_its_own_of_all_its_weights():
    torch.manual_seed(0)
    model = Model()
    adapted = compiler.apply(model, f"{METHOD} adapter a = pooled() {{ on up }}")
    (mean,) = [each for name, each in tensors(adapted).items() if "mean" in name]
    total = sum(block["b"].up.weight.sum(0) for block in model.layers)
    assert_close(mean, total)
    generator = torch.Generator().manual_seed(3)
    (first, second) = [each for name, each in tensors(adapted).items() if "scale" in name]
    assert_close(first, torch.empty(4).normal_(generator=generator))
    assert torch.equal(first, second)


def test_the_weights_of_all_are_no_part_of_a_formula():
    with pytest.raises(SpecError) as caught:
        read_spec("method m() { on linear W' = W + reshape(sum(sum(Ws, 0), 1), [1, in]) } adapter a = m()")
    assert caught.value.diagnostics[0].code == "E156"


def test_only_what_is_shared_is_by_category():
    with pytest.raises(SpecError) as caught:
        read_spec('method m() { on linear const c[in] = zeros saved "c" by category W\' = W + c } adapter a = m()')
    assert caught.value.diagnostics[0].code == "E139"

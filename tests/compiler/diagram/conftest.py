"""Graphs of tiny models, each traced once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn

from peftc import compiler
from peftc.compiler.pipeline.lower import specialise
from peftc.passes.plan.structure import Structure
from peftc.runtime.execution.call import Call, read_call
from peftc.runtime.model.model import AdaptedModel

SPEC = """
adapter alike = lora(rank = 4) { on layers[*].self_attn.{q_proj, v_proj} }
adapter mixed = lora(rank = 4) {
    on layers[*].self_attn.q_proj
    on layers[2].self_attn.q_proj with rank = 8
}
adapter head = lora(rank = 2) {
    on layers[0].mlp.up_proj
    on layers[*].self_attn.q_proj
    train lm_head
}
activate alike
"""


@dataclass
class Graphs:
    """The graphs of one adapted model, by the adapters that are active."""

    adapted: AdaptedModel
    call: Call

    @classmethod
    def of(cls, model: nn.Module, spec: str, arguments: Mapping[str, Any]) -> "Graphs":
        adapted = compiler.apply(model, spec)
        named = adapted._named((), arguments)
        return cls(adapted, read_call("", False, getattr(model, "config", None), named))

    def after(self, *adapters: str) -> fx.Graph:
        if adapters:
            self.adapted.set_adapter(list(adapters))
        return self.adapted._adapter_state.engine.graph(self.call)

    def before(self) -> fx.Graph:
        traced = self.adapted._adapter_state.engine.traced(self.call)
        return specialise(traced, Structure(), _no_slot, training=False, autocast=False)


def _no_slot(*_: object) -> torch.Tensor:
    raise AssertionError("a graph without adapters has no slots")


@pytest.fixture(scope="session")
def llama() -> Graphs:
    """Four layers, tied embeddings; `alike` is the same in all layers, `mixed` differs in the third."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, 32, (2, 5))
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Graphs.of(transformers.LlamaForCausalLM(config).eval(), SPEC, arguments)


@pytest.fixture(scope="session")
def experts() -> Graphs:
    """One layer of a mixture of experts, whose stacked weights are adapted themselves."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    spec = "adapter a = lora(rank = 2) { on layers[*].mlp.experts.{gate_up_proj, down_proj} }"
    ids = torch.randint(0, 32, (2, 5))
    return Graphs.of(transformers.Qwen3MoeForCausalLM(config).eval(), spec, {"input_ids": ids})


class Tiny(nn.Module):
    """Two linears with an activation between, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.act = nn.ReLU()
        self.down = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)).reshape(x.shape[0], 8))


@pytest.fixture(scope="session")
def tiny() -> Graphs:
    return Graphs.of(Tiny().eval(), "adapter a = lora(rank = 2) { on up }", {"x": torch.randn(3, 4)})

"""A method as peft configures it and as a spec says it: what the parity tests compare."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import peft
from torch import nn

from tests import zoo

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": partial(zoo.make, "llama", num_hidden_layers=2),
    "bert": partial(zoo.make, "bert", num_hidden_layers=2),
    "gpt2": partial(zoo.make, "gpt2", n_layer=2),
}
TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "dense"], "gpt2": ["c_attn", "c_proj"]}
EMBEDDINGS = {"llama": "embed_tokens", "bert": "word_embeddings", "gpt2": "wte"}

LINEAR = ("llama", "bert")  # where peft has a method for torch's own Linear only
ALL = ("llama", "bert", "gpt2")


@dataclass(frozen=True)
class Case:
    """One way to configure a method.

    `config` is peft's (target_modules is given to it), `arguments` ours, `clauses` what else the spec says. `models`
    are those peft supports the method on, `targets` replaces the usual ones. `starts_as_base` says whether the method
    changes nothing at first. Peft's parameters whose names hold `prefix` (by default its own prefix of the method) are
    moved by noise of size `std` before outputs are compared. `start_tolerance` is how near the base a start is that is
    it but for rounding. `gradients` is False where peft's own are wrong; the test then demands that they differ.
    """

    method: str
    label: str
    config: Callable[..., peft.PeftConfig]
    arguments: str = ""
    models: tuple[str, ...] = ALL
    clauses: str = ""
    targets: Mapping[str, list[str]] = field(default_factory=dict)
    embeddings: bool = False
    starts_as_base: bool = True
    prefix: str = ""
    std: float = 0.3
    tolerance: float = 1e-5
    start_tolerance: float = 0.0
    gradients: bool = True

    @property
    def name(self) -> str:
        """How the test is called."""
        return f"{self.method} {self.label}".strip()

    def targets_of(self, model: str) -> list[str]:
        """The names of the adapted modules."""
        chosen = self.targets.get(model, TARGETS[model])
        return chosen + ([EMBEDDINGS[model]] if self.embeddings else [])

    def spec(self, model: str) -> str:
        """Our spec of it."""
        chosen = ", ".join(self.targets_of(model))
        return f"adapter a = {self.method}({self.arguments}) {{ on {chosen} {self.clauses} }}"

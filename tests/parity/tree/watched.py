"""An adapted model beside a plain one with the formula, and how they are compared."""

import contextlib
from collections import Counter
from typing import Any

import torch
from hypothesis.stateful import RuleBasedStateMachine, invariant
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from tests.parity.tree.files import files, from_file
from tests.parity.tree.formula import Reference
from tests.parity.tree.hooks import SEEN, loss
from tests.parity.tree.subjects import Subject

STEPS: Counter[str] = Counter()
"""How often each action was taken."""


class Watched(RuleBasedStateMachine):
    """What is done to an adapted model is done to a plain one with the formula. `subject` is which model."""

    subject: Subject

    def __init__(self) -> None:
        super().__init__()
        self.base: Any = self.subject.make()
        self.before = self.base_outputs()
        first = files(self.subject) / "a"
        self.ours: Any = compiler.load(self.base, first, adapter_name="a", is_trainable=True).eval()
        self.theirs = Reference(self.base)
        self.theirs.model.eval()
        self.dtype = torch.float32
        self.merged_in: set[torch.dtype] = set()  # types in which weights that are merged were computed
        self.call = 0
        self.mode = "no_grad"
        self.hooks: list[tuple[nn.Module, nn.Module, str, int, int]] = []
        self.originals: dict[str, tuple[nn.Module, nn.Module]] = {}
        self.forwards: set[str] = set()
        self.left = Counter(dtype=2, copies=2, compile=1, inside=2, checkpointing=4)
        self.behind: list[tuple[Any, torch.Tensor]] = []
        self.number = 0
        self.theirs.add("a", from_file(self.subject, "a", self.dtype), active=False, trained=True)

    # --- looking ---

    def base_outputs(self) -> torch.Tensor:
        with torch.no_grad():
            output = self.base(**self.subject.calls[0](torch.float32))
        return output if isinstance(output, torch.Tensor) else output.logits

    def run(self, model: Any, how: int | None = None) -> tuple[torch.Tensor, int, list[torch.Tensor]]:
        """The outputs of a call, how many hidden states it gives, and what hooks saw."""
        SEEN.clear()
        torch.manual_seed(self.number)
        output = model(**self.subject.calls[self.call if how is None else how](self.dtype))
        logits = output if isinstance(output, torch.Tensor) else output.logits
        return logits, len(getattr(output, "hidden_states", None) or ()), list(SEEN)

    def in_mode(self) -> contextlib.AbstractContextManager[Any]:
        return {"no_grad": torch.no_grad, "grad": torch.enable_grad, "inference": torch.inference_mode}[self.mode]()

    def same(self, got: Any, wanted: Any) -> None:
        near = 1e-8 if self.exact() else 2e-4
        assert_close(got, wanted, atol=near, rtol=near)

    def exact(self) -> bool:
        if self.theirs.merged is None:
            self.merged_in = set()
        kinds = {each.dtype for adapter in self.theirs.adapters.values() for _, _, each in adapter.named()}
        return kinds | {self.dtype, *self.merged_in} == {torch.float64}

    @invariant()
    def agree(self) -> None:
        """Outputs, what hooks see, and where gradients are kept those of the adapters, are the formula's."""
        self.number += 1
        with self.in_mode():
            got, wanted = self.run(self.ours), self.run(self.theirs.model)
        self.same(got, wanted)
        assert self.ours.active_adapters() == [name for name, _ in self.theirs.active]
        trained = {
            self.parameter(name, path, role)
            for name, adapter in self.theirs.adapters.items()
            for path, role, _ in adapter.named()
            if name in self.theirs.trained
        }
        assert {each for each in self.ours.parameters() if each.requires_grad and self.is_adapters(each)} == trained
        if self.mode == "grad":
            assert got[0].requires_grad == wanted[0].requires_grad
            if got[0].requires_grad:
                self.gradients(got[0], wanted[0])

    def gradients(self, got: torch.Tensor, wanted: torch.Tensor) -> None:
        for each in got, wanted:
            loss(each).backward()
        near = 1e-8 if self.exact() else 1e-3
        for name, adapter in self.theirs.adapters.items():
            for path, role, tensor in adapter.named():
                own = self.parameter(name, path, role)
                grad = None if own.grad is None else own.grad.view_as(tensor)
                none = grad is None and (tensor.grad is None or not tensor.grad.any())
                if not none:
                    assert_close(grad, tensor.grad, atol=near, rtol=near)
                own.grad = tensor.grad = None

    def parameter(self, name: str, path: str, role: str) -> nn.Parameter:
        return self.ours.get_parameter(f"adapter_bank.{name}.{path.replace('.', '__')}.{role}")

    def is_adapters(self, parameter: nn.Parameter) -> bool:
        return any(parameter is each for each in self.ours.get_submodule("adapter_bank").parameters())

    def both(self) -> tuple[Any, Any]:
        return self.ours, self.theirs.model

    def sync(self) -> None:
        """Have the formula's adapters be ours, to the last bit: steps of two optimizers drift apart."""
        with torch.no_grad():
            for name, adapter in self.theirs.adapters.items():
                for path, role, tensor in adapter.named():
                    own = self.parameter(name, path, role)
                    self.same(own.view_as(tensor), tensor)
                    tensor.copy_(own.view_as(tensor))

    def teardown(self) -> None:
        for model, logits in self.behind:
            model.eval()
            with torch.no_grad():
                assert_close(self.run(model, 0)[0], logits)
        assert torch.equal(self.base_outputs(), self.before), "the user's own model"

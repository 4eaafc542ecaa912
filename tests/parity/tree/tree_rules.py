"""What users do to a module tree, to an adapted one and to a plain one alike."""

import copy
import pickle

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import nn

from tests.parity.tree.hooks import HOOKS, KEPT, skip
from tests.parity.tree.watched import STEPS, Watched


class TreeRules(Watched):
    """Hooks, modes, attributes, replaced modules, types, copies."""

    @rule(how=st.integers(0, 9))
    def called_with(self, how: int) -> None:
        STEPS["call"] += 1
        self.call = how % len(self.subject.calls)

    @rule(mode=st.sampled_from(["no_grad", "grad", "inference"]))
    def grad_mode(self, mode: str) -> None:
        STEPS["grad mode"] += 1
        self.mode = mode

    @precondition(lambda self: len(self.hooks) < 3)
    @rule(data=st.data(), kind=st.sampled_from(sorted(HOOKS)))
    def hook(self, data: st.DataObject, kind: str) -> None:
        STEPS["hook on"] += 1
        place = data.draw(st.sampled_from((*self.subject.layers, *self.subject.parts)))
        modules = [each.get_submodule(place) for each in self.both()]
        handles = [HOOKS[kind](each) for each in modules]
        where = next(each for each in KEPT if handles[0].id in vars(modules[0])[each])
        self.hooks.append((modules[0], modules[1], where, handles[0].id, handles[1].id))

    @precondition(lambda self: self.hooks)
    @rule(at=st.integers(0, 2))
    def unhook(self, at: int) -> None:
        STEPS["hook off"] += 1
        ours, theirs, where, own, other = self.hooks.pop(at % len(self.hooks))
        del vars(ours)[where][own], vars(theirs)[where][other]

    @rule(data=st.data(), training=st.booleans())
    def train(self, data: st.DataObject, training: bool) -> None:
        STEPS["train, eval"] += 1
        place = data.draw(st.sampled_from(("", "", "", *self.subject.layers, *self.subject.parts)))
        for each in self.both():
            each.get_submodule(place).train(training)

    @rule(data=st.data())
    def attribute(self, data: st.DataObject) -> None:
        STEPS["attribute"] += 1
        place, name, values = data.draw(st.sampled_from(self.subject.attributes))
        value = data.draw(st.sampled_from(values))
        for each in self.both():
            module = each.get_submodule(place)
            if hasattr(module, name) or place in self.subject.layers:
                setattr(module, name, value)

    @precondition(lambda self: self.subject.configs)
    @rule(data=st.data())
    def config(self, data: st.DataObject) -> None:
        STEPS["config"] += 1
        name, values = data.draw(st.sampled_from(self.subject.configs))
        value = data.draw(st.sampled_from(values))
        for each in self.both():
            setattr(each.config, name, value)

    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        STEPS["replaced module"] += 1
        place, kinds = data.draw(st.sampled_from(self.subject.swaps))
        kind = data.draw(st.sampled_from((None, *kinds)))
        owner, _, leaf = place.rpartition(".")
        parents = [each.get_submodule(owner) for each in self.both()]
        if kind is None:
            if place not in self.originals:
                return
            new = self.originals.pop(place)
        else:
            self.originals.setdefault(place, tuple(getattr(each, leaf) for each in parents))  # type: ignore[arg-type]
            new = (kind(), kind())
        for parent, module in zip(parents, new, strict=True):
            setattr(parent, leaf, module.to(self.dtype).train(getattr(parent, leaf).training))
        # Adapters are where a selector finds them, whichever module stands there; what is merged goes with the module.
        self.theirs.refresh()
        inside = {id(each) for each in self.ours.modules()}
        self.hooks = [each for each in self.hooks if id(each[0]) in inside]

    @rule(data=st.data())
    def forward(self, data: st.DataObject) -> None:
        STEPS["own forward"] += 1
        place = data.draw(st.sampled_from((*self.subject.layers, *self.subject.bypassed)))
        for each in self.both():
            module = each.get_submodule(place)
            if place in self.forwards:
                del module.forward
            else:
                module.forward = skip
        self.forwards ^= {place}

    @precondition(lambda self: self.subject.biases and self.theirs.merged is None)
    @rule(data=st.data(), there=st.booleans())
    def bias(self, data: st.DataObject, there: bool) -> None:
        STEPS["bias"] += 1
        place = data.draw(st.sampled_from(self.subject.biases))
        for each in self.both():
            module = each.get_submodule(place)
            size = module.weight.shape[0]
            value = torch.linspace(-1, 1, size, dtype=self.dtype)
            module.bias = nn.Parameter(value, requires_grad=False) if there else None

    @precondition(lambda self: self.left["dtype"])
    @rule()
    def to(self) -> None:
        STEPS["to"] += 1
        self.left["dtype"] -= 1
        dtype = torch.float64 if self.dtype == torch.float32 else torch.float32
        self.ours.to(dtype)
        self.theirs.to(dtype)
        self.dtype = dtype

    @precondition(lambda self: self.left["checkpointing"])
    @rule(on=st.booleans())
    def checkpointing(self, on: bool) -> None:
        STEPS["checkpointing"] += 1
        self.left["checkpointing"] -= 1
        if on:
            self.ours.gradient_checkpointing_enable()
        else:
            self.ours.gradient_checkpointing_disable()

    @precondition(lambda self: self.left["copies"])
    @rule(pickled=st.booleans())
    def copied(self, pickled: bool) -> None:
        STEPS["pickle" if pickled else "deepcopy"] += 1
        self.left["copies"] -= 1
        old = self.ours
        paths = {id(each): path for path, each in old.named_modules()}
        new = pickle.loads(pickle.dumps(old)) if pickled else copy.deepcopy(old)
        self.hooks = [(new.get_submodule(paths[id(each[0])]), *each[1:]) for each in self.hooks if id(each[0]) in paths]
        self.originals = {at: (copy.deepcopy(own), other) for at, (own, other) in self.originals.items()}
        self.ours = new

    @precondition(lambda self: self.left["compile"])
    @rule(at=st.integers(0, 3))
    def compiled(self, at: int) -> None:
        STEPS["compile"] += 1
        self.left["compile"] -= 1
        places = ("", *self.subject.layers)
        module = self.ours.get_submodule(places[at % len(places)])
        module.compile(backend="eager")
        try:
            self.agree()
        finally:
            module._compiled_call_impl = None
            torch._dynamo.reset()

    @precondition(lambda self: self.theirs.merged is None)
    @rule(assign=st.booleans(), alone=st.booleans(), factor=st.sampled_from([1.0, -1.0]))
    def state_dict(self, assign: bool, alone: bool, factor: float) -> None:
        STEPS["state dict"] += 1
        state = {
            name: value.clone() * (factor if "adapter_bank" in name else 1)
            for name, value in self.ours.state_dict().items()
            if "adapter_bank" in name or not alone
        }
        self.ours.load_state_dict(state, assign=assign, strict=not alone)
        with torch.no_grad():
            for adapter in self.theirs.adapters.values():
                for _, _, tensor in adapter.named():
                    tensor.mul_(factor)
        if assign:
            for each in self.ours.get_submodule("adapter_bank").parameters():
                each.requires_grad_(False)
            for name in self.theirs.trained:
                for each in self.ours.get_submodule(f"adapter_bank.{name}").parameters():
                    each.requires_grad_(True)

"""The life of adapters: added, switched, merged, trained, deleted; and what is refused."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import nn

from peftc import compiler
from tests.parity.tree.files import files, from_file
from tests.parity.tree.formula import Adapter
from tests.parity.tree.hooks import loss
from tests.parity.tree.watched import STEPS, Watched


class AdapterRules(Watched):
    """What is done to adapters is done to the formula's."""

    def missing(self) -> list[str]:
        return [name for name in self.subject.files if name not in self.theirs.adapters]

    def load(self, name: str, trained: bool) -> None:
        self.ours.load_adapter(files(self.subject) / name, name, is_trainable=trained)
        adapter = from_file(self.subject, name, self.dtype)
        self.theirs.add(name, adapter, active=False, trained=trained)
        if not trained:
            self.theirs.model.eval()

    @precondition(lambda self: self.missing())
    @rule(data=st.data(), trained=st.booleans())
    def load_adapter(self, data: st.DataObject, trained: bool) -> None:
        STEPS["load"] += 1
        self.load(data.draw(st.sampled_from(self.missing())), trained)

    @precondition(lambda self: set(self.subject.specs) - set(self.theirs.adapters))
    @rule(data=st.data())
    def add_adapter(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.subject.specs) - set(self.theirs.adapters))))
        STEPS["add"] += 1
        spec, scale = self.subject.specs[name]
        torch.manual_seed(self.number)
        self.ours.add_adapter(f"adapter {name} = {spec}")
        pairs: dict[str, dict[str, nn.Parameter]] = {}
        paths = {path.replace(".", "__"): path for path, _ in self.theirs.model.named_modules()}
        for key, value in self.ours.get_submodule(f"adapter_bank.{name}").named_parameters():
            place, _, role = key.rpartition(".")
            pairs.setdefault(paths[place], {})[role] = nn.Parameter(value.detach().clone())
        adapter = Adapter(scale, 0.0, {path: (own["A"], own["B"]) for path, own in pairs.items()})
        self.theirs.add(name, adapter, active=True, trained=True)

    @precondition(lambda self: self.theirs.adapters)
    @rule(data=st.data(), trained=st.booleans())
    def switch(self, data: st.DataObject, trained: bool) -> None:
        STEPS["switch"] += 1
        names = data.draw(st.lists(st.sampled_from(sorted(self.theirs.adapters)), unique=True, max_size=3))
        weights = {name: data.draw(st.sampled_from([1.0, 1.0, 0.5])) for name in names}
        weights |= {name: 1.0 for name in names if self.theirs.adapters[name].copies}
        self.ours.set_adapter(weights, inference_mode=not trained)
        self.theirs.merged = None
        self.theirs.activate(tuple(weights.items()), trained)

    @precondition(lambda self: set(self.theirs.adapters) - set(self.theirs.merged or ()))
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        STEPS["delete"] += 1
        name = data.draw(st.sampled_from(sorted(set(self.theirs.adapters) - set(self.theirs.merged or ()))))
        self.ours.delete_adapter(name)
        self.theirs.remove(name)

    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        STEPS["enable" if enabled else "disable"] += 1
        self.ours.enable_adapters() if enabled else self.ours.disable_adapters()
        self.theirs.enabled = enabled
        self.theirs.refresh()

    @precondition(lambda self: self.left["inside"])
    @rule()
    def disabled_inside(self) -> None:
        STEPS["disabled inside"] += 1
        self.left["inside"] -= 1
        before = self.theirs.enabled
        with self.ours.disable_adapter():
            self.theirs.enabled = False
            self.theirs.refresh()
            self.agree()
        self.theirs.enabled = before
        self.theirs.refresh()

    @precondition(lambda self: self.theirs.merged is None and self.theirs.active)
    @rule(data=st.data(), named=st.booleans())
    def merge(self, data: st.DataObject, named: bool) -> None:
        STEPS["merge"] += 1
        names = [data.draw(st.sampled_from(sorted(self.theirs.adapters)))] if named else None
        self.ours.merge_adapter(names)
        self.theirs.merge(names)
        kept = () if self.theirs.merged is None else self.theirs.merged.values()
        self.merged_in = {self.dtype} | {each.dtype for _, adapter in kept for _, _, each in adapter.named()}

    @precondition(lambda self: self.theirs.merged is not None)
    @rule()
    def unmerge(self) -> None:
        STEPS["unmerge"] += 1
        self.ours.unmerge_adapter()
        self.theirs.unmerge()

    @rule(merged=st.booleans())
    def plain(self, merged: bool) -> None:
        """A plain model of the base, or of what is active, merged."""
        STEPS["merge and unload" if merged else "unload"] += 1
        if merged and not self.theirs.active:
            return
        if self.forwards:
            return
        theirs = self.theirs
        if merged and theirs.merged is not None:
            if not theirs.enabled or any(name not in theirs.merged for name, _ in theirs.active):
                return  # active ones that are not merged would be merged too
            other = theirs.model
        else:
            other = theirs.served(theirs.active if merged else ()).model
        model = self.ours.merge_and_unload() if merged else self.ours.unload()
        with torch.no_grad():
            self.same(self.run(model), self.run(other))

    @precondition(lambda self: self.theirs.trained)
    @rule(rate=st.sampled_from([0.1, 0.01]))
    def step(self, rate: float) -> None:
        """A step of an optimizer, on both."""
        STEPS["optimizer step"] += 1
        self.number += 1
        with torch.enable_grad():
            got, wanted = self.run(self.ours)[0], self.run(self.theirs.model)[0]
            if not got.requires_grad:
                return
            for each in got, wanted:
                loss(each).backward()
        trained = [
            [each for each in self.ours.parameters() if self.is_adapters(each) and each.requires_grad],
            [each for adapter in self.theirs.adapters.values() for _, _, each in adapter.named() if each.requires_grad],
        ]
        for each in trained:
            optimizer = torch.optim.SGD(each, lr=rate)
            optimizer.step()
            optimizer.zero_grad()
        self.sync()

    @rule(data=st.data(), how=st.sampled_from(["in place", "data", "replaced"]))
    def edit(self, data: st.DataObject, how: str) -> None:
        """Somebody writes to an adapter's tensor."""
        if not self.theirs.adapters:
            return
        STEPS["edit"] += 1
        name = data.draw(st.sampled_from(sorted(self.theirs.adapters)))
        path, role, tensor = next(iter(self.theirs.adapters[name].named()))
        own = self.parameter(name, path, role)
        with torch.no_grad():
            if how == "in place":
                own.mul_(-1.0)
            elif how == "data":
                own.data = own.data * -1.0
            else:
                module = self.ours.get_submodule(f"adapter_bank.{name}.{path.replace('.', '__')}")
                setattr(module, role, nn.Parameter(own.detach() * -1.0, requires_grad=own.requires_grad))
            tensor.mul_(-1.0)

    # --- what is refused ---

    def wrongs(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """What there is to refuse now, with the code of the error."""
        ours, theirs = self.ours, self.theirs
        yield "E510", lambda: ours.set_adapter("nobody")
        yield "E560", lambda: ours.gradient_checkpointing_enable({"no_such_option": 1})
        yield "E561", lambda: ours.gradient_checkpointing_enable(every_n_layers=0)
        yield "E201", lambda: ours.add_adapter("adapter wrong = lora { on nothing_called_so }")
        for name in sorted(theirs.adapters)[:1]:
            yield "E512", partial(ours.set_adapter, [name, name])
            yield "E510", partial(ours.set_adapter, {name: 1.0, "nobody": 1.0})
            yield "E510", partial(ours.delete_adapter, [name, "nobody"])
        for name, adapter in theirs.adapters.items():
            if adapter.copies:
                yield "E513", partial(ours.set_adapter, {name: 0.5})
        if theirs.merged is not None:
            yield "E515", partial(ours.delete_adapter, list(theirs.merged)[:1])
        elif not theirs.adapters:
            yield "E525", ours.merge_adapter
        elif not theirs.active:
            yield "E517", ours.merge_adapter

    @rule(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        STEPS["refused"] += 1
        code, action = data.draw(st.sampled_from(list(self.wrongs())))
        before = self.facts()
        with pytest.raises(compiler.AdapterError) as caught:
            action()
        assert caught.value.diagnostics[0].code == code
        assert self.facts() == before

    def facts(self) -> Any:
        """What must not change."""
        ours = self.ours
        named = [
            (name, id(each), each._version, each.requires_grad, each.dtype)
            for name, each in (*ours.named_parameters(remove_duplicate=False), *ours.named_buffers())
        ]
        modules = [(name, id(each), each.training, sorted(vars(each))) for name, each in ours.named_modules()]
        return named, modules, ours.active_adapters(), ours.is_gradient_checkpointing

"""Traces a model with each repeated layer but the first of its kind left out: an operator stands for it.

While the exporter runs a twin, the first call of a kind of layer runs between two marks. Calls of layers alike with
arguments alike are one operator each, which gives tensors as the first one gave. `expand` then puts the first one's
nodes where these operators are. What nodes cannot tell (a cache that is to be updated, hooks inside of the layer) is
done here in the layer's stead; a layer that does anything else beside computing is traced by itself.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftc.compiler.trace.layer_form import CacheState, Form, Nest, UnlikeError, cache_state
from peftc.compiler.trace.layer_watch import Watch, is_watched, watched
from peftc.runtime.regions.kinds import indices

LIBRARY: Any = torch.library.Library("peftc", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("layer_begins(Tensor[] xs, int call) -> Tensor[]")
LIBRARY.define("layer_ends(Tensor[] xs, int call) -> Tensor[]")
LIBRARY.define("layer_again(Tensor[] xs, Tensor[] like, int call) -> Tensor[]")


def _same(xs: Sequence[torch.Tensor], call: int) -> list[torch.Tensor]:
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in xs]


def _like(xs: Sequence[torch.Tensor], like: Sequence[torch.Tensor], call: int) -> list[torch.Tensor]:
    return _same(like, call)


for _name, _function in (("layer_begins", _same), ("layer_ends", _same), ("layer_again", _like)):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftc::{_name}", _function, lib=LIBRARY)

BEGINS, ENDS, AGAIN = (getattr(torch.ops.peftc, name).default for name in ("layer_begins", "layer_ends", "layer_again"))


class StampError(Exception):
    """A layer cannot be stamped after all: the model is to be traced in full. Says why."""


@dataclass(eq=False)
class Body:
    """The first call of a kind of layer: what it gave, or why nothing is made of it."""

    path: str
    call: int
    reason: str = ""
    given: int = 0  # how many tensors it takes
    output: Nest | None = None
    inner: tuple[tuple[str, Nest], ...] = ()  # calls of hooked modules inside: path, and what they were given and gave
    after: CacheState | None = None
    tensors: list[torch.Tensor] = field(default_factory=list)  # what it gives, in the order of `layer_ends`


@dataclass
class Stamper:
    """Has the layers of a twin traced once for each kind. `kinds` are those of `repeated_layers`."""

    model: nn.Module
    kinds: Mapping[str, Hashable]
    bodies: dict[Hashable, Body] = field(default_factory=dict)
    calls: list[tuple[Body, str]] = field(default_factory=list)  # by number: of which kind, and of which layer
    alone: dict[str, str] = field(default_factory=dict)  # layers traced by themselves, and why
    watch: Watch | None = None  # of the layer that runs

    @property
    def stamped(self) -> dict[str, str]:
        """Layers that have another's nodes, and that other."""
        return {path: body.path for body, path in self.calls if body.path != path}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the twin's layers run once for each kind."""
        layers = {path: self.model.get_submodule(path) for path in self.kinds}
        layers = {path: layer for path, layer in layers.items() if "forward" not in vars(layer)}
        try:
            for path, layer in layers.items():
                vars(layer)["forward"] = self._forward(path, layer)
            yield
        finally:
            for layer in layers.values():
                vars(layer).pop("forward", None)

    def _forward(self, path: str, layer: nn.Module) -> Callable[..., Any]:
        plain = type(layer).forward

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return self._call(path, layer, args, kwargs)
            except UnlikeError as error:
                self.alone[path] = str(error)
                return plain(layer, *args, **kwargs)

        return run

    def _call(self, path: str, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """What the layer gives. Raises UnlikeError before anything is done where it has to run by itself."""
        if is_watched(layer):
            raise UnlikeError("it is in another layer that has its number")
        form = Form()
        given = form.take((args, kwargs))
        if not form.tensors:
            raise UnlikeError("it is given no tensor")
        hooked = _hooked(layer)
        form.key.append(tuple(hooked))
        values = [value for _, _, value in indices(layer)]
        numbers = list(dict.fromkeys(values))
        form.key.append(tuple(map(numbers.index, values)))
        before = None if form.cache is None else cache_state(form, form.cache, numbers)
        key = (self.kinds[path], form.frozen())
        body = self.bodies.get(key)
        if body is None:
            body = self.bodies[key] = Body(path, len(self.calls))
            output = self._first(body, layer, form, given, before, numbers, hooked)
            self.bodies[self.kinds[path], form.frozen()] = body  # it may have asked what its sizes are
            return output
        if body.reason:
            raise UnlikeError(body.reason)
        return self._again(body, path, layer, form, numbers)

    def _first(
        self,
        body: Body,
        layer: nn.Module,
        form: Form,
        given: Nest,
        before: CacheState | None,
        numbers: list[int],
        hooked: Sequence[str],
    ) -> Any:
        self.calls.append((body, body.path))
        body.given = len(form.tensors)
        taken = BEGINS(form.tensors, body.call)
        if before is not None:
            assert form.cache is not None
            before.put(form.cache, numbers, taken)
        args, kwargs = given.filled(taken)
        captured: list[tuple[str, Any]] = []
        with watched(layer, form.cache, self.watch) as watch, _capturing(layer, hooked, captured):
            outer, self.watch = self.watch, watch
            try:
                output = type(layer).forward(layer, *args, **kwargs)
            finally:
                self.watch = outer
        result = Form(tensors=list(taken), cache=form.cache)
        try:
            if [id(each) for each in _leaves(args, kwargs)] != [id(each) for each in _leaves(*given.filled(taken))]:
                raise UnlikeError("it changes what it is given")
            body.output = result.take(output)
            body.inner = tuple((path, result.take(value)) for path, value in captured)
            if form.cache is not None:
                body.after = cache_state(result, form.cache, numbers)
            if len(result.tensors) == body.given:
                raise UnlikeError("it computes no tensor")
        except UnlikeError as error:
            watch.note(str(error))
        body.reason = watch.reason
        if body.reason:
            self.alone[body.path] = body.reason
            for path, value in captured:
                _run_hooks(layer.get_submodule(path), *value)
            return output
        body.tensors = ENDS(result.tensors[body.given :], body.call)
        return self._results(body, layer, [*form.tensors, *body.tensors], form, numbers)

    def _again(self, body: Body, path: str, layer: nn.Module, form: Form, numbers: list[int]) -> Any:
        call = len(self.calls)
        self.calls.append((body, path))
        tensors = [*form.tensors, *AGAIN(form.tensors, body.tensors, call)]
        return self._results(body, layer, tensors, form, numbers)

    def _results(
        self, body: Body, layer: nn.Module, tensors: list[torch.Tensor], form: Form, numbers: list[int]
    ) -> Any:
        """What a layer gives, once its cache has it too and hooks inside have seen it."""
        assert body.output is not None
        if body.after is not None:
            assert form.cache is not None
            try:
                body.after.put(form.cache, numbers, tensors)
            except UnlikeError as error:
                raise StampError(str(error)) from error
        for path, value in body.inner:
            _run_hooks(layer.get_submodule(path), *value.filled(tensors))
        return body.output.filled(tensors)


def _leaves(*values: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(values)


def _hooked(layer: nn.Module) -> list[str]:
    """The modules inside that have hooks which see what they gave. Raises UnlikeError for hooks of other kinds."""
    found = []
    for path, each in layer.named_modules():
        if each is layer:
            continue
        if each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks:
            raise UnlikeError(f"there is a hook on {path}")
        if each._forward_hooks:
            found.append(path)
    return found


@contextmanager
def _capturing(layer: nn.Module, hooked: Sequence[str], captured: list[tuple[str, Any]]) -> Iterator[None]:
    """Inside, what hooked modules are given and give is kept, and their hooks wait."""
    with ExitStack() as stack:
        for path in hooked:
            each = layer.get_submodule(path)
            waiting = dict(each._forward_hooks)
            each._forward_hooks.clear()
            stack.callback(each._forward_hooks.update, waiting)

            def keep(module: Any, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                captured.append((path, (args, kwargs, output)))

            stack.callback(each.register_forward_hook(keep, with_kwargs=True).remove)
        yield


def _run_hooks(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    for number, hook in list(module._forward_hooks.items()):
        given = (args, kwargs, output) if number in module._forward_hooks_with_kwargs else (args, output)
        if hook(module, *given) is not None:
            raise StampError("a hook inside of a layer changes what a module gives")

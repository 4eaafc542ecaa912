"""Traces a model, once per signature, to one flat graph."""

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.exporters.utils import patch_attributes

from peftc.compiler.pipeline import managed
from peftc.compiler.trace.expand import check_stamps, expanded
from peftc.compiler.trace.exporting import COMPILING, Input, apart, constants_of, exported, flat_graph, refuse
from peftc.compiler.trace.gradients import Gradients, drop_idle
from peftc.compiler.trace.repeats import repeated_layers
from peftc.compiler.trace.samples import Sample, Sampler, of_one_size, plain_sample, sample_cache
from peftc.compiler.trace.stamp import Stamper, StampError
from peftc.compiler.trace.twin import Twin
from peftc.grammar.diagnostics import AdapterError, ModelError, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.ir.inputs import InputSpec, inputs_of
from peftc.passes.ir.split_tied_weights import SplitOwners
from peftc.passes.ir.traced import Traced
from peftc.passes.plan.sites import tied_names
from peftc.runtime.execution import caches, nest
from peftc.runtime.execution.call import Call


class Tracer:
    """Traces one model, each time on a twin of its own: a FakeTensorMode that saw one export is not fit for another
    (its cache of results refers to the first one's symbolic sizes, and crashes the process).
    """

    def __init__(self, model: nn.Module):
        self._source = model

    def trace(self, call: Call) -> Traced:
        """The graph for calls of this signature.

        Raises ModelError, naming what the exporter could not trace, for models or calls it does not support.
        """
        layout = self._layout(call) if call.cache is not None else None
        kinds = repeated_layers(self._source)
        try:
            return self._trace(call, layout, kinds)
        except (StampError, ModelError) as error:
            if not kinds:
                raise
            made = self._trace(call, layout, {})  # another try, with every layer's own nodes
            return replace(made, alone=dict.fromkeys(kinds, _first_line(error)))

    def _trace(self, call: Call, layout: caches.Layout | None, kinds: Mapping[str, Hashable]) -> Traced:
        twin = self._twin(call)
        aliases = tied_names(twin.model)  # a packed module may hold no tensor of the name that the twin's weight has
        inputs = self._inputs(twin, call, layout)
        forward = _FlatForward(twin.model, call, layout)
        stamper = Stamper(twin.model, kinds)
        with apart(_device_of(call)), stamper.installed():
            module, guards = exported(twin.model, forward, inputs, type(self._source).__name__)
        graph = flat_graph(module, inputs)
        if stamper.calls:
            graph = expanded(graph, stamper.calls, aliases)
        drop_idle(graph, dict(twin.model.named_parameters(remove_duplicate=False)))
        managed.run(graph, [SplitOwners(aliases)])
        if stamper.calls:
            check_stamps(graph, stamper.calls, aliases)
        return Traced(
            graph=graph,
            inputs=tuple(inputs_of(graph).values()),
            constants=constants_of(module, graph, aliases),
            outputs=forward.form,
            cache=layout or forward.layout,
            guards=guards,
            cached=_count(graph) - nest.count_tensors(forward.form),
            encoder_decoder=self._is_encoder_decoder,
            filler=int(contract.pads_with_zero(getattr(self._source, "config", None))),
            stamped=stamper.stamped,
            alone=stamper.alone,
            gradients=forward.gradients.enabled if forward.gradients.asked else None,
            own_backward=forward.gradients.own,
        )

    def takes_cache(self, call: Call) -> bool:
        """Whether the model can be given keys and values that attention sees beside the call's own."""
        forward = contract.forward_of(self._source.get_submodule(call.signature.entry).forward)
        return forward.cache is not None and self._made_cache(call) is not None

    @property
    def _is_encoder_decoder(self) -> bool:
        return contract.is_encoder_decoder(getattr(self._source, "config", None))

    def _inputs(self, twin: Twin, call: Call, layout: caches.Layout | None) -> list[Input]:
        names = call.signature.tensor_names
        samples = self._samples(call, names, layout is not None)
        inputs = [
            Input(self._spec(name, sample), twin.fake(_blank(tensor, sample.shape)))
            for name, tensor, sample in zip(names, call.tensors, samples, strict=True)
        ]
        if layout is not None:
            device = call.tensors[0].device
            inputs += [Input(spec, twin.fake(tensor)) for spec, tensor in sample_cache(layout, device)]
        return inputs

    def _spec(self, path: str, sample: Sample) -> InputSpec:
        """What a tensor of the call is: a module of the user's own that names inputs as transformers does means it."""
        argument = contract.argument_of(path, self._is_encoder_decoder)
        return InputSpec(contract.traced_name(path), argument.role, argument.stack, sample.axes)

    def _samples(self, call: Call, names: list[str], past: bool) -> tuple[Sample, ...]:
        if call.signature.sizes:
            return tuple(Sample(tuple(tensor.shape), tuple(tensor.shape)) for tensor in call.tensors)
        if not isinstance(self._source, PreTrainedModel):
            return plain_sample(call.tensors)
        sampler = Sampler(past, call.rows)
        return tuple(
            sampler.sample(contract.argument_of(name, self._is_encoder_decoder), tensor)
            for name, tensor in zip(names, call.tensors, strict=True)
        )

    def _twin(self, call: Call) -> Twin:
        twin = Twin(self._source)
        if twin.model.training is not call.signature.training:
            twin.model.train(call.signature.training)
        return twin

    def _layout(self, call: Call) -> caches.Layout:
        """What the model's cache looks like."""
        assert call.signature.cache is not None
        made = self._made_cache(call)
        if made is None:
            fail(ModelError, "E411", f"{type(self._source).__name__} was given a cache but returns none")
        return caches.layout_of(made, call.signature.cache[1])

    def _made_cache(self, call: Call) -> Cache | None:
        """The cache that a twin makes when it runs without one; with labels, some models make none."""
        made = caches.cache_in(self._run(call, {contract.USE_CACHE: True}))
        if made is None and contract.LABELS in dict(call.signature.arguments):
            made = caches.cache_in(self._run(call, {contract.USE_CACHE: True, contract.LABELS: None}))
        return made

    def _run(self, call: Call, options: Mapping[str, Any]) -> Any:
        """What a twin returns for a call of these sizes, with other options."""
        kinds = repeated_layers(self._source)
        try:
            return self._ran(call, options, kinds)
        except (StampError, ModelError):
            if not kinds:
                raise
            return self._ran(call, options, {})

    def _ran(self, call: Call, options: Mapping[str, Any], kinds: Mapping[str, Hashable]) -> Any:
        twin = self._twin(call)
        names = call.signature.tensor_names
        tensors = [
            twin.fake(_blank(tensor, sample.shape))
            for tensor, sample in zip(call.tensors, self._samples(call, names, past=False), strict=True)
        ]
        forward = _FlatForward(twin.model, call, None)
        try:
            with (
                apart(_device_of(call)),
                twin.mode,
                torch.no_grad(),
                patch_attributes(COMPILING),
                Stamper(twin.model, kinds).installed(),
            ):
                return forward.run(tensors, None, options)
        except (AdapterError, StampError):
            raise
        except Exception as error:
            refuse(type(self._source).__name__, error)


class _FlatForward:
    """The model's forward with flat tensors in and out, as the exporter sees it; remembers the form of the output."""

    def __init__(self, model: nn.Module, call: Call, layout: caches.Layout | None):
        self._module = model.get_submodule(call.signature.entry)
        self._arguments = call.signature.arguments
        self._layout = layout
        self._is_root = not call.signature.entry
        self.form: nest.Form = ()
        self.layout: caches.Layout | None = None
        self.gradients = Gradients()

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        values = list(tensors.values())
        count = sum(nest.count_tensors(form) for _, form in self._arguments)
        of_one_size(values[:count], values[count:])
        cache = caches.build(self._layout, values[count:], trimmed=False) if self._layout else None
        with self.gradients.watched():
            output = self.run(values[:count], cache)
        leaves: list[torch.Tensor] = []
        self.form = nest.flatten(output, leaves, "the output")
        if nest.holds_cache(self.form):
            made = caches.cache_in(output)
            assert made is not None
            layout = self._layout or caches.layout_of(made, filled=False)
            self.layout = None if self._layout else layout
            leaves += caches.tensors_of(made, layout)
        return leaves

    def run(self, tensors: list[torch.Tensor], cache: Cache | None, options: Mapping[str, Any] | None = None) -> Any:
        """Call the model's own forward, with these options where it has them."""
        left = list(tensors)
        arguments = {name: nest.rebuild(form, left, cache) for name, form in self._arguments}
        known = inspect.signature(type(self._module).forward).parameters
        arguments |= {name: value for name, value in (options or {}).items() if name in known}
        if self._is_root:
            return type(self._module).forward(self._module, **arguments)
        return self._module(**arguments)


def _count(graph: fx.Graph) -> int:
    (output,) = graph.find_nodes(op="output")
    return len(output.args[0])


def _first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _blank(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)


def _device_of(call: Call) -> str:
    return call.tensors[0].device.type if call.tensors else "cpu"

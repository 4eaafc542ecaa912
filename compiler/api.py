"""apply and load: from a model and a spec, or a checkpoint, to an adapted model."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from typing import Any

from torch import fx, nn

from peftc.compiler.example_calls import prepare
from peftc.compiler.export_model.exportable import Exportable
from peftc.compiler.load_model.quantizing import check_is_backed, check_stored, quantize_linears
from peftc.compiler.pipeline.lower import lower, specialise
from peftc.compiler.report.progress import step
from peftc.compiler.trace.regions import trace_region
from peftc.compiler.trace.trace import Tracer
from peftc.compiler.trace.weights import trace_weights
from peftc.compiler.versions import warn_if_untested
from peftc.grammar.diagnostics import ModelError, SpecError, UsageError, fail
from peftc.grammar.method.rule import Value
from peftc.grammar.spec.spec import Base, Regions
from peftc.passes.cost.cost import Choice
from peftc.passes.foreign import transformers as contract
from peftc.passes.insert.insert_delta import SlotValue
from peftc.passes.ir.traced import Traced
from peftc.passes.plan.plain import plain_class
from peftc.passes.plan.resolve import ModelSurvey, check_base, survey
from peftc.passes.plan.structure import Structure
from peftc.passes.quantized.foreign import check_quantization
from peftc.passes.quantized.schemes.known import packed_modules
from peftc.runtime.adapted.adapted_class import adapted_class
from peftc.runtime.adapted.adapter_set import AdapterSet
from peftc.runtime.adapted.base_weights import ADAPTED, STATE, BaseProvenance, BaseWeights, base_view
from peftc.runtime.adapted.routed_call import Route
from peftc.runtime.base.overlay import BANK
from peftc.runtime.base.share import rebound, share
from peftc.runtime.execution.call import Call
from peftc.runtime.execution.engine import Engine
from peftc.runtime.execution.program import Lowered
from peftc.runtime.execution.segments import Recompute
from peftc.runtime.init.calibration import Batches
from peftc.runtime.init.dense import Source
from peftc.runtime.model import model as runtime
from peftc.runtime.model.adding import FreshOptions, plan_adapters
from peftc.runtime.model.described import described, described_route
from peftc.runtime.model.loading import add_route, load_adapter
from peftc.runtime.model.weighted import add_described
from peftc.runtime.peft_format.load_options import LoadOptions
from peftc.runtime.regions.modules import layers_become_regions
from peftc.runtime.regions.places import DEFAULT, checked
from peftc.runtime.regions.region import RegionCall, RegionTrace
from peftc.runtime.regions.within import HEAD
from peftc.runtime.routing.route import add_nothing_else, chosen_route


class Compiler:
    """Traces, specialises and plans for one adapted model; see `runtime.engine.Backend`.

    What it makes graphs of, which may take a while, is shown on a terminal where `progress` is on.
    """

    def __init__(self, model: runtime.AdaptedModel, *, progress: bool = True):
        self._model, self._progress = model, progress
        self._surveyed: tuple[object, ModelSurvey] | None = None

    def trace(self, call: Call) -> Traced:
        """The base graph for calls of this signature. Raises ModelError."""
        with self.step(f"tracing {self._called(call)}"):
            return Tracer(self._model._adapter_state.base.traceable().module).trace(call)

    def specialise(
        self,
        traced: Traced,
        structure: Structure,
        slot_value: SlotValue,
        *,
        training: bool,
        autocast: bool,
        choice: Choice,
        mode: str,
        region: nn.Module | None = None,
    ) -> fx.Graph:
        """The trace with adapters in it. Raises ModelError."""
        stored = packed_modules(self._model if region is None else region)
        if region is not None:
            stored = {f"{HEAD}.{name}".rstrip("."): each for name, each in stored.items()}
        with self.step(f"putting adapters into {plain_class(self._model if region is None else region).__name__}"):
            return specialise(
                traced,
                structure,
                slot_value,
                training=training,
                autocast=autocast,
                choice=choice,
                mode=mode,
                packed=stored,
            )

    def trace_region(self, module: nn.Module, call: RegionCall) -> RegionTrace:
        """The graph of a module for calls like this one. Raises ModelError for what has none."""
        with self.step(f"tracing {plain_class(module).__name__}"):
            return trace_region(module, call)

    def trace_weights(self, module: nn.Module, names: Sequence[str]) -> Traced:
        """The graph that gives these tensors of a module's own."""
        return trace_weights(module, names)

    def takes_cache(self, call: Call) -> bool:
        """Whether the model can be given keys and values that attention sees beside the call's own."""
        return Tracer(base_view(self._model)).takes_cache(call)

    def lower(self, graph: fx.Graph, *, autocast: bool, choice: Choice, by_row: bool = False) -> Lowered:
        """Copies of a specialised graph: for torch.compile to trace, and for Python to run as it is.

        With `by_row` every row has an adapter of its own; raises ModelError where an operator has no form for that.
        """
        with self.step("making graphs fast"):
            return lower(graph, autocast=autocast, choice=choice, by_row=by_row)

    def survey(self) -> ModelSurvey:
        """What there is to adapt, without what is merged; looked at again when a weight changed its shape or place."""
        view = self._model._adapter_state.base.unmerged().module
        seen = tuple((name, type(each), each.shape, each.device, each.dtype) for name, each in view.named_parameters())
        if self._surveyed is None or self._surveyed[0] != seen:
            self._surveyed = (seen, survey(view))
        return self._surveyed[1]

    def check_base(self, base: Base | None) -> None:
        """Raise SpecError unless the model is, is stored and is run as a spec demands."""
        check_base(base, self.survey())
        if base is None:
            return
        if base.quantize is not None:
            check_stored(self._model._adapter_state.base.unmerged().module, base.quantize)
        regions = self._model._adapter_state.regions
        if base.regions not in (None, regions):
            message = f"this spec is for regions = '{base.regions}', and the model has '{regions}'"
            fail(SpecError, "E247", message, base.span, "leave 'regions' out, or say it when the model is adapted")

    def for_model(self, model: nn.Module) -> "Compiler":
        """The same for a copy of the model."""
        assert isinstance(model, runtime.AdaptedModel)
        return Compiler(model, progress=self._progress)

    def _called(self, call: Call) -> str:
        return plain_class(self._model.get_submodule(call.signature.entry)).__name__

    def step(self, what: str) -> AbstractContextManager[None]:
        """Around what a call waits for, which is said on the terminal if it takes long."""
        return step(what) if self._progress else nullcontext()


class AdaptedModel(Exportable):
    """A model with adapters in its graph, made by `apply` and `load`; see `peftc.runtime.model.model.AdaptedModel`."""

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, peft_model_id: str | PathLike[str] = "", **options: Any
    ) -> "AdaptedModel":
        """As `PeftModel.from_pretrained`: the base model, then the checkpoint. The same as `load`, options and all."""
        if not isinstance(model, nn.Module) or not peft_model_id:
            fail(
                UsageError,
                "E544",
                "from_pretrained of an adapted model takes the base model first",
                help="load the base with its own class, then call compiler.load(base, checkpoint)",
            )
        return load(model, peft_model_id, **options)


def apply(
    model: nn.Module,
    spec: Any,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    calibration: Batches | None = None,
    tokenizer: Any | None = None,
    dense: Source | None = None,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    prepare_for_kbit_training: bool = True,
    regions: Regions | None = None,
    routes: Mapping[str, Route] | None = None,
    progress: bool = True,
) -> AdaptedModel:
    """Put the adapters of a spec into a model.

    Args:
        model: Any transformers model, or any `nn.Module` that torch.export can trace. It is not changed, and the
            result shares its weights, but for those that the spec has quantized.
        spec: A path to an `.adapter` file, the text itself, a Spec or an AdapterSpec; or a config of PEFT's, an object
            or its fields as a dict, whose adapter is called "default"; or a dict of such by the names of the adapters,
            of which the first is active. What PEFT's config classes mean by a field is meant here, or the field is
            refused by its name; with a `task_type` the heads of the task are trained, and with `inference_mode`
            nothing is.
        example_inputs: Positional (a sequence) or named (a mapping) arguments to trace the first graph with at once.
            Without them every graph is traced when a call first needs it.
        calibration: For a method that starts from data: batches, each the named (a mapping) or positional (a sequence
            or one tensor) arguments of a call. The base runs on each once; places that an `attention_mask` leaves out
            do not count.
        tokenizer: For tokens that the spec names by their text, and for a method that starts from a text: it takes
            the place of the one that the spec names for it. Tokens that it has and the model has not are new: the
            result, not the model, has its embeddings resized, as transformers does it.
        dense: For a method that starts from what quantization rounded away: the model that this one was quantized from,
            or its directory of safetensors. Not needed where the spec has `model` quantized.
        autocast_adapter_dtype: Hold the adapters of a float16 or bfloat16 base in float32, as PEFT does; otherwise
            they are of the base's type.
        low_cpu_mem_usage: As PEFT has it for what a file is to fill afterwards. Accepted, and without effect: what is
            fresh is made where it stays, with its first values, and never on the meta device.
        prepare_for_kbit_training: On a quantized base, hold what is not quantized (norms, embeddings, the head) in
            float32, as PEFT's `prepare_model_for_kbit_training` does. The user's model keeps its own, and so does what
            is unloaded. Without effect elsewhere.
        regions: Which modules run graphs: the members of repeated stacks and adapted modules outside of them
            ("layers"), adapted modules alone ("modules"), or the whole model at once ("model"). Everything else runs
            the model's own Python. Said here it wins over what `base { regions = ... }` of the spec says; where neither
            says, it is "layers".
        routes: What the spec's `route = NAME` stands for, by that name: see `AdaptedModel.set_route`.
        progress: Say on a terminal what a call waits for, where graphs are made for more than a second. Nothing is
            written to files, pipes and notebooks, nor anywhere if the environment has `PEFTC_PROGRESS=0`.

    Returns:
        An object of the model's class with the spec's adapters, freshly initialised. The adapters that the spec
        activates, or a lone one, are active and trainable; the base is frozen.

    Raises:
        SpecError: the spec is wrong, in itself or for this model.
        CheckpointError: a config says what is not supported, all of that at once.
        ModelError: the model cannot be copied or traced.
        UsageError: a method needs a calibration, and it is missing or reaches not every site; or a tokenizer, or the
            dense model; what the spec combines cannot be; or, a TypeError too, `spec` is of a type that describes no
            adapter.
    """
    if (routed := described_route(spec)) is not None:
        said = {"example_inputs": example_inputs, "calibration": calibration, "tokenizer": tokenizer, "dense": dense}
        add_nothing_else(said, routes)
        adapted = adapt(_checked(model), regions=DEFAULT if regions is None else checked(regions), progress=progress)
        if prepare_for_kbit_training:
            adapted._adapter_state.base.widen()
        add_route(adapted, *routed, LoadOptions(is_trainable=True, autocast_adapter_dtype=autocast_adapter_dtype))
        return adapted
    found = described(spec)
    meant = found.spec
    route = chosen_route(meant.route, routes or {})
    wanted = checked(regions) if regions is not None else meant.regions or DEFAULT
    adapted = adapt(_checked(model), regions=wanted, progress=progress)
    state = adapted._adapter_state
    state.base.facts.regions = meant.regions
    check_base(meant.base, state.engine.backend.survey())
    if meant.quantize is not None and quantize_linears(adapted, meant.quantize):
        mark_adapted(adapted)
        dense = model if dense is None else dense
    surveyed = state.engine.backend.survey()
    planned = plan_adapters(found.on(surveyed), surveyed, tokenizer)
    found.check(planned.plans, surveyed)
    if prepare_for_kbit_training:
        state.base.widen()
    options = FreshOptions(calibration, tokenizer, dense, upcast=autocast_adapter_dtype)
    add_described(adapted, planned, meant, options, trainable=found.trains())
    state.base.facts.told(found.facts)
    if route is not None:
        adapted.set_route(route)
    if example_inputs is not None:
        prepare(adapted, example_inputs)
    return adapted


def load(
    model: nn.Module,
    peft_model_id: str | PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    use: str | PathLike[str] | None = None,
    values: Mapping[str, Value] | None = None,
    key_mapping: Mapping[str, str] | None = None,
    config: Any | None = None,
    ignore_mismatched_sizes: bool = False,
    strict: bool = False,
    prepare_for_kbit_training: bool = True,
    regions: Regions | None = None,
    progress: bool = True,
) -> AdaptedModel:
    """Put an adapter from a PEFT checkpoint, ours or peft's, into a model.

    Args:
        model: The base. It is not changed, and the result shares its weights.
        peft_model_id: A directory, or a repository on the Hub. Or a file of LoRA weights that diffusers or kohya's
            scripts wrote for a pipeline: what is in it for this model is read, and the rest is told in a warning.
        adapter_name: What the adapter is called here.
        is_trainable: Whether to go on training it; otherwise nothing of the result has a gradient, and it is in
            evaluation mode, as in PEFT.
        revision: Of the repository, as `subfolder`, `token`, `cache_dir` and `local_files_only`.
        subfolder: Where in the directory or repository the adapter lies.
        token: For a private repository.
        cache_dir: Where downloads are kept.
        local_files_only: Never ask the Hub.
        allow_pickle: Read an adapter_model.bin, which may come from anywhere, with torch's weights-only unpickler.
        autocast_adapter_dtype: Hold float16 and bfloat16 adapters in float32, as PEFT does; otherwise an adapter is of
            the base's type, whatever type its file has.
        low_cpu_mem_usage: Accepted as PEFT's, and without effect: tensors come from the file, and none is made first.
        use: An `.adapter` file with methods of your own. What peftc saved needs none: the definition is in it.
        values: Hyperparameters that are to be other than the file says. `{"peft_compatible": True}` has virtual tokens
            counted and returned as PEFT does.
        key_mapping: Regular expressions, and what takes the place of the first that is found in a key of the file, from
            which PEFT's prefix is left out: for a base whose modules are called otherwise by now.
        config: A PEFT config, or its fields as a dict: what it says (what is not None) comes before the checkpoint's.
        ignore_mismatched_sizes: Leave tensors whose sizes are not the adapter's out, with a warning that names them;
            what they are for starts as on a fresh adapter. Embeddings that are saved beside an adapter have to fit.
        strict: Refuse fields of the config that are not known here, and tensors that no output depends on. Otherwise
            they are left unread, and a warning names them. What is known and not supported is always refused.
        prepare_for_kbit_training: As in `apply`, if the adapter `is_trainable`.
        regions: As in `apply`; where it is not said, what the spec said that the checkpoint was made with.
        progress: As in `apply`.

    Raises:
        CheckpointError: the checkpoint is damaged, unsupported, or does not fit the model.
        ModelError: the model cannot be copied or traced.
    """
    adapted = adapt(_checked(model), regions=DEFAULT if regions is None else checked(regions), progress=progress)
    if is_trainable and prepare_for_kbit_training:
        adapted._adapter_state.base.widen()
    options = LoadOptions(
        is_trainable=is_trainable,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
        use=use,
        values=values,
        key_mapping=key_mapping,
        config=config,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        strict=strict,
    )
    load_adapter(adapted, peft_model_id, adapter_name, options, follows_regions=regions is None)
    return adapted


def adapt(model: nn.Module, *, regions: Regions = DEFAULT, progress: bool = True) -> AdaptedModel:
    """An adapted model that has no adapter yet."""
    warn_if_untested()
    plain = share(model, requires_grad=False)
    adapted: AdaptedModel = object.__new__(adapted_class(type(model), AdaptedModel))
    adapted.__dict__.update({name: rebound(value, plain, adapted) for name, value in plain.__dict__.items()})
    bank = nn.Module()
    adapted.add_module(BANK, bank)
    requires_grad = dict.fromkeys((name for name, _ in plain.named_parameters(remove_duplicate=False)), False)
    requires_grad |= {name: each.requires_grad for name, each in model.named_parameters(remove_duplicate=False)}
    name, revision = contract.origin_of(model)
    facts = BaseProvenance(base_name=name, base_revision=revision)
    engine = Engine(Compiler(adapted, progress=progress), adapted)
    base = BaseWeights(adapted, engine, requires_grad=requires_grad, facts=facts)
    adapted.__dict__[STATE] = AdapterSet(engine, bank, base, regions=regions)
    if any(getattr(each, contract.CHECKPOINTING, False) is True for each in model.modules()):
        layers_become_regions(adapted, adapted._adapter_state.host)
        engine.recompute = Recompute()
        for each in adapted.modules():
            if getattr(each, contract.CHECKPOINTING, False) is True:
                setattr(each, contract.CHECKPOINTING, False)  # layers are computed again by their regions
    mark_adapted(adapted)
    return adapted


def mark_adapted(adapted: AdaptedModel) -> None:
    """Let transformers know that there are adapters to train, without which it refuses to train a quantized model."""
    if getattr(adapted, contract.QUANTIZED, False):
        adapted.__dict__[ADAPTED] = True


def _checked(model: nn.Module) -> nn.Module:
    if isinstance(model, runtime.AdaptedModel):
        fail(UsageError, "E543", "the model is adapted already", help="use its add_adapter or load_adapter")
    if not isinstance(model, nn.Module):
        fail(
            ModelError, "E405", f"a value of type {type(model).__name__} is not a model", help="pass a torch.nn.Module"
        )
    if hasattr(model, "peft_config") and hasattr(model, "base_model") and type(model).__module__.startswith("peft."):
        fail(ModelError, "E406", "the model is wrapped by peft", help="pass the model peft wraps: model.unload()")
    check_quantization(model)
    check_is_backed(model)
    return model

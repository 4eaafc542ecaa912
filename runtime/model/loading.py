"""Loading an adapter in the PEFT format into a model: everything is checked before anything changes."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, SpecError, fail
from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.syntax import layout
from peftc.passes.plan.earlier import as_it_was
from peftc.passes.plan.plan import AdapterPlan, ParamKey
from peftc.passes.plan.resolve import ModelSurvey, resolve
from peftc.passes.plan.sites import tied_names
from peftc.passes.plan.vocabulary import enlarged, vocabulary
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapted.base_weights import base_view
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.base.earlier import EarlierNames
from peftc.runtime.base.idle import idle_names
from peftc.runtime.base.overlay import BANK
from peftc.runtime.init.tokens import check_ties, needed_vocabulary
from peftc.runtime.model.adding import PlannedAdapters, Values, add_adapters
from peftc.runtime.model.described import config_fields
from peftc.runtime.model.embeddings import base_of, read_values
from peftc.runtime.model.saving import TRAINING
from peftc.runtime.model.state_dicts import IncompatibleKeys, put_values
from peftc.runtime.other_formats.as_peft import as_peft
from peftc.runtime.other_formats.other_file import other_file
from peftc.runtime.peft_config.peft_config import ConfigFacts, read_config
from peftc.runtime.peft_config.peft_rule import with_values
from peftc.runtime.peft_config.spec_config import check_growth, known_methods
from peftc.runtime.peft_format.adapter_files import CONFIG, locate, read_adapter, read_json, read_tensors
from peftc.runtime.peft_format.carry import carried
from peftc.runtime.peft_format.checkpoint import entries, fit, unpruned
from peftc.runtime.peft_format.found_tensors import named_earlier, spelled, without_idle
from peftc.runtime.peft_format.key_spelling import AS_IT_IS
from peftc.runtime.peft_format.load_options import LoadOptions
from peftc.runtime.peft_format.manifest import compare, read_manifest
from peftc.runtime.peft_format.older_files import lost_biases, with_heads
from peftc.runtime.peft_format.own_embeddings import own_embeddings
from peftc.runtime.peft_format.saved_value import settled
from peftc.runtime.routing.routed_adapters import put_route
from peftc.runtime.routing.saved_route import is_route, read_route


def load_adapter(
    model: AdaptedModule,
    source: str | PathLike[str],
    name: str,
    options: LoadOptions,
    *,
    follows_regions: bool = False,
) -> IncompatibleKeys:
    """Load an adapter beside the others, or into the one of this name: see `AdaptedModel.load_adapter`.

    With `follows_regions` the model's regions begin where the checkpoint's spec said.
    """
    state = model._adapter_state
    place = _located(source, options)
    if (config := _route_in(place, options)) is not None:
        return _load_route(model, source, place, config, name, options)
    known = state.adapter(name) if name in state.names() else None
    if known is None:
        state.check_name(name, help="choose another adapter_name")
    file = _read(model, place, name, options)
    found = _fitted(model, file, options)
    if known is not None:
        told = _put(model, known, file, found, options)
    else:
        told = _added(model, file, found, options, follows_regions=follows_regions)
    if not options.is_trainable and _trains(model):
        model.eval()
    return told


def add_route(model: AdaptedModule, name: str, config: Mapping[str, object], options: LoadOptions) -> None:
    """Put a fresh route over saved adapters into a model. Raises CheckpointError or UsageError and changes nothing."""
    saved = read_route(config, "the PEFT config")
    put_route(model, name, saved, options, lambda place, expert, own: load_adapter(model, place, expert, own))


def _route_in(directory: Path, options: LoadOptions) -> Mapping[str, object] | None:
    """The configuration of a checkpoint that is a route, and no adapter."""
    if not (directory / CONFIG).is_file():
        return None
    said = {} if options.config is None else config_fields(options.config)
    config = {**read_json(directory / CONFIG), **{name: value for name, value in said.items() if value is not None}}
    return config if is_route(config) else None


def _load_route(
    model: AdaptedModule,
    source: str | PathLike[str],
    directory: Path,
    config: Mapping[str, object],
    name: str,
    options: LoadOptions,
) -> IncompatibleKeys:
    _, tensors = read_adapter(directory, allow_pickle=options.allow_pickle)
    put_route(
        model,
        name,
        read_route(config, str(directory), strict=options.strict),
        options,
        lambda place, expert, own: load_adapter(model, place, expert, own),
        directory=directory,
        repository="" if Path(source).expanduser().exists() else str(source),
        tensors={options.renamed(key): tensor for key, tensor in tensors.items()},
    )
    if not options.is_trainable and _trains(model):
        model.eval()
    return IncompatibleKeys([], [])


def _trains(model: AdaptedModule) -> bool:
    """Whether the model, or a module of its base, is in training mode; there may be thousands of adapters."""
    parts = [part for name, part in model.named_children() if name != BANK]
    return model.training or any(each.training for part in parts for each in part.modules())


# --- what is read ---


@dataclass(frozen=True)
class _File:
    """A checkpoint: what its config says, the adapter that it is for, and its tensors by its own keys."""

    directory: Path
    facts: ConfigFacts
    spec: AdapterSpec
    tensors: Mapping[str, Tensor]

    @property
    def where(self) -> str:
        """What messages call it."""
        return str(self.directory)


def _located(source: str | PathLike[str], options: LoadOptions) -> Path:
    return locate(
        source if isinstance(source, str) else Path(source),
        revision=options.revision,
        subfolder=options.subfolder,
        token=options.token,
        cache_dir=options.cache,
        local_files_only=options.local_files_only,
    )


def _read(model: AdaptedModule, directory: Path, name: str, options: LoadOptions) -> _File:
    where = str(directory)
    config, tensors = _contents(model, directory, options)
    tensors = {options.renamed(key): tensor for key, tensor in tensors.items()}
    methods = known_methods(config, directory, options.use)
    facts = read_config(config, methods=methods, adapter_name=name, where=where, strict=options.strict)
    for message in facts.warnings:
        warnings.warn(message, stacklevel=3)
    spec, told = with_heads(facts.spec, facts.task_type, tensors)
    if told:
        warnings.warn(f"{where}: {told}", stacklevel=3)
    return _File(directory, facts, with_values(spec, options.values or {}), tensors)


def _contents(
    model: AdaptedModule, place: Path, options: LoadOptions
) -> tuple[Mapping[str, object], dict[str, Tensor]]:
    """The configuration and the tensors of a checkpoint, or of another library's file as PEFT would have them."""
    said = {} if options.config is None else config_fields(options.config)
    other = other_file(place)
    if other is None:
        config, tensors = read_adapter(place, allow_pickle=options.allow_pickle)
    else:
        weights = {
            name.removesuffix(".weight"): tuple(tensor.shape)
            for name, tensor in model._adapter_state.base.own().tensors()
            if name.endswith(".weight") and tensor.dim() > 1
        }
        found = as_peft(other, weights, type(model).__name__)
        for message in found.warnings:
            warnings.warn(message, stacklevel=4)
        config, tensors = dict(found.config), dict(found.tensors)
    return {**config, **{name: value for name, value in said.items() if value is not None}}, tensors


# --- how it fits the model ---


@dataclass(frozen=True)
class _Fitted:
    """An adapter that fits the model: its plan and tensors, which entries of these there are, and how many tokens it
    needs the model to have. `idle` are the file's keys that were left out, `base` is what the model has itself.
    """

    plan: AdapterPlan
    tensors: Mapping[ParamKey, Tensor]
    masks: Mapping[ParamKey, Sequence[bool]]
    tokens: int | None
    idle: Sequence[str]
    base: Mapping[str, Tensor]


def _fitted(model: AdaptedModule, file: _File, options: LoadOptions) -> _Fitted:
    """The file's adapter on this model. Raises CheckpointError for all that does not fit."""
    where, state = file.where, model._adapter_state
    survey = state.engine.backend.survey()
    earlier = named_earlier(file.spec, survey, file.tensors.keys(), EarlierNames(base_view(model)))
    ground = as_it_was(survey, earlier) if earlier else survey
    today = dict(state.base.own().tensors())
    base = {earlier.before(name): tensor for name, tensor in today.items()} if earlier else today
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    plan = planned = _planned(model, file.spec, ground, file.directory)
    if file.facts.ties:
        check_ties(plan, tied_names(model), where)
    expected = entries(plan)
    tensors, spelling = spelled(expected, file.tensors, ground.universe.modules, plan.spec.rule.unread)
    idle: list[str] = []
    if not options.strict and spelling is not AS_IT_IS:  # else every tensor has its place
        tensors, idle = without_idle(expected, tensors, shapes, idle_names(base_view(model)))
    plan, tokens = _with_tokens(model, file, plan, ground, tensors, base)
    tensors, masks = unpruned(plan, tensors, file.facts.masks, where=where)
    plan = settled(plan, set(tensors))
    if lost := lost_biases(plan, tensors):
        message = f"{where}: the adapter was trained with its biases, and the file has none: the model's own are used"
        warnings.warn(message, stacklevel=3)
    fitted = fit(
        plan,
        tensors,
        where=where,
        expected=expected if plan is planned else None,
        as_spelled=spelling,
        base_shapes=shapes,
        base_tensors=base.get,
        lost=lost,
        ignore_mismatched_sizes=options.ignore_mismatched_sizes,
    )
    if earlier:
        plan, fitted, masks = carried(plan, fitted, masks, earlier, survey, where)
    return _Fitted(plan, fitted, masks, tokens, [spelling.told(each) for each in idle], today)


def _with_tokens(
    model: AdaptedModule,
    file: _File,
    plan: AdapterPlan,
    ground: ModelSurvey,
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
) -> tuple[AdapterPlan, int | None]:
    """The plan with the embeddings that the file has of its own, and how many tokens the model must have for it."""
    embeddings, words = own_embeddings(plan, ground, tensors, base, file.where), vocabulary(ground)
    if embeddings is None:
        return plan, needed_vocabulary(plan, words, file.where)
    plan = embeddings.beside(_planned(model, plan.spec, ground, file.directory, embeddings.size))
    if embeddings.message:
        warnings.warn(f"{file.where}: {embeddings.message}", stacklevel=4)
    if words is not None and embeddings.size > words.size:
        return plan, embeddings.size
    return plan, needed_vocabulary(plan, words, file.where)


def _planned(
    model: AdaptedModule, spec: AdapterSpec, survey: ModelSurvey, directory: Path, size: int = 0
) -> AdapterPlan:
    """The plan of a checkpoint's adapter, on a model with as many tokens as it names, and at least this many.

    What is wrong is wrong with the checkpoint, not with a spec.
    """
    known = vocabulary(survey)
    wanted = 0 if known is None else max([size, *(each + 1 for each in known.beyond(spec))])
    try:
        return resolve(spec, enlarged(survey, wanted) if known is not None and wanted > known.size else survey)
    except SpecError as error:
        named = sorted({layout.selector(each) for target in spec.on for each in target.selectors})
        help = f"it was made for modules called {', '.join(named[:8])}; this is a {type(model).__name__}"
        raise CheckpointError(
            *(
                replace(each, span=None, where=str(directory), help=each.help or (help if named else ""))
                for each in error.diagnostics
            )
        ) from error


# --- how it comes into the model ---


def _put(
    model: AdaptedModule, known: AdapterParameters, file: _File, found: _Fitted, options: LoadOptions
) -> IncompatibleKeys:
    """Put the file's values into an adapter that is there. Raises CheckpointError unless it is one like it."""
    _check_same(found.plan, known.plan, file.where)
    training = file.directory / TRAINING
    whole = read_tensors(training) if known.allocator and training.is_file() else None
    put_values(model, known, found.tensors)
    if known.allocator is not None:
        known.allocator.restore(found.masks, known.tensor)
        if whole is not None:
            known.load_state_dict(whole)
    if options.is_trainable:
        model._adapter_state.train([known.plan.name], True)
    return IncompatibleKeys([], [])


def _added(
    model: AdaptedModule, file: _File, found: _Fitted, options: LoadOptions, *, follows_regions: bool
) -> IncompatibleKeys:
    """Put the adapter beside the others; it becomes active if none is."""
    state, plan = model._adapter_state, found.plan
    check_growth(plan, found.tensors, file.directory)
    if found.idle:
        named = ", ".join(sorted(found.idle))
        warnings.warn(f"{file.where}: left unread, since no output depends on it: {named}", stacklevel=3)
    own = read_values(plan, found.tensors, found.base)

    def fingerprint() -> str:
        return base_of(state.base, own) if own else state.base.fingerprint()

    _follow_manifest(model, file.directory, fingerprint, follows_regions=follows_regions)

    def values() -> Iterator[Values]:
        yield Values(given=found.tensors, masks=found.masks, upcast=options.autocast_adapter_dtype)

    missing = list[str]()
    if options.ignore_mismatched_sizes:
        missing = [key for key, each in entries(plan).items() if each.key not in found.tensors and not each.computed]
    add_adapters(
        model,
        PlannedAdapters((plan,), found.tokens, drawn=False),
        values,
        lambda: state.base.unmerged().value,  # copies are of the types that the model is held in
        None if state.active else ((plan.name, 1.0),),
        trainable=options.is_trainable,
    )
    state.adapter(plan.name).frozen = not options.is_trainable
    state.base.facts.task_type = state.base.facts.task_type or file.facts.task_type
    return IncompatibleKeys(missing, [])


def _check_same(plan: AdapterPlan, known: AdapterPlan, where: str) -> None:
    """Raise CheckpointError unless an adapter that is there computes what the file's would with the same tensors."""

    def facts(of: AdapterPlan) -> object:
        bound = [(at.site.name, at.bound) for at in of.sites]
        sites = [(site, each.weight, each.bias, each.prompt, each.scalars) for site, each in bound]
        sizes = [(site, param.role, param.shape) for site, each in bound for param in each.params]
        return sites, sizes, [each.module for each in of.copies], [(each.module, each.ids) for each in of.rows]

    if facts(plan) != facts(known):
        message = f"there already is an adapter {known.name!r}, and this is not one like it"
        help = "choose another adapter_name, or delete it first"
        fail(CheckpointError, "E594", message, help=help, where=where)


def _follow_manifest(
    model: AdaptedModule, directory: Path, fingerprint: Callable[[], str], *, follows_regions: bool
) -> None:
    manifest = read_manifest(directory)
    if manifest is None:
        return
    state, base_class = model._adapter_state, type(model).__name__
    base = state.base
    if follows_regions and manifest.regions is not None:
        state.regions = manifest.regions
    base.facts.regions = base.facts.regions or manifest.regions
    differences = compare(
        manifest,
        fingerprint(),
        base_class=base_class,
        base_id=base.facts.base_name,
        quantized=base.own().quantization(),
    )
    for message in differences:
        warnings.warn(message, stacklevel=4)

"""Loading an adapter in the PEFT format into a model: everything is checked before anything changes."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path

from peftc.grammar.diagnostics import CheckpointError, SpecError
from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.syntax import layout
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.plan.resolve import resolve
from peftc.passes.plan.sites import tied_names
from peftc.passes.plan.vocabulary import enlarged, vocabulary
from peftc.runtime.init.tokens import check_ties, needed_vocabulary
from peftc.runtime.model.adapted_module import AdaptedModule
from peftc.runtime.model.adding import PlannedAdapters, Values, add_adapters
from peftc.runtime.peft_format.adapter_files import locate, read_adapter
from peftc.runtime.peft_format.checkpoint import fit, unpruned
from peftc.runtime.peft_format.load_options import LoadOptions
from peftc.runtime.peft_format.manifest import compare, read_manifest
from peftc.runtime.peft_format.peft_config import read_config
from peftc.runtime.peft_format.peft_rule import with_values
from peftc.runtime.peft_format.saved_value import settled
from peftc.runtime.peft_format.spec_config import check_growth, known_methods


def load_adapter(
    model: AdaptedModule,
    source: str | PathLike[str],
    name: str,
    options: LoadOptions,
    *,
    follows_regions: bool = False,
) -> None:
    """Load an adapter beside the others: see `AdaptedModel.load_adapter`.

    With `follows_regions` the model's regions begin where the checkpoint's spec said.
    """
    state = model._adapter_state
    state.check_name(name, help="choose another adapter_name")
    directory = locate(
        source if isinstance(source, str) else Path(source),
        revision=options.revision,
        subfolder=options.subfolder,
        token=options.token,
        cache_dir=options.cache,
        local_files_only=options.local_files_only,
    )
    where = str(directory)
    config, tensors = read_adapter(directory, allow_pickle=options.allow_pickle)
    methods = known_methods(config, directory, options.use)
    facts = read_config(config, methods=methods, adapter_name=name, where=where)
    for message in facts.warnings:
        warnings.warn(message, stacklevel=3)
    plan, tokens = _planned(model, with_values(facts.spec, options.values or {}), directory)
    if facts.ties:
        check_ties(plan, tied_names(model), where)
    base = dict(state.base.own().tensors())
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    tensors, masks = unpruned(plan, tensors, facts.masks, where=where)
    plan = settled(plan, set(tensors))
    fitted = fit(plan, tensors, where=where, base_shapes=shapes, base_tensors=base.get)
    check_growth(plan, fitted, directory)
    _follow_manifest(model, directory, follows_regions=follows_regions)

    def values() -> Iterator[Values]:
        yield Values(given=fitted, masks=masks, upcast=options.autocast_adapter_dtype)

    add_adapters(
        model,
        PlannedAdapters((plan,), tokens, drawn=False),
        values,
        lambda: state.base.own().value,
        None if state.active else ((name, 1.0),),
        trainable=options.is_trainable,
    )
    state.base.facts.task_type = state.base.facts.task_type or facts.task_type


def _planned(model: AdaptedModule, spec: AdapterSpec, directory: Path) -> tuple[AdapterPlan, int | None]:
    """The plan of a checkpoint's adapter, and the vocabulary it needs if that is more than the model's.

    What is wrong is wrong with the checkpoint, not with a spec.
    """
    survey = model._adapter_state.engine.backend.survey()
    known = vocabulary(survey) if spec.tokens else None
    beyond = set() if known is None else known.beyond(spec)
    try:
        plan = resolve(spec, enlarged(survey, max(beyond) + 1) if beyond else survey)
        return plan, needed_vocabulary(plan, known, str(directory))
    except SpecError as error:
        named = sorted({layout.selector(each) for target in spec.on for each in target.selectors})
        help = f"it was made for modules called {', '.join(named[:8])}; this is a {type(model).__name__}"
        raise CheckpointError(
            *(
                replace(each, span=None, where=str(directory), help=each.help or (help if named else ""))
                for each in error.diagnostics
            )
        ) from error


def _follow_manifest(model: AdaptedModule, directory: Path, *, follows_regions: bool) -> None:
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
        base.fingerprint(),
        base_class=base_class,
        base_id=base.facts.base_name,
        quantized=base.own().quantization(),
    )
    for message in differences:
        warnings.warn(message, stacklevel=4)

"""adapter_config.json for a method PEFT does not have: it holds the spec's text, the method's definition included.

What stands in a file was written by anybody: such a text names no other file, the limits of the language hold for it,
and nothing it makes is larger than the model it is for allows.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

from peftc.grammar.algebra import algebra
from peftc.grammar.algebra.measure import largest_part
from peftc.grammar.diagnostics import CheckpointError, Diagnostic, SpecError, fail
from peftc.grammar.method.rule import BoundParam, Derived, MethodRule
from peftc.grammar.source import Source
from peftc.grammar.spec.elaborate import elaborate, read_methods
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.spec import AdapterSpec, Base, Regions, Spec
from peftc.grammar.spec.write import to_tree
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.format import format_file
from peftc.grammar.syntax.parse import parse
from peftc.passes.foreign.peft import OWN_TYPE
from peftc.passes.plan.plan import AdapterPlan, ParamKey, PlannedSite
from peftc.runtime.peft_config.json_fields import FieldReader, shown
from peftc.runtime.peft_format.adapter_files import CONFIG, MANIFEST
from peftc.runtime.peft_format.manifest import read_manifest, spec_digest

FORMAT = 1  # raised when a reader of the format before would misunderstand the file

# A checkpoint's own method may make tensors, at a site, of at most so many squares of the weight's longer side.
SQUARES = 4
_SMALL = 256  # a side that is shorter counts as this

_FIELDS = frozenset(
    {
        *("peft_type", "format", "spec", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
        "auto_mapping",
    }
)


def spec_text(spec: AdapterSpec, regions: Regions | None = None) -> str:
    """The file that says what one adapter is: its method, unless that is built in, and where it goes.

    Before that stands which modules are to run graphs, if it is said.
    """
    base = None if regions is None else Base(regions=regions)
    return format_file(to_tree(Spec((spec,), ((spec.name, 1.0),), base)))


def spec_fields(spec: AdapterSpec) -> dict[str, object]:
    """The fields of an adapter_config.json that say what the adapter is.

    Raises:
        CheckpointError: the text would not be read back as this spec.
    """
    text, where = spec_text(spec), f"adapter {spec.name!r}"
    if _read(text, where) != replace(spec, strict=True):
        fail(CheckpointError, "E329", "this spec has no text of the same meaning, so it cannot be saved", where=where)
    return {"peft_type": OWN_TYPE, "format": FORMAT, "spec": text}


def read_spec_fields(reader: FieldReader, adapter_name: str) -> AdapterSpec:
    """The adapter that an adapter_config.json with a spec in it describes.

    Raises:
        CheckpointError: unknown fields, a newer format, or a text that is not a spec of one adapter.
    """
    config, where = reader.config, reader.where
    reader.unknown(sorted(set(config) - _FIELDS), _FIELDS)
    version = config.get("format")
    if isinstance(version, bool) or not isinstance(version, int):
        reader.problem("E321", f"field 'format' = {shown(version)} is not a whole number")
    elif version > FORMAT:
        message = f"the checkpoint has format {version}, this peftc reads up to {FORMAT}"
        reader.problem("E361", message, "upgrade peftc")
    text = config.get("spec")
    if not isinstance(text, str):
        reader.problem("E321", f"field 'spec' = {shown(text)} is not a text")
    if reader.problems or not isinstance(text, str):
        raise CheckpointError(*reader.problems)
    return replace(_read(text, f"{where} (spec)"), name=adapter_name)


def known_methods(
    config: Mapping[str, object], directory: Path, use: str | PathLike[str] | None = None
) -> Mapping[str, MethodRule]:
    """The methods that a checkpoint may be of: built in, those of the file `use`, and, where none of these has its
    PEFT type, the one whose definition stands in the manifest beside it.

    Raises:
        SpecError: `use` cannot be read.
        CheckpointError: the manifest is needed, and damaged.
    """
    methods = {**builtin_methods(), **(read_methods(use) if use is not None else {})}
    wanted = config.get("peft_type")
    if wanted == OWN_TYPE or wanted in {each.peft_type for each in methods.values()}:
        return methods
    manifest = read_manifest(directory)
    if manifest is None:
        return methods
    where = str(directory / MANIFEST)
    if spec_digest(manifest.spec) != manifest.spec_sha256:
        fail(CheckpointError, "E327", "the manifest's spec is not the one that was saved", where=where)
    rule = _read(manifest.spec, f"{where} (spec)").rule
    return {**methods, rule.name: rule}


def check_growth(plan: AdapterPlan, stored: Mapping[ParamKey, object], directory: Path) -> None:
    """Refuse what a checkpoint's own method would make beyond the file's tensors, before any of it is made.

    Raises:
        CheckpointError: a tensor, or a part of a formula, is out of all proportion to the weight it is for.
    """
    if plan.spec.rule in builtin_methods().values():
        return
    for at in plan.sites:
        side = max(at.site.in_features, at.site.out_features, _SMALL)
        for what, size, sites in _sizes(plan, at, stored):
            if size > SQUARES * side * side * at.site.count * sites:
                message = f"at {at.site.name} {what} would be {size:,} numbers, which no method needs there"
                help = "the definition in the file is damaged or hostile"
                fail(CheckpointError, "E345", message, help=help, where=str(directory / CONFIG))


def _sizes(plan: AdapterPlan, at: PlannedSite, stored: Mapping[ParamKey, object]) -> Iterator[tuple[str, int, int]]:
    """What a site needs that no file holds: its name, how many numbers it has, and how many sites it is for."""
    site, bound = at.site, at.bound
    shapes = {each.role: _one_of(each, site.count) for each in bound.starts}
    for each in bound.starts:
        if at.key(plan.name, each) not in stored:
            sites = len(plan.sites) if each.shared else 1
            yield f"'{each.role}'", math.prod(each.shape), sites
            yield f"what '{each.role}' is drawn from", _drawn(each), sites
    formulas: dict[str, algebra.Matrix | None] = {"W'": bound.weight, "b'": bound.bias}
    formulas |= {"prompt'": bound.prompt, "gate'": bound.gate, "labels'": bound.labels}
    formulas |= {f"'{each.role}'": each.init.value for each in bound.starts if isinstance(each.init, Derived)}
    for name, formula in formulas.items():
        if formula is not None:
            part = largest_part(formula, shapes, (site.out_features, site.in_features))
            yield f"a part of {name}", part * site.count, 1


def _one_of(param: BoundParam, count: int) -> tuple[int, ...]:
    """The shape a formula sees: that of one expert, at a stack of them."""
    axis = param.stacked_axis
    if count == 1 or param.shared:
        return param.shape
    if axis is None:
        return param.shape[1:]
    return (*param.shape[:axis], param.shape[axis] // count, *param.shape[axis + 1 :])


def _drawn(param: BoundParam) -> int:
    """How many numbers a random start puts into some order."""
    if isinstance(param.init, Derived):
        return 0
    given = {name: value for name, value in param.init.arguments if isinstance(value, float)}
    rows = math.prod(param.shape[:-1])
    places = max(given.get("rows", 0) * given.get("columns", 0), given.get("size", 0) ** 2)
    return int(max(rows * given.get("limit", 0), places))


def _read(text: str, name: str) -> AdapterSpec:
    source = Source(name, text)
    try:
        file = parse(source)
        for each in file.statements:
            if not isinstance(each, tree.Method | tree.Adapter):
                message = "a checkpoint's spec holds one adapter and its method, and nothing else"
                raise SpecError(Diagnostic("E327", message, each.span))
        spec = elaborate(file, source)
    except SpecError as error:
        damaged = Diagnostic("E327", "the spec in this file cannot be read", where=name)
        own = [each for each in error.diagnostics if each.code == "E327"]
        raise CheckpointError(*(own or (damaged, *error.diagnostics))) from error
    if len(spec.adapters) > 1:
        names = ", ".join(repr(each.name) for each in spec.adapters)
        fail(CheckpointError, "E327", f"a checkpoint holds one adapter, and its spec has {names}", where=name)
    return spec.adapters[0]

"""What users say adapters are (a spec in any form, PEFT configs), as one spec, and what configs say beside it."""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from os import PathLike
from typing import Any, NoReturn

from peftc.grammar.diagnostics import ArgumentTypeError, CheckpointError, Diagnostic, SpecError, UsageError, fail
from peftc.grammar.spec.elaborate import names_file, read_spec
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.spec import AdapterSpec, Spec, Target
from peftc.grammar.syntax import tree
from peftc.passes.foreign import peft as fields
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.plan.resolve import ModelSurvey, resolve, usual_targets
from peftc.runtime.init.tokens import check_ties
from peftc.runtime.peft_config.fresh_config import check_sizes
from peftc.runtime.peft_config.peft_config import ConfigFacts, read_config
from peftc.runtime.peft_config.peft_targets import MODULE
from peftc.runtime.peft_config.unmatched import check_names
from peftc.runtime.peft_format.found_tensors import modules_of
from peftc.runtime.routing.saved_route import is_route

_ACCEPTED = (
    "pass a spec (a path, its text, a Spec or AdapterSpec), a PEFT config or its fields as a dict, "
    "or a dict of such by the adapters' names"
)


@dataclass(frozen=True)
class Described:
    """Adapters, and what a config says of one that is not part of a spec, by its name."""

    spec: Spec
    facts: Mapping[str, ConfigFacts] = field(default_factory=dict)

    def on(self, survey: ModelSurvey) -> tuple[AdapterSpec, ...]:
        """The adapters for a model that looks like this.

        A config that names no modules means those that its method has for the type of the model, whatever else it
        trains; a spec that trains others means these alone.
        """
        return tuple(
            replace(each, on=usual_targets(each, survey)) if self._is_usual(each) else each
            for each in self.spec.adapters
        )

    def _is_usual(self, adapter: AdapterSpec) -> bool:
        rule = adapter.rule
        return adapter.name in self.facts and not adapter.on and bool(adapter.train) and rule.prompt is None

    def check(self, plans: Sequence[AdapterPlan], survey: ModelSurvey) -> None:
        """Raise CheckpointError where a config tells sizes of the model that it has not, names a weight twice, or wants
        adapters tied that are not.

        What it names and the model has not is told in warnings.
        """
        told = list[str]()
        for plan in plans:
            if plan.name in self.facts:
                check_sizes(self.facts[plan.name].sizes, plan)
                told += check_names(self.facts[plan.name].config, plan, survey)
                if self.facts[plan.name].ties:
                    check_ties(plan, survey.ties, "the PEFT config")
        for message in told:
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def of_keys(self, keys: Collection[str]) -> "Described":
        """The adapter with the modules that a file's keys are of, whatever modules its config names.

        Raises CheckpointError (E325) for a config that names parameters, which keys do not tell apart.
        """
        (adapter,) = self.spec.adapters
        if adapter.rule.rows or adapter.rule.prompt is not None:
            return self
        if adapter.name in self.facts and self.facts[adapter.name].config.get("target_parameters"):
            message = "field 'target_parameters' names parameters, and the keys of a state_dict tell modules alone"
            fail(CheckpointError, "E325", message, help="leave the state_dict out", where="the PEFT config")
        named = "|".join(map(re.escape, modules_of(adapter.rule, keys)))
        meant = replace(adapter, on=(Target((tree.PatternSelector(named),), where=MODULE),), skip=())
        return replace(self, spec=replace(self.spec, adapters=(meant,)))

    def warn_of_others(self, plan: AdapterPlan, survey: ModelSurvey) -> None:
        """Tell where a plan is of other modules than the config names."""
        try:
            wanted = _modules(resolve(self.on(survey)[0], survey))
        except SpecError:  # it names none, which is for what there are keys
            wanted = set()
        found = _modules(plan)
        told = {"only the config names": wanted - found, "only the state_dict has": found - wanted}
        parts = [f"{what} {', '.join(sorted(names))}" for what, names in told.items() if names]
        if parts:
            message = f"the adapter is of the modules that the state_dict has tensors of: {'; '.join(parts)}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def trains(self) -> bool:
        """Whether what is active is to be trained: a config for inference alone is not."""
        return not any(self.facts[name].inference_mode for name, _ in self.spec.active if name in self.facts)


def _modules(plan: AdapterPlan) -> set[str]:
    """The modules that a method adapts or copies."""
    return {at.site.module for at in plan.sites} | {each.module for each in plan.copies if each.saved}


def described(said: Any, name: str | None = None) -> Described:
    """The adapters meant by a spec, a config, or a mapping of names to such; a lone config's is called `name`.

    Of a mapping the first adapter is active, as in PEFT, where it is the one that the model is made with. Raises
    SpecError or CheckpointError for what is wrong in itself, ArgumentTypeError (E519) for a value of another type.
    """
    if isinstance(said, Described):
        return said
    if isinstance(said, Spec):
        return Described(said)
    if isinstance(said, AdapterSpec):
        return Described(_lone(said))
    if isinstance(said, str | PathLike):
        return Described(read_spec(said))
    given = _fields(said)
    if given is None:
        _refuse(said)
    if fields.TYPE not in given and _is_named(given):
        return _named(given)
    facts = read_config(
        given, methods=builtin_methods(), adapter_name=name or "default", where="the PEFT config", fresh=True
    )
    for message in facts.warnings:
        warnings.warn(message, stacklevel=3)
    return Described(_lone(facts.spec), {facts.spec.name: facts})


def described_route(said: Any, name: str | None = None) -> tuple[str, Mapping[str, object]] | None:
    """The name and the fields of a route's config, or of one in a mapping of its name to it; None for anything else."""
    if isinstance(said, Mapping) and len(said) == 1 and fields.TYPE not in said:
        ((name, said),) = said.items()
    given = None if isinstance(said, str | PathLike | Spec | AdapterSpec | Described) else _fields(said)
    return (name or "default", given) if given is not None and is_route(given) else None


def one_adapter(said: Any, name: str | None) -> Described:
    """The one adapter that is meant, under the name asked for, and what is demanded of the model it is for.

    Raises as `described`, and UsageError (E518) where not one adapter is meant.
    """
    found = described(said, name)
    spec = found.spec
    names = spec.names
    if spec.route is not None:
        message = f"the spec has the route '{spec.route.name}', and one adapter is added"
        fail(UsageError, "E518", message, spec.route.span, help="leave it out, and call set_route")
    if len(names) != 1 and name is None:
        message = f"the spec has not one adapter but {', '.join(names) or 'none'}"
        fail(UsageError, "E518", message, help="name one with adapter_name")
    if any(each.name == name for each in spec.combined):
        message, help = f"adapter {name!r} of the spec is made of others", "add these, then call add_weighted_adapter"
        fail(UsageError, "E518", message, help=help)
    matching = [each for each in spec.adapters if len(names) == 1 or each.name == name]
    if not matching:
        fail(UsageError, "E518", f"the spec has no adapter {name!r}")
    chosen = matching[0]
    called = name or chosen.name
    weight = dict(spec.active).get(chosen.name, 1.0)
    facts = {called: found.facts[chosen.name]} if chosen.name in found.facts else {}
    meant = chosen if chosen.name == called else replace(chosen, name=called)
    return Described(replace(spec, adapters=(meant,), active=((called, weight),), combined=()), facts)


def config_and_name(first: Any, second: Any, peft_config: Any = None) -> tuple[Any, str | None]:
    """What `add_adapter` is told: the config and the name, in transformers' order or in PEFT's, or by PEFT's keyword.

    Raises ArgumentTypeError (E597) where one is missing, is said twice, or the name is none.
    """
    given = [each for each in (first, second) if each is not None]
    configs = [each for each in given if not isinstance(each, str)]
    texts = [each for each in given if isinstance(each, str)]
    if peft_config is not None:
        configs.append(peft_config)
    elif not configs:
        # Of two texts one is a spec and one a name.
        spec = next((each for each in texts if _reads_as_spec(each)), None)
        if spec is None:
            said = f": {texts[0]!r} is a name, and no spec" if texts else ""
            _misused(f"no config is given{said}", _ACCEPTED)
        texts.remove(spec)
        configs.append(spec)
    if len(configs) > 1:
        _misused("two configs are given for one adapter", "give one, and the name as a text")
    if len(texts) > 1:
        _misused(f"two names are given for one adapter: {texts[0]!r} and {texts[1]!r}", "give one name")
    return configs[0], texts[0] if texts else None


def config_fields(said: Any) -> Mapping[str, Any]:
    """The fields of a PEFT config, as adapter_config.json has them. Raises ArgumentTypeError (E519) for no config."""
    found = _fields(said)
    if found is None or fields.TYPE not in found:
        _refuse(said)
    return found


def _reads_as_spec(text: str) -> bool:
    return "{" in text or "=" in text or names_file(text)


def _named(given: Mapping[str, Any]) -> Described:
    """Adapters under the names that a mapping gives them."""
    found = {name: one_adapter(each, name) for name, each in given.items()}
    bases = list(dict.fromkeys(each.spec.base for each in found.values() if each.spec.base is not None))
    if len(bases) > 1:
        help = "say 'base' once, or the same in each"
        fail(UsageError, "E596", "the specs of several adapters demand different things of their base", help=help)
    adapters = tuple(each.spec.adapters[0] for each in found.values())
    first = next(iter(found.values())).spec.active
    facts = {name: facts for each in found.values() for name, facts in each.facts.items()}
    return Described(Spec(adapters, first, bases[0] if bases else None), facts)


def _lone(spec: AdapterSpec) -> Spec:
    return Spec((spec,), ((spec.name, 1.0),))


def _fields(said: Any) -> Mapping[str, Any] | None:
    """The fields of a config object, or what a mapping has, as JSON would have it; None for other values."""
    if isinstance(said, type):
        return None
    if isinstance(said, Mapping):
        return {name: _plain(value) for name, value in said.items()} if all(isinstance(n, str) for n in said) else None
    if not callable(getattr(said, "to_dict", None)) or not hasattr(said, fields.TYPE):
        return None
    left_out = {name: getattr(said, name, None) for name in fields.NOT_IN_FILES}
    own = {name: str(value) for name, value in left_out.items() if value and not _is_pefts(value)}
    return {**(_fields(said.to_dict()) or {}), **own}


def _is_pefts(value: Any) -> bool:
    """Whether a function is one that a config of PEFT's has from the start."""
    return str(getattr(value, "__module__", "")).startswith("peft.")


def _plain(value: Any) -> Any:
    """A value as JSON has it. PEFT holds lists of names as sets, in no order, and words as enums."""
    match value:
        case Enum():
            return value.value
        case set() | frozenset():
            return sorted(map(_plain, value), key=str)
        case list() | tuple():
            return [_plain(each) for each in value]
        case dict():
            return {key: _plain(each) for key, each in value.items()}
        case _:
            return value


def _is_named(given: Mapping[str, Any]) -> bool:
    """Whether the values of a mapping are adapters' descriptions, not the fields of a config."""
    certain = [isinstance(each, Spec | AdapterSpec) or hasattr(each, fields.TYPE) for each in given.values()]
    return any(certain) or (bool(given) and all(map(_describes, given.values())))


def _describes(value: Any) -> bool:
    return _reads_as_spec(value) if isinstance(value, str) else isinstance(value, PathLike | Mapping)


def _refuse(said: Any) -> NoReturn:
    what = f"the class {said.__name__}" if isinstance(said, type) else f"a value of type {type(said).__name__}"
    raise ArgumentTypeError(Diagnostic("E519", f"{what} does not describe an adapter", help=_ACCEPTED))


def _misused(message: str, help: str) -> NoReturn:
    raise ArgumentTypeError(Diagnostic("E597", message, help=help))

"""What a PEFT configuration names and a model has not, or parts, which PEFT says in a warning, or leaves unsaid."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peftc.grammar.diagnostics import CheckpointError, did_you_mean, fail
from peftc.grammar.method.rule import MethodRule
from peftc.grammar.spec.select import Universe, select_modules
from peftc.grammar.syntax import tree
from peftc.passes.foreign import peft as fields
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.plan.resolve import ModelSurvey, selected
from peftc.runtime.peft_config.peft_rule import mask_field, pattern_fields
from peftc.runtime.peft_config.peft_targets import MODULE
from peftc.runtime.peft_format.peft_names import ending_selector, pattern_key_selector, suffix_selector

_MODULES, _PARAMETERS, _TRAINED = "target_modules", "target_parameters", "modules_to_save"
_EXCLUDED, _TIES = "exclude_modules", "ensure_weight_tying"
_HEADS = {each for names in fields.TASK_HEADS.values() for each in names}  # PEFT writes all of a task's into a config


@dataclass(frozen=True)
class _Entry:
    """One thing that a configuration names: the field, the text, and what the text chooses."""

    field: str
    text: str
    selector: tree.Selector


def check_names(config: Mapping[str, object], plan: AdapterPlan, survey: ModelSurvey) -> tuple[str, ...]:
    """What is to be told of the names in a configuration that chose nothing, and of what it parts that is tied.

    Raises CheckpointError (E325) where one weight is named as a module and as a parameter: PEFT adapts none twice.
    """
    if plan.spec.rule.prompt is not None:
        return ()
    _check_once(plan, survey)
    modules, parameters = survey.universe.modules, tuple(each.weight for each in survey.sites)
    adapted = tuple(dict.fromkeys(name for at in plan.sites for name in (at.site.module, at.site.weight, at.site.name)))
    entries = _entries(config, plan.spec.rule)
    told = []
    known = {_MODULES: modules, _TRAINED: modules, _EXCLUDED: modules, _PARAMETERS: parameters}
    for entry in entries:
        names = known.get(entry.field, adapted)
        if not _chosen(entry, names):
            what = "parameter" if entry.field == _PARAMETERS else "module" if entry.field in known else "adapted module"
            guess = did_you_mean(
                entry.text, [each if entry.field == _PARAMETERS else each.rpartition(".")[2] for each in names]
            )
            hint = f" ({guess})" if guess else ""
            told.append(f"the PEFT config: field '{entry.field}': no {what} is called {entry.text!r}{hint}")
    if config.get(_TIES) is True and not _ties(plan):
        told.append(f"the PEFT config: field '{_TIES}': nothing that is adapted or trained is tied")
    if config.get(_TIES) is not True:
        told += _told_of_ties(plan)
    return tuple(told)


def _told_of_ties(plan: AdapterPlan) -> Iterator[str]:
    """What is to be told where one of several modules with the same weight is adapted, or trained, by itself."""
    trained = [each.module for each in plan.trained if each.parted]
    apart = [*(at.site.module for at in plan.sites if at.site.tied), *trained]
    if apart:
        help = f"; '{_TIES}' = true keeps what '{_TRAINED}' names tied" if trained and _can_tie(plan) else ""
        names = f"{', '.join(apart)}: adapted apart from what is tied there"
        yield f"the PEFT config: {names}, so that a merged model has it tied no more{help}"


def _can_tie(plan: AdapterPlan) -> bool:
    """Whether the method's config has the field."""
    return plan.spec.rule.peft_type in fields.TYING


def _ties(plan: AdapterPlan) -> bool:
    """Whether anything is adapted or trained that is tied."""
    adapted = any(at.site.tied for at in plan.sites)
    return adapted or any(each.tied for each in plan.copies) or any(each.tied for each in plan.rows)


def _check_once(plan: AdapterPlan, survey: ModelSurvey) -> None:
    """Raise CheckpointError if what is chosen as a module, by a name or a pattern, is chosen as a parameter too."""
    modules = [each for each in plan.spec.on if each.where in (None, MODULE)]
    parameters = [each for each in plan.spec.on if each not in modules]
    named = selected(modules, survey) - selected(plan.spec.skip, survey)
    both = named & selected(parameters, survey)
    twice = [at.site.name for at in plan.sites if at.site.name in both]
    if twice:
        message = f"the weight of '{twice[0]}' is named by '{_PARAMETERS}', and its module by '{_MODULES}'"
        fail(CheckpointError, "E325", message, help="leave one of the two out", where="the PEFT config")


def _chosen(entry: _Entry, names: Sequence[str]) -> tuple[str, ...]:
    return select_modules(entry.selector, Universe((), tuple(names)))


def _entries(config: Mapping[str, object], rule: MethodRule) -> Iterator[_Entry]:
    spelled: dict[str, Callable[[str], tree.Selector]] = {
        _MODULES: suffix_selector,
        _PARAMETERS: suffix_selector,
        _EXCLUDED: suffix_selector,
        _TRAINED: ending_selector,
    }
    heads = {(_TRAINED, each) for each in _HEADS}
    for name, selector in spelled.items():
        value = config.get(name)
        for text in value if isinstance(value, list) else ():
            if isinstance(text, str) and (name, text) not in heads:
                yield _Entry(name, text, selector(text))
    for name in dict.fromkeys(("rank_pattern", "alpha_pattern", *pattern_fields(rule).values())):
        value = config.get(name)
        if isinstance(value, Mapping) and name != mask_field(rule):
            for text in value:
                yield _Entry(name, text, pattern_key_selector(text))

"""Help for whoever writes PEFT's words into a spec: which hyperparameter, method or clause is meant."""

from collections.abc import Iterable, Mapping

from peftc.grammar.method.peft_item import ANY, names_in
from peftc.grammar.method.rule import MethodRule
from peftc.grammar.peft_words import instead_of
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.syntax import tree


def for_field(rule: MethodRule, word: str) -> str:
    """What a method has in place of a field of PEFT's; empty for a word that is none."""
    named = {each.name for each in rule.hyperparameters}
    for field in rule.peft_fields:
        names = sorted(names_in(field.value) & named)
        if field.pattern == word and names:
            return f"PEFT's '{word}' is a clause here: {{ on v_proj with {names[0]} = ... }}"
        if field.name == word and names:
            others = _decided(rule, word)
            also = f"; the methods {', '.join(others)} stand for other values" if others else ""
            return f"PEFT's '{word}' is '{names[0]}' here{also}"
        if field.name == word and not instead_of(word):
            if isinstance(field.value, tree.Name) and field.value.id == ANY:
                return f"leave PEFT's '{word}' out: it changes nothing here"
            if others := _decided(rule, word):
                return f"PEFT's '{word}' is a method of its own here: {' or '.join(others)}"
    return instead_of(word)


def for_method(word: str, known: Mapping[str, MethodRule]) -> str:
    """The method that PEFT calls by this name, as a type (PREFIX_TUNING) or a class (PrefixTuningConfig)."""
    bare = _bare(word)
    found = [each.name for each in known.values() if each.peft_type and bare in _spellings(each.peft_type)]
    # Of several with one type the method that bears its name; the others are for fields of its config.
    found = [name for name in found if _bare(name) in bare] or found
    return f"did you mean '{found[0]}'?" if found else ""


def _spellings(peft_type: str) -> Iterable[str]:
    return (_bare(peft_type), f"{_bare(peft_type)}config")


def _bare(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")


def _decided(rule: MethodRule, word: str) -> list[str]:
    """The other methods of PEFT's type that give this field a value of theirs."""
    ours = [each.value for each in rule.peft_fields if each.name == word]
    return sorted(
        other.name
        for other in builtin_methods().values()
        if other.peft_type == rule.peft_type and other.name != rule.name
        for field in other.peft_fields
        if field.name == word and not names_in(field.value) and field.value not in ours
    )

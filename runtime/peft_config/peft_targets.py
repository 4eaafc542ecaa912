"""The modules that a configuration of PEFT's names, as targets of a spec."""

from peftc.grammar.method.rule import MethodRule
from peftc.grammar.spec.spec import Target
from peftc.grammar.syntax import tree
from peftc.passes.foreign import peft as fields
from peftc.runtime.peft_config.json_fields import FieldReader
from peftc.runtime.peft_format.peft_names import (
    beyond_layers,
    layered_selector,
    suffix_selector,
)

# target_modules never reaches a raw parameter, though one of the same name may exist beside the modules.
MODULE = tree.Unary("not", tree.Name("parameter"))
_LINEAR = tree.Name("linear")
_WEIGHT = ".weight"
_PARAMETER = tree.Binary("or", tree.Name("parameter"), tree.Name("multihead_attention"))


def places(reader: FieldReader, rule: MethodRule) -> tuple[Target, ...]:
    """What is chosen among places that are no weight: attention modules by one name, the end of theirs."""
    named = reader.text("target_modules") if "attention" in rule.kinds else None
    return (Target((suffix_selector(named),)),) if named else ()


def targets(reader: FieldReader, *, fresh: bool) -> tuple[Target, ...]:
    """What is adapted: modules by the ends of their names or a pattern, in some layers, and parameters."""
    modules = reader.text_or_texts("target_modules")
    parameters = tuple(dict.fromkeys(reader.texts("target_parameters")))
    layers = _layers(reader)
    targets: list[Target] = []
    if isinstance(modules, str):
        if layers is not None:
            reader.problem("E325", "field 'layers_to_transform' needs 'target_modules' to be a list of names")
        if modules.lower() == fields.ALL_LINEAR:
            targets.append(Target((tree.AllSelector("linear"),)))
        elif modules != fields.NO_MODULES and reader.pattern("target_modules", modules):
            targets.append(Target((tree.PatternSelector(modules),), where=MODULE))
    elif modules and layers:
        limited = layered_selector(sorted(set(modules)), layers, _layers_patterns(reader))
        targets.append(Target((limited,), where=MODULE))
    elif modules:
        targets.append(Target(tuple(suffix_selector(each) for each in sorted(set(modules))), where=MODULE))
    elif not parameters and not (fresh and modules is None):
        _check_untargeted(reader, modules)
    if parameters:
        chosen = tuple(suffix_selector(each) for each in sorted(parameters))
        targets.append(Target(chosen, where=_PARAMETER))
        # The weight of a linear layer can be named as a parameter too, and is adapted no other way for it.
        linear = [each.removesuffix(_WEIGHT) for each in sorted(parameters) if each.endswith(_WEIGHT)]
        if linear:
            targets.append(Target(tuple(map(suffix_selector, linear)), where=_LINEAR))
    return tuple(targets)


def _check_untargeted(reader: FieldReader, modules: tuple[str, ...] | None) -> None:
    trained = bool(reader.config.get("modules_to_save") or reader.config.get("trainable_token_indices"))
    if modules is None and trained:
        reader.problem(
            "E325",
            "field 'target_modules' is not given beside 'modules_to_save'",
            "name the adapted modules, or [] for none",
        )
    if modules is not None and not trained:
        reader.problem("E325", "the adapter adapts nothing: 'target_modules' is empty")


def _layers(reader: FieldReader) -> tuple[int, ...] | None:
    raw = reader.config.get("layers_to_transform")
    listed = raw if isinstance(raw, list) else [] if raw is None else [raw]
    if all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in listed):
        return tuple(sorted(set(listed))) or None
    reader.mistyped("layers_to_transform", "a layer's index or a list of them")
    return None


def _layers_patterns(reader: FieldReader) -> tuple[str, ...]:
    raw = reader.text_or_texts("layers_pattern")
    patterns = (raw,) if isinstance(raw, str) and raw else tuple(raw or ())
    return tuple(each for each in patterns if reader.pattern("layers_pattern", each))


def other_layers(reader: FieldReader) -> tuple[Target, ...]:
    """The layers that are left out where the modules are those that the method has for the model's type."""
    layers = _layers(reader)
    if layers is None or reader.config.get("target_modules") is not None:
        return ()
    return (Target((beyond_layers(layers, _layers_patterns(reader)),), where=MODULE),)


def skips(reader: FieldReader) -> tuple[Target, ...]:
    """The modules that are not adapted, although their names fit; a weight named as a parameter is, all the same."""
    excluded = reader.text_or_texts("exclude_modules")
    selectors: tuple[tree.Selector, ...] = ()
    if not isinstance(excluded, str):
        selectors = tuple(suffix_selector(each) for each in sorted(set(excluded or ())))
    elif excluded and reader.pattern("exclude_modules", excluded):
        selectors = (tree.PatternSelector(excluded),)
    return (Target(selectors, where=MODULE),) if selectors else ()

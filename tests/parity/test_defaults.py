"""The modules a method adapts when nothing is named are those of peft's tables."""

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import constants

from peftc.grammar.method.rule import MethodRule
from peftc.grammar.spec.library import builtin_methods

# What changes no weight is of the whole model, or of modules that PEFT finds by name.
METHODS = [each for each in builtin_methods().values() if each.peft_type and each.prompt is None and not each.rows]


@pytest.mark.parametrize("rule", METHODS, ids=lambda rule: rule.name)
def test_the_targets_are_pefts(rule: MethodRule) -> None:
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType[rule.peft_type]]
    named = f"TRANSFORMERS_MODELS_TO_{rule.peft_type}_TARGET_MODULES_MAPPING"
    table = getattr(tuner, "target_module_mapping", None) or getattr(constants, named)
    shared = {name: targets for name, targets in table.items() if rule.default_targets(name)}
    assert len(shared) > 0.9 * len(table)
    for name, targets in shared.items():
        ours = [each for group, _ in rule.default_targets(name) for each in group]
        assert sorted(ours) == sorted(targets), name


def test_ia3_knows_which_are_feed_forward() -> None:
    rule = builtin_methods()["ia3"]
    table = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for name, targets in table.items():
        flagged = [each for group, values in rule.default_targets(name) for each in group if dict(values)]
        assert flagged == targets, name

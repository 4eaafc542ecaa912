"""After whatever users do to a module tree, in any order with what they do to adapters, outputs are the formula's."""

import pytest
from hypothesis import Phase

from tests.parity.tree.machine import run
from tests.parity.tree.subjects import SUBJECTS
from tests.parity.tree.watched import STEPS

# How many runs of how many steps.
RUNS = {"llama": (6, 50), "bert": (4, 50), "net": (58, 50)}


@pytest.mark.parametrize("name", RUNS)
def test_a_model_is_what_was_made_of_it(name: str) -> None:
    STEPS.clear()
    runs, steps = RUNS[name]
    run(SUBJECTS[name], runs, steps, phases=(Phase.generate,))
    assert STEPS.total() > 0.6 * runs * steps, "some end early, and some find nothing to do; 2,000 in all"
    assert len(STEPS) > 24

"""After whatever users do to a module tree, in any order with what they do to adapters, outputs are the formula's."""

import re

import pytest
from hypothesis import Phase

from peftc.runtime.regions.watch import Holds, Watcher
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


# What a look at hooks, training, forwards of an object's own, and modules consists of.
LOOKS = {
    "hooks": r"not any\(",
    "training": r"\['training'\] is",
    "forwards": r"'forward' not in",
    "modules": r"\['_modules'\] is|^len\(|\.get\('\w+'\) is v|__class__",
}


@pytest.mark.parametrize("blind_to", LOOKS)
def test_the_same_steps_fail_where_a_look_is_left_out(blind_to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Watcher.made

    def made(watcher: Watcher) -> Holds:
        watcher.terms = [each for each in watcher.terms if not re.search(LOOKS[blind_to], each)] or ["True"]
        return whole(watcher)

    monkeypatch.setattr(Watcher, "made", made)
    with pytest.raises((AssertionError, RuntimeError)):
        run(SUBJECTS["net"], *RUNS["net"], phases=(Phase.generate,))

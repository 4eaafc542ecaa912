"""A state machine: what users do to a module tree mixed with the life of adapters, against the formula after each step.

`python -m tests.parity.tree.machine --help` runs it for longer, and with other seeds, than the tests do.
"""

import argparse

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.parity.tree.adapter_rules import AdapterRules
from tests.parity.tree.subjects import SUBJECTS, Subject
from tests.parity.tree.tree_rules import TreeRules
from tests.parity.tree.watched import STEPS


class Machine(TreeRules, AdapterRules):
    """All of it."""


def machine(subject: Subject) -> type[Machine]:
    """The machine of one model."""
    return type(f"MachineOf{subject.name.title()}", (Machine,), {"subject": subject})


def main() -> None:
    """Run it, and say what was done."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=sorted(SUBJECTS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--length", type=int, default=50, help="steps of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shrink", action="store_true", help="look for the shortest way to a failure")
    options = parser.parse_args()
    phases = (Phase.generate, Phase.shrink) if options.shrink else (Phase.generate,)
    try:
        run(SUBJECTS[options.name], options.steps // options.length, options.length, options.seed, phases)
    finally:
        print(STEPS.total(), dict(STEPS))


def run(
    subject: Subject, runs: int, length: int, number: int | None = None, phases: tuple[Phase, ...] = tuple(Phase)
) -> None:
    """So many runs of so many steps each; without a number they are the same each time."""
    rules = settings(
        max_examples=runs,
        stateful_step_count=length,
        derandomize=number is None,
        phases=phases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    chosen = machine(subject)
    run_state_machine_as_test(chosen if number is None else seed(number)(chosen), settings=rules)


if __name__ == "__main__":
    main()

"""peftc methods"""

import re
from typing import Annotated, Any

import typer

from peftc.compiler.commands import arguments
from peftc.compiler.report import console, report
from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.method.rule import MethodRule
from peftc.grammar.spec.elaborate import read_methods
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.syntax import expression

_ARXIV = re.compile(r"arXiv:\s?(\d{4}\.\d{4,5})")


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Tell all about this method.",
            autocompletion=lambda: list(builtin_methods()),
            show_default=False,
        ),
    ] = None,
    use: arguments.Use = None,
    json: arguments.Json = False,
) -> None:
    """List the methods, or tell what one is: its formula, hyperparameters, parameters and definition."""
    known = {**builtin_methods(), **(read_methods(use) if use is not None else {})}
    if name is None:
        if json:
            console.write_json({"methods": [_facts(each) for each in known.values()]})
        else:
            console.show(report.methods_table(known.values()))
        return
    if name not in known:
        help = did_you_mean(name, known) or f"known methods: {', '.join(known)}"
        fail(SpecError, "E140", f"there is no method '{name}'", help=help)
    if json:
        console.write_json(_facts(known[name]))
        return
    console.show(report.method_report(known[name]))
    console.write(f"{_definition(known[name])}\n")


def _facts(rule: MethodRule) -> dict[str, Any]:
    return {
        "name": rule.name,
        "doc": rule.doc,
        "papers": [f"https://arxiv.org/abs/{each}" for each in _ARXIV.findall(rule.doc)],
        "kinds": list(rule.kinds),
        **_formulas(rule),
        "lets": {name: expression.text(value) for name, value in rule.lets},
        "hyperparameters": [
            {
                "name": each.name,
                "type": each.type,
                "default": expression.text(each.default),
                "choices": list(each.choices),
            }
            for each in rule.hyperparameters
        ],
        "parameters": [
            {
                "name": each.role,
                "shape": [expression.text(size) for size in each.shape],
                "init": {kind or "any": expression.text(value) for kind, value in each.init},
                "saved": {kind or "any": value for kind, value in each.saved},
                "trained": each.trained,
                "shared": each.shared,
            }
            for each in rule.params
        ],
        "peft_type": rule.peft_type or None,
        "default_targets": {
            model_type: [name for targets, _ in found for name in targets] for model_type, found in rule.defaults
        },
        "definition": _definition(rule),
    }


def _formulas(rule: MethodRule) -> dict[str, str | None]:
    """What becomes of a weight and its bias; of a place that is no weight, what is put in front."""
    primes = {"prompt": rule.prompt, "gate": rule.gate, "labels": rule.labels}
    given = {name: expression.text(value) for name, value in primes.items() if value is not None}
    if rule.prompt is not None or rule.copies or rule.rows:
        return {"formula": None, "bias": None, **given}
    return {
        "formula": "W" if rule.weight is None else expression.text(rule.weight),
        "bias": "b" if rule.bias is None else expression.text(rule.bias),
    }


def _definition(rule: MethodRule) -> str:
    return rule.span.text if rule.span else ""

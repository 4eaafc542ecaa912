import inspect
from dataclasses import fields

import pytest

from peftc import compiler
from peftc.compiler.export_model.export_options import ExportOptions
from peftc.grammar.diagnostics import UsageError

# What is said of the directory, of the adapters' source, and what a job finds beside the model.
APART = {"force", "use", "seed"}
BESIDE = {"example_inputs", "tokenizer"}


def keywords(function):
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in APART}


def test_every_argument_of_an_export_is_an_option_with_its_default():
    options = {each.name: each.default for each in fields(ExportOptions)}
    assert keywords(compiler.AdaptedModel.export) == options
    assert keywords(compiler.export) == {name: value for name, value in options.items() if name not in BESIDE}


REFUSED = {
    "format": ({"format": "pt"}, "E649", "format cannot be 'pt'"),
    "adapters": ({"format": "pt2", "adapters": "routd"}, "E649", "did you mean 'routed'?"),
    "entry": ({"format": "pt2", "entry": "decode"}, "E649", "it is one of forward, generate"),
    "adapters of a checkpoint": ({"adapters": "inputs"}, "E640", "a checkpoint has its adapters merged"),
    "rows of a checkpoint": ({"max_batch_size": 2}, "E640", "max_batch_size has no meaning here: it is for programs"),
    "shards": ({"format": "onnx", "max_shard_size": 3}, "E640", "it is for checkpoints, not for onnx"),
    "a merge of none": ({"format": "pt2", "adapters": "inputs", "safe_merge": True}, "E640", "nothing is merged"),
    "weights of inputs": (
        {"format": "pt2", "adapters": "inputs", "adapter_names": {"a": 0.5}},
        "E640",
        "adapters that are inputs or routed have no weights",
    ),
    "no rows": ({"format": "pt2", "max_batch_size": 0}, "E649", "max_batch_size cannot be 0"),
    "no number": ({"format": "pt2", "max_length": True}, "E649", "max_length cannot be True"),
    "a drift": ({"max_drift": float("inf")}, "E649", "max_drift cannot be inf"),
    "a share": ({"min_agreement": 1.5}, "E649", "min_agreement cannot be 1.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    given, code, text = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        ExportOptions(**given).check()
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert text in f"{found.message}\n{found.help}"


def test_what_is_said_and_what_is_not():
    options = ExportOptions("pt2", max_length=4, safe_merge=True)
    options.check()
    assert options.keywords() == {"format": "pt2", "max_length": 4, "safe_merge": True}
    assert ExportOptions(**options.keywords()) == options
    assert options.program_format == "pt2"
    assert ExportOptions().keywords() == {}
    with pytest.raises(AssertionError):
        _ = ExportOptions().program_format

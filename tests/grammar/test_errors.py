"""The register of codes: all of them, each once, and examples that are refused with what they show."""

import ast
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peftc import compiler
from peftc.grammar.diagnostics import AdapterError, UsageError
from peftc.grammar.errors.register import FAMILIES, entry, register
from peftc.grammar.spec.elaborate import read_spec
from tests.compiler.commands.cli_help import peftc

ROOT = Path(__file__).parents[2]
FOLDERS = ("grammar", "passes", "runtime", "compiler", "drop_in")
CODE = re.compile(r"E\d{3}")


def codes_in(text):
    """The codes that a file gives to diagnostics: texts that are a code and nothing else."""
    constants = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str) and CODE.fullmatch(value)}


def used():
    files = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    return set().union(*(codes_in(file.read_text(encoding="utf-8")) for file in files))


def test_every_code_that_is_used_is_registered_and_every_one_registered_is_used():
    assert len(used()) > 200
    assert used() == set(register())


def test_a_code_in_source_is_noticed():
    assert codes_in('fail(SpecError, "E999", "x (E201)")\nself.problem("E321", "y")') == {"E999", "E321"}


def test_entries_are_whole_sentences_in_the_file_of_their_family():
    for family in FAMILIES:
        assert any(code.startswith(family.start) for code in register())
        text = (ROOT / "grammar" / "errors" / family.file).read_text(encoding="utf-8")
        named = re.findall(r"^\[(\w+)\]$", text, re.MULTILINE)
        assert named == sorted(set(named))
        assert all(code.startswith(family.start) and CODE.fullmatch(code) for code in named)
    for each in register().values():
        assert each.says, each.code
        assert each.means.endswith((".", "?")), each.code
        assert each.mend, each.code


def test_no_two_codes_mean_the_same():
    for field in ("says", "means"):
        texts = [getattr(each, field) for each in register().values()]
        assert sorted(set(texts)) == sorted(texts)


EXAMPLES = [each for each in register().values() if each.spec]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "examples" / "tiny-llama"))


def test_the_language_has_examples():
    assert sum(each.code.startswith("E1") for each in EXAMPLES) >= 30
    assert sum(each.code.startswith("E2") for each in EXAMPLES) >= 15


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.code)
def test_the_example_is_refused_with_its_code(example, model):
    def use():
        return read_spec(example.spec) if example.code.startswith("E1") else compiler.apply(model, example.spec)

    with pytest.raises(AdapterError) as refused:
        use()
    assert {each.code for each in refused.value.diagnostics} == {example.code}


def test_the_page_is_new():
    made = runpy.run_path(str(ROOT / "docs" / "make_errors.py"))["page"]()
    assert made == (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), "run python docs/make_errors.py"


def test_a_code_is_looked_up_as_it_is_written():
    assert entry("e201") is register()["E201"]
    with pytest.raises(UsageError, match=r"E579.*'E299'(.|\n)*near it: E"):
        entry("E299")


def test_the_command_explains_a_code():
    done = peftc("explain", "E201")
    assert done.code == 0
    assert done.out.startswith("error[E201]: no module matches 'q_porj'\n\nA selector")
    assert "    adapter a = lora { on q_porj }" in done.out
    assert peftc("explain", "E201", "--json").json["mend"] == register()["E201"].mend
    unknown = peftc("explain", "E299")
    assert (unknown.code, "near it: " in unknown.err) == (1, True)
    assert peftc("explain", "support.adapter").code == 2

"""What other libraries call things stands in the room for it, and nowhere else."""

import ast
from collections.abc import Iterator
from pathlib import Path

from peftc.passes.foreign import transformers as contract

ROOT = Path(__file__).parents[1]
FOLDERS = ("grammar", "passes", "runtime", "compiler", "drop_in")
ROOM = ROOT / "passes" / "foreign"

# Words that this project has for something of its own: a kind of place, what a definition says of a prompt.
OWN = {"cache", "labels"}
NAMES = (contract.ARGUMENTS | contract.OUTPUTS) - OWN
ATTRIBUTES = contract.ATTRIBUTES - {contract.EMBEDDINGS_IN, contract.EMBEDDINGS_OUT}  # methods that anyone may call

# Arguments of our own methods that are called as transformers' are, handed on to one another.
SAME_METHODS = {"runtime/artifact/artifact.py": {"input_ids", "attention_mask"}}


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Texts, keyword arguments and attributes, which may be a foreign name."""
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)):
                yield node.lineno, text
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.Attribute(attr=name):
                yield node.lineno, name


def offenders(tree: ast.AST, names: frozenset[str] | set[str]) -> list[tuple[int, str]]:
    return [(line, text) for line, text in named(tree) if text in names]


def test_foreign_names_stand_in_their_room():
    found = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            label = file.relative_to(ROOT).as_posix()
            if ROOM not in file.parents:
                tree = ast.parse(file.read_text(encoding="utf-8"))
                wrong = offenders(tree, (NAMES | ATTRIBUTES) - SAME_METHODS.get(label, set()))
                found |= {label: wrong} if wrong else {}
    assert found == {}


def test_the_list_is_that_of_the_contract_and_noticed():
    assert {"input_ids", "past_key_values", "attention_mask", "decoder_input_ids", "use_cache"} <= NAMES
    for text in ("f(input_ids=1)", "x['past_key_values']", "output.past_key_values", "'use_cache' in names"):
        assert offenders(ast.parse(text), NAMES), text
    assert not offenders(ast.parse("f(cache=1); 'see input_ids, the tokens'"), NAMES)

"""Rules about the code: who may import whom, how long a file may be, and that no method is known by name."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx
import pytest

from peftc.grammar.source import Source
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.syntax.format import format_source
from peftc.grammar.syntax.parse import parse

ROOT = Path(__file__).parents[1]
ORDER = ("grammar", "passes", "runtime", "compiler")  # each may import itself and those before it
LONGEST = 400

# PEFT's own field names are a foreign format's words, and stand in one file.
FOREIGN_NAMES = {"passes/foreign/peft.py"}

FILES = sorted(file for folder in ORDER for file in (ROOT / folder).rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """`module` as written and resolved to a file's module where it is ours; `line` for messages."""

    module: str
    line: int
    in_function: bool


def name_of(file: Path) -> str:
    parts = ("peftc", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def imports_of(tree: ast.Module) -> list[Import]:
    return list(_imports(tree, in_function=False))


def _imports(node: ast.AST, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, in_function)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative imports hide the folder"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield Import(inner if inner in MODULES else str(child.module), child.lineno, in_function)
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, inside)


def folder_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "peftc" and len(parts) > 1 else None


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def label(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


every_file = pytest.mark.parametrize("file", FILES, ids=label)


def test_there_is_something_to_check():
    assert {label(file).split("/")[0] for file in FILES} == set(ORDER)
    assert len(FILES) > 40


@every_file
def test_arrows(file):
    own = ORDER.index(label(file).split("/")[0])
    for each in imports_of(parsed(file)):
        folder = folder_of(each.module)
        if folder is not None:
            assert ORDER.index(folder) <= own, f"line {each.line}: {ORDER[own]} must not know {each.module}"


@every_file
def test_no_late_imports(file):
    late = [each for each in imports_of(parsed(file)) if each.in_function and each.module.startswith("peftc")]
    assert late == []


def test_no_cycles():
    graph = networkx.DiGraph()
    for module, file in MODULES.items():
        graph.add_edges_from((module, each.module) for each in imports_of(parsed(file)) if each.module in MODULES)
    assert graph.number_of_edges() > len(FILES)
    assert list(networkx.simple_cycles(graph)) == []


def test_grammar_knows_no_torch():
    for file in FILES:
        if label(file).startswith("grammar/"):
            found = {each.module.split(".")[0] for each in imports_of(parsed(file))}
            assert found <= {"peftc", "lark", *sys.stdlib_module_names}, label(file)


def test_passes_know_no_files():
    for file in FILES:
        if label(file).startswith("passes/"):
            found = {each.module.split(".")[0] for each in imports_of(parsed(file))}
            assert not found & {"pathlib", "os", "io", "safetensors", "huggingface_hub"}, label(file)


@every_file
def test_length(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST


# --- methods are data ---


def words(text: str) -> set[str]:
    """`LoraConfig`, `lora_config`, `lora.config` -> {"lora", "config"}"""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    return {each.lower() for each in re.split(r"[\W_]+", apart) if each}


def named_methods(tree: ast.Module, methods: frozenset[str]) -> list[str]:
    """Places that name a method: identifiers, and texts that are not for people (docstrings, sentences)."""
    # A text that is a statement of its own is a docstring, or documents the name above it.
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        texts = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
        for text in texts:
            if " " not in text and words(text) & methods:
                found.append(f"line {getattr(node, 'lineno', 0)}: {text}")
    return found


# Methods whose name is a word the code has for something else: `Miss`, why a rewrite does not apply; the beginning of a
# name; what a method puts in front of the embedded tokens (`prompt'`) or of the cache, whichever method it is.
WORDS = frozenset({"miss", "prefix", "prompt"})


@every_file
def test_no_method_is_known_by_name(file):
    if label(file) not in FOREIGN_NAMES:
        assert named_methods(parsed(file), frozenset(builtin_methods()) - WORDS) == []


def test_naming_a_method_is_noticed():
    methods = frozenset({"lora"})
    for text in ('x = "lora"', "def make_lora(): ...", "class LoraLayer: ...", 'k = "lora_A" in key', "f(lora=1)"):
        assert named_methods(ast.parse(text), methods), text
    for text in ('"""About lora."""', 'help = "adapter a = lora(rank = 8)"', "exploration = 1"):
        assert not named_methods(ast.parse(text), methods), text


METHOD_FILES = sorted((ROOT / "grammar" / "methods").glob("*/*.adapter"))
LONGEST_METHOD = 40
PAPER = re.compile(r"arXiv:\d{4}\.\d{5}|https://\S+")


@pytest.mark.parametrize("file", METHOD_FILES, ids=lambda file: file.stem)
def test_a_method_is_short_canonical_and_says_where_it_comes_from(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_METHOD
    assert format_source(Source(file.name, text)) == text
    (method,) = parse(Source(file.name, text)).statements
    assert method.name == file.stem
    assert PAPER.search(method.doc)


# --- the distribution ---


def test_every_package_is_distributed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings = project["tool"]["setuptools"]
    assert set(settings["packages"]) == {name_of(file) for file in FILES if file.name == "__init__.py"}
    assert {file.parent for file in FILES} == {file.parent for file in FILES if file.name == "__init__.py"}


def test_every_data_file_is_distributed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]
    distributed = {
        file for package, each in patterns.items() for one in each for file in _folder(package).glob(one)
    } | set(FILES)
    present = {file for folder in ORDER for file in (ROOT / folder).rglob("*") if file.is_file()}
    assert {file for file in present if "__pycache__" not in file.parts} <= distributed
    assert all((ROOT / folder / "py.typed") in distributed for folder in ORDER)


def _folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])

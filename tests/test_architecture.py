"""Rules about the code: who may import whom, how long a file may be, and that no method is known by name."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx

from peftc.grammar.source import Source
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.syntax.format import format_source
from peftc.grammar.syntax.parse import parse

ROOT = Path(__file__).parents[1]
ORDER = ("grammar", "passes", "runtime", "compiler", "drop_in")  # each may import itself and those before it
NAMES = {"drop_in": "peft"}  # what a folder is imported as, where it is not called so
LONGEST = 400
MOST_FILES = 20

# PEFT's own names, and the keys of other libraries' files, are foreign formats' words: one file a library.
LIBRARIES = ("peft", "peft_classes", "peft_routes", "diffusers", "kohya")
FOREIGN_NAMES = {f"passes/foreign/{library}.py" for library in LIBRARIES} | {"drop_in/refused.py"}

FILES = sorted(file for folder in ORDER for file in (ROOT / folder).rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """`module` as written and resolved to a file's module where it is ours; `line` for messages."""

    module: str
    line: int
    in_function: bool


def name_of(file: Path) -> str:
    top, *rest = file.relative_to(ROOT).with_suffix("").parts
    parts = ("peftc", NAMES.get(top, top), *rest)
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
    folders = {name: folder for folder, name in NAMES.items()}
    return folders.get(parts[1], parts[1]) if parts[0] == "peftc" and len(parts) > 1 else None


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def label(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


PARSED = {file: parsed(file) for file in FILES}


def test_there_is_something_to_check():
    assert {label(file).split("/")[0] for file in FILES} == set(ORDER)
    assert len(FILES) > 40


def test_arrows():
    wrong = []
    for file, tree in PARSED.items():
        own = ORDER.index(label(file).split("/")[0])
        for each in imports_of(tree):
            folder = folder_of(each.module)
            if folder is not None and ORDER.index(folder) > own:
                wrong.append(f"{label(file)}:{each.line} must not know {each.module}")
    assert wrong == []


def test_no_late_imports():
    late = [
        f"{label(file)}:{each.line} imports {each.module}"
        for file, tree in PARSED.items()
        for each in imports_of(tree)
        if each.in_function and each.module.startswith("peftc")
    ]
    assert late == []


def test_imports_are_seen_wherever_they_stand():
    tree = ast.parse("import peftc.passes\ndef f():\n    from peftc.grammar import tree")
    assert imports_of(tree) == [Import("peftc.passes", 1, False), Import("peftc.grammar", 3, True)]


def test_no_cycles():
    graph = networkx.DiGraph()
    for module, file in MODULES.items():
        graph.add_edges_from((module, each.module) for each in imports_of(PARSED[file]) if each.module in MODULES)
    assert graph.number_of_edges() > len(FILES)
    assert list(networkx.simple_cycles(graph)) == []


def test_grammar_knows_no_torch():
    for file in FILES:
        if label(file).startswith("grammar/"):
            found = {each.module.split(".")[0] for each in imports_of(PARSED[file])}
            assert found <= {"peftc", "lark", *sys.stdlib_module_names}, label(file)


def test_passes_know_no_files():
    for file in FILES:
        if label(file).startswith("passes/"):
            found = {each.module.split(".")[0] for each in imports_of(PARSED[file])}
            assert not found & {"pathlib", "os", "io", "safetensors", "huggingface_hub"}, label(file)


def test_length():
    long = {label(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: lines for name, lines in long.items() if lines > LONGEST} == {}


# --- folders ---


def folders_of(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder of the repository with its files; not what tools, builds and virtual environments leave."""
    shown = [each for each in root.iterdir() if not each.name.startswith(".") or each.name == ".ci"]
    files = [each for each in shown if each.is_file()]
    yield root, files
    for folder in shown:
        if folder.is_dir() and folder.name not in ("__pycache__", "build") and not (folder / "pyvenv.cfg").exists():
            yield from folders_of(folder)


def test_a_folder_can_be_read_at_a_glance():
    counts = {folder.relative_to(ROOT).as_posix(): len(files) for folder, files in folders_of(ROOT)}
    assert {"grammar/syntax", "tests/golden/passes/insert", "docs"} <= set(counts)
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_a_full_folder_is_noticed(tmp_path):
    (tmp_path / "deep").mkdir()
    for number in range(21):
        (tmp_path / "deep" / f"{number}.txt").touch()
    assert [len(files) for _, files in folders_of(tmp_path)] == [0, 21]


# Rooms of tests that are of no one room: what holds for everything that can be built, whatever it is built of.
NO_ROOM = {"compiler/laws"}


def test_tests_mirror_the_rooms():
    for folder in ORDER:
        rooms = {each.parent for each in (ROOT / "tests" / folder).rglob("test_*.py")}
        strange = {label(each).removeprefix("tests/") for each in rooms if not (ROOT / _mirrored(each)).is_dir()}
        assert strange <= NO_ROOM, f"tests/{folder} has rooms that {folder}/ has not"


def test_what_a_file_of_tests_is_named_after_is_in_its_room():
    """A `test_<file>.py` stands in the room of `<file>.py`, or around it, wherever there is one of that name."""
    rooms: dict[str, set[str]] = {}
    for file in FILES:
        rooms.setdefault(file.stem, set()).add(label(file.parent))
    misplaced = [
        f"{label(file)} is not in {sorted(rooms[name])}"
        for folder in ORDER
        for file in (ROOT / "tests" / folder).rglob("test_*.py")
        if (name := file.stem.removeprefix("test_")) in rooms
        and not any(Path(room).is_relative_to(_mirrored(file.parent)) for room in rooms[name])
    ]
    assert misplaced == []


def _mirrored(folder: Path) -> str:
    return label(folder).removeprefix("tests/")


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
# name; what a method puts in front of the embedded tokens (`prompt'`) or of the cache, whichever method it is; numpy's
# polynomial of its roots.
WORDS = frozenset({"miss", "poly", "prefix", "prompt"})


def test_no_method_is_known_by_name():
    methods = frozenset(builtin_methods()) - WORDS
    places = [f"{label(file)}, {place}" for file, tree in PARSED.items() for place in named_methods(tree, methods)]
    assert [place for place in places if place.split(",")[0] not in FOREIGN_NAMES] == []
    assert {place.split(",")[0] for place in places} == FOREIGN_NAMES, "a file that needs no exception any more"


def test_naming_a_method_is_noticed():
    methods = frozenset({"lora"})
    for text in ('x = "lora"', "def make_lora(): ...", "class LoraLayer: ...", 'k = "lora_A" in key', "f(lora=1)"):
        assert named_methods(ast.parse(text), methods), text
    for text in ('"""About lora."""', 'help = "adapter a = lora(rank = 8)"', "exploration = 1"):
        assert not named_methods(ast.parse(text), methods), text


METHOD_FILES = sorted((ROOT / "grammar" / "methods").glob("*/*.adapter"))
LONGEST_METHOD = 48
PAPER = re.compile(r"arXiv:\d{4}\.\d{5}|https://\S+")


def faults_of(file: Path) -> Iterator[str]:
    """What is wrong with a method's file."""
    text = file.read_text(encoding="utf-8")
    if len(text.splitlines()) > LONGEST_METHOD:
        yield "is long"
    if format_source(Source(file.name, text)) != text:
        yield "is not formatted"
    (method,) = parse(Source(file.name, text)).statements
    if method.name != file.stem:
        yield f"has the method {method.name}"
    if not PAPER.search(method.doc):
        yield "says not where it comes from"


def test_a_method_is_short_canonical_and_says_where_it_comes_from():
    assert len(METHOD_FILES) > 40
    assert [f"{file.name} {fault}" for file in METHOD_FILES for fault in faults_of(file)] == []


def test_faults_of_a_method_are_noticed(tmp_path):
    file = tmp_path / "other.adapter"
    file.write_text("method m() {\n  on linear\n    W' = W + W\n}\n" + "\n" * LONGEST_METHOD)
    assert len(list(faults_of(file))) == 4


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
    top, *rest = package.split(".")[1:]
    return ROOT.joinpath(next((folder for folder, name in NAMES.items() if name == top), top), *rest)

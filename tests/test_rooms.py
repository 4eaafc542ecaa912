"""Rules about the rooms: their order, the map in CONTRIBUTING.md, and that every file that a page names is there."""

import ast
import importlib
import re
import runpy
from pathlib import Path

import networkx as nx
import pytest

from peftc import compiler

ROOT = Path(__file__).parents[1]
MAKER = runpy.run_path(str(ROOT / "docs" / "make_map.py"))
HOUSE = MAKER["House"]()

# From the ground up: a room may import those before it. What a room is for is said in its docstring.
ORDER = (
    "grammar",
    "grammar/errors",
    "grammar/syntax",
    "grammar/algebra",
    "grammar/method",
    "grammar/spec",
    "passes/ir",
    "passes/foreign",
    "passes/quantized/schemes",
    "passes/quantized",
    "passes/plan",
    "passes/expression",
    "passes/optimize",
    "passes/insert",
    "passes/virtual_tokens",
    "passes/route",
    "passes/cost",
    "passes/export",
    "runtime/files",
    "runtime/adapters",
    "runtime/mixed_batch",
    "runtime/artifact",
    "runtime/merge",
    "runtime/base",
    "runtime/init",
    "runtime/execution",
    "runtime/peft_format",
    "runtime/peft_config",
    "runtime/other_formats",
    "runtime/regions",
    "runtime/adapted",
    "runtime/routing",
    "runtime/model",
    "compiler/load_model",
    "compiler/pipeline",
    "compiler/trace",
    "compiler/diagram",
    "compiler/export_model",
    "compiler/report",
    "compiler",
    "compiler/jobs",
    "compiler/jobs/doctor",
    "compiler/__init__",
    "compiler/commands",
    "drop_in",
    "drop_in/__init__",
)

# Libraries that a room must do without; `runtime/artifact` is shown without them in tests/torch_only.py too.
WITHOUT = {
    "grammar": {"torch", "transformers", "numpy"},
    "passes": {"huggingface_hub", "safetensors", "rich", "typer"},
    "passes/ir": {"transformers"},
    "passes/foreign": {"transformers", "peft", "torch"},
    "passes/expression": {"transformers"},
    "passes/optimize": {"transformers"},
    "runtime": {"rich", "typer", "networkx"},
    "runtime/artifact": {"transformers", "huggingface_hub", "safetensors"},
    "compiler/diagram": {"transformers"},
    "compiler/jobs": {"rich", "typer"},
    "compiler/commands": {"torch", "transformers"},
}


def against(order, arrows):
    return [arrow for arrow in arrows if order.index(arrow[0]) < order.index(arrow[1])]


def test_every_room_has_a_place():
    assert sorted(HOUSE.arrows) == sorted(ORDER)


def test_arrows_point_downwards():
    wrong = against(ORDER, HOUSE.arrows.edges)
    assert wrong == [], "\n".join(f"{arrow}: {HOUSE.imports[arrow]}" for arrow in wrong)


def test_rooms_have_no_cycle():
    assert nx.is_directed_acyclic_graph(HOUSE.arrows)
    assert HOUSE.arrows.number_of_edges() > 100


def test_no_public_name_is_that_of_a_room():
    """Importing `peftc.compiler.export`, were it a room, would put the module where the function `export` stood."""
    rooms = {room.partition("/")[2] for room in ORDER if room.startswith("compiler/")}
    assert not rooms & set(compiler.__all__)


def test_every_room_says_what_it_is_for_and_what_is_never_in_it():
    for room in ORDER:
        purpose, never = HOUSE.text(room)
        assert purpose, room
        assert never, f"{room}/__init__.py has no line '{MAKER['NEVER']}...'"


@pytest.mark.parametrize("room", WITHOUT)
def test_rooms_do_without_libraries(room):
    for file in HOUSE.files.values():
        if file.is_relative_to(ROOT / room):
            assert not imported(file) & WITHOUT[room], file


def imported(file):
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[0] for name in names}
    return found


# --- the map ---


def the_map():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.split(MAKER["BEGIN"])[1].split(MAKER["END"])[0]


def test_the_map_is_new():
    assert the_map().strip() == MAKER["page"](HOUSE).strip(), "run python docs/make_map.py"


def shown(room):
    return room.replace("__init__", "__init__.py") if room.endswith("__init__") else f"{room}/"


def read_back(text):
    """The arrows of a map as a reader finds them: in pictures, and in the last column of tables."""
    names = dict(re.findall(r'^ +(\w+)\["([^"]+)"\]$', text, re.MULTILINE))
    arrows = {(names[start], names[end]) for start, end in re.findall(r"^ +(\w+) --> (\w+)$", text, re.MULTILINE)}
    for room, below in re.findall(r"^\| `([^`]+)` \|.*\|([^|]*)\|$", text, re.MULTILINE):
        arrows |= {(room, target) for target in re.findall(r"`([^`]+)`", below)}
    return arrows


def test_what_is_drawn_means_what_is_imported():
    drawn = nx.DiGraph(read_back(the_map()))
    actual = nx.relabel_nodes(HOUSE.arrows, {room: shown(room) for room in HOUSE.arrows})
    assert set(nx.transitive_closure(drawn).edges) == set(nx.transitive_closure(actual).edges)


@pytest.fixture
def small_house(tmp_path):
    """Four folders, a room in each of two, and one import from the upper to the lower."""
    for folder in ("grammar", "passes", "runtime", "compiler", "drop_in"):
        room = tmp_path / folder / "room"
        room.mkdir(parents=True)
        (tmp_path / folder / "__init__.py").write_text(f'"""{folder}.\n\nNever here: x.\n"""\n', encoding="utf-8")
        (room / "__init__.py").write_text('"""A room.\n\nNever here: y.\n"""\n', encoding="utf-8")
        (room / "thing.py").write_text('"""A thing."""\n', encoding="utf-8")
    (tmp_path / "passes/room/thing.py").write_text("from peftc.grammar.room import thing\n", encoding="utf-8")
    return tmp_path


def test_a_new_arrow_is_noticed(small_house):
    house = MAKER["House"]
    before = house(small_house)
    assert set(before.arrows.edges) == {("passes/room", "grammar/room")}
    order = ("grammar/room", "passes/room", "runtime/room", "compiler/room")
    assert against(order, before.arrows.edges) == []
    (small_house / "grammar/room/thing.py").write_text("import peftc.runtime.room.thing\n", encoding="utf-8")
    after = house(small_house)
    assert against(order, after.arrows.edges) == [("grammar/room", "runtime/room")]
    assert after.imports["grammar/room", "runtime/room"] == ["grammar/room/thing.py:1"]
    assert MAKER["page"](after) != MAKER["page"](before)
    assert read_back(MAKER["page"](after)) == {("passes/room/", "grammar/room/"), ("grammar/room/", "runtime/room/")}


def test_a_facade_is_a_room(small_house):
    (small_house / "compiler/__init__.py").write_text(
        '"""Facade."""\nfrom peftc.compiler.room import thing\n', encoding="utf-8"
    )
    arrows = MAKER["House"](small_house).arrows
    assert arrows.has_edge("compiler/__init__", "compiler/room")


# --- paths in pages ---

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PATH = re.compile(r"(?<![\w./-])(?:grammar|passes|runtime|compiler|tests|docs|examples|\.ci)/[\w./*-]*[\w*](?![\w<*])")
NAME = re.compile(r"(?<![\w./-])(?:peftc\.)?((?:grammar|passes|runtime|compiler)(?:\.[A-Za-z]\w*)+)(?![\w<*])")


def missing(text, root=ROOT):
    """The paths of ours in a text that lead nowhere; a star is a star, and what a command writes is no path of ours."""
    paths = {found.rstrip(".") for found in PATH.findall(text)}
    return sorted(path for path in paths if not any(root.glob(path.rstrip("/"))))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_of_ours_is_there(page):
    assert missing(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_name_of_ours_is_there(page):
    assert unknown(page.read_text(encoding="utf-8")) == []


def unknown(text):
    """The dotted names of ours in a text that are nowhere."""
    return sorted({name for name in NAME.findall(text) if not is_a_name(name)})


def is_a_name(name):
    """Whether the longest part that is a module has what the rest says."""
    parts = ["peftc", *name.split(".")]
    while ".".join(parts) not in HOUSE.files:
        parts.pop()
    thing = importlib.import_module(".".join(parts))
    for part in name.split(".")[len(parts) - 1 :]:
        thing = getattr(thing, part, None)
    return thing is not None


def test_a_stale_name_is_noticed():
    assert unknown("`grammar.source.Source`, peftc.compiler.apply(model), compiler.jobs") == []
    assert unknown("`grammar.format.format_source`, compiler.nothing") == [
        "compiler.nothing",
        "grammar.format.format_source",
    ]


def test_a_stale_path_is_noticed():
    text = "See `passes/apply.py`, passes/expression/apply.py. and (docs/export.md), out/passes/x, `tests/test_<f>.py`."
    assert missing(text) == ["passes/apply.py"]

"""Draw the map of the house in CONTRIBUTING.md: the rooms, what is in each, and who may build on whom.

A room is a package, named like its folder; the files of a top folder itself are a room too. Where the `__init__.py` of
a top folder gives the names of others, it is a room of its own, the facade. Arrows are read from the imports; what a
room is for, and what is never to be found in it, from its docstring.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
FOLDERS = ("drop_in", "compiler", "runtime", "passes", "grammar")  # each may import itself and those after it
NAMES = {"drop_in": "peft"}  # what a folder is imported as, where it is not called so
BEGIN = "<!-- The map: made by docs/make_map.py -->"
END = "<!-- The map ends. -->"
NEVER = "Never here: "
FACADE = "__init__"


@dataclass(frozen=True)
class House:
    """The rooms below `root` and the imports between them."""

    root: Path = ROOT

    @cached_property
    def files(self) -> dict[str, Path]:
        """Every file by the module it is: `peftc.grammar.source`."""
        found = (file for folder in FOLDERS for file in sorted((self.root / folder).rglob("*.py")))
        return {self.module(file): file for file in found}

    @cached_property
    def imports(self) -> dict[tuple[str, str], list[str]]:
        """The imports from one room to another, each as `file:line`."""
        places: dict[tuple[str, str], list[str]] = {}
        for file in self.files.values():
            for module, line in self._imported(file):
                arrow = (self.room(file), self.room(self.files[module]))
                if arrow[0] != arrow[1]:
                    places.setdefault(arrow, []).append(f"{file.relative_to(self.root).as_posix()}:{line}")
        return places

    @cached_property
    def arrows(self) -> "nx.DiGraph[str]":
        """An edge from each room to every room it imports from."""
        graph = nx.DiGraph()
        graph.add_nodes_from(sorted({self.room(file) for file in self.files.values() if self._has_code(file)}))
        graph.add_edges_from(self.imports)
        return graph

    @cached_property
    def drawn(self) -> "nx.DiGraph[str]":
        """The fewest arrows with the same meaning: what is behind another room is reached through it."""
        return nx.transitive_reduction(self.arrows)

    def module(self, file: Path) -> str:
        """`passes/ir/emit.py` is `peftc.passes.ir.emit`; a package is named like its folder."""
        top, *rest = file.relative_to(self.root).with_suffix("").parts
        parts = ("peftc", NAMES.get(top, top), *rest)
        return ".".join(parts[:-1] if parts[-1] == FACADE else parts)

    def room(self, file: Path) -> str:
        """The folder, as `passes/ir`; `compiler/__init__` is the facade of a top folder."""
        folder = file.parent.relative_to(self.root).as_posix()
        return f"{folder}/{FACADE}" if folder in FOLDERS and file.stem == FACADE else folder

    def text(self, room: str) -> tuple[str, str]:
        """What the room is for, and what is never to be found in it."""
        folder = self.root / room.removesuffix(f"/{FACADE}")
        purpose, _, never = docstring(folder / f"{FACADE}.py").partition(NEVER)
        if room.endswith(FACADE):
            return "The names of this folder that others use, found when they are first used.", "anything else."
        if room in FOLDERS:
            own = [file for file in sorted(folder.glob("*.py")) if file.stem != FACADE]
            purpose = " ".join(f"`{file.name}`: {docstring(file).splitlines()[0]}" for file in own)
        return " ".join(purpose.split()), " ".join(never.split())

    def _imported(self, file: Path) -> Iterator[tuple[str, int]]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in self.files else str(node.module) for name in inner]
            else:
                continue
            yield from ((name, node.lineno) for name in names if name in self.files)

    def _has_code(self, file: Path) -> bool:
        """Whether there is more in a file than a docstring; what is empty is no facade."""
        return file.stem != FACADE or len(ast.parse(file.read_text(encoding="utf-8")).body) > 1


def page(house: House) -> str:
    """What stands between the two markers."""
    order = list(reversed(list(nx.lexicographical_topological_sort(house.arrows.reverse()))))
    return "\n\n".join(part for folder in FOLDERS for part in described(house, folder, order)) + "\n"


def described(house: House, folder: str, order: list[str]) -> Iterator[str]:
    """One folder: its purpose, its arrows as a picture, its rooms as a table, the highest first."""
    rooms = [room for room in order if room.split("/")[0] == folder]
    purpose, _, _ = docstring(house.root / folder / f"{FACADE}.py").partition(NEVER)
    yield f"### `{folder}/`"
    yield purpose.split("\n\n")[0].replace("\n", " ").strip()
    lines = [f'    {_id(room)}["{_shown(room)}"]' for room in rooms]
    lines += [
        f"    {_id(room)} --> {_id(below)}" for room in rooms for below in rooms if house.drawn.has_edge(room, below)
    ]
    yield "\n".join(["```mermaid", "flowchart TD", *lines, "```"])
    rows = ["| room | what it is for | never here | stands on, in the folders below |", "|---|---|---|---|"]
    for room in rooms:
        below = sorted(target for target in house.drawn.successors(room) if target.split("/")[0] != folder)
        what, never = house.text(room)
        rows.append(f"| `{_shown(room)}` | {what} | {never} | {', '.join(f'`{_shown(each)}`' for each in below)} |")
    yield "\n".join(rows)


def docstring(file: Path) -> str:
    """The docstring of a file."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert text, f"{file} has no docstring"
    return text


def put_between_markers(text: str, made: str) -> str:
    """The page with the map replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n{END}{rest.split(END)[1]}"


def _id(room: str) -> str:
    return room.replace("/", "_").replace("__init__", "facade")


def _shown(room: str) -> str:
    return f"{room.split('/')[0]}/__init__.py" if room.endswith(FACADE) else f"{room}/"


if __name__ == "__main__":
    PAGE.write_text(put_between_markers(PAGE.read_text(encoding="utf-8"), page(House())), encoding="utf-8")

"""The page of PEFT's own tests, made from their results: `python -m tests.peft_suite.page FOLDER [NOTE]`."""

import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.peft_suite.plugin import rows

PAGE = Path(__file__).parents[2] / "docs" / "peft-suite.md"
REASONS = Path(__file__).parent / "reasons.toml"
KINDS = {
    "internals": "reads PEFT's internals",
    "words": "asks for PEFT's words",
    "method": "a method that is not there",
    "differs": "differs on purpose",
    "fails": "fails",
}
HEAD = """# PEFT's own tests

The tests of PEFT's release that is installed, with `peftc.peft` in PEFT's place, and tiny models in the place of those
of the Hub. Of what passes on PEFT itself, with the same releases on the same machine:

"""
HOW = """
- *reads PEFT's internals*: attributes of its layers, its names of parameters, modules of its classes. What such a test
  is about may be right here; it cannot say so.
- *asks for PEFT's words*: there is an error of the same kind, or a warning, and its text is another.
- *a method that is not there*: refused by its name.
- *differs on purpose*, and *fails*: told below.

A test that passes on neither says nothing. Made by

```console
$ python -m tests.peft_suite build/peft-suite
$ python -m tests.peft_suite.page build/peft-suite
```

which install an environment of their own and download PEFT's source distribution; no line of it is part of peftc.
"""


@cache
def reasons() -> tuple[Mapping[str, str], ...]:
    """Every reason, in the order in which they are tried."""
    return tuple(tomllib.loads(REASONS.read_text())["reason"])


def reason(row: Mapping[str, Any], known: Sequence[Mapping[str, str]] | None = None) -> tuple[str, str]:
    """The kind of a test that failed, and why it did: the first of the reasons that fits."""
    for each in reasons() if known is None else known:
        asked = {name: pattern for name, pattern in each.items() if name not in ("kind", "why")}
        if all(re.search(pattern, str(row.get(name, ""))) for name, pattern in asked.items()):
            return each["kind"], each["why"]
    return "fails", f"{row.get('error')}: {' '.join(str(row.get('message', '')).split())[:160]}"


def page(theirs: Iterable[Mapping[str, Any]], ours: Iterable[Mapping[str, Any]], note: str = "") -> str:
    """The whole page."""
    passing = {row["test"] for row in theirs if row["outcome"] == "passed"}
    own = {row["test"]: row for row in ours if row["test"] in passing}
    told = {test: ("passes", "") if row["outcome"] == "passed" else reason(row) for test, row in own.items()}
    return "".join([HEAD, *_table(told), f"\n{note}\n" if note else "", HOW, *_listed(told)])


def _table(told: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    files: dict[str, Counter[str]] = {}
    for test, (kind, _) in told.items():
        files.setdefault(_file(test), Counter())[kind] += 1
    yield f"| file | passes | {' | '.join(KINDS.values())} | of what reads no internals |\n"
    yield f"|---|{'--:|' * (len(KINDS) + 2)}\n"
    for file, count in sorted(files.items()):
        share = count["passes"] / max(1, count.total() - count["internals"])
        numbers = " | ".join(str(count[kind]) for kind in ("passes", *KINDS))
        yield f"| `{file}` | {numbers} | {share:.1%} |\n"


def _listed(told: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    why: dict[tuple[str, str], list[str]] = {}
    for test, found in told.items():
        if found[0] != "passes":
            why.setdefault(found, []).append(test)
    for kind, title in KINDS.items():
        yield f"\n## {title[0].upper()}{title[1:]}\n\n"
        for (own, text), tests in sorted(why.items(), key=lambda each: -len(each[1])):
            if own == kind:
                names = Counter(f"`{_name(test)}`" for test in tests)
                yield f"- {text}: {', '.join(f'{name} ({count})' for name, count in names.most_common())}\n"
        if not any(own == kind for own, _ in why):
            yield "Nothing.\n"


def _file(test: str) -> str:
    return test.partition("::")[0].rpartition("/")[2]


def _name(test: str) -> str:
    return test.partition("[")[0].rpartition("::")[2]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    PAGE.write_text(page(rows(folder / "peft.jsonl"), rows(folder / "peftc.jsonl"), " ".join(sys.argv[2:])))
    print(PAGE)

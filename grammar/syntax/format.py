"""The canonical text of a file. parse(format_file(t)) == t, and format_source loses no comment."""

from bisect import bisect_right

from peftc.grammar.source import Source, Span
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.layout import INDENT, Unit, lay_out
from peftc.grammar.syntax.parse import Parsed, parse_with_comments


def format_file(file: tree.File) -> str:
    """The text of a tree, for trees that a program made; comments other than a method's doc are not in a tree."""
    groups = [lay_out(each) for each in file.statements]
    for statement, units in zip(file.statements, groups, strict=True):
        if isinstance(statement, tree.Method) and statement.doc:
            units[0].leading = [(f"# {line}".rstrip(), False) for line in statement.doc.split("\n")]
    return _write(groups, [])


def format_source(source: Source) -> str:
    """The canonical text of a source, its comments kept. Raises SpecError when it does not parse.

    A comment on its own line stays before what it precedes, one at a line's end stays there; a comment inside
    something that becomes one line moves before it.
    """
    parsed = parse_with_comments(source)
    groups = [lay_out(each) for each in parsed.file.statements]
    units = [unit for group in groups for unit in group]
    _place(units, parsed)
    tail: list[tuple[str, bool]] = []
    _attach(source, units, parsed, tail)
    for unit in units:
        unit.blank = _blank_before(source.text, unit.start)
    return _write(groups, tail)


def _place(units: list[Unit], parsed: Parsed) -> None:
    """Give every unit its range: a header ends with its brace, a closing brace is the statement's last character."""
    braces = [start for start, _, kind in parsed.tokens if kind == "LBRACE"]
    for unit in units:
        span = unit.node.span if unit.node is not None else None
        assert span is not None, "the parser gives every node a span"
        unit.start, unit.end = span.start, span.end
        if unit.kind == "open":
            unit.end = braces[bisect_right(braces, span.start)] + 1
        elif unit.kind == "close":
            unit.start = span.end - 1


def _attach(source: Source, units: list[Unit], parsed: Parsed, tail: list[tuple[str, bool]]) -> None:
    text = source.text
    starts = [unit.start for unit in units]
    for comment in parsed.comments:
        written = comment.text.rstrip()
        before = bisect_right(starts, comment.start) - 1
        unit = units[before] if before >= 0 else None
        follows_code = bool(_line_before(text, comment).strip(" \t\r\f\v\ufeff"))
        entry = (written, not follows_code and _blank_before(text, comment.start))
        if unit is not None and comment.start < unit.end and unit.kind != "open":
            unit.leading.append((written, False))
        elif unit is not None and comment.start >= unit.end and follows_code and not unit.trailing:
            unit.trailing = written
        elif before + 1 < len(units):
            units[before + 1].leading.append(entry)
        else:
            tail.append(entry)


def _line_before(text: str, comment: Span) -> str:
    return text[text.rfind("\n", 0, comment.start) + 1 : comment.start]


def _blank_before(text: str, position: int) -> bool:
    start = position
    while start > 0 and text[start - 1].isspace():
        start -= 1
    return text.count("\n", start, position) > 1


def _write(groups: list[list[Unit]], tail: list[tuple[str, bool]]) -> str:
    lines: list[str] = []
    previous: Unit | None = None
    for group in groups:
        for unit in group:
            outermost = unit is group[0]
            indent = "" if outermost else INDENT
            blank = _separated(previous, unit) if outermost else previous is not None and previous.kind != "open"
            wanted = outermost or (unit.leading[0][1] if unit.leading else unit.blank and unit.kind != "close")
            if lines and blank and wanted:
                lines.append("")
            for position, (comment, apart) in enumerate(unit.leading):
                if apart and position:
                    lines.append("")
                lines.append(indent + comment)
            if unit.leading and unit.blank and unit.kind != "close":
                lines.append("")
            lines += unit.lines
            if unit.trailing:
                lines[-1] += f"  {unit.trailing}"
            previous = unit
    for position, (comment, apart) in enumerate(tail):
        if lines and (apart or not position):
            lines.append("")
        lines.append(comment)
    return "".join(f"{line}\n" for line in lines)


def _separated(previous: Unit | None, unit: Unit) -> bool:
    """Statements stand apart, but for `use` after `use`."""
    uses = previous is not None and isinstance(previous.node, tree.Use) and isinstance(unit.node, tree.Use)
    return not uses or unit.blank or bool(unit.leading)

"""From text to tree: lark's LALR parser, driven a token at a time so that limits and messages are ours."""

import functools
import importlib.resources
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedToken
from lark.parsers.lalr_interactive_parser import InteractiveParser

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.source import Source, Span
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.build import Builder
from peftc.grammar.syntax.load import MAX_BYTES
from peftc.grammar.syntax.syntax_errors import unexpected_character, unexpected_token

MAX_TOKENS = 100_000
MAX_NESTING = 64
MAX_WORD = 4096

_CLOSER = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
_COMMENT_OR_STRING = re.compile(r'"(?:[^"\\\n]|\\[^\n])*"|(#[^\r\n]*)')


@dataclass(frozen=True)
class Parsed:
    """A tree with what the tree leaves out: the tokens' ranges and the comments, in order."""

    file: tree.File
    tokens: tuple[tuple[int, int, str], ...]
    comments: tuple[Span, ...]


def parse(source: Source) -> tree.File:
    """The tree of a whole file. Raises SpecError (E1xx) at the first thing that is not the language."""
    return parse_with_comments(source).file


def parse_with_comments(source: Source) -> Parsed:
    """As `parse`, keeping comments and token positions for the formatter."""
    _check_text(source)
    tokens: list[Token] = []
    lark_tree = _run(source, tokens)
    comments = tuple(
        Span(source, match.start(1), match.end(1))
        for match in _COMMENT_OR_STRING.finditer(source.text)
        if match.group(1) is not None
    )
    file = Builder(source, _docs(source, comments)).file(lark_tree)
    return Parsed(file, tuple((_start(each), _end(each), each.type) for each in tokens), comments)


@functools.cache
def _lark() -> Lark:
    grammar = importlib.resources.files("peftc.grammar.syntax").joinpath("adapter.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", lexer="contextual", propagate_positions=True, maybe_placeholders=True)


def _check_text(source: Source) -> None:
    text = source.text
    if len(text) > MAX_BYTES:
        fail(SpecError, "E103", "the text is larger than 1 MiB, which no spec needs to be", where=source.name)
    surrogate = re.search(r"[\ud800-\udfff]", text)
    if surrogate:
        span = Span(source, surrogate.start(), surrogate.end())
        where = f"{source.name}:{span.line}:{span.column}"
        fail(SpecError, "E102", "a lone surrogate is not text", where=where)


def _run(source: Source, tokens: list[Token]) -> Tree[Token]:
    parser: InteractiveParser = _lark().parse_interactive(source.text)
    open_brackets: list[Token] = []
    try:
        for token in _lex(parser):
            tokens.append(token)
            if len(tokens) > MAX_TOKENS:
                span = Span(source, _start(token), _end(token))
                fail(SpecError, "E103", f"the file has more than {MAX_TOKENS:,} words and signs", span)
            if len(token) > MAX_WORD:
                span = Span(source, _start(token), _start(token) + 1)
                fail(SpecError, "E103", f"this word has more than {MAX_WORD:,} characters", span)
            parser.feed_token(token)
            if token.type in _CLOSER:
                open_brackets.append(token)
                if len(open_brackets) > MAX_NESTING:
                    span = Span(source, _start(token), _end(token))
                    fail(SpecError, "E104", f"brackets are nested more than {MAX_NESTING} deep", span)
            elif token.type in _CLOSER.values() and open_brackets:
                open_brackets.pop()
        last = _end(tokens[-1]) if tokens else 0
        end = Token("$END", "", start_pos=last, end_pos=last)
        return parser.feed_token(end)
    except UnexpectedToken as error:
        previous = tokens[:-1] if tokens and tokens[-1] is error.token else tokens
        unexpected_token(source, error.token, _accepts(parser), previous, open_brackets)
    except UnexpectedCharacters as error:
        unexpected_character(source, error.pos_in_stream or 0, _accepts(parser))


# lark leaves these two untyped.
def _lex(parser: InteractiveParser) -> Iterator[Token]:
    return parser.lexer_thread.lex(parser.parser_state)  # type: ignore[no-untyped-call]


def _accepts(parser: InteractiveParser) -> set[str]:
    return set(parser.accepts())  # type: ignore[no-untyped-call]


def _start(token: Token) -> int:
    return token.start_pos or 0


def _end(token: Token) -> int:
    return token.end_pos or 0


def _docs(source: Source, comments: tuple[Span, ...]) -> dict[int, str]:
    """The comment blocks that stand on lines of their own, by the 1-based number of the line after."""
    docs: dict[int, str] = {}
    block: list[str] = []
    text = source.text
    line, seen, last = 1, 0, -1
    for comment in comments:
        line += text.count("\n", seen, comment.start)
        seen = comment.start
        if text[text.rfind("\n", 0, comment.start) + 1 : comment.start].strip(" \t\r\f\v\ufeff"):
            continue
        if line != last + 1:
            docs[last + 1] = "\n".join(block)
            block = []
        block.append(comment.text[1:].removeprefix(" ").rstrip())
        last = line
    docs[last + 1] = "\n".join(block)
    return docs

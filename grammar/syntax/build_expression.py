"""Expressions and words: from lark's tree to ours, with spans, escapes, numbers and the limit on nesting."""

import re
from typing import Any, Literal, cast

from lark import Token, Tree

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.source import Source, Span
from peftc.grammar.syntax import tree

MAX_DEPTH = 64
MAX_DIGITS = 300

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "t": "\t", "r": "\r"}

LarkTree = Tree[Token]


class ExpressionBuilder:
    """Builds the expressions of one source."""

    def __init__(self, source: Source):
        self._source = source

    def _expr(self, node: Any, depth: int = 0) -> tree.Expr:
        span = self._span(node)
        if depth > MAX_DEPTH:
            fail(
                SpecError, "E104", f"an expression is nested more than {MAX_DEPTH} deep", span, help="name parts of it"
            )
        children, deeper = node.children, depth + 1
        match node.data:
            case "number":
                return self._number(node)
            case "text":
                return tree.Text(self._string(children[0]), span=span)
            case "true" | "false":
                return tree.Flag(node.data == "true", span=span)
            case "none":
                return tree.Null(span=span)
            case "name":
                return tree.Name(str(children[0]), span=span)
            case "sequence":
                items = tuple(self._expr(each, deeper) for each in children if each is not None)
                return tree.Sequence(items, span=span)
            case "call":
                return tree.Call(str(children[0]), self._arguments(children[1], deeper), span=span)
            case "unary":
                sign = cast(Literal["-", "not"], str(children[0]))
                return tree.Unary(sign, self._expr(children[1], deeper), span=span)
            case "binary":
                left, right = self._expr(children[0], deeper), self._expr(children[2], deeper)
                return tree.Binary(cast(Any, str(children[1])), left, right, span=span)
            case "transpose":
                return tree.Transpose(self._expr(children[0], deeper), span=span)
            case _:
                assert node.data == "conditional", node.data
                then, test, otherwise = (self._expr(each, deeper) for each in children)
                return tree.Conditional(then, test, otherwise, span=span)

    def _arguments(self, node: Any, depth: int = 0) -> tuple[tree.Argument, ...]:
        if node is None:
            return ()
        return tuple(
            tree.Argument(
                None if each.children[0] is None else str(each.children[0]),
                self._expr(each.children[1], depth + 1),
                span=self._span(each),
            )
            for each in trees_of(node)
        )

    def _number(self, node: LarkTree) -> tree.Number:
        token = token_of(node, 0)
        span = self._of(token)
        if len(token) > MAX_DIGITS:
            fail(SpecError, "E114", "the number has too many digits", span)
        value = int(token) if token.type == "INT" else float(token)
        if abs(value) > 1e300:
            fail(SpecError, "E114", "the number is too large", span)
        return tree.Number(value, span=span)

    # --- words ---

    def _label(self, node: LarkTree) -> str:
        token = token_of(node, 0)
        return self._string(token) if token.type == "STRING" else str(token)

    def _string(self, token: Token) -> str:
        def character(match: re.Match[str]) -> str:
            escape = match.group(1)
            if len(escape) == 5 and not 0xD800 <= int(escape[1:], 16) <= 0xDFFF:
                return chr(int(escape[1:], 16))
            if escape in _ESCAPES:
                return _ESCAPES[escape]
            start = (token.start_pos or 0) + 1 + match.start()
            fail(
                SpecError,
                "E113",
                f"'\\{escape}' means nothing in a string",
                Span(self._source, start, start + 1 + len(escape)),
                help='the escapes are \\" \\\\ \\n \\t \\r and \\uXXXX',
            )

        return _ESCAPE.sub(character, token[1:-1])

    def _of(self, token: Token) -> Span:
        return Span(self._source, token.start_pos or 0, token.end_pos or 0)

    def _span(self, node: Any) -> Span:
        return Span(self._source, getattr(node.meta, "start_pos", 0), getattr(node.meta, "end_pos", 0))


def trees_of(node: Any) -> list[LarkTree]:
    """The children that are trees."""
    return [each for each in node.children if isinstance(each, Tree)]


def tokens_of(node: Any) -> list[Token]:
    """The children that are tokens."""
    return [each for each in node.children if isinstance(each, Token)]


def token_of(node: LarkTree, index: int) -> Token:
    """A child that is a token."""
    return cast(Token, node.children[index])

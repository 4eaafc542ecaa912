"""What a syntax error says: what was found, what could stand there, and the slip behind it if it is a common one."""

import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from lark import Token

from peftc.grammar.diagnostics import SpecError, fail, nearest
from peftc.grammar.peft_words import instead_of
from peftc.grammar.source import Source, Span

_SIGNS = {
    "COMMA": "','",
    "LBRACE": "'{'",
    "RBRACE": "'}'",
    "EQUAL": "'='",
    "LPAR": "'('",
    "RPAR": "')'",
    "LSQB": "'['",
    "RSQB": "']'",
    "DOT": "'.'",
    "COLON": "':'",
    "PRIME": "W'",
    "INT": "a whole number",
    "FLOAT": "a number",
    "NAME": "a name",
    "STRING": "a quoted string",
    "RANGE": "'..'",
    "STAR": "'*'",
    "STARS": "'**'",
    "MINUS": "'-'",
    "PLUS": "'+'",
    "$END": "the end of the file",
}
_EXPRESSION = frozenset({"NAME", "FLOAT", "INT", "STRING", "TRUE", "FALSE", "NONE", "LPAR", "LSQB", "MINUS"})
_OPERATORS = frozenset({"PLUS", "MINUS", "STAR", "SLASH", "SLASHES", "PERCENT", "AT", "STARS", "TRANSPOSE"})
_OPERATORS |= {"EQ", "NE", "LT", "LE", "GT", "GE", "AND", "OR", "_IF"}
_STATEMENTS = frozenset({"_USE", "_BASE", "_ADAPTER", "_ACTIVATE", "_ROUTE", "_METHOD"})
_CLAUSES = frozenset({"_ON", "_REFINE", "_SKIP", "_TRAIN", "_BIAS", "_TOKENS"})
_ITEMS = frozenset({"_DEFAULT", "SHARED", "_PARAM", "_CONST", "_LET", "_REQUIRE", "_ALLOCATE", "PRIME", "_PEFT"})
_ITEMS |= {"_COPIES", "_ROWS", "_UNREAD"}
_SELECTOR = frozenset({"_ALL", "STRING", "STARS", "LBRACE"})
_CLOSERS = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
_WORDS = {"SHARED": "shared", "NOT": "not", "AND": "and", "OR": "or", "TRUE": "true", "FALSE": "false", "NONE": "none"}


def unexpected_token(
    source: Source, token: Token, accepted: Iterable[str], before: Sequence[Token], brackets: Sequence[Token]
) -> NoReturn:
    """Raise E110 for a token that cannot stand where it does."""
    can = set(accepted)
    if token.type == "$END":
        end = len(source.text.rstrip()) or 0
        span = Span(source, max(0, end - 1), end)
    else:
        span = Span(source, token.start_pos or 0, token.end_pos or 0)
    message = f"expected {_either(expected(can))}, found {_found(token)}"
    fail(SpecError, "E110", message, span, help=_slip(source, token, can, before, brackets))


def unexpected_character(source: Source, at: int, accepted: Iterable[str]) -> NoReturn:
    """Raise E111 or E112 for text that is no token at all."""
    character = source.text[at]
    span = Span(source, at, at + 1)
    if character == '"':
        end = source.text.find("\n", at)
        span = Span(source, at, len(source.text) if end < 0 else end)
        fail(SpecError, "E112", "the string has no closing quote on this line", span)
    helps = {
        "'": 'strings stand in double quotes: "text"',
        ";": "nothing separates statements and clauses; leave it out",
        "&": "write 'and'",
        "|": "write 'or'",
        "!": "write 'not'",
        "^": "a power is written **",
    }
    name = f"'{character}'" if character.isprintable() else f"the character U+{ord(character):04X}"
    message = f"{name} means nothing here; expected {_either(expected(set(accepted)))}"
    fail(SpecError, "E111", message, span, help=helps.get(character, ""))


def expected(accepted: set[str]) -> list[str]:
    """Human names for what the parser would take, likely things first, groups as one."""
    left = set(accepted)
    names: list[str] = []
    if left >= {"NAME"} | _SELECTOR:
        names.append("a selector")
        left -= _SELECTOR | {"NAME", "INT", "STAR"}
    elif left >= _EXPRESSION:
        names.append("an expression")
        left -= _EXPRESSION | {"NOT"}
    operators = left >= {"PLUS", "MINUS", "STAR"}
    if operators:
        left -= _OPERATORS
    if left >= _CLAUSES:
        names.append("a clause (on, refine, skip, train, bias, tokens)")
        left -= _CLAUSES
    if left >= _ITEMS:
        names.append("an item (default, param, let, W', peft)")
        left -= _ITEMS
    if left >= _STATEMENTS:
        names.append("a statement (adapter, method, use, base, activate, route)")
        left -= _STATEMENTS
    order = ("EQUAL", "COLON", "RBRACE", "RPAR", "RSQB", "COMMA", "DOT")
    names += [_human(each) for each in sorted(left, key=lambda each: (each == "$END", each not in order, each))]
    if operators:
        names.append("an operator")
    return names


def keyword(terminal: str) -> str:
    """The word a keyword terminal stands for; empty for other terminals."""
    return _WORDS.get(terminal, terminal[1:].lower() if terminal.startswith("_") else "")


def _human(terminal: str) -> str:
    word = keyword(terminal)
    return f"'{word}'" if word else _SIGNS.get(terminal, "an operator")


def _found(token: Token) -> str:
    if token.type == "$END":
        return "the end of the file"
    if token.type == "STRING":
        return f"the string {token}" if len(token) <= 40 else f'the string {token[:36]}..."'
    if token.type == "PRIME":
        return str(token)
    return f"'{token}'" if len(token) <= 40 else f"'{token[:37]}...'"


def _either(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    if not unique:
        return "nothing more"
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def _slip(source: Source, token: Token, can: set[str], before: Sequence[Token], brackets: Sequence[Token]) -> str:
    if brackets and _CLOSERS[brackets[-1].type] in can and (token.type == "$END" or token.type in _STATEMENTS):
        opened = Span(source, brackets[-1].start_pos or 0, brackets[-1].end_pos or 0)
        return f"the '{opened.text}' of line {opened.line}, column {opened.column} is not closed"
    if token.type == "NAME":
        if can >= _CLAUSES and (said := instead_of(str(token))):
            return said
        if can >= _CLAUSES and re.match(r"\s*=", source.text[token.end_pos or 0 :]):
            return f"values stand in parentheses behind the method's name: lora({token} = ...)"
        close = nearest(token.lower(), {keyword(each) for each in can} - {""}, limit=1)
        if close:
            return f"did you mean '{close[0]}'?"
        if before and before[-1].type == "NAME":
            # A mistyped keyword is itself a good name; the word after it is where the parser stumbles.
            known = {keyword(each) for each in _STATEMENTS | _CLAUSES | _ITEMS} - {""}
            close = nearest(before[-1].lower(), known, limit=1)
            if close:
                return f"did you mean '{close[0]}' instead of '{before[-1]}'?"
    if token.type == "COLON" and "EQUAL" in can:
        return "write '=' between a name and its value"
    if token.type == "EQUAL" and before and before[-1].type == "_BIAS":
        return "a clause has no '=': bias all, bias adapter or bias none"
    if token.type == "EQUAL" and "EQ" in can:
        return "equality is written =="
    if token.type == "EQUAL" and "COLON" in can:
        return "a hyperparameter has a type: rank: int = 8"
    if token.type == "EQ" and "EQUAL" in can:
        return "write a single '='"
    if token.type == "SLASHES" and _STATEMENTS & can:
        return "a comment starts with #"
    if token.type == "LBRACE" and _STATEMENTS & can and _statement_of(before) == "_COMBINE":
        return "a combination has no clauses: it goes where its adapters go"
    if token.type == "LBRACE" and can & {"EQUAL"}:
        return "an adapter needs a method: adapter name = lora(rank = 8) { ... }"
    if token.type in _CLOSERS.values() and not brackets:
        return f"nothing is open that this '{token}' could close"
    return ""


def _statement_of(before: Sequence[Token]) -> str:
    """The word that says what the last statement is."""
    return next((each.type for each in reversed(before) if each.type in _STATEMENTS | {"_COMBINE"}), "")

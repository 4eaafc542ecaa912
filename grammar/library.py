"""The methods that come with the compiler: `.adapter` files, read as any other."""

import functools
import importlib.resources
from collections.abc import Mapping
from types import MappingProxyType

from peftc.grammar import tree
from peftc.grammar.check import check_method
from peftc.grammar.parse import parse
from peftc.grammar.rule import MethodRule
from peftc.grammar.source import Source


@functools.cache
def builtin_methods() -> Mapping[str, MethodRule]:
    """All built-in methods by name, in alphabetical order."""
    folder = importlib.resources.files("peftc.grammar").joinpath("methods")
    methods: dict[str, tree.Method] = {}
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if not file.name.endswith(".adapter"):
            continue
        source = Source(f"methods/{file.name}", file.read_text(encoding="utf-8"))
        for statement in parse(source).statements:
            assert isinstance(statement, tree.Method), f"{file.name} holds more than methods"
            assert statement.name not in methods, f"{statement.name} is defined twice"
            methods[statement.name] = statement
    # Those that name another method's defaults come after it.
    later = {name for name, each in methods.items() if any(isinstance(item, tree.DefaultAsItem) for item in each.items)}
    rules: dict[str, MethodRule] = {}
    for name in sorted(methods, key=lambda each: (each in later, each)):
        rules[name] = check_method(methods[name], rules)
    return MappingProxyType(dict(sorted(rules.items())))

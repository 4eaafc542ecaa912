"""The methods that come with the compiler: `.adapter` files, read as any other."""

import functools
import importlib.resources
from collections.abc import Mapping
from types import MappingProxyType

from peftc.grammar.method.check import check_method
from peftc.grammar.method.rule import MethodRule
from peftc.grammar.source import Source
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse


@functools.cache
def builtin_methods() -> Mapping[str, MethodRule]:
    """All built-in methods by name, in alphabetical order."""
    folder = importlib.resources.files("peftc.grammar").joinpath("methods")
    methods: dict[str, tree.Method] = {}
    families = [family for family in folder.iterdir() if family.is_dir()]
    files = [(family.name, file) for family in families for file in family.iterdir() if file.name.endswith(".adapter")]
    for family, file in sorted(files, key=lambda found: found[1].name):
        source = Source(f"methods/{family}/{file.name}", file.read_text(encoding="utf-8"))
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

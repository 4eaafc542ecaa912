"""`route = NAME`: read, written, and refused where it has nothing to choose from."""

import pytest

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.spec import RouteName
from peftc.grammar.spec.write import to_tree
from peftc.grammar.syntax.format import format_file

BOTH = "adapter a = lora { on q_proj }\nadapter b = lora { on v_proj }\n"


@pytest.mark.parametrize(
    "text", ["activate a + b\nroute = topic\n", "route = topic activate a", "activate a route=topic"]
)
def test_read_and_written(text):
    spec = read_spec(BOTH + text)
    assert spec.route == RouteName("topic")
    assert spec.route.span.text == text[text.index("route") :].split(" activate")[0].strip()
    written = format_file(to_tree(spec))
    assert written.rstrip().endswith("route = topic")
    assert read_spec(written) == spec
    assert read_spec(BOTH + "activate a").route is None


def test_a_lone_adapter_is_active():
    assert read_spec("adapter a = lora { on q_proj }\nroute = topic").route == RouteName("topic")


def test_a_module_may_be_called_so():
    spec = read_spec("adapter a = lora { on route, q_proj }\nadapter route = lora { on v_proj }\nactivate route")
    assert [each.name for each in spec.adapters] == ["a", "route"]


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("route = topic", "E164", 3),
        ("activate a\nroute = one\nroute = two", "E147", 5),
        ("activate a\nroute = 'x'", "E1", 4),
        ("activate a\nroute topic", "E1", 4),
    ],
)
def test_what_is_wrong_is_told_where_it_stands(text, code, line):
    with pytest.raises(SpecError) as error:
        read_spec(BOTH + text)
    (told, *_) = error.value.diagnostics
    assert told.code.startswith(code)
    assert told.span.line == line

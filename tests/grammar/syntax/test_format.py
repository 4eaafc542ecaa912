import importlib.util
import re
import sys
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftc.grammar.source import Source
from peftc.grammar.syntax.format import format_file, format_source
from peftc.grammar.syntax.parse import parse, parse_with_comments

# A helper beside the tests, which are not a package.
_spec = importlib.util.spec_from_file_location("grammar_trees", Path(__file__).with_name("trees.py"))
assert _spec is not None
assert _spec.loader is not None
trees = importlib.util.module_from_spec(_spec)
sys.modules["grammar_trees"] = trees
_spec.loader.exec_module(trees)

relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def read(text):
    return parse(Source("x", text))


@relaxed
@given(trees.files)
def test_parsing_what_is_formatted_gives_the_tree_back(file):
    text = format_file(file)
    assert read(text) == file, text
    assert format_file(read(text)) == text


@relaxed
@given(trees.files, st.data())
def test_formatting_keeps_every_comment_and_the_tree(file, data):
    text = format_file(file)
    parsed = parse_with_comments(Source("x", text))
    # Put comments between arbitrary tokens, some at the end of a line, some on their own.
    places = sorted(data.draw(st.lists(st.sampled_from([0, *(end for _, end, _ in parsed.tokens)]), max_size=6)))
    pieces, last = [], 0
    for number, place in enumerate(places):
        mark = data.draw(st.sampled_from((" # c{}\n", "\n# c{}\n", "\n\n# c{}\n\n")))
        pieces += [text[last:place], mark.format(number)]
        last = place
    source = Source("x", "".join([*pieces, text[last:]]))
    formatted = format_source(source)
    assert parse(Source("x", formatted)) == parse(source), formatted
    before = sorted(each.text for each in parse_with_comments(source).comments)
    assert sorted(each.text for each in parse_with_comments(Source("x", formatted)).comments) == before
    assert format_source(Source("x", formatted)) == formatted


def test_the_canonical_form(golden):
    text = """
# file

use "a" # one
use "b"
base { architecture = "X" hidden_size=64 }
# about a
adapter a=lora( rank=4, # r
 alpha = 8 ) { # head
 on q_proj,v_proj
 # before refine
 refine layers[ 0 .. 2 ].{a,b} where in_features>=1024 and (linear or embedding) with rank=2 # trailing

 tokens [ "x" ]
 # last
}
# doc
method m(rank:int=8,alpha:float=1) { on linear
 param Long[rank,in]=zeros saved "x" on embedding=ones saved "y"
 param B[out,rank]=normal(mean=0,std=1) saved "z"
 W'=((W)+((alpha)*(B@Long))) }
"""
    golden("format/canonical.adapter", format_source(Source("x", text)))


def test_a_built_in_method_is_in_canonical_form():
    folder = Path(__file__).parents[3] / "grammar" / "methods"
    for file in folder.glob("*/*.adapter"):
        text = file.read_text(encoding="utf-8")
        assert format_source(Source(file.name, text)) == text


def test_long_lists_wrap():
    names = ", ".join(f"projection_{each}" for each in range(20))
    text = format_source(Source("x", f"adapter a = lora {{ on {names} }}"))
    assert max(map(len, text.split("\n"))) <= 100
    assert re.findall(r"projection_\d+", text) == names.split(", ")

"""Strategies for every tree that parse can give."""

from hypothesis import strategies as st

from peftc.grammar.syntax import tree

WORDS = ("a", "q_proj", "on", "all", "base", "W2", "layers", "T", "where", "in", "x1")
names = st.sampled_from(WORDS)
texts = st.text(max_size=8)
kinds = st.sampled_from(("linear", "embedding", "conv1d"))

numbers = st.builds(
    tree.Number,
    st.integers(0, 10**12) | st.floats(0, 1e300, allow_nan=False, allow_infinity=False),
)
leaves = (
    numbers
    | st.builds(tree.Text, texts)
    | st.builds(tree.Flag, st.booleans())
    | st.just(tree.Null())
    | st.builds(tree.Name, names)
)


def _grow(inner):
    operators = st.sampled_from([*"+-*/%@<>", "//", "**", "==", "!=", "<=", ">=", "and", "or"])
    arguments = st.builds(tree.Argument, st.none() | names, inner)
    return (
        st.builds(tree.Binary, operators, inner, inner)
        | st.builds(tree.Unary, st.sampled_from(("-", "not")), inner)
        | st.builds(tree.Transpose, inner)
        | st.builds(tree.Conditional, inner, inner, inner)
        | st.builds(tree.Call, names, st.lists(arguments, max_size=3).map(tuple))
        | st.builds(tree.Sequence, st.lists(inner, max_size=3).map(tuple))
    )


expressions = st.recursive(leaves, _grow, max_leaves=8)
given_arguments = st.lists(st.builds(tree.Argument, names, expressions), min_size=1, max_size=3).map(tuple)
all_arguments = st.lists(st.builds(tree.Argument, st.none() | names, expressions), max_size=3).map(tuple)

indices = st.integers(-99, 99)
index = st.builds(tree.Index, indices) | st.builds(tree.Index, st.none() | indices, st.none() | indices, st.just(True))
brackets = st.none() | st.lists(index, max_size=3).map(tuple)
parts = names | st.sampled_from(("0", "17")) | st.text(min_size=1, max_size=5)
segments = st.builds(
    tree.Segment, st.lists(parts, max_size=3, unique=True).map(tuple), st.just(False), brackets
) | st.just(tree.Segment(deep=True))
selectors = (
    st.builds(tree.PathSelector, st.lists(segments, min_size=1, max_size=4).map(tuple))
    | st.builds(tree.PatternSelector, st.sampled_from((r"a\.b.*", 'x"y', r"\\", "", r"(a|b)\d+", r'\\"', "\t", "é")))
    | st.builds(tree.AllSelector, kinds)
)
selector_lists = st.lists(selectors, min_size=1, max_size=3).map(tuple)
where = st.none() | expressions

clauses = (
    st.builds(tree.OnClause, selector_lists, where, st.just(()) | given_arguments)
    | st.builds(tree.RefineClause, selector_lists, where, given_arguments)
    | st.builds(tree.SkipClause, selector_lists, where)
    | st.builds(tree.TrainClause, selector_lists)
    | st.builds(tree.BiasClause, st.sampled_from(("none", "all", "adapter")))
    | st.builds(
        tree.TokensClause,
        st.lists(st.builds(tree.Text, texts) | st.builds(tree.Number, st.integers(0, 99)), min_size=1, max_size=3).map(
            tuple
        ),
        st.just(()) | selector_lists,
    )
)
labels = names | texts
terms = st.builds(tree.ActivateTerm, st.floats(-1e9, 1e9), labels)
targets = st.lists(names | st.just("a.b") | texts, min_size=1, max_size=20).map(tuple)
variants = st.builds(tree.Variant, kinds, expressions, texts)
sizes = st.lists(expressions, min_size=1, max_size=3).map(tuple)
fields = st.builds(tree.PeftField, names, expressions, st.just("") | names)
stored = (
    st.just({})
    | st.just({"once": True})
    | st.fixed_dictionaries({"seed": expressions})
    | st.fixed_dictionaries({"saved": texts, "saved_when": st.none() | expressions, "seed": st.none() | expressions})
)
later_items = (
    st.builds(tree.DefaultItem, targets, targets)
    | st.builds(tree.DefaultAsItem, names)
    | st.builds(
        tree.ParamItem,
        names,
        sizes,
        expressions,
        texts,
        st.lists(variants, max_size=2).map(tuple),
        kernel=st.booleans(),
        shared=st.booleans(),
        condition=st.none() | expressions,
    )
    | st.builds(
        lambda stored, *rest, **more: tree.ConstItem(*rest, **stored, **more),
        stored,
        names,
        sizes,
        expressions,
        shared=st.booleans(),
        condition=st.none() | expressions,
    )
    | st.builds(tree.LetItem, names, expressions, st.just("") | texts)
    | st.builds(tree.RequireItem, expressions)
    | st.builds(tree.CopiesItem, texts)
    | st.builds(tree.RowsItem, texts)
    | st.builds(tree.UnreadItem, st.lists(texts, min_size=1, max_size=3).map(tuple))
    | st.builds(
        tree.AllocateItem,
        names,
        st.lists(names, min_size=1, max_size=3).map(tuple),
        st.lists(st.builds(tree.Argument, names, expressions), max_size=3).map(tuple),
    )
    | st.builds(tree.PrimeItem, st.sampled_from(("W", "b", "prompt", "gate", "labels")), expressions)
    | st.builds(tree.PeftItem, names, st.lists(fields, max_size=3).map(tuple))
)
kinds_item = st.builds(tree.KindsItem, st.lists(names, min_size=1, max_size=3).map(tuple))
items = st.builds(
    lambda head, rest: (*head, *rest), st.lists(kinds_item, max_size=1), st.lists(later_items, max_size=4)
)
hyperparameters = st.builds(
    tree.Hyperparameter,
    names,
    st.sampled_from(("int", "float", "bool", "text", "ints")),
    expressions,
    st.lists(texts, max_size=2).map(tuple),
)
docs = st.lists(st.sampled_from(("", "Words.", "  more", "# x")), max_size=3).map("\n".join)
statements = (
    st.builds(tree.Use, texts)
    | st.builds(tree.Base, st.lists(st.builds(tree.BaseEntry, names, expressions), max_size=3).map(tuple))
    | st.builds(
        tree.Adapter, labels, st.builds(tree.Call, names, all_arguments), st.lists(clauses, max_size=4).map(tuple)
    )
    | st.builds(
        tree.Combined,
        labels,
        st.lists(st.builds(tree.Name, labels), max_size=3).map(tuple),
        st.just(()) | given_arguments,
    )
    | st.builds(tree.Activate, st.lists(terms, min_size=1, max_size=3).map(tuple))
    | st.builds(tree.Route, names)
    | st.builds(tree.Method, names, st.lists(hyperparameters, max_size=3).map(tuple), items, docs)
)
files = st.builds(tree.File, st.lists(statements, max_size=4).map(tuple))

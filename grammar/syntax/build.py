"""From lark's tree to ours: spans, escapes, numbers and the limit on nesting."""

import re
from collections.abc import Callable
from typing import Any, Literal, cast

from lark import Token, Tree

from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.source import Source, Span
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.build_expression import MAX_DEPTH, ExpressionBuilder, LarkTree, token_of, tokens_of, trees_of

MAX_SELECTORS = 10_000
MAX_PATTERN = 500

TYPES = ("int", "float", "bool", "text", "ints")


class Builder(ExpressionBuilder):
    """Builds the tree of one source. `docs` are the comment blocks before a line, by line number."""

    def __init__(self, source: Source, docs: dict[int, str]):
        super().__init__(source)
        self._docs = docs
        self._selectors = 0

    def file(self, node: LarkTree) -> tree.File:
        """The whole file."""
        makers: dict[str, Callable[[LarkTree], tree.Statement]] = {
            "use": self._use,
            "base": self._base,
            "adapter": self._adapter,
            "combined": self._combined,
            "activate": self._activate,
            "route": self._route,
            "method": self._method,
        }
        statements = tuple(makers[each.data](each) for each in trees_of(node))
        return tree.File(statements, span=Span(self._source, 0, len(self._source.text)))

    # --- statements ---

    def _use(self, node: LarkTree) -> tree.Use:
        return tree.Use(self._string(token_of(node, 0)), span=self._span(node))

    def _base(self, node: LarkTree) -> tree.Base:
        entries = tuple(
            tree.BaseEntry(str(each.children[0]), self._expr(each.children[1]), span=self._span(each))
            for each in trees_of(node)
        )
        return tree.Base(entries, span=self._span(node))

    def _adapter(self, node: LarkTree) -> tree.Adapter:
        label, call, *clauses = [each for each in node.children if isinstance(each, Tree)]
        name, arguments = call.children
        method = tree.Call(str(name), self._arguments(arguments), span=self._span(call))
        makers: dict[str, Callable[[LarkTree], tree.Clause]] = {
            "on": self._on,
            "refine": self._refine,
            "skip": self._skip,
            "train": self._train,
            "bias": self._bias,
            "tokens": self._tokens,
        }
        built = tuple(makers[each.data](each) for each in clauses)
        return tree.Adapter(self._label(label), method, built, span=self._span(node))

    def _combined(self, node: LarkTree) -> tree.Combined:
        label, *parts = trees_of(node)
        adapters: list[tree.Name] = []
        options: list[tree.Argument] = []
        for each in parts:
            if each.data == "entry":
                options.append(tree.Argument(*self._named(each), span=self._span(each)))
            elif options:
                help = "the adapters come first, and then how they are combined"
                fail(SpecError, "E141", "the options of 'combine' are given by name", self._span(each), help=help)
            else:
                adapters.append(tree.Name(self._label(each), span=self._span(each)))
        return tree.Combined(self._label(label), tuple(adapters), tuple(options), span=self._span(node))

    def _activate(self, node: LarkTree) -> tree.Activate:
        terms: list[tree.ActivateTerm] = []
        sign = 1.0
        for each in trees_of(node):
            if each.data == "sign":
                sign = -1.0 if each.children else 1.0
                continue
            number, label = each.children
            weight = 1.0 if number is None else float(self._number(cast(LarkTree, number)).value)
            terms.append(tree.ActivateTerm(sign * weight, self._label(cast(LarkTree, label)), span=self._span(each)))
        return tree.Activate(tuple(terms), span=self._span(node))

    def _route(self, node: LarkTree) -> tree.Route:
        return tree.Route(str(node.children[0]), span=self._span(node))

    # --- clauses ---

    def _on(self, node: LarkTree) -> tree.OnClause:
        return tree.OnClause(*self._choice(node), span=self._span(node))

    def _refine(self, node: LarkTree) -> tree.RefineClause:
        return tree.RefineClause(*self._choice(node), span=self._span(node))

    def _skip(self, node: LarkTree) -> tree.SkipClause:
        selectors, where = node.children
        return tree.SkipClause(self._selector_list(selectors), self._where(where), span=self._span(node))

    def _choice(self, node: LarkTree) -> tuple[tuple[tree.Selector, ...], tree.Expr | None, tuple[tree.Argument, ...]]:
        selectors, where, overrides = node.children
        return self._selector_list(selectors), self._where(where), self._overrides(overrides)

    def _overrides(self, node: Any) -> tuple[tree.Argument, ...]:
        return tuple(
            tree.Argument(str(each.children[0]), self._expr(each.children[1]), span=self._span(each))
            for each in (trees_of(node) if node is not None else ())
        )

    def _where(self, node: Any) -> tree.Expr | None:
        return None if node is None else self._expr(node.children[0])

    def _bias(self, node: LarkTree) -> tree.BiasClause:
        token = token_of(node, 0)
        modes = ("none", "all", "adapter")
        if token not in modes:
            hint = did_you_mean(token, modes) or "a bias is 'none', 'all' or 'adapter'"
            fail(SpecError, "E151", f"'{token}' is not a choice of biases", self._of(token), help=hint)
        return tree.BiasClause(cast(Literal["none", "all", "adapter"], str(token)), span=self._span(node))

    def _train(self, node: LarkTree) -> tree.TrainClause:
        selectors, tied = node.children
        return tree.TrainClause(self._selector_list(selectors), tied is not None, span=self._span(node))

    def _tokens(self, node: LarkTree) -> tree.TokensClause:
        listed, modules = list(trees_of(node)), node.children[-1]
        if modules is not None:
            listed.pop()
        tokens = tuple(cast(tree.Text | tree.Number, self._expr(each)) for each in listed)
        chosen = () if modules is None else self._selector_list(modules)
        return tree.TokensClause(tokens, chosen, span=self._span(node))

    # --- selectors ---

    def _selector_list(self, node: Any) -> tuple[tree.Selector, ...]:
        return tuple(self._selector(each) for each in trees_of(node))

    def _selector(self, node: LarkTree) -> tree.Selector:
        span = self._span(node)
        self._selectors += 1
        if self._selectors > MAX_SELECTORS:
            fail(SpecError, "E103", f"the file has more than {MAX_SELECTORS:,} selectors", span)
        if node.data == "pattern":
            token = token_of(node, 0)
            pattern = re.sub(r'\\(\\|")', lambda each: '"' if each.group(1) == '"' else each.group(0), token[1:-1])
            return self._pattern(pattern, span)
        if node.data == "all_sites":
            return tree.AllSelector(str(node.children[0]), span=span)
        segments = tuple(self._segment(each) for each in trees_of(node))
        if len(segments) > MAX_DEPTH:
            fail(SpecError, "E104", f"a selector has at most {MAX_DEPTH} parts", span)
        return tree.PathSelector(segments, span=span)

    def _pattern(self, pattern: str, span: Span) -> tree.PatternSelector:
        if len(pattern) > MAX_PATTERN:
            fail(SpecError, "E149", f"a pattern has at most {MAX_PATTERN} characters", span)
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            where = f" at character {error.pos + 1}" if isinstance(error, re.error) and error.pos is not None else ""
            reason = error.msg if isinstance(error, re.error) else str(error)
            message = f"this is not a regular expression: {reason}{where}"
            fail(SpecError, "E149", message, span, help="a quoted selector is a regular expression for the whole name")
        return tree.PatternSelector(pattern, span=span)

    def _segment(self, node: LarkTree) -> tree.Segment:
        span = self._span(node)
        if node.data == "deep":
            return tree.Segment(deep=True, span=span)
        children = list(node.children)
        bracket = children.pop() if children and not isinstance(children[-1], Token) else None
        if bracket is not None and cast(LarkTree, bracket).data == "alternative":
            children.append(bracket)
            bracket = None
        indices = None if bracket is None else self._indices(cast(LarkTree, bracket))
        if node.data == "choice":
            parts = [token_of(cast(LarkTree, each), 0) for each in children if each is not None]
            names = tuple(self._string(each) if each.type == "STRING" else str(each) for each in parts)
            self._no_twins(names, parts)
            return tree.Segment(names, indices=indices, span=span)
        if node.data == "any":
            return tree.Segment(indices=indices, span=span)
        return tree.Segment((str(children[0]),), indices=indices, span=span)

    def _no_twins(self, names: tuple[str, ...], parts: list[Token]) -> None:
        seen: set[str] = set()
        for name, part in zip(names, parts, strict=True):
            if name in seen:
                fail(SpecError, "E147", f"'{name}' is already among the alternatives", self._of(part))
            if not name:
                fail(SpecError, "E149", "a name is not empty", self._of(part))
            seen.add(name)

    def _indices(self, node: LarkTree) -> tuple[tree.Index, ...]:
        if node.data == "every":
            return ()
        return tuple(self._index(each) for each in trees_of(node))

    def _index(self, node: LarkTree) -> tree.Index:
        span = self._span(node)
        if len(node.children) == 1:
            return tree.Index(self._position(node.children[0]), span=span)
        start, _, stop = node.children
        return tree.Index(self._position(start), self._position(stop), True, span=span)

    def _position(self, node: Any) -> int | None:
        if node is None:
            return None
        digits = str(node.children[-1])
        if len(digits) > 9:
            fail(SpecError, "E114", "no list has that many entries", self._span(node))
        return -int(digits) if len(node.children) == 2 else int(digits)

    # --- methods ---

    def _method(self, node: LarkTree) -> tree.Method:
        span = self._span(node)
        parts = list(trees_of(node))
        makers: dict[str, Callable[[LarkTree], tree.MethodItem]] = {
            "kinds": lambda each: tree.KindsItem(tuple(map(str, each.children)), span=self._span(each)),
            "default": self._default,
            "default_as": lambda each: tree.DefaultAsItem(str(each.children[0]), span=self._span(each)),
            "param": self._param,
            "const": self._const,
            "require": lambda each: tree.RequireItem(self._expr(each.children[0]), span=self._span(each)),
            "let": self._let,
            "prime": self._prime,
            "allocate": self._allocate,
            "copies": lambda each: tree.CopiesItem(self._string(token_of(each, 0)), span=self._span(each)),
            "rows": lambda each: tree.RowsItem(self._string(token_of(each, 0)), span=self._span(each)),
            "unread": lambda each: tree.UnreadItem(
                tuple(self._string(key) for key in tokens_of(each)), span=self._span(each)
            ),
            "peft": self._peft,
        }
        hyperparameters = tuple(self._hyperparameter(each) for each in parts if each.data == "hyperparameter")
        items = tuple(makers[each.data](each) for each in parts if each.data != "hyperparameter")
        return tree.Method(str(node.children[0]), hyperparameters, items, self._docs.get(span.line, ""), span=span)

    def _hyperparameter(self, node: LarkTree) -> tree.Hyperparameter:
        name, kind, choices, default = node.children
        type_name = cast(Token, kind)
        if type_name not in TYPES:
            hint = did_you_mean(type_name, TYPES) or f"a type is one of {', '.join(TYPES)}"
            fail(SpecError, "E155", f"'{type_name}' is not a type", self._of(type_name), help=hint)
        values = () if choices is None else tuple(self._string(each) for each in tokens_of(choices))
        return tree.Hyperparameter(
            str(name),
            cast(Literal["int", "float", "bool", "text", "ints"], str(type_name)),
            self._expr(default),
            values,
            span=self._span(node),
        )

    def _default(self, node: LarkTree) -> tree.DefaultItem:
        *lists, overrides = node.children
        targets, architectures = (tuple(self._target(each) for each in trees_of(part)) for part in lists)
        return tree.DefaultItem(targets, architectures, self._overrides(overrides), span=self._span(node))

    def _target(self, node: LarkTree) -> str:
        return ".".join(self._string(each) if each.type == "STRING" else str(each) for each in tokens_of(node))

    def _param(self, node: LarkTree) -> tree.ParamItem:
        variants = tuple(
            tree.Variant(
                str(each.children[0]),
                self._expr(each.children[1]),
                self._string(token_of(each, 2)),
                span=self._span(each),
            )
            for each in trees_of(node)
            if each.data == "variant"
        )
        rest = [each for each in node.children if not (isinstance(each, Tree) and each.data == "variant")]
        shared, name, sizes, init, saved, kernel, group, condition = rest
        return tree.ParamItem(
            str(name),
            tuple(self._expr(each) for each in cast(LarkTree, sizes).children if each is not None),
            self._expr(init),
            self._string(cast(Token, saved)),
            variants,
            shared=shared is not None,
            kernel=kernel is not None,
            group=None if group is None else self._expr(group),
            condition=None if condition is None else self._expr(condition),
            span=self._span(node),
        )

    def _const(self, node: LarkTree) -> tree.ConstItem:
        shared, name, sizes, init, saved, *rest = node.children
        condition, group = rest.pop(), rest.pop()
        seeded = rest[0] if rest and isinstance(rest[0], Tree) else None
        key = when = None
        if saved is not None:
            key, when = cast(LarkTree, saved).children
        return tree.ConstItem(
            str(name),
            tuple(self._expr(each) for each in cast(LarkTree, sizes).children if each is not None),
            self._expr(init),
            None if key is None else self._string(cast(Token, key)),
            None if when is None else self._expr(when),
            None if seeded is None else self._expr(seeded.children[0]),
            once=bool(rest) and seeded is None,
            shared=shared is not None,
            group=None if group is None else self._expr(group),
            condition=None if condition is None else self._expr(condition),
            span=self._span(node),
        )

    def _let(self, node: LarkTree) -> tree.LetItem:
        saved = "" if node.children[2] is None else self._string(token_of(node, 2))
        return tree.LetItem(*self._named(node), saved, span=self._span(node))

    def _prime(self, node: LarkTree) -> tree.PrimeItem:
        target = token_of(node, 0)
        primes: dict[str, Literal["W", "b", "prompt", "gate", "labels"]] = {
            "W'": "W",
            "b'": "b",
            "prompt'": "prompt",
            "gate'": "gate",
            "labels'": "labels",
        }
        if target not in primes:
            help = "a method says what W' is, the adapted weight, and may say what b' is, the adapted bias\n"
            help += "or it says what prompt' is, which is put in front, and may say what gate' or labels' is"
            fail(SpecError, "E144", f"{target} cannot be defined", self._of(target), help=help)
        return tree.PrimeItem(primes[target], self._expr(node.children[1]), span=self._span(node))

    def _allocate(self, node: LarkTree) -> tree.AllocateItem:
        vector, *partners = map(str, tokens_of(node))
        settings = (tree.Argument(*self._named(each), span=self._span(each)) for each in trees_of(node))
        return tree.AllocateItem(vector, tuple(partners), tuple(settings), span=self._span(node))

    def _peft(self, node: LarkTree) -> tree.PeftItem:
        fields = tuple(
            tree.PeftField(*self._named(each), str(each.children[2] or ""), span=self._span(each))
            for each in trees_of(node)
        )
        return tree.PeftItem(str(node.children[0]), fields, span=self._span(node))

    def _named(self, node: LarkTree) -> tuple[str, tree.Expr]:
        return str(node.children[0]), self._expr(node.children[1])

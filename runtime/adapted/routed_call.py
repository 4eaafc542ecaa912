"""One call whose tokens are given as much of each adapter as a route says."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import Cache

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign.hidden_states import HIDDEN_STATES, hidden_pass, last_hidden_state, tokens_in
from peftc.passes.foreign.transformers import LOGITS_TO_KEEP, TOKENS, USE_CACHE
from peftc.passes.plan.structure import GATE, site_slot
from peftc.runtime.adapters.slots import Sources
from peftc.runtime.execution.engine import ActiveAdapters, Engine
from peftc.runtime.mixed_batch.gates import Gates, Given
from peftc.runtime.regions.host import Host

Route = Callable[..., torch.Tensor]
"""Gives how much of each adapter is used, of what it asks for by the names of its parameters: `hidden_states`
`[rows, tokens, hidden]` of the base's last layer, and whatever the call was given. The answer is `[rows, adapters]`,
`[rows, tokens, adapters]` or, for each adapted place, `[rows, tokens, places, adapters]`. It may have a `first_pass`,
which says of a number of rows how much of the adapters, `[rows, adapters]`, the pass for `hidden_states` has, or None.
"""


@dataclass(frozen=True, eq=False)
class Routed:
    """A route and the adapters that it chooses from, in the order of its answer."""

    name: str
    route: Route
    names: tuple[str, ...]
    wants: Mapping[str, bool]  # what the route asks for, and whether it must have it
    known: frozenset[str]  # the arguments that the model's calls have


@dataclass(frozen=True, eq=False)
class Serving:
    """What calls of adapters in this order are served with, all of it as it was when they became active."""

    routed: Routed
    order: tuple[str, ...]
    places: tuple[str, ...]  # in the order of a route's answer
    head: bool  # whether an adapter of what gives the logits is routed
    dtype: torch.dtype  # of the numbers
    own: threading.local = field(default_factory=threading.local)  # what a thread's calls are served with

    def gated(self, engine: Engine, tenant: ActiveAdapters) -> ActiveAdapters:
        """What the adapters serve calls with, with numbers for each token that are its own."""
        gates = Gates(made_for=self)
        positions = frozenset(self.order.index(name) for name in self.routed.names)
        structure = replace(tenant.specialisation.structure, gated=positions)
        read: Sources = {
            (site_slot(term.position, at.site.name), GATE): (
                gates.values,
                _gate(self.order[term.position], at.site.name),
            )
            for at in structure.sites
            for term in at.terms
            if term.position in positions
        }
        return replace(
            tenant,
            specialisation=engine.specialisation(structure),
            sources=cache(lambda: {**tenant.sources(), **read}),
            choices={},
            regions={},
            compiled=[],
            gates=gates,
        )


@dataclass(frozen=True, eq=False)
class RoutedCall:
    """A call, with what was active when it began."""

    serving: Serving
    tenant: ActiveAdapters
    engine: Engine
    host: Host

    def __call__(self, run: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call the model with each token given as much of each adapter as the route says. Raises UsageError."""
        self._check(arguments)
        weights = self.serving.routed.route(**self._asked(run, arguments))
        with self._giving(weights, arguments):
            return run(**arguments)

    def generation(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a generation whose steps see the whole text. Raises UsageError where they cannot."""
        if arguments.get(USE_CACHE):
            message = "a route sees a text as a whole, and use_cache=True would give it a token at a time"
            fail(UsageError, "E538", message, help="leave use_cache out")
        if arguments.get(TOKENS) is None and tokens_in(arguments) is not None:
            message = "a text is generated from embeddings a token at a time, and a route sees it as a whole"
            fail(UsageError, "E538", message, help="give it input_ids")
        whole = {LOGITS_TO_KEEP: 0} if self.serving.head and LOGITS_TO_KEEP in self.serving.routed.known else {}
        return {**whole, **arguments, USE_CACHE: False}

    def _check(self, arguments: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            message = "a routed call goes through the model twice, and has no graph of its own"
            fail(UsageError, "E538", message, help="call without a compiler, or take the route away: set_route(None)")
        for value in arguments.values():
            if isinstance(value, Cache) and value.get_seq_length():
                message = "a route sees a text as a whole, and the call has a cache of what was before"
                fail(UsageError, "E538", message, help="call with use_cache=False and the whole text")
        kept = arguments.get(LOGITS_TO_KEEP, 0)
        if self.serving.head and (isinstance(kept, torch.Tensor) or kept):
            message = f"a route weighs what gives the logits for every token, and '{LOGITS_TO_KEEP}' picks some"
            fail(UsageError, "E538", message, help=f"leave {LOGITS_TO_KEEP} out, and pick of what the call gives")

    @contextmanager
    def _giving(self, weights: object, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Inside, and in this thread, tokens are given so much of each adapter."""
        own = self.serving.own
        if getattr(own, "of", None) is not self.tenant:
            own.of, own.tenant = self.tenant, self.serving.gated(self.engine, self.tenant)
        tenant: ActiveAdapters = own.tenant
        assert tenant.gates is not None
        with self.host.pinned(tenant), tenant.gates.having(self._given(weights, arguments)):
            yield

    def _first_pass(self, arguments: Mapping[str, Any]) -> tuple[AbstractContextManager[None], bool]:
        """What the call for hidden states is made in, and whether it has adapters: as a route's `first_pass` says."""
        sizes, start = tokens_in(arguments), getattr(self.serving.routed.route, "first_pass", None)
        weights = start(sizes[0]) if callable(start) and sizes is not None else None
        if weights is None:
            return self.host.pinned(self.engine.plain), False  # type: ignore[return-value]
        return self._giving(weights, arguments), True

    def _asked(self, run: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the route asks for."""
        routed, given = self.serving.routed, dict[str, Any]()
        for name, needed in routed.wants.items():
            if name == HIDDEN_STATES:
                inside, adapted = self._first_pass(arguments)
                # A cache is filled by whoever is given it, and this is not the call that it is for.
                first = {key: each for key, each in arguments.items() if not isinstance(each, Cache)}
                with inside, torch.no_grad():
                    found = last_hidden_state(run(**hidden_pass(first, routed.known, whole=adapted)))
                if found is None:
                    message = "the model does not give the hidden states of one stack of layers"
                    fail(UsageError, "E538", message, help="let the route ask for something else")
                given[name] = found
            elif name in arguments:
                given[name] = arguments[name]
            elif needed:
                message = f"the route asks for {name!r}, and the call has none"
                fail(UsageError, "E537", message, help=f"call the model with {name}=, or give the parameter a default")
        return given

    def _given(self, weights: object, arguments: Mapping[str, Any]) -> Given:
        """A route's answer as numbers for tokens."""
        names, places, sizes = self.serving.routed.names, self.serving.places, tokens_in(arguments)
        if sizes is None:
            message = "the call has no tokens that a route could weigh"
            fail(UsageError, "E537", message, help="route adapters of a model that reads texts")
        rows, tokens = sizes
        count = len(names)
        forms = ((rows, count), (rows, tokens, count), (rows, tokens, len(places), count))
        if not isinstance(weights, torch.Tensor) or tuple(weights.shape) not in forms:
            found = list(weights.shape) if isinstance(weights, torch.Tensor) else type(weights).__name__
            wanted = " or ".join(str(list(each)) for each in forms)
            fail(UsageError, "E537", f"the route gives {found}", help=f"give a tensor of the sizes {wanted}")
        weights = weights.to(self.serving.dtype)
        whole = weights.view(rows, 1, 1, count) if weights.dim() == 2 else weights
        whole = whole.unsqueeze(2) if whole.dim() == 3 else whole
        each = [one.unbind(2) for one in whole.unsqueeze(-1).unbind(3)]  # by adapter, by place: [rows, tokens, 1]
        values = {
            _gate(name, place): own[number if len(own) > 1 else 0]
            for name, own in zip(names, each, strict=True)
            for number, place in enumerate(places)
        }
        return Given(rows, tokens, values)


def _gate(name: str, place: str) -> str:
    return f"{name}:{place}"

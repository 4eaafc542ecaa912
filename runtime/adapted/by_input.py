"""Routes of a model: which adapters they choose from, and what calls are served with that these serve."""

import inspect
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import nn

from peftc.grammar.diagnostics import UsageError, did_you_mean, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.foreign.hidden_states import ASKS_FOR_HIDDEN, HIDDEN_STATES, head_of
from peftc.runtime.adapted.base_weights import Active
from peftc.runtime.adapted.routed_call import Route, Routed, RoutedCall, Serving
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.execution.engine import ActiveAdapters, Engine
from peftc.runtime.regions.host import Host


class Adapters(Protocol):
    """What a route chooses from."""

    engine: Engine
    host: Host
    active: Active
    routed: Routed | None

    def adapter(self, name: str) -> AdapterParameters:
        """The adapter of that name. Raises UsageError."""
        ...


class InputRouting:
    """Lets a route say how much of the active adapters each token is given."""

    def __init__(self, state: Adapters):
        self._state = state
        self._made: tuple[ActiveAdapters, Active, Routed, ActiveAdapters] | None = None

    def clear(self) -> None:
        """Let go of what was made: adapters are gone, or the route is another."""
        self._made = None

    def read(self, name: str, route: Route, names: Sequence[str], known: Collection[str]) -> "Routed":
        """A route of this name over these adapters; `known` are the arguments that the model's calls have.

        Raises UsageError: an unknown name, one twice, an adapter that trains something as a whole, a parameter of the
        route's that calls have not, a model of an encoder and a decoder.
        """
        if not callable(route):
            fail(UsageError, "E537", f"a {type(route).__name__} is no route", help="give a function, or a module")
        if contract.is_encoder_decoder(getattr(self._state.engine.model, "config", None)):
            message = "the model reads two texts, and a route weighs the tokens of one"
            fail(UsageError, "E538", message, help="activate adapters with weights, or give rows theirs: adapter_names")
        for each in names:
            if names.count(each) > 1:
                fail(UsageError, "E512", f"adapter {each!r} is routed twice", help="name it once")
            check_weighable(self._state.adapter(each))
        if not names:
            fail(UsageError, "E536", "a route has no adapters to choose from", help="name them, or activate some")
        wants = _wanted(route, known)
        if HIDDEN_STATES in wants and ASKS_FOR_HIDDEN not in known:
            message = f"the route asks for {HIDDEN_STATES!r}, which the model does not give ({ASKS_FOR_HIDDEN})"
            fail(UsageError, "E538", message, help="let the route ask for arguments of the call")
        return Routed(name, route, tuple(names), wants, frozenset(known))

    def check(self, active: Active) -> None:
        """Raise UsageError where some of a route's adapters would be active, and not all."""
        routed = self._state.routed
        if routed is None:
            return
        has = {name for name, _ in active}
        missing = [name for name in routed.names if name not in has]
        if missing and len(missing) < len(routed.names):
            message = f"a route chooses from {', '.join(routed.names)}, and {missing[0]!r} would not be active"
            help = "activate all of them or none, or take the route away: set_route(None)"
            fail(UsageError, "E536", message, help=help)

    def check_fixed(self, names: Collection[str], what: str) -> None:
        """Raise UsageError where a route says how much of one of these adapters is used: `what` has no input to ask."""
        routed = self._state.routed
        asked = [] if routed is None else [name for name in routed.names if name in names]
        if asked:
            message = f"how much of adapter {asked[0]!r} is used depends on the input, and {what} has none"
            fail(UsageError, "E536", message, help="take the route away first: set_route(None)")

    def holds(self, active: Active) -> bool:
        """Whether the route says how much is used of adapters that are active so."""
        routed = self._state.routed
        return routed is not None and {*routed.names} <= {name for name, _ in active}

    @property
    def is_on(self) -> bool:
        """Whether calls are routed now."""
        return self._state.engine.active.gates is not None

    def gated(self, tenant: ActiveAdapters, active: Active) -> ActiveAdapters:
        """What calls are served with that these adapters serve, with numbers for each token."""
        routed, made = self._state.routed, self._made
        assert routed is not None
        if made is None or made[0] is not tenant or made[1] != active or made[2] is not routed:
            model = self._state.engine.model
            order, dtypes = tuple(name for name, _ in active), {each.dtype for each in model.parameters()}
            dtype = torch.float64 if torch.float64 in dtypes else torch.float32
            serving = Serving(routed, order, tuple(self.places()), self._has_head(model), dtype)
            self._made = made = tenant, active, routed, serving.gated(self._state.engine, tenant)
        return made[3]

    def _has_head(self, model: nn.Module) -> bool:
        """Whether a route weighs an adapter of what gives the logits."""
        assert self._state.routed is not None
        head, adapters = head_of(model), [self._state.adapter(name) for name in self._state.routed.names]
        used = {at.site.module for each in adapters for at in each.plan.sites}
        return head is not None and any(model.get_submodule(each) is head for each in used)

    def places(self) -> list[str]:
        """The adapted places that a route may tell apart, in the order of the model's modules."""
        assert self._state.routed is not None
        order = {name: number for number, (name, _) in enumerate(self._state.engine.model.named_modules())}
        adapters = [self._state.adapter(name) for name in self._state.routed.names]
        sites = {at.site.name: at.site.module for each in adapters for at in each.plan.sites}
        return sorted(sites, key=lambda name: order.get(sites[name], 0))

    def now(self) -> "RoutedCall | None":
        """What serves a call that begins now, whatever is active before it ends; None where none is routed."""
        tenant = self._state.engine.active
        if tenant.gates is None:
            return None
        serving: Serving = tenant.gates.made_for
        return RoutedCall(serving, tenant, self._state.engine, self._state.host)


def _wanted(route: Route, known: Collection[str]) -> dict[str, bool]:
    """What a route asks for, and whether it must have it. What is its own has a default, and another name."""
    parameters = inspect.signature(route.forward if isinstance(route, nn.Module) else route).parameters
    found: dict[str, bool] = {}
    for name, each in parameters.items():
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        needed, near = each.default is each.empty, did_you_mean(name, (HIDDEN_STATES, *known))
        if each.kind is not each.POSITIONAL_ONLY and (name == HIDDEN_STATES or name in known):
            found[name] = needed
        elif needed or near:
            help = near or f"name it {HIDDEN_STATES!r}, or as the model's are"
            fail(UsageError, "E537", f"the route asks for {name!r}, which no call has", help=help)
    return found


def check_weighable(adapter: AdapterParameters) -> None:
    """Raise UsageError for an adapter that has a part which is there or is not."""
    plan = adapter.plan
    why = f"trains {plan.copies[0].module} as a whole" if plan.copies else ""
    why = why or (f"trains tokens of {plan.rows[0].module}" if plan.rows else "")
    why = why or ("puts virtual tokens in front" if any(at.bound.prompt is not None for at in plan.sites) else "")
    why = why or ("has other weights for every task" if any(at.bound.tasks for at in plan.sites) else "")
    if why:
        message = f"adapter {plan.name!r} {why}, of which a token cannot be given a part"
        fail(UsageError, "E513", message, help="route adapters of weights alone")

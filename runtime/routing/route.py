"""Giving a model a route."""

from collections.abc import Mapping, Sequence

from peftc.grammar.diagnostics import SpecError, UsageError, did_you_mean, fail
from peftc.grammar.spec.spec import RouteName
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapted.routed_call import Route


def set_route(model: AdaptedModule, route: Route | None, adapter_names: str | Sequence[str] | None = None) -> None:
    """Let a route say, in every call, how much of each adapter each token is given: `y + sum of g_i * (y_i - y)`.

    Here `y` is what the base's module gives, `y_i` what it gives with adapter i alone, and `g_i` the route's number for
    the token. Adapters that are active beside those of the route act as ever. While its adapters rest, it does too;
    some of them alone cannot be activated.

    Args:
        route: A function or a module, which is trained with the model then. It is given what its parameters are called:
            `hidden_states` `[rows, tokens, hidden]`, of the base's last layer without adapters and without gradients,
            for which the base is called before the adapted model is; and any argument that the call was given, such as
            `input_ids` `[rows, tokens]`. It gives `[rows, adapters]`, `[rows, tokens, adapters]`, or, for each of
            `get_route_places()`, `[rows, tokens, places, adapters]`. None takes the present one away.
        adapter_names: The adapters that it chooses from, in the order of its answer; by default those that are active.
            They become active, and are trained if others are and they were not frozen.

    `generate` gives every step the whole text, as PEFT's X-LoRA does. Raises UsageError, and changes nothing: an
    unknown adapter, one with trained modules, tokens or virtual tokens, a parameter that calls have no value for, a
    model of an encoder and a decoder. Calls raise it for an answer of other sizes, with a cache of earlier tokens, with
    `adapter_names` and under a compiler.
    """
    state = model._adapter_state
    names = [name for name, _ in state.active]
    if adapter_names is not None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    state.set_route(route, names, model._call_names)


def chosen_route(wanted: RouteName | None, routes: Mapping[str, Route]) -> Route | None:
    """The route that a spec names, of those given by name.

    Raises SpecError where it is not given, and UsageError for one that the spec does not name.
    """
    others = [name for name in routes if wanted is None or name != wanted.name]
    if wanted is not None and wanted.name not in routes:
        help = (
            did_you_mean(wanted.name, others)
            or f"pass it in Python: compiler.apply(model, spec, routes={{{wanted.name!r}: function}})"
        )
        fail(SpecError, "E539", f"route '{wanted.name}' is not given", wanted.span, help=help)
    if others:
        help = "the spec names none: write route = NAME" if wanted is None else f"it names {wanted.name!r}"
        fail(UsageError, "E539", f"the spec has no route {others[0]!r}", help=help)
    return None if wanted is None else routes[wanted.name]


def add_nothing_else(said: Mapping[str, object], routes: Mapping[str, Route] | None) -> None:
    """Raise UsageError for an argument that means nothing where saved adapters get a route from a configuration."""
    chosen_route(None, routes or {})
    for name, value in said.items():
        if value is not None:
            message = f"'{name}' means nothing where saved adapters get a route"
            fail(UsageError, "E536", message, help="leave it out")


def get_route(model: AdaptedModule) -> Route | None:
    """The route that `set_route` gave the model, or that was loaded: of PEFT's X-LoRA a `ScalingClassifier`."""
    routed = model._adapter_state.routed
    return None if routed is None else routed.route


def get_route_places(model: AdaptedModule) -> list[str]:
    """The adapted places that a route may tell apart, in the order of the model's modules. Empty without a route."""
    state = model._adapter_state
    return [] if state.routed is None else state.inputs.places()

"""Calls of a model whose active adapters put virtual tokens in front: what a graph is given beside the call's own.

Prefixes are put in front of the cache, so a call without one gets an empty one. Prompts are embedded with the first
tokens of a text; what they leave in the cache is kept beside it, and given to every later call. So a caller's cache
holds real tokens only, and whatever transformers does with it (counting, reordering beams, cropping) is right.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.foreign.peft import TASK_IDS, TOKEN_TYPES
from peftc.passes.ir.roles import Role
from peftc.passes.plan.structure import VirtualTokens
from peftc.runtime.execution import nest
from peftc.runtime.execution.call import Call

EXTRA_INPUTS = (TASK_IDS,)  # what a call may give that no model takes
_CARRIED = "_peftc_carried"
IGNORED = -100  # the label that losses leave out

PREFIX, HEADS, START, CARRY = "prefix", "heads", "start", "carry"
"""How a graph is widened: see the passes insert-prefix, insert-heads, insert-prompt and carry-prompt."""


class Owner:
    """A set of active adapters with their weights: these very ones, not others of the same names.

    It is no dataclass: a compiled graph must not depend on what it holds. A copy of a cache has the same owner.
    """

    def __init__(self, active: tuple[tuple[str, float], ...], adapters: Sequence[object] = ()):
        self.active, self.adapters = active, tuple(adapters)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Owner) or other.active != self.active or len(other.adapters) != len(self.adapters):
            return False
        return all(map(operator.is_, other.adapters, self.adapters))

    def __hash__(self) -> int:
        return hash(self.active)

    def __deepcopy__(self, _: dict[int, Any]) -> "Owner":
        return self


@dataclass(frozen=True)
class Carried:
    """What virtual tokens left in a cache, and whose they are."""

    owner: object
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Virtual:
    """What the active adapters put in front; `owner` tells sets of active adapters apart."""

    fronts: tuple[VirtualTokens, ...] = ()
    owner: object = None

    def of(self, kind: str) -> tuple[VirtualTokens, ...]:
        """What is put in front at places of a kind."""
        return tuple(each for each in self.fronts if each.site.kind == kind)

    @property
    def tasks(self) -> int:
        """How many tasks there are prompts for, the fewest of any adapter; 0 where no call says a task."""
        counts = [each.tasks for each in self.fronts if each.tasks]
        return min(counts) if counts else 0  # `min(..., default=0)` breaks a compiled graph

    @property
    def compatible(self) -> bool:
        """Whether PEFT's positions and lengths are asked for."""
        return any(each.compatible for each in self.fronts)


def tasks_of(value: Any, count: int) -> torch.Tensor | None:
    """The tasks of a call's rows, checked. Raises UsageError where they are missing, or none of the adapter's."""
    if not count:
        if value is not None:
            no_task(count)
        return None
    if value is None:
        no_task(count)
    found = task_numbers(value)
    if not torch.compiler.is_compiling() and len(found) and not 0 <= int(found.min()) <= int(found.max()) < count:
        fail(UsageError, "E563", f"tasks are numbered from 0 to {count - 1}, and one is not", where=TASK_IDS)
    return found


def no_task(count: int) -> NoReturn:
    """Raise UsageError: tasks are missing, of which the active adapters have so many, or they have none."""
    if not count:
        fail(UsageError, "E563", "no active adapter has tasks", help=f"leave '{TASK_IDS}' out", where=TASK_IDS)
    help = f"pass {TASK_IDS}=..., a whole number from 0 to {count - 1} for every row"
    message = f"the active adapter has tasks, and {TASK_IDS!r} are not given"
    fail(UsageError, "E563", message, help=help, where=TASK_IDS)


def task_numbers(value: Any) -> torch.Tensor:
    """The tasks that a call is given, `[rows]` or `[1]`. Raises UsageError where they are no whole numbers."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        fail(UsageError, "E563", f"a task is a whole number for each row, not {value!r:.40}", where=TASK_IDS)
    if found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool:
        message = f"a task is a whole number for each row, not a tensor {found.dtype} of shape {list(found.shape)}"
        fail(UsageError, "E563", message, where=TASK_IDS)
    return found


def labelled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments without the types of its tokens: they have told which labels a loss leaves out.

    A token's label counts where its type, above 0, is a multiple of four: PEFT's four types of a sentence and its
    answer, told apart by the sentence. Raises UsageError where there is not one for each label.
    """
    given = dict(arguments)
    types, labels = given.pop(TOKEN_TYPES, None), given.get(contract.LABELS)
    if types is None or labels is None:
        return given
    if types.shape != labels.shape:
        message = f"the types are of shape {list(types.shape)}, and the labels of shape {list(labels.shape)}"
        fail(UsageError, "E567", message, help="give each label its token's type", where=TOKEN_TYPES)
    return given | {contract.LABELS: labels.masked_fill((types <= 0) | (types % 4 != 0), IGNORED)}


def with_empty_cache(call: Call, name: str, encoder_decoder: bool) -> Call:
    """The call with a cache that holds nothing; `name` is what the forward calls it."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if encoder_decoder else DynamicCache()
    arguments = tuple(sorted((*call.signature.arguments, (name, (nest.CACHE,)))))
    kind = ("encoder-decoder" if encoder_decoder else "decoder", False)
    signature = replace(call.signature, arguments=arguments, cache=kind)
    return replace(call, signature=signature, cache=cache, keeps_cache=call.wants_cache)


def with_positions(call: Call) -> Call:
    """The call with the positions that its mask leaves tokens at, where the text may not begin at the left.

    Of a mask `[rows, tokens]`, the places before the first real token are not counted; so padding on the left does not
    move a text away from the virtual tokens. Other padding changes nothing.
    """
    mask, tokens = call.tensor(Role.MASK), call.text
    if call.tensor(Role.POSITIONS) is not None or mask is None or mask.dim() != 2 or tokens is None:
        return call
    before = (mask != 0).to(torch.int64).cumsum(1).eq(0).sum(1, keepdim=True)
    places = torch.arange(mask.shape[1], device=mask.device) - before
    positions = places.clamp(min=0)[:, -tokens.shape[1] :]
    form, name = (nest.TENSOR, positions.dtype, 2), contract.name_of(Role.POSITIONS)
    signature = replace(call.signature, arguments=tuple(sorted((*call.signature.arguments, (name, form)))))
    given = dict(zip(call.signature.tensor_names, call.tensors, strict=True)) | {name: positions}
    return replace(call, signature=signature, tensors=[given[each] for each in signature.tensor_names])


def with_extra(call: Call, mode: str, extra: Sequence[torch.Tensor] = (), owner: object = None) -> Call:
    """The call for a graph that is widened in some way, with the tensors that the graph takes beside the call's own.

    `owner` is whose what virtual tokens leave in the cache will be.
    """
    return replace(call, signature=replace(call.signature, mode=mode), extra=tuple(extra), owner=owner)


def carried_by(cache: Cache, owner: object, rows: int) -> tuple[torch.Tensor, ...] | None:
    """What virtual tokens of these adapters left in the cache when its text began; None if it began without them."""
    found = cache.__dict__.get(_CARRIED)
    if not isinstance(found, Carried) or found.owner != owner:
        return None
    if found.tensors and found.tensors[0].shape[0] not in (1, rows):
        # Rows were repeated or dropped since; those of one text stay side by side.
        if rows % found.tensors[0].shape[0]:
            return None
        times = rows // found.tensors[0].shape[0]
        return tuple(each.repeat_interleave(times, 0) for each in found.tensors)
    return found.tensors


def carry(cache: Cache, owner: object, tensors: Sequence[torch.Tensor]) -> None:
    """Keep beside a cache what virtual tokens left in it."""
    cache.__dict__[_CARRIED] = Carried(owner, tuple(tensors))


def first_token(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call of one token, from which only what virtual tokens leave in a cache is wanted."""
    names = (contract.name_of(role) for role in (Role.TOKENS, Role.EMBEDDINGS))
    name = next(name for name in names if arguments.get(name) is not None)
    return {name: arguments[name][:, :1], contract.USE_CACHE: True}

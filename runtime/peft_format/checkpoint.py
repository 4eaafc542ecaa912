"""The tensors of a PEFT checkpoint: which key holds which parameter, and whether a file's tensors fit a plan."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, Diagnostic, did_you_mean
from peftc.grammar.syntax import tree
from peftc.passes.plan.plan import ROWS, AdapterPlan, ParamKey, PlannedSite
from peftc.passes.plan.site import WHOLE
from peftc.runtime.adapters.allocation import budgeted, expanded
from peftc.runtime.peft_format.key_spelling import AS_IT_IS, PREFIX, SHARED, Spelling
from peftc.runtime.peft_format.same_base import is_same
from peftc.runtime.peft_format.saved_value import value_key
from peftc.runtime.peft_format.wrapped_names import BASE, TOKENS, base_key, base_name, wrapped_name, wrappers_of

_SHOWN = 20  # problems of one kind that are listed one by one


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: whose it is, its shape there and in use, and the site unless it is a module's own.

    `tail` is the part of its key that the method has for it.
    """

    key: ParamKey
    shape: tuple[int, ...]
    used: tuple[int, ...]
    planned: PlannedSite | None = None
    optional: bool = False  # a file may lack it
    written: bool = True
    computed: bool = False  # the value of what others come to: no tensor of its own
    tail: str = ""


def entries(plan: AdapterPlan) -> dict[str, Entry]:
    """Every tensor PEFT saves for the plan, by its key in the file.

    The plan's sites must be in the model's order: PEFT wraps the parameters of a module in the order it registers
    them, each wrapper around the one before, so the last is outermost and the first deepest in `.base_layer`s.
    """
    wrappers = wrappers_of(plan)
    found: dict[str, Entry] = {}
    virtual = any(each.site.kind in WHOLE for each in plan.sites)
    for planned in plan.sites:
        site = planned.site
        if site.kind in WHOLE:
            found.update(_whole_entries(plan, planned))
            continue
        name = wrapped_name(site.module, wrappers, itself=False)
        around = wrappers[site.module]
        name += BASE * (len(around) - 1 - around.index(site.name))
        for param in planned.bound.params:
            if param.saved:
                place = SHARED if param.shared else f"{PREFIX}{name}."
                key = planned.key(plan.name, param)
                shape = planned.saved_shape(param)
                found[place + param.saved] = Entry(
                    key, shape, param.shape, planned, param.optional, param.written, tail=param.saved
                )
    # Around what stands in front, PEFT has no model of its own that wraps modules.
    before = SHARED if virtual else PREFIX
    for copy in plan.copies:
        for tensor, shape, _ in copy.tensors if copy.read else ():
            entry = Entry(ParamKey(plan.name, copy.module, tensor), shape, shape)
            first, *others = copy.names(tensor)
            found[base_key(plan, first)] = entry
            for tied in others:
                found[base_key(plan, tied)] = replace(entry, optional=True, written=tied in copy.read)
    for copy in plan.trained:
        name = wrapped_name(copy.module, wrappers, itself=True)
        for tensor, shape, _ in copy.tensors:
            tail = f"{copy.saved}.{tensor}" if copy.saved else ""
            entry = Entry(ParamKey(plan.name, copy.module, tensor), shape, shape, tail=tail)
            for tied in copy.names(tensor)[1:]:
                found[before + tied] = replace(entry, optional=True)
            found[before + ".".join(each for each in (name, copy.saved, tensor) if each)] = entry
    for rows in plan.rows:
        shape = (len(rows.ids), rows.width)
        entry = Entry(ParamKey(plan.name, rows.module, ROWS), shape, shape, tail=rows.saved or TOKENS)
        # On their own, or with embeddings, PEFT saves rows again for what is tied. The first is the one that counts.
        for tied in rows.tied:
            again = replace(entry, optional=True, written=bool(rows.saved))
            found[f"{PREFIX}{tied}.{rows.saved or TOKENS}"] = again
        found[f"{PREFIX}{rows.module}.{rows.saved or TOKENS}"] = entry
    return found


def _whole_entries(plan: AdapterPlan, at: PlannedSite) -> dict[str, Entry]:
    """The tensors of a place of which a model has one: PEFT saves them by bare names."""
    found: dict[str, Entry] = {}
    if at.bound.settled is not None:
        _, shape, key = at.bound.settled
        found[key] = Entry(value_key(plan.name, at), shape, shape, at, optional=True, computed=True)
    for param in at.bound.params:
        if param.saved:
            own = at.key(plan.name, param)
            shape = param.shape
            found[param.saved] = Entry(own, shape, shape, at, param.optional, param.written, tail=param.saved)
    return found


def checkpoint_keys(plan: AdapterPlan) -> dict[str, ParamKey]:
    """PEFT's key of every tensor that is saved, with `base_model.model.` in front."""
    return {key: entry.key for key, entry in entries(plan).items() if entry.written}


def fit(
    plan: AdapterPlan,
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    expected: Mapping[str, Entry] | None = None,
    as_spelled: Spelling = AS_IT_IS,
    base_shapes: Mapping[str, tuple[int, ...]] | None = None,
    base_tensors: Callable[[str], Tensor | None] | None = None,
    lost: Collection[str] = (),
    ignore_mismatched_sizes: bool = False,
) -> dict[ParamKey, Tensor]:
    """The plan's parameters out of a checkpoint's tensors, in the shape of use and the file's dtype.

    Keys may carry PEFT's prefix or, as transformers writes them, none. PEFT also saves untrained tensors of the base
    (embeddings that are targeted, originals of trained modules); those are left out if they are what the model has.

    Args:
        plan: What the tensors must fit.
        tensors: The file's tensors by key.
        where: What messages call the file.
        expected: The plan's `entries`, where they are at hand.
        as_spelled: How the file spells the keys of `tensors`.
        base_shapes: Shapes of the model's own tensors by name.
        base_tensors: The model's own tensor of a name, to compare with those the file repeats.
        lost: Keys that the file may lack, beside those that any may.
        ignore_mismatched_sizes: Leave out, with a warning, what has other sizes.

    Raises:
        CheckpointError: all that is wrong at once: missing and unexpected keys, wrong shapes, other base weights.
    """
    expected = entries(plan) if expected is None else expected
    aliases = _aliases(plan, tensors)

    def plain(key: str) -> str:
        return key if key in expected else aliases.get(key, prefixed(as_spelled.names.get(key, key)))

    found: dict[str, Tensor] = {}
    report = _Report(where)
    unexpected: list[str] = []
    for key, tensor in tensors.items():
        name = plain(key)
        if name in found:
            first = next(each for each in tensors if each != key and plain(each) == name)
            told = as_spelled.told(first)
            report.add("E341", f"'{name}' is in the file twice, as '{first if told == key else told}' and as '{key}'")
        elif name in expected:
            found[name] = tensor
        elif not any(test(key, plan) for test in (_is_duplicate, _repeats_shared, _is_unread)):
            base = base_name(key, base_shapes or {})
            if base is None or base_shapes is None:
                unexpected.append(key)
            else:
                _compare_base(report, base, tensor, base_shapes[base], base_tensors)
    missing = [key for key, entry in expected.items() if key not in found and not entry.optional and key not in lost]
    for key in missing:
        report.add("E340", f"missing key '{key}'", partial(_moved, key, unexpected))
    for key in unexpected:
        report.add("E341", f"unexpected key '{as_spelled.told(key)}'", partial(did_you_mean, prefixed(key), missing))
    sizes = {key: tuple(each.shape) for key, each in found.items() if tuple(each.shape) != expected[key].shape}
    other = {
        key: f"'{key}' has shape {_size(size)}, expected {_size(expected[key].shape)}" for key, size in sizes.items()
    }
    if other and ignore_mismatched_sizes:
        warnings.warn(f"{where}: left unread: {'; '.join(other.values())}", stacklevel=4)
        found = {key: each for key, each in found.items() if key not in other}
        other = {}
    for key, message in other.items():
        report.add("E342", message, _reason(expected[key], sizes[key]))
    report.finish()
    held = [key for key, entry in expected.items() if key in found and not entry.computed]
    return {expected[key].key: found[key].reshape(expected[key].used) for key in held}


# --- what is kept of a budget ---


def kept_masks(plan: AdapterPlan, masks: Mapping[ParamKey, Tensor]) -> dict[str, list[bool]]:
    """Masks by the names PEFT gives the masked parameters."""
    keys = {key: name.removeprefix(PREFIX) for name, key in checkpoint_keys(plan).items()}
    return {keys[key]: mask.tolist() for key, mask in masks.items()}


def unpruned(
    plan: AdapterPlan, tensors: Mapping[str, Tensor], masks: Mapping[str, Sequence[bool]], *, where: str
) -> tuple[dict[str, Tensor], dict[ParamKey, Sequence[bool]]]:
    """A file's tensors at their full sizes, and its masks by what they mask.

    Raises:
        CheckpointError: a mask belongs to nothing, or its length or number of kept entries is not the tensors'.
    """
    if not masks:
        return dict(tensors), {}
    groups = {each.vector: each for each in budgeted(plan)}
    names = {key: name for name, key in checkpoint_keys(plan).items()}
    vectors = {names[key].removeprefix(PREFIX): key for key in groups}
    spelled = {prefixed(key): key for key in tensors}
    full, found = dict(tensors), dict[ParamKey, Sequence[bool]]()
    report = _Report(where)
    for name, kept in masks.items():
        if name not in vectors:
            help = partial(did_you_mean, name, vectors)
            report.add("E344", f"a mask for '{name}', which is no vector of the adapter", help)
            continue
        group = groups[vectors[name]]
        found[group.vector] = kept
        if len(kept) != group.count:
            report.add("E344", f"the mask of '{name}' has {len(kept)} entries, expected {group.count}")
            continue
        for key, axis in group.parts:
            spelling = spelled.get(names[key])
            if spelling is None or tensors[spelling].dim() <= axis:
                continue
            size = tensors[spelling].shape[axis]
            if size == sum(kept):
                full[spelling] = expanded(tensors[spelling], axis, kept)
            elif size != len(kept):
                report.add("E344", f"'{spelling}' holds {size} entries, and the mask of '{name}' keeps {sum(kept)}")
    report.finish()
    return full, found


# --- names ---


def prefixed(key: str) -> str:
    """The key with PEFT's prefix, once."""
    return PREFIX + key.removeprefix(PREFIX)


def _aliases(plan: AdapterPlan, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Other spellings in the file: older PEFTs save the bias of an adapted module without `.base_layer`."""
    aliases: dict[str, str] = {}
    wrappers = wrappers_of(plan)
    spelled = {prefixed(key): key for key in tensors}
    read = {name: base_key(plan, name) for copy in plan.copies for name in copy.read}
    for key in tensors if read else ():
        name = base_name(key, read)
        if name is not None:
            aliases[key] = read[name]
    for copy in (each for each in plan.trained if not each.saved):
        wrapped = wrapped_name(copy.module, wrappers, itself=True)
        for tensor, _, _ in copy.tensors:
            plain, wanted = f"{PREFIX}{copy.module}.{tensor}", f"{PREFIX}{wrapped}.{tensor}"
            if plain in spelled and wanted not in spelled:
                aliases[spelled[plain]] = wanted
    return aliases


def _is_duplicate(key: str, plan: AdapterPlan) -> bool:
    """Whether the key repeats a trained module's tensor, or holds its untrained original (bias = all saves both)."""
    copies = [copy for copy in plan.trained if not copy.is_bias and not copy.saved]
    modules = {full.rpartition(".")[0] for copy in copies for _, full in copy.tied} | {each.module for each in copies}
    name = key.removeprefix(PREFIX)
    for wrapper in (".original_module.", ".modules_to_save."):
        module, found, _ = name.partition(wrapper)
        if found and module in modules:
            return True
    return False


def _repeats_shared(key: str, plan: AdapterPlan) -> bool:
    """Whether the key is of a site and repeats what all sites share: some of PEFT's layers hold the shared tensors."""
    return any(prefixed(key).endswith(f".{each.saved}") for each in plan.shared if each.saved)


def _is_unread(key: str, plan: AdapterPlan) -> bool:
    """Whether the key is one that the method knows to change nothing."""
    return any(f".{each}." in f"{key}." for each in plan.spec.rule.unread)


# --- messages ---


@dataclass
class _Report:
    """Collects problems; of each kind the first few are spelled out and the rest counted."""

    where: str
    problems: dict[str, list[tuple[str, str | Callable[[], str]]]] = field(default_factory=dict)

    def add(self, code: str, message: str, help: str | Callable[[], str] = "") -> None:
        self.problems.setdefault(code, []).append((message, help))

    def finish(self) -> None:
        """Raise if there was a problem. Help is worked out only for what is shown: looking for near names is slow."""
        diagnostics = []
        for code, problems in self.problems.items():
            for message, help in problems[:_SHOWN]:
                text = help if isinstance(help, str) else help()
                diagnostics.append(Diagnostic(code, message, help=text, where=self.where))
            if len(problems) > _SHOWN:
                rest = f"... and {len(problems) - _SHOWN} more of this kind"
                diagnostics.append(Diagnostic(code, rest, where=self.where))
        if diagnostics:
            raise CheckpointError(*diagnostics)


def _moved(key: str, unexpected: Sequence[str]) -> str:
    """A help line when the file has the same key under another parent: an adapter of a bare or a wrapped model."""
    name = key.removeprefix(PREFIX)
    for each in unexpected:
        other = each.removeprefix(PREFIX)
        if name.endswith(f".{other}") or other.endswith(f".{name}"):
            return f"the file has '{each}': it was saved from a model that holds this one, or is held by it"
    return ""


def _compare_base(
    report: _Report,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    base_tensors: Callable[[str], Tensor | None] | None,
) -> None:
    if tuple(tensor.shape) != tuple(shape):
        report.add(
            "E343",
            f"the file holds its own '{name}' of shape {_size(tensor.shape)}, but the model's is {_size(shape)}",
            f"resize the model as it was in training: model.resize_token_embeddings({tensor.shape[0]})",
        )
        return
    base = base_tensors(name) if base_tensors else None
    if base is not None and not base.is_meta and not is_same(tensor, base):
        report.add(
            "E343",
            f"the file holds its own '{name}', which differs from the model's",
            "the adapter was trained on other base weights: load the model it was trained on; if these were trained "
            "with it, put the file's into the model first",
        )


def _reason(entry: Entry, shape: tuple[int, ...]) -> str:
    """The likely cause of a wrong shape, read off the axis that differs."""
    if len(shape) != len(entry.shape):
        return "the file was written for another kind of module"
    if entry.planned is not None and entry.planned.site.groups > 1:
        return (
            "in PEFT's LoRA every group of a convolution reads the channels of all, which no change of its weight does"
        )
    if entry.key.role == ROWS:
        if shape[0] != entry.shape[0]:
            return f"the file holds rows for {shape[0]} tokens, and its config names {entry.shape[0]}"
        return f"the model it was trained on has embeddings of {shape[1]} numbers, this one of {entry.shape[1]}"
    if entry.planned is None:
        return "the model was made with another vocabulary size or another number of labels"
    site, rule = entry.planned.site, entry.planned.bound.rule
    if site.kind in WHOLE:
        if shape[-1] != entry.shape[-1]:
            return (
                f"the model it was trained on takes {shape[-1]} numbers for a virtual token, this one {entry.shape[-1]}"
            )
        return f"the file holds {shape[0]} virtual tokens, and its config names {entry.shape[0]}"
    symbols = {param.role: param.shape for param in rule.params}[entry.key.role.partition(".")[0]]
    hyperparameters = {each.name for each in rule.hyperparameters}
    reasons = []
    for symbol, ours, theirs in zip(symbols, entry.shape, shape, strict=False):
        if ours == theirs or not isinstance(symbol, tree.Name):
            continue
        if symbol.id in hyperparameters:
            theirs, rest = divmod(theirs, site.count)
            if not rest:
                reasons.append(f"the adapter was saved with {symbol.id} = {theirs}, not {ours // site.count}")
        elif site.kind == "embedding" and symbol.id == "in":
            reasons.append(f"the model it was trained on has a vocabulary of {theirs}, this one of {ours}")
        else:
            reasons.append(f"the model it was trained on has {theirs} features there, this one {ours}")
    return "\n".join(reasons)


def _size(shape: Sequence[int]) -> str:
    return f"[{', '.join(str(each) for each in shape)}]"

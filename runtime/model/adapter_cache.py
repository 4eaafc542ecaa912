"""Adapters that are loaded when rows ask for them, as many at a time as there is room for."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

from peftc.grammar.diagnostics import UsageError, did_you_mean, fail
from peftc.passes.foreign.peft import BASE_ROWS
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.peft_format.adapter_files import CONFIG


class AdapterCache:
    """Saved adapters, of which a model holds so many as were asked for last.

    `adapters` says by name where each lies: a mapping, or a directory that has an adapter in each of some directories.
    A name that is asked for is loaded, with `options` as `load_adapter` has them; where there would be more than
    `capacity`, the one that was asked for least recently is deleted. Adapters that the model has otherwise are left
    alone. A trained adapter belongs elsewhere: what is deleted is not saved.

    Raises UsageError: a capacity below 1, no adapter in a directory, a name that the model has already (E533).
    """

    def __init__(
        self,
        model: Any,
        adapters: Mapping[str, str | PathLike[str]] | str | PathLike[str],
        capacity: int = 32,
        **options: Any,
    ) -> None:
        if not isinstance(model, AdaptedModule):
            fail(UsageError, "E533", f"a {type(model).__name__} is no adapted model", help="call apply or load first")
        if capacity < 1:
            fail(UsageError, "E533", f"a cache of {capacity} adapters", help="give room for one at least")
        self._model: Any = model
        self._places = {name: Path(place) for name, place in _places(adapters).items()}
        taken = [name for name in model._adapter_state.names() if name in self._places]
        if taken:
            message = f"the model has an adapter {taken[0]!r} that is not from the cache"
            fail(UsageError, "E533", message, help="give the one in the cache another name")
        self.capacity = capacity
        self._options = options
        self._held: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.RLock()
        self._reader: ThreadPoolExecutor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters that can be asked for."""
        return tuple(self._places)

    @property
    def held(self) -> tuple[str, ...]:
        """Those that the model holds now, the least recently asked for first."""
        return tuple(self._held)

    def fetch(self, names: Sequence[str]) -> list[str]:
        """Let the model hold these, and return them: `model(ids, adapter_names=cache.fetch(names))`.

        Names of the model's own, and "__base__", may be among them. All or none: raises UsageError, before anything is
        loaded or deleted, for an unknown name (E510) and for more than there is room for (E533).
        """
        with self._lock:
            wanted = list(dict.fromkeys(name for name in names if self._is_ours(name)))
            if len(wanted) > self.capacity:
                message = f"{len(wanted)} adapters are asked for at once, and there is room for {self.capacity}"
                fail(UsageError, "E533", message, help="split the batch, or give the cache a larger capacity")
            for name in wanted:
                if name in self._held:
                    self._held.move_to_end(name)
            missing = [name for name in wanted if name not in self._held]
            surplus = max(0, len(self._held) + len(missing) - self.capacity)
            leaving = [name for name in self._held if name not in wanted][:surplus]
            # One goes when the next comes: a file that cannot be read costs no more than that.
            for place, name in enumerate(missing):
                if place >= len(missing) - len(leaving):
                    self._drop(leaving.pop(0))
                before = self._model._adapter_state.active
                self._model.load_adapter(self._places[name], adapter_name=name, **self._options)
                self._model._adapter_state.activate(before)  # the first that is loaded would be active
                self._held[name] = None
            return list(names)

    def prefetch(self, names: Iterable[str]) -> None:
        """Read the files of these in the background, so that the system has them in memory when they are fetched.

        Raises UsageError for an unknown name.
        """
        places = [self._places[name] for name in names if self._is_ours(name) and name not in self._held]
        with self._lock:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "peftc-prefetch")
            for place in places:
                self._reader.submit(_read_through, place)

    def clear(self) -> None:
        """Delete from the model what the cache has loaded."""
        with self._lock:
            for name in list(self._held):
                self._drop(name)

    def _is_ours(self, name: str) -> bool:
        if name in self._places:
            return True
        known = (*self._places, *self._model._adapter_state.names())
        if name != BASE_ROWS and name not in known:
            help = did_you_mean(name, known) or f"there are {len(known)} adapters"
            fail(UsageError, "E510", f"there is no adapter {name!r}", help=help)
        return False

    def _drop(self, name: str) -> None:
        del self._held[name]
        if name in self._model._adapter_state.names():  # nobody else has deleted it
            self._model.delete_adapter(name)


def _places(adapters: Mapping[str, str | PathLike[str]] | str | PathLike[str]) -> Mapping[str, str | PathLike[str]]:
    if isinstance(adapters, Mapping):
        return adapters
    found = {each.name: each for each in sorted(Path(adapters).iterdir()) if (each / CONFIG).is_file()}
    if not found:
        message = f"no directory in {Path(adapters)} has an adapter"
        fail(UsageError, "E533", message, help="give the directory that has those of the adapters in it")
    return found


def _read_through(place: Path) -> None:
    for each in place.glob("adapter_*"):
        with each.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass

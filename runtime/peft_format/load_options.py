"""How a checkpoint is loaded, as one value: what `load` and `load_adapter` take as arguments. Needs no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from peftc.grammar.method.rule import Value

PREFIXES = ("base_model.model.", "base_model.")  # with which PEFT's keys begin


@dataclass(frozen=True)
class LoadOptions:
    """Where a checkpoint lies, how it is read, and what becomes of its adapter.

    Every field is an argument of `load`, which says what it means.
    """

    is_trainable: bool = False
    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | PathLike[str] | None = None
    local_files_only: bool = False
    allow_pickle: bool = False
    autocast_adapter_dtype: bool = True
    low_cpu_mem_usage: bool = False  # PEFT's, for what is always so here
    use: str | PathLike[str] | None = None
    values: Mapping[str, Value] | None = None
    strict: bool = False
    key_mapping: Mapping[str, str] | None = None
    config: Any | None = None
    ignore_mismatched_sizes: bool = False

    def renamed(self, key: str) -> str:
        """A key of the file as `key_mapping` has it: by the first of its patterns that is found, without a prefix."""
        prefix = next((each for each in PREFIXES if key.startswith(each)), "")
        name = key.removeprefix(prefix)
        for pattern, replacement in (self.key_mapping or {}).items():
            made, count = re.subn(pattern, replacement, name)
            if count:
                return prefix + made
        return key

    @property
    def cache(self) -> Path | None:
        """Where downloads are kept, if not where the Hub's library has it."""
        return None if self.cache_dir is None else Path(self.cache_dir)

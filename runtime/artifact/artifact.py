"""An exported artifact: loaded, called and generated from with torch alone."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, UsageError, did_you_mean, fail
from peftc.passes.foreign.peft import BASE_ROWS
from peftc.runtime.artifact.checks import NOBODY, ROUTE, Checks, dtype_of
from peftc.runtime.artifact.decoding import decode, generation_of, read_prompt
from peftc.runtime.artifact.files import check_files
from peftc.runtime.artifact.manifest import AGAIN, BANK, ArtifactManifest, Entry, TensorGroup, read_manifest
from peftc.runtime.artifact.programs import Program, Value, load_program
from peftc.runtime.artifact.sampling import Sampling
from peftc.runtime.artifact.tensors import read_tensors

Adapter = str | Sequence[str] | Mapping[str, Tensor]


class Artifact:
    """What `peftc export` wrote. `artifact(entry, inputs)` runs one of its programs, `generate` all that it takes.

    Programs are loaded when they are first used; entries of one file share it.
    """

    def __init__(self, directory: Path, manifest: ArtifactManifest):
        self.directory, self.manifest = directory, manifest
        self._checks = {name: Checks(each, manifest) for name, each in manifest.entries.items()}
        self._programs: dict[str, Program] = {}
        self._adapters: dict[str, dict[str, Tensor]] = {}
        self._banks: dict[torch.device, dict[str, Tensor]] = {}

    @classmethod
    def load(cls, directory: str | PathLike[str], *, verify: bool = True) -> "Artifact":
        """Open an artifact, and check that it is what was written.

        Digests tell damage, not who wrote the files: a program may hold pickles, which run code when they are loaded,
        so load only what you trust.

        Args:
            directory: What `peftc export` wrote.
            verify: Check the digest of every file, not only its size.

        Raises:
            CheckpointError: there is no artifact (E600, E601), it is of a later format (E602), the manifest is wrong
                (E603), or a file is missing, changed (E604) or outside of the directory (E605).
        """
        home = Path(directory)
        manifest = read_manifest(home)
        check_files(home, manifest.files, digests=verify)
        return cls(home, manifest)

    def __call__(self, entry: str, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        """Run an entry, without gradients.

        Args:
            entry: "forward", or "prefill" and "decode".
            inputs: A tensor for every input by name, of the manifest's type and shape; for "adapter" a dict of tensors.

        Returns:
            The outputs by name.

        Raises:
            UsageError: there is no such entry (E610), an input is missing or unknown (E611), of another type (E612),
                shape (E613) or size (E614), names an adapter that is not there (E615), or the program fails on the
                values (E619).
            CheckpointError: the program cannot be loaded (E606, E608), or an adapter that rows choose from (E616).
        """
        facts = self._entry(entry)
        self._checks[entry](inputs)
        program = self._program(facts)
        try:
            with torch.no_grad():
                return program(facts, self._with_bank(inputs) if facts.bank else inputs)
        except (RuntimeError, IndexError) as error:  # what shapes do not tell: a token that is not in the vocabulary
            lines = str(error).strip().splitlines() or [type(error).__name__]
            fail(UsageError, "E619", f"the program fails on these values: {lines[0]}", where=entry)

    def prepare(self) -> None:
        """Load every program now, and not when it is first used, and the bank. Raises CheckpointError."""
        for each in self.manifest.entries.values():
            self._program(each)
        if self.manifest.bank_tensors:
            self._bank(torch.device("cpu"))

    def adapter(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of the adapters beside the programs, for the input "adapter"; read once.

        Raises:
            UsageError: there is none of this name (E615).
            CheckpointError: its file cannot be read (E616).
        """
        files = self.manifest.adapter_files if self.manifest.adapters == "inputs" else {}
        if name not in files:
            self._no_adapter(name, tuple(files))
        if name not in self._adapters:
            self._adapters[name] = read_tensors(self.directory / files[name])
        return self._adapters[name]

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        adapter: Adapter | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Tensor:
        """Generate tokens, greedily or drawn: those that transformers' `generate` gives.

        Args:
            input_ids: Of prompts, int64 [batch, tokens], padded on the left.
            attention_mask: 1 for tokens, 0 for padding. Without it, what is the token for padding is none.
            max_new_tokens: Stop after so many, or when every row has ended.
            eos_token_id: Tokens that end a row; the manifest's unless said. An empty sequence ends none.
            do_sample: Draw from the distribution.
            temperature: Of that distribution.
            top_k: Draw only from so many tokens.
            top_p: Draw only from the most probable tokens that have this probability together.
            seed: For the same draws again.
            adapter: For adapters as inputs a name in the artifact or a dict of tensors (the one there is, unless said);
                for routed ones a name, or one for each row, "__base__" for a row that has none.
            adapter_ids: For routed adapters, their numbers, int64 [batch], -1 for a row that has none.

        Returns:
            int64 [batch, tokens + new], the prompt in front; of an encoder-decoder [batch, 1 + new]. Behind the end of
            a row comes padding.

        Raises:
            UsageError: the artifact cannot generate (E620), or not from this prompt (E621, E622) or with these options
                (E623, E615); and as calling an entry.
            CheckpointError: the programs cannot be loaded.
        """
        steps = self.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            sampling=Sampling(temperature, top_k, top_p, seed) if do_sample else None,
            adapter=adapter,
            adapter_ids=adapter_ids,
        )
        facts = generation_of(self.manifest, str(self.directory))
        start = input_ids
        if facts.encoder_decoder:
            start = torch.full((len(input_ids), 1), facts.decoder_start_token_id or 0)
        return torch.cat([start, *(each[:, None] for each in steps)], dim=1)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        eos_token_id: int | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        adapter: Adapter | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """As `generate`, with the new tokens one step after the other, each int64 [batch]."""
        facts = generation_of(self.manifest, str(self.directory))
        if max_new_tokens < 1:
            fail(UsageError, "E623", f"max_new_tokens is {max_new_tokens}, it has to be at least 1")
        beside = self._beside(len(input_ids), adapter, adapter_ids)
        prompt = read_prompt(self.manifest, input_ids, attention_mask, beside)
        eos = facts.eos_token_id if eos_token_id is None else eos_token_id
        ends = (eos,) if isinstance(eos, int) else tuple(eos)
        return decode(self, self.manifest, prompt, max_new_tokens=max_new_tokens, eos=ends, sampling=sampling)

    def _beside(self, rows: int, adapter: Adapter | None, adapter_ids: Tensor | None) -> dict[str, Value]:
        """The inputs that choose adapters."""
        manifest = self.manifest
        if adapter_ids is not None and manifest.adapters != "routed":
            message = f"'adapter_ids' is for artifacts with routed adapters, this one has: {manifest.adapters}"
            fail(UsageError, "E615", message)
        if adapter_ids is not None and adapter is not None:
            fail(UsageError, "E615", "give names of adapters or their numbers, not both")
        if manifest.adapters == "routed":
            return {ROUTE: adapter_ids if adapter_ids is not None else self._numbers(rows, adapter)}
        if manifest.adapters == "merged":
            if adapter is not None:
                fail(UsageError, "E615", "the adapters are merged into this artifact: there is none to choose")
            return {}
        if adapter is None:
            if len(manifest.adapter_files) != 1:
                self._no_adapter(None, tuple(manifest.adapter_files))
            adapter = next(iter(manifest.adapter_files))
        if not isinstance(adapter, str | Mapping):
            fail(UsageError, "E615", "one adapter serves a call: give its name, or a dict of its tensors")
        given = self.adapter(adapter) if isinstance(adapter, str) else adapter
        return {each.name: given for each in self._entry("prefill").inputs if isinstance(each, TensorGroup)}

    def _numbers(self, rows: int, adapter: Adapter | None) -> Tensor:
        names = self.manifest.adapter_names
        known = (*names, BASE_ROWS) if self.manifest.has_base else names
        if isinstance(adapter, Mapping):
            help = f"give names: {', '.join(known)}"
            fail(UsageError, "E615", "the adapters are in this artifact, it takes no others", help=help)
        wanted = [adapter] * rows if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(wanted) != rows:
            fail(UsageError, "E615", f"{len(wanted)} adapters for {rows} rows", help="give one, or one for each row")
        for each in wanted:
            if each is None and len(names) == 1:
                continue
            if each == BASE_ROWS and not self.manifest.has_base:
                message = "a row cannot have none of the adapters: this artifact has nothing for that"
                help = "export it again; what stands in front of a text or of a cache does so in every row"
                fail(UsageError, "E615", message, help=help, where=str(self.directory))
            if each not in known:
                self._no_adapter(each, known)
        numbers = {name: number for number, name in enumerate(names)} | {BASE_ROWS: NOBODY, None: 0}
        return torch.tensor([numbers[each] for each in wanted])

    def _with_bank(self, inputs: Mapping[str, Value]) -> Mapping[str, Value]:
        ids = inputs[ROUTE]
        assert isinstance(ids, Tensor)
        return {**inputs, BANK: self._bank(ids.device)}

    def _bank(self, device: torch.device) -> dict[str, Tensor]:
        """What programs take of all adapters: read once, as each call has it."""
        if device not in self._banks:
            rows = [self._row(name) for name in self.manifest.rows]
            self._banks[device] = {
                name: torch.stack([each[name] for each in rows]).to(device) for name in self.manifest.bank_tensors
            }
        return self._banks[device]

    def _row(self, name: str) -> dict[str, Tensor]:
        """What programs take of one adapter. Raises CheckpointError: its file is not what the manifest says."""
        path = self.directory / self.manifest.adapter_files[name]
        found = read_tensors(path)
        for each, facts in self.manifest.bank_tensors.items():
            tensor = found.get(each)
            sizes = tuple(size.number for size in facts.facts.shape)
            if tensor is None or tensor.dtype is not dtype_of(facts.facts) or tensor.shape != sizes:
                message = f"the file has not what programs take of an adapter: {each}"
                fail(CheckpointError, "E616", message, help=AGAIN, where=str(path))
        return found

    def _no_adapter(self, name: str | None, known: tuple[str, ...]) -> None:
        message = "it has to be said which adapter" if name is None else f"there is no adapter '{name}'"
        listed = f"there are {', '.join(known)}" if known else "give a dict of its tensors"
        help = (did_you_mean(name, known) if name else "") or listed
        fail(UsageError, "E615", message, help=help, where=str(self.directory))

    def _entry(self, name: str) -> Entry:
        entries = self.manifest.entries
        if name not in entries:
            help = did_you_mean(name, entries) or f"there are {', '.join(entries)}"
            fail(UsageError, "E610", f"there is no entry '{name}'", help=help, where=str(self.directory))
        return entries[name]

    def _program(self, entry: Entry) -> Program:
        if entry.file not in self._programs:
            self._programs[entry.file] = load_program(self.directory / entry.file, self.manifest)
        return self._programs[entry.file]

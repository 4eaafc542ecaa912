"""export: an adapted model in a form that needs no peftc."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from peftc.compiler.export_model.adding import add_adapters
from peftc.compiler.export_model.artifacts import write_artifact
from peftc.compiler.export_model.entries import length_of
from peftc.compiler.export_model.export_options import CHECKPOINT, MERGED, Adapters, Entry, ExportOptions, Format
from peftc.compiler.export_model.measuring import SEED, check_drift
from peftc.compiler.export_model.merged_facts import adapter_facts, merged_facts
from peftc.compiler.export_model.output import check_target, replaced, seal
from peftc.compiler.export_model.programs import activated
from peftc.compiler.trace.example_inputs import drawn_inputs
from peftc.grammar.diagnostics import UsageError, fail
from peftc.runtime.adapted.mergeable import meant
from peftc.runtime.adapted.together import Named
from peftc.runtime.merge.repack import Quantized
from peftc.runtime.model.merging import write_checkpoint
from peftc.runtime.model.model import AdaptedModel

SHARD = "5GB"


class Exportable(AdaptedModel):
    """An adapted model that can be written in a form that needs no peftc."""

    def export(
        self,
        save_directory: str | PathLike[str],
        *,
        format: Format = "checkpoint",
        adapters: Adapters = "merged",
        entry: Entry | None = None,
        adapter_names: Named | None = None,
        rank: int | None = None,
        example_inputs: Mapping[str, Any] | None = None,
        tokenizer: Any | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_drift: float | None = None,
        min_agreement: float | None = None,
        max_shard_size: int | str | None = None,
        safe_merge: bool = False,
        quantized: Quantized | None = None,
        force: bool = False,
    ) -> tuple[str, ...]:
        """Write the adapted model in a form that needs no peftc: a merged checkpoint, or programs that stand alone.

        The directory appears complete or not at all. It has a manifest.json: the adapters, the versions, the base, the
        size and sha256 of every file, and of programs what they take and give, and how far their outputs are from this
        model's. This model stays as it is.

        A checkpoint is what plain transformers loads. Its weights are merged when their turn to be written comes, so
        that no second model is in memory. A program is made of this model's graph, takes and gives dictionaries of
        tensors and holds its weights; `torch.export.load(file).module()` runs it where only torch is installed, and
        `peftc run` and transformers' `ExportedModel.from_pretrained` take the directory.

        Args:
            save_directory: Where to write.
            format: "checkpoint"; or programs: "pt2" (torch.export), "aoti" (machine code by AOTInductor, for this kind
                of processor), "onnx".
            adapters: Of programs: "merged" has the active adapters in the weights, what changes none as constants;
                "inputs" takes an adapter's tensors with each call, as the dictionary `adapter`; "routed" takes those of
                all of them, as the dictionary `bank`, and `adapter_ids` `[batch]`, int64, the place of each row's in
                `adapter_names`, -1 for none.
            entry: "forward" is the model's forward; "generate" has the calls that generation is made of, `prefill` and
                `decode`, with keys and values as tensors, and the last token's logits. Left out, the latter where the
                model can.
            adapter_names: Which adapters are merged, a list or a mapping to weights as in `merge_adapter`; the active
                ones, if left out. Or which are inputs, or routed: all, if left out. Inputs are to be laid out alike;
                those that are routed may have ranks and sites of their own, of one method at each site.
            rank: Of routed adapters, the rank that there is room for in others that `export_adapters` adds later. Left
                out, at each site the largest of those that are exported.
            example_inputs: Named arguments of a call, for a model of which they cannot be made up. The drift is
                measured with them.
            tokenizer: Saved too, if given.
            max_batch_size: The most rows a program takes; there is no limit without.
            max_length: The most tokens of a row, those in the cache among them; left out, as many as the model has
                positions for.
            max_drift: The largest difference from this model's output that is allowed, in units of the largest output.
                Of a checkpoint it is only measured if this or the next is given: that takes a merged model in memory.
            min_agreement: For a model with logits, the least share of places where both prefer the same.
            max_shard_size: Of one file of a checkpoint's weights, in bytes or as "5GB", which it is if left out.
            safe_merge: Refuse values that are not finite.
            quantized: Of a quantized base, what becomes of the weights, as in `merge_adapter`. Programs have dense
                ones.
            force: Replace a directory that is not an unchanged earlier export.

        Returns:
            The names of the files, sorted.

        Raises:
            UsageError: an option cannot be what it is or has no meaning here, no adapter is active, one cannot be
                merged, the adapters are not alike, `quantized` is not said and needed, the outputs differ too much,
                what a format needs is not installed, or the directory holds something else or cannot be written.
            ModelError: the model's graph cannot be made a program of.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        options = ExportOptions(
            format=format,
            adapters=adapters,
            entry=entry,
            adapter_names=names,
            rank=rank,
            example_inputs=example_inputs,
            tokenizer=tokenizer,
            max_batch_size=max_batch_size,
            max_length=max_length,
            max_drift=max_drift,
            min_agreement=min_agreement,
            max_shard_size=max_shard_size,
            safe_merge=safe_merge,
            quantized=quantized,
        )
        return export_adapted(self, Path(save_directory), options, force=force)

    def export_adapters(
        self,
        directory: str | PathLike[str],
        adapter_names: str | Sequence[str] | None = None,
        *,
        force: bool = False,
    ) -> tuple[str, ...]:
        """Add adapters to an artifact that takes them as inputs, or has rows choose from them: a file for each, and a
        line in its manifest.

        Nothing is compiled, and the programs stay as they are. Whoever has opened the artifact sees them when it is
        opened again.

        Args:
            directory: What `export(..., adapters="inputs")` or `"routed"` wrote.
            adapter_names: Which adapters; all, if left out. They are to be laid out like those that are there. Where
                rows choose, they may be of smaller ranks, where a term is of low rank, and at fewer sites: what they
                have not is as in the base. There may be any number of them.
            force: Replace adapters of the same names.

        Returns:
            The names of the new files.

        Raises:
            UsageError: an adapter is laid out in another way (E646), is of a larger rank than there is room for (E655)
                or is there already, the base is another one, the artifact takes no adapters, or it cannot be written.
            CheckpointError: the directory is no artifact.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        _check_names(self, names)
        return add_adapters(self, Path(directory), names or self._adapter_state.names(), force=force)


def export_adapted(adapted: Exportable, target: Path, options: ExportOptions, *, force: bool) -> tuple[str, ...]:
    """Write an adapted model as the options say: see `AdaptedModel.export`. Returns the names of the files."""
    options.check()
    names = options.adapter_names
    _check_names(adapted, None if names is None else list(names))
    _check_length(adapted, options.max_length)
    check_target(target, force=force)
    chosen = _merged(adapted, names) if options.adapters == MERGED and names is not None else nullcontext()
    with chosen, replaced(target) as directory:
        if options.format == CHECKPOINT:
            facts = {**_measured(adapted, options), **merged_facts(adapted)}
            size = SHARD if options.max_shard_size is None else options.max_shard_size
            write_checkpoint(
                adapted, directory, max_shard_size=size, safe=options.safe_merge, quantized=options.quantized
            )
            if options.tokenizer is not None:
                options.tokenizer.save_pretrained(directory)
        else:
            listed = None if names is None else list(names)
            facts = merged_facts(adapted) if options.adapters == MERGED else adapter_facts(adapted, listed)
            facts |= write_artifact(adapted, directory, options)
        return seal(directory, facts)


def _merged(adapted: Exportable, names: Named) -> AbstractContextManager[None]:
    """These adapters active, which those are that are merged. Raises UsageError where they cannot be."""
    state = adapted._adapter_state
    if state.base.is_merged:
        message = "the model is merged already, and which adapters are to be is said"
        fail(UsageError, "E516", message, help="call unmerge_adapter first, or leave adapter_names out")
    return activated(adapted, meant(state, names))


def _measured(adapted: Exportable, options: ExportOptions) -> dict[str, Any]:
    """What the manifest of a checkpoint is to say of its drift, if there is a limit to it. Raises UsageError."""
    inputs = options.example_inputs
    if options.max_drift is None and options.min_agreement is None:
        return {}
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        given = drawn_inputs(adapted) if inputs is None else inputs
    if not given:
        message = f"it is not known how {adapted.base_class.__name__} is called"
        fail(UsageError, "E642", message, help="pass example_inputs, a mapping of named arguments")
    drift = adapted.merge_drift(quantized=options.quantized, **given).outputs
    assert drift is not None
    check_drift(drift, options.max_drift, options.min_agreement)
    return {"drift": {**asdict(drift), "inputs": "drawn" if inputs is None else "given"}}


def _check_names(adapted: AdaptedModel, names: Sequence[str] | None) -> None:
    """Raise UsageError where one of the adapters is not there, or is named twice."""
    for index, name in enumerate(names or ()):
        adapted._adapter_state.adapter(name)
        if name in (names or ())[:index]:
            fail(UsageError, "E512", f"adapter {name!r} is named twice", help="name it once")


def _check_length(adapted: AdaptedModel, length: int | None) -> None:
    """Raise UsageError where rows would be longer than the model has positions for."""
    most = length_of(adapted)
    if length is not None and most is not None and length > most:
        message = f"max_length is {length}, and the model has positions for {most}"
        fail(UsageError, "E649", message, help="give no more, or leave it out")

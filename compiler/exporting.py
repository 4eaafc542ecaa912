"""export: the adapters of a checkpoint merged into a model, written as a checkpoint of its own."""

from os import PathLike

from peftc.compiler.drifting import adapted_by
from peftc.compiler.facts import ExportFacts
from peftc.compiler.models import FoundModel, seeded
from peftc.grammar.spec import Spec
from peftc.runtime.repack import Quantized


def export(
    adapters: Spec | str | PathLike[str],
    model: FoundModel,
    directory: str | PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    safe_merge: bool = False,
    quantized: Quantized | None = None,
    use: str | PathLike[str] | None = None,
    seed: int = 0,
    force: bool = False,
) -> ExportFacts:
    """Merge adapters into a model and write the checkpoint: `AdaptedModel.export` for adapters on disk.

    Args:
        adapters: A checkpoint's directory or Hub id, or a spec (a path to an `.adapter` file or a Spec), whose adapters
            are fresh.
        model: From `find_model`.
        directory: Where to write; it appears complete or not at all.
        max_shard_size: Of one file of weights, in bytes or as "5GB".
        safe_merge: Refuse values that are not finite.
        quantized: Of a quantized base, what becomes of the weights, as in `merge_adapter`.
        use: An `.adapter` file with methods of your own, for a checkpoint.
        seed: For the initial values of a spec's adapters.
        force: Replace a directory that is not an unchanged earlier export.

    Raises:
        AdapterError: the spec, the checkpoint, the model or the directory is wrong, or `quantized` is not said and
            needed.
    """
    with seeded(seed):
        adapted = adapted_by(adapters, model, use)
    files = adapted.export(
        directory, max_shard_size=max_shard_size, safe_merge=safe_merge, quantized=quantized, force=force
    )
    return ExportFacts(str(directory), tuple(adapted.active_adapters()), files)

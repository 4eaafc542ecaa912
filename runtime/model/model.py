"""The adapted model: the user's model class with its forward replaced by graphs, and adapters in them."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from peftc.grammar.diagnostics import ArgumentTypeError, fail
from peftc.grammar.method.rule import Value
from peftc.runtime.adapted.removing import remove
from peftc.runtime.adapted.together import Named, as_active
from peftc.runtime.init.calibration import Batches
from peftc.runtime.init.dense import Source
from peftc.runtime.merge.drift import MergeDrift
from peftc.runtime.merge.repack import Quantized
from peftc.runtime.model import weighted
from peftc.runtime.model.adding import FreshOptions, add_fresh, plan_adapters
from peftc.runtime.model.allocating import regularization_loss, update_and_allocate
from peftc.runtime.model.described import config_and_name, described_route, one_adapter
from peftc.runtime.model.hotswap import make_room, swap_adapter
from peftc.runtime.model.kv_prefix import start_from_cache, start_from_text
from peftc.runtime.model.loading import add_route, load_adapter
from peftc.runtime.model.merging import disabled, measured_drift, merge, merged_model, rest, unmerge, wake
from peftc.runtime.model.saved_model import SavedModel
from peftc.runtime.model.state_dicts import IncompatibleKeys
from peftc.runtime.peft_format.checkpoint import kept_masks
from peftc.runtime.peft_format.load_options import LoadOptions
from peftc.runtime.routing import route


class AdaptedModel(SavedModel):
    """A model with adapters in its graph. Made by `peftc.compiler.apply` and `load`, never directly.

    It is an instance of the user's model class too, with the same forward signature and output class, and shares the
    storage of the user's weights. Its parameters are the base's, frozen, and the adapters', under `adapter_bank`.
    """

    # --- adding and removing ---

    def add_adapter(
        self,
        adapter_config: Any = None,
        adapter_name: Any = None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        peft_config: Any = None,
        calibration: Batches | None = None,
        tokenizer: Any | None = None,
        dense: Source | None = None,
    ) -> None:
        """Add a fresh adapter and activate it, as transformers' `add_adapter`.

        `adapter_config`, or `peft_config`, is a spec (a path, the text itself, a `Spec` or `AdapterSpec` with one
        adapter) or a PEFT config (an object, or its fields as a dict). PEFT's order, the name first, and its keyword
        mean what they mean there: beside an active adapter the new one rests until `set_adapter`.
        `calibration` are the batches that a method needs which starts from data, as in `apply`; the base runs on them.
        `tokenizer` is for tokens that a spec names by their text, for new ones, and for a method that starts from a
        text. `dense` is what a quantized base was made from, as in `apply`, where `autocast_adapter_dtype` and
        `low_cpu_mem_usage` are said too. What the spec says of its `base` has to be so already: an adapter that joins
        others neither quantizes a model nor says where its regions begin. Raises SpecError, CheckpointError (a config
        is not supported) or UsageError (which is a TypeError too for arguments that are missing, given twice or of a
        wrong type) and leaves the model as it was.
        """
        config, name = config_and_name(adapter_config, adapter_name, peft_config)
        if (routed := described_route(config, name)) is not None:
            add_route(self, *routed, LoadOptions(is_trainable=True, autocast_adapter_dtype=autocast_adapter_dtype))
            return
        one, state = one_adapter(config, name), self._adapter_state
        active, surveyed = one.spec.active, state.engine.backend.survey()
        state.check_name(active[0][0], help="choose another name")
        state.engine.backend.check_base(one.spec.base)
        planned = plan_adapters(one.on(surveyed), surveyed, tokenizer)
        one.check(planned.plans, surveyed)
        options = FreshOptions(calibration, tokenizer, dense, upcast=autocast_adapter_dtype)
        rests = bool(state.active) and (peft_config is not None or (name is not None and name is adapter_config))
        add_fresh(self, planned, None if rests else active, options, trainable=one.trains() and not rests)
        state.adapter(active[0][0]).frozen = not one.trains()
        state.base.facts.told(one.facts)
        if not rests:
            self._unmerge_for_others(stacklevel=3)

    def load_adapter(
        self,
        peft_model_id: str | PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_device: str | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        allow_pickle: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        use: str | PathLike[str] | None = None,
        values: Mapping[str, Value] | None = None,
        key_mapping: Mapping[str, str] | None = None,
        config: Any | None = None,
        ignore_mismatched_sizes: bool = False,
        strict: bool = False,
        hotswap: bool | Literal["auto"] = "auto",
    ) -> IncompatibleKeys:
        """Load an adapter from a directory or the Hub beside the others; it becomes active if none is.

        Unless it `is_trainable`, it has no gradient, and the whole model is put into evaluation mode, as in PEFT.

        Where there is an adapter of this name, the file's values are put into its tensors, in place, as a Trainer that
        resumes has it; the file has to be of an adapter like it. Returns missing and unexpected keys, as torch's
        `load_state_dict` does: none, since an adapter that lacks something is refused, but for what
        `ignore_mismatched_sizes` leaves out.

        With `hotswap` the file's adapter takes the place of the one of this name, of whatever rank, sites or method it
        is, and is active and trained as that was. By "auto" it does so once `enable_peft_hotswap` was called.

        Everything is checked before anything changes: the config, every key and shape, the base. Raises
        CheckpointError or UsageError. A manifest of another base only warns: the shapes fit, the user may know better.
        float16 and bfloat16 adapters become float32 unless `autocast_adapter_dtype` is False, which gives them the
        base's type, as in PEFT; its `low_cpu_mem_usage` is accepted and changes nothing, as in `load`. `use` is an
        `.adapter` file with methods of your own; what peftc saved needs none, the definition is in the checkpoint.
        `values` are hyperparameters to be other than the file says, such as `{"peft_compatible": True}`. `key_mapping`,
        `config` and `ignore_mismatched_sizes` are as in `load`. `torch_device` is taken and changes nothing: an adapter
        is where what it adapts is.
        Fields of the config that are not known here, and tensors that no output depends on, are left unread with a
        warning; with `strict` they are refused.
        """
        options = LoadOptions(
            is_trainable=is_trainable,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_pickle=allow_pickle,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            use=use,
            values=values,
            key_mapping=key_mapping,
            config=config,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            strict=strict,
        )
        state = self._adapter_state
        if hotswap is True or (hotswap == "auto" and state.room and adapter_name in state.names()):
            return swap_adapter(self, peft_model_id, adapter_name, options)
        return load_adapter(self, peft_model_id, adapter_name, options)

    def enable_peft_hotswap(
        self, target_rank: int = 128, check_compiled: Literal["error", "warn", "ignore"] = "error"
    ) -> None:
        """Let `load_adapter` put adapters of ranks up to this one in the place of others without compiling anew.

        As transformers' method of that name; adapters may be there already. What a compiler's program reads of adapters
        that are not trained then has this rank, with zeros beyond an adapter's own; what is saved has its own. It is of
        use for methods whose graph fits every rank, such as LoRA; others are compiled anew when another rank comes.
        Raises UsageError: an adapter has a larger rank, or the model is compiled (see `check_compiled`).
        """
        make_room(self, target_rank, check_compiled)

    add_weighted_adapter = weighted.add_weighted_adapter
    set_route = route.set_route
    get_route = route.get_route
    get_route_places = route.get_route_places

    def delete_adapter(
        self, adapter_name: str | Sequence[str] | None = None, *, adapter_names: str | Sequence[str] | None = None
    ) -> None:
        """Remove one adapter, or several; `adapter_names` is what transformers calls them.

        Where no active one is left, the first of the others by name is activated, with a warning, as in PEFT. It is
        trained if what was active was, unless it is frozen: loaded so, or by `set_requires_grad`. Raises UsageError,
        and removes none, for an unknown name and for an adapter that is merged.
        """
        given = [each for each in (adapter_name, adapter_names) if each is not None]
        if len(given) != 1:
            fail(ArgumentTypeError, "E589", "delete_adapter takes the names of adapters, once", help="name them")
        remove(self._adapter_state, [given[0]] if isinstance(given[0], str) else list(given[0]))

    # --- activating ---

    def set_adapter(
        self, adapter_name: str | Sequence[str] | Mapping[str, float], inference_mode: bool = False
    ) -> None:
        """Activate one adapter, several in order, or several with weights; the others rest.

        Gradients reach the active ones unless `inference_mode`. A merged model is unmerged first, with a warning, as
        in PEFT. Switching between adapters of one structure rebinds tensors and does nothing else.
        """
        active = as_active(adapter_name)
        self._adapter_state.check(active)
        self._adapter_state.inputs.check(active)
        self._unmerge_for_others(stacklevel=3)
        self._adapter_state.activate(active, trainable=not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether gradients reach these adapters, active or not. Raises UsageError for an unknown name."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._adapter_state.train(names, requires_grad)

    def disable_adapters(self) -> None:
        """Run as the base model until `enable_adapters`; trained copies of modules, and what is merged, rest too."""
        rest(self._adapter_state)

    def enable_adapters(self) -> None:
        """Undo `disable_adapters`."""
        wake(self._adapter_state)

    def disable_adapter_layers(self) -> None:
        """`disable_adapters`, by PEFT's name."""
        self.disable_adapters()

    def enable_adapter_layers(self) -> None:
        """`enable_adapters`, by PEFT's name."""
        self.enable_adapters()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run as the base model inside the context. What was enabled or merged before is so again after."""
        with disabled(self._adapter_state):
            yield

    # --- merging ---

    def merge_adapter(
        self,
        adapter_names: Named | None = None,
        safe_merge: bool = False,
        *,
        quantized: Quantized | None = None,
    ) -> None:
        """Put the active adapters (or those named) into the weights, until `unmerge_adapter`.

        `adapter_names` are a list, in which an active adapter keeps its weight and others have one, or a mapping to
        weights, as `set_adapter` takes it: `{"a": 0.7, "b": 0.3}` gives W + 0.7 * (W'_a - W) + 0.3 * (W'_b - W), where
        W'_a is the weight with `a` merged alone, of methods that are W plus something. Others adapt what is there, in
        order.

        Those that are merged already stay so, and a warning says it; others are merged beside them, as in PEFT.
        The user's own weights are not written to: merged tensors take their place in this model only. Of a quantized
        base `quantized` says what becomes of the weights: "requantize" rounds the merged ones as the base's were,
        "dequantize" makes every packed weight of the model dense. Raises UsageError, and leaves everything as it was,
        if `quantized` is not said and needed, with `safe_merge` if a merged value is not finite (E520), or if adapters
        cannot be merged so: one is unknown (E510) or named twice (E512), changes no weight (E522), cannot have its
        weight (E513), is merged with another one (E516), or replaces a tensor that another replaces (E514).
        """
        merge(self._adapter_state, adapter_names, safe=safe_merge, quantized=quantized)

    def unmerge_adapter(self) -> None:
        """Give the base its own tensors back, bit for bit.

        They go back to the modules they came from, wherever these are by now; a module that has taken the place of one
        keeps its own. Raises UsageError, and changes nothing, where merged weights were replaced or written to since
        (E586): by `load_state_dict`, an optimizer, an assignment.
        """
        if self._adapter_state.base.is_merged:
            unmerge(self._adapter_state)
        else:
            warnings.warn("the model is not merged, so there is nothing to unmerge", stacklevel=2)

    def merge_drift(self, *args: Any, quantized: Quantized | None = None, **kwargs: Any) -> MergeDrift:
        """What merging the active adapters would cost, measured; the model stays as it is.

        For every tensor that merging would compute, its distance from the exact value of the formula (in float64): next
        to nothing in float32, in bfloat16 the digits it has not, of a weight that is quantized again what that rounds
        away. `quantized` is as in `merge_adapter`. Given the arguments of a call, the model is called
        with them in evaluation mode, unmerged and merged, and the outputs are compared too: their differences and,
        where there are logits, how far the distributions and the preferred tokens are apart.

        Raises UsageError if the adapters are merged already or disabled, if none is active, or if `quantized` is not
        said and needed.
        """
        return measured_drift(self, args, kwargs, quantized)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Named | None = None,
        *,
        quantized: Quantized | None = None,
    ) -> nn.Module:
        """A plain model of the user's class with the active adapters (or those named) in its weights.

        `adapter_names` are a list or a mapping to weights, as in `merge_adapter`, which says what is raised.
        It shares every other tensor with this model, which stays as it is. Where a tied weight was merged for one of
        its uses only, the tie is broken, and the config says so. `quantized` is as in `merge_adapter`: after
        "dequantize" the model is a dense one, for its config too. With `progressbar` a line on the terminal says what
        is waited for, where it takes longer than a second.
        """
        with self._adapter_state.engine.backend.step("merging adapters") if progressbar else nullcontext():
            return merged_model(self, adapter_names, safe=safe_merge, quantized=quantized)

    # --- budgets, and prefixes that start from a text ---

    def update_and_allocate(self, global_step: int) -> None:
        """Follow a training step of the active adapters that keep a budget, as PEFT's method of that name.

        Importance is read off the parameters and their gradients, the budget follows the method's schedule, and what is
        over it is masked. To be called after `optimizer.step()` and before `optimizer.zero_grad()`, with steps counted
        from 0; with transformers' Trainer, `RankAllocation` calls it. Raises UsageError.
        """
        update_and_allocate(self._adapter_state, global_step)

    def rank_pattern(self, adapter_name: str) -> dict[str, list[bool]]:
        """Which entries of its budget an adapter keeps, by parameter, as PEFT's config field of that name.

        Empty before any was dropped. Raises UsageError for an unknown adapter.
        """
        adapter = self._adapter_state.adapter(adapter_name)
        return {} if adapter.allocator is None else kept_masks(adapter.plan, adapter.allocator.masks)

    def regularization_loss(self) -> torch.Tensor:
        """The regulariser of the active adapters, zero where their methods have none.

        In training mode it is part of the loss that the model returns; a loss made from logits has to add it.
        """
        return regularization_loss(self._adapter_state)

    def initialize_kv_prefix_from_text(
        self,
        tokenizer: Any,
        *,
        text: str,
        adapter_name: str | None = None,
        use_chat_template: bool = True,
        max_length: int | None = None,
    ) -> torch.Tensor:
        """Start a prefix or cartridge as the keys and values of a text's first tokens, as peft's function of that name.

        The model then goes on as if the text, as far as the prefix is long, stood in front. The base computes them, in
        evaluation mode and without adapters; tokens beyond the prefix's length are not run, and windows that layers
        slide over the text leave nothing out.

        Args:
            tokenizer: the model's, which makes tokens of the text.
            text: what to start from, of at least as many tokens as the prefix has.
            adapter_name: which adapter; left out, the only active one with a prefix.
            use_chat_template: take the text as a system message, if the tokenizer has a template for one.
            max_length: cut the text to so many tokens.

        Returns:
            The values, `[length, 2 * layers * heads * size]`, as the model computed them.

        Raises:
            UsageError: no one adapter is meant (E569), it cannot start from keys and values (E570), the text has too
                few tokens (E571), or the tokenizer is not one, or not the model's (E565, E566).
        """
        return start_from_text(
            self, tokenizer, text, adapter_name, use_chat_template=use_chat_template, max_length=max_length
        )

    def initialize_kv_prefix_from_past_key_values(
        self, *, past_key_values: Any, adapter_name: str | None = None
    ) -> torch.Tensor:
        """Start a prefix or cartridge as the first keys and values of a cache, as peft's function of that name.

        `past_key_values` is a cache of transformers of any kind, or a pair `[1, heads, tokens, size]` for each layer;
        `adapter_name` may be left out where only one active adapter has a prefix. Returns the values, `[length, 2 *
        layers * heads * size]`. Raises UsageError, and changes nothing: no one adapter is meant (E569), it cannot start
        from keys and values (E570), the cache has too few tokens, or not the first ones (E571), or is not one of a
        single text and of this model's layers (E572).
        """
        return start_from_cache(self, past_key_values, adapter_name)

    def _unmerge_for_others(self, *, stacklevel: int) -> None:
        if self._adapter_state.base.is_merged:
            warnings.warn("the merged adapters are unmerged before others are activated", stacklevel=stacklevel)
            unmerge(self._adapter_state)

"""What PEFT's users ask of a model, compared with PEFT's answers for the same adapters on the same model."""

import warnings

import peft
import pytest
import torch
import transformers as hf

from peftc import compiler
from peftc.grammar.diagnostics import ArgumentTypeError, UsageError

IDS = torch.tensor([[1, 5, 9, 17, 23]])
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "default": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "other": peft.LoraConfig(r=2, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "third": peft.LoHaConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"),
}
WITH_A_HEAD = {
    "default": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "other": peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]),
}


def base():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()


def both(tmp_path, configs):
    """PEFT's model with these adapters, and ours with the same, the first trained, the others frozen."""
    (first, config), *others = configs.items()
    theirs = peft.get_peft_model(base(), config, first)
    for name, other in others:
        theirs.add_adapter(name, other)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if any(f".{name}" in key for name in configs):
                value.add_(torch.randn_like(value) * 0.2)
    theirs.save_pretrained(tmp_path)
    ours = compiler.load(base(), tmp_path, adapter_name=first, is_trainable=True)
    for name, _ in others:
        ours.load_adapter(tmp_path / name, name)
    return ours.eval(), theirs.eval()


def layers(model):
    told = {}
    for each in model.get_layer_status():
        told[each.name] = (
            each.enabled,
            each.active_adapters,
            each.merged_adapters,
            each.requires_grad,
            each.available_adapters,
            {name: list(kinds) for name, kinds in each.devices.items()},
            each.quantization_backend,
        )
    return told


def whole(model):
    told = vars(model.get_model_status()).copy()
    told["peft_types"] = {name: str(getattr(kind, "value", kind)) for name, kind in told["peft_types"].items()}
    return told


def steps(ours, theirs):
    yield "at first"
    for model in (ours, theirs):
        model.set_adapter("other")
    yield "another active"
    for model in (ours, theirs):
        model.merge_adapter()
    yield "merged"
    for model in (ours, theirs):
        model.unmerge_adapter()
        model.set_requires_grad("default", True)
    yield "one at rest is trained"
    for model in (ours, theirs):
        model.set_requires_grad(["default", "other"], False)
    yield "nothing is trained"
    for model in (ours, theirs):
        model.disable_adapter_layers()
    yield "disabled"


@pytest.mark.parametrize("configs", [{name: CONFIGS[name] for name in ("default", "other")}, WITH_A_HEAD])
@pytest.mark.filterwarnings("ignore")
def test_status_of_layers_and_model(configs, tmp_path):
    ours, theirs = both(tmp_path, configs)
    seen = []
    for when in steps(ours, theirs):
        assert layers(ours) == layers(theirs), when
        got, wanted = whole(ours), whole(theirs)
        if wanted["active_adapters"] == "irregular":  # a module that is trained whole by another adapter
            wanted["active_adapters"] = theirs.active_adapters
        assert got == wanted, when
        seen.append((got["merged_adapters"], got["active_adapters"], got["enabled"], got["trainable_params"]))
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    assert len({str(each) for each in seen}) == len(seen), "every step changes something"


def test_a_prompt_has_no_layers():
    adapted = compiler.apply(base(), "adapter a = prompt(length = 2)")
    for ask in (adapted.get_layer_status, adapted.get_model_status):
        with pytest.raises(ArgumentTypeError, match="E587") as caught:
            ask()
        assert isinstance(caught.value, TypeError)


def test_names_are_properties_and_may_be_called(tmp_path):
    ours, theirs = both(tmp_path, {name: CONFIGS[name] for name in ("default", "other")})
    assert ours.active_adapters == ours.active_adapters() == theirs.active_adapters == ["default"]
    assert ours.active_adapter == ours.active_adapter() == "default"
    ours.set_adapter(["other", "default"])
    assert ours.active_adapter == ours.active_adapters == ["other", "default"]
    ours.set_adapter([])
    assert ours.active_adapters == ours.active_adapter == []
    with pytest.raises(UsageError, match="E588"):
        ours.active_peft_config  # noqa: B018


def test_configurations(tmp_path):
    ours, theirs = both(tmp_path, {name: CONFIGS[name] for name in ("default", "other")})
    assert list(ours.peft_config) == list(theirs.peft_config)
    for name, wanted in theirs.peft_config.items():
        got = ours.peft_config[name]
        assert type(got) is type(wanted)
        left = {"peft_version", "inference_mode", "target_modules", "runtime_config"}
        same = {key: value for key, value in wanted.to_dict().items() if key not in left}
        assert {key: got.to_dict()[key] for key in same} == same
        assert set(got.target_modules) == set(wanted.target_modules)
    assert ours.peft_config["other"] is ours.peft_config["other"]
    assert (ours.active_peft_config.r, ours.peft_config["other"].inference_mode) == (4, True)
    ours.delete_adapter("other")
    assert list(ours.peft_config) == ["default"]


def test_a_method_that_peft_has_not_has_a_configuration():
    method = """
        method halved(rank: int = 2) {
            on linear
            param A[rank, in] = normal saved "A"
            param B[out, rank] = zeros saved "B"
            W' = W + B @ A
        }
        adapter a = halved(rank = 3) { on q_proj }
    """
    config = compiler.apply(base(), method).peft_config["a"]
    assert config.peft_type == "PEFTC"
    assert "halved(rank = 3)" in config.spec
    assert config.to_dict()["spec"] == config.spec


def test_set_requires_grad_of_nobody(tmp_path):
    ours, _ = both(tmp_path, {name: CONFIGS[name] for name in ("default", "other")})
    before = [each.requires_grad for each in ours.parameters()]
    with pytest.raises(UsageError, match="E510"):
        ours.set_requires_grad(["other", "nobody"])
    assert [each.requires_grad for each in ours.parameters()] == before


# --- merged, one after the other ---


def after(ours, theirs, verb, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (ours, theirs):
            getattr(model, verb)(*args, **kwargs)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kinds", [("default", "other"), ("other", "third"), ("third", "other")])
def test_merged_one_after_the_other(kinds, tmp_path):
    first, second = kinds
    if "third" in kinds:  # PEFT's models have one method each: another oracle
        ours, lone = both(tmp_path / "a", {"default": CONFIGS[first]})
        both(tmp_path / "b", {"default": CONFIGS[second]})
        ours.load_adapter(tmp_path / "b", second)
        first = "default"
        base_logits = ours.unload()(IDS).logits
        ours.merge_adapter([first])
        with pytest.warns(UserWarning, match="beside what is merged"):
            ours.merge_adapter([second])
        plain = lone.merge_and_unload()
        wanted = peft.PeftModel.from_pretrained(plain, tmp_path / "b").merge_and_unload().eval()
        torch.testing.assert_close(ours(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-4)
        ours.unmerge_adapter()
        assert torch.equal(ours.unload()(IDS).logits, base_logits)
        return
    ours, theirs = both(tmp_path, {name: CONFIGS[name] for name in kinds})
    after(ours, theirs, "merge_adapter", [first])
    after(ours, theirs, "merge_adapter", [first, second])
    assert [name for name, _ in ours._adapter_state.base.merged] == [first, second]
    after(ours, theirs, "merge_adapter", [second])
    ours.unmerge_adapter()
    assert all(
        torch.equal(own, each) for own, each in zip(ours.unload().parameters(), base().parameters(), strict=True)
    )


def test_merged_again_is_said_and_changes_nothing(tmp_path):
    ours, _ = both(tmp_path, {"default": CONFIGS["default"]})
    ours.merge_adapter()
    held = list(ours.parameters())
    with pytest.warns(UserWarning, match="already merged, nothing to do: default"):
        ours.merge_adapter()
    assert all(now is then for now, then in zip(ours.parameters(), held, strict=True))


def test_more_is_merged_while_disabled(tmp_path):
    ours, theirs = both(tmp_path, {name: CONFIGS[name] for name in ("default", "other")})
    plain = base()(IDS).logits
    ours.merge_adapter(["default"])
    ours.disable_adapters()
    with pytest.warns(UserWarning, match="beside what is merged"):
        ours.merge_adapter(["other"])
    torch.testing.assert_close(ours(IDS).logits, plain)
    ours.enable_adapters()
    after(ours, theirs, "merge_adapter", ["default", "other"])


def test_more_that_cannot_be_merged_leaves_what_is(tmp_path):
    ours, _ = both(tmp_path, {name: CONFIGS[name] for name in ("default", "other")})
    with torch.no_grad():
        next(ours.get_submodule("adapter_bank.other").parameters()).fill_(float("nan"))
    ours.merge_adapter(["default"])
    before = ours(IDS).logits
    with pytest.raises(ValueError, match="NaN"), pytest.warns(UserWarning, match="beside"):
        ours.merge_adapter(["other"], safe_merge=True)
    assert torch.equal(ours(IDS).logits, before)
    assert [name for name, _ in ours._adapter_state.base.merged] == ["default"]
    ours.unmerge_adapter()


@pytest.mark.parametrize(
    "arguments", [(True,), (False, True), (False, False, ["other"]), (False, True, ["default", "other"])]
)
def test_merge_and_unload_takes_pefts_arguments(arguments, tmp_path):
    ours, theirs = both(tmp_path, {name: CONFIGS[name] for name in ("default", "other")})
    with torch.no_grad():
        got, wanted = (model.merge_and_unload(*arguments)(IDS).logits for model in (ours, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_merge_and_unload_of_more_than_what_is_merged(tmp_path):
    ours, theirs = both(tmp_path, {name: CONFIGS[name] for name in ("default", "other")})
    for model in (ours, theirs):
        model.merge_adapter(["default"])
    before = ours(IDS).logits
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        got = ours.merge_and_unload(adapter_names=["other"])(IDS).logits
        wanted = theirs.merge_and_unload(adapter_names=["other"])(IDS).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours(IDS).logits, before), "this model stays as it is"


# --- deleted ---


def test_deleting_what_is_active_activates_another(tmp_path):
    ours, theirs = both(tmp_path, {name: CONFIGS[name] for name in ("default", "other")})
    with pytest.warns(UserWarning, match="'other' is active now"):
        ours.delete_adapter("default")
    theirs.delete_adapter("default")
    theirs.set_adapter("other")  # where not every layer has it, PEFT activates none and forgets to say so
    assert ours.active_adapters == theirs.active_adapters == ["other"]
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not any(each.requires_grad for each in ours.parameters()), "one that was frozen stays so"
    with pytest.raises(ValueError, match="E510"):
        ours.delete_adapter("default")
    ours.delete_adapter(adapter_name="other")
    assert ours.active_adapters == []


def test_deleting_beside_what_is_merged(tmp_path):
    ours, theirs = both(tmp_path, {name: CONFIGS[name] for name in ("default", "other")})
    for model in (ours, theirs):
        model.merge_adapter(["default"])
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter("default")
    after(ours, theirs, "delete_adapter", "other")
    after(ours, theirs, "unmerge_adapter")


@pytest.mark.parametrize("given", [{}, {"adapter_name": "default", "adapter_names": "default"}])
def test_deleting_takes_names_once(given, tmp_path):
    ours, _ = both(tmp_path, {"default": CONFIGS["default"]})
    with pytest.raises(TypeError, match="E589"):
        ours.delete_adapter(**given)
    assert ours.active_adapters == ["default"]


# --- the base, and what is added ---


def test_the_base_model_is_this_very_one_with_its_adapters(tmp_path):
    ours, theirs = both(tmp_path, {"default": CONFIGS["default"]})
    got, wanted = ours.get_base_model(), theirs.get_base_model()
    assert type(got) is type(wanted)
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (got(IDS).logits - ours.unload()(IDS).logits).abs().max() > 1e-3
        got.lm_head = torch.nn.Identity()
        torch.testing.assert_close(ours(IDS).logits, got.model(IDS).last_hidden_state)


@pytest.mark.parametrize("way", ["the name first", "by its keyword"])
def test_what_is_added_as_peft_has_it_rests(way, tmp_path):
    ours, theirs = both(tmp_path, {"default": CONFIGS["default"]})
    for model in (ours, theirs):
        if way == "the name first":
            model.add_adapter("other", CONFIGS["other"])
        else:
            model.add_adapter(adapter_name="other", peft_config=CONFIGS["other"])
    assert ours.active_adapters == theirs.active_adapters == ["default"]
    assert whole(ours)["requires_grad"] == whole(theirs)["requires_grad"] == {"default": True, "other": False}
    ours.add_adapter(CONFIGS["third"], "third")  # transformers' order
    assert ours.active_adapters == ["third"]


def test_rows_have_adapters_of_their_own(tmp_path):
    ours, theirs = both(tmp_path, {name: CONFIGS[name] for name in ("default", "other")})
    ids, names = IDS[:1].repeat(3, 1), ["other", "__base__", "default"]
    mixed = ours.eval()(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(mixed, theirs.eval()(input_ids=ids, adapter_names=names).logits, atol=1e-5, rtol=1e-5)
    more = dict(max_new_tokens=3, min_new_tokens=3, adapter_names=names)
    assert torch.equal(ours.generate(input_ids=ids, **more), theirs.generate(input_ids=ids, **more))
    assert ours.active_adapters == theirs.active_adapters


def test_what_trainers_read_of_pefts_base(tmp_path):
    """Label smoothing and NEFTune go through `base_model.model`; transformers itself through `base_model`."""
    ours, theirs = both(tmp_path, {"default": CONFIGS["default"]})
    whole_one = ours.base_model.model
    assert type(whole_one) is type(theirs.base_model.model)
    assert whole_one.get_input_embeddings() is ours.get_input_embeddings()
    assert isinstance(ours.base_model, type(ours.model))
    with torch.no_grad():
        got, wanted = ours.base_model(IDS).last_hidden_state, theirs.base_model.model.model(IDS).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_head_is_its_own_base():
    adapted = compiler.apply(hf.LlamaModel(hf.LlamaConfig(**SIZES)), "adapter a = lora { on q_proj }")
    assert adapted.base_model is adapted


def test_a_file_of_another_rank_and_the_same_scale_goes_into_no_adapter(tmp_path):
    """Nothing of it is written before that is found out."""
    ours, _ = both(tmp_path / "a", {"default": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])})
    both(tmp_path / "b", {"default": peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])})
    before = ours(IDS).logits
    with pytest.raises(ValueError, match="E594"):
        ours.load_adapter(tmp_path / "b", "default")
    assert torch.equal(ours(IDS).logits, before)
    ours.load_adapter(tmp_path / "a", "default")
    torch.testing.assert_close(ours(IDS).logits, before)

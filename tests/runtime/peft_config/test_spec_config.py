"""Methods of the user's own in a file: read again with no word more, and nothing in such a file is trusted."""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import CheckpointError
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.spec.values import complete
from peftc.runtime.peft_config.json_fields import FieldReader
from peftc.runtime.peft_config.spec_config import read_spec_fields, spec_fields
from peftc.runtime.peft_format.manifest import spec_digest

METHOD = """
# A low-rank update with a gate for every row.
method gated(rank: int = 4, alpha: float = 8) {
    on      linear
    default first for net
    require rank <= min(in, out)
    const   V[rank, in]  = right_singular(W, rank) saved "gated_V"
    const   M[out, 1]    = uniform(0, 1) seeded 7
    param   G[out, 1]    = zeros saved "gated_gate"
    param   B[out, rank] = zeros saved "gated_B.weight"
    let     s = alpha / rank
    W'      = W + s * tanh(G) * M * (B @ V)
    b'      = b + 0.5 * reshape(G, [out])
}
"""
SPEC = (
    METHOD
    + """
adapter mine = gated(rank = 3) {
    on     first, second
    refine second with rank = 2, alpha = 1
    train  norm
}
"""
)
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def adapted(net):
    torch.manual_seed(1)
    made = compiler.apply(net, SPEC).eval()
    for parameter in made.adapter_bank.parameters():
        nn.init.normal_(parameter)
    return made


@pytest.fixture
def saved(adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def config_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def changed(directory, **fields):
    config = {name: value for name, value in {**config_of(directory), **fields}.items() if value is not ...}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def refused(net, directory):
    before = {name: (id(each), each.clone()) for name, each in net.state_dict(keep_vars=True).items()}
    with pytest.raises(CheckpointError) as caught:
        compiler.load(net, directory, strict=True)
    for name, each in net.state_dict(keep_vars=True).items():
        assert before[name][0] == id(each)
        assert torch.equal(before[name][1], each)
    return caught.value.diagnostics


# --- what is saved is loaded ---


def test_with_no_word_more(net, adapted, saved):
    again = compiler.load(net, saved, adapter_name="other").eval()
    with torch.no_grad():
        assert_close(again(X), adapted(X))
        assert not torch.allclose(again(X), net(X))
    mine, other = adapted.adapter_plan("mine"), again.adapter_plan("other")
    assert replace(other.spec, name="mine") == mine.spec
    assert [each.bound.values for each in other.sites] == [each.bound.values for each in mine.sites]
    assert [dict(each.bound.values)["rank"] for each in other.sites] == [3, 2]
    assert [each.module for each in other.copies] == ["norm"]


def test_the_file(adapted, saved):
    config = config_of(saved)
    assert config["peft_type"] == "PEFTC"
    assert config["spec"].startswith("# A low-rank update with a gate for every row.\nmethod gated(")
    keys = set(adapted.adapter_state_dict("mine"))
    assert "base_model.model.first.gated_gate" in keys
    assert not any("M" in key.split(".") for key in keys)  # seeded, so it is made again


def test_saved_again_it_is_the_same_file(net, saved, tmp_path):
    compiler.load(net, saved, adapter_name="mine").save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(saved)


def test_beside_others_and_from_its_config_alone(net, adapted, saved):
    again = compiler.load(net, saved).eval()
    again.load_adapter(saved, "second")
    again.add_adapter(config_of(saved), "fresh")
    assert again.active_adapters() == ["fresh"]
    again.set_adapter("second")
    with torch.no_grad():
        assert_close(again(X), adapted(X))


def test_on_a_base_of_lower_precision(net, adapted, saved):
    """Trained copies take the base's type, as in peft: what they stand for is met by tensors of that type."""
    again = compiler.load(net.to(torch.bfloat16), saved).eval()
    assert again.adapter_bank.default.norm.weight.dtype == torch.bfloat16
    assert again.adapter_bank.default.first.G.dtype == torch.float32
    with torch.no_grad():
        assert again(X.to(torch.bfloat16)).dtype == torch.bfloat16


def test_decompile_and_inspect(adapted, saved):
    assert read_spec(compiler.decompile(saved)).adapters == (adapted.adapter_plan("mine").spec,)
    facts = compiler.inspect(saved)
    assert (facts.peft_type, facts.method, facts.problems) == ("PEFTC", "gated", ())
    assert [(each.modules, each.values) for each in facts.modules] == [
        (("first",), {"rank": 3}),
        (("norm",), {}),
        (("second",), {"rank": 2}),
    ]


@pytest.mark.parametrize("name", builtin_methods())
def test_every_definition_is_written_whole(name):
    """What no method of a user's says yet, a built-in one says: each goes through a file as if it were a user's."""
    rule = replace(builtin_methods()[name], name="mine")
    spec = AdapterSpec("a", rule, complete(rule, ()))
    reader = FieldReader(spec_fields(spec), "a file")
    assert read_spec_fields(reader, "a") == spec


def test_peft_refuses_it_by_name(net, saved):
    """peft has no such type, and says which: nothing is loaded by halves."""
    theirs = copy.deepcopy(net)
    for action in (peft.PeftConfig.from_pretrained, lambda path: peft.PeftModel.from_pretrained(theirs, path)):
        with pytest.raises(KeyError, match="PEFTC"):
            action(str(saved))
    assert not any("gated" in name for name, _ in theirs.named_parameters())


def test_the_type_is_nobodys_own(net, tmp_path):
    spec = SPEC.replace("    W'      =", "    peft    PEFTC { r = rank }\n    W'      =")
    with pytest.raises(CheckpointError, match="leave its 'peft' item out"):
        compiler.apply(net, spec).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is not trusted ---

TEXTS = {
    "not the language": ("method gated( {", "E110", "expected"),
    "not a method": ("adapter a = nothing", "E140", "there is no method"),
    "a wrong formula": ("method m() { on linear W' = W @ W.T } adapter a = m", "E133", "[out, in]"),
    "nothing": ("", "E148", "there is no adapter"),
    "too deep": ("adapter a = lora(rank = " + "(" * 70 + "1" + ")" * 70 + ")", "E104", "nested"),
    "too large": ("# " + "x" * 1_100_000, "E103", "1 MiB"),
    "unfolding": (
        "method m() { on linear let v0 = W "
        + " ".join(f"let v{step + 1} = v{step} + v{step}" for step in range(40))
        + " W' = v40 } adapter a = m",
        "E104",
        "too large",
    ),
    "unfolding at the start": (
        "method m() { on linear let v0 = W "
        + " ".join(f"let v{step + 1} = v{step} + v{step}" for step in range(8))
        + ' param P[out, in] = v8 + v8 + v8 + v8 saved "P" W\' = W + P } adapter a = m',
        "E104",
        "too large",
    ),
}


@pytest.mark.parametrize(("text", "code", "words"), TEXTS.values(), ids=TEXTS)
def test_a_damaged_text(text, code, words, net, saved):
    changed(saved, spec=text)
    first, *rest = refused(net, saved)
    assert (first.code, first.message) == ("E327", "the spec in this file cannot be read")
    assert rest[0].code == code
    assert words in rest[0].render()


def test_it_says_where_in_the_text(net, saved):
    changed(saved, spec=SPEC.replace("tanh(G)", "tahn(G)"))
    found = refused(net, saved)[1]
    place = SPEC.splitlines().index("    W'      = W + s * tanh(G) * M * (B @ V)") + 1
    assert found.render().startswith(f"{saved} (spec):{place}:23: error["), found.render()
    assert "did you mean 'tanh'?" in found.render()


OTHER = 'use "./more.adapter"', "base { n = 1 }", "activate mine"


@pytest.mark.parametrize("statement", OTHER)
def test_it_holds_an_adapter_and_nothing_else(statement, net, saved):
    (saved / "more.adapter").write_text(METHOD)
    changed(saved, spec=f"{SPEC}\n{statement}")
    (found,) = refused(net, saved)
    assert found.code == "E327"
    assert "one adapter and its method, and nothing else" in found.message
    assert found.span.text == statement


def test_several_adapters(net, saved):
    changed(saved, spec=f"{SPEC} adapter more = lora {{ on first }}")
    (found,) = refused(net, saved)
    assert (found.code, found.message) == ("E327", "a checkpoint holds one adapter, and its spec has 'mine', 'more'")


FIELDS = {
    "unknown": ({"spce": "x"}, "E323", "unknown field 'spce'", "did you mean 'spec'?"),
    "PEFT's own": ({"target_modules": ["first"]}, "E323", "unknown field 'target_modules'", "remove the field"),
    "no spec": ({"spec": ...}, "E321", "field 'spec' = null is not a text", ""),
    "no text": ({"spec": 3}, "E321", "field 'spec' = 3 is not a text", ""),
    "no format": ({"format": ...}, "E321", "field 'format' = null is not a whole number", ""),
    "newer": ({"format": 2}, "E361", "format 2, this peftc reads up to 1", "upgrade peftc"),
    "task": ({"task_type": 3}, "E321", "field 'task_type' = 3 is not a text", ""),
}


@pytest.mark.parametrize(("fields", "code", "message", "help"), FIELDS.values(), ids=FIELDS)
def test_fields(fields, code, message, help, net, saved):
    changed(saved, **fields)
    (found,) = refused(net, saved)
    assert found.code == code
    assert message in found.message
    assert help in found.help


def test_a_model_it_does_not_fit(saved):
    (found,) = refused(nn.Sequential(nn.Linear(4, 5)), saved)[:1]
    assert found.code == "E201"
    assert "it was made for modules called first, second" in found.help


def test_tensors_of_other_sizes(net, saved):
    changed(saved, spec=SPEC.replace("rank = 2", "rank = 3"))
    assert {each.code for each in refused(net, saved)} == {"E342"}


def method(*items):
    return "method m() { on linear " + " ".join(items) + " }  adapter a = m { on first }"


GROWING = {
    "a seeded constant": method("const C[40000, 40000] = zeros", "W' = W + mean(mean(C, 0), 1)"),
    "drawn at random": method("const C[2] = randperm(3000000000) seeded 1", "W' = W + sum(C, 0)"),
    "drawn in a plane": method(
        "const C[2, 2] = places(60000, 60000) seeded 1",
        "W' = W + scatter(reshape(slice(sum(W, 0), 1, 0, 2), [2]), C, [out, in])",
    ),
    "inside a formula": method("W' = W + mean(mean(tile(W, [9000, 9000]), 0), 1)"),
    "inside a bias": method("b' = b + mean(reshape(tile(W, [9000, 9000]), [out * in * 81000000]), 0)"),
    "inside a start": method('param P[1, 1] = mean(mean(tile(W, [9000, 9000]), 0), 1) saved "p"', "W' = W + P"),
}


@pytest.mark.parametrize("text", GROWING.values(), ids=GROWING)
def test_nothing_grows_beyond_the_weight(text, net, saved):
    changed(saved, spec=text)
    tensors = {"base_model.model.first.p": torch.zeros(1, 1)} if "saved" in text else {}
    save_file(tensors, saved / "adapter_model.safetensors")
    (found,) = refused(net, saved)
    assert found.code == "E345"
    assert found.message.startswith("at first ")


# --- methods with a PEFT type of their own ---

WITH_TYPE = METHOD.replace("    W'      =", "    peft    GATED { r = rank, gated_alpha = alpha }\n    W'      =")
NAMED = WITH_TYPE + "adapter mine = gated(rank = 3) { on first, second }"


@pytest.fixture
def typed(net, tmp_path):
    made = compiler.apply(net, NAMED).eval()
    for parameter in made.adapter_bank.parameters():
        nn.init.normal_(parameter)
    made.save_pretrained(tmp_path / "typed")
    return made


def test_the_manifest_knows_a_type_that_is_not_built_in(net, typed, tmp_path):
    config = config_of(tmp_path / "typed")
    assert (config["peft_type"], config["r"]) == ("GATED", 3)
    assert "spec" not in config
    with torch.no_grad():
        assert_close(compiler.load(net, tmp_path / "typed").eval()(X), typed(X))
    assert "method gated(" in compiler.decompile(tmp_path / "typed")


def test_without_a_manifest_the_file_of_the_method_helps(net, typed, tmp_path):
    directory = tmp_path / "typed"
    (directory / "peftc_manifest.json").unlink()
    (found,) = refused(net, directory)
    assert (found.code, 'PEFT type "GATED" is not supported' in found.message) == ("E328", True)
    (tmp_path / "methods.adapter").write_text(WITH_TYPE)
    again = compiler.load(net, directory, use=tmp_path / "methods.adapter").eval()
    again.load_adapter(directory, "more", use=tmp_path / "methods.adapter")
    with torch.no_grad():
        assert_close(again(X), typed(X))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (NAMED + " adapter b = lora { on first }", "its spec has 'mine', 'b'"),
        ('use "./x.adapter"', "nothing else"),
        ("adapter", "cannot be read"),
    ],
)
def test_the_manifests_spec_is_trusted_no_more(spec, message, net, typed, tmp_path):
    file = tmp_path / "typed" / "peftc_manifest.json"
    manifest = {**json.loads(file.read_text()), "spec": spec}
    file.write_text(json.dumps(manifest))
    (found,) = refused(net, tmp_path / "typed")
    assert "is not the one that was saved" in found.message
    file.write_text(json.dumps({**manifest, "spec_sha256": spec_digest(spec)}))
    found, *_ = refused(net, tmp_path / "typed")
    assert found.code == "E327"
    assert message in found.message


def test_a_type_that_is_built_in_is_not_taken_from_a_manifest(net, tmp_path):
    made = compiler.apply(net, "adapter a = lora(rank = 2) { on first }").eval()
    nn.init.normal_(made.adapter_bank.a.first.B)
    made.save_pretrained(tmp_path)
    file = tmp_path / "peftc_manifest.json"
    spec = METHOD.replace("    W'      =", "    peft    LORA { r = rank, lora_alpha = alpha }\n    W'      =")
    spec += "adapter a = gated { on first }"
    file.write_text(json.dumps({**json.loads(file.read_text()), "spec": spec, "spec_sha256": spec_digest(spec)}))
    again = compiler.load(net, tmp_path)
    assert again.adapter_plan("default").spec.rule == builtin_methods()["lora"]

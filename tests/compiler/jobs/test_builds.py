import json
from pathlib import Path

import pytest
import torch
import transformers

from peftc import compiler
from peftc.compiler import diagram
from peftc.compiler.export_model import output
from peftc.compiler.jobs import builds
from peftc.grammar.diagnostics import AdapterError, UsageError
from tests.compiler.commands.cli_help import SPEC, peftc


@pytest.fixture(scope="module")
def model():
    """One layer, so that tracing it many times costs little."""
    torch.manual_seed(0)
    small = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config).eval()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.first(x)


ONE = "adapter a = lora(rank = 2) { on first }"
INPUTS = (torch.zeros(3, 4),)


def make(directory, spec=ONE, **options):
    return compiler.build(spec, Net(), directory, inputs=INPUTS, **options)


def contents(directory):
    return {str(each.relative_to(directory)): each.read_bytes() for each in directory.rglob("*") if each.is_file()}


# --- the command ---


def test_compile_tells_and_writes(place, golden):
    done = peftc("compile", "spec.adapter", "tiny", "-o", "out/build")
    assert done.code == 0
    golden("cli/compile.txt", done.out)
    assert "random, from seed 0" in done.err
    built = place / "out" / "build"
    assert {"graph.dot", "manifest.json", "adapters"} <= {each.name for each in built.iterdir()}
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["active"] == {"support": 1.0, "style": 0.5}
    assert set(manifest["files"]) | {"manifest.json"} == set(contents(built))
    assert manifest["model"]["origin"] == "random"
    assert [each.name for each in (place / "out").iterdir()] == ["build"]

    # what was written loads onto the model it was made for, and says what the spec says
    base = compiler.find_model("tiny").model
    meant = compiler.read_spec(manifest["spec"])
    assert meant == compiler.read_spec("spec.adapter")
    for name in ("support", "style"):
        text = peftc("decompile", built / "adapters" / name).out
        again = compiler.apply(base, text)
        assert again.adapter_plan(name).sites == compiler.apply(base, meant).adapter_plan(name).sites
        loaded = compiler.load(base, built / "adapters" / name, adapter_name=name)
        assert loaded.adapter_plan(name).parameter_count == manifest["adapters"][name]["parameters"]
    assert peftc("inspect", built).code == 3
    assert "adapters/support" in peftc("inspect", built).err


def test_compile_json_is_one_document(place):
    done = peftc("compile", "net.adapter", "factories:good", "--json")
    facts = done.json
    assert done.code == 0
    assert facts["model"] == {
        "name": "factories:good",
        "architecture": "Net",
        "origin": "factory",
        "seed": 0,
        "parameters": 212,
    }
    (adapter,) = facts["adapters"]
    assert (adapter["name"], adapter["method"], adapter["weight"], adapter["bytes"]) == ("a", "lora", 1.0, 352)
    (rule,) = adapter["rules"]
    assert (rule["rule"], rule["sites"], rule["parameters"]) == ("on first, second", ["first", "second"], 88)
    assert facts["parameters"] == 88
    assert facts["share"] == pytest.approx(88 / 300)
    assert (facts["output"], facts["files"]) == (None, [])


def test_compile_errors(place):
    for arguments, code, codes in (
        (("gone.adapter", "tiny"), 3, ["E101"]),
        (("net.adapter", "tiny"), 1, ["E201", "E201"]),
        (("net.adapter", "factories:bare"), 1, ["E440"]),
        (("net.adapter", "./tinny"), 3, ["E450"]),
        (("net.adapter", "factories:good", "-o", "spec.adapter"), 3, ["E551"]),
        (("net.adapter", "factories:good", "-o", "."), 3, ["E551"]),
    ):
        done = peftc("compile", *arguments, "--json")
        assert (done.code, done.codes) == (code, codes), arguments
        plain = peftc("compile", *arguments)
        assert (plain.code, plain.out) == (code, "")
        assert f"error[{codes[0]}]" in plain.err


def test_nothing_active_is_said(place):
    (place / "two.adapter").write_text(
        "adapter a = lora(rank = 2) { on first }\nadapter b = lora(rank = 2) { on second }\n"
    )
    done = peftc("compile", "two.adapter", "factories:good")
    assert done.code == 0
    assert "no adapter starts active" in done.err


# --- build ---


def test_build_leaves_the_model_and_the_random_state(model, tmp_path):
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = torch.random.get_rng_state()
    steps = []
    made = compiler.build("adapter a = lora { on q_proj }", model, tmp_path / "b", seed=3, progress=steps.append)
    again = compiler.build("adapter a = lora { on q_proj }", model, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    first, second = (each.adapted.adapter_state_dict("a") for each in (made, again))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert steps[-2:] == ["tracing LlamaForCausalLM", f"writing {tmp_path / 'b'}"]
    assert len(made.after.nodes) > len(made.before.nodes)


def test_an_adapter_called_default_has_its_directory(tmp_path):
    make(tmp_path / "b", "adapter default = lora(rank = 2) { on first }\nadapter other = lora(rank = 2) { on first }")
    assert {each.name for each in (tmp_path / "b" / "adapters").iterdir()} == {"README.md", "default", "other"}


def test_without_graphviz_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(builds, "can_render", lambda: False)
    facts = make(tmp_path / "b").facts
    assert "graph.svg" not in facts.files
    assert "graphviz" in facts.notes[-1]
    assert not (tmp_path / "b" / "graph.svg").exists()


# --- the directory ---


def test_an_unchanged_build_is_replaced(tmp_path):
    make(tmp_path / "b")
    first = contents(tmp_path / "b")
    make(tmp_path / "b", seed=1)
    second = contents(tmp_path / "b")
    assert set(first) == set(second)
    assert first != second
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    assert set(contents(tmp_path / "empty")) == set(first)


@pytest.mark.parametrize("change", ["add", "edit", "other"])
def test_what_no_build_made_is_not_replaced_unless_forced(tmp_path, change):
    target = tmp_path / "b"
    if change == "other":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    else:
        make(target)
        name = "thesis.txt" if change == "add" else "adapters/a/adapter_model.safetensors"
        (target / name).write_bytes(b"trained for days")
    before = contents(target)
    with pytest.raises(UsageError) as caught:
        make(target, seed=1)
    assert caught.value.diagnostics[0].code == "E551"
    assert ("thesis.txt" if change != "edit" else "adapter_model.safetensors") in str(caught.value)
    assert contents(target) == before
    make(target, force=True)
    assert "thesis.txt" not in contents(target)


def test_no_force_replaces_home_or_here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    for each in (tmp_path / "here", tmp_path, tmp_path / "home", Path("/")):
        with pytest.raises(UsageError):
            make(each, force=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ZeroDivisionError()])
@pytest.mark.parametrize("at", ["save", "draw", "seal"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_half_way_leaves_what_was_there(tmp_path, monkeypatch, error, at, existing):
    target = tmp_path / "deep" / "b"
    if existing:
        make(target)
    before = contents(tmp_path)

    def broken(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        if at == "draw":
            patch.setattr(diagram, "to_dot", broken)
        else:
            patch.setattr(builds, {"save": "_save", "seal": "seal"}[at], broken)
        expected = AdapterError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected):
            make(target, seed=1)
    assert contents(tmp_path) == before
    assert sorted(each.name for each in tmp_path.rglob("*") if each.is_dir() and each.name.startswith(".")) == []
    if not existing:
        assert list(tmp_path.iterdir()) == []


def test_a_failure_while_renaming_puts_the_earlier_build_back(tmp_path, monkeypatch):
    make(tmp_path / "b")
    before = contents(tmp_path)
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(UsageError, match="E550"):
            make(tmp_path / "b", seed=1)
    assert contents(tmp_path) == before


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as caught:
        make(tmp_path / "file" / "b")
    assert caught.value.diagnostics[0].code == "E550"


def test_a_written_file_keeps_its_mode_and_follows_links(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    output.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    assert {each.name for each in tmp_path.iterdir()} == {"real", "link"}


def test_the_spec_text_is_enough():
    assert compiler.check(SPEC)[1] == ()


def test_a_build_keeps_where_regions_begin(tmp_path):
    model = Net()
    compiler.build('base { regions = "modules" } ' + ONE, model, tmp_path / "out", inputs=INPUTS)
    assert compiler.load(model, tmp_path / "out" / "adapters" / "a").region_partition().asked == "modules"
    assert compiler.read_spec(json.loads((tmp_path / "out" / "manifest.json").read_text())["spec"]).regions == "modules"

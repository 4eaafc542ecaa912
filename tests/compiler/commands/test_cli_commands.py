import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import peft
import pytest
import transformers
from safetensors.torch import load_file, save_file

from peftc import compiler
from peftc.compiler.jobs import drawing
from tests.compiler.commands.cli_help import CONFIG, SPEC, peftc, write_model


@pytest.fixture
def checkpoint(place):
    """A checkpoint that peft wrote."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    peft.get_peft_model(model, config).save_pretrained(place / "theirs")
    return place / "theirs"


# --- check ---


def test_check_alone_and_with_a_model(place, golden):
    assert peftc("check", "spec.adapter").out == "OK: spec.adapter: 2 adapters\n"
    done = peftc("check", "spec.adapter", "tiny")
    assert done.code == 0
    golden("cli/check_model.txt", done.out)
    assert peftc("check", "spec.adapter", "tiny", "--json").json == {
        "ok": True,
        "spec": "spec.adapter",
        "adapters": ["support", "style"],
        "model": "tiny",
    }


MANY = """adapter a = lora(rnk = 4) {
    on   all linar
    skip all embeding
}
adapter a = lora(alpha = "x") { on first where foo > 3 }
activate b + a
"""


def test_check_counts_combinations(place):
    (place / "both.adapter").write_text("adapter a = lora { on q_proj }\nadapter b = combine(a, weights = [0.5])\n")
    assert peftc("check", "both.adapter").out == "OK: both.adapter: 2 adapters\n"
    assert peftc("check", "both.adapter", "tiny", "--json").json["adapters"] == ["a", "b"]
    (place / "bad.adapter").write_text("adapter a = dora { on q_proj }\nadapter b = combine(a)\n")
    done = peftc("check", "bad.adapter", "tiny")
    assert done.code == 1
    assert "bad.adapter:2:21: error[E582]" in done.err


def test_check_tells_everything_at_once(place, golden):
    (place / "many.adapter").write_text(MANY)
    done = peftc("check", "many.adapter")
    assert (done.code, done.out) == (1, "")
    golden("cli/check_many.txt", done.err)
    found = peftc("check", "many.adapter", "--json")
    assert found.code == 1
    assert found.codes == ["E141", "E139", "E139", "E147", "E142", "E130", "E146"]
    assert found.json["errors"][0] == {
        "code": "E141",
        "message": "'lora' has no hyperparameter 'rnk'",
        "file": "many.adapter",
        "line": 1,
        "column": 18,
        "help": "did you mean 'rank'?",
    }


def test_check_tells_what_does_not_fit_of_every_adapter_and_the_base(place):
    (place / "misfit.adapter").write_text(
        'base { architecture = "BertModel"\n vocab_size = 3 }\n'
        "adapter a = lora { on q_porj }\nadapter b = lora(rank = 1000) { on v_proj, k_prjo }\n"
    )
    assert peftc("check", "misfit.adapter", "tiny", "--json").codes == ["E241", "E243", "E201", "E201"]


def test_check_tells_of_the_spec_and_of_the_model(place):
    (place / "many.adapter").write_text(MANY)
    assert peftc("check", "many.adapter", "./tinny", "--json").codes[-2:] == ["E146", "E450"]


# --- fmt ---

UGLY = "# top\nadapter   a=lora( rank=4 ){on q_proj} # end\n"
PRETTY = "# top\nadapter a = lora(rank = 4) {\n    on q_proj\n}  # end\n"


def test_fmt_writes_in_place_once(place):
    (place / "ugly.adapter").write_text(UGLY)
    assert peftc("fmt", "ugly.adapter").code == 0
    assert (place / "ugly.adapter").read_text() == PRETTY
    again = peftc("fmt", "ugly.adapter", "--check")
    assert (again.code, again.out, again.err) == (0, "", "")


def test_fmt_check_and_diff_write_nothing(place):
    (place / "ugly.adapter").write_text(UGLY)
    checked = peftc("fmt", "--check", "ugly.adapter", "spec.adapter")
    assert checked.code == 1
    assert "ugly.adapter would change" in checked.err
    assert "1 of 2 would change" in checked.err
    differs = peftc("fmt", "--diff", "ugly.adapter")
    assert differs.code == 0
    assert "-adapter   a=lora( rank=4 ){on q_proj} # end\n" in differs.out
    assert "+    on q_proj\n" in differs.out
    assert peftc("fmt", "--diff", "--check", "ugly.adapter").code == 1
    assert (place / "ugly.adapter").read_text() == UGLY


def test_fmt_of_stdin(place):
    assert peftc("fmt", "-", stdin=UGLY).out == PRETTY
    assert peftc("fmt", "-", "--check", stdin=UGLY).code == 1
    assert peftc("fmt", "-", "--check", stdin=PRETTY).code == 0
    bad = peftc("fmt", "-", stdin="adapter")
    assert (bad.code, bad.out) == (1, "")
    assert "<stdin>:1:7: error[E110]" in bad.err
    assert "E102" in peftc("fmt", "-", stdin=b"\xff\xfe").err


def test_fmt_formats_the_others_where_one_is_wrong(place):
    (place / "ugly.adapter").write_text(UGLY)
    (place / "bad.adapter").write_text("adapter")
    done = peftc("fmt", "bad.adapter", "ugly.adapter")
    assert done.code == 1
    assert "bad.adapter:1:7" in done.err
    assert (place / "ugly.adapter").read_text() == PRETTY
    assert peftc("fmt", "gone.adapter").code == 3


# --- graph ---


def test_graph_forms_and_sides(place):
    pictures = {}
    for side in ("--before", "--after", "--diff"):
        done = peftc("graph", "net.adapter", "factories:good", side, "--json")
        assert done.code == 0
        pictures[side] = done.out
        assert isinstance(done.json, dict)
    assert len(set(pictures.values())) == 3
    text = peftc("graph", "net.adapter", "factories:good")
    assert text.out.startswith("digraph")
    assert text.out.encode() == compiler.draw("net.adapter", "factories:good")


def test_graph_writes_a_file_in_the_form_its_name_says(place):
    if not drawing.can_render():
        pytest.skip("graphviz is not installed")
    assert peftc("graph", "net.adapter", "factories:good", "-o", "net.svg").out == ""
    assert ElementTree.parse(place / "net.svg").getroot().tag.endswith("svg")


def test_graph_without_graphviz_says_so(place, monkeypatch):
    monkeypatch.setenv("PATH", "")
    done = peftc("graph", "net.adapter", "factories:good", "--format", "svg")
    assert done.code == 3
    assert "graphviz is not installed" in done.err


def test_graph_focus(place):
    everything = peftc("graph", "net.adapter", "factories:good").out
    focused = peftc("graph", "net.adapter", "factories:good", "--focus", "first").out
    assert focused.startswith("digraph")
    assert len(focused) < len(everything)
    missed = peftc("graph", "net.adapter", "factories:good", "--focus", "fist")
    assert missed.code == 1
    assert "--focus: error[E201]: no module matches 'fist'\n  help: did you mean 'first'?" in missed.err
    assert "--focus: error[E110]" in peftc("graph", "net.adapter", "factories:good", "--focus", "{{").err


def test_graph_takes_one_side(place):
    assert peftc("graph", "net.adapter", "factories:good", "--before", "--diff").code == 2
    assert peftc("graph", "net.adapter", "factories:good", "--json", "--format", "dot").code == 2


# --- inspect, decompile ---


def test_inspect_a_checkpoint_of_peft(checkpoint, golden):
    done = peftc("inspect", "theirs")
    assert done.code == 0
    golden("cli/inspect.txt", done.out)
    facts = peftc("inspect", "theirs", "--json").json
    assert (facts["method"], facts["parameters"], facts["manifest"]) == ("lora", 352, None)
    assert [(each["values"], len(each["modules"])) for each in facts["modules"]] == [({"rank": 4}, 2), ({"rank": 2}, 2)]
    assert facts["bytes"] == 4 * 352


def test_inspect_tells_the_tensors_of_what_is_not_supported(checkpoint):
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NO_SUCH"}))
    done = peftc("inspect", "theirs")
    assert done.code == 1
    assert "not supported" in done.out
    assert "E328" in done.err
    found = peftc("inspect", "theirs", "--json")
    assert (found.code, found.codes, found.json["parameters"]) == (1, ["E328"], 352)


def test_inspect_damaged_and_missing(checkpoint, place):
    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert (peftc("inspect", "theirs").code, peftc("inspect", "theirs", "--json").codes) == (1, ["E307"])
    assert peftc("inspect", "./thiers").code == 3
    assert "did you mean 'theirs'" in peftc("inspect", "./thiers").err


def test_inspect_shows_dtypes_and_trained_modules(checkpoint):
    weights = checkpoint / "adapter_model.safetensors"
    tensors = {key: value.bfloat16() for key, value in load_file(weights).items()}
    tensors["base_model.model.lm_head.weight"] = tensors[next(iter(tensors))].float()
    save_file(tensors, weights)
    groups = peftc("inspect", "theirs", "--json").json["modules"]
    assert {tuple(each["dtypes"]) for each in groups} == {("bfloat16",), ("float32",)}
    assert ["lm_head"] in [each["modules"] for each in groups]


def test_decompile_prints_a_spec_of_the_same_meaning(checkpoint):
    done = peftc("decompile", "theirs", "--name", "mine")
    assert done.code == 0
    spec = compiler.read_spec(done.out)
    assert dict(spec.adapters[0].values)["rank"] == 4
    assert spec.adapters[0].name == "mine"
    assert dict(spec.adapters[0].refine[0].overrides) == {"rank": 2}
    assert peftc("fmt", "-", "--check", stdin=done.out).code == 0


# --- methods ---


def test_methods(place, golden):
    golden("cli/methods_lora.txt", peftc("methods", "lora").out)
    listed = peftc("methods")
    assert "lora" in listed.out
    assert "Low-rank adaptation" in listed.out
    facts = peftc("methods", "lora", "--json").json
    assert facts["formula"] == "W + s * (B @ drop(A, dropout))"
    assert "https://arxiv.org/abs/2106.09685" in facts["papers"]
    assert {"name": "rank", "type": "int", "default": "8", "choices": []} in facts["hyperparameters"]
    assert "lora" in [each["name"] for each in peftc("methods", "--json").json["methods"]]


def test_methods_of_a_file(place):
    (place / "mine.adapter").write_text(
        "# Scales every output. More text.\n"
        'method scale() { on linear\n param s[out, 1] = ones saved "s.weight"\n'
        'param t[1, in] = zeros saved "t.weight"\n'
        " W' = W + s @ t }\n"
    )
    assert "Scales every output" in peftc("methods", "--use", "mine.adapter").out
    assert peftc("methods", "scale", "--use", "mine.adapter", "--json").json["formula"] == "W + s @ t"
    missing = peftc("methods", "lorra")
    assert (missing.code, missing.out) == (1, "")
    assert "did you mean 'lora'" in missing.err


# --- drift ---


def test_drift_of_a_checkpoint_is_what_merging_does(checkpoint):
    weights = load_file(checkpoint / "adapter_model.safetensors")
    save_file({name: each + 0.1 for name, each in weights.items()}, checkpoint / "adapter_model.safetensors")
    done = peftc("drift", "theirs", "tiny", "--dtype", "bfloat16", "--json")
    assert done.code == 0
    found = done.json
    assert found["adapters"] == ["default"]
    assert len(found["tensors"]) == 2 * CONFIG["num_hidden_layers"]
    assert {each["dtype"] for each in found["tensors"]} == {"bfloat16"}
    assert found["largest"] == max(each["largest"] for each in found["tensors"]) > 0
    assert 0 < found["relative"] < 2**-8
    model = compiler.find_model("tiny")
    again = compiler.drift(checkpoint, model, dtype="bfloat16")
    assert again.outputs is not None
    assert (again.largest, again.outputs.divergence) == (found["largest"], found["outputs"]["divergence"])
    shown = peftc("drift", "theirs", "tiny", "--dtype", "bfloat16")
    assert f"at most {found['largest']:.3g} from the exact value" in shown.out
    assert "[0..2].self_attn." in shown.out
    assert "nats apart" in shown.out


def test_drift_of_a_spec_and_of_a_factory(place):
    done = peftc("drift", "spec.adapter", "tiny")
    assert done.code == 0
    assert "at most 0 from the exact value, 0 of the largest" in done.out
    (place / "made.py").write_text(
        "import torch\n\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(4, 3)), (torch.ones(2, 4),)\n"
        "\n\ndef bare():\n    return torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
    )
    (place / "net.adapter").write_text('adapter a = lora(rank = 2) { on {"0"} }')
    assert peftc("drift", "net.adapter", "made:make", "--json").json["outputs"]["divergence"] is None
    assert peftc("drift", "net.adapter", "made:bare", "--json").json["outputs"] is None
    assert "not compared" in peftc("drift", "net.adapter", "made:bare").out


@pytest.mark.parametrize(
    ("given", "code", "exit"),
    [(("gone", "tiny"), "E308", 3), (("gone.adapter", "tiny"), "E101", 3), (("spec.adapter", "./gone"), "E450", 3)],
)
def test_drift_of_what_is_not_there(given, code, exit, place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = peftc("drift", *given, "--json")
    assert (done.codes, done.code) == ([code], exit)


# --- the group ---


def test_help_lists_commands_and_exit_codes():
    done = peftc("--help")
    assert done.code == 0
    for word in ("compile", "check", "fmt", "graph", "drift", "inspect", "decompile", "methods", "Exit codes", "130"):
        assert word in done.out


def test_usage():
    assert peftc("compile").code == 2
    assert "SPEC" in peftc("compile").err
    done = peftc("compile", "--json")
    assert (done.code, done.codes) == (2, ["usage"])
    assert peftc("compil").code == 2
    assert peftc("--version").out.startswith("peftc ")


def test_a_bug_is_one_line_and_a_traceback_with_debug(place, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("peftc.compiler.commands.fmt.format_source", broken)
    done = peftc("fmt", "spec.adapter")
    assert (done.code, done.err.count("\n")) == (70, 1)
    assert "ZeroDivisionError: oops" in done.err
    assert "--debug" in done.err
    assert "Traceback" in peftc("fmt", "spec.adapter", "--debug").err
    (place / "spec.adapter").write_text(SPEC)


def test_an_interrupt_is_130(place, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("peftc.compiler.commands.fmt.format_source", interrupted)
    assert peftc("fmt", "spec.adapter").code == 130


PEFTC = [sys.executable, "-c", "from peftc.compiler.commands.cli import main; main()"]


def test_what_needs_no_model_does_not_wait_for_torch(place):
    program = (
        "import sys\nfrom peftc.compiler.commands.cli import app\n"
        "try:\n    app(['check', 'spec.adapter'])\nexcept SystemExit as error:\n    assert not error.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_reader_that_goes_away_is_no_error(place):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PEFTC, "methods", "lora"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_that_cannot_show_a_name(place):
    (place / "bad.adapter").write_text('adapter "é" = lra { on q_proj }\n', encoding="utf-8")
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run([*PEFTC, "check", "bad.adapter"], capture_output=True, env=environment, check=False)
    assert done.returncode == 1
    assert b"there is no method 'lra'" in done.stderr


def test_a_compile_told_to_stop_removes_what_it_began(place):
    (place / "slow.py").write_text(
        "import os, signal, torch\n\nclass Slow(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.first = torch.nn.Linear(4, 4)\n\n"
        "    def forward(self, x):\n        return self.first(x)\n\n"
        "    def state_dict(self, *args, **kwargs):\n"
        "        if any(each.name.endswith('.new') for each in os.scandir('.')):\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return super().state_dict(*args, **kwargs)\n\n"
        "def make():\n    return Slow(), (torch.zeros(2, 4),)\n"
    )
    (place / "one.adapter").write_text("adapter a = lora(rank = 2) { on first }\n")
    before = sorted(place.iterdir())
    done = subprocess.run(
        [*PEFTC, "compile", "one.adapter", "slow:make", "-o", "out"], capture_output=True, check=False
    )
    assert done.returncode == 143
    assert [each for each in sorted(place.iterdir()) if each.name != "__pycache__"] == before


def test_unknown_fields_are_warned_of_beside_the_result(place):
    write_model(place / "typo", hiden_size=3)
    done = peftc("check", "spec.adapter", "typo")
    assert done.code == 0
    assert "warning: typo/config.json: unknown field 'hiden_size'" in done.err


# --- what is no weight ---

BESIDE = """adapter style = prefix(length = 4)

adapter task = lora(rank = 2) {
    on     q_proj
    train  norm
    tokens [3, 5] in embed_tokens, lm_head
}

activate task + style
"""


def test_check_and_explain_tell_of_what_is_no_weight(place, golden):
    (place / "beside.adapter").write_text(BESIDE)
    golden("cli/check_beside.txt", peftc("check", "beside.adapter", "tiny").out)
    done = peftc("explain", "beside.adapter", "tiny", "--tokens", 1, "--json")
    (together,) = done.json["together"]
    inserted = {(each["adapter"], each["kind"]): each for each in together["inserted"]}
    assert list(inserted) == [("task", "tokens"), ("task", "train"), ("style", "cache")]
    assert inserted["style", "cache"]["formulas"] == {"prompt'": "P"}
    assert inserted["style", "cache"]["shapes"] == {"P": [4, 32]}
    assert inserted["task", "tokens"]["sites"] == ["model.embed_tokens", "lm_head"]
    shown = peftc("explain", "beside.adapter", "tiny", "--tokens", 1).out
    assert "in front, those of 4 virtual tokens: 4 x 8 numbers each of style" in shown
    assert "W'[3, 5]" in shown


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("prefix", "prompt' = H if projection else P"),
        ("multitask_prompt", "prompt' = reshape(P, [1, length, out]) * (C @ R)"),
        ("adaption_prompt", "gate' = g"),
        ("trainable_tokens", "W'[tokens] = rows"),
        ("ln_tuning", "the whole module, trained"),
    ],
)
def test_methods_that_change_no_weight_show_their_own_formula(name, formula):
    assert formula in peftc("methods", name).out
    facts = peftc("methods", name, "--json").json
    assert facts["formula"] is None
    assert facts.get("gate") == ("g" if name == "adaption_prompt" else None)


@pytest.mark.parametrize(
    ("config", "where", "spec"),
    [
        (peft.PrefixTuningConfig, "the keys and values of every layer", "prefix(length = 4"),
        (peft.PromptTuningConfig, "the embedded text", "prompt(length = 4)"),
    ],
)
def test_a_checkpoint_of_what_stands_in_front(config, where, spec, place):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(place / "front")
    assert where in peftc("inspect", "front").out
    text = peftc("decompile", "front").out
    assert spec in text
    (place / "front.adapter").write_text(text)
    found = peftc("check", "front.adapter", "tiny")
    assert found.code == 0
    assert where in found.out
    tensors = load_file(place / "front" / "adapter_model.safetensors")
    assert f" {sum(each.numel() for each in tensors.values()):,} \n" in found.out
    assert peftc("drift", "front", "tiny", "--json").codes == ["E522"]


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("prefix(length = 0)", "E210"),
        ("prefix { on q_proj }", "E233"),
        ("prompt(length = 4) { on embed_tokens }", "E233"),
        ("trainable_tokens", "E230"),
        ("lora { on q_proj\n tokens [999] }", "E229"),
        ("adaption_prompt(layers = 9)", "E235"),
    ],
)
def test_what_is_wrong_beside_weights_is_told_before_a_trace(spec, code, place):
    (place / "wrong.adapter").write_text(f"adapter a = {spec}\n")
    done = peftc("check", "wrong.adapter", "tiny", "--json")
    assert done.code == 1
    assert done.codes == [code]

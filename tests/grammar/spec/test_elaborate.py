import pytest

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.spec.elaborate import read_methods, read_spec
from peftc.grammar.spec.library import builtin_methods

MINE = 'method mine(a: float = 2) { on linear param A[out, in] = zeros saved "A" W\' = W + a * A }\n'


def test_a_spec_from_text():
    spec = read_spec("""
        adapter a = lora(rank = 4) { on q_proj with alpha = 2 refine q_proj with rank = 8 skip x train y, z bias all }
        adapter "b-1" = lora { tokens ["<x>", 3] tokens [3] in head on q_proj }
        activate a - 0.5 * "b-1"
        base { architecture = "X" hidden_size = 64 }
    """)
    first, second = spec.adapters
    assert first.rule is builtin_methods()["lora"]
    assert first.values[:4] == (("rank", 4), ("alpha", 8.0), ("dropout", 0.0), ("rslora", False))
    assert [name for name, _ in first.values] == [each.name for each in first.rule.hyperparameters]
    assert first.on[0].overrides == (("alpha", 2.0),)
    assert first.refine[0].overrides == (("rank", 8),)
    assert len(first.train) == 2
    assert first.bias == "all"
    assert [each.tokens for each in second.tokens] == [("<x>", 3), (3,)]
    assert [len(each.modules) for each in second.tokens] == [0, 1]
    assert len(second.on) == 1
    assert spec.active == (("a", 1.0), ("b-1", -0.5))
    assert spec.base is not None
    assert [each.name for each in spec.base.entries] == ["architecture", "hidden_size"]
    assert spec.source is not None


def test_a_lone_adapter_is_active_and_several_are_not():
    assert read_spec("adapter a = lora").active == (("a", 1.0),)
    assert read_spec("adapter a = lora adapter b = lora").active == ()


def test_a_file_is_read_by_path_or_name(tmp_path):
    file = tmp_path / "s.adapter"
    file.write_text("adapter a = lora", encoding="utf-8")
    assert read_spec(file) == read_spec(str(file)) == read_spec("adapter a = lora")
    assert read_spec(file).source.name == str(file)
    with pytest.raises(SpecError, match="E101"):
        read_spec("missing.adapter")


def test_methods_come_from_used_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.adapter").write_text(MINE, encoding="utf-8")
    (tmp_path / "sub" / "all.adapter").write_text('use "mine.adapter"', encoding="utf-8")
    text = 'use "sub/all.adapter" use "./sub/mine.adapter" adapter a = mine(a = 3)'
    (tmp_path / "s.adapter").write_text(text, encoding="utf-8")
    spec = read_spec(tmp_path / "s.adapter")
    assert spec.adapters[0].rule.name == "mine"
    assert set(read_methods(tmp_path / "sub" / "all.adapter")) == {"mine"}


def use(tmp_path, text, **files):
    for name, content in files.items():
        (tmp_path / f"{name}.adapter").write_text(content, encoding="utf-8")
    (tmp_path / "s.adapter").write_text(text, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        read_spec(tmp_path / "s.adapter")
    return caught.value.diagnostics[0]


def test_use_stays_in_its_directory(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "out.adapter").write_text(MINE, encoding="utf-8")
    assert use(inner, 'use "../out.adapter" adapter a = mine').code == "E120"
    assert use(inner, f'use "{tmp_path}/out.adapter" adapter a = mine').code == "E120"
    assert use(inner, 'use "missing.adapter"').code == "E120"
    assert use(inner, 'use ""').code == "E120"
    (inner / "link.adapter").symlink_to(tmp_path / "out.adapter")
    assert use(inner, 'use "link.adapter" adapter a = mine').code == "E120"


def test_use_does_not_go_round(tmp_path):
    found = use(tmp_path, 'use "a.adapter"', a='use "b.adapter"', b='use "a.adapter"')
    assert found.code == "E121"
    assert found.span.source.name.endswith("b.adapter")
    assert use(tmp_path, 'use "s.adapter" adapter a = lora').code in ("E121", "E122")


def test_a_used_file_only_defines_methods(tmp_path):
    assert use(tmp_path, 'use "a.adapter"', a="adapter x = lora").code == "E122"


def test_a_method_is_defined_once(tmp_path):
    assert use(tmp_path, f'use "a.adapter" {MINE}', a=MINE).code == "E131"
    with pytest.raises(SpecError, match="built-in"):
        read_spec(MINE.replace("mine", "lora"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\\\b", ".hidden", "x" * 65, "a\\n", " a", "a:b"])
def test_names_are_safe_directory_names(name):
    with pytest.raises(SpecError, match="E145"):
        read_spec(f'adapter "{name}" = lora')


# --- regions ---


@pytest.mark.parametrize("regions", ["layers", "modules", "model"])
def test_regions_of_a_base(regions):
    spec = read_spec(f'base {{ regions = "{regions}" hidden_size = 3 }} adapter a = lora')
    assert spec.regions == regions
    assert spec.base is not None
    assert [each.name for each in spec.base.entries] == ["hidden_size"], "the model has to be nothing for it"
    assert read_spec("adapter a = lora").regions is None
    assert read_spec("base { hidden_size = 3 } adapter a = lora").regions is None


@pytest.mark.parametrize(
    ("written", "code", "marked", "help"),
    [
        ('"layer"', "E151", '"layer"', "did you mean 'layers'?"),
        ('"everything"', "E151", '"everything"', "it is one of model, layers, modules"),
        ('""', "E151", '""', "it is one of model, layers, modules"),
        ("layers", "E152", "layers", 'as in regions = "layers"'),
        ("3", "E152", "3", ""),
        ("none", "E152", "none", ""),
    ],
)
def test_regions_that_are_none(written, code, marked, help):
    with pytest.raises(SpecError) as caught:
        read_spec(f"base {{ regions = {written} }} adapter a = lora")
    (told,) = caught.value.diagnostics
    assert (told.code, told.span and told.span.text, told.help) == (code, marked, help)


def test_regions_are_said_once():
    with pytest.raises(SpecError, match="E147"):
        read_spec('base { regions = "layers" regions = "layers" } adapter a = lora')

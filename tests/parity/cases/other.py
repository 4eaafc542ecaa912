"""Methods that scale, scatter, transform or train what is no product of thin matrices."""

import peft

from tests.parity.cases.case import LINEAR, Case

CASES = (
    Case("ia3", "", lambda **k: peft.IA3Config(feedforward_modules=[], **k)),
    Case(
        "ia3",
        "feedforward",
        lambda **k: peft.IA3Config(feedforward_modules=["down_proj"], **k),
        models=("llama",),
        clauses="refine down_proj with feedforward = true",
    ),
    Case(
        "fourierft",
        "",
        lambda **k: peft.FourierFTConfig(n_frequency=300, scaling=30, **k),
        "count = 300, scaling = 30",
        starts_as_base=False,
    ),
    Case(
        "fourierft",
        "zero",
        lambda **k: peft.FourierFTConfig(n_frequency=90, scaling=40, random_loc_seed=5, init_weights=True, **k),
        "count = 90, scaling = 40, seed = 5, zero = true",
    ),
    Case(
        "fourierft",
        "varied",
        lambda **k: peft.FourierFTConfig(
            n_frequency=300, n_frequency_pattern={"down_proj": 77}, init_weights=True, **k
        ),
        "count = 300, zero = true",
        models=("llama",),
        targets={"llama": ["q_proj", "down_proj"]},
        clauses="refine down_proj with count = 77",
    ),
    Case("waveft", "", lambda **k: peft.WaveFTConfig(n_frequency=300, **k), "count = 300", std=0.1),
    Case(
        "waveft",
        "symlet",
        lambda **k: peft.WaveFTConfig(n_frequency=300, scaling=3, wavelet_family="sym9", **k),
        'count = 300, scaling = 3, family = "sym9"',
    ),
    Case(
        "waveft",
        "coiflet, varied",
        lambda **k: peft.WaveFTConfig(
            n_frequency=300, wavelet_family="coif2", n_frequency_pattern={"down_proj": 77}, **k
        ),
        'count = 300, family = "coif2"',
        models=("llama",),
        targets={"llama": ["q_proj", "down_proj"]},
        clauses="refine down_proj with count = 77",
    ),
    Case(
        "waveft",
        "proportional, not transformed",
        lambda **k: peft.WaveFTConfig(
            n_frequency=300, use_idwt=False, proportional_parameters=True, random_loc_seed=5, **k
        ),
        "count = 300, transform = false, proportional = true, seed = 5",
    ),
    Case("shira", "", lambda **k: peft.ShiraConfig(r=4, **k), "rank = 4", LINEAR),
    Case("shira", "seeded", lambda **k: peft.ShiraConfig(r=2, random_seed=7, **k), "rank = 2, seed = 7", LINEAR),
    Case("supertuning", "", lambda **k: peft.SupertuningConfig(sparsity=0.9, **k), "sparsity = 0.9", LINEAR),
    Case(
        "supertuning",
        "found again",
        lambda **k: peft.SupertuningConfig(sparsity=0.8, select_top=False, save_precomputed_indices=False, **k),
        "sparsity = 0.8, top = false, save_indices = false",
        LINEAR,
    ),
    Case(
        "supertuning_lora",
        "",
        lambda **k: peft.SupertuningConfig(sparsity=0.9, r=3, lora_alpha=5, **k),
        "sparsity = 0.9, rank = 3, alpha = 5",
        LINEAR,
    ),
    Case("beft", "", lambda **k: peft.BeftConfig(**k), "", LINEAR),
    *(
        Case(
            "glora",
            f"{weights}, {cross}, {biases}",
            lambda weights=weights, cross=cross, biases=biases, **k: peft.GloraConfig(
                r=4, config_A_B=weights, config_C=cross, config_D_E=biases, **k
            ),
            f'rank = 4, weights = "{weights}", cross = "{cross}", biases = "{biases}"',
            LINEAR if weights != "none" else ("bert",),
            targets={"llama": ["q_proj"]} if weights == "none" else {},  # without biases nothing would be left
        )
        for weights, cross, biases in (
            ("lora", "lora", "constant"),
            ("vector", "none", "vector"),
            ("constant", "vector", "none"),
            ("none", "vector", "constant"),
            ("none", "none", "vector"),
        )
    ),
    Case(
        "ln_tuning",
        "",
        lambda **k: peft.LNTuningConfig(**k),
        targets={"llama": ["input_layernorm", "norm"], "bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_f"]},
    ),
    Case("peanut", "", lambda **k: peft.PeanutConfig(r=4, **k), "rank = 4", LINEAR),
    *(
        Case(
            "peanut",
            f"{depth}, {act}",
            lambda depth=depth, act=act, **k: peft.PeanutConfig(r=4, depth=depth, act_fn=act, scaling=0.5, **k),
            f'rank = 4, depth = {depth}, act = "{act}", scaling = 0.5',
            LINEAR,
        )
        for depth, act in ((1, "gelu"), (2, "silu"), (3, "tanh"), (4, "quick_gelu"))
    ),
    Case("frod", "", lambda **k: peft.FrodConfig(progressbar=False, **k), prefix="frod_lambda"),
    Case(
        "frod",
        "found again",
        lambda **k: peft.FrodConfig(
            sparse_rate=0.05,
            projection_prng_key=3,
            regularization_alpha=0.1,
            save_projection=False,
            progressbar=False,
            **k,
        ),
        "rate = 0.05, seed = 3, ridge = 0.1, save_projection = false",
        prefix="frod_lambda",
    ),
)

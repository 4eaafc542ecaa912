"""Methods that rotate, permute or mix by blocks."""

import peft
import torch
from peft.tuners.boft import layer as boft_layer

from tests.parity.cases.case import ALL, LINEAR, Case


class BlockDiagonals:
    """What peft compiles for CUDA, without which it computes one butterfly factor, however many are configured."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*each) for each in blocks])


boft_layer.get_fbd_cuda, boft_layer.FastBlockDiag = lambda: True, BlockDiagonals

CASES = (
    Case("road", "1", lambda **k: peft.RoadConfig(group_size=8, **k), "group = 8", LINEAR),
    Case(
        "road",
        "2",
        lambda **k: peft.RoadConfig(variant="road_2", group_size=16, **k),
        'variant = "road_2", group = 16',
        LINEAR,
    ),
    Case(
        "road",
        "4",
        lambda **k: peft.RoadConfig(variant="road_4", group_size=4, **k),
        'variant = "road_4", group = 4',
        LINEAR,
    ),
    Case("miss", "", lambda **k: peft.MissConfig(r=8, **k), "rank = 8", LINEAR),
    Case("miss", "of no divisor", lambda **k: peft.MissConfig(r=5, **k), "rank = 5", LINEAR),
    Case(
        "miss",
        "random",
        lambda **k: peft.MissConfig(r=8, init_weights=False, miss_dropout=0.25, **k),
        'rank = 8, init = "random", dropout = 0.25',
        LINEAR,
        starts_as_base=False,
    ),
    Case(
        "miss_mini",
        "",
        lambda **k: peft.MissConfig(r=8, mini_r=4, init_weights="mini", **k),
        "rank = 8, mini = 4",
        LINEAR,
    ),
    Case("miss_bat", "", lambda **k: peft.MissConfig(r=8, init_weights="bat", **k), "rank = 8", LINEAR),
    Case("delora", "", lambda **k: peft.DeloraConfig(r=4, **k), "rank = 4", LINEAR),
    Case(
        "delora",
        "patterns",
        lambda **k: peft.DeloraConfig(
            r=4,
            delora_lambda=5,
            module_dropout=0.25,
            rank_pattern={"query|q_proj": 2},
            lambda_pattern={"query|q_proj": 7},
            **k,
        ),
        "rank = 4, strength = 5, dropout = 0.25",
        LINEAR,
        clauses='refine ".*(query|q_proj)" with rank = 2, strength = 7',
    ),
    Case("deft", "", lambda **k: peft.DeftConfig(r=4, **k), "rank = 4", ALL, start_tolerance=1e-5),
    Case(
        "deft",
        "scaled",
        lambda **k: peft.DeftConfig(r=4, alpha=6, deft_dropout=0.25, **k),
        "rank = 4, alpha = 6, dropout = 0.25",
        ALL,
        start_tolerance=1e-5,
    ),
    Case(
        "deft",
        "qr",
        lambda **k: peft.DeftConfig(r=4, decomposition_method="qr", **k),
        'rank = 4, decomposition = "qr"',
        ALL,
        start_tolerance=1e-5,
    ),
    Case(
        "deft",
        "projecting",
        lambda **k: peft.DeftConfig(r=4, para=True, **k),
        "rank = 4, project_only = true",
        ALL,
        starts_as_base=False,
    ),
    Case(
        "deft",
        "projecting by qr",
        lambda **k: peft.DeftConfig(r=4, para=True, decomposition_method="qr", **k),
        'rank = 4, project_only = true, decomposition = "qr"',
        ALL,
        starts_as_base=False,
    ),
    # The gradient peft's own backward gives the input is wrong, so only that of a single site can be compared.
    Case(
        "c3a",
        "",
        lambda **k: peft.C3AConfig(block_size=8, **k),
        "block = 8",
        LINEAR,
        starts_as_base=False,
        gradients=False,
    ),
    Case(
        "c3a",
        "of one site",
        lambda **k: peft.C3AConfig(block_size=16, init_weights=True, layers_to_transform=[1], **k),
        'block = 16, init = "zeros"',
        LINEAR,
        targets={"llama": ["down_proj"], "bert": ["value"]},
        std=3.0,
    ),
    *(
        Case(
            "c3a",
            name,
            lambda init=init, **k: peft.C3AConfig(
                block_size=8, init_weights=init, block_size_pattern={"query": 4, "q_proj": 4}, **k
            ),
            f'block = 8, init = "{name}"',
            LINEAR,
            clauses='refine ".*(query|q_proj)" with block = 4',
            starts_as_base=False,
            gradients=False,
        )
        for name, init in (("kaiming_uniform", "kaiming_uniform"), ("gaussian", "gaussian"), ("random", False))
    ),
    Case("gralora", "", lambda **k: peft.GraloraConfig(r=8, **k), "rank = 8", ALL),
    Case(
        "gralora",
        "in sixteen blocks",
        lambda **k: peft.GraloraConfig(r=8, gralora_k=4, alpha=6, **k),
        "rank = 8, splits = 4, alpha = 6",
        ALL,
    ),
    Case(
        "gralora",
        "hybrid",
        lambda **k: peft.GraloraConfig(r=8, hybrid_r=3, alpha=6, gralora_dropout=0.25, **k),
        "rank = 8, general = 3, alpha = 6, dropout = 0.25",
        ALL,
    ),
    # The series of a large skew matrix in blocks of 32 magnifies rounding.
    Case("oft", "", lambda **k: peft.OFTConfig(**k), "", LINEAR, embeddings=True, std=0.1),
    Case("oft", "blocks of no divisor", lambda **k: peft.OFTConfig(oft_block_size=7, **k), "block = 7", LINEAR),
    Case(
        "oft",
        "as many blocks",
        lambda **k: peft.OFTConfig(r=5, oft_block_size=0, **k),
        "block = 0, count = 5",
        LINEAR,
        std=0.1,
    ),
    Case(
        "oft",
        "exact",
        lambda **k: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, module_dropout=0.25, **k),
        "block = 4, neumann = false",
        LINEAR,
    ),
    Case(
        "oft",
        "constrained",
        lambda **k: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.3, **k),
        "block = 4, constrain = true, eps = 0.3",
        LINEAR,
    ),
    Case(
        "oft",
        "constrained and exact",
        lambda **k: peft.OFTConfig(oft_block_size=4, coft=True, eps=2, use_cayley_neumann=False, **k),
        "block = 4, constrain = true, eps = 2, neumann = false",
        LINEAR,
    ),
    Case(
        "oft",
        "shared",
        lambda **k: peft.OFTConfig(oft_block_size=4, block_share=True, **k),
        "block = 4, shared = true",
        LINEAR,
    ),
    Case(
        "oft",
        "shared and constrained",
        lambda **k: peft.OFTConfig(oft_block_size=4, block_share=True, coft=True, eps=0.3, **k),
        "block = 4, shared = true, constrain = true, eps = 0.3",
        LINEAR,
    ),
    *(
        Case(
            "oft",
            f"{terms} terms",
            lambda terms=terms, **k: peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=terms, **k),
            f"block = 4, terms = {terms}",
            LINEAR,
            std=0.1,
        )
        for terms in (2, 3, 4, 7)
    ),
    Case("boft", "", lambda **k: peft.BOFTConfig(**k), "", LINEAR),
    Case(
        "boft",
        "as many blocks",
        lambda **k: peft.BOFTConfig(boft_block_size=0, boft_block_num=8, **k),
        "block = 0, count = 8",
        LINEAR,
    ),
    *(
        Case(
            "boft",
            f"{factors} factors",
            lambda factors=factors, **k: peft.BOFTConfig(boft_n_butterfly_factor=factors, **k),
            f"factors = {factors}",
            LINEAR,
        )
        for factors in (2, 3)
    ),
    # Pairs of equal reflections undo each other but for rounding.
    Case("hra", "", lambda **k: peft.HRAConfig(r=8, **k), "rank = 8", LINEAR, start_tolerance=1e-5),
    Case("hra", "odd", lambda **k: peft.HRAConfig(r=3, **k), "rank = 3", LINEAR, starts_as_base=False),
    Case(
        "hra",
        "span",
        lambda **k: peft.HRAConfig(r=4, apply_GS=True, init_weights=False, **k),
        "rank = 4, span = true",
        LINEAR,
        starts_as_base=False,
    ),
    *(
        Case(
            "psoft",
            label,
            lambda fields=fields, **k: peft.PsoftConfig(r=4, **fields, **k),
            f"rank = 4{arguments}",
            LINEAR,
        )
        for label, fields, arguments in (
            ("", {}, ""),
            ("balanced", {"ab_svd_init": "pissa_init", "psoft_alpha": 3}, ', balance = "pissa_init"'),
            ("plain", {"psoft_mag_a": False, "psoft_mag_b": False}, ", rows = false, columns = false"),
            ("rows", {"psoft_mag_a": False, "psoft_dropout": 0.25}, ", columns = false, dropout = 0.25"),
            ("free", {"psoft_orth": False}, ", orthogonal = false"),
            *(
                (
                    f"{terms} terms",
                    {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms},
                    f", neumann = true, terms = {terms}",
                )
                for terms in (2, 3, 4, 5, 7)
            ),
            (
                "lowrank",
                {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 2, "random_seed": 3},
                ', svd = "lowrank", rounds = 2, seed = 3',
            ),
            (
                "bounded",
                {"use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
                ", neumann = true, eps = 0.5",
            ),
        )
    ),
)

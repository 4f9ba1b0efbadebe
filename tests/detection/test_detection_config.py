"""Do the YAML files, sizes and overrides say what is built, and are mistakes in them named?"""

import pytest
from detectron2.modeling import BACKBONE_REGISTRY
from tiny_detector import CONFIGS

from backbones.utils.errors import UserError
from detection.backbone import backbone_config
from detection.config import get_config, load_config

FAMILIES = {
    "softmax": ("softmax", "mlp"),
    "karat": ("karat", "mlp"),
    "kat": ("softmax", "grkan"),
    "karkat": ("karat", "grkan"),
    "gated_karat": ("karat", "mlp"),
    "gated_karkat": ("karat", "grkan"),
    "vitkan": ("softmax", "kan"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [None, "nano", "tiny", "small", "base"])
def test_each_config_at_each_size_describes_its_backbone(family, size):
    cfg = load_config(CONFIGS / f"vitdet_{family}.yaml", size)
    backbone = backbone_config(cfg)
    assert (backbone.attention.kind, backbone.ffn.kind) == FAMILIES[family]
    assert backbone.attention.blend == ("add" if family.startswith("gated") else "replace")
    assert f"_{size or 'base'}_" in backbone.arch
    assert backbone.num_classes == 0
    assert not backbone.final_norm
    assert not backbone.class_token
    assert backbone.img_size == (cfg.INPUT.IMAGE_SIZE,) * 2


def test_base_config_has_vitdets_recipe():
    cfg = load_config(CONFIGS / "vitdet_softmax.yaml")
    backbone = backbone_config(cfg)
    assert (backbone.window_size, backbone.global_blocks, backbone.drop_path) == (14, (2, 5, 8, 11), 0.1)
    solver = cfg.SOLVER
    assert (solver.REFERENCE_LR, solver.REFERENCE_BATCH, solver.WEIGHT_DECAY, solver.LAYER_DECAY) == (
        1e-4,
        64,
        0.1,
        0.7,
    )
    assert cfg.MODEL.RPN.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[32], [64], [128], [256], [512]]
    assert cfg.INPUT.MAX_SIZE_TEST == cfg.MODEL.SFP.SQUARE_PAD == 1024


def test_config_states_its_command_and_expectation():
    for path in [*CONFIGS.glob("[a-z]*.yaml"), *CONFIGS.glob("sizes/*.yaml")]:
        comment = path.read_text().split("MODEL:")[0]
        assert "tools/train_net.py" in comment, path
        assert "Expect" in comment, path


def test_nested_backbone_keys_can_be_overridden():
    overrides = ["MODEL.VIT.attention.rank", "8", "MODEL.VIT.global_blocks", "(1, 3)", "SOLVER.EPOCHS", "3"]
    cfg = load_config(CONFIGS / "vitdet_karat.yaml", None, overrides)
    backbone = backbone_config(cfg)
    assert (backbone.attention.rank, backbone.attention.kind) == (8, "karat")
    assert backbone.global_blocks == (1, 3)
    assert cfg.SOLVER.EPOCHS == 3.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.VIT.attention.rnk", "8"], "'rank'"),
        (["MODEL.VIT.widnow_size", "8"], "'window_size'"),
        (["SOLVER.EPOCH", "8"], "'EPOCHS'"),
        (["MODELL.VIT.arch", "8"], "'MODEL'"),
        (["SOLVER.MAX_ITER", "90000"], r"SOLVER\.EPOCHS"),
        (["SOLVER.BASE_LR", "0.1"], r"SOLVER\.REFERENCE_LR"),
        (["DATASETS.TRAIN", "coco"], r"DATASETS\.TRAIN_JSON"),
        (["SOLVER.EPOCHS", "many"], "must be a float"),
        (["SOLVER.EPOCHS", "0"], "more than 0"),
        (["SOLVER", "0"], "section"),
        (["SOLVER.EPOCHS.x", "0"], "single value"),
        (["SOLVER.EPOCHS"], "no value"),
        (["MODEL.VIT.arch", "karat_bsae_patch16_224"], "karat_base_patch16_224"),
        (["MODEL.VIT.num_classes", "10"], "num_classes"),
        (["MODEL.VIT.global_blocks", "[40]"], "global_blocks holds 40"),
        (["INPUT.IMAGE_SIZE", "1000"], "992 or 1008"),
        (["INPUT.IMAGE_SIZE", "1008"], "multiple of 32"),
        (["INPUT.MAX_SIZE_TEST", "1333"], "SQUARE_PAD"),
        (["MODEL.SFP.SCALE_FACTORS", "[4.0, 3.0]"], "SCALE_FACTORS"),
        (["MODEL.RPN.IN_FEATURES", "['p2', 'p9']"], "p9"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64]]"], "one list per level"),
        (["SOLVER.LR_SCHEDULER_NAME", "cosine"], "WarmupCosineLR"),
        (["SOLVER.OPERATOR_LR", "0"], r"SOLVER\.OPERATOR_LR is '0'; it must be 'derived', or a positive factor"),
        (["SOLVER.OPERATOR_LR", "-0.5"], r"SOLVER\.OPERATOR_LR is '-0.5'"),
        (["SOLVER.OPERATOR_LR", "fast"], r"SOLVER\.OPERATOR_LR is 'fast'"),
        (["MODEL.VIT.attention.blend", "add", "MODEL.VIT.attention.kind", "softmax"], "nothing to add to itself"),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(CONFIGS / "vitdet_karat.yaml", None, overrides)


def test_unknown_size_and_missing_file_are_named(tmp_path):
    with pytest.raises(UserError, match="nano"):
        load_config(CONFIGS / "vitdet_karat.yaml", "nanno")
    with pytest.raises(UserError, match=r"vitdet_karat\.yaml"):
        load_config(tmp_path / "vitdet_karrat.yaml")
    (tmp_path / "a.yaml").write_text("_BASE_: absent.yaml\n")
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load_config(tmp_path / "a.yaml")


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: !!python/object/apply:os.getpid []\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "a.yaml")


def test_backbone_is_in_detectron2s_registry():
    assert get_config().MODEL.BACKBONE.NAME in BACKBONE_REGISTRY

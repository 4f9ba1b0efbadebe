"""Recipes: shipped ones load, overrides apply, and wrong ones are named."""

from pathlib import Path

import pytest

from classification.config import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "classification" / "recipes").glob("*.yaml"))
NANO = RECIPES[0].parent / "nano.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipe_loads_and_says_how_to_run_it(path):
    assert load_recipe(path, ["data.root=x"]).train.epochs > 0
    assert path.read_text().startswith(f"# tools/pretrain_cls.py --config classification/recipes/{path.name}")


def test_overrides_reach_nested_keys_and_numbers_in_any_spelling():
    recipe = load_recipe(
        NANO,
        ["data.root=2024", "train.lr=1e-3", "model.attention.rank=4", "augment.scale=[0.2, 1]", "model.drop_path=0"],
    )
    assert recipe.data.root == "2024"
    assert recipe.train.lr == 1e-3
    assert recipe.model["attention"] == {"rank": 4}
    assert recipe.augment.scale == [0.2, 1.0]
    assert recipe.model["drop_path"] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "data.root is missing"),
        (["data.root"], "'data.root' is not key=value"),
        (["data.rot=x"], "Did you mean 'root'"),
        (["train.epochs=many"], "train.epochs is 'many'; it must be a int"),
        (["data.root=x", "train.epochs=0"], "train.epochs is 0; it must be at least 1"),
        (["train=3"], "train is 3; it holds keys"),
        (["data.root=x", "train.precision=fp8"], "'auto', 'fp32', 'bf16'"),
        (["data.root=x", "train.warmup_epochs=99"], "does not end within"),
        (["data.root=x", "data.crop_pct=2"], "between 0 and 1"),
        (
            ["data.root=x", "train.operator_lr=0"],
            "train.operator_lr is '0'; it must be 'derived', or a positive",
        ),
        (["data.root=x", "train.operator_lr=quick"], "train.operator_lr is 'quick'"),
        (["data.root=x", "train.log_operators=2"], "train.log_operators is 2; it must be a bool"),
    ],
)
def test_wrong_overrides_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(NANO, overrides)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe .*nano.yaml"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("train: [1, 2")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold keys"):
        load_recipe(tmp_path / "list.yaml")

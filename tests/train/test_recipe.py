"""Recipes: every mistake at once, nearest names, nothing imported or run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardmix.train.recipe import MAX_BYTES, RecipeError, load_recipe, shipped


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_shipped_recipe_loads_and_survives_a_round_trip(tmp_path):
    assert shipped()
    for name in shipped():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.about
        again = load_recipe(write(tmp_path, recipe.to_toml()))
        assert again == recipe


def test_all_mistakes_are_reported_at_once_with_the_nearest_name(tmp_path):
    path = write(
        tmp_path,
        """
        task = "classification"
        [policy]
        name = "mixpu"
        [objective]
        name = "decoupled-mixup"
        etaa = 0.5
        [train]
        epohs = 3
        lr = nan
        batch_size = "many"
        [data]
        name = "fashion-mnii"
        augment = ["flipp"]
        [model]
        name = "small-resnte"
        """,
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "8 mistakes" in message
    for part in (
        'policy: "mixpu" is not a policy (did you mean "mixup"?)',
        'unknown option of objective "decoupled-mixup": etaa (did you mean "eta"?)',
        'train.epohs: unknown key (did you mean "epochs"?)',
        "train.lr: is nan",
        "train.batch_size: is 'many'",
        "fashion-mini",
        "flip",
        "small-resnet",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[policy]\nname = 'mixup'\nalpha = -1.0", "alpha is -1.0; pass a finite number greater than 0"),
        ("[policy]\nname = 'mixup'\nalpha = inf", "alpha is inf"),
        ("[policy]\nname = 'mixup'\nalpha = true", "policy: Mixup: alpha is True"),
        ("[objective]\nname = 'decoupled-mixup'\nreduction = 'none'", "reduction is 'none'"),
        ("[policy]\nname = 'os.system'", 'policy: "os.system" is not a policy'),
        ("[train]\nepochs = 1", "train.warmup_epochs is 1 but train.epochs is 1"),
        ("[policy]\nname = 'random-choice'", "policies is missing"),
        ("[policy]\nname = 'random-choice'\npolicies = [3]", "a nested policy is 3"),
        ("seed = -1", "seed: is -1"),
        ("name = '../../etc/x'", "name: is '../../etc/x'"),
        ("[train]\nlr = 0", "train.lr: is 0"),
        ("seed = 0\nseed = 1", "not valid TOML"),
        ("[model]\nname = 'small-cnn'\n[model.options]\nwidht = 3", 'did you mean "width"'),
    ],
)
def test_bad_values(tmp_path, text, expected):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert expected in str(caught.value)


def test_random_choice_and_scheduled_nest(tmp_path):
    recipe = load_recipe(
        write(
            tmp_path,
            """
            [policy]
            name = "scheduled"
            stop = 0.8
            [policy.policy]
            name = "random-choice"
            p = [0.5, 0.25, 0.25]
            policies = [{ name = "mixup", alpha = 0.8 }, { name = "cutmix" }, "none"]
            """,
        )
    )
    assert recipe.policy is not None
    assert recipe.policy.name == "scheduled"


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match='did you mean "demo-mixup"'):
        load_recipe("demo-mixupp")


def test_large_and_deep_files_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="a recipe has at most"):
        load_recipe(write(tmp_path, "#" * (MAX_BYTES + 1)))
    for text in ("v = " + "[" * 10_000 + "]" * 10_000, "[" + ".".join("a" * 1 for _ in range(10_000)) + "]"):
        with pytest.raises(RecipeError):
            load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("train.epochs=5", lambda r: r.train.epochs == 5),
        ("train.lr=1", lambda r: r.train.lr == 1.0),
        ("policy.alpha=0.4", lambda r: r.policy.options["alpha"] == 0.4),
        ("policy=none", lambda r: r.policy is None),
        ("data.path=/some/where", lambda r: r.data.path == "/some/where"),
        ('data.augment=["flip"]', lambda r: r.data.augment == ["flip"]),
    ],
)
def test_overrides(override, check):
    assert check(load_recipe("demo-mixup", [override]))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs", "is not key=value"),
        ("=3", "is not key=value"),
        ("name.x=3", "name is a value, not a section"),
        ("train.epoch=3", 'did you mean "epochs"'),
        ("trian.epochs=3", 'did you mean "train"'),
    ],
)
def test_bad_overrides(override, expected):
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo-mixup", [override])
    assert expected in str(caught.value)

"""Recipes: every mistake at once, nearest names, nothing imported or run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hardmix import tables
from hardmix.train.components import Component, check_policy
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


INSIDE = '[{name="mixup", alpha=-1, per="x"}, "none", {name="scheduled", stop=3, policy={name="cutmix", alpha=-2}}]'


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["policy.alpha=-1", "policy.per=foo", "policy.bet=2"],
            ["unknown option of policy", "alpha is -1", "per is 'foo'"],
        ),
        (
            ["objective.name=decoupled-mixup", "objective.eta=-1", "objective.label_smoothing=2", "objective.etaa=1"],
            ["unknown option of objective", "eta is -1", "label_smoothing is 2"],
        ),
        (
            [f'policy={{name="random-choice", p=[1, 1, -1], policies={INSIDE}}}'],
            ["Mixup: alpha is -1", "per is 'x'", "CutMix: alpha is -2", "stop is 3", "p is -1"],
        ),
        (
            ['policy={name="manifold-mixup", layers=["some.layer"], alpha=-1, per="foo"}'],
            ["alpha is -1", "per is 'foo'"],
        ),
        (
            ['policy={name="automix", layer="some.layer", alpha=-1, label="x", upsample="y"}'],
            ["alpha is -1", "label is 'x'", "upsample is 'y'"],
        ),
        (
            ['policy={name="sumix", scale="x", weight=-1, policy={name="cutmix", alpha=-1}}'],
            ["CutMix: alpha is -1", "weight is -1", "scale is 'x'"],
        ),
        (["policy={name='saliencymix', saliency='input-gradient', alpha=-1, per=3}"], ["alpha is -1", "per is 3"]),
        (["policy.name=manifold-mixup"], ['policy "manifold-mixup" needs layers']),
        (
            ["train.lr=1e308", "train.weight_decay=2e30"],
            ["train.lr: is 1e+308; pass a number", "train.weight_decay: is 2"],
        ),
        (
            [
                *("train.warmup_epochs=5", "train.epochs=1", "data.imbalance=5", "policy.name=c-mixup"),
                *("policy.bandwidth=1", "semi.mu=3", "density.bins=7"),
            ],
            [
                *("train.warmup_epochs is 5", "data.imbalance is not read", 'policy "c-mixup" pairs by numbers'),
                *("semi is a section of few-labels", "density is a section of regression"),
            ],
        ),
        (
            ["task=few-labels", "semi.per_class=1", "train.accumulate=2", "train.epochs=0"],
            ["train.epochs is 0", "train.accumulate would tear"],
        ),
    ],
)
def test_all_that_is_wrong_with_a_component_or_between_keys_is_told_at_once(overrides, parts):
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo-mixup", overrides)
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == len(parts), lines
    for part in parts:
        assert sum(part in line for line in lines) == 1, (part, lines)


def test_of_a_contrast_and_an_algorithm_all_is_told_too():
    with pytest.raises(RecipeError) as caught:
        load_recipe("diabetes-supremix", ["contrast.objective.temperature=-1", "contrast.objective.window=-2"])
    assert "has 2 mistakes" in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        load_recipe("few-fixmatch", ["semi.algorithm.threshold=3", "semi.algorithm.weight=-2"])
    assert "has 2 mistakes" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in tables.POLICIES if name not in ("random-choice", *tables.WRAPPERS)])
def test_every_policy_is_checked_without_its_model_and_draws_nothing(name):
    layers = {"layers": ["some.layer"]} if name == "manifold-mixup" else {}
    torch.manual_seed(0)
    check_policy(Component(name=name, **layers))
    before = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == before
    wrong = "pairing" if name in ("guidedmix", "random-choice") else "alpha"
    if name not in ("smoothmix", "resizemix", "smmix"):
        with pytest.raises(ValueError, match=f"{wrong} is -1"):
            check_policy(Component(name=name, **layers, **{wrong: -1}))


@pytest.mark.parametrize(
    ("recipe", "overrides", "keys"),
    [
        ("demo-mixup", ["data.test=0.3", "data.captions=first", "data.target=x"], ["test", "target", "captions"]),
        ("demo-mixup", ["data.samples=3", 'data.styles={a = "b"}', "data.domain=x"], ["domain", "styles", "samples"]),
        ("few-fixmatch", ["data.labels=x.csv", "data.missing=drop"], ["labels", "missing"]),
        ("diabetes-l1", ["data.captions=first", "data.max_length=3"], ["max_length", "captions"]),
    ],
)
def test_keys_that_a_task_does_not_read_are_refused(recipe, overrides, keys):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    _, *lines = str(caught.value).splitlines()
    task = load_recipe(recipe).task
    assert lines == [f'  recipe: data.{key} is not read by task "{task}"; leave it out' for key in keys]


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


@pytest.mark.parametrize("recipe", ["demo-mixup", "diabetes-supremix", "few-fixmatch", "emoji-m2mix"])
@pytest.mark.parametrize("value", ['["digits"]', "{a = 1}", '[["x"]]'])
@pytest.mark.parametrize(
    "key",
    [
        *("data.name", "data.augment", "model.name", "model.options.image.name", "policy.name", "objective.name"),
        *("contrast.objective.name", "contrast.data.name", "semi.algorithm.name", "semi.strong", "tune.start"),
    ],
)
def test_a_name_that_is_no_text_is_told_with_its_key(recipe, key, value):
    if value == '["digits"]' and key in ("data.augment", "semi.strong"):
        value = "{a = 1}"
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [f"{key}={value}"])
    assert key.split(".")[0] in str(caught.value)
    assert "unhashable" not in str(caught.value)


def test_names_to_choose_from_are_listed_once():
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo-mixup", ["objective.name=cross-entropy"])
    names = str(caught.value).partition("there are ")[2].split(", ")
    assert len(names) == len(set(names))


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = write(tmp_path, "\ufeffname = 'marked'\n")
    assert load_recipe(path).name == "marked"


def test_another_seed_is_one_that_a_recipe_may_have():
    recipe = load_recipe("few-fixmatch")
    assert recipe.with_seed(3).semi.model_fields_set == recipe.semi.model_fields_set
    with pytest.raises(RecipeError, match="seed: is 2147483648; input should be less than 2147483648"):
        recipe.with_seed(2**31)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs", "is not key=value"),
        ("=3", "is not key=value"),
        ("train.epochs=3\nlr=4", r"train.epochs: is '3\nlr=4'; input should be a valid integer"),
        ("train.threads=99999999999", "train.threads: is 99999999999; input should be less than or equal to 1024"),
        ("name.x=3", "name is a value, not a section"),
        ("epochs=5", 'epochs: unknown key (did you mean "train.epochs" or "contrast.epochs"?)'),
        ("lr=0.1", 'lr: unknown key (did you mean "train.lr"?)'),
        ("batch_size=3", 'batch_size: unknown key (did you mean "train.batch_size" or "eval.batch_size"?)'),
        ("data.lr=0.1", 'data.lr: unknown key (did you mean "train.lr"?)'),
        ("tune.start=foo", "of which few-labels take tune.start and modalities tune.classes; leave it out"),
        ("objective.name=cross-entropy", '"cross-entropy" is not an objective'),
        ("train.epoch=3", 'did you mean "epochs"'),
        ("trian.epochs=3", 'did you mean "train"'),
        ("contrast.epohs=3", 'contrast.epohs: unknown key (did you mean "epochs"?)'),
        ("policy=mixup", "policy: is 'mixup', which is no table; set policy.name=mixup"),
        ("objective=soft-bce", "objective: is 'soft-bce', which is no table; set objective.name=soft-bce"),
        ("model=resnet18", "model: is 'resnet18', which is no table; set model.name=resnet18"),
        ("data=digits", "set data.name=digits"),
        ("model=3", "model: is 3, which is no table; set model.name=..."),
        ("density=3", "density: is 3, which is no table; set its keys, of which there are lds, fds"),
    ],
)
def test_bad_overrides(override, expected):
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo-mixup", [override])
    assert expected in str(caught.value)

"""Captions in the image-text task: what is written for pictures, how it is measured, and the tokenizer of a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.test_inchi import made_up, molecules
from hardmix.data.characters import PADDING, CaptionTokenizer
from hardmix.data.pair_sets import PAIR_SETS, PairOptions, load_pairs
from hardmix.metrics.captions import caption_metrics
from hardmix.models.pair_model import layer_depths
from hardmix.train.errors import CheckpointError, RecipeError
from hardmix.train.evaluate import evaluate_run, load_run
from hardmix.train.loop import run_recipe
from hardmix.train.pair_eval import pair_tables
from hardmix.train.recipe import Recipe, load_recipe
from hardmix.train.tasks.image_text import ImageText

from .conftest import fingerprint
from .test_image_text import THINGS, differ, pairs, read, steps
from .test_loop import interrupted

MODEL: dict[str, Any] = {
    "name": "coca",
    "options": {
        "features": 16,
        "width": 32,
        "heads": 2,
        "text_layers": 1,
        "layers": 1,
        "queries": 4,
        "dropout": 0.0,
        "unit": "word",
        "image": {"name": "small-cnn", "width": 4},
    },
}
COCA = {"model": MODEL, "objective": {"name": "coca"}}
CAPTION = {f"caption_{key}" for key in ("exact", "edit_distance", "bleu_4", "cider")}


def with_options(**options: Any) -> dict[str, Any]:
    return {"name": "coca", "options": MODEL["options"] | options}


def write_captions(folder: Path, things: list[str]) -> None:
    with open(folder / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption"])
        for number, thing in enumerate(things):
            rows.writerows([[f"{number}.png", thing], [f"{number}.png", f"a drawing of a {thing}"]])


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    """40 small pictures, two captions each, in a folder with a table."""
    folder = tmp_path_factory.mktemp("drawings")
    draws = torch.Generator().manual_seed(0)
    for number in range(len(THINGS)):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=draws)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    write_captions(folder, THINGS)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HARDMIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(drawings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captions") / "run"
    run_recipe(pairs(drawings, **COCA), folder)
    return folder


def recipe(folder: Path, **sections: Any) -> Recipe:
    return pairs(folder, **(COCA | sections))


def test_a_run_writes_captions_and_measures_them(run, drawings) -> None:
    summary = read(run)
    assert set(summary["test"]) >= {"recall_5", "ece", *CAPTION}
    found = summary["captions"]
    assert (found["beams"], found["unit"]) == (4, "word")
    unseen, seen = found["lines"]
    assert (unseen["part"], unseen["style"], unseen["shift"], unseen["pictures"]) == ("unseen", "", False, 12)
    assert (seen["part"], seen["pictures"]) == ("seen", 19)
    assert {f"caption_{key}": value for key, value in unseen["beam"].items()} == {
        key: summary["test"][key] for key in CAPTION
    }
    assert len(found["examples"]) == 8
    loaded = load_run(run)
    from safetensors.torch import load_file

    gallery = load_file(run / "gallery.safetensors")["pictures"]
    captions = loaded.task.data.pairs.captions
    for example in found["examples"]:
        same = (loaded.task.data.pairs.images == gallery[example["row"]]).flatten(1).all(1)
        assert captions[int(same.nonzero()[0, 0])][0] == example["right"], "its own picture is in the gallery"
    again = evaluate_run(run)
    assert again["test"] == pytest.approx(summary["test"])
    assert [e["found"] for e in again["captions"]["examples"]] == [e["found"] for e in found["examples"]]
    page = (run / "report.html").read_text()
    assert "<h2>Captions</h2>" in page
    assert "CoCa" in page


def test_the_command_line_has_a_table_and_examples(run) -> None:
    (heads, lines), (of_examples, examples) = pair_tables(run, task="caption")
    summary = read(run)
    assert all(len(line) == len(heads) for line in lines)
    assert [line[2] for line in lines] == ["greedy", "4 beams"] * 2
    assert lines[1][4] == f"{summary['test']['caption_edit_distance']:.3f}"
    assert of_examples == ["picture", "caption found by 4 beams", "right"]
    assert [line[1:] for line in examples] == [[e["found"], e["right"]] for e in summary["captions"]["examples"]]


def test_the_same_recipe_twice_and_a_stopped_one_are_byte_equal(run, drawings, tmp_path, monkeypatch) -> None:
    stopped = tmp_path / "stopped"
    assert interrupted(recipe(drawings), stopped, 2, monkeypatch) == 2
    run_recipe(recipe(drawings), stopped, resume=True)
    assert fingerprint(stopped) == fingerprint(run)
    assert any(name.endswith("/tokenizer.safetensors") for name in fingerprint(run))
    assert read(stopped)["captions"] == read(run)["captions"]


def test_a_dozen_captions_are_learnt_by_heart(drawings, tmp_path) -> None:
    train = {"epochs": 120, "batch_size": 12, "lr": 5e-3, "checkpoint_every": 120}
    few = {"data": {"train_samples": 12, "captions": "first"}, "train": train}
    for unit in ("word", "character"):
        run_recipe(recipe(drawings, **few, model=with_options(unit=unit), eval={"every": 120}), tmp_path / unit)
        _, seen = read(tmp_path / unit)["captions"]["lines"]
        assert seen["pictures"] == 12
        for search in ("greedy", "beam"):
            assert seen[search] == pytest.approx(
                {"exact": 1.0, "edit_distance": 0.0, "bleu_4": seen[search]["bleu_4"], "cider": seen[search]["cider"]}
            )


def test_what_is_right_is_what_training_takes(drawings) -> None:
    texts = {}
    for keep in ("all", "first"):
        task = ImageText(recipe(drawings, data={"captions": keep}))
        writer = task._writer(task.model)
        assert writer is not None
        texts[keep] = writer.right(torch.tensor([3]))[0]
    assert texts == {"all": [THINGS[3], f"a drawing of a {THINGS[3]}"], "first": [THINGS[3]]}
    assert caption_metrics([THINGS[3]], [texts["all"]])["exact_match"] == 1.0


def test_the_tokenizer_is_of_the_training_captions(drawings) -> None:
    task = ImageText(recipe(drawings, data={"train_samples": 5}))
    own = [text for row in task.data.rows["train"].tolist() for text in task.data.pairs.captions[row]]
    assert task.tokenizer is not None
    assert task.tokenizer.to_dict() == CaptionTokenizer.build(own, unit="word").to_dict()
    assert len(task.tokens) == 80, "texts of all splits have ids, some of them unknown"


def test_a_start_hands_on_its_tokenizer(run, drawings, tmp_path) -> None:
    tuned = recipe(drawings, data={"train_samples": 16}, tune={"start": str(run)}, model=None)
    assert tuned.model.name == "coca"
    run_recipe(tuned, tmp_path / "tuned")
    kept, own = load_run(run).task.tokenizer, ImageText(recipe(drawings, data={"train_samples": 16})).tokenizer
    assert load_run(tmp_path / "tuned").task.tokenizer.to_dict() == kept.to_dict() != own.to_dict()
    before = {key: value for key, value in read(tmp_path / "tuned")["before"].items() if key in CAPTION}
    assert before == {key: read(run)["test"][key] for key in CAPTION}
    further = recipe(drawings, tune={"start": str(tmp_path / "tuned"), "after": "wise-ft", "amount": 0.0})
    run_recipe(further, tmp_path / "further")
    tested = read(tmp_path / "further")["test"]
    assert {key: tested[key] for key in CAPTION} == {key: read(tmp_path / "tuned")["test"][key] for key in CAPTION}


def test_captions_that_have_changed_are_refused(drawings, tmp_path) -> None:
    moved = tmp_path / "drawings"
    moved.mkdir()
    for file in drawings.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    run_recipe(recipe(moved, train={"epochs": 1}, eval={"parts": ["caption"]}), tmp_path / "run")
    write_captions(moved, [thing.replace("red", "pink") for thing in THINGS])
    with pytest.raises(CheckpointError, match=r"writes \d+ tokens, .* give it the data that it was trained on"):
        load_run(tmp_path / "run")
    write_captions(moved, THINGS)
    assert set(evaluate_run(tmp_path / "run")["test"]) == CAPTION


def test_padding_that_all_captions_of_a_batch_have_is_left_out(drawings) -> None:
    task = ImageText(recipe(drawings))
    task.model.eval()
    batch = task.load(torch.arange(4))
    batch = (batch[0], batch[1][:, :1], torch.ones_like(batch[2]), batch[3])  # the short caption of each
    inputs, _ = task._inputs(batch, torch.Generator().manual_seed(0))
    assert inputs[1].shape == (4, 4)
    assert (inputs[1] != PADDING).sum(1).max() == 4
    found = task.model(inputs[0], task.tokens[batch[1][:, 0]])
    whole = task.objective.objective(found.image, found.text, found.logits, found.scale, task.tokens[batch[1][:, 0]])
    loss, _ = task.loss(task.model, batch, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)


def test_mixing_is_of_the_contrast(drawings) -> None:
    values = []
    for objective in ({}, {"mixing": 0.0}, {"mixing": 1e-12}, {"mixing": 1.0}, {"caption_weight": 4.0}):
        task = ImageText(recipe(drawings, objective={"name": "coca", **objective}))
        task.start_step(0.0, torch.Generator().manual_seed(0))
        values.append(task.loss(task.model, task.load(torch.arange(8)), torch.Generator().manual_seed(0))[0].item())
    assert values[0] == values[1] == pytest.approx(values[2], rel=1e-6)
    assert values[3] > values[0] + 0.1
    assert values[4] > values[0] + 1.0


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(mixing, drawings) -> None:
    model = with_options(image={"name": "tiny-vit", "dim": 8, "depth": 3, "heads": 2})
    task = ImageText(recipe(drawings, model=model, objective={"name": "coca", "mixing": mixing}))
    task.model.train()
    task.start_step(0.0, torch.Generator().manual_seed(0))
    batch = task.load(torch.arange(8))
    loss, _ = task.loss(task.model, batch, torch.Generator().manual_seed(0))
    loss.backward()
    whole = {key: p.grad.clone() for key, p in task.model.named_parameters()}
    task.model.zero_grad()
    value, _ = task.loss_in_parts(task.model, batch, torch.Generator().manual_seed(0), 3, lambda loss: loss)
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)
    for key, p in task.model.named_parameters():
        assert torch.allclose(p.grad, whole[key], rtol=1e-4, atol=1e-5), key


def test_parts_are_held(drawings) -> None:
    _, before, after = steps(recipe(drawings))
    everything = {"image", "decoder", "tokens", "pool", "pool_all", "image_projection", "text_projection"}
    assert differ(before, after) == {*everything, "logit_scale"}
    _, before, after = steps(
        recipe(drawings, tune={"freeze": ["image", "image_projection"], "learn_temperature": False})
    )
    assert differ(before, after) == {"decoder", "text_projection"}
    _, before, after = steps(recipe(drawings, tune={"freeze": ["text", "text_projection"]}))
    assert not {"decoder", "text_projection"} & differ(before, after)


def test_pictures_are_normalised_and_scaled_before_the_encoder(drawings) -> None:
    task = ImageText(recipe(drawings, model=with_options(image={"name": "small-cnn", "width": 4, "input_size": 24})))
    x = task.inputs[:2].float() / 255
    encoder = task.model.image
    wanted = torch.nn.functional.interpolate(x, (24, 24), mode="bilinear", antialias=True)
    assert torch.allclose(encoder.forward_features(x), encoder.model.forward_features((wanted - 0.5) / 0.5), atol=1e-5)
    assert encoder.num_features == encoder.forward_features(x).shape[1]


REFUSED = {
    "another objective": (
        {"objective": {"name": "clip"}},
        'objective "clip" knows nothing of; set objective.name=coca',
    ),
    "another model": ({"model": {"name": "two-tower"}}, 'model "two-tower" writes none; set model.name=coca'),
    "a head": ({"tune": {"head": True}}, "tune.head trains a classifier"),
    "a policy": ({"policy": {"name": "mixup"}}, "it goes with i-mix, un-mix"),
    "a text tower": ({"model": with_options(text={"name": "subwords"})}, "unknown option of model .*: text"),
    "an option": ({"model": with_options(layer=3)}, 'did you mean "layers"'),
    "a backbone": ({"model": with_options(image={"name": "resnet19"})}, "coca|image_tower.*did you mean"),
    "its option": ({"model": with_options(image={"name": "small-cnn", "widht": 4})}, 'did you mean "width"'),
    "features": ({"model": with_options(image={"name": "small-cnn", "frozen": True})}, "take tune.freeze"),
    "a unit": ({"model": with_options(unit="wrod")}, 'coca: unit is .wrod.*did you mean "word"'),
    "a length": ({"model": with_options(max_length=2)}, "max_length is 2; pass an integer of at least 3"),
    "a width": ({"model": with_options(width=30)}, "width is 30"),
    "a mixing": ({"objective": {"name": "coca", "mixing": -1.0}}, "CoCaLoss: mixing is -1.0"),
    "a contrast": (
        {"objective": {"name": "coca", "contrastive": "clip"}},
        "it takes caption_weight, label_smoothing, ",
    ),
}


@pytest.mark.parametrize(("sections", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_together_is_refused(sections, message, drawings) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        ImageText(recipe(drawings, **sections))


def test_two_towers_write_no_captions(drawings, tmp_path) -> None:
    run_recipe(pairs(drawings, train={"epochs": 1}, eval={"parts": ["retrieval"]}), tmp_path / "run")
    with pytest.raises(ValueError, match="eval: model two-tower writes no captions; take a run of model coca"):
        pair_tables(tmp_path / "run", task="caption")
    with pytest.raises(CheckpointError, match=r"tune.start: the checkpoint lacks \S+; it belongs to another model"):
        ImageText(recipe(drawings, tune={"start": str(tmp_path / "run")}))


def test_molecules_are_read_where_they_are(tmp_path, monkeypatch) -> None:
    place = molecules(tmp_path / "package", ("uob", "uspto"), texts=made_up(60))
    for options in (PairOptions(domain="uob", size=8), PairOptions(domain="uob", size=8, max_length=21, samples=20)):
        found, sources = load_pairs("inchi", tmp_path / "package", options)
        assert sources == ("uob",)
        assert (found.name, len(found.captions)) == ("inchi", options.samples or 61)
    assert max(len(texts[0]) for texts in found.captions) <= 21
    monkeypatch.setenv("HARDMIX_DATA", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match=r"inchi is not in .*image2inchi==2.0.3\), or pass its folder as path"):
        load_pairs("inchi")
    with pytest.raises(ValueError, match="max_length is 5, which emoji does not take"):
        load_pairs("emoji", None, PairOptions(max_length=5))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "molecules").symlink_to(place)
    find = PAIR_SETS["inchi"].find
    assert find is not None
    assert find(None).path == tmp_path / "data" / "molecules"


@pytest.mark.parametrize("name", ["emoji-caption", "inchi-caption"])
def test_the_recipes_train(name, tmp_path) -> None:
    place = molecules(tmp_path / "package", ("uob", "uspto"), texts=made_up(60))
    where = {
        "inchi-caption": [f"data.path={place}", "data.domain=uob+uspto", "data.samples=0"],
        "emoji-caption": ["data.train_samples=24"],
    }
    task = ImageText(load_recipe(name, where[name]))
    loss, _ = task.loss(task.model, task.load(torch.arange(4)), torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite()
    writer = task._writer(task.model)
    assert writer is not None
    assert len(writer.write(torch.arange(3), 1)) == 3


def test_the_layers_of_a_decoder_decay_from_its_end(drawings) -> None:
    task = ImageText(pairs(drawings, model=with_options(layers=2), objective={"name": "coca"}))
    depths = layer_depths(task.model)
    deepest = max(depths.values())
    assert depths["decoder.positions"] == deepest, "what stands before the layers counts as the first one"
    first, second = (
        {depth for name, depth in depths.items() if name.startswith(f"decoder.write.{block}.")} for block in (0, 1)
    )
    assert len(first) == len(second) == 1, "a block is one layer"
    assert deepest > min(first) == min(second) + 1 > 1

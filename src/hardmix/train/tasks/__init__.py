"""One file per kind of target."""

from hardmix.train.tasks.classification import Classification
from hardmix.train.tasks.image_text import ImageText
from hardmix.train.tasks.regression import Regression

TASKS: dict[str, type[Classification] | type[Regression] | type[ImageText]] = {
    "classification": Classification,
    "regression": Regression,
    "image-text": ImageText,
}

"""One file per kind of target."""

from hardmix.train.tasks.classification import Classification
from hardmix.train.tasks.few_labels import FewLabels
from hardmix.train.tasks.image_text import ImageText
from hardmix.train.tasks.modalities import Modalities
from hardmix.train.tasks.regression import Regression

TASKS: dict[str, type[Classification] | type[Regression] | type[ImageText] | type[Modalities]] = {
    "classification": Classification,
    "regression": Regression,
    "image-text": ImageText,
    "few-labels": FewLabels,
    "modalities": Modalities,
}

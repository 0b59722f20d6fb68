"""One file per kind of target."""

from hardmix.train.tasks.classification import Classification
from hardmix.train.tasks.regression import Regression

TASKS: dict[str, type[Classification] | type[Regression]] = {
    "classification": Classification,
    "regression": Regression,
}

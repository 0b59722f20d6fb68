"""One file per kind of target."""

from hardmix.train.tasks.classification import Classification

TASKS = {"classification": Classification}

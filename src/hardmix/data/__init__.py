"""Data sets: named ones, folders of images, splits, and views of whole batches. Nothing is ever downloaded."""

from hardmix.data.captioned import read_captions, read_shards
from hardmix.data.catalog import CATALOG, Entry, Whereabouts, find, load_images, survey
from hardmix.data.emoji import load_emoji, relations
from hardmix.data.folder import load_folder
from hardmix.data.images import FileImages, ImageData, ImageSet, TensorImages, channel_statistics, check_finite
from hardmix.data.number_sets import NUMBER_SETS, load_numbers
from hardmix.data.numbers import Numbers
from hardmix.data.pairs import Pairs
from hardmix.data.splits import stratified_subset, train_validation_split
from hardmix.data.views import Augment, Normalize

__all__ = [
    "CATALOG",
    "NUMBER_SETS",
    "Augment",
    "Entry",
    "FileImages",
    "ImageData",
    "ImageSet",
    "Normalize",
    "Numbers",
    "Pairs",
    "TensorImages",
    "Whereabouts",
    "channel_statistics",
    "check_finite",
    "find",
    "load_emoji",
    "load_folder",
    "load_images",
    "load_numbers",
    "read_captions",
    "read_shards",
    "relations",
    "stratified_subset",
    "survey",
    "train_validation_split",
]

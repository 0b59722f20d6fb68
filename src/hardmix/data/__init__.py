"""Data sets: named ones, folders of images, splits, and views of whole batches. Nothing is ever downloaded."""

from hardmix.data.catalog import CATALOG, Entry, Whereabouts, find, load_images, survey
from hardmix.data.folder import load_folder
from hardmix.data.images import FileImages, ImageData, ImageSet, TensorImages, channel_statistics, check_finite
from hardmix.data.splits import stratified_subset, train_validation_split
from hardmix.data.views import Augment, Normalize

__all__ = [
    "CATALOG",
    "Augment",
    "Entry",
    "FileImages",
    "ImageData",
    "ImageSet",
    "Normalize",
    "TensorImages",
    "Whereabouts",
    "channel_statistics",
    "check_finite",
    "find",
    "load_folder",
    "load_images",
    "stratified_subset",
    "survey",
    "train_validation_split",
]

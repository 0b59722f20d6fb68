"""The random views that each kind of sample has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hardmix.data.series_views import SERIES_VIEWS, SeriesAugment
from hardmix.data.views import MOVES, PAINTS, Augment
from hardmix.data.volume_views import VOLUME_VIEWS, VolumeAugment

#: kind of sample -> names of its views
VIEWS: dict[str, tuple[str, ...]] = {
    "rows": (),
    "series": tuple(SERIES_VIEWS),
    "images": (*MOVES, *PAINTS),
    "volumes": tuple(VOLUME_VIEWS),
    "texts": (),
}
#: those of a recipe that does not say which
DEFAULT_VIEWS: dict[str, tuple[str, ...]] = dict.fromkeys(VIEWS, ()) | {"images": ("flip", "crop")}


def build_views(kind: str, names: Iterable[str]) -> Callable[..., Any]:
    """`views(x, generator=)` of a batch of this kind; without names the batch itself."""
    names = list(names)
    if not names:
        return lambda x, generator=None: x
    makers: dict[str, Callable[[list[str]], Callable[..., Any]]]
    makers = {"series": SeriesAugment, "images": Augment, "volumes": VolumeAugment}
    return makers[kind](names)

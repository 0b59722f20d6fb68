"""What the tests of the report share."""

from __future__ import annotations

from typing import Any

import pytest
from markupsafe import Markup

from hardmix.report import plots


@pytest.fixture
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots that are not drawn, for tests that are about the words around them."""
    uri = Markup("data:image/svg+xml;base64,AAAA")

    def draw(*args: Any, **named: Any) -> plots.Plot:
        alt = next(a for a in args if isinstance(a, str))
        return plots.Plot(uri, alt, 10, 10)

    for name in ("curves", "levels", "cost", "reliability"):
        monkeypatch.setattr(plots, name, draw)

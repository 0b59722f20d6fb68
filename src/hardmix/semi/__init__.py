"""Learning from few labels: `output = algorithm(model, SemiBatch(x, y, views, ids))`."""

from hardmix.semi.algorithm import SemiAlgorithm, SemiBatch, SemiOutput
from hardmix.semi.fixmatch import FixMatch
from hardmix.semi.pairs import MixedPairs

__all__ = ["FixMatch", "MixedPairs", "SemiAlgorithm", "SemiBatch", "SemiOutput"]

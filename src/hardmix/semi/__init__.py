"""Learning from few labels: `output = algorithm(model, SemiBatch(x, y, views, ids))`."""

from hardmix.semi.algorithm import SemiAlgorithm, SemiBatch, SemiOutput
from hardmix.semi.bss import BSS
from hardmix.semi.co_tuning import CoTuning
from hardmix.semi.fine_tuning import FineTuning
from hardmix.semi.fixmatch import FixMatch
from hardmix.semi.flexmatch import FlexMatch
from hardmix.semi.freematch import FreeMatch
from hardmix.semi.mean_teacher import MeanTeacher
from hardmix.semi.mixmatch import MixMatch
from hardmix.semi.pairs import MixedPairs
from hardmix.semi.pseudo_label import PseudoLabel
from hardmix.semi.remixmatch import ReMixMatch
from hardmix.semi.self_tuning import SelfTuning
from hardmix.semi.softmatch import SoftMatch
from hardmix.semi.supervised import Supervised
from hardmix.semi.uda import UDA

__all__ = [
    "BSS",
    "UDA",
    "CoTuning",
    "FineTuning",
    "FixMatch",
    "FlexMatch",
    "FreeMatch",
    "MeanTeacher",
    "MixMatch",
    "MixedPairs",
    "PseudoLabel",
    "ReMixMatch",
    "SelfTuning",
    "SemiAlgorithm",
    "SemiBatch",
    "SemiOutput",
    "SoftMatch",
    "Supervised",
]

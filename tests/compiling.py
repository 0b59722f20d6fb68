"""What tests of torch.compile share."""

from __future__ import annotations

import pytest
import torch

#: torch's own, on the way to generated code
quiet = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

#: Marks tests of what is compiled from torch 2.7 on: policies whole, objectives of pairs, models that policies look at.
supported = pytest.mark.skipif(torch.__version__ < "2.7", reason="needs torch 2.7 to compile")

#: The version of torch from which on generated code draws in the order of eager code.
DRAWS_IN_ORDER = "2.13"


def need_generated_code() -> None:
    """Skip where torch's default compiler can't work."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except RuntimeError as error:
        pytest.skip(f"needs a C++ compiler and Python's headers: {str(error)[:80]}")

"""What tests of torch.compile share."""

from __future__ import annotations

import pytest
import torch

#: torch's own, on the way to generated code
quiet = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def need_generated_code() -> None:
    """Skip where torch's default compiler can't work."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except RuntimeError as error:
        pytest.skip(f"needs a C++ compiler and Python's headers: {str(error)[:80]}")

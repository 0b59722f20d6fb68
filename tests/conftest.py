"""Settings of the whole test suite."""

from __future__ import annotations

from hypothesis import settings

# The same cases in every run: a failure then is of the change that was made, and it comes back when run again.
# `make fuzz` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

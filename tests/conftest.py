"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is no fault of the code. Tests that look for input which never ends have a limit of their own.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

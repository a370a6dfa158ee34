"""What holds for all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# A busy machine is no fault of the code. Tests that look for input which never ends have a limit of their own.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# A shell without job control starts what it puts into the background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

"""Load the libraries that wheels leave to the host; run by a .pth file when the interpreter starts.

The host's come first, and the bundle's own where it has none. Found through RPATH instead, the bundle's would shadow
newer ones that the host's driver or plugins may need, and raise the bundle's glibc floor to that of the machine which
built it. A library once loaded answers every later request for its SONAME, so no search path is involved.
"""

import os
import sys


def load() -> None:
    """Make each library available by name, the host's if there is one; a host with neither is left as it is."""
    try:
        from _ctypes import dlopen
    except ImportError:
        return
    for name in ("libgcc_s.so.1", "libstdc++.so.6", "libz.so.1"):
        for candidate in (name, f"{sys.prefix}/lib/fallback/{name}"):
            try:
                dlopen(candidate, os.RTLD_LAZY)
                break
            except OSError:
                continue


load()

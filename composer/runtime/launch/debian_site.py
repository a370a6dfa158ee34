"""Make site-packages the site folder of a bundle with Debian's interpreter; run as sitecustomize.

Debian's `site` is frozen into the interpreter, so it cannot be edited, and knows dist-packages only.
"""

from __future__ import annotations

import site
import sys
from collections.abc import Iterable


def getsitepackages(prefixes: Iterable[str] | None = None) -> list[str]:
    """What `site.getsitepackages` answers anywhere else."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return [f"{prefix}/lib/{version}/site-packages" for prefix in prefixes or [sys.prefix]]


site.getsitepackages = getsitepackages
site.addsitedir(getsitepackages()[0])

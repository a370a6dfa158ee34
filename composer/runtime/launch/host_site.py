"""Make a bundle's site-packages the only site folder of the host's Python; run as sitecustomize."""

from __future__ import annotations

import site
import sys

# This file is lib/pythonX.Y/_compose_host/sitecustomize.py.
FOLDER = __file__.rsplit("/", 2)[0] + "/site-packages"

_hosts = {*site.getsitepackages(), __file__.rsplit("/", 1)[0]}
sys.path[:] = [path for path in sys.path if path not in _hosts]
site.addsitedir(FOLDER)

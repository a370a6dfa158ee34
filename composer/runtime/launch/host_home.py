"""Take back the PYTHONHOME that bin/python set for this start alone; run by a .pth file of a bundle without a Python.

A child that is another Python must not look for its standard library in this one's.
"""

import os

os.environ.pop("PYTHONHOME", None)

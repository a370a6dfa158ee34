"""What travels in a bundle and runs on its host: the package `_compose` of the bundle's site-packages.

Standard library of CPython 3.10 and newer only, and relative imports only, so that it runs in a bundle and from here.
`environment`, `floors` and `gpu` run at every start of the bundle's interpreter: they lie here, and take nothing from
the folders then. Each folder is about programs of bin/: `host` compose-detect, `doctor` compose-doctor, `serve`
sglang-serve and sglang-resolve-model, `service` compose-service, `model` compose-model. `activation` answers
bin/activate; `finding` and `staging` are shared. launch/ does not travel: from its texts composer/launchers.py makes
the bundle's scripts.
"""

# This package is PREFIX/lib/python3.X/site-packages/_compose; sys.base_prefix may be the host's.
PREFIX = __file__.rsplit("/", 5)[0]

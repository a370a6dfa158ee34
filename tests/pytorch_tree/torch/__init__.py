"""What the tests ask of a built tree."""

from torch._C import show
from torch.version import __version__

__all__ = ["__version__", "show"]

"""Products of 64x64 matrices; `library` is to be loaded with ctypes, src/product.cu says what it offers."""

from pathlib import Path

library = Path(__file__).with_name("libhopper_kernel.so")

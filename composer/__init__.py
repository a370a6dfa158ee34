"""Compose prebuilt CUDA wheels into one relocatable bundle for one GPU architecture and one CPU instruction set."""

__version__ = "0.1.0"

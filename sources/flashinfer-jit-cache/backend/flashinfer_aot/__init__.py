"""A build backend (PEP 517) that compiles FlashInfer's kernels for one GPU architecture and packs them.

Settings: `arch`, as FlashInfer spells it (`8.0`, `9.0a`, `12.0a`); `set`, of modules.toml; each key of such a set, as a
value of TOML; `build-dir`, where objects stay, so that an interrupted build goes on. Variables: CUDA_HOME, CC, CXX, and
MAX_JOBS, the compilers at a time. ninja is in PATH.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path

from flashinfer_aot.modules import DISTRIBUTION, Generator
from flashinfer_aot.selection import KEYS, Selection, SelectionError, select
from flashinfer_aot.wheel import write_wheel

_ARCH = re.compile(r"([1-9][0-9]?)\.([0-9])[af]?")
_SETTINGS = ("arch", "set", "build-dir", *KEYS)
_PACKAGE = "flashinfer_jit_cache"


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Mapping[str, str] | None = None) -> str:
    """Write the metadata of the wheel; gives back the name of its folder. Compiles nothing."""
    wheel = _Wheel(_settings(config_settings))
    folder = Path(metadata_directory, wheel.dist_info)
    folder.mkdir()
    for name, content in wheel.metadata().items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return wheel.dist_info


def build_wheel(wheel_directory: str, config_settings: Mapping[str, str] | None = None,
                metadata_directory: str | None = None) -> str:  # noqa: ARG001  # fmt: skip
    """Compile the selected modules and write the wheel; gives back its name.

    SelectionError for settings that cannot be meant, subprocess.CalledProcessError when a compiler fails.
    """
    wheel = _Wheel(_settings(config_settings))
    return wheel.write(Path(wheel_directory), wheel.compiled())


def _settings(given: Mapping[str, str] | None) -> dict[str, str]:
    """The settings, if there are such ones and they say for which architecture."""
    settings = dict(given or {})
    if unknown := sorted(settings.keys() - set(_SETTINGS)):
        raise SelectionError(f"unknown: {', '.join(unknown)}; there are {', '.join(_SETTINGS)}")
    if not _ARCH.fullmatch(settings.get("arch", "")):
        raise SelectionError(f"arch: {settings.get('arch', '')!r} is not one architecture, such as 8.0 or 9.0a")
    return settings


class _Wheel:
    """What becomes of some settings."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._arch = settings["arch"]
        self._selection: Selection = select(settings)
        self._generator = Generator(self._arch, Path(settings.get("build-dir", "build")))

    @functools.cached_property
    def version(self) -> str:
        """FlashInfer's, and what the objects run with: `0.6.5+cu12.sm90`."""
        sm = "".join(filter(str.isdecimal, self._arch))
        return f"{self._generator.installed.version}+cu{self._generator.cuda.partition('.')[0]}.sm{sm}"

    @property
    def dist_info(self) -> str:
        return f"{_PACKAGE}-{self.version}.dist-info"

    @property
    def _tag(self) -> str:
        # Of no Python and of no ABI of it: the modules are opened by their path, through tvm_ffi's C interface.
        return f"py3-none-linux_{os.uname().machine}"

    def compiled(self) -> dict[str, Path]:
        """The shared library of each selected module."""
        specs = self._generator.specs(self._selection)
        files = sum(len(one.sources) for one in specs)
        print(f"FlashInfer {self.version} for {self._arch}: {len(specs)} modules, {files} files", flush=True)  # noqa: T201
        self._generator.compile(specs, _jobs())
        return {one.name: Path(one.jit_library_path) for one in specs}

    def metadata(self) -> dict[str, Path | bytes]:
        """The files of the `.dist-info`, but for RECORD."""
        found: dict[str, Path | bytes] = {
            f"licenses/{one.name}": Path(str(one.locate()))
            for one in self._generator.installed.files or () if one.parent.name == "licenses"
        }  # fmt: skip
        lines = [
            "Metadata-Version: 2.4", "Name: flashinfer-jit-cache", f"Version: {self.version}",
            f"Summary: Compiled kernels of {DISTRIBUTION} for one GPU architecture", "Requires-Python: >=3.10",
            "License-Expression: Apache-2.0", *(f"License-File: {name.removeprefix('licenses/')}" for name in found),
        ]  # fmt: skip
        found["METADATA"] = _text(lines)
        found["WHEEL"] = _text(["Wheel-Version: 1.0", "Generator: flashinfer-aot", "Root-Is-Purelib: false",
                                f"Tag: {self._tag}"])  # fmt: skip
        return found

    def write(self, folder: Path, libraries: Mapping[str, Path]) -> str:
        """The wheel's file; gives back its name."""
        files: dict[str, Path | bytes] = {
            f"{_PACKAGE}/jit_cache/{name}/{name}.so": path for name, path in libraries.items()
        }
        files[f"{_PACKAGE}/__init__.py"] = Path(_PACKAGE, "__init__.py")
        files[f"{_PACKAGE}/_build.py"] = _text([
            '"""What was built."""', "", f'__version__ = "{self._generator.installed.version}"',
            f'ARCH = "{self._arch}"', f'CUDA = "{self._generator.cuda}"',
            "MODULES = (", *(f'    "{name}",' for name in sorted(libraries)), ")",
        ])  # fmt: skip
        files |= {f"{self.dist_info}/{name}": content for name, content in self.metadata().items()}
        name = f"{_PACKAGE}-{self.version}-{self._tag}.whl"
        write_wheel(folder / name, self.dist_info, files, ".so")
        return name


def _jobs() -> int | None:
    text = os.environ.get("MAX_JOBS", "")
    return int(text) if text.isdecimal() and int(text) else None


def _text(lines: list[str]) -> bytes:
    return "\n".join([*lines, ""]).encode()

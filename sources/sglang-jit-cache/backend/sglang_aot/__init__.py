"""A build backend (PEP 517) that compiles SGLang's kernels for GPU architectures and packs them.

Settings: `arch`, compute capabilities (`9.0`, `8.0;12.0`); `build-dir`, where objects stay, so that an interrupted
build goes on. Variables: CUDA_HOME, CXX, and MAX_JOBS, the compilers at a time. ninja is in PATH.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from sglang_aot.kernels import DISTRIBUTION, Generator
from sglang_aot.wheel import write_wheel

_ARCH = re.compile(r"[1-9][0-9]?\.[0-9](;[1-9][0-9]?\.[0-9])*")
_SETTINGS = ("arch", "build-dir")
_PACKAGE = "sglang_jit_cache"


class SettingError(ValueError):
    """A setting that cannot be meant."""


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
    """Compile the modules of modules.toml and write the wheel; gives back its name.

    SettingError for settings that cannot be meant, RuntimeError when a compiler fails.
    """
    return _Wheel(_settings(config_settings)).write(Path(wheel_directory))


def _settings(given: Mapping[str, str] | None) -> dict[str, str]:
    """The settings, if there are such ones and they say for which architecture."""
    settings = dict(given or {})
    if unknown := sorted(settings.keys() - set(_SETTINGS)):
        raise SettingError(f"unknown: {', '.join(unknown)}; there are {', '.join(_SETTINGS)}")
    if not _ARCH.fullmatch(settings.get("arch", "")):
        raise SettingError(f"arch: {settings.get('arch', '')!r} is no compute capability, such as 9.0 or 8.0;9.0")
    return settings


class _Wheel:
    """What becomes of some settings."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._generator = Generator(settings["arch"].split(";"), Path(settings.get("build-dir", "build")))

    @functools.cached_property
    def version(self) -> str:
        """SGLang's, and what the objects run with: `0.5.23+cu13.sm90`."""
        sms = "".join(f".sm{''.join(filter(str.isdecimal, one))}" for one in self._generator.arches)
        return f"{self._generator.installed.version}+cu{self._generator.cuda.partition('.')[0]}{sms}"

    @property
    def dist_info(self) -> str:
        return f"{_PACKAGE}-{self.version}.dist-info"

    @property
    def _tag(self) -> str:
        # Of no Python and of no ABI of it: the modules are opened by their path, through tvm_ffi's C interface.
        return f"py3-none-linux_{os.uname().machine}"

    def metadata(self) -> dict[str, Path | bytes]:
        """The files of the `.dist-info`, but for RECORD."""
        found: dict[str, Path | bytes] = {
            f"licenses/{one.name}": Path(str(one.locate()))
            for one in self._generator.installed.files or () if one.parent.name == "licenses"
        }  # fmt: skip
        lines = [
            "Metadata-Version: 2.4", f"Name: {_PACKAGE.replace('_', '-')}", f"Version: {self.version}",
            f"Summary: Compiled kernels of {DISTRIBUTION}, ahead of time", "Requires-Python: >=3.10",
            "License-Expression: Apache-2.0", *(f"License-File: {name.removeprefix('licenses/')}" for name in found),
        ]  # fmt: skip
        found["METADATA"] = _text(lines)
        found["WHEEL"] = _text(["Wheel-Version: 1.0", "Generator: sglang-aot", "Root-Is-Purelib: false",
                                f"Tag: {self._tag}"])  # fmt: skip
        return found

    def _facts(self) -> bytes:
        return _text([
            '"""What was built."""', "", f'__version__ = "{self._generator.installed.version}"',
            f"ARCHES = {self._generator.arches!r}", f'CUDA = "{self._generator.cuda}"',
        ])  # fmt: skip

    def write(self, folder: Path) -> str:
        """The wheel's file; gives back its name."""
        sources = sorted(Path(_PACKAGE).glob("*.py"))
        kernels = self._generator.kernels(_keys(Path(_PACKAGE, "keys.py")).key)
        compiled = self._generator.compile(kernels, _jobs())
        files: dict[str, Path | bytes] = {f"{_PACKAGE}/modules/{name}": path for name, path in compiled.items()}
        files |= {path.as_posix(): path for path in sources} | {f"{_PACKAGE}/_build.py": self._facts()}
        files |= {f"{self.dist_info}/{name}": content for name, content in self.metadata().items()}
        name = f"{_PACKAGE}-{self.version}-{self._tag}.whl"
        write_wheel(folder / name, self.dist_info, files, ".so")
        return name


def _keys(path: Path) -> ModuleType:
    """The module that names the files, as the package that will be installed has it."""
    spec = importlib.util.spec_from_file_location("keys", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _jobs() -> int:
    text = os.environ.get("MAX_JOBS", "")
    return int(text) if text.isdecimal() and int(text) else os.cpu_count() or 1


def _text(lines: list[str]) -> bytes:
    return "\n".join([*lines, ""]).encode()

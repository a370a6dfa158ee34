"""Give the bundle's programs one writable cache folder, before anything is imported.

Runs at every start of the bundle's interpreter, `-m`, scripts and child processes alike. Only names that are unset are
set, so a deployment can still say otherwise. Without it: torch asks for the user's name and dies for a uid without
one, FlashInfer dies where HOME is read-only, and bundles of different versions share compiled kernels.
"""

# pathlib would be imported by every process for this alone; /tmp is checked by `_private`.
# ruff: noqa: PTH103, PTH111, PTH112, PTH117, PTH118, PTH123, S108

import os
import stat

from . import PREFIX


def _fingerprint() -> str:
    try:
        with open(os.path.join(PREFIX, "share", "compose", "fingerprint")) as stream:
            return stream.read().strip()[:16] or "unknown"
    except OSError:
        return "unknown"


def _usable(folder: str) -> bool:
    """Make `folder` if need be; whether it is a folder that is ours to write to."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _private(folder: str) -> bool:
    """Like `_usable`, in a place where others could have made `folder` before us."""
    if not _usable(folder):
        return False
    found = os.lstat(folder)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _cache_root(home: str) -> str:
    asked = os.environ.get("WHEEL_COMPOSER_CACHE")
    if asked:
        return asked
    usual = os.environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if os.path.isabs(home) else "")
    if usual and _usable(os.path.join(usual, "compose")):
        return os.path.join(usual, "compose")
    shared = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"compose-{os.getuid()}")
    return shared if _private(shared) else ""


def _prepare() -> None:
    home = os.path.expanduser("~")
    root = _cache_root(home)
    cache = os.path.join(root, _fingerprint())
    defaults = {}
    if root and _usable(cache):
        defaults = {
            "CUDA_CACHE_PATH": "nv", "FLASHINFER_WORKSPACE_BASE": "flashinfer", "SGLANG_CACHE_DIR": "sglang",
            "SGLANG_DG_CACHE_DIR": "deep_gemm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton",
            "TVM_FFI_CACHE_DIR": "tvm-ffi",
        }  # fmt: skip
        if not os.path.isabs(home):  # neither HOME nor a passwd entry
            defaults["HOME"] = "home"
        writable = os.path.isdir(home) and os.access(home, os.W_OK)
        if not writable and not os.path.isdir(os.path.join(home, ".cache", "huggingface")):
            defaults["HF_HOME"] = "huggingface"
    for name, folder in defaults.items():
        os.environ.setdefault(name, os.path.join(cache, folder))
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        import pwd

        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"uid{os.getuid()}"


if __name__ == "_compose.environment":
    _prepare()

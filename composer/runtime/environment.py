"""Prepare the environment of the bundle's programs as its etc/env says, before anything is imported.

Runs at every start of the bundle's interpreter, `-m`, scripts and child processes alike, and for `bin/activate`.
Without it: torch asks for the user's name and dies for a uid without one, FlashInfer dies where HOME is read-only,
bundles of different versions share compiled kernels, and modules of another Python shadow the bundle's.

A line of etc/env is a comment (`#`), or one of

    NAME=VALUE     NAME gets this value
    NAME?=VALUE    unless NAME is set already, even to nothing; what another bundle has set does not count
    NAME+=VALUE    VALUE is added behind the `:` list NAME, if there is one and VALUE is not in it
    unset NAME     nothing that came from outside: not where this bundle's environment was entered before

NAME is letters, digits and `_` of ASCII, the first no digit; a line with another one is passed over. A later line for
the same name wins. These stand for a folder in a VALUE; a line that names one which this host has not is passed over:

    {prefix}    the bundle
    {cache}     the one writable folder of this bundle, named after its fingerprint: see `cache_folder`
    {toolkit}   a CUDA toolkit with nvcc: CUDA_HOME or CUDA_PATH if one is set, even to nothing, else the bundle's
                `jit`, else that of the nvcc on PATH, else /usr/local/cuda
    {no-home}   {cache}, on a host where the user's cache folder (XDG_CACHE_HOME, ~/.cache) cannot be written
    {hub}       on such a host, the Hugging Face folder: the one of the user if it is there, else {cache}/huggingface
"""

# pathlib would be imported by every process for this alone; /tmp is checked by `_private`.
# ruff: noqa: PTH100, PTH103, PTH110, PTH112, PTH117, PTH118, PTH120, PTH121, PTH123, S108

import os
import stat
import sys

from . import PREFIX

_SYSTEM_TOOLKIT = "/usr/local/cuda"


def cache_folder(prefix: str = PREFIX) -> str:
    """The one writable folder of the bundle at `prefix`, made if need be; "" where nothing can be written.

    It lies in WHEEL_COMPOSER_CACHE, else in the user's cache folder, else in a private folder of TMPDIR or /tmp.
    """
    environ = dict(os.environ)
    return _cache(prefix, environ, *_user_cache(environ))


def changes(prefix: str, environ: dict[str, str], *, entered: bool) -> dict[str, str | None]:
    """What the bundle at `prefix` changes in `environ`: a new value for each name, or None to unset it.

    entered: `environ` was prepared for this bundle before, and PYTHONPATH is meant for it.
    """
    places, others = _places(prefix, environ)
    wanted: dict[str, str | None] = {}
    for name, sign, text in _lines(prefix):
        held = environ.get(name)
        is_free = held is None or any(f"{held}/".startswith(f"{other}/") for other in others)
        value = _expanded(text, places)
        if sign == "unset":
            if not entered:
                wanted[name] = None
        elif value is None:
            if is_free:
                wanted.setdefault(name, None)
        elif sign == "+":
            if held and value not in held.split(":"):
                wanted[name] = f"{held}:{value}"
        elif sign != "?" or is_free:
            wanted[name] = value
    wanted.update(_identity(environ, places["cache"]))
    return {name: value for name, value in wanted.items() if environ.get(name) != value}


def _lines(prefix: str) -> list[tuple[str, str, str]]:
    """(name, sign, value) of each line of etc/env; the sign is "", "?", "+" or "unset"."""
    try:
        with open(f"{prefix}/etc/env", "rb") as stream:
            text = os.fsdecode(stream.read())
    except OSError:
        return []
    found = []
    for line in text.split("\n"):
        name, equals, value = line.partition("=")
        if line.startswith("unset "):
            found.append((line[6:].strip(), "unset", ""))
        elif equals:
            sign = name[-1] if name[-1:] in ("?", "+") else ""
            found.append((name[: len(name) - len(sign)], sign, value))
    # What is no variable's name would be code to the shell that is told to set it.
    return [one for one in found if one[0].isascii() and one[0].isidentifier()]


def _expanded(text: str, places: dict[str, str]) -> str | None:
    first, *parts = text.split("{")
    for part in parts:
        name, close, rest = part.partition("}")
        if not close or name not in places:
            first += "{" + part
        elif not places[name]:
            return None
        else:
            first += places[name] + rest
    return first


def _places(prefix: str, environ: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """What stands for what in a value, and the folders of another bundle that left its values in `environ`."""
    usual, is_usable = _user_cache(environ)
    cache = _cache(prefix, environ, usual, is_usable)
    places = {"prefix": prefix, "cache": cache, "toolkit": toolkit(prefix, environ), "no-home": "", "hub": ""}
    if not is_usable:
        hub = os.path.join(usual, "huggingface")
        places["no-home"] = cache
        places["hub"] = hub if usual and os.path.isdir(hub) else cache and f"{cache}/huggingface"
    others = []
    if environ.get("COMPOSE_CACHE", cache) != cache:
        others.append(environ["COMPOSE_CACHE"])
    if environ.get("COMPOSE_PREFIX") and not _is_same(environ["COMPOSE_PREFIX"], prefix):
        others.append(environ["COMPOSE_PREFIX"])
    return places, [folder for folder in others if os.path.isabs(folder)]


def _is_same(folder: str, other: str) -> bool:
    try:
        return bool(folder) and (folder == other or os.path.samefile(folder, other))
    except OSError:
        return False


def _user_cache(environ: dict[str, str]) -> tuple[str, bool]:
    """The user's own cache folder, or "" if there is none, and whether it can be written; not one that a bundle set."""
    ours = environ.get("COMPOSE_CACHE") or "\0"
    usual = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(usual) or usual.startswith(ours):
        home = _home(environ)
        usual = home and os.path.join(home, ".cache")
    return usual, bool(usual) and _usable(usual)


def _home(environ: dict[str, str]) -> str:
    home = environ.get("HOME", "")
    if os.path.isabs(home) and not home.startswith(environ.get("COMPOSE_CACHE") or "\0"):
        return home
    import pwd

    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""
    return home if os.path.isabs(home) else ""


def _cache(prefix: str, environ: dict[str, str], usual: str, is_usable: bool) -> str:
    key = _fingerprint(prefix)
    if environ.get("WHEEL_COMPOSER_CACHE"):
        root = os.path.abspath(environ["WHEEL_COMPOSER_CACHE"])
    elif is_usable and _usable(os.path.join(usual, "compose")):
        root = os.path.join(usual, "compose")
    else:
        root = os.path.join(environ.get("TMPDIR") or "/tmp", f"compose-{os.getuid()}")
        if not _private(root):
            return ""
    return os.path.join(root, key) if _usable(os.path.join(root, key)) else ""


def _fingerprint(prefix: str) -> str:
    try:
        with open(f"{prefix}/share/compose/fingerprint", "rb") as stream:
            return os.fsdecode(stream.read(16)).strip() or "unknown"
    except OSError:
        return "unknown"


def _usable(folder: str) -> bool:
    """Make `folder` if need be; whether it is a folder that is ours to write to."""
    try:
        if not os.path.isdir(folder):
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


def toolkit(prefix: str, environ: dict[str, str]) -> str:
    """The folder that `{toolkit}` stands for, or "" where there is none."""
    named = environ.get("CUDA_HOME", environ.get("CUDA_PATH"))
    if named is not None and not _is_inside(named, environ.get("COMPOSE_PREFIX", "")):
        return named if _has_nvcc(named) else ""
    if _has_nvcc(f"{prefix}/jit"):
        return f"{prefix}/jit"
    for folder in environ.get("PATH", "").split(":"):
        nvcc = os.path.join(folder, "nvcc")
        if os.path.isabs(folder) and os.access(nvcc, os.X_OK):
            found = os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))
            if _has_nvcc(found):
                return found
    return _SYSTEM_TOOLKIT if _has_nvcc(_SYSTEM_TOOLKIT) else ""


def _has_nvcc(folder: str) -> bool:
    return os.path.isabs(folder) and os.access(os.path.join(folder, "bin", "nvcc"), os.X_OK)


def _is_inside(path: str, folder: str) -> bool:
    return bool(folder) and path.startswith(f"{folder}/")


def _identity(environ: dict[str, str], cache: str) -> dict[str, str | None]:
    """A name for a user without one, and a home if there is none either: container runtimes start such users."""
    found: dict[str, str | None] = {}
    if cache and not _home(environ):
        found["HOME"] = f"{cache}/home"
    if not any(environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        import pwd

        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            found["USER"] = f"uid{os.getuid()}"
    return found


def _prepare() -> None:
    """Prepare this process, which is the bundle's interpreter and has imported nothing yet."""
    environ = dict(os.environ)
    wanted = changes(PREFIX, environ, entered=_is_same(environ.get("COMPOSE_PREFIX", ""), PREFIX))
    for name, value in wanted.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    if "PYTHONPATH" in wanted and not sys.flags.ignore_environment:
        _forget([os.path.abspath(entry) for entry in environ["PYTHONPATH"].split(":")])
    site = vars(sys.modules.get("site", sys))
    if site.get("ENABLE_USER_SITE") and os.environ.get("PYTHONNOUSERSITE"):
        site["ENABLE_USER_SITE"] = False
        _forget([site["USER_SITE"]])
    _redirect_bytecode()


def _redirect_bytecode() -> None:
    """Where the bundle has no bytecode for this start (none at all, or for `-O`), none must be added to it.

    That of this module and its package is not written: see `composer.launchers.ENVIRONMENT_PTH`.
    """
    if sys.pycache_prefix is None and not os.path.exists(__spec__.cached or ""):
        cache = os.environ.get("COMPOSE_CACHE")
        sys.pycache_prefix = f"{cache}/bytecode" if cache else os.devnull


def _forget(folders: list[str]) -> None:
    """Take `folders`, which come before the bundle's own, off sys.path; never one of the bundle or the interpreter."""
    library = os.path.dirname(os.__file__)
    own = {library, f"{library}/lib-dynload"}
    sys.path[:] = [one for one in sys.path if one not in folders or one in own or one.startswith(f"{PREFIX}/")]


if __name__ == "_compose.environment":
    _prepare()

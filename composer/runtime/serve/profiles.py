"""The launch profiles of this bundle: commands that are known to work on its stack, for its GPU architecture.

`share/compose/profiles.json` is made with the bundle and holds only those.
"""

# ruff: noqa: PTH118, PTH123

import difflib
import json
import os
from typing import Any

SCHEMA = 1


class ProfileError(LookupError):
    """A profile that this bundle does not have, or profiles that cannot be read; its text says what to do."""


def profile(name: str, prefix: str) -> dict[str, Any]:
    """A profile by name: `model` (or None), `flags` (words of a command line), `env`, and what `read` gives more.

    ProfileError with the nearest name where there is none of this one.
    """
    found = read(prefix)
    profiles: dict[str, dict[str, Any]] = found["profiles"]
    if name in profiles:
        return profiles[name]
    near = difflib.get_close_matches(name, profiles, n=1, cutoff=0.4)
    fix = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(sorted(profiles)) or 'none'}"
    sms = found["sm"] if isinstance(found["sm"], list) else filter(None, [found["sm"]])
    made_for = ", ".join([found["stack"], *(f"SM {sm}" for sm in sms)])
    raise ProfileError(f"no profile {name!r} in this bundle ({made_for}); {fix}")


def read(prefix: str) -> dict[str, Any]:
    """All profiles below `profiles`, by name, with the `stack` and the `sm` that they are for: one, several, or None.

    Each has title, kind, model, module, gpus, expected, notes, flags and env, and `sm` where it is not for all of
    these. ProfileError where the file is missing, damaged, or of another schema.
    """
    path = os.path.join(prefix, "share", "compose", "profiles.json")
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
    except OSError as fault:
        raise ProfileError(f"this bundle has no profiles: {path}: {fault.strerror}") from fault
    except ValueError as fault:
        raise ProfileError(f"{path} is damaged ({fault}); unpack the bundle again") from fault
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("profiles"), dict):
        raise ProfileError(f"{path} is of another schema than {SCHEMA}; unpack the bundle again")
    return found

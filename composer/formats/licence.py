"""Whether the licence that travels in a wheel lets its object code be modified, as far as its texts say."""

from __future__ import annotations

import re
from collections.abc import Mapping

from composer.formats.metadata import headers

# What the metadata of wheels says about licences that allow modification (SPDX names, classifiers, free words).
_FREE = re.compile(
    r"\b(?:Apache|BSD|MIT|ISC|MPL|PSF|Zlib|Unlicense|CC0|0BSD|OSI Approved|Python Software Foundation|L?GPL)\b", re.I
)
# NVIDIA's agreements forbid it in these words, whatever the wheel's metadata says. The GPL, whose text travels in many
# wheels beside a free licence, forbids copying "except as expressly provided": other words.
_FORBIDS = re.compile(
    rb"may\s+not\s[^.]{0,120}\bmodify,?\s+(?:or|and)\s+create\s+derivative\s+works|NVIDIA\s+SOFTWARE\s+LICENSE"
)
# A licence of its own (SPDX 3.0, annex B) says nothing, and adds its terms to those of the others.
_OWN = re.compile(r"\bLicenseRef-", re.I)
_NAMES = ("licen", "copying", "notice", "eula")


def is_licence(path: str) -> bool:
    """Whether a file of a wheel is one of `texts`, by its name or its folder.

    Anywhere in the wheel: nvidia-cusparselt-cu12 0.7.1 has it beside the library.
    """
    return any(word in part for part in path.lower().split("/")[-2:] for word in _NAMES)


def why_unmodifiable(metadata: bytes, texts: Mapping[str, bytes]) -> str | None:
    """The reason why object code of a distribution must stay as it is, or None when its licence allows changes.

    metadata: METADATA. texts: licence files by name; what they say wins over METADATA (nvidia-nvshmem-cu12 3.3.20
    declares BSD-3-Clause and ships the CUDA EULA). A distribution that says nothing is taken to forbid it. WheelError
    for METADATA that is malformed.
    """
    for name, text in sorted({**texts, "METADATA": metadata}.items()):
        if found := _FORBIDS.search(text):
            clause = " ".join(found[0].decode("utf-8", "replace").split())
            return f"{name} says: {clause[:120]}"
    said = [f"{name.title()}: {value}" for name, value in headers(metadata) if _is_about_licence(name, value)]
    free = [line for line in said if _FREE.search(line)]
    for line in said:
        if _OWN.search(line) or ("proprietary" in line.lower() and not free):
            return f"METADATA says: {line[:120]}"
    return None if free else "neither METADATA nor a licence file says that it is free to modify"


def _is_about_licence(name: str, value: str) -> bool:
    return name in ("license-expression", "license") or (name == "classifier" and value.startswith("License ::"))

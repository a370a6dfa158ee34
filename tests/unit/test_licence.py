"""What the licences of wheels say about modification. The texts are those of real wheels, cut to the clause."""

from __future__ import annotations

import pytest

from composer.errors import WheelError
from composer.formats.licence import is_licence, why_unmodifiable

# nvidia-cublas-cu12 12.8.4.1, License.txt
EULA = b"""  6. Except as expressly provided in this Agreement, you may
    not copy, sell, rent, sublicense, transfer, distribute,
    modify, or create derivative works of any portion of the
    SDK.
"""
# cuda-bindings 12.9.5
OWN = b"NVIDIA\n  SOFTWARE LICENSE\n\nThis license is a legal agreement between you and NVIDIA Corporation"
GPL = b"""You may not copy, modify, sublicense, or distribute the Program
except as expressly provided under this License.
"""
MIT = b"Permission is hereby granted, free of charge, to any person to use, copy, modify, merge, publish"
BSD = "License: BSD-3-Clause"


def metadata(*lines: str, body: str = "", end: str = "\n") -> bytes:
    text = end.join(["Metadata-Version: 2.4", "Name: sample", "Version: 1.0", *lines, "", body])
    return text.encode()


@pytest.mark.parametrize(
    "lines",
    [
        ("License-Expression: Apache-2.0",),
        ("License-Expression: MIT OR Apache-2.0",),
        ("License: BSD-3-Clause",),
        ("License: Apache 2.0", "Classifier: License :: Other/Proprietary License"),  # nvidia-nvtx-cu12 12.8.90
        ("License: BSD-3-Clause", "Classifier: License :: Other/Proprietary License"),  # nvidia-nccl-cu12 2.27.5
        ("Classifier: License :: OSI Approved :: MIT License",),
        ("License: MIT License\n        Copyright (c) 2020",),
        ("license: mit",),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_free_by_its_metadata(lines: tuple[str, ...], end: str) -> None:
    text = metadata(*lines, end="\n").replace(b"\n", end.encode())
    assert why_unmodifiable(text, {"LICENSE": MIT, "COPYING": GPL}) is None


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("License: NVIDIA Proprietary Software",), "License: NVIDIA Proprietary Software"),  # cusparselt 0.7.1
        (("Classifier: License :: Other/Proprietary License",), "Classifier: License :: Other/Proprietary License"),
        (("License-Expression: LicenseRef-NVIDIA-SOFTWARE-LICENSE",), "LicenseRef-NVIDIA"),
        (("License-Expression: Apache-2.0 AND LicenseRef-NVIDIA-Proprietary",), "LicenseRef-NVIDIA"),
    ],
)
def test_forbidden_by_its_metadata(lines: tuple[str, ...], said: str) -> None:
    why = why_unmodifiable(metadata(*lines), {"LICENSE": MIT})
    assert why is not None
    assert why.startswith("METADATA says: ")
    assert said in why


@pytest.mark.parametrize(
    "text", [EULA, EULA.replace(b"\n", b"\r\n"), b"preface\n" * 1000 + EULA, EULA.replace(b"modify,", b"modify"), OWN]
)
def test_a_text_that_forbids_wins(text: bytes) -> None:
    """nvidia-nvshmem-cu12 3.3.20 declares BSD-3-Clause and ships the CUDA EULA."""
    why = why_unmodifiable(metadata(BSD), {"a/LICENSE": MIT, "b/License.txt": text})
    assert why is not None
    assert why.startswith("b/License.txt says: ")
    assert "\n" not in why
    assert len(why) < 200


def test_a_text_in_the_metadata_counts() -> None:
    folded = EULA.decode().replace("\n", "\n       ")
    assert "METADATA says: may not copy" in str(why_unmodifiable(metadata(f"License: MIT\n       {folded}"), {}))


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("License: UNKNOWN",),
        ("Classifier: License :: Free for non-commercial use",),
        ("Summary: a server with the MIT License",),
        ("License-File: LICENSE-MIT",),
        ("Classifier: Topic :: Software Development :: MIT",),
        ("License: MITRE",),
    ],
)
def test_saying_nothing_is_not_a_permission(lines: tuple[str, ...]) -> None:
    why = why_unmodifiable(
        metadata(*lines, body="License: MIT\nClassifier: License :: OSI Approved\n"), {"LICENSE": MIT}
    )
    assert why == "neither METADATA nor a licence file says that it is free to modify"


def test_a_body_is_no_header_whatever_ends_the_lines() -> None:
    assert why_unmodifiable(metadata(body="License: MIT", end="\r\n"), {}) is not None


def test_a_text_that_is_not_text() -> None:
    assert why_unmodifiable(metadata(BSD), {"LICENSE": bytes(range(256)), "NOTICE": b""}) is None


def test_metadata_that_is_malformed() -> None:
    with pytest.raises(WheelError):
        why_unmodifiable(b"License: \xff\n\n", {})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a-1.0.dist-info/LICENSE", True),
        ("a-1.0.dist-info/licenses/LICENSE", True),
        ("a-1.0.dist-info/licenses/third-party.txt", True),
        ("a-1.0.dist-info/License.txt", True),
        ("a-1.0.dist-info/COPYING.LESSER", True),
        ("a-1.0.dist-info/NOTICE", True),
        ("a-1.0.dist-info/EULA.txt", True),
        ("nvidia/cusparselt/LICENSE.txt", True),  # nvidia-cusparselt-cu12 0.7.1
        ("a-1.0.dist-info/METADATA", False),
        ("a/lib/liba.so", False),
        ("licences/a/b/c.py", False),
    ],
)
def test_what_is_a_licence(path: str, expected: bool) -> None:
    assert is_licence(path) is expected

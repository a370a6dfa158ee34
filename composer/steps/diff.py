"""Compare two bundles, packed or unpacked, without reading more of them than their manifests."""

from __future__ import annotations

from pathlib import Path

from composer.model.diff import Comparison, compare
from composer.model.manifest import Manifest
from composer.steps.bundle import open_bundle
from composer.steps.tree import manifest_of


def diff_bundles(old: Path, new: Path) -> tuple[Manifest, Manifest, Comparison]:
    """The manifests of two bundles (files, or the folders they were unpacked into), and what differs.

    Nothing is hashed: whether a bundle is what its manifest says is for `verify`. VerifyError for what is no bundle.
    """
    before, after = (manifest_of(path) if path.is_dir() else open_bundle(path).manifest for path in (old, new))
    return before, after, compare(before, after)

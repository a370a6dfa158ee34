"""Find bundles: in a folder, by an index in a file or on a server, or one by its path."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from composer._fs import host_errors
from composer.errors import FetchError, RecipeError, VerifyError
from composer.host.index import (
    INDEX_NAME,
    MAX_BYTES,
    SUFFIX,
    BundleFacts,
    Damaged,
    parse_index,
    read_bundle,
    read_folder,
)

if TYPE_CHECKING:
    from composer._pip import Body

_REDIRECTS = 5
#: Seconds to connect, and between two pieces of an answer.
_CONNECT, _STALL = 15, 30
_PIECE = 1 << 16
_FIX = "Check the address and the network."


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The bundles of one place. base: the folder or URL that their files are relative to."""

    base: str
    bundles: tuple[BundleFacts, ...]
    damaged: tuple[Damaged, ...] = ()

    def location(self, bundle: BundleFacts) -> str:
        """The path or URL of a bundle."""
        if bundle.file.startswith("oci://"):
            return bundle.file
        if "://" in self.base:
            return urllib.parse.urljoin(self.base, urllib.parse.quote(bundle.file))
        return str(Path(self.base) / bundle.file)


def find_bundles(place: str) -> Offer:
    """The bundles at `place`: a folder, an index (a path, file://, http:// or https://), a bundle, or oci://.

    A URL that ends in `/` stands for the index.json there, an oci:// without a tag for all of the repository.

    RecipeError for another kind of place, FetchError for a server that does not answer with it, VerifyError for an
    index that is none.
    """
    scheme, found, rest = place.partition("://")
    if not found:
        return _local(Path(place))
    if scheme == "file":
        return _local(Path(urllib.parse.unquote(rest)))
    if scheme in ("http", "https"):
        data, url = _get(place + INDEX_NAME if place.endswith("/") else place)
        return Offer(base=shown(url), bundles=parse_index(data, shown(url)).bundles)
    if scheme == "oci":
        return _registry(place)
    raise RecipeError(f"not a place of bundles: {scheme}://", where=place,
                      fix="Give a folder, an index (path or URL), a bundle, or oci://.")  # fmt: skip


def _registry(place: str) -> Offer:
    """The bundles in a registry; each is named by its address, which `compose pull` takes."""
    from composer.steps.oci import published  # takes an extra

    bundles: list[BundleFacts] = []
    damaged: list[Damaged] = []
    for one in published(place):
        try:
            (facts,) = parse_index(one.index.encode(), one.reference).bundles
        except (VerifyError, ValueError) as fault:
            damaged.append(Damaged(file=one.reference, why=str(fault)))
        else:
            bundles.append(msgspec.structs.replace(facts, file=one.reference))
    return Offer(base="", bundles=tuple(bundles), damaged=tuple(damaged))


def _local(path: Path) -> Offer:
    if path.is_dir():
        bundles, damaged = read_folder(path)
        return Offer(base=str(path), bundles=tuple(bundles), damaged=tuple(damaged))
    if path.name.endswith(SUFFIX):
        return Offer(base=str(path.parent), bundles=(read_bundle(path),))
    with host_errors(path), path.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    _limit(data, str(path))
    return Offer(base=str(path.parent), bundles=parse_index(data, str(path)).bundles)


def _get(url: str) -> tuple[bytes, str]:
    """The body and where it was in the end, with pip's proxies, certificates and logins."""
    from composer._pip import Indexes, PipFault  # takes longer to import than all of the rest

    try:
        session = Indexes({})
        for _ in range(_REDIRECTS + 1):
            body = session.get(url, start=0, connect=_CONNECT, stall=_STALL)
            try:
                if body.redirect is None:
                    return _body(body, url), url
            finally:
                body.close()
            url = _followed(url, body.redirect)
    except PipFault as fault:
        raise FetchError(fault.what, where=shown(url), why=fault.why or None, fix=_FIX) from fault
    raise FetchError(f"more than {_REDIRECTS} redirects", where=shown(url))


def _followed(url: str, target: str) -> str:
    if url.startswith("https:") and not target.startswith("https:"):
        raise FetchError("redirects away from https", where=shown(url), why=shown(target))
    return target


def _body(body: Body, url: str) -> bytes:
    if body.status != HTTPStatus.OK:
        raise FetchError(f"the server answers {body.status}", where=shown(url), fix=_FIX)
    data = bytearray()
    while len(data) <= MAX_BYTES and (piece := body.read(_PIECE)):
        data += piece
    _limit(data, shown(url))
    return bytes(data)


def _limit(data: bytes | bytearray, where: str) -> None:
    if len(data) > MAX_BYTES:
        raise VerifyError("too large for an index of bundles", where=where)


def shown(url: str) -> str:
    """A URL without what may be secret: login, query and fragment."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()

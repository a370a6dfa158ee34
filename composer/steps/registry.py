"""A client of OCI registries (Distribution Specification 1.1): blobs by digest, manifests by tag or digest.

Logins are those of Docker (`~/.docker/config.json` or DOCKER_CONFIG, credential helpers); oras-py reads them and gets
tokens. Its transfers are not used: version 0.2.43 reads a blob into memory to upload it, checks no digest of what it
downloads, mounts nothing, and its requests wait for ever.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

from composer.errors import ComposerError, FetchError, HostError, IntegrityError, RecipeError

if TYPE_CHECKING:
    import requests

T = TypeVar("T")
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
#: What the specification asks registries to accept at least.
MAX_MANIFEST = 4 << 20
_MAX_TAGS = 10_000
_PIECE = 1 << 20
_REPOSITORY = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
_REFERENCE = re.compile(
    r"oci://(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]+)?|\[[0-9a-f:]+\](?::[0-9]+)?)"
    rf"/(?P<repository>{_REPOSITORY})(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}}))?(?:@(?P<digest>sha256:[0-9a-f]{{64}}))?"
)
_NEXT = re.compile(r"<([^>]+)>;\s*rel=\"?next\"?")
_FIX = "Check the address and the network; what was transferred is not transferred again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How patient a client is; times in seconds. attempts: in a row that may fail. backoff: doubled after each."""

    attempts: int = 4
    backoff: float = 0.5
    connect: float = 10.0
    stall: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A repository of a registry, and maybe what in it: a tag, a digest, or both, of which the digest counts."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        tag, digest = f":{self.tag}" if self.tag else "", f"@{self.digest}" if self.digest else ""
        return f"oci://{self.host}/{self.repository}{tag}{digest}"

    @property
    def is_local(self) -> bool:
        """Whether the registry is on this machine's loopback."""
        name = urlsplit(f"//{self.host}").hostname or ""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(name).is_loopback
        return name == "localhost"


def parse_reference(text: str) -> Reference:
    """`oci://REGISTRY[:PORT]/REPOSITORY[:TAG][@sha256:HEX]`; RecipeError for anything else."""
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise RecipeError("not the address of an image", where=text,
                          fix="Write oci://REGISTRY/REPOSITORY:TAG; a repository is in lower case.")  # fmt: skip
    return Reference(**found.groupdict())


class Blob(Protocol):
    """What is known of a blob. digest: `sha256:HEX`; size: bytes."""

    @property
    def digest(self) -> str: ...  # noqa: D102

    @property
    def size(self) -> int: ...  # noqa: D102


class Body(Protocol):
    """Bytes to upload, which can be read again from the start."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[bytes]: ...


class Registry:
    """One repository of a registry. Usable from several threads.

    FetchError for a registry that does not answer, or refuses; IntegrityError for bytes that are not the digest's.
    """

    def __init__(self, reference: Reference, *, plain_http: bool = False, limits: Limits | None = None) -> None:
        self.reference = reference
        self._limits = limits or Limits()
        self._scheme = "http" if plain_http or reference.is_local else "https"
        self._base = f"{self._scheme}://{reference.host}/v2/{reference.repository}/"
        self._session = _session((self._limits.connect, self._limits.stall))
        self._authorization: str | None = None
        self._lock = threading.Lock()

    def has(self, blob: Blob) -> bool:
        """Whether the repository has a blob."""
        response = self._patiently(lambda: self._ask("HEAD", f"blobs/{blob.digest}", accept=(200, 404)))
        return response.status_code == 200

    def upload(self, blob: Blob, body: Body, *, mount_from: str | None = None) -> bool:
        """Bring a blob into the repository; whether it came from another one of this registry, without its bytes."""

        def attempt() -> bool:
            location = self._begin(blob, mount_from)
            if location is not None:
                self._ask("PUT", location, accept=(201, 204), body=body, params={"digest": blob.digest})
            return location is None

        return self._patiently(attempt)

    def download(self, blob: Blob, write: Callable[[int, bytes], None]) -> None:
        """Give a blob's bytes to `write`, piece by piece with their offsets. A broken transfer goes on where it broke.

        IntegrityError when they are not those of the digest.
        """
        digest, done = hashlib.sha256(), 0

        def attempt() -> None:
            nonlocal done
            for piece in self._pieces(blob, done):
                if done + len(piece) > blob.size:
                    raise IntegrityError("more bytes than listed", where=self._named(blob))
                write(done, piece)
                digest.update(piece)
                done += len(piece)
            if done < blob.size:
                raise _TransientError(f"the transfer ended after {done} of {blob.size} bytes")

        self._patiently(attempt, lambda: done)
        if f"sha256:{digest.hexdigest()}" != blob.digest:
            raise IntegrityError("other bytes than its digest says", where=self._named(blob),
                                 fix="Do not use it: the registry, or something before it, is at fault.")  # fmt: skip

    def manifest(self, name: str) -> bytes:
        """The manifest with a tag or digest, as it was pushed; IntegrityError when it is not that of the digest."""

        def attempt() -> bytes:
            with self._ask("GET", f"manifests/{name}", headers={"Accept": MANIFEST_TYPE}, stream=True) as response:
                return b"".join(_limited(response, self._where(name)))

        data = self._patiently(attempt)
        if name.startswith("sha256:") and f"sha256:{hashlib.sha256(data).hexdigest()}" != name:
            raise IntegrityError("other bytes than its digest says", where=self._where(name))
        return data

    def put_manifest(self, tag: str, data: bytes) -> str:
        """Make `tag` name this manifest; its digest."""
        typed = {"Content-Type": MANIFEST_TYPE}
        self._patiently(lambda: self._ask("PUT", f"manifests/{tag}", accept=(201,), body=data, headers=typed))
        return f"sha256:{hashlib.sha256(data).hexdigest()}"

    def tags(self) -> list[str]:
        """All tags of the repository; none where there is no such repository."""
        found: list[str] = []
        page = "tags/list?n=500"
        while page and len(found) < _MAX_TAGS:
            response = self._patiently(functools.partial(self._ask, "GET", page, accept=(200, 404)))
            if response.status_code == 404:
                break
            found += self._tags_of(response)
            following = _NEXT.search(response.headers.get("Link", ""))
            page = urljoin(str(response.url), following[1]) if following else ""
        return found

    def _tags_of(self, response: requests.Response) -> list[str]:
        try:
            tags = response.json()["tags"] or []
        except (ValueError, KeyError, TypeError) as fault:
            raise FetchError("not a list of tags", where=str(self.reference), why=str(fault)) from fault
        return [tag for tag in tags if isinstance(tag, str) and parse_reference(f"{self._repository}:{tag}")]

    @property
    def _repository(self) -> str:
        return f"oci://{self.reference.host}/{self.reference.repository}"

    def _named(self, blob: Blob) -> str:
        return f"{self._repository}@{blob.digest}"

    def _where(self, name: str) -> str:
        return f"{self._repository}{'@' if name.startswith('sha256:') else ':'}{name}"

    def _begin(self, blob: Blob, mount_from: str | None) -> str | None:
        """Where to upload to; None when the blob is here already, from another repository."""
        mounting = {"mount": blob.digest, "from": mount_from} if mount_from else {}
        response = self._ask("POST", "blobs/uploads/", accept=(201, 202), body=b"", params=mounting)
        if response.status_code == 201:
            return None
        location = response.headers.get("Location")
        if not location:
            raise FetchError("does not say where to upload to", where=str(self.reference))
        return urljoin(str(response.url), location)

    def _pieces(self, blob: Blob, start: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._ask("GET", f"blobs/{blob.digest}", accept=(200, 206), headers=headers, stream=True) as response:
            skip = start if response.status_code == 200 else 0
            for piece in _arriving(response):
                if kept := piece[skip:]:
                    yield kept
                skip = max(0, skip - len(piece))

    def _patiently(self, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """What an attempt gives; another one where that may help, and as many more when it brought progress."""
        import requests

        failed, before = 0, progress()
        while True:
            try:
                return attempt()
            except requests.exceptions.SSLError as fault:
                raise self._failed(fault) from fault
            except (_TransientError, requests.ConnectionError, requests.Timeout,
                    requests.exceptions.ChunkedEncodingError) as fault:  # fmt: skip
                failed, before = (failed + 1 if progress() == before else 1), progress()
                if failed >= self._limits.attempts:
                    raise self._failed(fault) from fault
                time.sleep(self._limits.backoff * 2 ** (failed - 1))
            except requests.RequestException as fault:
                raise self._failed(fault) from fault

    def _failed(self, fault: Exception) -> FetchError:
        return FetchError("the registry does not do its part", where=str(self.reference), why=_plain(fault), fix=_FIX)

    def _ask(self, method: str, path: str, *, accept: tuple[int, ...] = (200,),
             **request: Any) -> requests.Response:  # noqa: ANN401  # fmt: skip
        """The answer to a request, which has one of the accepted statuses."""
        url = urljoin(self._base, path)
        self._require_https(url)
        response = self._answered(method, url, **request)
        for one in (*response.history, response):
            self._require_https(str(one.url))
        if response.status_code not in accept:
            raise self._refused(method, response)
        return response

    def _require_https(self, url: str) -> None:
        if self._scheme == "https" and not url.startswith("https:"):
            raise FetchError("leads away from https", where=str(self.reference), why=url)

    def _answered(self, method: str, url: str, **request: Any) -> requests.Response:  # noqa: ANN401
        response = self._sent(method, url, **request)
        if response.status_code == 401 and self._authorize(response):
            response.close()
            response = self._sent(method, url, **request)
        return response

    def _sent(self, method: str, url: str, *, headers: Mapping[str, str] | None = None,
              body: Body | bytes | None = None, stream: bool = False,
              params: Mapping[str, str] | None = None) -> requests.Response:  # fmt: skip
        known = self._authorization
        # A registry may send uploads elsewhere, where our login is nobody's business.
        login = {"Authorization": known} if known and urlsplit(url).netloc == self.reference.host else {}
        typed = {"Content-Type": "application/octet-stream"} if body is not None else {}
        data: Any = body
        return self._session.request(
            method, url, headers={"Accept-Encoding": "identity", **typed, **login, **(headers or {})}, data=data,
            params=dict(params or {}), stream=stream,
        )  # fmt: skip

    def _refused(self, method: str, response: requests.Response) -> Exception:
        status, where = response.status_code, str(self.reference)
        why = _reason(response)
        if status >= 500 or status == 429:
            return _TransientError(f"the registry answers {status}: {why}")
        if status in (401, 403):
            login = f"`docker login {self.reference.host}` writes ~/.docker/config.json."
            return FetchError(f"the registry does not allow this ({status})", where=where, why=why, fix=login)
        if status == 404:
            return FetchError("not in the registry", where=where, why=why, fix="Check the repository and the tag.")
        return FetchError(f"the registry answers {status} to {method}", where=where, why=why)

    def _authorize(self, response: requests.Response) -> bool:
        """Get what the registry asks for in an answer; whether there is something to try."""
        challenge = response.headers.get("WWW-Authenticate", "")
        with self._lock:
            sent = response.request.headers.get("Authorization")
            if self._authorization not in (None, sent):
                return True  # another thread was faster
            found = _authorization(challenge, self.reference, self._session, secure=self._scheme == "https")
            self._authorization = found or self._authorization
            return found is not None


class _TransientError(Exception):
    """A fault that another attempt may not have."""


def _plain(fault: Exception) -> str:
    return str(fault) or type(fault).__name__


def _reason(response: requests.Response) -> str:
    """What a registry says of an error: `{"errors": [{"code", "message"}]}`."""
    try:
        return "; ".join(f"{one['code']}: {one.get('message', '')}" for one in response.json()["errors"])[:500]
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.reason or ""


def _arriving(response: requests.Response) -> Iterator[bytes]:
    """An answer's body as it comes: `iter_content` would lose what comes before the line breaks."""
    import urllib3

    try:
        while piece := response.raw.read1(_PIECE, decode_content=False):
            yield piece
    except (urllib3.exceptions.HTTPError, OSError) as fault:
        raise _TransientError(_plain(fault)) from fault


def _limited(response: requests.Response, where: str) -> Iterable[bytes]:
    done = 0
    for piece in response.iter_content(_PIECE):
        done += len(piece)
        if done > MAX_MANIFEST:
            raise FetchError("too large for a manifest", where=where)
        yield piece


def _session(timeout: tuple[float, float]) -> requests.Session:
    try:
        import oras.auth  # noqa: F401 - here, so that a missing extra is known before anything is read
        import requests
    except ImportError as fault:
        raise HostError("registries take oras", why=str(fault),
                        fix="Install the extra: pip install 'wheel-composer[oci]'.") from fault  # fmt: skip
    session = requests.Session()
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    # A .netrc would replace the login that the registry asked for.
    session.auth = lambda request: request
    # Also for oras-py, which sets none.
    session.request = functools.partial(session.request, timeout=timeout)  # type: ignore[method-assign]
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=32))
    return session


def _authorization(challenge: str, reference: Reference, session: requests.Session, *, secure: bool) -> str | None:
    """The header that answers a challenge, with Docker's login if there is one; None where that is not enough."""
    import oras.auth
    import oras.auth.utils
    import oras.container
    import oras.logger

    oras.logger.setup_logger(quiet=True)
    basic = challenge.lower().startswith("basic")
    realm = str(oras.auth.utils.parse_auth_header(challenge).realm or "")
    if secure and not basic and not realm.startswith("https:"):
        raise FetchError("asks for the login where it would not be encrypted", where=str(reference), why=realm)
    config = os.environ.get("DOCKER_CONFIG")
    try:
        backend = oras.auth.get_auth_backend("basic" if basic else "token", session, insecure=not secure)
        backend.load_configs(oras.container.Container(f"{reference.host}/{reference.repository}"),
                             configs=[str(Path(config, "config.json"))] if config else [])  # fmt: skip
        if basic and not hasattr(backend, "_basic_auth"):
            return None
        headers, _ = backend.authenticate_request(_Challenge({"Www-Authenticate": challenge}), {})
    except ComposerError:
        raise
    except Exception as fault:  # a login file or helper may be broken in any way
        raise FetchError("the login cannot be had", where=str(reference), why=_plain(fault),
                         fix="Check ~/.docker/config.json and its credential helper.") from fault  # fmt: skip
    found = headers.get("Authorization")
    return str(found) if found else None


@dataclass(frozen=True, slots=True)
class _Challenge:
    """As much of an answer as oras-py looks at."""

    headers: Mapping[str, str]

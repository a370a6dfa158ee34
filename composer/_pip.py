"""The one module that reaches into pip: its resolver, its configured session and its view of an index.

pip has no library interface, so its version is pinned and `check_interfaces` proves that every name used here is still
there with the parameters we know. Resolution changes what pip believes about the interpreter and about dependencies;
it therefore runs in a child process of its own (`python -I composer/_pip.py`, a JSON request on standard input, a JSON
answer on standard output). For that reason this file imports nothing from composer.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import importlib
import inspect
import json
import logging
import os
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pip
from pip._internal.commands.download import DownloadCommand
from pip._internal.exceptions import (
    InstallationError,
    PipError,
    ProxyConnectionError,
    ResolutionTooDeepError,
    SSLMissingError,
    SSLVerificationError,
)
from pip._internal.index import collector as pip_collector
from pip._internal.index.collector import HTMLLinkParser, LinkCollector, parse_links
from pip._internal.index.package_finder import PackageFinder
from pip._internal.models.format_control import FormatControl
from pip._internal.models.link import Link
from pip._internal.models.search_scope import SearchScope
from pip._internal.models.selection_prefs import SelectionPreferences
from pip._internal.models.target_python import TargetPython
from pip._internal.network.lazy_wheel import LazyZipOverHTTP
from pip._internal.operations.build.build_tracker import get_build_tracker
from pip._internal.req.constructors import install_req_from_line, install_req_from_req_string
from pip._internal.utils.misc import redact_auth_from_url
from pip._internal.utils.temp_dir import TempDirectory, global_tempdir_manager, tempdir_registry
from pip._internal.utils.urls import url_to_path
from pip._vendor import urllib3
from pip._vendor.packaging import markers as pip_markers
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.requests.exceptions import InvalidSchema, InvalidURL, RequestException
from pip._vendor.rich.text import Text

#: The index name that stands for whatever pip is configured with.
PYPI = "pypi"

_Distribution: Any = importlib.import_module("pip._internal.metadata.importlib._dists").Distribution

# What we replace, override or call by position, and the parameters it must have.
_INTERFACES: tuple[tuple[object, str, str], ...] = (
    (_Distribution, "iter_dependencies", "self extras"),
    (pip_markers, "default_environment", ""),
    (LinkCollector, "__init__", "self session search_scope"),
    (LinkCollector, "collect_sources", "self project_name candidates_from_page"),
    (LinkCollector, "fetch_response", "self location package_name"),
    (PackageFinder, "find_all_candidates", "self project_name"),
    (PackageFinder, "find_best_candidate", "self project_name specifier hashes"),
    (PackageFinder, "add_locked_link", "self project_name locked_link"),
    (pip_collector, "_get_simple_response", "url session force_revalidate"),
    (pip_collector, "_make_index_content", "response cache_link_parsing"),
    (DownloadCommand, "_build_session", "self options retries timeout"),
    (LazyZipOverHTTP, "__init__", "self url session chunk_size"),
    (Link, "from_json", "file_data page_url"),
    (Link, "from_element", "anchor_attribs page_url base_url"),
)

# Without any handler, pip's warnings about places that have nothing would reach standard error.
logging.getLogger("pip").addHandler(logging.NullHandler())

# Bytes that pip reads from the end of a remote wheel to get at its METADATA; its own 10 kB take several requests.
_TAIL = 256 * 1024

# An index that keeps its files in S3 answers 403 for a project that it does not have.
_ABSENT = frozenset({403, 404, 410})


class PipFault(Exception):  # noqa: N818 - `PipError` is pip's own
    """A fault in words: what went wrong, the evidence for it, and what kind of thing is at fault."""

    def __init__(self, what: str, *, why: str = "", kind: str = "index") -> None:
        super().__init__(what)
        self.what, self.why, self.kind = what, why, kind


def check_interfaces() -> None:
    """Raise PipFault, naming pip's version, unless every internal used here looks as it did when this was written."""
    for owner, name, parameters in _INTERFACES:
        found = getattr(owner, name, None)
        if found is None or list(inspect.signature(found).parameters) != parameters.split():
            place = f"{getattr(owner, '__name__', owner)}.{name}({', '.join(parameters.split())})"
            raise PipFault(f"pip {pip.__version__} is not usable here", why=f"it has no {place}", kind="pip")


def explain(fault: BaseException) -> PipFault:
    """Any exception of pip or its HTTP library as a PipFault."""
    if isinstance(fault, PipFault):
        return fault
    what = _plain(getattr(fault, "message", None)) or str(fault) or type(fault).__name__
    kind = "unsatisfiable" if isinstance(fault, (InstallationError, ResolutionTooDeepError)) else "index"
    return PipFault(what, why=_plain(getattr(fault, "context", None)), kind=kind)


def _plain(text: object) -> str:
    """pip writes some messages in the markup of rich."""
    return Text.from_markup(text).plain if isinstance(text, str) else str(text or "")


# --- indexes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedFile:
    """What an index says of one file; `sha256` and `size` are None where it does not say."""

    filename: str
    url: str
    sha256: str | None
    size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    uploaded: dt.datetime | None
    size: int | None


class _Pages(LinkCollector):  # type: ignore[misc]  # pip has no types
    """A LinkCollector that asks, for each project, only the index it is pinned to, and fails where an index fails.

    pip itself asks every index and skips one that does not answer, which lets a version depend on the weather.
    """

    def __init__(self, session: Any, scopes: Mapping[str, SearchScope], pins: Mapping[str, str]) -> None:  # noqa: ANN401
        super().__init__(session, scopes[PYPI])
        self._by_index = {name: LinkCollector(session, scope) for name, scope in scopes.items()}
        self._pins = pins
        self._facts: dict[str, _Facts] = {}

    def collect_sources(self, project_name: str, candidates_from_page: Callable[[Any], Iterable[Any]]) -> Any:  # noqa: ANN401
        index = self._pins.get(canonicalize_name(project_name), PYPI)
        return self._by_index[index].collect_sources(project_name, candidates_from_page)

    def fetch_response(self, location: Any, package_name: str | None = None) -> Any:  # noqa: ANN401, ARG002
        url = _page_url(location.url)
        shown = redact_auth_from_url(url)
        try:
            response = pip_collector._get_simple_response(url, session=self.session)
        except pip_collector.NetworkConnectionError as fault:
            status = getattr(fault.response, "status_code", None)
            if status in _ABSENT:
                return None
            raise PipFault(f"the index answered {status}" if status else str(fault), why=shown) from fault
        except (pip_collector._NotAPIContent, pip_collector._NotHTTP) as fault:
            raise PipFault("not a package index", why=shown) from fault
        except RequestException as fault:
            raise PipFault("the index cannot be read", why=f"{shown}: {fault}") from fault
        page = pip_collector._make_index_content(response, cache_link_parsing=location.cache_link_parsing)
        try:
            self._facts.update(_page_facts(page))
        except (ValueError, TypeError, AttributeError) as fault:
            raise PipFault("the index page is malformed", why=f"{shown}: {fault}") from fault
        return page

    def facts(self, link: Any) -> _Facts:  # noqa: ANN401
        """What the page where `link` was found says of it beyond what pip keeps."""
        return self._facts.get(link.url, _Facts(uploaded=link.upload_time, size=None))


def _page_url(url: str) -> str:
    """The URL without its fragment; a folder of a `file:` index stands for its index.html, as in pip."""
    url = url.split("#", 1)[0]
    if url.startswith("file:") and os.path.isdir(url_to_path(url)):  # noqa: PTH112 - what url_to_path gives is a str
        return urllib.parse.urljoin(url.rstrip("/") + "/", "index.html")
    return url


def _page_facts(page: Any) -> Iterator[tuple[str, _Facts]]:  # noqa: ANN401
    """Upload time and size by link URL: PEP 700 in JSON; `data-upload-time`, which some mirrors give, in HTML."""
    if page.content_type.lower().startswith("application/vnd.pypi.simple.v1+json"):
        for file in json.loads(page.content).get("files", []):
            if (link := Link.from_json(file, page.url)) is not None:
                size = file.get("size")
                yield link.url, _Facts(uploaded=_utc(link.upload_time), size=size if isinstance(size, int) else None)
        return
    parser = HTMLLinkParser(page.url)
    parser.feed(page.content.decode(page.encoding or "utf-8"))
    for anchor in parser.anchors:
        link = Link.from_element(anchor, page_url=page.url, base_url=parser.base_url or page.url)
        if link is not None:
            stamp = anchor.get("data-upload-time")
            yield link.url, _Facts(uploaded=_utc(dt.datetime.fromisoformat(stamp)) if stamp else None, size=None)


def _utc(time: dt.datetime | None) -> dt.datetime | None:
    """PEP 700 times are in UTC, also where an index forgets to say so."""
    return time if time is None or time.tzinfo else time.replace(tzinfo=dt.UTC)


def _sha256_of(link: Any) -> str | None:  # noqa: ANN401
    digest: str | None = link._hashes.get("sha256")
    return digest.lower() if digest else None


def _options(command: Any) -> Any:  # noqa: ANN401
    """pip's options from its configuration files and environment, less those that would change what is resolved."""
    try:
        options, _ = command.parse_args(["--no-input"])
    except SystemExit as fault:
        raise PipFault("pip cannot read its configuration", why="pip config debug", kind="pip") from fault
    options.cache_dir = None
    options.ignore_dependencies = options.only_dependencies = options.require_hashes = False
    options.features_enabled, options.deprecated_features_enabled = ["fast-deps"], []
    options.download_dir, options.editables, options.progress_bar = None, [], "off"
    return options


def _scopes(options: Any, indexes: Mapping[str, str]) -> dict[str, Any]:  # noqa: ANN401
    """Where to look, by index name; the recipe's indexes bring no find-links, so nothing local stands in for them."""
    urls = [] if options.no_index else [options.index_url, *options.extra_index_urls]
    pypi = SearchScope.create(find_links=options.find_links or [], index_urls=urls, no_index=options.no_index)
    return {
        name: SearchScope.create(find_links=[], index_urls=[url], no_index=False) for name, url in indexes.items()
    } | {PYPI: pypi}


class Body:
    """One HTTP answer whose body is read as it arrives, in the encoding it arrives in."""

    def __init__(self, response: Any, redirect: str | None) -> None:  # noqa: ANN401
        self._response = response
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.redirect = None if redirect is None else urllib.parse.urljoin(response.url, redirect)

    def read(self, most: int) -> bytes:
        """What has arrived, at most `most` bytes; empty at the end. PipFault of kind "transient" if the line breaks."""
        try:
            return bytes(self._response.raw.read1(most, decode_content=False))
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as fault:
            raise PipFault(str(fault), kind="transient") from fault

    def abort(self) -> None:
        """Make a `read` that waits in another thread return at once."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._response.raw.shutdown()

    def close(self) -> None:
        """Drop the connection: what is left of the body is not read."""
        self._response.close()


class Indexes:
    """pip's configured indexes and those of `indexes` (name to URL), asked with pip's proxies, certificates and logins.

    Usable from several threads. Raises PipFault for an index that cannot be asked.
    """

    def __init__(self, indexes: Mapping[str, str]) -> None:
        check_interfaces()
        command = DownloadCommand("install", "")
        options = _options(command)
        self._scopes = _scopes(options, indexes)
        self._page_session = command._build_session(options)
        # For files pip's retries are off: they know nothing of a partial body.
        self._file_session = command._build_session(options)
        for adapter in self._file_session.adapters.values():
            adapter.max_retries = urllib3.Retry(total=0, read=False)
        for session in (self._page_session, self._file_session):
            session.update_index_urls([url for scope in self._scopes.values() for url in scope.index_urls])
        self._found: dict[tuple[str, str], list[IndexedFile]] = {}
        self._down: dict[str, PipFault] = {}

    def files(self, name: str, index: str) -> list[IndexedFile]:
        """Every file that the index called `index` lists for the distribution `name`; asked once."""
        if index not in self._scopes:
            raise PipFault(f"the recipe names no index {index!r}", kind="recipe")
        if (name, index) not in self._found:
            if index in self._down:
                raise self._down[index]
            try:
                self._found[name, index] = self._ask(name, index)
            except (PipError, PipFault, RequestException, OSError) as fault:
                # Every further question would wait for the same silence.
                self._down[index] = explain(fault)
                raise self._down[index] from fault
        return self._found[name, index]

    def get(self, url: str, *, start: int, connect: float, stall: float) -> Body:
        """The answer to GET `url` from byte `start`, redirects not followed; timeouts in seconds.

        Raises PipFault of kind "transient" where another attempt may help, "final" where not.
        """
        headers = {"Accept-Encoding": "identity", "Cache-Control": "no-cache"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            response = self._file_session.get(
                url, headers=headers, stream=True, timeout=(connect, stall), allow_redirects=False
            )
        except (SSLVerificationError, SSLMissingError, ProxyConnectionError, InvalidURL, InvalidSchema) as fault:
            raise PipFault(explain(fault).what, why=explain(fault).why, kind="final") from fault
        except (PipError, RequestException, OSError) as fault:
            raise PipFault(explain(fault).what, why=explain(fault).why, kind="transient") from fault
        return Body(response, self._file_session.get_redirect_target(response))

    def _ask(self, name: str, index: str) -> list[IndexedFile]:
        pages = _Pages(self._page_session, self._scopes, {name: index})

        def links(location: Any) -> Iterable[Any]:  # noqa: ANN401
            page = pages.fetch_response(location)
            return () if page is None else parse_links(page)

        sources = [source for part in pages.collect_sources(name, links) for source in part if source is not None]
        found = [
            link for source in sources for part in (source.page_candidates(), source.file_links()) for link in part
        ]
        return [
            IndexedFile(
                filename=link.filename,
                url=link.url_without_fragment,
                sha256=_sha256_of(link),
                size=pages.facts(link).size,
            )
            for link in found
        ]


# --- resolution, in the child ----------------------------------------------------------------------------------------


class _Edits:
    """Requirements that are dropped or replaced wherever they appear, or only in one distribution (`of`)."""

    def __init__(self, excludes: Sequence[Mapping[str, Any]], overrides: Sequence[Mapping[str, Any]]) -> None:
        self._excludes = {(row["name"], row["of"]): number for number, row in enumerate(excludes)}
        parsed = [(Requirement(row["requirement"]), row["of"]) for row in overrides]
        self._overrides = {(canonicalize_name(req.name), of): (n, req) for n, (req, of) in enumerate(parsed)}

    def excluded(self, owner: str | None, wanted: Any) -> int | None:  # noqa: ANN401
        """The number of the exclude that drops `wanted` from `owner`'s dependencies."""
        name = canonicalize_name(wanted.name)
        return self._excludes.get((name, owner), self._excludes.get((name, None)))

    def overridden(self, owner: str | None, wanted: Any) -> int | None:  # noqa: ANN401
        """The number of the override that replaces `wanted` in `owner`'s dependencies, if it would change it."""
        number, by = self._override(owner, wanted)
        return None if by is None or (wanted.specifier == by.specifier and wanted.url is None) else number

    def apply(self, owner: str | None, wanted: Any) -> Any:  # noqa: ANN401
        """`wanted` with the override's version; its extras and marker stay: they say what and when, not which."""
        _, by = self._override(owner, wanted)
        if by is None:
            return wanted
        edited = Requirement(str(wanted))
        edited.specifier, edited.url, edited.extras = by.specifier, by.url, wanted.extras | by.extras
        return edited

    def _override(self, owner: str | None, wanted: Any) -> tuple[int | None, Any]:  # noqa: ANN401
        name = canonicalize_name(wanted.name)
        return self._overrides.get((name, owner)) or self._overrides.get((name, None)) or (None, None)


class _DatedFinder(PackageFinder):  # type: ignore[misc]  # pip has no types
    """A PackageFinder for which nothing was uploaded at or after `as_of`.

    pip's --uploaded-prior-to lets local files pass and refuses an HTML page even when it gives the times. Here a file
    without a time counts only if its version is pinned exactly.
    """

    as_of: dt.datetime | None = None
    exact: Mapping[str, str]

    def find_all_candidates(self, project_name: str) -> list[Any]:
        found: list[Any] = super().find_all_candidates(project_name)
        if self.as_of is None or canonicalize_name(project_name) in self._locked_links:
            return found
        pin = self.exact.get(canonicalize_name(project_name))
        times = [(candidate, self._link_collector.facts(candidate.link).uploaded) for candidate in found]
        kept = [
            candidate for candidate, time in times
            if (time < self.as_of if time is not None else str(candidate.version) == pin)
        ]  # fmt: skip
        if found and not kept and not any(time for _, time in times):
            raise PipFault(
                f"the index gives no upload times for {project_name}, and no constraint pins it", kind="undated"
            )
        return kept


class _Resolve(DownloadCommand):  # type: ignore[misc]  # pip has no types
    """`pip download` as far as its resolution, with our finder, for another interpreter."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        super().__init__("install", "")
        self.request = request

    def resolve(self) -> dict[str, Any]:
        """The chosen files and what the edits did, or a PipFault or PipError."""
        options = _options(self)
        session = self.enter_context(self._build_session(options))
        pages = self._pages(options, session)
        finder = self._finder(pages, self.request["platforms"])
        edits = _Edits(self.request["excludes"], self.request["overrides"])
        LazyZipOverHTTP.__init__.__defaults__ = (_TAIL,)
        original = _patch_dependencies(edits)
        pip_markers.default_environment = lambda: dict(self.request["environment"])
        resolver = self._resolver(options, session, finder)
        resolver.resolve(list(_requirements(self.request, edits)), check_supported_wheels=True)
        chosen = list(resolver._result.mapping.values())
        return {"packages": self._report(chosen, session, pages), **_ledger(chosen, original, edits)}

    def _pages(self, options: Any, session: Any) -> _Pages:  # noqa: ANN401
        pages = _Pages(session, _scopes(options, self.request["indexes"]), self.request["pins"])
        session.update_index_urls([*pages.search_scope.index_urls, *self.request["indexes"].values()])
        return pages

    def _finder(self, pages: _Pages, platforms: Sequence[str]) -> _DatedFinder:
        request = self.request
        target = TargetPython(
            platforms=platforms, py_version_info=tuple(request["python"]), abis=[request["abi"]],
            implementation="cp",
        )  # fmt: skip
        wheels_only = SelectionPreferences(allow_yanked=True, format_control=FormatControl(set(), {":all:"}))
        finder: _DatedFinder = _DatedFinder.create(pages, wheels_only, target)
        finder.as_of = dt.datetime.fromisoformat(request["as_of"]) if request["as_of"] else None
        finder.exact = request["exact"]
        for source in request["urls"]:
            link = Link(f"{source['url']}#sha256={source['sha256']}", comes_from="the recipe")
            finder.add_locked_link(canonicalize_name(source["name"]), link)
        return finder

    def _resolver(self, options: Any, session: Any, finder: Any) -> Any:  # noqa: ANN401
        preparer = self.make_requirement_preparer(
            temp_build_dir=TempDirectory(kind="resolve", globally_managed=True), options=options,
            build_tracker=self.enter_context(get_build_tracker()), session=session, finder=finder,
            use_user_site=False, allow_editables=False,
        )  # fmt: skip
        return self.make_resolver(
            preparer=preparer, finder=finder, options=options, py_version_info=tuple(self.request["python"])
        )

    def _report(self, chosen: Sequence[Any], session: Any, pages: _Pages) -> list[dict[str, Any]]:  # noqa: ANN401
        # A candidate with extras stands beside its plain one; Requires-Python is a candidate without a link.
        found = [candidate for candidate in chosen if candidate.source_link and not hasattr(candidate, "extras")]
        links = [[candidate.source_link, *self._elsewhere(candidate, pages)] for candidate in found]
        with ThreadPoolExecutor(8) as pool:
            files = list(pool.map(lambda each: [_file_report(link, session, pages) for link in each], links))
        return [
            {
                "name": str(candidate.project_name), "version": str(candidate.version),
                "requires_python": str(candidate.dist.requires_python), "files": each,
            }
            for candidate, each in zip(found, files, strict=True)
        ]  # fmt: skip

    def _elsewhere(self, candidate: Any, pages: _Pages) -> list[Any]:  # noqa: ANN401
        """Wheels of a tool, of the same version, for the machines that may compose; where there are any."""
        name, version = str(candidate.project_name), SpecifierSet(f"==={candidate.version}")
        if name not in self.request["tools"]:
            return []
        found = [
            self._finder(pages, platforms).find_best_candidate(name, version).best_candidate
            for platforms in self.request["tool_platforms"]
        ]
        links = {one.link.filename: one.link for one in found if one is not None}
        return [link for filename, link in links.items() if filename != candidate.source_link.filename]

    def run(self, options: Any, args: list[str]) -> int:  # noqa: ANN401
        """Not reached: `resolve` is called without pip's command loop, which would turn errors into log lines."""
        raise NotImplementedError


def _requirements(request: Mapping[str, Any], edits: _Edits) -> Iterator[Any]:
    for text in request["roots"]:
        wanted = edits.apply(None, Requirement(text))
        yield install_req_from_req_string(str(wanted), user_supplied=True)
    for text in request["constraints"]:
        yield install_req_from_line(text, constraint=True)


def _patch_dependencies(edits: _Edits) -> Callable[..., Iterable[Any]]:
    """Make pip see every distribution's dependencies through `edits`; gives back the method that sees the originals."""
    original: Callable[..., Iterable[Any]] = _Distribution.iter_dependencies

    def edited(self: Any, extras: Sequence[str] = ()) -> Iterator[Any]:  # noqa: ANN401
        owner = str(self.canonical_name)
        for wanted in original(self, extras):
            if edits.excluded(owner, wanted) is None:
                yield edits.apply(owner, wanted)

    _Distribution.iter_dependencies = edited
    return original


def _ledger(chosen: Sequence[Any], original: Callable[..., Iterable[Any]], edits: _Edits) -> dict[str, Any]:
    """Which of the chosen distributions each exclude and each override touched, by the number of the edit."""
    excluded: dict[int, set[str]] = {}
    overridden: dict[int, set[str]] = {}
    for candidate in chosen:
        base = getattr(candidate, "base", candidate)
        if base.source_link is None:
            continue
        owner, pin = str(base.project_name), f"{base.project_name}=={base.version}"
        for wanted in original(base.dist, getattr(candidate, "extras", ())):
            if (number := edits.excluded(owner, wanted)) is not None:
                excluded.setdefault(number, set()).add(pin)
            elif (number := edits.overridden(owner, wanted)) is not None:
                overridden.setdefault(number, set()).add(f"{pin}: {wanted}")
    return {
        "excluded": {number: sorted(rows) for number, rows in excluded.items()},
        "overridden": {number: sorted(rows) for number, rows in overridden.items()},
    }


def _file_report(link: Any, session: Any, pages: _Pages) -> dict[str, Any]:  # noqa: ANN401
    sha256, size = _sha256_of(link), pages.facts(link).size
    if sha256 is None:
        sha256, size = _read_through(link, session)
    size = size if size is not None else _ask_size(link, session)
    return {"filename": link.filename, "sha256": sha256, "size": size}


def _read_through(link: Any, session: Any) -> tuple[str, int]:  # noqa: ANN401
    """SHA-256 and size of a file whose index gives no SHA-256: it has to be read."""
    digest, size = hashlib.sha256(), 0
    response = session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True)
    pip_collector.raise_for_status(response)
    while chunk := response.raw.read(1 << 20):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def _ask_size(link: Any, session: Any) -> int:  # noqa: ANN401
    url = link.url_without_fragment
    response = session.head(url, headers={"Accept-Encoding": "identity"}, allow_redirects=True)
    pip_collector.raise_for_status(response)
    if not response.headers.get("Content-Length", "").isdigit():
        raise PipFault("the index does not tell a file's size", why=redact_auth_from_url(url))
    return int(response.headers["Content-Length"])


class _Notes(logging.Handler):
    """Keeps what pip only logs: which requirements are in conflict."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().strip())


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one resolution request: `packages`, `excluded` and `overridden`, or a `fault`."""
    notes = _Notes()
    logger = logging.getLogger("pip._internal.resolution.resolvelib.factory")
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        check_interfaces()
        command = _Resolve(request)
        with command.main_context():
            command.enter_context(tempdir_registry())
            command.enter_context(global_tempdir_manager())
            return command.resolve()
    except (PipError, PipFault, RequestException, OSError) as fault:
        known = explain(fault)
        why = "\n".join([*notes.lines, known.why]).strip()
        return {"fault": {"what": known.what, "why": why, "kind": known.kind}}


def main() -> None:
    """Answer the request on standard input; whatever pip prints goes to standard error."""
    request = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        json.dump(answer(request), out)


if __name__ == "__main__":
    main()

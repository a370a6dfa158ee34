"""Say who listens on a TCP port, from /proc alone: `ss` and `lsof` are not on every host, and need no asking here."""

# The paths are those of /proc; pathlib would add nothing.
# ruff: noqa: PTH115, PTH118, PTH123, PTH208

from __future__ import annotations

import os
import pwd
import shlex
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_LISTEN = "0A"
_TABLES = (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6))
_ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104
_MAPPED = "::ffff:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A listener, and the process that holds it.

    `uid` is that of the socket, which every user may see. `pid` is None and `command` empty where the process is
    not ours to see: another user's, or one of another PID namespace.
    """

    address: str
    port: int
    uid: int
    user: str
    pid: int | None
    command: str


@dataclass(frozen=True, slots=True)
class _Listener:
    family: socket.AddressFamily
    address: str
    uid: int
    inode: str


def owner(port: int, host: str) -> Owner | None:
    """Who listens on `port` where a server on `host` (a name, an address, a wildcard, or nothing) would be in its way.

    None if nobody does, or if `host` is no address of anything. A wildcard is in the way of every address of its
    family; an IPv6 wildcard is taken to hold IPv4 as well, because /proc does not tell whether it does. Of several
    listeners, the one of the same family comes first, and one whose process can be seen before others.
    """
    hosts = _addresses(host)
    found = [one for one in _listeners(port) if any(_overlap(one, *wanted) for wanted in hosts)]
    if not found:
        return None
    pids = _holders({one.inode for one in found})
    families = {family for family, _ in hosts}
    first = min(found, key=lambda one: (one.family not in families, one.inode not in pids))
    pid = pids.get(first.inode)
    return Owner(address=first.address, port=port, uid=first.uid, user=user_name(first.uid), pid=pid,
                 command=_command(pid) if pid else "")  # fmt: skip


def bind_fault(port: int, host: str) -> OSError | None:
    """Why a server could not bind to `port` on every address of `host`, or None; the sockets are closed at once.

    Binds as asyncio's servers do: with SO_REUSEADDR, and IPv6 sockets for IPv6 alone.
    """
    try:
        wanted = _addresses(host, strict=True)
        for family, address in wanted:
            with socket.socket(family, socket.SOCK_STREAM) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((address, port))
    except OSError as fault:
        return fault
    return None


def user_name(uid: int) -> str:
    """The user's name, or `uid N` where the passwd database has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _addresses(host: str, *, strict: bool = False) -> list[tuple[socket.AddressFamily, str]]:
    """(family, address) of a name; a bare wildcard for no name. gaierror (an OSError) only if `strict`."""
    try:
        found = socket.getaddrinfo(host or _ANY[socket.AF_INET], 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as fault:
        if not strict:
            return []
        raise fault if isinstance(fault, OSError) else socket.gaierror(str(fault)) from fault
    return list(dict.fromkeys((family, str(place[0])) for family, _, _, _, place in found))


def _listeners(port: int) -> Iterator[_Listener]:
    for path, family in _TABLES:
        try:
            with open(path) as stream:
                rows = [line.split() for line in stream.readlines()[1:]]
        except OSError:  # IPv6 may be switched off
            continue
        for row in rows:
            address, _, number = row[1].partition(":")
            if row[3] == _LISTEN and int(number, 16) == port:
                yield _listener(family, _decoded(family, address), int(row[7]), row[9])


def _listener(family: socket.AddressFamily, address: str, uid: int, inode: str) -> _Listener:
    if address.startswith(_MAPPED) and "." in address:
        return _Listener(socket.AF_INET, address[len(_MAPPED) :], uid, inode)
    return _Listener(family, address, uid, inode)


def _decoded(family: socket.AddressFamily, digits: str) -> str:
    """The kernel prints an address as 32-bit words of the machine's own byte order."""
    words = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))


def _overlap(one: _Listener, family: socket.AddressFamily, address: str) -> bool:
    wild = one.address == _ANY[one.family]
    if family == one.family:
        return wild or address in (one.address, _ANY[family])
    # Of different families: only a wildcard of IPv6 holds addresses of IPv4.
    return (wild and one.family == socket.AF_INET6) or address == _ANY[socket.AF_INET6]


def _holders(inodes: set[str]) -> dict[str, int]:
    """The process that holds each socket: of several, which have inherited it, the one with the lowest number."""
    links = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[str, int] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        for link in _descriptors(pid):
            if link in links:
                found.setdefault(links[link], pid)
    return found


def _descriptors(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:  # another user's, or gone
        return
    for name in names:
        try:
            yield os.readlink(os.path.join(folder, name))
        except OSError:
            continue


def _command(pid: int) -> str:
    """The command line as a shell would read it, or the name of a process that has none."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            words = stream.read().decode("utf-8", "replace").rstrip("\0").split("\0")
        if words != [""]:
            return shlex.join(words)
        with open(f"/proc/{pid}/comm") as stream:
            return stream.read().strip()
    except OSError:
        return ""

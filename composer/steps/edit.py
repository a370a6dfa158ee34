"""One wheel becomes one layer: its files stream through the edits of its plan, in a fixed order.

Order of members: by path, with the `.dist-info` folder last and RECORD at the very end, because RECORD lists the
digests of everything before it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from composer._direct import DirectWriter
from composer._fs import host_errors
from composer.errors import RecipeError, WheelError
from composer.formats.elf import is_elf
from composer.formats.metadata import DropRequirement, Edit, ReplaceRequirement, edit_requires
from composer.formats.patch import apply_patch
from composer.formats.record import RecordRow, render_record
from composer.formats.wheel import Wheel, entry_points, install_path, read_wheel, verified_stream
from composer.formats.zip import Member, read, stream
from composer.launchers import rewrite_script, script_launcher
from composer.model.globs import matches
from composer.model.layer import Changes, FileChange, Layer, PruneChange, RequiresChange
from composer.model.plan import RpathEdit, WheelPlan
from composer.proofs.content import Content, is_told, read_content
from composer.steps.bytecode import compile_sources
from composer.steps.layer import LayerWriter
from composer.steps.rpath import apply_rpath
from composer.steps.survey import loose_cubin, mapped_wheel

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SKIPPED = ("RECORD", "RECORD.jws", "RECORD.p7s", "INSTALLER", "REQUESTED", "direct_url.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What edits need beside the wheel: an interpreter of the target's version, and the text of patches by name."""

    python: Path | None
    patches: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file about to be written: its content is at hand, or still a member of the wheel."""

    path: str
    mode: int = 0o644
    content: bytes | Member
    original: str | None = None


@dataclass(slots=True)
class _Ledger:
    requires: list[RequiresChange] = field(default_factory=list)
    files: list[FileChange] = field(default_factory=list)
    pruned: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def changes(self, untouched: str | None) -> Changes:
        pruned = [
            PruneChange(pattern=pattern, reason=reason, files=len(sizes), size=sum(sizes))
            for (pattern, reason), sizes in self.pruned.items()
        ]
        return Changes(requires=self.requires, files=self.files, pruned=pruned, untouched=untouched)


def is_bytecode(path: str) -> bool:
    """Whether a path is compiled code, which is made from the sources that are there and never taken from a wheel."""
    return "/__pycache__/" in path


def write_wheel(writer: LayerWriter, plan: WheelPlan, path: Path, tools: Tools, scratch: Path,
                told: Callable[[Content], None]) -> Layer:  # fmt: skip
    """Append the edited distribution of the wheel at `path` to a layer and finish it.

    told: takes what the layer's texts say, before the layer is finished.

    WheelError when the wheel is unsound, IntegrityError when it is not the locked one, RecipeError when an edit of the
    recipe does not fit it.
    """
    with mapped_wheel(path, plan.artifact) as view:
        return _Distribution(view, read_wheel(view, plan.filename), plan, tools, scratch).write(writer, told)


class _Distribution:
    """The edits of one plan over one open wheel."""

    def __init__(self, view: Buffer, wheel: Wheel, plan: WheelPlan, tools: Tools, scratch: Path) -> None:
        self._view = view
        self._wheel = wheel
        self._plan = plan
        self._tools = tools
        self._scratch = scratch
        self._site = f"lib/python{plan.python}/site-packages/"
        self._info = f"{self._site}{wheel.dist_info}/"
        self._rpath = {edit.path: edit for edit in plan.rpath}
        self._ledger = _Ledger()

    def write(self, writer: LayerWriter, told: Callable[[Content], None]) -> Layer:
        files = self._files()
        if lost := self._rpath.keys() - files.keys():
            raise AssertionError(f"RPATH edits of files that are not there: {sorted(lost)}")
        for path in sorted(files, key=lambda path: (path.startswith(self._info), path)):
            self._write_file(writer, files[path])
        for link in self._plan.links:
            self._write_link(writer, files, link.path, link.to)
        rows = {self._in_record(entry.path): RecordRow(sha256=bytes.fromhex(entry.sha256), size=entry.size)
                for entry in writer.entries if entry.target is None}  # fmt: skip
        record = f"{self._wheel.dist_info}/RECORD"
        listed = render_record({**rows, record: RecordRow()})
        writer.data(self._site + record, listed)
        texts = ((path, self._bytes(file)) for path, file in files.items() if is_told(path))
        told(read_content([*texts, (self._site + record, listed)]))
        return writer.finish(
            name=self._plan.name, version=self._plan.version, artifact=self._plan.artifact,
            changes=self._ledger.changes(None if self._plan.slim else self._plan.untouched),
        )  # fmt: skip

    def _files(self) -> dict[str, _File]:
        """Every file of the distribution by its path below the prefix, after all edits but those of RPATH."""
        files = {file.path: file for file in self._members()}
        for file in (*self._patched(files), *self._metadata(), *self._scripts()):
            files[file.path] = file
        self._check_pth(files)
        for path, code in self._bytecode(files):
            files[path] = _File(path=path, content=code)
        return files

    def _members(self) -> Iterator[_File]:
        skipped = {f"{self._wheel.dist_info}/{name}" for name in _SKIPPED}
        for member in self._wheel.members.values():
            if member.path in skipped:
                continue
            path = install_path(self._wheel, member.path, self._plan.python)
            if is_bytecode(path) or self._pruned(path, member.size) or self._is_foreign(path, member):
                continue
            if path.startswith("bin/"):
                yield self._script(path, member)
            else:
                yield _File(path=path, mode=member.mode, content=member)

    def _pruned(self, path: str, size: int) -> bool:
        name = path.removeprefix(self._site)
        for rule in self._plan.prune:
            for pattern in rule.paths:
                if matches(name, pattern):
                    self._ledger.pruned.setdefault((pattern, rule.reason), []).append(size)
                    return True
        return False

    def _is_foreign(self, path: str, member: Member) -> bool:
        """Whether it is a loose cubin that the target cannot run."""
        slim = self._plan.slim
        pattern = slim.pattern(path) if slim else None
        if slim is None or pattern is None or (cubin := loose_cubin(self._view, member)) is None:
            return False
        reason = slim.why_left_out(path, cubin)
        if reason:
            self._ledger.pruned.setdefault((pattern, reason), []).append(member.size)
        return reason is not None

    def _script(self, path: str, member: Member) -> _File:
        """A program of the wheel's `.data/scripts`: its first line must not name an interpreter of another machine."""
        content = self._read(member)
        data = content if is_elf(content) else rewrite_script(content)
        if data == content:
            return _File(path=path, mode=0o755, content=member)
        return _File(path=path, mode=0o755, content=data, original=self._digest_of(member))

    def _patched(self, files: Mapping[str, _File]) -> Iterator[_File]:
        done: dict[str, bytes] = {}

        def text(name: str) -> bytes:
            if name in done:
                return done[name]
            file = files.get(self._site + name)
            if file is None:
                raise RecipeError("patch names a file that the wheel does not hold", where=f"{self._plan.name}: {name}")
            return self._bytes(file)

        for patch in self._plan.patches:
            for name, data in apply_patch(self._tools.patches[patch.name], text).items():
                done[name] = data
                self._note("patch", self._site + name, patch.name, patch.why)
        for name, data in done.items():
            file = files[self._site + name]
            original = self._digest_of(file.content) if isinstance(file.content, Member) else None
            yield _File(path=file.path, mode=file.mode, content=data, original=original)

    def _metadata(self) -> Iterator[_File]:
        edits: list[Edit] = [
            ReplaceRequirement(name=one.name, to=one.to, reason=one.reason) if one.to
            else DropRequirement(name=one.name, reason=one.reason)
            for one in self._plan.requires
        ]  # fmt: skip
        data, applied = edit_requires(self._wheel.metadata, edits)
        for one in applied:
            now = one.edit.to if isinstance(one.edit, ReplaceRequirement) else None
            for was in one.matched:
                self._ledger.requires.append(RequiresChange(was=was, now=now, reason=one.edit.reason))
        if data != self._wheel.metadata:
            original = hashlib.sha256(self._wheel.metadata).hexdigest()
            yield _File(path=f"{self._info}METADATA", content=data, original=original)
        yield _File(path=f"{self._info}INSTALLER", content=b"wheel-composer\n")

    def _scripts(self) -> Iterator[_File]:
        for one in entry_points(self._wheel):
            if one.group in ("console_scripts", "gui_scripts"):
                launcher = script_launcher(one.module, one.attribute)
                if not self._pruned(f"bin/{one.name}", len(launcher)):
                    yield _File(path=f"bin/{one.name}", mode=0o755, content=launcher)

    def _check_pth(self, files: Mapping[str, _File]) -> None:
        """A `.pth` file runs at every start, so the recipe must name its very bytes."""
        allowed = {rule.file: rule for rule in self._plan.pth}
        for member_path in self._wheel.pth_files:
            path = install_path(self._wheel, member_path, self._plan.python)
            if path not in files:
                continue
            name, digest = path.removeprefix(self._site), self._digest_of(self._wheel.members[member_path])
            rule = allowed.get(name)
            if rule is None or rule.sha256 != digest:
                raise RecipeError("a .pth file that the recipe does not allow", where=f"{self._plan.name}: {name}",
                                  why="it is executed at every start of the interpreter",
                                  fix=f"Read it, then prune it or list it under pth with sha256 {digest}.")  # fmt: skip
            self._note("pth", path, digest, rule.reason)

    def _bytecode(self, files: Mapping[str, _File]) -> Iterator[tuple[str, bytes]]:
        if self._plan.bytecode is None or self._tools.python is None:
            return
        sources = {
            file.path: self._bytes(file)
            for file in files.values()
            if file.path.startswith("lib/") and file.path.endswith(".py")
        }
        tag = f"cpython-{self._plan.python.replace('.', '')}"
        yield from compile_sources(self._tools.python, sources, tag).items()

    def _write_file(self, writer: LayerWriter, file: _File) -> None:
        edit = self._rpath.get(file.path)
        if isinstance(file.content, bytes):
            assert edit is None, f"{file.path}: edited as text and as an object"
            writer.data(file.path, file.content, mode=file.mode, original=file.original)
            return
        if edit or self._is_slimmed(file.path, file.content):
            with tempfile.TemporaryDirectory(dir=self._scratch) as work:
                if edited := self._edited(file, file.content, edit, Path(work)):
                    self._write_edited(writer, file, file.content, edited)
                    return
        self._write_member(writer, file, file.content)

    def _is_slimmed(self, path: str, member: Member) -> bool:
        if self._plan.slim is None or not self._plan.slim.covers(path):
            return False
        head = bytes(next(iter(stream(self._view, member, 64)), b""))
        return is_elf(head) and loose_cubin(self._view, member) is None  # who reads a cubin may compare its digest

    def _write_member(self, writer: LayerWriter, file: _File, member: Member) -> None:
        """As upstream shipped it; the writer's own digest is compared with RECORD's, so it is hashed once."""
        row = self._wheel.record[member.path]
        content: Iterable[Buffer]
        if row.sha256:
            content = stream(self._view, member, where=self._where(member))
        else:
            content = verified_stream(self._view, self._wheel, member)
        expected = row.sha256.hex() if row.sha256 else None
        writer.file(file.path, content, size=member.size, mode=file.mode, expected=expected)

    def _edited(self, file: _File, member: Member, edit: RpathEdit | None, work: Path) -> Path | None:
        """Inflate to scratch and edit there, slimming last; where the result is, None when it is upstream's file."""
        copy, smaller = work / "object", work / "smaller"
        # patchelf reads all of a file, slimming hardly more than what it keeps.
        self._inflate(member, copy, direct=edit is None)
        if edit:
            apply_rpath(copy, edit)
            self._note("rpath", file.path, ":".join(edit.rpath), "; ".join(edit.why))
        slim = self._plan.slim
        if slim is None or not slim.covers(file.path):
            return copy
        from composer.steps.slim import slim_object  # loads numpy, which most runs need not

        outcome = slim_object(copy, smaller, file.path, slim)
        if outcome.detail:
            self._note("slim", file.path, outcome.detail, slim.licence)
        if outcome.changed:
            return smaller
        return copy if edit else None

    def _inflate(self, member: Member, copy: Path, *, direct: bool) -> None:
        with host_errors(copy), copy.open("wb") as out, contextlib.ExitStack() as stack:
            pieces = verified_stream(self._view, self._wheel, member)
            if not direct:
                out.writelines(pieces)
                return
            writer = DirectWriter(out.fileno())
            stack.callback(writer.close)
            for piece in pieces:
                writer.write(piece)
            writer.finish()

    def _write_edited(self, writer: LayerWriter, file: _File, member: Member, edited: Path) -> None:
        with host_errors(edited), edited.open("rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(0)
            pieces = iter(functools.partial(handle.read, 1 << 20), b"")
            writer.file(file.path, pieces, size=size, mode=file.mode, original=self._digest_of(member))

    def _write_link(self, writer: LayerWriter, files: Mapping[str, _File], path: str, to: str) -> None:
        assert self._site + to in files, f"{to}: planned as the target of a link"
        assert self._site + path not in files, f"{path}: planned as a link"
        up = "../" * path.count("/")
        writer.link(self._site + path, up + to)

    def _bytes(self, file: _File) -> bytes:
        return self._read(file.content) if isinstance(file.content, Member) else file.content

    def _read(self, member: Member) -> bytes:
        data = read(self._view, member, where=self._where(member))
        row = self._wheel.record[member.path]
        if row.sha256 and hashlib.sha256(data).digest() != row.sha256:
            raise WheelError("content does not have the digest in RECORD", where=self._where(member))
        return data

    def _digest_of(self, member: Member) -> str:
        row = self._wheel.record[member.path]
        return row.sha256.hex() if row.sha256 else hashlib.sha256(self._read(member)).hexdigest()

    def _in_record(self, path: str) -> str:
        """RECORD's paths are relative to site-packages (PEP 376)."""
        return path.removeprefix(self._site) if path.startswith(self._site) else f"../../../{path}"

    def _where(self, member: Member) -> str:
        return f"{self._plan.filename}: {member.path}"

    def _note(self, kind: str, path: str, detail: str, reason: str) -> None:
        self._ledger.files.append(FileChange(kind=kind, path=path, detail=detail, reason=reason))

"""Prove that what the modules of a stack import is there: without running any, by their unconditional imports."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from packaging.utils import canonicalize_name

from composer.formats.python_imports import Import, SourceImports
from composer.formats.python_tree import PythonTree
from composer.model.finding import Finding
from composer.model.globs import matches

#: Distributions whose modules are not called as they are.
_DISTRIBUTIONS: Final[Mapping[str, str]] = {
    "PIL": "pillow", "attr": "attrs", "bs4": "beautifulsoup4", "cudnn": "nvidia-cudnn-frontend",
    "cutlass": "nvidia-cutlass-dsl", "cv2": "opencv-python", "dateutil": "python-dateutil", "decord": "decord2",
    "git": "gitpython", "google.protobuf": "protobuf", "grpc": "grpcio", "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection", "multipart": "python-multipart", "pynvml": "nvidia-ml-py",
    "quack": "quack-kernels", "skimage": "scikit-image", "sklearn": "scikit-learn", "tvm_ffi": "apache-tvm-ffi",
    "yaml": "pyyaml", "zmq": "pyzmq",
}  # fmt: skip
#: Modules that another one makes when it is imported: setuptools' hook has its own copy of what CPython 3.12 dropped.
_HOOKED: Final[Mapping[str, str]] = {"distutils": "_distutils_hack"}
_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What was left out of a stack on purpose, and why. pruned: by glob below site-packages; dropped: by distribution.

    dropped holds normalised names of distributions that are not in the stack.
    """

    dropped: Mapping[str, str]
    pruned: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """How a module came to be imported: by which module, on which line; the first has neither."""

    module: str
    by: _Step | None = None
    line: int = 0

    def chain(self) -> Iterator[_Step]:
        """From what the recipe names to this one."""
        if self.by:
            yield from self.by.chain()
        yield self


def distribution_of(module: str) -> str:
    """The normalised name that the distribution of a module most likely has."""
    top = module.partition(".")[0]
    two = ".".join(module.split(".")[:2])
    return str(canonicalize_name(_DISTRIBUTIONS.get(two) or _DISTRIBUTIONS.get(top) or top))


def check_modules(
    tree: PythonTree, imports_of: Callable[[str], SourceImports | None], roots: Sequence[str], left: Left
) -> tuple[Finding, ...]:
    """One error for each module that is imported, whatever happens, once one of `roots` is, and that is not there.

    imports_of: what the source at a path imports; None for a file that is no source. Only sources that are reached are
    asked for. A submodule that is not there is reported where a prune rule took it: others may be made at run time.
    """
    editors: set[str] = set()
    steps = list(_reached(tree, imports_of, roots, editors))
    return tuple(_finding(tree, step, left) for step in steps if _is_missing(tree, step, left, editors))


def check_programs(
    tree: PythonTree, imports_of: Callable[[str], SourceImports | None], programs: Mapping[str, str], left: Left
) -> tuple[Finding, ...]:
    """A warning for each program that can only end in an error: its module, or one that it imports, is not there.

    programs: the module of each one's entry point, by the program's path.
    """
    found = []
    for path, module in sorted(programs.items()):
        editors: set[str] = set()
        steps = list(_reached(tree, imports_of, [module], editors))
        missing = next((step for step in steps if _is_missing(tree, step, left, editors)), None)
        if missing is None and not tree.has(module):
            missing = _Step(module=module)
        if missing:
            chain = " > ".join(one.module for one in missing.chain())
            found.append(Finding(
                id="imports.program", severity="warning", subject=path,
                evidence=f"ends in an error: {missing.module} is not in the bundle: {chain}"
                         f"{_cause(missing.module, left)[0]}",
                fix=f"Prune {path} of its component, or add what it needs.",
            ))  # fmt: skip
    return tuple(found)


def check_losses(tree: PythonTree, imports: Mapping[str, SourceImports], left: Left) -> tuple[Finding, ...]:
    """What leaving out a distribution costs: a note for each that some source cannot be imported without.

    imports: of all sources of site-packages, by path; it does not matter whether `check_modules` reaches them.
    """
    users: dict[str, list[str]] = {}
    for path, source in imports.items():
        names = {one.module for one in source.imports if not one.level and not tree.has(one.module.partition(".")[0])}
        for name in {distribution_of(module) for module in names} & left.dropped.keys():
            users.setdefault(name, []).append(path)
    return tuple(
        Finding(
            id="imports.lost", severity="note", subject=paths[0],
            evidence=f"{_many(paths)} cannot be imported without {name}, left out: {left.dropped[name]}",
        )
        for name, paths in sorted(users.items())
    )  # fmt: skip


def _reached(
    tree: PythonTree, imports_of: Callable[[str], SourceImports | None], roots: Iterable[str], editors: set[str]
) -> Iterator[_Step]:
    """Every name that gets imported, once per name, nearest first; also those that are not there.

    editors: gets the top-level packages that change sys.path.
    """
    todo = deque(_Step(module=name) for root in roots for name in _with_parents(root))
    seen: set[str] = set()
    while todo:
        step = todo.popleft()
        if step.module in seen:
            continue
        seen.add(step.module)
        yield step
        path = tree.files.get(step.module, "")
        if "/site-packages/" not in path or not (source := imports_of(path)):
            continue
        if source.edits_path:
            editors.add(step.module.partition(".")[0])
        for one in source.imports:
            todo += (_Step(module=name, by=step, line=one.line) for name in _names(tree, step.module, one))


def _names(tree: PythonTree, importer: str, one: Import) -> Iterator[str]:
    """The modules that an import statement imports."""
    base = one.module
    if one.level:
        package = importer if tree.is_package(importer) else importer.rpartition(".")[0]
        parts = package.split(".")
        parts = parts[: len(parts) - one.level + 1]
        base = ".".join([*parts, *([one.module] if one.module else [])])
    yield from _with_parents(base)
    for name in one.names:
        inner = f"{base}.{name}"
        if inner in tree.files:
            yield inner


def _with_parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _is_missing(tree: PythonTree, step: _Step, left: Left, editors: Collection[str]) -> bool:
    if tree.has(step.module):
        return False
    parent = step.module.rpartition(".")[0]
    if not parent:
        return not (step.module in _HOOKED and tree.has(_HOOKED[step.module])) and not _is_inside(tree, step, editors)
    return tree.is_package(parent) and _pruned_by(step.module, left) is not None


def _is_inside(tree: PythonTree, step: _Step, editors: Collection[str]) -> bool:
    """Whether the importer's package puts folders of its own on sys.path, and has the module in one."""
    package = step.by.module.partition(".")[0] if step.by else ""
    if package not in editors:
        return False
    inside, name = f"/site-packages/{package}/", f"/{step.module}"
    # A namespace package has no file of its own.
    return any(inside in path and (path.endswith(f"{name}.py") or f"{name}/" in path) for path in tree.paths)


def _pruned_by(module: str, left: Left) -> str | None:
    path = module.replace(".", "/")
    for pattern in left.pruned:
        if matches(f"{path}.py", pattern) or matches(f"{path}/__init__.py", pattern):
            return pattern
    return None


def _finding(tree: PythonTree, step: _Step, left: Left) -> Finding:
    module = step.module
    chain = " > ".join(one.module for one in step.chain())
    importer = tree.files.get(step.by.module) if step.by else None
    where = f"{chain} (line {step.line} of {step.by.module})" if step.by else f"{chain}, which the recipe names"
    cause, fix = _cause(module, left)
    return Finding(
        id="imports.missing", severity="error", subject=importer or module,
        evidence=f"{module} is not in the bundle: {where}{cause}", fix=fix,
    )  # fmt: skip


def _cause(module: str, left: Left) -> tuple[str, str]:
    name = distribution_of(module)
    if name in left.dropped:
        return f"; {name} was left out: {left.dropped[name]}", f"Keep {name}, or patch the import."
    if pattern := _pruned_by(module, left):
        return f"; pruned by {pattern}: {left.pruned[pattern]}", "Narrow that prune rule."
    return "", f"Add the distribution that has {module} ({name}?), or patch the import."


def _many(paths: Sequence[str]) -> str:
    more = len(paths) - _SHOWN
    shown = ", ".join(path.partition("/site-packages/")[2] for path in paths[:_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown

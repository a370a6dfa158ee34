"""All proofs of a bundle that need its files alone, over facts that were gathered from a plan, a bundle or a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from composer.formats.python_imports import SourceImports
from composer.model.finding import Finding
from composer.model.manifest import Manifest
from composer.proofs.abi import check_loading
from composer.proofs.closure import dlopened
from composer.proofs.content import Composed, Content
from composer.proofs.coverage import check_coverage
from composer.proofs.files import check_machine
from composer.steps.resolve import marker_environment
from composer.steps.survey import ObjectFacts
from composer.steps.tree import tree_of


def prove_objects(manifest: Manifest, facts: Mapping[str, ObjectFacts]) -> Iterator[Finding]:
    """Libraries, symbols and GPU code. facts: of every object of the bundle, loose cubins too, by path."""
    python, tree = manifest.target["python"], tree_of(manifest, {path: one.elf for path, one in facts.items()})
    linkage = {path: one.linkage for path, one in facts.items()}
    yield from check_machine(tree.objects, manifest.target["machine"])
    yield from check_loading(tree, linkage, python, dlopened(manifest.dlopen, tree.objects))
    stubs = {one.path for layer in manifest.layers for one in layer.changes.files if one.kind == "stub"}
    yield from check_coverage(
        {path: one.gpu for path, one in facts.items()}, manifest.sms, manifest.coverage,
        site=f"lib/python{python}/site-packages/", stubs=stubs,
    )  # fmt: skip


def prove_content(manifest: Manifest, contents: Mapping[str, Content],
                  imports_of: Callable[[str], SourceImports | None] | None = None, *,
                  programs: Mapping[str, str] | None = None) -> tuple[Finding, ...]:  # fmt: skip
    """Requirements, imports, files and what is made on the host. contents: by the names of layers.

    imports_of: in place of the contents' imports, for who reads sources only when they are asked for. programs: the
    modules of entry points, by the paths of programs.
    """
    return Composed(
        layers=manifest.layers, contents=contents, sms=manifest.sms,
        environment=marker_environment(manifest.python, manifest.target["machine"]),
        roots=[check.module for check in manifest.checks], runtime=manifest.runtime, imports_of=imports_of,
        programs=programs or {},
    ).check()  # fmt: skip

"""Read from the wheels that are at hand which distribution of a bundle requires which."""

from __future__ import annotations

from collections.abc import Iterator

from composer.events import Listener
from composer.model.graph import DependencyGraph, dependency_graph
from composer.steps.artifact import artifact_path
from composer.steps.outline import Outline
from composer.steps.resolve import marker_environment
from composer.steps.source import find_built
from composer.steps.survey import WheelFile, survey_wheels
from composer.store import Store


def read_graph(outline: Outline, store: Store, *, jobs: int, listener: Listener) -> DependencyGraph:
    """The graph of a bundle. Nothing is downloaded or built: what is not at hand is not read.

    WheelError for a wheel that is unsound.
    """
    target, built = outline.target, outline.sourcing.builds
    versions = {one.name: one.version for one in outline.packages}
    versions |= {name: str(job.request.version) for name, job in built.items()}
    surveys = survey_wheels(store, dict(_at_hand(outline, store)), target.python, jobs=jobs, listener=listener)
    return dependency_graph(
        versions, {name: survey.requires for name, survey in surveys.items()}, edits=outline.requires_edits(),
        roots={one.name for one in outline.recipe.component if one.version},
        environment=marker_environment(target.python, target.machine),
    )  # fmt: skip


def _at_hand(outline: Outline, store: Store) -> Iterator[tuple[str, WheelFile]]:
    local = outline.local_files()
    for package in outline.packages:
        (artifact,) = package.artifacts
        stored = artifact_path(store.root, artifact)
        path = local[artifact.sha256].path if artifact.sha256 in local and not stored.is_file() else stored
        if path.is_file():
            yield package.name, WheelFile(path=path, sha256=artifact.sha256)
    for name, job in outline.sourcing.builds.items():
        if result := find_built(job):
            yield name, WheelFile(path=result.path, sha256=result.wheel.sha256)

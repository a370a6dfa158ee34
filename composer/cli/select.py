"""`compose select`: the bundle that fits a host best."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from composer._fs import host_errors
from composer.cli import render
from composer.errors import HostError, RecipeError
from composer.host.detect import MAX_BYTES, Host, parse_host, survey
from composer.host.index import write_index
from composer.host.override import Override, Stated, overridden, shown
from composer.host.remote import Offer, find_bundles
from composer.host.select import Selection, Verdict
from composer.host.select import select as select_bundles
from composer.model.target import parse_sms, sm_text
from composer.steps.load import load_targets


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What was found: where the bundles are, the host, and the verdicts."""

    offer: Offer
    host: Host
    overrides: Sequence[Override]
    selection: Selection

    @property
    def best(self) -> Verdict | None:
        return next(iter(self.selection.fitting), None)


@click.command("select")
@click.argument("place", default=".", metavar="[FOLDER|INDEX|BUNDLE|oci://...]")
@click.option("--host", "described", metavar="FILE",
              help="Choose for the host that `compose-detect --json` described; `-` reads standard input.")  # fmt: skip
@click.option("--sm", help="The host's GPUs, in place of those found: 90, or 90,80.")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="The same by name: H100, 'RTX 4090'; repeatable.")
@click.option("--isa", help="The host's CPU, in place of the one found: avx2, avx512, ...")
@click.option("--recipe", metavar="NAME", help="Only bundles of this recipe, where a place has several.")
@click.option("--path", "path_only", is_flag=True, help="Print only the path or URL, for scripts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--write-index", "indexing", is_flag=True,
              help="Choose nothing: write FOLDER/index.json, from which others can choose.")  # fmt: skip
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def select(*, place: str, described: str | None, sm: str | None, gpus: tuple[str, ...], isa: str | None,
           recipe: str | None, path_only: bool, as_json: bool, indexing: bool,
           debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Choose the bundle that fits this host best, and say why the others do not.

    PLACE is a folder of bundles (default: this one), an index made by --write-index (a path or a URL), a bundle, or a
    repository that bundles were pushed to.
    Exit status: 0 when there is one, 10 when none fits.

    CONDA_OVERRIDE_CUDA, CONDA_OVERRIDE_CUDA_ARCH, CONDA_OVERRIDE_GLIBC, NV_VARIANT_PROVIDER_FORCE_CUDA_DRIVER_VERSION
    and NV_VARIANT_PROVIDER_FORCE_SM_ARCH stand in for what is found; options for them.
    """
    if indexing:
        path, index = write_index(Path(place))
        click.echo(f"{path}: {render.counted(len(index.bundles), 'bundle')}")
        return
    stated = Stated(sms=_sms(sm), gpus=gpus, isa=isa)
    host, overrides = overridden(_host(described), stated, os.environ, load_targets())
    offer = find_bundles(place)
    bundles = [one for one in offer.bundles if recipe in (None, one.recipe)]
    answer = _Answer(offer=offer, host=host, overrides=overrides, selection=select_bundles(bundles, host))
    _require_one_recipe(answer.selection, place)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(_data(answer))).decode())
    elif path_only and answer.best:
        click.echo(offer.location(answer.best.bundle))
    else:
        for line in _lines(answer):
            click.echo(line, err=path_only)
    if not answer.best:
        raise _none(answer, place)


def _sms(text: str | None) -> tuple[int, ...]:
    found = parse_sms(text, load_targets()) if text is not None else ()
    if text is not None and not found:
        raise RecipeError("a host has GPUs of certain architectures, not all", where="--sm", fix="Name them: 90,80.")
    return found


def _host(described: str | None) -> Host:
    if described is None:
        return parse_host(survey(), "this host")
    with host_errors(Path(described)), click.open_file(described, "rb") as stream:
        return parse_host(stream.read(MAX_BYTES + 1), described)


def _require_one_recipe(selection: Selection, place: str) -> None:
    if len(selection.recipes) > 1:
        raise RecipeError("bundles of several recipes fit", where=place, why=", ".join(selection.recipes),
                          fix=f"Choose one: --recipe {selection.recipes[0]}.")  # fmt: skip


def _none(answer: _Answer, place: str) -> HostError:
    count = len(answer.selection.refused) + len(answer.offer.damaged)
    if not count:
        return HostError("no bundles here", where=place, fix="Name a folder of NAME.tar.zst files, or an index.")
    return HostError(f"none of {render.counted(count, 'bundle')} fits this host", where=place,
                     fix="See the reasons above; `compose build --sm SM --isa ISA` builds one that does.")  # fmt: skip


def _lines(answer: _Answer) -> Iterator[str]:
    yield from (f"taken as stated: {line}" for line in shown(answer.overrides))
    best, *others = answer.selection.fitting or (None,)
    if best:
        yield f"selected: {answer.offer.location(best.bundle)}"
        yield from (f"  {line}" for line in _facts(best))
    if others:
        yield "would run, too, best first:"
        yield from (f"  {one.bundle.name}: {_summary(one)}" for one in others if one)
    for one in answer.selection.refused:
        yield f"refused: {one.bundle.name}"
        for reason in one.reasons:
            yield f"  {reason.what}"
            yield from (f"    {label}: {text}" for label, text in (("why", reason.why), ("fix", reason.fix)) if text)
    for broken in answer.offer.damaged:
        yield f"refused: {broken.file!r}"
        yield f"  {broken.why}"


def _facts(one: Verdict) -> Iterator[str]:
    yield _summary(one)
    if one.bundle.sha256:
        yield f"sha256 {one.bundle.sha256}"
    for gpu in one.left_out:
        yield f"leaves out GPU {gpu.index}: {gpu.kind}, for which it has no code"
    if one.visible_devices:
        yield f"so run it with {one.visible_devices}"


def _summary(one: Verdict) -> str:
    bundle, target = one.bundle, one.bundle.target
    sm = "native" if one.native else "compatible"
    isa = "" if one.isa else " (which this CPU lacks; code is chosen at run time)"
    words = [f"{bundle.recipe} {bundle.version}", f"CUDA {target.cuda}"]
    words += [f"{sm_text(target.sm.split())}: {sm} on {render.counted(len(one.uses), 'GPU')}"] if one.uses else []
    return ", ".join([*words, f"ISA {target.isa}{isa}", render.size(bundle.size)])


def _data(answer: _Answer) -> dict[str, Any]:
    best = answer.best
    return {
        "selected": _verdict(answer, best) if best else None,
        "others": [_verdict(answer, one) for one in answer.selection.fitting[1:]],
        "refused": [*(_verdict(answer, one) for one in answer.selection.refused),
                    *({"file": one.file, "reasons": [{"what": one.why}]} for one in answer.offer.damaged)],
        "overrides": [asdict(one) for one in answer.overrides],
        "host": answer.host,
    }  # fmt: skip


def _verdict(answer: _Answer, one: Verdict) -> dict[str, Any]:
    facts = {
        "location": answer.offer.location(one.bundle), **msgspec.structs.asdict(one.bundle),
        "reasons": [asdict(reason) for reason in one.reasons],
    }  # fmt: skip
    if one.reasons:
        return facts
    return facts | {"uses": one.uses, "left_out": one.left_out, "native": one.native, "isa_native": one.isa,
                    "visible_devices": one.visible_devices}  # fmt: skip

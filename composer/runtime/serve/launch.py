"""From settings to a server that is ready to be started: its command and its environment."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..finding import Finding, error
from ..model.place import Place
from . import env_file, options
from .options import DEFAULT_MODEL, EXTRA, PASSED, PROFILE, Flag
from .preflight import gpu_findings
from .report import GPU, USAGE, Refusal
from .resolve import Resolved, located, recalled, resolve

#: Flags that name a further repository, which may be in the bundle or the cache as well.
_REPOSITORIES = ("--tokenizer-path", "--speculative-draft-model-path", "--speculative-draft-model")
_GPU_CHECK = "WHEEL_COMPOSER_GPU_CHECK"
_NO_PROFILE: dict[str, Any] = {"kind": "fragment", "model": None, "flags": [], "env": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A server's words and environment, its model, address and port, and what the user should know."""

    command: list[str]
    environ: dict[str, str]
    model: Resolved
    host: str
    port: int
    findings: list[Finding]


def planned(place: Place, *, profile: str = "", passed: Sequence[str] = (), starting: bool = False) -> Launch:
    """The server that the environment, a profile and words for sglang ask for.

    Reads the model's folder, and asks for the host's GPUs where they matter; starts nothing. Raises Refusal, also for a
    host without a GPU if the server is `starting`, unless WHEEL_COMPOSER_GPU_CHECK is off.
    """
    settings = _profile(profile, place.prefix) if profile else _NO_PROFILE
    flags, findings = _flags(place.environ, profile, settings, passed)
    model, others = _model(flags, place)
    flags = _completed(flags, model, place)
    absent = "" if place.environ.get(_GPU_CHECK) == "off" else "error" if starting else "warning"
    seen = gpu_findings(flags, model.asked, place.environ.get("CUDA_VISIBLE_DEVICES"), settings.get("sm", ()),
                        absent=absent)  # fmt: skip
    faults = [one for one in seen if one["severity"] == "error"]
    if faults:
        raise Refusal(GPU, *faults)
    words = [word for flag in flags.values() for word in flag.words]
    return Launch(command=[str(place.prefix / "bin" / "python3"), "-m", "sglang.launch_server", *words],
                  environ=_environment(place.environ, settings["env"], flags, model), model=model,
                  host=flags["--host"].value, port=int(flags["--port"].value),
                  findings=[*findings, *others, *model.findings, *seen])  # fmt: skip


def _profile(name: str, prefix: Path) -> dict[str, Any]:
    from . import profiles

    try:
        found = profiles.profile(name, str(prefix))
    except profiles.ProfileError as fault:
        raise Refusal(USAGE, error("serve.profile", name, str(fault))) from None
    if found["kind"] == "tool":
        raise Refusal(USAGE, error("serve.profile", name, f"runs {found['module']}, which is no server"))
    return found


def _flags(
    environ: Mapping[str, str], profile: str, settings: Mapping[str, Any], passed: Sequence[str]
) -> tuple[dict[str, Flag], list[Finding]]:
    """The flags by name, in the command's order. Raises Refusal with the faults of all sources."""
    source = f"{PROFILE} {profile}"
    model = ["--model-path", settings["model"]] if settings["model"] else []
    sources = (
        options.from_words([*model, *settings["flags"]], source),
        options.from_variables(environ),
        options.from_text(environ.get(EXTRA, "")),
        options.from_words(passed, PASSED),
    )
    findings = [one for _, found in sources for one in found]
    faults = [one for one in findings if one["severity"] == "error"]
    if faults:
        raise Refusal(USAGE, *faults)
    defaults = options.defaults(_default_model(environ), sampling=settings["kind"] == "fragment")
    flags, overrides = options.merge([defaults, *(layer for layer, _ in sources)])
    return flags, [*findings, *overrides]


def _default_model(environ: Mapping[str, str]) -> str:
    """The model where none is named: that of the file which SGLANG_MODEL_ENV_FILE names, or the default."""
    path = environ.get("SGLANG_MODEL_ENV_FILE")
    if not path or environ.get("SGLANG_MODEL"):
        return DEFAULT_MODEL
    values, findings = env_file.read(Path(path))
    if not env_file.about(values):
        fix = "Set SGLANG_MODEL, or run sglang-resolve-model first."
        raise Refusal(USAGE, *findings, error("serve.env-file", path, "names no model", fix))
    return env_file.about(values)


def _model(flags: Mapping[str, Flag], place: Place) -> tuple[Resolved, list[Finding]]:
    """The model as resolved before, if that holds, or now."""
    asked = flags["--model-path"].value
    revision = flags["--revision"].value if "--revision" in flags else ""
    told = [shlex.join((name, *flag.values)) if name == "--load-format" else name for name, flag in flags.items()]
    known, findings = (None, []) if revision else recalled(asked, place, told)
    return known or resolve(asked, place, revision=revision, flags=told), findings


def _completed(flags: Mapping[str, Flag], model: Resolved, place: Place) -> dict[str, Flag]:
    """With the model's folder, a name to serve it by, and the folders of further repositories that are here."""
    served = model.asked if model.source == "bundle" else "default"
    name = "--served-model-name"
    found = {name: Flag(name=name, values=(served,)), **flags}
    found["--model-path"] = replace(flags["--model-path"], values=(model.path,))
    for name in _REPOSITORIES:
        folder = located(flags[name].value, place) if name in flags else ""
        if folder:
            found[name] = replace(flags[name], values=(folder,))
    return options.ordered(found)


def _environment(
    given: Mapping[str, str], wanted: Mapping[str, str], flags: Mapping[str, Flag], model: Resolved
) -> dict[str, str]:
    """This process's environment without our own variables, and with what the profile wants."""
    environ = {**wanted, **{name: value for name, value in given.items() if name not in options.VARIABLES}}
    # `-m` puts the current folder before the bundle's modules.
    environ.setdefault("PYTHONSAFEPATH", "1")
    if model.local and not _asks_hub(flags):
        environ.setdefault("HF_HUB_OFFLINE", "1")
    # Often advised against failing downloads, but of no effect on Xet; what has one is set with it.
    if environ.get("HF_HUB_ENABLE_HF_TRANSFER", "1").lower() in ("0", "false", "no", "off"):
        environ.setdefault("HF_HUB_DISABLE_XET", "1")
    return environ


def _asks_hub(flags: Mapping[str, Flag]) -> bool:
    """Whether a further repository has to come from the network."""
    values = [flags[name].value for name in _REPOSITORIES if name in flags]
    if "--lora-paths" in flags:  # NAME=PATH or PATH
        values += [value.rpartition("=")[2] for value in flags["--lora-paths"].values]
    return any(not os.path.exists(value) for value in values)  # noqa: PTH110  # takes any text

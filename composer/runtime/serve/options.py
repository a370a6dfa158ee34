"""From variables, a profile and command-line words to the flags of `sglang.launch_server`, each of them once.

Nothing here touches the disk or the environment of the process.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..finding import Finding, error, finding, warning

DEFAULT_MODEL = "microsoft/Phi-4-mini-instruct-FP8-TORCHAO"
DEFAULT_SAMPLING = '{"max_new_tokens":512,"frequency_penalty":0.5,"presence_penalty":0.3}'
DEFAULT_HOST, DEFAULT_PORT = "0.0.0.0", "30000"  # noqa: S104

#: The flags that a server always or by a variable of its own gets, in their order, and their other names; `--tp` is
#: what many write, and one that argparse takes for `--tp-size`.
MANAGED: dict[str, tuple[str, ...]] = {
    "--model-path": ("--model",), "--host": (), "--port": (), "--served-model-name": (), "--attention-backend": (),
    "--disable-cuda-graph": (), "--dtype": (), "--tp-size": ("--tensor-parallel-size", "--tp"),
    "--preferred-sampling-params": (),
}  # fmt: skip
_NAMES = {alias: name for name, aliases in MANAGED.items() for alias in (name, *aliases)}
#: The variables that these programs read. None is left to the server: of SGLANG_PORT, sglang 0.5.9 would take ports
#: for itself, the first of which is the one it is to serve on (sglang/srt/utils/common.py, get_open_port).
VARIABLES = (
    "SGLANG_MODEL", "SGLANG_HOST", "SGLANG_PORT", "SGLANG_SERVED_NAME", "SGLANG_ATTENTION_BACKEND",
    "SGLANG_DISABLE_CUDA_GRAPH", "SGLANG_DTYPE", "SGLANG_TP_SIZE", "SGLANG_PREFERRED_SAMPLING_PARAMS",
    "SGLANG_EXTRA_ARGS", "SGLANG_PREFLIGHT", "SGLANG_MODEL_ENV_FILE", "SGLANG_BUNDLED_FROM",
)  # fmt: skip
DEFAULT, PROFILE, EXTRA, PASSED = "default", "profile", "SGLANG_EXTRA_ARGS", "--"

_TRUE, _FALSE = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")
_YES_NO = "Use 1, true, yes, on or 0, false, no, off."
_NUMBER = re.compile(r"[0-9]{1,9}\Z", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NEGATIVE = re.compile(r"-[0-9.]")
_JSON_AHEAD = re.compile(r"(?:--[A-Za-z0-9-]+=)?(?=[{\[])")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A flag with its values, and who gave it. One that is not `on` takes the same flag of a weaker source away."""

    name: str
    values: tuple[str, ...] = ()
    source: str = DEFAULT
    on: bool = True

    @property
    def words(self) -> list[str]:
        """As argparse has to be told: a value that looks like a flag is joined to it."""
        if len(self.values) == 1 and self.values[0].startswith("-"):
            return [f"{self.name}={self.values[0]}"]
        return [self.name, *self.values]

    @property
    def value(self) -> str:
        """The first value; nothing if there is none."""
        return self.values[0] if self.values else ""


#: What a source asks for, and what is wrong with it or odd about it.
Read = tuple[list[Flag], list[Finding]]


def truth(value: str) -> bool | None:
    """Whether a variable's value says yes; None if it is neither a yes nor a no."""
    word = value.strip().lower()
    return word in _TRUE if word in _TRUE + _FALSE else None


def from_variables(environ: Mapping[str, str]) -> Read:
    """The flags that variables ask for; an empty variable is one that is not set."""
    flags, findings = [], []
    for name, variable, check in _SETTINGS:
        value = environ.get(variable, "")
        fault = check(value) if value else ""
        if variable == "SGLANG_PORT" and "://" in value:
            findings.append(_service_link(value))
        elif fault:
            findings.append(error("serve.variable", variable, f"{value!r} {fault}"))
        elif value:
            flags.append(Flag(name=name, values=(value,), source=variable))
    for variable in ("SGLANG_DISABLE_CUDA_GRAPH", "SGLANG_PREFLIGHT"):
        value = environ.get(variable, "")
        yes = truth(value)
        if yes is None:
            findings.append(error("serve.variable", variable, f"{value!r} is neither yes nor no", _YES_NO))
        elif value and variable == "SGLANG_DISABLE_CUDA_GRAPH":
            flags.append(Flag(name="--disable-cuda-graph", source=variable, on=yes))
    return flags, findings


def _service_link(value: str) -> Finding:
    return warning("serve.service-link", "SGLANG_PORT",
                   f"{value!r} is what Kubernetes sets for a Service named sglang, no port to listen on: ignored",
                   "Set enableServiceLinks: false in the pod, or SGLANG_PORT to a number.")  # fmt: skip


def _any(value: str) -> str:
    return "holds a control character" if _CONTROL.search(value) else ""


def _model(value: str) -> str:
    return "looks like a flag" if value.startswith("-") else _any(value)


def _port(value: str) -> str:
    return "" if _NUMBER.match(value) and 0 < int(value) < 65536 else "is no port: a number from 1 to 65535"


def _size(value: str) -> str:
    return "" if _NUMBER.match(value) and int(value) > 0 else "is no number of GPUs: 1 or more"


def _sampling(value: str) -> str:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as fault:
        return f"is no JSON: {fault}"
    return "" if isinstance(found, dict) else "is no JSON object"


_SETTINGS = (
    ("--model-path", "SGLANG_MODEL", _model), ("--host", "SGLANG_HOST", _any), ("--port", "SGLANG_PORT", _port),
    ("--served-model-name", "SGLANG_SERVED_NAME", _any), ("--attention-backend", "SGLANG_ATTENTION_BACKEND", _any),
    ("--dtype", "SGLANG_DTYPE", _any), ("--tp-size", "SGLANG_TP_SIZE", _size),
    ("--preferred-sampling-params", "SGLANG_PREFERRED_SAMPLING_PARAMS", _sampling),
)  # fmt: skip


def defaults(model: str, *, sampling: bool) -> list[Flag]:
    """What a server is given if nothing else is said; a profile that is a whole command goes without `sampling`."""
    values = {"--model-path": model, "--host": DEFAULT_HOST, "--port": DEFAULT_PORT}
    if sampling:
        values["--preferred-sampling-params"] = DEFAULT_SAMPLING
    return [Flag(name=name, values=(value,)) for name, value in values.items()]


def from_text(text: str) -> Read:
    """The flags in SGLANG_EXTRA_ARGS."""
    try:
        return from_words(split(text), EXTRA)
    except ValueError as fault:
        return [], [error("serve.variable", EXTRA, f"cannot be split: {fault}", "Quote as in a shell.")]


def split(text: str) -> list[str]:
    """Words: quotes as in a shell, JSON whole with or without them, nothing expanded. ValueError for an open quote."""
    stream = io.StringIO(text)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words, at = [], 0
    while at < len(text):
        if text[at] in lexer.whitespace:
            at += 1
            continue
        stream.seek(at)
        word, at = _json_word(text, at) or (lexer.get_token() or "", stream.tell())
        words.append(word)
    return words


def _json_word(text: str, start: int) -> tuple[str, int] | None:
    """An object or array, alone or behind `--flag=`, and where it ends; None if there is something else."""
    ahead = _JSON_AHEAD.match(text, start)
    if not ahead:
        return None
    try:
        _, end = _DECODER.raw_decode(text, ahead.end())
    except (ValueError, RecursionError):
        return None
    return (text[start:end], end) if text[end : end + 1].strip() == "" else None


def from_words(words: Sequence[str], source: str) -> Read:
    """Flags with their values, under the names that MANAGED has for them.

    The server takes no positional arguments, so a word that is no flag is a value of the flag before it.
    """
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word == "--":  # of who put two of them ahead of the flags: argparse would take those for words
            continue
        if word.startswith("-") and not _NEGATIVE.match(word):
            name, equals, value = word.partition("=")
            found.append((_NAMES.get(name, name), [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            return [], [error("serve.flag", source, f"{word!r} stands before any flag")]
    flags = [Flag(name=name, values=tuple(values), source=source) for name, values in found]
    return flags, [fault for flag in flags for fault in _faults(flag)]


def _faults(flag: Flag) -> Iterator[Finding]:
    long = [name for name in _NAMES if name.startswith(flag.name) and flag.name not in _NAMES]
    if long:
        yield warning("serve.flag", flag.source, f"{flag.name} may be read as {' or '.join(long)}", "Spell it out.")
    for name, _, check in _SETTINGS:
        if name != flag.name:
            continue
        fault = check(flag.value) if len(flag.values) == 1 else "takes one value"
        if fault:
            yield error("serve.flag", flag.source, f"{shlex.join(flag.words)}: {fault}")


def merge(layers: Iterable[Sequence[Flag]]) -> tuple[dict[str, Flag], list[Finding]]:
    """The flags by name in the order of the command, and what was overridden. Later ones win, in a layer, too.

    To override a default needs no word and a profile's value a note; to say two things oneself is a warning.
    """
    chosen: dict[str, Flag] = {}
    findings = []
    for flag in (flag for layer in layers for flag in layer):
        before = chosen.pop(flag.name, None)
        if before and before.source != DEFAULT and (before.values, before.on) != (flag.values, flag.on):
            findings.append(_overridden(before, flag))
        chosen[flag.name] = flag
    return ordered({name: flag for name, flag in chosen.items() if flag.on}), findings


def ordered(flags: Mapping[str, Flag]) -> dict[str, Flag]:
    """The same flags, those of MANAGED first and in its order."""
    return {name: flags[name] for name in dict.fromkeys([*MANAGED, *flags]) if name in flags}


def _overridden(before: Flag, flag: Flag) -> Finding:
    def told(one: Flag) -> str:
        return f"{shlex.join(one.words) if one.on else 'nothing'} ({one.source})"

    severity = "note" if before.source.startswith(PROFILE) else "warning"
    return finding(severity, "serve.override", flag.name, f"{told(flag)} takes the place of {told(before)}",
                   None if severity == "note" else "Say it once.")  # fmt: skip

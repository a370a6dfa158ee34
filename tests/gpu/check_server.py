"""Start a bundle's SGLang server on a host that has no compiler on PATH, ask it everything, stop it.

    python3 tests/gpu/check_server.py BUNDLE MODEL [--port N] [--tp N] [--log FILE] [--path PATH] [--module]
                                      [--answers FILE] [--only-start] [-- SERVER OPTIONS ...]

Standard library only. Prints one JSON line per check: {"check", "ok", "seconds", ...}; exit status 1 if one failed.
The server is bin/sglang-serve, or with --module `python -m sglang.launch_server`, in an environment of its own: an
empty folder as PATH, no CUDA_HOME, no CC. --answers: what it says at temperature 0 must be what FILE holds from
another run; the first one writes it.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

START_LIMIT = 300.0
KEPT = ("HOME", "USER", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "WHEEL_COMPOSER_CACHE", "XDG_CACHE_HOME")
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["answer", "count"],
    "additionalProperties": False,
}
# What a host without a toolchain would log if something still tried to compile.
COMPILING = re.compile(
    r"ninja|nvcc|C compiler|Failed to load JIT|not compiled ahead|build\.ninja|\bg\+\+", re.IGNORECASE
)
# What SGLang says of a kernel that sglang-jit-cache holds.
AHEAD = re.compile(r"JIT module (\S+) was compiled ahead of time")


class Server:
    def __init__(self, options):
        self.base = f"http://127.0.0.1:{options.port}"
        self.log = Path(options.log)
        self.empty = tempfile.TemporaryDirectory()
        self.answers = Path(options.answers) if options.answers else None
        env = {name: os.environ[name] for name in KEPT if name in os.environ}
        env |= {"PATH": options.path or self.empty.name, "HF_HUB_OFFLINE": "1"}
        programs = Path(options.bundle).resolve() / "bin"
        place = {"model": options.model, "host": "127.0.0.1", "port": str(options.port), "tp-size": str(options.tp)}
        flags = ["--constrained-json-disable-any-whitespace", *options.rest]
        if options.module:
            flags += [f"--{'model-path' if name == 'model' else name}={value}" for name, value in place.items()]
            command = [programs / "python", "-m", "sglang.launch_server", *flags]
        else:
            env |= {f"SGLANG_{name.upper().replace('-', '_')}": value for name, value in place.items()}
            env |= {"SGLANG_PREFLIGHT": "1", "SGLANG_EXTRA_ARGS": shlex.join(flags)}
            command = [programs / "sglang-serve"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def ask(self, path, body=None, timeout=60):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=timeout)

    def answer(self, path, body=None):
        with self.ask(path, body) as reply:
            return json.load(reply)

    def stop(self):
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(20)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.empty.cleanup()


def health(server):
    start = time.monotonic()
    while time.monotonic() - start < START_LIMIT:
        assert server.process.poll() is None, f"the server ended with status {server.process.returncode}"
        try:
            with server.ask("/health", timeout=5) as reply:
                return {"start_seconds": round(time.monotonic() - start, 1), "status": reply.status}
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"no answer within {START_LIMIT:g} s")


def models(server):
    names = [model["id"] for model in server.answer("/v1/models")["data"]]
    assert names
    path = server.answer("/get_model_info")["model_path"]
    assert Path(path).is_dir(), path
    return {"models": names, "path": path}


def answers(server):
    """Greedy, and without penalties, which depend on what is computed together."""
    plain = {"model": "default", "temperature": 0, "max_tokens": 24, "frequency_penalty": 0, "presence_penalty": 0}
    turn = {"messages": [{"role": "user", "content": "Tell me more."}]}
    chat = server.answer("/v1/chat/completions", plain | turn)["choices"][0]["message"]["content"]
    text = server.answer("/v1/completions", plain | {"prompt": "It was"})["choices"][0]["text"]
    assert chat, "an empty answer"
    assert text, "an empty answer"
    found = json.dumps([chat, text])
    if server.answers is None or not server.answers.exists():
        if server.answers:
            server.answers.write_text(found)
        return {"texts": [chat, text]}
    assert server.answers.read_text() == found, f"{found}, and before {server.answers.read_text()}"
    return {"equal": True}


def generate(server):
    body = {"text": "Once upon a time", "sampling_params": {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}}
    texts, spent = [], []
    for _ in range(3):
        start = time.perf_counter()
        reply = server.answer("/generate", body)
        spent.append(time.perf_counter() - start)
        assert reply["meta_info"]["completion_tokens"] == 16, reply
        texts.append(reply["text"])
    assert len(set(texts)) == 1, "greedy decoding gave different texts"
    return {"milliseconds": round(min(spent) * 1000, 1)}


def chat_with_schema(server):
    body = {
        "model": "default", "messages": [{"role": "user", "content": "Well?"}], "max_tokens": 64,
        "response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA}},
    }  # fmt: skip
    text = server.answer("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    found = json.loads(text)
    assert set(found) == {"answer", "count"}, text
    assert found["answer"] in ("yes", "no"), text
    assert found["count"] in range(10), text
    return {"text": text}


def stream(server):
    body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "stream": True,
            "ignore_eos": True, "temperature": 0}  # fmt: skip
    start, events, first = time.perf_counter(), [], None
    with server.ask("/v1/chat/completions", body) as reply:
        for line in reply:
            if line.startswith(b"data: "):
                first = first or time.perf_counter() - start
                events.append(line.removeprefix(b"data: ").strip())
    assert events[-1] == b"[DONE]", events[-1]
    # Random weights make bytes that are no text alone, which are sent together.
    assert len(events) > 3, len(events)
    return {"events": len(events), "first_event_ms": round(first * 1000, 1)}


def together(server):
    def one(number):
        parameters = {"temperature": 0.8, "max_new_tokens": 64, "ignore_eos": True}
        body = {"text": f"Request {number}: " + "word " * (number % 7), "sampling_params": parameters}
        return server.answer("/generate", body)["meta_info"]["completion_tokens"]

    start = time.perf_counter()
    with ThreadPoolExecutor(32) as pool:
        tokens = sum(pool.map(one, range(64)))
    assert tokens == 64 * 64, tokens
    return {"tokens_per_second": round(tokens / (time.perf_counter() - start))}


def nothing_compiled(server):
    text = server.log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if COMPILING.search(line)]
    assert not lines, lines[:5]
    return {"ahead": sorted(set(AHEAD.findall(text)))}


def run(check, server):
    start = time.perf_counter()
    try:
        detail = {"ok": True, **check(server)}
    except Exception as fault:  # a check reports whatever goes wrong in it
        detail = {"ok": False, "fault": f"{type(fault).__name__}: {fault}"[:2000]}
    print(json.dumps({"check": check.__name__, "seconds": round(time.perf_counter() - start, 2), **detail}), flush=True)
    return detail["ok"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--log", default="server.log")
    parser.add_argument("--answers")
    parser.add_argument("--module", action="store_true")
    parser.add_argument("--only-start", action="store_true", help="how long until it is healthy, and nothing else")
    parser.add_argument("--path", help="PATH of the server, where an empty folder will not do")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    options.rest = words[end + 1 :]
    return options


def main():
    options = arguments()
    server = Server(options)
    after = (models, generate, answers, chat_with_schema, stream, together, nothing_compiled)
    try:
        good = run(health, server)
        results = [good, *(run(check, server) for check in after if good and not options.only_start)]
    finally:
        server.stop()
    if not all(results):
        print(server.log.read_text(errors="replace")[-4000:], file=sys.stderr)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Gathering what rules ask about, and the advice that comes of it, for a small bundle on disk."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from composer.cli.check import check
from composer.cli.profile import profile
from composer.errors import RecipeError, VerifyError
from composer.model.layer import Entry, Layer
from composer.model.manifest import MANIFEST_PATH, Check, Floor, Manifest
from composer.steps.advise import (
    Command,
    Request,
    advise,
    load_rules,
    open_for,
    parse_given,
    read_host,
    split_command,
)
from composer.steps.facts import here_values, host_values, launch_values, manifest_values, model_folder_values
from composer.steps.load import load_targets
from composer.steps.stack import Stack

BOOK = load_rules()
SITE = "lib/python3.12/site-packages"
SERVER_ARGS = """
class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model-path", "--model", type=str, required=True)
        parser.add_argument("--tensor-parallel-size", "--tp-size", type=int)
        parser.add_argument("--pp-size", type=int)
        parser.add_argument("--pp-depth", type=int)
        parser.add_argument("--host", type=str)
        parser.add_argument("--port", type=int)
        parser.add_argument("--dtype", type=str, choices=["auto", "half"])
        parser.add_argument("--attention-backend", type=str)
"""
FILES = {
    "sglang": {
        f"{SITE}/sglang/__init__.py": b"",
        f"{SITE}/sglang/launch_server.py": b"from sglang.srt.server_args import ServerArgs\nServerArgs.add_cli_args(p)",
        f"{SITE}/sglang/srt/server_args.py": SERVER_ARGS.encode(),
        f"{SITE}/sglang/srt/layers/quantization/__init__.py": b"QUANTIZATION_METHODS = {'fp8': 1}\n",
        f"{SITE}/sglang/srt/environ.py": b"class Envs:\n    SGLANG_ENABLE_SPEC_V2 = EnvBool(False)\n"
                                         b'if key.startswith("SGL_"):\n    pass\n',
        f"{SITE}/sglang/srt/common.py": b"import os\nos.environ['SGLANG_PORT']  # SGLANG_OLD\n",
    },
    "safetensors": {
        f"{SITE}/safetensors/__init__.py": b"import os\n# SAFETENSORS_FAST_GPU was here\nos.getenv('SAFETENSORS_X')\n",
    },
    "nvidia-nccl-cu12": {
        f"{SITE}/nvidia/nccl/lib/libnccl.so.2": b"\x7fELF" + b"\0" * (4 << 20) + b"\0NCCL_P2P_LEVEL\0XNCCL_P2P_NET\0",
        f"{SITE}/nvidia/nccl/README.md": b"NCCL_READ_ME",
    },
    "nvidia-cudnn-cu12": {}, "torch": {},
}  # fmt: skip
VERSIONS = {"sglang": "0.5.9", "nvidia-cudnn-cu12": "9.10.2.21", "torch": "2.9.1"}
TARGET = {"sm": "90", "isa": "avx512", "cuda": "12.8", "python": "3.12", "machine": "x86_64"}
GPU = {"index": 0, "uuid": "GPU-1", "name": "NVIDIA H200", "sm": 90, "memory_bytes": 141 << 30}
HOST = {
    "schema": 1, "machine": "x86_64", "glibc": "2.36", "cpu": {"features": ["avx2", "fma"]},
    "driver": {"version": "580.1", "cuda": "13.0"}, "gpus": [GPU, GPU | {"index": 1, "uuid": "GPU-2"}], "l4t": None,
    "memory": {"total_bytes": 256 << 30}, "shm": {"size_bytes": 16 << 30}, "numa_nodes": 1,
    "limits": {"memlock_bytes": None, "stack_bytes": 8 << 20},
}  # fmt: skip


def layer(name):
    entries = [Entry(path=path, size=len(data)) for path, data in FILES[name].items()]
    return Layer(name=name, version=VERSIONS.get(name, "1.0"), parts=(), entries=entries)


MANIFEST = Manifest(
    name="small", fingerprint="f" * 64, composer="0", recipe={"name": "sglang", "version": "0.5.9"}, lock="",
    target=TARGET, python="3.12.1", interpreter="host", torch="", serve=None,
    floors={"glibc": Floor(version="2.28", because="x")}, checks=[Check(module="sglang", needs_driver=False)],
    left_out=(), warnings=(), layers=[layer(name) for name in FILES],
)  # fmt: skip


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a bundle")
    for files in FILES.values():
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    (folder / MANIFEST_PATH).parent.mkdir(parents=True)
    (folder / MANIFEST_PATH).write_bytes(msgspec.json.encode(MANIFEST))
    return folder


def verdicts(request):
    return {one.rule.id: one.verdict for one in advise(BOOK, request).outcomes}


def test_who_reads_a_variable(prefix):
    names = ["SGLANG_PORT", "SGLANG_OLD", "SGL_PORT", "SGL_OLD", "SAFETENSORS_FAST_GPU", "SAFETENSORS_X",
             "NCCL_P2P_LEVEL", "NCCL_P2P_NET", "NCCL_READ_ME", "LD_PRELOAD", "SGLANG_ENABLE_SPEC_V2"]  # fmt: skip
    found = open_for(prefix, Command()).readers(names, {"SGL": "sglang"}, "sglang")
    assert found.unread == {"SGLANG_OLD", "SAFETENSORS_FAST_GPU", "NCCL_P2P_NET", "NCCL_READ_ME"}
    assert found.read == {"SGLANG_PORT", "SAFETENSORS_X", "NCCL_P2P_LEVEL", "SGLANG_ENABLE_SPEC_V2"}


def test_a_name_across_two_reads_is_found(tmp_path):
    for offset in range(-14, 2):
        folder = tmp_path / str(offset)
        path = folder / f"{SITE}/nvidia/nccl/lib/libnccl.so.2"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"\0" * ((4 << 20) + offset) + b"NCCL_P2P_LEVEL\0")
        stack = open_small(folder, {"nvidia-nccl-cu12": [path.relative_to(folder).as_posix()]})
        assert stack.readers(["NCCL_P2P_LEVEL"], {}, "sglang").read == {"NCCL_P2P_LEVEL"}


def open_small(folder, names):
    layers = [Layer(name="sglang", version="1", parts=(), entries=())]
    layers += [Layer(name=name, version="1", parts=(), entries=[Entry(path=path, size=1) for path in paths])
               for name, paths in names.items()]  # fmt: skip
    (folder / MANIFEST_PATH).parent.mkdir(parents=True)
    (folder / MANIFEST_PATH).write_bytes(msgspec.json.encode(msgspec.structs.replace(MANIFEST, layers=layers)))
    return open_for(folder, Command())


def test_a_bundle_without_the_program(tmp_path):
    with pytest.raises(VerifyError, match="holds no vllm"):
        open_small(tmp_path, {}) and open_for(tmp_path, Command(module="vllm.serve"))


def test_facts_of_a_manifest():
    found = manifest_values(MANIFEST, load_targets(), 90)
    assert found["target.sm"] == 90
    assert found["target.isa_features"] == ["avx512f", "avx512dq", "avx512vl", "avx512bw", "fma"]
    assert (found["stack.engine"], found["stack.sglang"], found["stack.torch"]) == ("sglang", "0.5.9", "2.9.1")
    assert (found["stack.cudnn"], found["stack.cudnn_dist"]) == ("9.10.2.21", "nvidia-cudnn-cu12")
    assert found["stack.cuda_majors"] == [12]
    assert found["artefact.glibc_max"] == "2.28"
    assert found["stack.flashinfer_python"] is None


def test_facts_of_a_host():
    found = host_values(HOST, None, {})
    assert (found["host.sm"], found["topo.gpus"], found["host.gpu"]) == (90, 2, "H200")
    assert (found["host.driver"], found["host.driver_cuda"]) == ("580.1", "13.0")
    assert (found["host.shm_gb"], found["host.gpu_mem_gb"]) == (16, 141)
    assert (found["host.ulimit_memlock"], found["host.ulimit_stack"]) == ("unlimited", 8 << 20)
    assert (found["topo.numa_nodes_used"], found["host.tegra"]) == (1, False)
    assert host_values(HOST, None, {"CUDA_VISIBLE_DEVICES": "1"})["topo.gpus"] == 1
    assert host_values(HOST | {"visible": [0]}, None, {})["topo.gpus"] == 1


def test_of_different_gpus_those_count_that_the_bundle_is_for():
    mixed = HOST | {"gpus": [GPU, GPU | {"index": 1, "sm": 120, "name": "NVIDIA RTX PRO 6000"}]}
    assert "host.sm" not in host_values(mixed, None, {})
    found = host_values(mixed, 120, {})
    assert (found["host.sm"], found["host.gpu"], found["topo.gpus"]) == (120, "RTX PRO 6000", 1)


def stack_for(sms):
    manifest = msgspec.structs.replace(MANIFEST, target=TARGET | {"sm": sms})
    return Stack(path=Path("a bundle"), manifest=manifest, sources={})


@pytest.mark.parametrize(("sms", "host", "judged", "fits"), [
    ("80 90", 90, 90, "ok"), ("80 90", 80, 80, "ok"), ("80 90", 89, 80, "ok"), ("80 86", 89, ["80", "86"], "ok"),
    ("80 90", 100, ["80", "90"], "violated"), ("90", 100, 90, "violated"),
])  # fmt: skip
def test_a_bundle_for_several_is_judged_by_what_the_host_makes_use_of(sms, host, judged, fits):
    stack = stack_for(sms)
    found = advise(BOOK, Request(stack=stack, host=HOST | {"gpus": [GPU | {"sm": host}]}))
    assert found.values["target.sm"] == judged
    assert {one.rule.id: one.verdict for one in found.outcomes}["single-sm-build-on-other-sm"] == fits


def test_of_several_architectures_the_worst_verdict_counts():
    stack = stack_for("90 103")
    (found,) = [one for one in advise(BOOK, Request(stack=stack)).outcomes if one.rule.id == "toolkit-knows-sm"]
    assert found.verdict == "violated"
    assert "target.arch is 103" in found.evidence[0]
    mixed = HOST | {"gpus": [GPU, GPU | {"index": 1, "sm": 103}]}
    found = advise(BOOK, Request(stack=stack, host=mixed, given={"target.cuda": "12.9"}))
    assert (found.values["target.sm"], found.values["host.sm"]) == (["90", "103"], ["90", "103"])
    rules = ("toolkit-knows-sm", "single-sm-build-on-other-sm")
    assert [one.verdict for one in found.outcomes if one.rule.id in rules] == ["ok", "ok"]


def test_what_a_host_did_not_find_out_is_not_there():
    bare = {"schema": 1, "gpus": [], "driver": None, "cpu": None, "shm": None, "memory": None, "limits": {}}
    assert host_values(bare, 90, {}) == {"topo.gpus": 0, "host.l4t": None, "host.tegra": False}


def test_facts_of_a_launch():
    found = launch_values(
        ["--tp-size", "4"], {"A": "1"}, {"--tp-size": 4, "--model": "nvidia/GLM-5-NVFP4"}, BOOK.tables
    )
    assert (found["flags.--tp"], found["flags.--tp-size"], found["env.A"]) == (4, 4, "1")
    assert found["argv"] == ["--tp-size", "4"]
    assert (found["model.family"], found["model.quant"]) == ("glm-5", "nvfp4")
    assert "model.local" not in found


@pytest.mark.parametrize(("config", "quant"), [
    ({}, None),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "nvfp4"),
    ({"quantization_config": {"quant_method": "torchao", "quant_type": {"default": "Float8Weight"}}}, "fp8-torchao"),
    ({"quantization_config": {"quant_method": "awq"}}, None),
])  # fmt: skip
def test_facts_of_a_models_folder(tmp_path, config, quant):
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": {}}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    assert model_folder_values(tmp_path) == {
        "model.local": True, "model.multimodal": True, "model.quant": quant,
        "model.quant_method": config.get("quantization_config", {}).get("quant_method"),
        "model.tokenizer_class": "TokenizersBackend"}  # fmt: skip


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"])
def test_a_models_folder_without_its_configuration(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert model_folder_values(tmp_path) == {"model.local": False}


def test_whether_a_port_is_free():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = {"flags.--port": str(taken.getsockname()[1]), "flags.--host": "127.0.0.1"}
        assert here_values(values)["host.port_free"] is False
    assert here_values(values)["host.port_free"] is True
    assert "host.port_free" not in here_values({"flags.--port": "99999"})
    assert "host.port_free" not in here_values({})


def test_a_file_that_a_variable_names(tmp_path):
    there = here_values({"env.NCCL_GRAPH_FILE": __file__})
    gone = here_values({"env.NCCL_GRAPH_FILE": str(tmp_path / "x")})
    assert (there["file.NCCL_GRAPH_FILE"], gone["file.NCCL_GRAPH_FILE"]) == (True, False)


@pytest.mark.parametrize(("words", "expected"), [
    ([], ([], {}, "sglang.launch_server")),
    (["--tp", "4"], (["--tp", "4"], {}, "sglang.launch_server")),
    (["A=1", "B=", "--x=y"], (["--x=y"], {"A": "1", "B": ""}, "sglang.launch_server")),
    (["env", "A=1", "/x/python3", "-m", "sglang.bench", "--x"], (["--x"], {"A": "1"}, "sglang.bench")),
])  # fmt: skip
def test_a_command_as_it_is_typed(words, expected):
    found = split_command(words, {})
    assert (list(found.argv), found.environment, found.module) == expected


def test_a_command_that_cannot_be_meant():
    with pytest.raises(RecipeError, match="'serve' is neither a variable nor a flag"):
        split_command(["serve", "--tp", "4"], {})


def test_given_facts():
    assert parse_given(["host.sm=120", "topo.links_max=PHB", "model.gated=true", "host.cmdline=[\"a\"]", "host.x=null",
                        "stack.torch={}"]) == {
        "host.sm": 120, "topo.links_max": "PHB", "model.gated": True, "host.cmdline": ["a"], "host.x": None,
        "stack.torch": "{}"}  # fmt: skip
    for word, says in (("hots.sm=1", "did you mean host."), ("host.sm", "is not FIELD=VALUE")):
        with pytest.raises(RecipeError, match=says):
            parse_given([word])


@pytest.mark.parametrize(("content", "says"), [
    (b"{", "does not describe"), (b"\xff", "does not describe"), (b"[]", "does not describe"),
    (b'{"schema": 1}', "does not describe"), (b'{"schema": 2, "gpus": []}', "schema 2 is not 1"),
    (b'{"schema": 1, "gpus": 3}', "gpus"), (b'{"schema": 1, "gpus": [{"index": 0, "sm": "9.0"}]}', "sm"),
    (b'{"schema": 1, "gpus": [], "driver": "580"}', "driver"),
    (b'{"schema": 1, "gpus": [], "cpu": {"features": "avx2"}}', "features"),
])  # fmt: skip
def test_a_host_file_that_is_none(tmp_path, content, says):
    path = tmp_path / "host.json"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=says) as caught:
        read_host(path)
    assert "compose detect --json" in str(caught.value)


def test_advice_on_a_launch(prefix):
    argv = ["--model", "nvidia/GLM-5-NVFP4", "--tp", "8", "--attention-backend", "fa3", "--pp", "1"]
    command = Command(argv=argv, environment={"SGLANG_OLD": "1"})
    advice = advise(BOOK, Request(stack=open_for(prefix, command), host=HOST, command=command))
    assert [one.id for one in advice.findings] == ["flags.ambiguous", "environment.unread"]
    found = {one.rule.id: one.verdict for one in advice.outcomes}
    assert found["tp-pp-fit-gpus"] == found["nvfp4-needs-blackwell"] == found["nvfp4-quantization"] == "violated"
    assert found["isa-supported-by-cpu"] == "violated"
    assert found["glibc-floor"] == found["driver-native-12.8"] == found["no-fa3-sm120"] == "ok"
    assert found["pcie-power"] == found["k8s-shm"] == "unknown"
    assert advice.errors == 1 + sum(
        one.verdict == "violated" and one.rule.severity == "error" for one in advice.outcomes)  # fmt: skip


@pytest.mark.parametrize(("method", "expected"), [("torchao", "violated"), ("FP8", "ok"), (None, "ok")])
def test_a_models_quantisation_is_one_of_the_bundles_sglang(prefix, tmp_path, method, expected):
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": method}} if method else {})
    )
    command = Command(argv=["--model-path", str(tmp_path)])
    found = verdicts(Request(stack=open_for(prefix, command), host=HOST, command=command))
    assert found["quant-method-of-this-release"] == expected


def test_the_name_of_a_model_tells_that_it_is_of_torchao(prefix):
    command = Command(argv=["--model-path", "microsoft/Phi-4-mini-instruct-FP8-TORCHAO"])
    assert (
        verdicts(Request(stack=open_for(prefix, command), command=command))["quant-method-of-this-release"]
        == "violated"
    )
    assert verdicts(Request(command=command))["quant-method-of-this-release"] == "unknown"


def test_a_host_without_a_gpu_is_told(prefix):
    assert verdicts(Request(stack=open_for(prefix, None), host=HOST | {"gpus": []}))["host-gpu"] == "violated"
    assert verdicts(Request(stack=open_for(prefix, None), host=HOST))["host-gpu"] == "ok"
    assert verdicts(Request(stack=open_for(prefix, None)))["host-gpu"] == "unknown"


def test_without_a_launch_no_flag_is_missing(prefix):
    found = verdicts(Request(stack=open_for(prefix, None), host=HOST | {"gpus": [GPU | {"sm": 120}]}))
    assert found["deepgemm-off-sm120"] == "unknown"
    assert found["single-sm-build-on-other-sm"] == found["isa-supported-by-cpu"] == "violated"


def test_given_facts_go_first(prefix):
    request = Request(stack=open_for(prefix, None), host=HOST, given={"host.cpu_flags": list("x")}, phases=["select"])
    assert verdicts(request)["isa-supported-by-cpu"] == "violated"
    request = Request(stack=open_for(prefix, None), host=HOST, given={"host.glibc": "2.17"}, phases=["select"])
    assert verdicts(request)["glibc-floor"] == "violated"


def run(command, *words):
    return CliRunner().invoke(command, words)


def test_the_command_line_of_check(prefix, tmp_path):
    host = tmp_path / "host.json"
    host.write_text(json.dumps(HOST))
    common = ("--bundle", str(prefix), "--host", str(host))
    done = run(check, *common, "--json", "--phase", "launch", "--", "--model", "m/m", "--tp", "2")
    data = json.loads(done.stdout)
    assert (done.exit_code, data["errors"], data["findings"]) == (0, 0, [])
    assert {one["phase"] for one in data["rules"]} == {"launch"}
    done = run(check, *common, "--phase", "launch", "--", "A=1", "python", "-m", "sglang.launch_server", "--tp", "6")
    assert isinstance(done.exception, VerifyError)
    assert done.exception.exit_code == 9
    for part in ("tp-power-of-two", "flags.--tp is 6", "--model-path", "2 violated"):
        assert part in done.stdout, part


def test_secrets_are_not_printed():
    words = (
        "--no-host",
        "--json",
        "-e",
        "HF_TOKEN=s3cr3t",
        "--",
        "--api-key",
        "s3cr3t",
        "--pp",
        "2",
        "--tokenizer-path",
        "t",
    )
    done = run(check, *words)
    assert "s3cr3t" not in done.stdout
    facts = json.loads(done.stdout)["facts"]
    assert facts["flags.--tokenizer-path"] == "t"
    assert "s3cr3t" not in run(check, *(word for word in words if word != "--json")).stdout


def test_unknown_rules_are_listed_on_request():
    quiet, loud = (run(check, "--no-host", "--phase", "k8s", *more) for more in ((), ("--unknown",)))
    assert "0 violated, 4 unknown" in quiet.stdout
    assert "k8s-shm" not in quiet.stdout
    assert "k8s-shm" in loud.stdout


def test_check_of_this_host_needs_nothing():
    done = run(check, "--json", "--phase", "k8s")
    assert done.exit_code == 0
    assert "topo.gpus" in json.loads(done.stdout)["facts"]


def test_the_command_line_of_profile():
    listed = json.loads(run(profile, "list", "--json").stdout)
    assert len(listed) == 16
    assert len(json.loads(run(profile, "list", "--sm", "75", "--json").stdout)) == 5
    shown = run(profile, "show", "glm5-nvfp4-mtp-8gpu").stdout
    assert "changed: --enable-pcie-oneshot-allreduce: set -> nothing" in shown
    assert "SGLANG_ENABLE_JIT_DEEPGEMM=0" in shown
    referenced = run(profile, "show", "--reference", "glm5-nvfp4-mtp-8gpu").stdout
    assert "--enable-pcie-oneshot-allreduce" in referenced
    assert "changed:" not in referenced
    assert isinstance(run(profile, "show", "glm").exception, RecipeError)


def test_profiles_hold_by_the_rules_for_launches():
    done = run(profile, "check", "--json")
    assert done.exit_code == 0
    assert len(json.loads(done.stdout)) == 14
    done = run(profile, "check", "--reference", "kimi-k2.5-int4-8gpu-bf16kv", "qwen3.5-397b-fp8-8gpu")
    assert isinstance(done.exception, VerifyError)
    assert "nextn-needs-spec-v2" in done.stdout

"""Kubernetes manifests: valid for every version, the same every time, and what the reference promises."""

from __future__ import annotations

import copy
import hashlib
import shutil
from dataclasses import replace

import kubernetes_validate
import msgspec
import pytest
import yaml
from click.testing import CliRunner

from composer.cli.k8s import k8s
from composer.deploy.folder import read_manifest
from composer.deploy.manifests import STORAGE_CLASSES, Settings, Ways, render
from composer.errors import ComposerError, HostError, RecipeError
from composer.model.layer import Entry, Layer
from composer.model.manifest import Floor, Manifest
from composer.steps.load import load_targets
from tests.bundles import make_bundle

VERSIONS = ("1.28", "1.31", "1.33", "1.37")
EVERY = Ways(url="https://example.org/b.tar.zst", claim="bundles/a b/b.tar.zst", image="reg.example:5000/sglang/b:1",
             host_path="/opt/sglang/current")  # fmt: skip
SMS = (75, 80, 86, 87, 89, 90, 100, 103, 120)
FULL = Settings(ways=EVERY, sha256="0" * 64)


def manifest(sm="90", **changes):
    layer = Layer(name="torch", version="1", parts=[], entries=[Entry(path="a", size=5 << 30)])
    facts = Manifest(
        name="sglang-python312-cuda12_8-sm90-avx512", fingerprint="f" * 64, composer="1", lock="",
        recipe={"name": "sglang", "version": "0.5.9"},
        target={"sm": "90", "isa": "avx512", "cuda": "12.8", "python": "3.12", "machine": "x86_64"}, python="3.12.1",
        interpreter="3.12.1", torch="wheel", serve=None, floors={"SM": Floor(version=sm, because="a")}, checks=[],
        left_out=[], warnings=[], layers=[layer],
    )  # fmt: skip
    return msgspec.structs.replace(facts, **changes)


def files(settings=FULL, found=None, features=("avx512f", "fma")):
    return render(found or manifest(), settings, sms=SMS, features=features)


def merged(base, patch):
    """Strategic merge as far as the overlays use it: null deletes, lists of things with names merge by them."""
    if isinstance(base, dict) and isinstance(patch, dict):
        result = {key: value for key, value in base.items() if patch.get(key, 0) is not None}
        return result | {key: merged(base.get(key), value) for key, value in patch.items() if value is not None}
    if isinstance(base, list) and isinstance(patch, list) and all(isinstance(one, dict) for one in [*base, *patch]):
        key = "mountPath" if patch and "mountPath" in patch[0] else "name"
        changes = {one[key]: one for one in patch}
        kept = [merged(one, changes.pop(one[key])) if one[key] in changes else one for one in base]
        return [*kept, *(merged(None, one) for one in changes.values())]
    return copy.deepcopy(patch)


def resources(written, way=None):
    """What is applied for a way, by kind."""
    found = {}
    for name in yaml.safe_load(written["base/kustomization.yaml"])["resources"]:
        document = yaml.safe_load(written[f"base/{name}"])
        found[document["kind"]] = document
    if way:
        patch = yaml.safe_load(written[f"overlays/{way}/deployment.yaml"])
        found["Deployment"] = merged(found["Deployment"], patch)
    return found


def pod(written, way=None):
    return resources(written, way)["Deployment"]["spec"]["template"]["spec"]


def environment(written, way=None):
    return {one["name"]: one.get("value") for one in pod(written, way)["containers"][0]["env"]}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", ["init-url", "init-claim", "host-path", "image-volume"])
def test_kubernetes_would_take_what_is_applied(version, way):
    found = resources(
        files(replace(FULL, runtime_class="nvidia", env={"A": '%"\\: #x'}, products=["NVIDIA-H100-PCIe"])), way
    )
    assert set(found) == {"Namespace", "PersistentVolumeClaim", "Deployment", "Service"}
    if way == "image-volume" and version == "1.28":
        with pytest.raises(kubernetes_validate.ValidationError, match="image"):
            kubernetes_validate.validate(found["Deployment"], version, strict=True)
        del found["Deployment"]
    for document in found.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_would_tell_of_a_fault():
    broken = resources(files(), "init-url")["Deployment"]
    broken["spec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.33", strict=True)


def test_what_the_reference_promises():
    found = resources(files(replace(FULL, tp=4, model="meta-llama/Llama-3.1-70B-Instruct")), "host-path")
    spec = found["Deployment"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    variables = environment(files(replace(FULL, tp=4, model="meta-llama/Llama-3.1-70B-Instruct")))
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert (variables["SGLANG_TP_SIZE"], variables["SGLANG_MODEL"]) == ("4", "meta-llama/Llama-3.1-70B-Instruct")
    assert variables["HF_HUB_CACHE"] == "/models"
    startup = container["startupProbe"]
    assert (startup["periodSeconds"], startup["failureThreshold"], startup["httpGet"]["path"]) == (10, 60, "/health")
    token = next(one for one in container["env"] if one["name"] == "HF_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": "sglang-secrets", "key": "hf-token", "optional": True}
    claim = found["PersistentVolumeClaim"]["spec"]
    assert (claim["accessModes"], claim["resources"]["requests"]["storage"]) == (["ReadWriteOnce"], "50Gi")
    service = found["Service"]["spec"]
    assert (service["type"], service["ports"][0]["port"]) == ("ClusterIP", 30000)
    assert service["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert found["Namespace"]["metadata"]["name"] == "sglang"


def test_a_cold_start_has_twenty_minutes():
    assert pod(files(replace(FULL, cold=True)))["containers"][0]["startupProbe"]["failureThreshold"] == 120


def test_probes_wait_as_long_as_health_takes():
    """SGLang's /health sleeps for a second at least and waits 20 s for a token; the default of a probe is 1 s."""
    container = pod(files())["containers"][0]
    assert container["livenessProbe"]["timeoutSeconds"] > 20
    assert container["readinessProbe"]["timeoutSeconds"] > 20
    assert container["startupProbe"]["timeoutSeconds"] > 1


def test_the_pod_can_do_little():
    spec = pod(files(), "init-url")
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    for container in (*spec["containers"], *spec["initContainers"]):
        rights = container["securityContext"]
        assert rights == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert not any("hostPath" in volume for volume in spec["volumes"])
    assert next(one for one in spec["volumes"] if one["name"] == "shm")["emptyDir"] == {
        "medium": "Memory",
        "sizeLimit": "8Gi",
    }


@pytest.mark.parametrize("way", ["init-url", "init-claim", "host-path", "image-volume"])
def test_each_way_mounts_the_bundle_where_the_server_is_run_from(way):
    spec = pod(files(), way)
    bundle = next(one for one in spec["volumes"] if one["name"] == "bundle")
    mount = next(one for one in spec["containers"][0]["volumeMounts"] if one["name"] == "bundle")
    assert spec["containers"][0]["command"] == ["/opt/sglang/bin/sglang-serve"]
    assert (mount["mountPath"], mount["readOnly"]) == ("/opt/sglang", True)
    assert mount.get("subPath") == ("sglang" if way.startswith("init") else None)
    kind = {"host-path": "hostPath", "image-volume": "image"}.get(way, "emptyDir")
    assert set(bundle) == {"name", kind}
    mounted = {one["name"] for one in spec["containers"][0]["volumeMounts"]}
    for container in spec.get("initContainers", ()):
        mounted |= {one["name"] for one in container["volumeMounts"]}
        assert container["command"][3:] == [
            "/source/a b/b.tar.zst" if way == "init-claim" else EVERY.url, "0" * 64, "/bundle/sglang",
        ]  # fmt: skip
        # The unpacked bundle is 5 GiB.
        assert int(container["resources"]["requests"]["ephemeral-storage"].removesuffix("Mi")) > 5 << 10
    assert mounted == {one["name"] for one in spec["volumes"]}


def terms(found=None, settings=FULL, features=()):
    affinity = pod(files(settings, found, features))["affinity"]["nodeAffinity"]
    listed = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return [{one["key"].partition("/")[2]: one["values"] for one in term["matchExpressions"]} for term in listed]


@pytest.mark.parametrize(("floor", "usable"), [
    ("90", [("9", ["0"])]),
    ("80", [("8", ["0", "6", "9"])]),  # and not 8.7, a Jetson
    ("80 90", [("8", ["0", "6", "9"]), ("9", ["0"])]),
    ("100+PTX", [("10", ["0", "3"]), ("12", ["0"])]),
])  # fmt: skip
def test_nodes_are_chosen_by_what_runs_the_bundle(floor, usable):
    found = [(term["gpu.compute.major"], term["gpu.compute.minor"]) for term in terms(manifest(floor))]
    assert found == [([major], minors) for major, minors in usable]


def test_nodes_are_chosen_by_their_cpu_and_by_product():
    assert terms(features=("avx512f", "fma"))[0]["cpu-cpuid.AVX512F"] == ["true"]
    assert terms(settings=replace(FULL, products=["NVIDIA-H100-80GB-HBM3"])) == [
        {"gpu.product": ["NVIDIA-H100-80GB-HBM3"]}
    ]
    arm = manifest(target={**manifest().target, "machine": "aarch64"})
    assert pod(files(found=arm))["nodeSelector"]["kubernetes.io/arch"] == "arm64"


def test_a_bundle_without_gpu_code_needs_the_products_named():
    with pytest.raises(RecipeError, match="holds no GPU code"):
        files(found=manifest("none"))


@pytest.mark.parametrize("name", [None, *STORAGE_CLASSES, "fast-nvme"])
def test_the_storage_class_is_a_component(name):
    written = files(replace(FULL, storage_class=name))
    overlay = yaml.safe_load(written["overlays/host-path/kustomization.yaml"])
    assert overlay.get("components") == ([f"../../components/storage-{name}"] if name else None)
    for one in {*STORAGE_CLASSES, name} - {None}:
        component = yaml.safe_load(written[f"components/storage-{one}/kustomization.yaml"])
        assert component["kind"] == "Component"
        (operation,) = yaml.safe_load(component["patches"][0]["patch"])
        assert operation == {"op": "add", "path": "/spec/storageClassName", "value": one}


def test_only_ways_that_were_asked_for_are_written():
    written = files(Settings(ways=Ways(host_path="/opt/b")))
    assert {name.split("/")[1] for name in written if name.startswith("overlays")} == {"host-path"}


def test_every_file_is_named_and_every_name_is_a_file():
    written = files()
    for path, text in written.items():
        if path.endswith("kustomization.yaml"):
            document, folder = yaml.safe_load(text), path.rpartition("/")[0]
            patches = [one["path"] for one in document.get("patches", ()) if "path" in one]
            generated = [name for one in document.get("configMapGenerator", ()) for name in one["files"]]
            for name in [one for one in document.get("resources", ()) if ".yaml" in one] + patches + generated:
                assert f"{folder}/{name}" in written
    assert not any(
        "@" in line for path, text in written.items() if path.endswith(".yaml") for line in text.splitlines()
    )


HOSTILE = '"; rm -rf / #: {} [] - &a *a !!x %\\ \u00e9 ${HOME} yes'


def test_no_value_is_read_as_anything_but_itself():
    settings = replace(FULL, model=HOSTILE, env={"A": HOSTILE, "B": "yes", "C": "0x10", "D": "", "E": "null"})
    variables = environment(files(settings))
    assert (variables["SGLANG_MODEL"], variables["A"]) == (HOSTILE, HOSTILE)
    assert [variables[name] for name in "BCDE"] == ["yes", "0x10", "", "null"]


@pytest.mark.parametrize("changes", [
    {"name": "Sglang"}, {"name": "a" * 64}, {"name": "-a"}, {"name": "1a"}, {"namespace": "a_b"}, {"namespace": ""},
    {"storage_class": "a b"}, {"runtime_class": "a\nb"}, {"storage": "50 GB"}, {"shm": "8gb"}, {"cpu": "x"},
    {"memory": "-1"}, {"image": "UPPER/x y"}, {"products": ["a b"]}, {"model": "a\nb"}, {"env": {"HF_TOKEN": "hf_x"}},
    {"env": {"a b": "c"}}, {"env": {"A": "\x00"}}, {"ways": Ways()}, {"sha256": None}, {"sha256": "xyz"},
    {"ways": Ways(url="ftp://a/b")}, {"ways": Ways(url="https://user:secret@host/b")},
    {"ways": Ways(url="https://a/b c")},
    {"ways": Ways(host_path="relative")}, {"ways": Ways(host_path="/a/../b")}, {"ways": Ways(claim="only-a-claim")},
    {"ways": Ways(claim="Bad/b.tar.zst")}, {"ways": Ways(claim="c/../b")}, {"ways": Ways(image="a@sha256:12")},
])  # fmt: skip
def test_what_kubernetes_would_refuse_is_refused_here(changes):
    with pytest.raises(RecipeError):
        files(replace(FULL, **changes))


def test_all_faults_are_told_together():
    with pytest.raises(RecipeError, match="3 faults"):
        files(replace(FULL, name="A", namespace="B", shm="x"))


def test_equal_settings_give_equal_bytes():
    assert list(files().items()) == list(files().items())


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(msgspec.json.encode(manifest()))
    return path


def test_the_command_writes_a_folder_and_says_how_to_apply_it(tmp_path, source):
    out = tmp_path / "out"
    words = [
        str(source),
        "-o",
        str(out),
        "--host-path",
        "/opt/b",
        "--tp",
        "2",
        "--env",
        "A=b=c",
        "--storage-class",
        "gp3",
    ]
    done = CliRunner().invoke(k8s, words, catch_exceptions=False)
    assert done.output == f"kubectl apply -k {out}/overlays/host-path\n"
    written = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    targets = load_targets()
    settings = Settings(ways=Ways(host_path="/opt/b"), tp=2, env={"A": "b=c"}, storage_class="gp3")
    assert written == render(manifest(), settings, sms=map(int, targets.sm), features=targets.isa["avx512"].features)


def test_a_folder_in_use_is_left_alone(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(HostError, match="not empty"):
        CliRunner().invoke(k8s, [str(source), "-o", str(tmp_path / "out"), "--host-path", "/o"], catch_exceptions=False)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_manifest_is_read_from_a_folder_too_and_nothing_else(tmp_path, source):
    (tmp_path / "tree/share/compose").mkdir(parents=True)
    shutil.copy(source, tmp_path / "tree/share/compose/manifest.json")
    for place in (source, tmp_path / "tree"):
        found, digest = read_manifest(place)
        assert (found.fingerprint, found.layers, digest) == ("f" * 64, manifest().layers, None)
    (tmp_path / "no.tar.zst").write_bytes(b"nothing")
    for wrong in ("none", "no.tar.zst"):
        with pytest.raises(ComposerError):
            read_manifest(tmp_path / wrong)


def test_the_digest_is_that_of_the_file(tmp_path):
    bundle = tmp_path / "b.tar.zst"
    make_bundle(bundle, {"one": {"bin/a": b"x"}}, store=tmp_path / "store")
    found, digest = read_manifest(bundle)
    assert found.name == "b"
    assert digest == hashlib.sha256(bundle.read_bytes()).hexdigest()

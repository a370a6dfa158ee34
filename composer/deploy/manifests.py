"""Kubernetes manifests for a bundle, as a kustomize folder: a base, and an overlay for each way to bring the bundle.

The files are texts of composer/deploy/kubernetes/ with values put in. A value goes in as JSON, which is YAML, so that
none can be read as anything but itself.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from composer.errors import RecipeError
from composer.model.manifest import Manifest
from composer.runtime.gpu import runs

#: Block storage that the clouds offer by default: Amazon EKS, Google GKE, Azure AKS.
STORAGE_CLASSES = ("gp3", "standard-rwo", "managed-premium")
#: Probes of 10 s each until the first answer: with the model at hand, and with a download before.
WARM, COLD = 60, 120
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
# Labels of node feature discovery, by what Linux calls a feature; those of all CPUs with NVIDIA's newer GPUs apart.
_FEATURES = {"avx512f": "AVX512F", "avx512_vnni": "AVX512VNNI", "avx512_bf16": "AVX512BF16", "avx2": "AVX2",
             "avx": "AVX", "sve2": "SVE2"}  # fmt: skip
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|[kMGTPE]|[KMGTPE]i)?")
_REFERENCE = re.compile(
    r"(?:[a-zA-Z0-9.-]+(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[\w][\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_URL = re.compile(r"https?://[^\s/?#@]+(?:/[^\s@]*)?")
_PATH = re.compile(r"(?:/[^/\x00-\x1f\x7f]+)+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_FIX_NAME = "Use lower-case letters, digits and -, at most 63 (RFC 1123)."


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """How the bundle gets to the GPU; each that is given becomes an overlay.

    url: of the bundle's file. claim: `CLAIM/path` of the file in a PersistentVolumeClaim. image: an OCI reference.
    host_path: where nodes have it unpacked.
    """

    url: str | None = None
    claim: str | None = None
    image: str | None = None
    host_path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a deployment may choose. Defaults are those of docs/reference/kubernetes.md.

    tp: GPUs, and SGLang's tensor parallelism. cpu and memory: requests; by default 4 CPUs and 16 GiB for each GPU.
    products: names of GPUs (the label nvidia.com/gpu.product) instead of compute capabilities. cold: the model is
    downloaded at the first start. sha256: of the bundle's file.
    """

    ways: Ways
    name: str = "sglang"
    namespace: str = "sglang"
    tp: int = 1
    port: int = 30000
    model: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    image: str = "python:3.14-slim"
    storage: str = "50Gi"
    storage_class: str | None = None
    shm: str = "8Gi"
    cpu: str | None = None
    memory: str | None = None
    products: Sequence[str] = ()
    runtime_class: str | None = None
    cold: bool = False
    sha256: str | None = None


def render(manifest: Manifest, settings: Settings, *, sms: Iterable[int], features: Iterable[str]) -> dict[str, str]:
    """Every file by its path in the folder.

    sms: the GPU architectures that there are. features: what the bundle's instruction set needs of a CPU, as Linux
    spells it. RecipeError, with all faults together, for settings that Kubernetes or the bundle does not take.
    """
    RecipeError.collect(_faults(settings))
    values = _values(manifest, settings, _terms(manifest, settings, sms, features))
    files = {
        "base/kustomization.yaml": _fill("base.yaml", values),
        **{f"base/{name}": _fill(name, values)
           for name in ("namespace.yaml", "pvc.yaml", "deployment.yaml", "service.yaml", "secret.example.yaml")},
    }  # fmt: skip
    for name in _classes(settings):
        files[f"components/storage-{name}/kustomization.yaml"] = _fill("storage.yaml", {"STORAGE_CLASS": _yaml(name)})
    for way, extra in _overlays(manifest, settings).items():
        files |= _overlay(way, {**values, **extra}, settings)
    return dict(sorted(files.items()))


@functools.cache
def _template(name: str) -> str:
    return (resources.files("composer") / "deploy" / "kubernetes" / name).read_text(encoding="utf-8")


def _fill(name: str, values: Mapping[str, str]) -> str:
    """The template with every @NAME@ replaced; a line that becomes empty goes."""
    text = re.sub(r"^@([A-Z_0-9]+)@\n", lambda found: values[found[1]], _template(name), flags=re.MULTILINE)
    # A name with something added is still a plain word of YAML.
    text = re.sub(r"@(NAME)@(?=-)", lambda found: json.loads(values[found[1]]), text)
    return re.sub(r"@([A-Z_0-9]+)@", lambda found: values[found[1]], text)


def _yaml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _items(items: Iterable[object], indent: int) -> str:
    return "".join(f"{' ' * indent}- {_yaml(item)}\n" for item in items)


def _values(manifest: Manifest, settings: Settings, terms: Sequence[object]) -> dict[str, str]:
    startup = COLD if settings.cold else WARM
    plain = {
        "NAME": settings.name, "NAMESPACE": settings.namespace, "BUNDLE": manifest.name, "PORT": settings.port,
        "FINGERPRINT": manifest.fingerprint, "ARCH": _ARCHITECTURES[manifest.target["machine"]], "TP": settings.tp,
        "IMAGE": settings.image, "CPU": settings.cpu or str(4 * settings.tp), "SHM": settings.shm,
        "MEMORY": settings.memory or f"{16 * settings.tp}Gi", "STORAGE": settings.storage, "STARTUP": startup,
        "DEADLINE": startup * 10 + 600,
    }  # fmt: skip
    return {name: _yaml(value) for name, value in plain.items()} | {
        "TERMS": _items(terms, 14), "ENV": _items(_environment(settings), 12),
        "RUNTIME_CLASS": f"      runtimeClassName: {_yaml(settings.runtime_class)}\n" if settings.runtime_class else "",
    }  # fmt: skip


def _environment(settings: Settings) -> list[dict[str, str]]:
    variables = {
        **({"SGLANG_MODEL": settings.model} if settings.model else {}),
        "SGLANG_HOST": "0.0.0.0",  # noqa: S104  # of the pod
        "SGLANG_PORT": str(settings.port), "SGLANG_TP_SIZE": str(settings.tp), "HF_HUB_CACHE": "/models",
        # Below it, a folder for each fingerprint: a new bundle never meets the kernels of an old one.
        "WHEEL_COMPOSER_CACHE": "/models/.compose-cache", "HOME": "/tmp",  # noqa: S108  # the pod's own
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
        **settings.env,
    }  # fmt: skip
    return [{"name": name, "value": value} for name, value in variables.items()]


def _terms(manifest: Manifest, settings: Settings, sms: Iterable[int], features: Iterable[str]) -> list[object]:
    """Node selector terms, of which one must hold, each with all of its expressions."""
    cpu = [{"key": f"feature.node.kubernetes.io/cpu-cpuid.{_FEATURES[one]}", "operator": "In", "values": ["true"]}
           for one in dict.fromkeys(features) if one in _FEATURES]  # fmt: skip
    if settings.products:
        gpus = [[_is_in("nvidia.com/gpu.product", settings.products)]]
    else:
        usable: dict[int, list[str]] = {}
        for sm in _usable(manifest, sms):
            usable.setdefault(sm // 10, []).append(str(sm % 10))
        gpus = [
            [_is_in("nvidia.com/gpu.compute.major", [str(major)]), _is_in("nvidia.com/gpu.compute.minor", minors)]
            for major, minors in usable.items()
        ]
    if not gpus:
        raise RecipeError("holds no GPU code, so no node can be chosen", where=manifest.name,
                          fix="Name the GPUs with --gpu-product.")  # fmt: skip
    return [{"matchExpressions": [*one, *cpu]} for one in gpus]


def _is_in(key: str, values: Sequence[str]) -> dict[str, object]:
    return {"key": key, "operator": "In", "values": list(values)}


def _usable(manifest: Manifest, sms: Iterable[int]) -> list[int]:
    """Of the GPU architectures that there are, those that run the bundle; its floor reads `90+PTX 80`."""
    floor = manifest.floors.get("SM")
    words = (floor.version if floor else manifest.target["sm"]).split()
    built = [(int(sm), bool(ptx)) for sm, _, ptx in (word.partition("+") for word in words) if sm.isdecimal()]
    return [sm for sm in sorted(sms) if any(runs(sm, own, ptx=ptx) for own, ptx in built)]


def _classes(settings: Settings) -> list[str]:
    own = settings.storage_class
    return [*STORAGE_CLASSES, *([own] if own and own not in STORAGE_CLASSES else [])]


def _overlays(manifest: Manifest, settings: Settings) -> dict[str, dict[str, str]]:
    """The values of each overlay by its name."""
    ways, found = settings.ways, {}
    unpacked = sum(layer.size for layer in manifest.layers)
    # File systems round up, and the folder is written beside the one that it replaces.
    common = {"INIT_IMAGE": _yaml(settings.image), "SHA256": _yaml(settings.sha256), "SOURCE_MOUNT": "",
              "SOURCE_VOLUME": "", "UNPACKED": _yaml(f"{unpacked * 11 // 10 + (1 << 30) >> 20}Mi")}  # fmt: skip
    if ways.url:
        found["init-url"] = {**common, "SOURCE": _yaml(ways.url)}
    if ways.claim:
        claim, _, path = ways.claim.partition("/")
        source = {"name": "source", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        mount = {"name": "source", "mountPath": "/source", "readOnly": True}
        found["init-claim"] = {**common, "SOURCE": _yaml(f"/source/{path}"), "SOURCE_MOUNT": _items([mount], 12),
                               "SOURCE_VOLUME": _items([source], 8)}  # fmt: skip
    if ways.image:
        found["image-volume"] = {"REFERENCE": _yaml(ways.image)}
    if ways.host_path:
        found["host-path"] = {"HOST_PATH": _yaml(ways.host_path)}
    return found


def _overlay(way: str, values: Mapping[str, str], settings: Settings) -> dict[str, str]:
    init = way.startswith("init-")
    lines = [
        f"  {'' if name == settings.storage_class else '# '}- ../../components/storage-{name}\n"
        for name in _classes(settings)
    ]
    components = "".join(lines)
    text = _fill("overlay.yaml", {"COMPONENTS": components})
    if settings.storage_class is None:
        # A list of comments only would be null.
        text = text.replace("components:\n", "# The cluster's default storage class, or:\n# components:\n")
    files = {
        "kustomization.yaml": text + (_fill("generator.yaml", values) if init else ""),
        "deployment.yaml": _fill("init.yaml" if init else f"{way}.yaml", values),
        **({"unpack.py": _template("unpack.py")} if init else {}),
    }
    return {f"overlays/{way}/{name}": content for name, content in files.items()}


def _faults(settings: Settings) -> list[RecipeError]:
    ways = settings.ways
    checks = [
        *(("--" + option, value, _LABEL, _FIX_NAME) for option, value in (
            ("name", settings.name), ("namespace", settings.namespace), ("storage-class", settings.storage_class),
            ("runtime-class", settings.runtime_class), ("claim", ways.claim and ways.claim.partition("/")[0]))),
        *(("--" + option, value, _QUANTITY, "Use a quantity of Kubernetes: 8Gi, 500m.") for option, value in (
            ("storage", settings.storage), ("shm", settings.shm), ("cpu", settings.cpu), ("memory", settings.memory))),
        *((option, value, _REFERENCE, "Use registry/name:tag or registry/name@sha256:...") for option, value in (
            ("--image", settings.image), ("--oci", ways.image))),
        ("--url", ways.url, _URL, "Use an http:// or https:// address without a user."),
        ("--host-path", ways.host_path, _PATH, "Use an absolute path."),
        ("--claim", ways.claim and "/" + ways.claim.partition("/")[2], _PATH, "Use CLAIM/path/of/the/bundle.tar.zst."),
        *(("--gpu-product", product, re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"),
           "See `kubectl get nodes -L nvidia.com/gpu.product`.") for product in settings.products),
        ("--sha256", settings.sha256, re.compile(r"[0-9a-f]{64}"), "Use 64 hexadecimal digits."),
        ("--model", settings.model, re.compile(r"[^\x00-\x1f\x7f]+"), "Use a name or a path."),
    ]  # fmt: skip
    found = [RecipeError(f"{value!r} cannot be meant", where=where, fix=fix)
             for where, value, pattern, fix in checks if value is not None and not _meant(pattern, value)]  # fmt: skip
    return [*found, *_faults_between(settings)]


def _meant(pattern: re.Pattern[str], value: str) -> bool:
    parts = value.split("/")
    return bool(pattern.fullmatch(value)) and value.isprintable() and ".." not in parts


def _faults_between(settings: Settings) -> list[RecipeError]:
    ways, found = settings.ways, []
    if not (ways.url or ways.claim or ways.image or ways.host_path):
        found.append(RecipeError("nothing says how the bundle gets to the node",
                                 fix="Give one or more of --url, --claim, --oci and --host-path."))  # fmt: skip
    if (ways.url or ways.claim) and not settings.sha256:
        found.append(RecipeError("the digest of the bundle's file is not known", where="--sha256",
                                 fix="Give the bundle itself, or --sha256."))  # fmt: skip
    for name, value in settings.env.items():
        if name in _SECRETS:
            found.append(RecipeError(f"{name} would be readable in the manifests", where="--env",
                                     fix="Put it into a Secret: see base/secret.example.yaml."))  # fmt: skip
        elif not _VARIABLE.fullmatch(name) or not value.isprintable():
            found.append(RecipeError(f"no environment variable: {name}={value!r}", where="--env"))
    if settings.name[:1].isdigit():
        found.append(RecipeError(f"{settings.name!r} cannot name a Service", where="--name",
                                 fix="Begin with a letter (RFC 1035)."))  # fmt: skip
    return found

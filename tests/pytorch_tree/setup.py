"""Builds the tree as PyTorch 2.9's setup.py does: the environment says what, and goes on to cmake and ninja."""

import base64
import hashlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BUILD, TORCH = ROOT / "build", ROOT / "torch"
PASSED = ("BLAS", "CUDNN_INCLUDE_DIR", "CUDNN_LIBRARY", "INSTALL_TEST", "TORCH_CUDA_ARCH_LIST")
VERSION = "2.9.1+gitUnknown"
if os.getenv("PYTORCH_BUILD_VERSION"):
    VERSION = os.environ["PYTORCH_BUILD_VERSION"]
    if int(os.environ["PYTORCH_BUILD_NUMBER"]) > 1:
        VERSION += ".post" + os.environ["PYTORCH_BUILD_NUMBER"]
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
NAME = f"torch-{VERSION}-{TAG}-{TAG}-linux_x86_64.whl"
INFO = f"torch-{VERSION}.dist-info"


def cmake(*words):
    if subprocess.run(["cmake", *words], cwd=BUILD).returncode:
        sys.exit(1)


def configure():
    if (BUILD / "CMakeCache.txt").exists() and (BUILD / "build.ninja").exists():
        return  # whatever the environment says now
    options = {
        name: value
        for name, value in os.environ.items()
        if name in PASSED or name.startswith(("BUILD_", "USE_", "CMAKE_"))
    }
    if "CMAKE_INSTALL_PREFIX" in options:
        sys.exit("CMAKE_INSTALL_PREFIX should not be specified in the environment variable")
    options |= {
        "CMAKE_INSTALL_PREFIX": str(TORCH),
        "CMAKE_PREFIX_PATH": sysconfig.get_path("purelib"),
        "Python_EXECUTABLE": sys.executable,
    }
    BUILD.mkdir(exist_ok=True)
    defines = [f"-D{name}={value}" for name, value in sorted(options.items())]
    cmake("-GNinja", *defines, str(ROOT))


def compile_all():
    configure()
    if step := os.getenv("BUILD_CUSTOM_STEP"):
        subprocess.run(step, shell=True, check=True, cwd=ROOT)
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    cmake("--build", ".", "--target", "install", *jobs)
    extension = TORCH / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    for old in TORCH.glob("_C.*.so"):
        old.unlink()
    words = ["cc", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", str(TORCH / "csrc/stub.c")]
    where = [f"-L{TORCH / 'lib'}", "-ltorch_python", "-Wl,-rpath,$ORIGIN/lib"]
    subprocess.run([*words, "-o", str(extension), *where], check=True)
    (TORCH / "version.py").write_text(f"__version__ = {VERSION!r}\n")


def metadata():
    asked = ["filelock", "sympy>=1.13.3"]
    if more := os.getenv("PYTORCH_EXTRA_INSTALL_REQUIREMENTS"):
        asked += map(str.strip, more.split("|"))
    lines = ["Metadata-Version: 2.1", "Name: torch", f"Version: {VERSION}", *(f"Requires-Dist: {one}" for one in asked)]
    wheel = ["Wheel-Version: 1.0", "Root-Is-Purelib: false", f"Tag: {TAG}-{TAG}-linux_x86_64"]
    return {"METADATA": "\n".join(lines) + "\n", "WHEEL": "\n".join(wheel) + "\n"}


def dist_info(folder):
    (folder / INFO).mkdir()
    for name, text in metadata().items():
        (folder / INFO / name).write_text(text)
    print(INFO)


def digest(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def bdist_wheel(folder):
    compile_all()
    packed = [*TORCH.glob("*.py"), *TORCH.glob("*.so"), *TORCH.glob("lib/*.so*")]
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in packed}
    files |= {f"{INFO}/{name}": text.encode() for name, text in metadata().items()}
    rows = [f"{name},sha256={digest(data)},{len(data)}" for name, data in files.items()]
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{INFO}/RECORD", "\n".join([*rows, f"{INFO}/RECORD,,"]) + "\n")
    print(NAME)


if __name__ == "__main__":
    {"dist_info": dist_info, "bdist_wheel": bdist_wheel}[sys.argv[1]](Path(sys.argv[2]))

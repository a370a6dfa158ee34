"""CUDA toolkits that say what they are told to, made of small scripts; and the real rules in a host_config.h."""

from __future__ import annotations

from pathlib import Path

HOST_CONFIG = """\
#if !__NV_NO_HOST_COMPILER_CHECK
#if defined(__GRCO_CLANG_COMPILER__)
#if (__GRCO_CLANG_COMPILER__ == 1) && ((__clang_major__ < 16) || (__clang_major__ > 17))
#error -- unsupported Grace clang version! The version must be 16.x to 17.x.
#endif
#endif
#if defined(__GNUC__)

#if __GNUC__ > {gcc}

#error -- unsupported GNU version! gcc versions later than {gcc} are not supported!

#endif
#endif
#if defined(__clang__)

#if (__clang_major__ >= {clang}) || (__clang_major__ < 3) || ((__clang_major__ == 3) &&  (__clang_minor__ < 3))
#error -- unsupported clang version! clang version must be less than {clang} and greater than 3.2 .

#endif
#endif
#endif
"""
CUDA_H = """\
#define cuMemAlloc                          cuMemAlloc_v2
    #define cuMemcpy                            __CUDA_API_PTDS(cuMemcpy)
    #define cuMemAllocAsync                     __CUDA_API_PTSZ(cuMemAllocAsync)
CUresult CUDAAPI cuInit(unsigned int Flags);
CUresult CUDAAPI cuMemAlloc(CUdeviceptr *dptr, size_t bytesize);
"""


def host_config(gcc: int = 13, clang: int = 18) -> str:
    return HOST_CONFIG.format(gcc=gcc, clang=clang)


def nvcc_script(version: str, sms: tuple[int, ...]) -> str:
    """An nvcc that answers two questions and compiles nothing."""
    release = ".".join(version.split(".")[:2])
    codes = "".join(f"compute_{sm}\n" for sm in sms) + "".join(f"sm_{sm}\n" for sm in sms)
    return f"""#!/bin/sh
case "$1" in
--version) printf 'nvcc: NVIDIA (R) Cuda compiler driver\\nCuda compilation tools, release {release}, V{version}\\n' ;;
--list-gpu-code) printf '%s' '{codes}' ;;
*) echo 'catastrophe: no compiler in here' >&2; exit 3 ;;
esac
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_toolkit(root: Path, version: str = "12.8.93", sms: tuple[int, ...] = (75, 90, 100), *, gcc: int = 14,
                  libraries: bool = True, include: str = "include") -> Path:  # fmt: skip
    write_script(root / "bin/nvcc", nvcc_script(version, sms))
    (root / include / "crt").mkdir(parents=True)
    (root / include / "crt/host_config.h").write_text(host_config(gcc, 19))
    if libraries:
        (root / include / "cublas_v2.h").touch()
    return root


def write_compiler(folder: Path, name: str, *, gcc: int = 12, clang: int | None = None) -> Path:
    """A C++ compiler that tells its version, and the C compiler beside it."""
    macros = f"#define __GNUC__ {gcc}\n#define __GNUC_MINOR__ 2\n#define __GNUC_PATCHLEVEL__ 0\n"
    if clang is not None:
        macros = f"#define __clang_major__ {clang}\n#define __GNUC__ 4\n"
    text = f"#!/bin/sh\nprintf '%s' '{macros}'\n"
    write_script(folder / name.replace("clang++", "clang").replace("g++", "gcc"), text)
    return write_script(folder / name, text)

"""Compute on every visible GPU and compare with the CPU: the doctor's --gpu.

    python -m _compose.doctor.self_test REPORT

On each GPU: products of matrices, RMSNorm of sgl_kernel, attention (FlashAttention 3, or FlashInfer, or PyTorch's), a
kernel that Triton compiles; with two GPUs or more a sum over all of them by NCCL. REPORT, a file, gets a JSON line
before and after each check, `["begin", CHECK]` and `["end", RESULT]`, and `["done"]` at the end, so that a check that
ends the process is known. RESULT: `check`, `where`, `ok` (null: cannot be run here), `seconds`, `reason` or `error`.

A few seconds, most of them torch's import, and 1 GiB of GPU memory at most, most of it CUDA's own.
"""

# What is imported from the bundle is no dependency of this file: it is what is being tried.

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

#: Relative to the largest value: bfloat16 keeps 8 bits, TF32, which a host may have chosen for float32, 11.
_TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2}
_ROWS, _WIDTH, _HEADS, _GROUPS, _SIZE = 64, 1024, 8, 2, 128

_TRITON_SOURCE = """\
import triton
import triton.language as tl


@triton.jit
def scale(source, target, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, at < count) * 3, at < count)
"""

Check = Callable[[Any, str], None]


class NotHereError(Exception):
    """The check cannot be made with this bundle, or on this GPU; the text says why."""


def matmul(torch: Any, device: str) -> None:  # noqa: ANN401  # torch is not installed where this is checked
    """Products in float32 and bfloat16 against float64 on the CPU."""
    for name in ("float32", "bfloat16"):
        left, right = (_random(torch, (256, 512), name), _random(torch, (512, 128), name))
        _close(left.to(device) @ right.to(device), left.double() @ right.double(), name)


def rmsnorm(torch: Any, device: str) -> None:  # noqa: ANN401
    """One operation of sgl_kernel."""
    kernels = _module("sgl_kernel")
    x, weight = _random(torch, (_ROWS, _WIDTH), "bfloat16"), _random(torch, (_WIDTH,), "bfloat16")
    root = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    _close(kernels.rmsnorm(x.to(device), weight.to(device), 1e-6), x.double() * root * weight.double(), "bfloat16")


def attention(torch: Any, device: str) -> None:  # noqa: ANN401
    """Causal attention of one sequence, by the first implementation that the bundle and the GPU have."""
    q, k, v = (_random(torch, (_ROWS, heads, _SIZE), "bfloat16") for heads in (_HEADS, _GROUPS, _GROUPS))
    wide = [one.repeat_interleave(_HEADS // _GROUPS, 1) for one in (k, v)]
    queries, keys, values = (one.double().transpose(0, 1) for one in (q, *wide))
    scores = queries @ keys.transpose(1, 2) / _SIZE**0.5
    later = torch.ones(_ROWS, _ROWS, dtype=torch.bool).triu(1)
    wanted = (scores.masked_fill(later, float("-inf")).softmax(-1) @ values).transpose(0, 1)
    attend = _attention_of(torch, device)
    _close(attend(torch, *(one.to(device) for one in (q, k, v))), wanted, "bfloat16")


def triton(torch: Any, device: str) -> None:  # noqa: ANN401
    """Compile a kernel with what the bundle has for it, load it from the cache folder, and run it."""
    _module("triton")
    if device == "cpu":
        raise NotHereError("Triton compiles for GPUs")
    x = torch.arange(1000, dtype=torch.float32, device=device)
    found = torch.zeros_like(x)
    with tempfile.TemporaryDirectory(prefix="compose-triton-") as folder:  # Triton reads a kernel's source
        path = os.path.join(folder, "kernels.py")  # noqa: PTH118
        with open(path, "w") as stream:  # noqa: PTH123
            stream.write(_TRITON_SOURCE)
        spec = importlib.util.spec_from_file_location("kernels", path)
        assert spec is not None
        assert spec.loader is not None
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        kernels.scale[(1,)](x, found, 1000, BLOCK=1024)
    _close(found, torch.arange(1000, dtype=torch.float64) * 3, "float32")


def nccl(torch: Any, device: str) -> None:  # noqa: ANN401, ARG001
    """A sum over all GPUs, in one process."""
    count = torch.cuda.device_count()
    parts = [torch.full((1 << 16,), float(index + 1), device=f"cuda:{index}") for index in range(count)]
    importlib.import_module("torch.cuda.nccl").all_reduce(parts)
    for part in parts:
        _close(part, torch.full((1 << 16,), count * (count + 1) / 2, dtype=torch.float64), "float32")


CHECKS: tuple[Check, ...] = (matmul, rmsnorm, attention, triton)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Exit status: 0 if all that could be run is right, 1 otherwise."""
    report = os.open((sys.argv[1:] if arguments is None else list(arguments))[0], os.O_WRONLY | os.O_APPEND)

    def tell(*row: object) -> None:
        os.write(report, (json.dumps(row) + "\n").encode())

    good = _run_all(tell)
    tell("done")
    return 0 if good else 1


def _run_all(tell: Callable[..., None]) -> bool:
    begun = time.perf_counter()
    tell("begin", {"check": "torch", "where": "bin/python3"})
    torch, fault = _start()
    tell("end", _result("torch", "bin/python3", begun, error=fault))
    if fault:
        return False
    count = torch.cuda.device_count()
    todo = [(check, index) for index in range(count) for check in CHECKS]
    good = True
    for check, index in [*todo, *([(nccl, 0)] if count > 1 else [])]:
        where = "all GPUs" if check is nccl else f"GPU {index} ({torch.cuda.get_device_name(index)})"
        tell("begin", {"check": check.__name__, "where": where})
        result = _run(check, torch, index, where)
        tell("end", result)
        good = good and result["ok"] is not False
        if "CUDA error" in (result["error"] or ""):  # it stays with the process: whatever follows fails, too
            return False
    return good


def _start() -> tuple[Any, str]:
    """(torch, nothing), or (anything, why it cannot use a GPU)."""
    try:
        torch = importlib.import_module("torch")
        torch.cuda.init()
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = False
    except BaseException as fault:  # noqa: BLE001  # whatever it is, it is what the report is about
        return None, _told(fault)
    return torch, ""


def _run(check: Check, torch: Any, index: int, where: str) -> dict[str, Any]:  # noqa: ANN401
    begun, error, reason = time.perf_counter(), None, None
    try:
        with torch.cuda.device(index):
            check(torch, f"cuda:{index}")
            torch.cuda.synchronize()
    except NotHereError as why:
        reason = str(why)
    except BaseException as fault:  # noqa: BLE001
        error = _told(fault)
    return _result(check.__name__, where, begun, error=error, reason=reason)


def _result(check: str, where: str, begun: float, *, error: str | None, reason: str | None = None) -> dict[str, Any]:
    ok = False if error else None if reason else True
    return {"check": check, "where": where, "ok": ok, "seconds": round(time.perf_counter() - begun, 2),
            "error": error or None, "reason": reason}  # fmt: skip


def _told(fault: BaseException) -> str:
    """The fault in a line, and where in the bundle it was raised."""
    frames = traceback.extract_tb(fault.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""  # noqa: PTH119
    return " ".join(f"{type(fault).__name__}: {fault}{where}".split())[:600]


def _module(name: str) -> Any:  # noqa: ANN401
    """A module of the bundle; NotHereError if it has none of that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as fault:
        if fault.name != name.partition(".")[0]:
            raise
        raise NotHereError(f"{name} is not in this bundle") from None


def _attention_of(torch: Any, device: str) -> Callable[..., Any]:  # noqa: ANN401
    """The implementation that SGLang would choose, as far as this bundle has it."""
    if device == "cpu":
        return _sdpa
    if torch.cuda.get_device_capability(device) == (9, 0) and importlib.util.find_spec("sgl_kernel"):
        return _flash_attention
    if importlib.util.find_spec("flashinfer") and importlib.util.find_spec("flashinfer_jit_cache"):
        return _flashinfer
    return _sdpa


def _flash_attention(torch: Any, q: Any, k: Any, v: Any) -> Any:  # noqa: ANN401
    bounds = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    flash = importlib.import_module("sgl_kernel.flash_attn")
    found = flash.flash_attn_varlen_func(q, k, v, bounds, bounds, len(q), len(q), causal=True)
    return found[0] if isinstance(found, tuple) else found


def _flashinfer(_torch: Any, q: Any, k: Any, v: Any) -> Any:  # noqa: ANN401
    return importlib.import_module("flashinfer").single_prefill_with_kv_cache(q, k, v, causal=True)


def _sdpa(torch: Any, q: Any, k: Any, v: Any) -> Any:  # noqa: ANN401
    rows = [one.transpose(0, 1)[None] for one in (q, k, v)]
    found = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
    return found[0].transpose(0, 1)


def _random(torch: Any, shape: tuple[int, ...], dtype: str) -> Any:  # noqa: ANN401
    return torch.randn(*shape).to(getattr(torch, dtype))


def _close(found: Any, wanted: Any, dtype: str) -> None:  # noqa: ANN401
    """ArithmeticError if the results differ by more than rounding; a NaN does, too."""
    found = found.double().cpu()
    if found.shape != wanted.shape:
        raise ArithmeticError(f"the result's shape is {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= _TOLERANCE[dtype]:
        raise ArithmeticError(f"wrong results in {dtype}: they differ by {error:.1e} from the CPU's")


if __name__ == "__main__":
    sys.exit(main())

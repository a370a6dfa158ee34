"""Check a bundle that was composed with the overlay `lean`, on a GPU host: the rest works, calls to stubs fail clearly.

    BUNDLE/bin/python tests/gpu/check_stubs.py [NAME ...]

Prints one JSON line per check: {"check", "ok", "seconds", ...}; `fault` is what PyTorch raised, `said` what the stub
wrote. Exit status 1 if a check failed. A server is checked by check_server.py.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

NVIDIA = Path(torch.__file__).parents[1] / "nvidia"
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


class Heard:
    """What was written to file descriptor 2, by C code too, while it listened."""

    text = ""


@contextlib.contextmanager
def listening():
    heard, kept = Heard(), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield heard
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            heard.text = file.read().decode(errors="replace")


def refused(call, library, *words):
    """`call` raises an error with these words, and the stub of `library` named a function and the bundle."""
    with listening() as heard:
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:
            fault = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        else:
            raise AssertionError("the call went through")
    lines = [line for line in heard.text.splitlines() if f" of {library} is not in this bundle: " in line]
    assert len(lines) == 1, heard.text
    assert "--overlay lean" in lines[0], lines
    assert all(word in fault for word in words), fault
    return {"fault": fault, "said": lines[0]}


def close(found, wanted, tolerance):
    found, wanted = found.double(), wanted.double()
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"
    return {"error": float(f"{error:.2e}")}


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


# ---- what must still work ------------------------------------------------------------------------------------------


@check
def nothing_calls_a_stub_while_torch_starts():
    code = "import torch; torch.ones(3, device='cuda').sum().item(); torch.backends.cudnn.version()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "is not in this bundle" in done.stderr) == (0, False), done.stderr
    return {}


@check
def matmul():
    found = {}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        a, b = random(512, 1024, dtype=dtype), random(1024, 256, dtype=dtype)
        found[str(dtype)] = close(a @ b, a.double() @ b.double(), tolerance)["error"]
    return found


@check
def matmul_fp8():
    a, b = random(64, 128).to(torch.float8_e4m3fn), random(32, 128).to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    out = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return close(out, a.double() @ b.double().t(), 1e-2)


@check
def convolution():
    x, w = random(2, 8, 64, 64, dtype=torch.float16), random(16, 8, 3, 3, dtype=torch.float16)
    wanted = torch.nn.functional.conv2d(x.double().cpu(), w.double().cpu()).cuda()
    return close(torch.nn.functional.conv2d(x, w), wanted, 2e-3)


@check
def attention():
    q, k, v = (random(2, 4, 128, 64, dtype=torch.float16) for _ in range(3))
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double().cpu(), k.double().cpu(), v.double().cpu())
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        found[backend.name] = close(out, wanted.cuda(), 5e-3)["error"]
    return found


@check
def random_numbers_and_sampling():
    torch.manual_seed(1)
    first = torch.rand(1000, device="cuda")
    torch.manual_seed(1)
    assert torch.equal(first, torch.rand(1000, device="cuda"))
    picked = torch.multinomial(torch.tensor([0.0, 1.0, 0.0], device="cuda"), 5, replacement=True)
    assert picked.tolist() == [1] * 5
    return {"mean": round(first.mean().item(), 3)}


@check
def sort_and_softmax():
    x = random(64, 1000)
    values, _ = x.softmax(-1).topk(10)
    return close(values, x.double().softmax(-1).sort(descending=True).values[:, :10], 1e-5)


@check
def cuda_graph():
    x = random(256, 256, dtype=torch.bfloat16)
    out = x @ x
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x @ x
    x.fill_(1.0)
    graph.replay()
    assert (out == 256).all()
    return {}


@check
def all_reduce():
    import torch.distributed as distributed

    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        x = torch.ones(1000, device="cuda")
        distributed.all_reduce(x)
        assert x.sum().item() == 1000
        distributed.destroy_process_group()
    return {}


# ---- what must be refused ------------------------------------------------------------------------------------------


@check
def fft():
    return refused(lambda: torch.fft.rfft(random(64)), "libcufft.so.11", "cuFFT error", "CUFFT_NOT_SUPPORTED")


@check
def fft_on_the_cpu_still_works():
    return close(torch.fft.irfft(torch.fft.rfft(torch.arange(8.0))), torch.arange(8.0), 1e-6)


@check
def sparse_matrix():
    matrix = random(64, 64).relu().to_sparse_csr()
    return refused(lambda: matrix @ random(64, 8), "libcusparse.so.12", "CUDA error", "not in the bundle")


@check
def semi_structured():
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    dense = torch.tensor([0, 0, 1, 1], device="cuda", dtype=torch.float16).tile(128, 32)
    compress = SparseSemiStructuredTensorCUSPARSELT.from_dense
    return refused(lambda: compress(dense), "libcusparseLt.so.0", "cusparseLtInit")


@check
def factorisations():
    x = random(64, 64)
    found = refused(lambda: torch.linalg.cholesky(x @ x.T + 64 * torch.eye(64, device="cuda")),
                    "libcusolver.so.11", "cusolver error")  # fmt: skip
    for function in (torch.linalg.qr, torch.linalg.svd):
        with contextlib.suppress(RuntimeError):
            function(x)
            raise AssertionError(f"{function.__name__} went through")
    return found


@check
def recurrent_layer():
    def through_cudnn():
        return torch.nn.LSTM(16, 16).cuda()(random(4, 2, 16))

    found = refused(through_cudnn, "libcudnn_adv.so.9", "CUDNN_STATUS_NOT_SUPPORTED")
    with torch.backends.cudnn.flags(enabled=False):
        layer = torch.nn.LSTM(16, 16).cuda()
        assert layer(random(4, 2, 16))[0].shape == (4, 2, 16)
    return found


@check
def direct_storage():
    with tempfile.NamedTemporaryFile() as file:
        return refused(lambda: torch.cuda.gds.GdsFile(file.name, os.O_RDWR), "libcufile.so.0", "cuFileHandleRegister",
                       "not supported")  # fmt: skip


@check
def curand_host_interface():
    library = ctypes.CDLL(str(NVIDIA / "curand/lib/libcurand.so.10"))
    with listening() as heard:
        status = library.curandCreateGenerator(ctypes.byref(ctypes.c_void_p()), 100)
    assert (status, "curandCreateGenerator" in heard.text) == (204, True), (status, heard.text)
    return {"status": status, "said": heard.text.strip()}


@check
def nvshmem_ends_the_process():
    code = f"import ctypes; ctypes.CDLL({str(NVIDIA / 'nvshmem/lib/libnvshmem_host.so.3')!r}).nvshmem_malloc(8)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = done.stderr.splitlines()[0]
    assert done.returncode == -signal.SIGABRT, done.returncode
    assert "nvshmem_malloc of libnvshmem_host.so.3 is not in this bundle" in said, done.stderr
    return {"said": said}


@check
def the_device_is_unharmed():
    return matmul()


def run(function):
    start = time.perf_counter()
    try:
        detail = {"ok": True, **function()}
    except Exception as fault:  # a check reports whatever goes wrong in it
        detail = {"ok": False, "fault": f"{type(fault).__name__}: {fault}", "where": traceback.format_exc(limit=-3)}
    print(
        json.dumps({"check": function.__name__, "seconds": round(time.perf_counter() - start, 2), **detail}), flush=True
    )
    return detail["ok"]


if __name__ == "__main__":
    torch.manual_seed(0)
    wanted = [function for function in CHECKS if not sys.argv[1:] or function.__name__ in sys.argv[1:]]
    results = [run(function) for function in wanted]
    sys.exit(1 if False in results or not results else 0)

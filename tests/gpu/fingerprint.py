"""Print the sha256 of what each operation computes, to compare a slimmed bundle with the unmodified one bit by bit.

    BUNDLE/bin/python tests/gpu/fingerprint.py [NAME ...] > results.jsonl

Inputs are made on the CPU from a fixed seed; algorithms are the deterministic ones. One JSON line per operation:
{"operation", "sha256", "repeatable", "error"}, or {"operation", "fault"} for one that failed. repeatable: a second run
gave the same bits. error: the largest difference from the same operation on the CPU, relative to its largest value, or
null where the CPU has no such operation. Exit status 1 if any failed, or differs by more than its precision allows.
"""

import hashlib
import json
import os
import sys

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.nn.functional as F

OPERATIONS = {}
DEVICE = "cuda"
# Relative to the largest value: fp8 and bf16 inputs, fp32 through TF32 or other orders of summation.
TOLERANCE = 2e-2
# The generators of the CPU give other numbers; one process is its own peer.
NO_REFERENCE = ("random_numbers", "nccl_all_reduce")


def operation(function):
    OPERATIONS[function.__name__] = function
    return function


def data(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@operation
def matmul_fp32():
    torch.backends.cuda.matmul.allow_tf32 = False
    return data(512, 768) @ data(768, 640)


@operation
def matmul_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    return data(512, 768) @ data(768, 640)


@operation
def matmul_bf16():
    return data(512, 768, dtype=torch.bfloat16) @ data(768, 640, dtype=torch.bfloat16)


@operation
def matmul_fp16_batched():
    return torch.bmm(data(8, 256, 512, dtype=torch.float16), data(8, 512, 128, dtype=torch.float16))


@operation
def linear_with_bias():
    x, w, b = (data(*shape, dtype=torch.bfloat16) for shape in ((96, 1024), (2048, 1024), (2048,)))
    return F.gelu(F.linear(x, w, b))


@operation
def matmul_fp64():
    return data(256, 384, dtype=torch.float64) @ data(384, 320, dtype=torch.float64)


@operation
def matmul_int8():
    a, b = ((data(*shape) * 30).to(torch.int8) for shape in ((256, 512), (512, 256)))
    return torch._int_mm(a, b)


@operation
def matmul_fp8():
    a, b = data(256, 512).to(torch.float8_e4m3fn), data(384, 512).to(torch.float8_e4m3fn)
    one = torch.ones((), device=DEVICE)
    return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)


@operation
def convolution():
    x, w = data(4, 32, 56, 56, dtype=torch.float16).requires_grad_(), data(64, 32, 3, 3, dtype=torch.float16)
    w.requires_grad_()
    out = F.conv2d(x, w, padding=1)
    out.float().square().mean().backward()
    return out, x.grad, w.grad


@operation
def convolution_fp32_3d():
    return F.conv3d(data(2, 8, 12, 20, 20), data(16, 8, 3, 3, 3))


@operation
def lstm():
    torch.manual_seed(3)
    layer = torch.nn.LSTM(64, 96, 2).to(DEVICE)
    return layer(data(20, 8, 64))[0]


def attention(backend, dtype=torch.bfloat16):
    q, k, v = (data(2, 8, 300 + one, 64, dtype=dtype)[:, :, :300] for one in range(3))
    with torch.nn.attention.sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@operation
def sdpa_flash():
    return attention(torch.nn.attention.SDPBackend.FLASH_ATTENTION)


@operation
def sdpa_efficient():
    return attention(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION, torch.float32)


@operation
def sdpa_cudnn():
    return attention(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)


@operation
def fft():
    return (
        torch.fft.rfft(data(64, 1000)),
        torch.fft.fft2(data(3, 96, 100)),
        torch.fft.irfft(torch.fft.rfft(data(8, 512))),
    )


@operation
def linalg():
    x = data(4, 48, 48, dtype=torch.float64)
    spd = x @ x.mT + 48 * torch.eye(48, device=DEVICE, dtype=torch.float64)
    return (
        torch.linalg.cholesky(spd), torch.linalg.solve(spd, x), torch.linalg.inv(spd), torch.linalg.eigvalsh(spd),
        torch.linalg.svdvals(x), torch.linalg.qr(x)[1].abs(), torch.linalg.det(spd),
    )  # fmt: skip


@operation
def sparse():
    dense = data(256, 384) * (data(256, 384) > 1)
    return dense.to_sparse_csr() @ data(384, 64), torch.sparse.mm(dense.to_sparse(), data(384, 64))


@operation
def elementwise_and_reductions():
    x = data(1000, 333)
    return (
        x.sum(), x.std(0), x.softmax(-1), x.cumsum(0), x.sort(-1)[0], x.topk(7)[0], F.layer_norm(x, (333,)),
        torch.erfinv(x.tanh()), x.logsumexp(0), x.median(), torch.special.i0(x), x.to(torch.complex64).exp(),
        F.embedding((x.abs() * 100).long().clamp(max=999), x), x.unique(), torch.histc(x, 50),
    )  # fmt: skip


@operation
def random_numbers():
    generator = torch.Generator("cuda").manual_seed(5)
    return torch.randn(999, generator=generator, device=DEVICE), torch.rand(7, generator=generator, device=DEVICE)


@operation
def interpolation_and_pooling():
    x = data(2, 3, 50, 50)
    return F.interpolate(x, size=77, mode="bicubic"), F.max_pool2d(x, 3), F.grid_sample(x, data(2, 9, 9, 2).tanh())


@operation
def nccl_all_reduce():
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29517")}
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda:0"))
    try:
        x = data(5000, dtype=torch.bfloat16)
        dist.all_reduce(x)
        parts = torch.empty_like(x)
        dist.all_gather_into_tensor(parts, x)
        dist.barrier()
        assert torch.equal(x, data(5000, dtype=torch.bfloat16)), "the sum over one process is not its input"
        return x, parts
    finally:
        dist.destroy_process_group()


@operation
def sgl_rmsnorm():
    import sgl_kernel

    return sgl_kernel.rmsnorm(data(64, 4096, dtype=torch.bfloat16), data(4096, dtype=torch.bfloat16), 1e-6)


@operation
def sgl_silu_and_mul():
    import sgl_kernel

    return sgl_kernel.silu_and_mul(data(64, 8192, dtype=torch.bfloat16))


@operation
def sgl_fp8_gemm():
    import sgl_kernel

    a, b = data(128, 512).to(torch.float8_e4m3fn), data(256, 512).to(torch.float8_e4m3fn)
    scales = torch.ones(128, 1, device=DEVICE), torch.ones(256, 1, device=DEVICE)
    return sgl_kernel.fp8_scaled_mm(a, b.t(), *scales, torch.bfloat16)


@operation
def sgl_flash_attention_3():
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    bounds = torch.tensor([0, 17, 145, 445], device=DEVICE, dtype=torch.int32)
    q, k, v = (data(445, heads, 128, dtype=torch.bfloat16) for heads in (8, 2, 2))
    out = flash_attn_varlen_func(q, k, v, bounds, bounds, 300, 300, causal=True)
    return out[0] if isinstance(out, tuple) else out


@operation
def sgl_topk_softmax():
    import sgl_kernel

    weights = torch.empty(33, 8, device=DEVICE)
    indices = torch.empty(33, 8, device=DEVICE, dtype=torch.int32)
    sgl_kernel.topk_softmax(weights, indices, data(33, 64))
    return weights, indices


@operation
def semi_structured():
    """cuSPARSELt, through torch. Not run unless named: under eager loading it stalls in the unmodified stack, too."""
    w = torch.tensor([0.0, 0.0, 1.0, 1.0], device=DEVICE).tile((128, 32)).half() * data(128, 128, dtype=torch.float16)
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    SparseSemiStructuredTensor._FORCE_CUTLASS = False
    return to_sparse_semi_structured(w) @ data(128, 128, dtype=torch.float16)


def flat(found):
    for one in found if isinstance(found, (tuple, list)) else (found,):
        one = one.detach().cpu().contiguous()
        one = torch.view_as_real(one) if one.is_complex() else one
        yield one.reshape(-1).view(torch.uint8).numpy().tobytes()


def on_the_cpu(function):
    """What the operation gives there, or None where it does not exist."""
    global DEVICE
    DEVICE = "cpu"
    try:
        return function() if function.__name__ not in NO_REFERENCE else None
    except Exception:  # an operation of the GPU alone
        return None
    finally:
        DEVICE = "cuda"


def difference(found, wanted):
    if wanted is None:
        return None
    errors = [0.0]
    for one, other in zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (found, wanted)), strict=True):
        one, other = (x.detach().cpu().to(torch.complex128 if x.is_complex() else torch.float64) for x in (one, other))
        errors.append(((one - other).abs().max() / other.abs().max().clamp(min=1e-6)).item())
    return float(f"{max(errors):.1e}")


def digest(found):
    total = hashlib.sha256()
    for one in flat(found):
        total.update(one)
    return total.hexdigest()


def result_of(function):
    try:
        found = function()
        first, second = digest(found), digest(function())
        torch.cuda.synchronize()
        return {"sha256": first, "repeatable": first == second, "error": difference(found, on_the_cpu(function))}
    except Exception as fault:  # every fault is a result
        return {"fault": f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"}


if __name__ == "__main__":
    torch.backends.cudnn.deterministic = True
    names = sys.argv[1:] or [name for name in OPERATIONS if name != "semi_structured"]
    faults = 0
    for name in names:
        result = result_of(OPERATIONS[name])
        faults += "fault" in result or (result["error"] or 0) > TOLERANCE
        print(json.dumps({"operation": name, **result}), flush=True)
    sys.exit(bool(faults))

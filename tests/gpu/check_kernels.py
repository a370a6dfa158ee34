"""Check a bundle's kernels against references in PyTorch, on a GPU host.

    BUNDLE/bin/python tests/gpu/check_kernels.py [NAME ...]

Prints one JSON line per check: {"check", "ok", "seconds", ...}; `"ok": null` with a `reason` is a check that could not
be run. Exit status 1 if a check failed.
"""

import itertools
import json
import os
import sys
import time
import traceback

# Inductor's pool of compiling processes was seen to wait for its own end for 300 s; one process compiles as well.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
import triton_kernels as kernels

CHECKS = []


class NotRunError(Exception):
    """The check makes no sense here; its text is the reason."""


def check(function):
    CHECKS.append(function)
    return function


def close(found, wanted, tolerance):
    """The largest difference relative to the largest wanted value; an error above `tolerance`."""
    found, wanted = found.float(), wanted.float()
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    error = ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"
    return {"error": float(f"{error:.2e}")}


def holds(condition, evidence):
    assert condition, evidence
    return {}


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def microseconds(function, count=2000):
    for _ in range(50):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    spent = (time.perf_counter() - start) / count * 1e6
    torch.cuda.synchronize()
    return round(spent, 2)


# ---- PyTorch and sgl_kernel ----------------------------------------------------------------------------------------


@check
def host():
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(), "sm": f"{major}{minor}", "torch": torch.__version__,
        "python": sys.version.split()[0], "prefix": sys.prefix, "uid": os.getuid(),
    }  # fmt: skip


@check
def matmul():
    found = {}
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        a, b = random(1024, 2048, dtype=dtype), random(2048, 512, dtype=dtype)
        found[str(dtype)] = close(a @ b, a.double() @ b.double(), tolerance)["error"]
    return found


@check
def convolution():
    x, w = random(2, 8, 64, 64, dtype=torch.float16), random(16, 8, 3, 3, dtype=torch.float16)
    wanted = torch.nn.functional.conv2d(x.double().cpu(), w.double().cpu()).cuda()
    return close(torch.nn.functional.conv2d(x, w), wanted, 2e-3)


@check
def rmsnorm():
    import sgl_kernel

    x, weight = random(64, 4096), random(4096)
    wanted = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6) * weight.float()
    return close(sgl_kernel.rmsnorm(x, weight, 1e-6), wanted, 1e-2)


@check
def silu_and_mul():
    import sgl_kernel

    x = random(64, 8192)
    gate, up = x.float().chunk(2, -1)
    return close(sgl_kernel.silu_and_mul(x), torch.nn.functional.silu(gate) * up, 1e-2)


def attention(q, k, v, offset=0):
    """Causal attention of one sequence, [tokens, heads, dim], in float64; queries begin at position `offset`."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    row = torch.arange(q.shape[1], device=q.device)[:, None] + offset
    scores.masked_fill_(torch.arange(k.shape[1], device=q.device)[None] > row, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


@check
def fa3_varlen():
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    found = {}
    lengths = [17, 128, 300]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    for dim in (64, 128):
        q, k, v = (random(sum(lengths), heads, dim) for heads in (8, 2, 2))
        out = flash_attn_varlen_func(q, k, v, bounds, bounds, max(lengths), max(lengths), causal=True)
        out = out[0] if isinstance(out, tuple) else out
        ends = bounds.tolist()
        wanted = torch.cat([attention(q[a:b], k[a:b], v[a:b]) for a, b in itertools.pairwise(ends)])
        found[f"dim {dim}"] = close(out, wanted, 2e-2)["error"]
    return found


@check
def fa3_paged():
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    lengths, page, dim = [5, 64, 200], 16, 64
    pages = torch.randperm(63, device="cuda").int().view(3, -1)
    k_cache, v_cache = random(64, page, 2, dim), random(64, page, 2, dim)
    q = random(3, 1, 8, dim)
    sizes = torch.tensor(lengths, device="cuda").int()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=sizes, page_table=pages, causal=True)
    out = out[0] if isinstance(out, tuple) else out
    rows = []
    for index, size in enumerate(lengths):
        k, v = (cache[pages[index].long()].flatten(0, 1)[:size] for cache in (k_cache, v_cache))
        rows.append(attention(q[index], k, v, offset=size - 1))
    return close(out, torch.stack(rows), 2e-2)


# ---- what sglang compiled on the host before it was patched ----------------------------------------------------------


def rotated(x, cache, positions, neox):
    """Rotary embedding of [tokens, heads, dim] in float32; `cache` holds cosines, then sines."""
    cos, sin = (part[:, None] for part in cache[positions].chunk(2, -1))
    half = cos.shape[-1]
    turned, rest = x.float()[..., : 2 * half], x.float()[..., 2 * half :]
    one, two = turned.chunk(2, -1) if neox else (turned[..., ::2], turned[..., 1::2])
    parts = one * cos - two * sin, two * cos + one * sin
    turned = torch.cat(parts, -1) if neox else torch.stack(parts, -1).flatten(-2)
    return torch.cat((turned, rest), -1)


def rope_case(dim, rotary, tokens=37):
    angle = torch.arange(512, device="cuda")[:, None] * 10000.0 ** (
        -torch.arange(rotary // 2, device="cuda") / rotary * 2
    )
    cache = torch.cat((angle.cos(), angle.sin()), -1)
    positions = torch.randint(0, 512, (tokens,), device="cuda", dtype=torch.int32)
    qkv = random(tokens, (8 + 2 + 2) * dim)
    q, k, v = qkv.split((8 * dim, 2 * dim, 2 * dim), -1)
    return cache, positions, q, k, v


@check
def rope():
    from sglang.jit_kernel.rope import apply_rope_with_cos_sin_cache_inplace

    found = {}
    for dim, rotary, neox in ((64, 64, True), (128, 128, False), (128, 64, True), (256, 256, True)):
        cache, positions, q, k, _ = rope_case(dim, rotary)
        wanted = [rotated(x.reshape(len(x), -1, dim), cache, positions.long(), neox) for x in (q, k)]
        apply_rope_with_cos_sin_cache_inplace(positions, q, k, dim, cache, neox)
        for name, x, w in zip("qk", (q, k), wanted, strict=True):
            found[f"{name} {dim}/{rotary}"] = close(x.reshape(len(x), -1, dim), w, 1e-2)["error"]
    return found


@check
def rope_with_kv_store():
    from sglang.jit_kernel.rope import FusedSetKVBufferArg, apply_rope_with_cos_sin_cache_inplace

    cache, positions, q, k, v = rope_case(64, 64)
    k_buffer, v_buffer = (torch.zeros(500, 2 * 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    places = torch.randperm(500, device="cuda")[: len(q)]
    wanted, values = rotated(k.reshape(len(k), -1, 64), cache, positions.long(), True), v.clone()
    store = FusedSetKVBufferArg(v, k_buffer, v_buffer, None, None, places)
    apply_rope_with_cos_sin_cache_inplace(positions, q, k, 64, cache, True, store)
    assert torch.equal(v_buffer[places], values)
    untouched = torch.ones(500, dtype=torch.bool, device="cuda").index_fill_(0, places, False)
    assert not k_buffer[untouched].any()
    assert not v_buffer[untouched].any()
    return close(k_buffer[places].view(len(k), -1, 64), wanted, 1e-2)


@check
def rotary_embedding():
    from sglang.jit_kernel.pos_enc import rotary_embedding as apply

    cache, positions, q, k, _ = rope_case(96, 96)
    cache = cache.to(q.dtype)
    wanted = rotated(q.reshape(len(q), -1, 96), cache.float(), positions.long(), True)
    q, k = q.contiguous(), k.contiguous()
    apply(positions.long(), q, k, 96, cache, True)
    return close(q.reshape(len(q), -1, 96), wanted, 2e-2)


@check
def kv_store():
    from sglang.jit_kernel.kvcache import can_use_store_cache, store_cache

    assert can_use_store_cache(256)
    assert not can_use_store_cache(100)
    for width, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (1024, torch.bfloat16), (128, torch.uint8)):
        for contiguous in (False, True):
            data = (random(50, 3 * width, dtype=torch.float32) * 50).to(dtype)
            k, v = data[:, :width], data[:, width : 2 * width]
            k = k.contiguous() if contiguous else k  # strides differ from v's then
            caches = [torch.zeros(300, width, device="cuda", dtype=dtype) for _ in range(2)]
            wanted = [cache.clone() for cache in caches]
            places = torch.randperm(300, device="cuda")[:50]
            for cache, x in zip(wanted, (k, v), strict=True):
                cache[places] = x
            store_cache(k, v, *caches, places, row_bytes=width * dtype.itemsize)
            assert all(map(torch.equal, caches, wanted)), (width, dtype, contiguous)
    return {}


@check
def fp8_per_tensor():
    from sglang.jit_kernel.per_tensor_quant_fp8 import per_tensor_quant_fp8

    x = random(33, 4096)
    quantized, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.zeros(1, device="cuda")
    per_tensor_quant_fp8(x, quantized, scale, is_static=False)
    close(scale, (x.float().abs().max() / 448).reshape(1), 1e-5)
    return close(quantized.float() * scale, x, 7e-2)


@check
def hadamard():
    from sgl_kernel import hadamard_transform

    matrix = torch.ones(1, 1, device="cuda")
    while len(matrix) < 128:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = random(16, 128)
    return close(hadamard_transform(x, 128**-0.5), x.float() @ matrix * 128**-0.5, 2e-2)


@check
def no_toolchain_says_so():
    from sglang.jit_kernel.utils import _missing_tools, load_jit

    missing = _missing_tools()
    if not missing:
        raise NotRunError("this host has nvcc, ninja and c++ on PATH")
    try:
        load_jit("example")
    except RuntimeError as fault:
        return {"message": str(fault), **holds("example" in str(fault), fault)}
    raise AssertionError("load_jit went on without " + ", ".join(missing))


# ---- FlashInfer and xgrammar -----------------------------------------------------------------------------------------


@check
def flashinfer_attention():
    import flashinfer
    from flashinfer.jit.env import has_flashinfer_jit_cache

    if not has_flashinfer_jit_cache():
        raise NotRunError("flashinfer-jit-cache is not in this bundle, and compiling its kernels needs nvcc")
    q, k, v = random(100, 8, 128), random(100, 2, 128), random(100, 2, 128)
    return close(flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True), attention(q, k, v), 2e-2)


@check
def grammar_bitmask():
    import sgl_kernel
    import xgrammar

    words = ["<eos>", "{", "}", '"', "a", "b", ":", "1", ",", "true"]
    info = xgrammar.TokenizerInfo(words, stop_token_ids=[0])
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(schema, any_whitespace=False)
    matcher = xgrammar.GrammarMatcher(compiled)
    bitmask = xgrammar.allocate_token_bitmask(1, len(words))
    matcher.fill_next_token_bitmask(bitmask)
    allowed = []
    for apply in (xgrammar.apply_token_bitmask_inplace, sgl_kernel.apply_token_bitmask_inplace_cuda):
        logits = torch.zeros(1, len(words), device="cuda")
        apply(logits, bitmask.cuda())
        allowed.append([words[i] for i in range(len(words)) if logits[0, i] == 0])
    assert allowed == [["{"], ["{"]], allowed
    return {}


# ---- Triton through the prebuilt launcher ----------------------------------------------------------------------------


@check
def triton_uses_the_prebuilt_launcher():
    from triton.backends.nvidia import _composer_launch as extension
    from triton.runtime.driver import driver

    assert driver.active.utils.load_binary is extension.load_binary
    return {"file": os.path.relpath(extension.__file__, sys.prefix)}


@check
def triton_pointers():
    left, right = random(10000, dtype=torch.float32), random(10000, dtype=torch.float32)
    out = torch.empty_like(left)
    for ctas in (1, 2):
        out.zero_()
        kernels.add[(10, 1, 1)](left, right, out, 10000, BLOCK=1024, num_ctas=ctas)
        assert torch.equal(out, left + right), f"num_ctas={ctas}"
    try:
        kernels.add[(10,)](left.cpu(), right, out, 10000, BLOCK=1024)
    except ValueError as fault:
        holds("cpu tensor" in str(fault), fault)
    else:
        raise AssertionError("a tensor of the host was accepted")
    return {}


@check
def triton_scalars():
    whole = torch.zeros(4, device="cuda", dtype=torch.int64)
    real = torch.zeros(4, device="cuda", dtype=torch.float64)
    for flag in (True, False):
        kernels.scalars[(1,)](whole, real, -77, -(2**40) - 3, 2**63 + 5, flag, 1.1, 1.1, 1.1, 1.1)
        assert whole.tolist() == [-77, -(2**40) - 3, 5 - 2**63, 7 if flag else 8], whole.tolist()
    number = torch.tensor(1.1, dtype=torch.float64)
    wanted = [number.float().item(), number.half().item(), 1.09375, 1.1]  # bf16 arguments are truncated by Triton
    assert real.tolist() == wanted, (real.tolist(), wanted)
    return {}


@check
def triton_tuples():
    value, out = torch.full((1,), 3.0, device="cuda"), torch.zeros(1, device="cuda")
    kernels.tuples[(1,)]((value, 5), ((7,), 2.5), out)
    assert out.item() == 24.5, out.item()
    return {}


@check
def triton_tensor_descriptor():
    if torch.cuda.get_device_capability()[0] < 9:
        raise NotRunError("tensor maps need SM 90")
    for dtype in (torch.float16, torch.float32, torch.int8):
        source = (random(256, 512, dtype=torch.float32) * 20).to(dtype)
        target = torch.zeros_like(source)
        block = [64, 64]
        source_map, target_map = (kernels.TensorDescriptor.from_tensor(x, block) for x in (source, target))
        kernels.copy_tile[(4, 8)](source_map, target_map, 64, 64)
        assert torch.equal(source, target), dtype
    return {}


@check
def triton_dependent_launch():
    if torch.cuda.get_device_capability()[0] < 9:
        raise NotRunError("programmatic dependent launch needs SM 90")
    x = random(10000, dtype=torch.float32)
    middle, out = torch.zeros_like(x), torch.zeros_like(x)
    kernels.dependent[(10,)](x, middle, 10000, BLOCK=1024, launch_pdl=True)
    kernels.dependent[(10,)](middle, out, 10000, BLOCK=1024, launch_pdl=True)
    assert torch.equal(out, x * 4)
    return {}


@check
def triton_in_a_cuda_graph():
    x = random(4096, dtype=torch.float32)
    out = torch.zeros_like(x)
    kernels.add[(4,)](x, x, out, 4096, BLOCK=1024)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.add[(4,)](x, x, out, 4096, BLOCK=1024)
    x.fill_(21.0)
    graph.replay()
    assert (out == 42).all()
    return {}


@check
def triton_launch_cost():
    a = random(16, dtype=torch.float32)
    launch = kernels.nothing[(1,)]
    compiled = launch(a, a, a, a, 17, 18, 19, 0.5)
    stream = torch.cuda.current_stream().cuda_stream
    metadata = compiled.packed_metadata
    run, function = compiled.run, compiled.function
    bare = microseconds(lambda: run(1, 1, 1, stream, function, metadata, None, None, None, a, a, a, a, 17, 18, 19, 0.5))
    return {"whole_us": microseconds(lambda: launch(a, a, a, a, 17, 18, 19, 0.5)), "launcher_us": bare}


@check
def inductor():
    @torch.compile
    def fused(x, y):
        return torch.nn.functional.gelu(x) * y + x.sum(-1, keepdim=True)

    x, y = random(64, 512, dtype=torch.float32), random(64, 512, dtype=torch.float32)
    return close(fused(x, y), torch.nn.functional.gelu(x) * y + x.sum(-1, keepdim=True), 1e-5)


def run(function):
    start = time.perf_counter()
    try:
        detail = {"ok": True, **function()}
    except NotRunError as reason:
        detail = {"ok": None, "reason": str(reason)}
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

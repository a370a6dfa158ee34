"""Check FlashInfer's kernels from flashinfer-jit-cache against references in PyTorch, on a GPU host without a compiler.

    BUNDLE/bin/python tests/gpu/flashinfer_aot.py [FOLDER]

FOLDER: the unpacked wheel, where it is not in the bundle. What needs a module that its set lacks is not run. Prints one
JSON line per check as check_kernels.py does; the last ones say which modules were used, and that nothing was compiled.
Exit status 1 if a check failed.
"""

import functools
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else "")
os.environ["FLASHINFER_WORKSPACE_BASE"] = tempfile.mkdtemp(prefix="flashinfer-")
# FlashInfer then raises MissingJITCacheError instead of compiling.
os.environ["FLASHINFER_DISABLE_JIT"] = "1"
os.environ["PATH"] = "/nonexistent"

import flashinfer
import flashinfer_jit_cache
import torch
from check_kernels import NotRunError, attention, close, holds, random, rope_case, rotated, run
from flashinfer.jit.core import JitSpec

WORKSPACE = Path(os.environ["FLASHINFER_WORKSPACE_BASE"])
CACHE = Path(flashinfer_jit_cache.get_jit_cache_dir())
CHECKS = []
LOADED = set()
QUERIES, HEADS, KV_HEADS, DIM, PAGE = 8, 8, 2, 128, 16
LENGTHS = (45, 8, 300, 22)


def check(*modules):
    """A check that needs modules whose names begin so; with none it needs all."""

    def register(function):
        @functools.wraps(function)
        def checked():
            missing = [one for one in modules if not any(name.startswith(one) for name in flashinfer_jit_cache.MODULES)]
            if missing:
                raise NotRunError(f"not in this set: {', '.join(missing)}")
            return function()

        CHECKS.append(checked)
        return checked

    return register


def watch_loading():
    """Keep a record of every module that FlashInfer opens."""
    load = JitSpec.load

    def recorded(spec, path):
        LOADED.add(Path(path))
        return load(spec, path)

    JitSpec.load = recorded


def numbers(*values):
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def starts(lengths):
    """Where each part of a ragged tensor begins, and where the last one ends."""
    return numbers(0, *torch.tensor(lengths).cumsum(0).tolist())


def workspace():
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


@functools.cache
def paged():
    """Keys and values of LENGTHS, appended to pages in no order: the cache, its three index tensors, keys, values."""
    pages = [-(-length // PAGE) for length in LENGTHS]
    cache = torch.zeros(2 * sum(pages), 2, PAGE, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    indices = torch.randperm(len(cache), device="cuda")[: sum(pages)].int()
    last = numbers(*(length - PAGE * (count - 1) for length, count in zip(LENGTHS, pages, strict=True)))
    k, v = (random(sum(LENGTHS), KV_HEADS, DIM) for _ in range(2))
    rows = numbers(*(row for row, length in enumerate(LENGTHS) for _ in range(length)))
    places = numbers(*(place for length in LENGTHS for place in range(length)))
    flashinfer.append_paged_kv_cache(k, v, rows, places, cache, indices, starts(pages), last)
    return cache, (starts(pages), indices, last), k, v


def per_request(queries, wanted):
    """Attention of each request's last `wanted` tokens with `queries`, one request after the other."""
    _, _, k, v = paged()
    out = []
    for q, keys, values in zip(queries.split(wanted), k.split(LENGTHS), v.split(LENGTHS), strict=True):
        out.append(attention(q, keys, values, offset=len(keys) - len(q)))
    return torch.cat(out)


@check()
def modules():
    import tvm_ffi

    for name in flashinfer_jit_cache.MODULES:
        tvm_ffi.load_module(str(CACHE / name / f"{name}.so"))
    major, minor = torch.cuda.get_device_capability()
    holds(flashinfer_jit_cache.ARCH.rstrip("af") == f"{major}.{minor}", flashinfer_jit_cache.ARCH)
    return {
        "modules": len(flashinfer_jit_cache.MODULES), "arch": flashinfer_jit_cache.ARCH,
        "nvcc": flashinfer_jit_cache.CUDA, "torch": torch.__version__, "gpu": torch.cuda.get_device_name(),
    }  # fmt: skip


@check("page")
def page_append():
    cache, (indptr, indices, _), k, v = paged()
    for row, (keys, values) in enumerate(zip(k.split(LENGTHS), v.split(LENGTHS), strict=True)):
        pages = cache[indices[indptr[row] : indptr[row + 1]].long()]
        found = [pages[:, side].reshape(-1, KV_HEADS, DIM)[: len(keys)] for side in (0, 1)]
        assert torch.equal(found[0], keys), row
        assert torch.equal(found[1], values), row
    return {}


def decode(**options):
    cache, index, _, _ = paged()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", **options)
    wrapper.plan(*index, HEADS, KV_HEADS, DIM, PAGE, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    q = random(len(LENGTHS), HEADS, DIM)
    return close(wrapper.run(q, cache), per_request(q, [1] * len(LENGTHS)), 1e-2)


@check("page", "batch_decode_with_kv_cache")
def batch_decode():
    return decode()


@check("page", "batch_prefill_with_kv_cache")
def batch_decode_on_tensor_cores():
    return decode(use_tensor_cores=True, backend="fa2")


def prefill_paged(backend):
    cache, index, _, _ = paged()
    lengths = [min(QUERIES, length) for length in LENGTHS]
    q = random(sum(lengths), HEADS, DIM)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend=backend)
    wrapper.plan(starts(lengths), *index, HEADS, KV_HEADS, DIM, PAGE, causal=True,
                 q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)  # fmt: skip
    return close(wrapper.run(q, cache), per_request(q, lengths), 1e-2)


def prefill_ragged(backend):
    _, _, k, v = paged()
    q = random(sum(LENGTHS), HEADS, DIM)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", backend=backend)
    wrapper.plan(starts(LENGTHS), starts(LENGTHS), HEADS, KV_HEADS, DIM, causal=True,
                 q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)  # fmt: skip
    return close(wrapper.run(q, k, v), per_request(q, list(LENGTHS)), 1e-2)


def needs_fa3(kind):
    if not any(name.startswith(kind) and name.endswith("_sm90") for name in flashinfer_jit_cache.MODULES):
        raise NotRunError(f"not in this set: {kind} with FlashAttention 3, which is for SM 90")


@check("page", "batch_prefill_with_kv_cache")
def batch_prefill_paged_fa2():
    return prefill_paged("fa2")


@check("page", "batch_prefill_with_kv_cache")
def batch_prefill_paged_fa3():
    needs_fa3("batch_prefill")
    return prefill_paged("fa3")


@check("page", "batch_prefill_with_kv_cache")
def batch_prefill_ragged_fa2():
    return prefill_ragged("fa2")


@check("page", "batch_prefill_with_kv_cache")
def batch_prefill_ragged_fa3():
    needs_fa3("batch_prefill")
    return prefill_ragged("fa3")


@check("page", "batch_attention_with_kv_cache")
def batch_attention():
    cache, (indptr, indices, _), _, _ = paged()
    lengths = [min(QUERIES, length) for length in LENGTHS]
    q = random(sum(lengths), HEADS, DIM)
    wrapper = flashinfer.BatchAttention("NHD")
    wrapper.plan(starts(lengths), indptr, indices, numbers(*LENGTHS), HEADS, KV_HEADS, DIM, DIM, PAGE, causal=True)
    return close(wrapper.run(q, cache)[0], per_request(q, lengths), 1e-2)


@check("single_prefill_with_kv_cache", "single_decode_with_kv_cache")
def single():
    q, k, v = random(100, HEADS, DIM), random(100, KV_HEADS, DIM), random(100, KV_HEADS, DIM)
    wanted = attention(q, k, v)
    found = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, backend="fa2")
    one = flashinfer.single_decode_with_kv_cache(q[-1], k, v)
    return {"prefill": close(found, wanted, 1e-2), "decode": close(one, wanted[-1], 1e-2)}


@check("single_prefill_with_kv_cache", "cascade")
def merged_states():
    q, k, v = random(1, HEADS, DIM), random(100, KV_HEADS, DIM), random(100, KV_HEADS, DIM)
    parts = []
    for half in (slice(0, 40), slice(40, 100)):
        part = flashinfer.single_prefill_with_kv_cache(q, k[half], v[half], backend="fa2", return_lse=True)
        parts += part
    found, _ = flashinfer.merge_state(*parts)
    return close(found, attention(q, k, v, offset=99), 1e-2)


def mla(backend):
    """Multi-head latent attention: values are the first 512 elements of the keys."""
    lengths, heads = (30, 200), 16
    pages = torch.randperm(sum(lengths), device="cuda").int()
    latent, rotary = random(sum(lengths), 1, 512), random(sum(lengths), 1, 64)
    q, q_rotary = random(len(lengths), heads, 512), random(len(lengths), heads, 64)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace(), backend=backend)
    wrapper.plan(starts([1] * len(lengths)), starts(lengths), pages, numbers(*lengths), heads, 512, 64, 1, False,
                 192**-0.5, torch.bfloat16, torch.bfloat16)  # fmt: skip
    found = wrapper.run(q, q_rotary, latent, rotary)
    wanted = []
    for row, places in enumerate(pages.long().split(lengths)):
        keys = torch.cat((latent, rotary), -1)[places, 0].double()
        scores = torch.cat((q, q_rotary), -1)[row].double() @ keys.T * 192**-0.5
        wanted.append(scores.softmax(-1) @ keys[:, :512])
    return close(found, torch.stack(wanted), 1e-2)


@check("batch_mla_attention")
def latent_attention_fa2():
    return mla("fa2")


@check("batch_mla_attention")
def latent_attention_fa3():
    needs_fa3("batch_mla")
    return mla("fa3")


@check("norm")
def norms():
    x, residual, weight = random(33, 4096), random(33, 4096), random(4096)

    def wanted(value):
        return value.float() * value.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt() * weight.float()

    plain = close(flashinfer.rmsnorm(x, weight), wanted(x), 1e-2)
    total, fused = x.float() + residual.float(), x.clone()
    flashinfer.fused_add_rmsnorm(fused, residual, weight)
    return {"plain": plain, "fused": close(fused, wanted(total), 1e-2), "sum": close(residual, total, 1e-2)}


@check("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
def activations():
    x = random(33, 8192)
    gate, up = x.float().chunk(2, -1)
    gelu, silu = torch.nn.functional.gelu, torch.nn.functional.silu
    return {
        "silu": close(flashinfer.silu_and_mul(x), silu(gate) * up, 1e-2),
        "gelu": close(flashinfer.gelu_and_mul(x), gelu(gate) * up, 1e-2),
        "gelu_tanh": close(flashinfer.gelu_tanh_and_mul(x), gelu(gate, approximate="tanh") * up, 1e-2),
    }


@check("rope")
def rope():
    cache, positions, q, k, _ = rope_case(DIM, DIM)
    q, k = q.contiguous(), k.contiguous()
    wanted = [rotated(x.reshape(len(x), -1, DIM), cache, positions.long(), True) for x in (q, k)]
    flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, q, k, DIM, cache, True)
    found = [close(x.view(len(x), -1, DIM), one, 1e-2) for x, one in zip((q, k), wanted, strict=True)]
    return {"queries": found[0], "keys": found[1]}


@check("sampling")
def sampling():
    logits = random(64, 32000, dtype=torch.float32) * 3
    probabilities = flashinfer.softmax(logits, temperature=0.7)
    evidence = {"softmax": close(probabilities, (logits / 0.7).softmax(-1), 1e-4)}
    best = probabilities.topk(20, -1)
    kept = torch.zeros_like(probabilities).scatter(-1, best.indices, best.values)
    evidence["top_k"] = close(flashinfer.top_k_renorm_probs(probabilities, 20), kept / kept.sum(-1, keepdim=True), 1e-3)
    chosen = flashinfer.top_k_top_p_sampling_from_probs(probabilities, 20, 0.9)
    holds(bool((best.indices == chosen[:, None]).any(-1).all()), "a token outside of the 20 most likely ones")
    three = torch.tensor([0.5, 0.3, 0.2], device="cuda").repeat(20000, 1)
    counts = flashinfer.sampling_from_probs(three).bincount(minlength=3) / len(three)
    return {**evidence, "frequencies": close(counts, three[0], 5e-2)}


@check("topk", "quantization")
def top_k_and_packed_bits():
    scores = torch.randperm(64 * 4096, device="cuda").view(64, 4096).float()
    values, places = flashinfer.top_k(scores, 50, sorted=True)
    assert torch.equal(values, scores.topk(50, -1).values)
    assert torch.equal(scores.gather(-1, places.long()), values)
    bits = torch.rand(1000, device="cuda") < 0.5
    weights = 2 ** torch.arange(7, -1, -1, device="cuda")
    assert torch.equal(flashinfer.packbits(bits), (bits.view(-1, 8) * weights).sum(-1).to(torch.uint8))
    return {}


@check("selective_state_update")
def mamba_state():
    batch, heads, dim, size = 4, 8, 64, 128
    state, x = random(batch, heads, dim, size), random(batch, heads, dim)
    dt = random(batch, heads, 1).expand(-1, -1, dim)
    a = (-torch.rand(heads, 1, 1, device="cuda")).expand(-1, dim, size)
    b, c, d = random(batch, 1, size), random(batch, 1, size), random(heads, 1).expand(-1, dim)
    bias = random(heads, 1).expand(-1, dim)
    step = torch.nn.functional.softplus(dt.float() + bias.float())[..., None]
    new = state.float() * (step * a).exp() + step * b.float()[:, :, None] * x.float()[..., None]
    wanted = (new * c.float()[:, :, None]).sum(-1) + d.float() * x.float()
    rows = torch.arange(batch, device="cuda")
    found = flashinfer.mamba.selective_state_update(
        state, x, dt, a, b, c, d, dt_bias=bias, dt_softplus=True, state_batch_indices=rows
    )
    return {"out": close(found, wanted, 2e-2), "state": close(state, new, 2e-2)}


@check()
def what_was_used():
    strangers = sorted(str(path) for path in LOADED if not path.is_relative_to(CACHE))
    holds(LOADED and not strangers, strangers or "no module was opened")
    return {"modules": sorted(path.stem for path in LOADED)}


@check()
def nothing_was_compiled():
    made = [path for path in WORKSPACE.rglob("*") if path.suffix in (".so", ".o", ".ninja", ".cubin")]
    return holds(not made, [str(path.relative_to(WORKSPACE)) for path in made])


if __name__ == "__main__":
    watch_loading()
    torch.manual_seed(0)
    sys.exit(1 if False in [run(function) for function in CHECKS] else 0)

// D = A * B for batches of 64x64 matrices of bfloat16, with sums in float32: each block fetches its two operands with
// bulk copies of the tensor memory accelerator (TMA) and multiplies them with warpgroup instructions (wgmma), which
// exist in code for sm_90a only. Code for any other architecture has plain loops in their place.
//
// Source: PTX ISA 9.0: "Asynchronous Warpgroup Level Matrix Instructions" (operands, descriptors, fragment of D),
// "cp.async.bulk", "mbarrier".

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

// Not an anonymous one: nvcc names what is in it after a hash of this file's path, and the bytes then depend on that.
namespace hopper {

constexpr int kSize = 64;
constexpr int kThreads = 128;  // a warpgroup
constexpr uint32_t kBytes = kSize * kSize * sizeof(__nv_bfloat16);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A core matrix has 8 rows of 16 bytes, which lie next to each other. An operand is 8 x 8 of them: one further along K
// is the next one in memory, one further along M or N is 8 further.
constexpr int kChunk = 8;                           // elements in 16 bytes
constexpr uint64_t kCore = 8 * 16;                  // bytes
constexpr uint64_t kAlongK = kCore;                 // the "leading dimension byte offset" of an operand that is K-major
constexpr uint64_t kAlongRows = kCore * kSize / 8;  // its "stride dimension byte offset"
constexpr int kDepth = 16;                          // K of one instruction

__device__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A descriptor without a swizzle: address, leading and stride offsets, each in units of 16 bytes.
__device__ uint64_t describe(uint32_t address) {
    return uint64_t{(address & 0x3FFFF) >> 4} | (kAlongK >> 4) << 16 | (kAlongRows >> 4) << 32;
}

__device__ void fetch(void *to, const void *from, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(to)), "l"(from), "r"(kBytes), "r"(barrier) : "memory");
}

__device__ void wait(uint32_t barrier) {
    uint32_t done = 0;
    while (!done) {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(barrier) : "memory");
    }
}

// Rows as they come, to core matrices.
__device__ void arrange(uint4 *to, const uint4 *from) {
    for (int i = threadIdx.x; i < kSize * kSize / kChunk; i += kThreads) {
        const int row = i / (kSize / kChunk), chunk = i % (kSize / kChunk);
        to[row / 8 * kSize + chunk * 8 + row % 8] = from[i];
    }
}

// 64x64 sums of products over 16; 32 of them are this thread's.
__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b));
}

__global__ void __launch_bounds__(kThreads) product(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *out) {
    __shared__ alignas(128) uint4 rows[2][kSize * kSize / kChunk];
    __shared__ alignas(128) uint4 operand[2][kSize * kSize / kChunk];
    __shared__ alignas(8) uint64_t flag;
    const size_t start = size_t{blockIdx.x} * kSize * kSize;
    const uint32_t barrier = shared_address(&flag);

    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(barrier) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(2 * kBytes)
                     : "memory");
        fetch(rows[0], a + start, barrier);
        fetch(rows[1], b + start, barrier);
    }
    __syncthreads();  // nobody asks a barrier that is not there yet
    wait(barrier);
    arrange(operand[0], rows[0]);
    arrange(operand[1], rows[1]);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads through another proxy
    __syncthreads();

    float d[32] = {};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < kSize / kDepth; ++k) {
        const uint32_t offset = k * (kDepth / kChunk) * static_cast<uint32_t>(kAlongK);
        multiply(d, describe(shared_address(operand[0]) + offset), describe(shared_address(operand[1]) + offset));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");

    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 32; ++i) {
        out[start + (row + i / 2 % 2 * 8) * kSize + column + i / 4 * 8 + i % 2] = d[i];
    }
}

#else

__global__ void __launch_bounds__(kThreads) product(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *out) {
    const size_t start = size_t{blockIdx.x} * kSize * kSize;
    for (int i = threadIdx.x; i < kSize * kSize; i += kThreads) {
        float sum = 0.0f;
        for (int k = 0; k < kSize; ++k) {
            sum += __bfloat162float(a[start + i / kSize * kSize + k]) *
                   __bfloat162float(b[start + i % kSize * kSize + k]);
        }
        out[start + i] = sum;
    }
}

#endif

// Memory of the device that is given back at the end of a block.
struct Memory {
    void *pointer = nullptr;
    ~Memory() { cudaFree(pointer); }
};

cudaError_t upload(Memory &memory, const void *from, size_t bytes) {
    const cudaError_t status = cudaMalloc(&memory.pointer, bytes);
    return status ? status : cudaMemcpy(memory.pointer, from, bytes, cudaMemcpyHostToDevice);
}

}  // namespace hopper

#define OFFERED extern "C" __attribute__((visibility("default")))

using namespace hopper;

// out[i] = a[i] * b[i]^T for `count` row-major 64x64 matrices on the host; returns a cudaError_t.
OFFERED int hopper_product(const uint16_t *a, const uint16_t *b, float *out, int count) {
    const size_t bytes = size_t(count) * kBytes;
    Memory left, right, result;
    cudaError_t status = upload(left, a, bytes);
    if (!status) status = upload(right, b, bytes);
    if (!status) status = cudaMalloc(&result.pointer, 2 * bytes);
    if (status) return status;
    product<<<count, kThreads>>>(static_cast<const __nv_bfloat16 *>(left.pointer),
                                 static_cast<const __nv_bfloat16 *>(right.pointer),
                                 static_cast<float *>(result.pointer));
    status = cudaGetLastError();
    if (!status) status = cudaDeviceSynchronize();
    return status ? status : cudaMemcpy(out, result.pointer, 2 * bytes, cudaMemcpyDeviceToHost);
}

// The first GPU, as a line of text; returns a cudaError_t.
OFFERED int hopper_device(char *text, int size) {
    cudaDeviceProp found;
    int driver = 0, runtime = 0;
    cudaError_t status = cudaGetDeviceProperties(&found, 0);
    if (!status) status = cudaDriverGetVersion(&driver);
    if (!status) status = cudaRuntimeGetVersion(&runtime);
    if (status) return status;
    std::snprintf(text, size, "%s, SM %d.%d, driver for CUDA %d.%d, runtime %d.%d", found.name, found.major,
                  found.minor, driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    return status;
}

// The name and the text of a cudaError_t.
OFFERED const char *hopper_error_name(int status) { return cudaGetErrorName(static_cast<cudaError_t>(status)); }
OFFERED const char *hopper_error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

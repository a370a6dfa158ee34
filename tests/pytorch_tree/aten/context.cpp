#include "macros.h"
#ifdef USE_MKL
#include <mkl_cblas.h>
#endif

extern "C" {
void kernel_DEFAULT(float *, const float *, int);
void kernel_AVX2(float *, const float *, int);
void kernel_AVX512(float *, const float *, int);
int generated_ops();
void c10_scale(float *, const float *, int);

const char *show_config() { return BUILD_FLAGS; }

void run_kernel(float *out, const float *in, int n) {
  if (__builtin_cpu_supports("avx512f")) return kernel_AVX512(out, in, n);
  if (__builtin_cpu_supports("avx2")) return kernel_AVX2(out, in, n);
  kernel_DEFAULT(out, in, n);
}

int threads() {
  int found = 0;
#pragma omp parallel reduction(+ : found)
  found += 1;
  return found;
}

int blas() {
#ifdef USE_MKL
  return cblas();
#else
  return 0;
#endif
}
}

// Compiled once for each level of the CPU; context.cpp chooses when it runs.
#define NAME_(level) kernel_##level
#define NAME(level) NAME_(level)
extern "C" void NAME(CPU_CAPABILITY)(float *out, const float *in, int n) {
  for (int i = 0; i < n; ++i) out[i] += in[i] * in[i];
}

// A loop that compilers vectorise with what they may use. It has no other way to run.
extern "C" void c10_scale(float *out, const float *in, int n) {
  for (int i = 0; i < n; ++i) out[i] = in[i] * 2.5f + out[i];
}

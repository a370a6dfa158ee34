/* A libcuda.so.1 that computes nothing and writes down what it is asked: enough of the driver API for Triton's
 * launcher and utilities, ours and the original ones. Addresses come back with bit 40 set, to show that the launcher
 * passes on what cuPointerGetAttribute answers.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

typedef struct { uint32_t id, pad; unsigned char value[64]; } Attribute;
typedef struct {
  uint32_t grid[3], block[3], shared;
  void *stream;
  Attribute *attributes;
  uint32_t count;
} Config;

static char text[1 << 16];
static int sizes[4096], size_count, pause_ms, fail_with;
static int context;

static void note(const char *word) { strncat(text, word, sizeof text - strlen(text) - 1); }
static void hex(const void *data, int size) {
  char two[3];
  for (int i = 0; i < size; ++i) {
    snprintf(two, 3, "%02x", ((const unsigned char *)data)[i]);
    note(two);
  }
  note(" ");
}

void fake_reset(const int *new_sizes, int count, int pause, int failure) {
  memcpy(sizes, new_sizes, sizeof(int) * (size_t)count);
  size_count = count; pause_ms = pause; fail_with = failure;
  text[0] = 0;
}
const char *fake_text(void) { return text; }

int cuLaunchKernelEx(const Config *config, void *function, void **params, void **extra) {
  char line[256];
  if (pause_ms)
    usleep((useconds_t)pause_ms * 1000);
  snprintf(line, sizeof line, "launch %u,%u,%u %u,%u,%u shared=%u stream=%p function=%p extra=%p ", config->grid[0],
           config->grid[1], config->grid[2], config->block[0], config->block[1], config->block[2], config->shared,
           config->stream, function, (void *)extra);
  note(line);
  for (uint32_t i = 0; i < config->count; ++i) {
    hex(&config->attributes[i].id, 4);
    hex(config->attributes[i].value, config->attributes[i].id == 4 ? 12 : 4);
  }
  note("| ");
  for (int i = 0; i < size_count; ++i) {
    if (sizes[i] == 128 && (uintptr_t)params[i] % 64)
      note("MISALIGNED ");
    hex(params[i], sizes[i]);
  }
  return fail_with;
}
int cuGetErrorString(int code, const char **out) { *out = code == 700 ? "an illegal address" : "some failure"; return 0; }
int cuPointerGetAttribute(void *out, int attribute, uint64_t pointer) {
  if (attribute != 3 || pointer == 0xbad) return 1;
  if (pointer == 0xdead) return 700;
  uint64_t answer = pointer | 1ull << 40;
  memcpy(out, &answer, 8);
  return 0;
}
int cuCtxGetCurrent(void **out) { *out = context ? &context : NULL; return 0; }
int cuCtxSetCurrent(void *value) { (void)value; context = 1; note("context "); return 0; }
int cuDevicePrimaryCtxRetain(void **out, int device) { (void)device; *out = &context; return 0; }
int cuDeviceGet(int *out, int ordinal) { if (ordinal > 7) return 101; *out = ordinal; return 0; }
int cuDeviceGetAttribute(int *out, int attribute, int device) {
  *out = attribute == 97 ? 232448 : attribute * 1000 + device;
  return 0;
}
int cuDriverGetVersion(int *out) { *out = 13010; return 0; }
int cuCtxGetDevice(int *out) { *out = 5; return 0; }
int cuModuleUnload(void *module) {
  char line[64];
  snprintf(line, sizeof line, "unload %p ", module);
  note(line);
  return 0;
}
int cuCtxGetLimit(size_t *out, int limit) { (void)limit; *out = 4096; return 0; }
int cuCtxSetLimit(int limit, size_t size) {
  char line[64];
  snprintf(line, sizeof line, "limit %d %zu ", limit, size);
  note(line);
  return 0;
}
int cuModuleLoadData(void **out, const void *image) {
  note("load ");
  note(image);
  note(" ");
  *out = (void *)0x1111;
  return strcmp(image, "broken") ? 0 : 200;
}
int cuModuleGetFunction(void **out, void *module, const char *name) {
  (void)module;
  note(name);
  note(" ");
  *out = (void *)0x2222;
  return 0;
}
int cuFuncGetAttribute(int *out, int attribute, void *function) { (void)function; *out = attribute * 8; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) {
  char line[64];
  if (attribute == 17) /* the mode of more shared memory, which only GPUs of SM 107 have */
    return 1;
  snprintf(line, sizeof line, "set %p %d %d ", function, attribute, value);
  note(line);
  return 0;
}
int cuFuncSetCacheConfig(void *function, int config) { (void)function; (void)config; note("cache "); return 0; }
int cuOccupancyMaxActiveClusters(int *out, void *function, const Config *config) {
  (void)function;
  hex(config->attributes[0].value, 12);
  *out = (int)config->grid[0] + (int)config->shared;
  return 0;
}
int cuTensorMapEncodeIm2col(unsigned char *map, int type, uint32_t rank, void *address, const uint64_t *shape,
                            const uint64_t *strides, const int *lower, const int *upper, uint32_t channels,
                            uint32_t pixels, const uint32_t *steps, int interleave, int swizzle, int promotion,
                            int fill) {
  char line[160];
  snprintf(line, sizeof line, "columns %d %u %p %u %u %d %d %d %d ", type, rank, address, channels, pixels, interleave,
           swizzle, promotion, fill);
  note(line);
  hex(shape, 8 * (int)rank);
  hex(strides, 8 * (int)rank);
  hex(lower, 4 * (int)(rank - 2));
  hex(upper, 4 * (int)(rank - 2));
  hex(steps, 4 * (int)rank);
  memset(map, 0x5a, 128);
  return 0;
}
int cuTensorMapEncodeTiled(unsigned char *map, int type, uint32_t rank, void *address, const uint64_t *shape,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int promotion, int fill) {
  char line[128];
  snprintf(line, sizeof line, "map %d %u %p %d %d %d %d ", type, rank, address, interleave, swizzle, promotion, fill);
  note(line);
  hex(shape, 8 * (int)rank);
  hex(strides, 8 * (int)rank);
  hex(box, 4 * (int)rank);
  hex(steps, 4 * (int)rank);
  for (int i = 0; i < 128; ++i)
    map[i] = (unsigned char)(i ^ type);
  return 0;
}

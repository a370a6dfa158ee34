#include "macros.h"

#include <nccl.h>
#ifdef USE_CUDNN
#include <cudnn.h>
#endif

extern "C" {
const char *cuda_arch_list() { return ARCH_LIST; }
int nccl_version() { return ncclVersion(); }
int cudnn_version() {
#ifdef USE_CUDNN
  return cudnnVersion();
#else
  return 0;
#endif
}
}

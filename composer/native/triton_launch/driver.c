#include "driver.h"

#include <dlfcn.h>

static Driver functions;

static const struct {
  const char *name;
  size_t offset;
  int optional;
} symbols[] = {
#define REQUIRED(name) {"cu" #name, offsetof(Driver, name), 0}
#define OPTIONAL(name) {"cu" #name, offsetof(Driver, name), 1}
    REQUIRED(GetErrorString),    REQUIRED(DriverGetVersion),
    REQUIRED(CtxGetDevice),      REQUIRED(ModuleUnload),
    REQUIRED(DeviceGet),
    REQUIRED(DeviceGetAttribute), REQUIRED(DevicePrimaryCtxRetain),
    REQUIRED(CtxGetCurrent),     REQUIRED(CtxSetCurrent),
    REQUIRED(CtxGetLimit),       REQUIRED(CtxSetLimit),
    REQUIRED(PointerGetAttribute), REQUIRED(ModuleLoadData),
    REQUIRED(ModuleGetFunction), REQUIRED(FuncGetAttribute),
    REQUIRED(FuncSetAttribute),  REQUIRED(FuncSetCacheConfig),
    OPTIONAL(LaunchKernelEx),    OPTIONAL(OccupancyMaxActiveClusters),
    OPTIONAL(TensorMapEncodeTiled), OPTIONAL(TensorMapEncodeIm2col),
};

const Driver *driver(void) {
  static int ready;
  if (ready)
    return &functions;
  void *library = dlopen("libcuda.so.1", RTLD_LAZY);
  if (!library) {
    PyErr_Format(PyExc_RuntimeError, "the NVIDIA driver's libcuda.so.1 cannot be opened: %s", dlerror());
    return NULL;
  }
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; ++i) {
    void *function = dlsym(library, symbols[i].name);
    if (!function && !symbols[i].optional) {
      PyErr_Format(PyExc_RuntimeError, "libcuda.so.1 has no %s", symbols[i].name);
      return NULL;
    }
    *(void **)((char *)&functions + symbols[i].offset) = function;
  }
  ready = 1;
  return &functions;
}

PyObject *cuda_error(CUresult status) {
  const char *text = NULL;
  functions.GetErrorString(status, &text);
  return PyErr_Format(PyExc_RuntimeError, "Triton Error [CUDA]: %s", text ? text : "unknown error");
}

PyObject *too_old(const char *function) {
  return PyErr_Format(PyExc_RuntimeError, "libcuda.so.1 has no %s: a newer NVIDIA driver is needed", function);
}

CUresult ensure_context(const Driver *cuda, CUdevice device) {
  CUcontext context = NULL;
  CUresult status = cuda->CtxGetCurrent(&context);
  if (status != CUDA_SUCCESS || context)
    return status;
  status = cuda->DevicePrimaryCtxRetain(&context, device);
  return status == CUDA_SUCCESS ? cuda->CtxSetCurrent(context) : status;
}

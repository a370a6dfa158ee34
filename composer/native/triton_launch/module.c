/* triton.backends.nvidia._composer_launch: what Triton 3.5 and 3.8 compile on the host (driver.c, and in 3.5 a launcher
 * per signature), built once. Function names, arguments, results and errors are those of Triton's own driver.c, but for
 * the mode of more than 228 KiB of shared memory, which no GPU that this is for has.
 */
#include <string.h>

#include "module.h"

PyTypeObject *tensor_map_type;

/* ---- devices and kernels -------------------------------------------------------------------------------------- */

static PyObject *get_device_properties(PyObject *self, PyObject *arguments) {
  static const int attributes[] = {
      CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK,
      CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,              CU_DEVICE_ATTRIBUTE_WARP_SIZE,
      CU_DEVICE_ATTRIBUTE_CLOCK_RATE,                        CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE,
      CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH};
  enum { COUNT = sizeof attributes / sizeof *attributes };
  int ordinal, values[COUNT];
  CUdevice device;
  const Driver *cuda = driver();
  (void)self;
  if (!cuda || !PyArg_ParseTuple(arguments, "i", &ordinal))
    return NULL;
  CUresult status = cuda->DeviceGet(&device, ordinal);
  for (int i = 0; status == CUDA_SUCCESS && i < COUNT; ++i)
    status = cuda->DeviceGetAttribute(&values[i], attributes[i], device);
  if (status != CUDA_SUCCESS)
    return cuda_error(status);
  return Py_BuildValue("{s:i,s:i,s:i,s:i,s:i,s:i,s:i}", "max_shared_mem", values[0], "max_num_regs", values[1],
                       "multiprocessor_count", values[2], "warpSize", values[3], "sm_clock_rate", values[4],
                       "mem_clock_rate", values[5], "mem_bus_width", values[6]);
}

static PyObject *get_device_capability(PyObject *self, PyObject *arguments) {
  int ordinal, major, minor;
  CUdevice device;
  const Driver *cuda = driver();
  (void)self;
  if (!cuda || !PyArg_ParseTuple(arguments, "i", &ordinal))
    return NULL;
  CUresult status = cuda->DeviceGet(&device, ordinal);
  if (status == CUDA_SUCCESS)
    status = cuda->DeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  if (status == CUDA_SUCCESS)
    status = cuda->DeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
  return status == CUDA_SUCCESS ? Py_BuildValue("(ii)", major, minor) : cuda_error(status);
}

static PyObject *get_current_device(PyObject *self, PyObject *arguments) {
  CUdevice device;
  const Driver *cuda = driver();
  (void)self;
  if (!cuda || !PyArg_ParseTuple(arguments, ""))
    return NULL;
  CUresult status = ensure_context(cuda, 0);
  if (status == CUDA_SUCCESS)
    status = cuda->CtxGetDevice(&device);
  return status == CUDA_SUCCESS ? PyLong_FromLong(device) : cuda_error(status);
}

/* Make the primary context of the device that `arguments` names current; -1 with an exception set. */
static int make_current(PyObject *arguments) {
  int device;
  CUcontext context;
  const Driver *cuda = driver();
  if (!cuda || !PyArg_ParseTuple(arguments, "i", &device))
    return -1;
  PyThreadState *state = PyEval_SaveThread();
  CUresult status = cuda->DevicePrimaryCtxRetain(&context, device);
  if (status == CUDA_SUCCESS)
    status = cuda->CtxSetCurrent(context);
  PyEval_RestoreThread(state);
  if (status == CUDA_SUCCESS)
    return 0;
  cuda_error(status);
  return -1;
}

static PyObject *set_current_device(PyObject *self, PyObject *arguments) {
  (void)self;
  return make_current(arguments) < 0 ? NULL : new_none();
}

static PyObject *get_default_stream(PyObject *self, PyObject *arguments) {
  (void)self;
  return make_current(arguments) < 0 ? NULL : PyLong_FromLong(0);
}

/* More dynamic shared memory than the 48 KiB every device grants has to be asked for. */
static CUresult raise_shared_limit(const Driver *cuda, CUfunction function, CUdevice device, int shared) {
  int granted, fixed;
  CUresult status = cuda->DeviceGetAttribute(&granted, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device);
  if (status != CUDA_SUCCESS || shared <= 49152 || granted <= 49152)
    return status;
  status = cuda->FuncSetCacheConfig(function, CU_FUNC_CACHE_PREFER_SHARED);
  if (status == CUDA_SUCCESS)
    status = cuda->FuncGetAttribute(&fixed, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function);
  if (status == CUDA_SUCCESS)
    status = cuda->FuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, granted - fixed);
  return status;
}

typedef struct {
  CUmodule module;
  CUfunction function;
  int registers, local_bytes, max_threads;
} Kernel;

static CUresult load_kernel(const Driver *cuda, const char *name, const char *image, int shared, CUdevice device,
                            Kernel *kernel) {
  CUresult status = ensure_context(cuda, device);
  if (status == CUDA_SUCCESS)
    status = cuda->ModuleLoadData(&kernel->module, image);
  if (status == CUDA_SUCCESS)
    status = cuda->ModuleGetFunction(&kernel->function, kernel->module, name);
  if (status == CUDA_SUCCESS)
    status = cuda->FuncGetAttribute(&kernel->registers, CU_FUNC_ATTRIBUTE_NUM_REGS, kernel->function);
  if (status == CUDA_SUCCESS)
    status = cuda->FuncGetAttribute(&kernel->local_bytes, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, kernel->function);
  if (status == CUDA_SUCCESS)
    status = cuda->FuncGetAttribute(&kernel->max_threads, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, kernel->function);
  return status == CUDA_SUCCESS ? raise_shared_limit(cuda, kernel->function, device, shared) : status;
}

static PyObject *load_binary(PyObject *self, PyObject *arguments) {
  const char *name, *image;
  Py_ssize_t size;
  int shared, device;
  Kernel kernel = {0};
  const Driver *cuda = driver();
  (void)self;
  if (!cuda || !PyArg_ParseTuple(arguments, "ss#ii", &name, &image, &size, &shared, &device))
    return NULL;
  PyThreadState *state = PyEval_SaveThread();
  CUresult status = load_kernel(cuda, name, image, shared, device, &kernel);
  PyEval_RestoreThread(state);
  if (status != CUDA_SUCCESS)
    return cuda_error(status);
  return Py_BuildValue("(KKiii)", (unsigned long long)(uintptr_t)kernel.module,
                       (unsigned long long)(uintptr_t)kernel.function, kernel.registers, kernel.local_bytes / 4,
                       kernel.max_threads);
}

static PyObject *unload_module(PyObject *self, PyObject *arguments) {
  unsigned long long module;
  const Driver *cuda = driver();
  (void)self;
  if (!cuda || !PyArg_ParseTuple(arguments, "K", &module))
    return NULL;
  PyThreadState *state = PyEval_SaveThread();
  CUresult status = cuda->ModuleUnload((CUmodule)(uintptr_t)module);
  PyEval_RestoreThread(state);
  return status == CUDA_SUCCESS ? new_none() : cuda_error(status);
}

static PyObject *max_active_clusters(PyObject *self, PyObject *arguments) {
  unsigned long long function;
  int shared, count = -1, side[3] = {1, 1, 1};
  const Driver *cuda = driver();
  (void)self;
  /* Triton 3.8 gives the first side only. */
  if (!cuda || !PyArg_ParseTuple(arguments, "Kii|ii", &function, &shared, &side[0], &side[1], &side[2]))
    return NULL;
  if (!cuda->OccupancyMaxActiveClusters)
    return too_old("cuOccupancyMaxActiveClusters");
  CUlaunchAttribute attribute = {.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION};
  for (int i = 0; i < 3; ++i)
    attribute.value.dim[i] = (uint32_t)side[i];
  CUlaunchConfig config = {.gridDimX = (uint32_t)side[0], .gridDimY = (uint32_t)side[1], .gridDimZ = (uint32_t)side[2],
                           .blockDimX = 128, .blockDimY = 1, .blockDimZ = 1, .sharedMemBytes = (uint32_t)shared,
                           .attrs = &attribute, .numAttrs = 1};
  CUfunction kernel = (CUfunction)(uintptr_t)function;
  PyThreadState *state = PyEval_SaveThread();
  CUresult status = cuda->FuncSetAttribute(kernel, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared);
  if (status == CUDA_SUCCESS)
    status = cuda->FuncSetAttribute(kernel, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1);
  if (status == CUDA_SUCCESS)
    status = cuda->OccupancyMaxActiveClusters(&count, kernel, &config);
  PyEval_RestoreThread(state);
  return status == CUDA_SUCCESS ? PyLong_FromLong(count) : cuda_error(status);
}

/* The size cannot change once a kernel has printed, not even to the same value: so it is compared first. */
static CUresult change_fifo(const Driver *cuda, size_t size) {
  size_t current = 0;
  CUresult status = ensure_context(cuda, 0);
  if (status == CUDA_SUCCESS)
    status = cuda->CtxGetLimit(&current, CU_LIMIT_PRINTF_FIFO_SIZE);
  if (status == CUDA_SUCCESS && current != size)
    status = cuda->CtxSetLimit(CU_LIMIT_PRINTF_FIFO_SIZE, size);
  return status;
}

static PyObject *set_printf_fifo_size(PyObject *self, PyObject *arguments) {
  long size;
  const Driver *cuda = driver();
  (void)self;
  if (!cuda || !PyArg_ParseTuple(arguments, "l", &size))
    return NULL;
  if (size < 0)
    return PyErr_Format(PyExc_ValueError, "fifo size must be non-negative");
  PyThreadState *state = PyEval_SaveThread();
  CUresult status = change_fifo(cuda, (size_t)size);
  PyEval_RestoreThread(state);
  return status == CUDA_SUCCESS ? new_none() : cuda_error(status);
}

/* ---- tensor maps ---------------------------------------------------------------------------------------------- */

enum { MAX_RANK = 5 };

/* Read a sequence of ints into `out`, last first (CUDA counts dimensions from the innermost). Returns its length. */
static int read_reversed(PyObject *sequence, uint64_t out[MAX_RANK], const char *what) {
  PyObject *items = PySequence_Tuple(sequence);
  if (!items)
    return -1;
  Py_ssize_t rank = PyTuple_Size(items);
  if (rank < 1 || rank > MAX_RANK) {
    Py_DecRef(items);
    PyErr_Format(PyExc_ValueError, "%s must have 1 to %d dimensions", what, MAX_RANK);
    return -1;
  }
  for (Py_ssize_t i = 0; i < rank; ++i) {
    PyObject *item = PyTuple_GetItem(items, i);
    if (!PyLong_Check(item))
      PyErr_Format(PyExc_TypeError, "%s must be an int", what);
    else
      out[rank - i - 1] = (uint64_t)PyLong_AsLongLong(item);
    if (PyErr_Occurred()) {
      Py_DecRef(items);
      return -1;
    }
  }
  Py_DecRef(items);
  return (int)rank;
}

typedef struct {
  int rank;
  uint64_t box[MAX_RANK], shape[MAX_RANK], strides[MAX_RANK];
} Extent;

static int read_extent(PyObject *box, PyObject *shape, PyObject *strides, Extent *extent) {
  extent->rank = read_reversed(box, extent->box, "block size");
  if (extent->rank < 0)
    return -1;
  int shape_rank = read_reversed(shape, extent->shape, "shape");
  int strides_rank = shape_rank < 0 ? -1 : read_reversed(strides, extent->strides, "strides");
  if (strides_rank < 0)
    return -1;
  if (shape_rank != extent->rank || strides_rank != extent->rank) {
    PyErr_SetString(PyExc_RuntimeError, "Rank mismatch");
    return -1;
  }
  return 0;
}

/* Bytes from one element to the next of every dimension but the innermost, which is contiguous. */
static void measure_strides(const Extent *extent, int item, uint64_t bytes[MAX_RANK]) {
  for (int i = 0; i + 1 < extent->rank; ++i)
    bytes[i] = (uint64_t)item * extent->strides[i + 1];
  int last = extent->rank - 1;
  bytes[last] = extent->shape[last] * (last ? bytes[last - 1] : (uint64_t)item);
}

static int out_of_bounds(int nan_padding) {
  return nan_padding ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
}

static CUresult encode(const Driver *cuda, CUtensorMap *map, const Extent *extent, unsigned long long address,
                       int swizzle, int item, int type, int nan_padding) {
  static const uint32_t step[MAX_RANK] = {1, 1, 1, 1, 1};
  uint32_t box[MAX_RANK];
  uint64_t bytes[MAX_RANK];
  for (int i = 0; i < extent->rank; ++i)
    box[i] = (uint32_t)extent->box[i];
  measure_strides(extent, item, bytes);
  return cuda->TensorMapEncodeTiled(
      map, type, (uint32_t)extent->rank, (void *)(uintptr_t)address, extent->shape, bytes, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, out_of_bounds(nan_padding));
}

/* Tensor maps of less than 128 KiB are encoded wrongly by drivers of CUDA 13.1 and older; the bit is the one that
 * CUTLASS (commit b7ecaa6) and Triton 3.8 clear.
 */
static CUresult mend(const Driver *cuda, CUtensorMap *map, const Extent *extent, int item) {
  int version;
  uint64_t last = 0;
  CUresult status = cuda->DriverGetVersion(&version);
  if (status != CUDA_SUCCESS || version > 13010)
    return status;
  for (int i = 0; i < extent->rank; ++i)
    last += (extent->shape[i] - 1) * (uint64_t)item * (i ? extent->strides[i] : 1);
  if (last + 1 < 128 * 1024)
    map->opaque[1] &= ~(1ull << 21);
  return CUDA_SUCCESS;
}

static PyObject *new_tiled(PyObject *arguments, int mended) {
  unsigned long long address;
  int swizzle, item, type, padding;
  PyObject *box, *shape, *strides;
  Extent extent;
  const Driver *cuda = driver();
  if (!cuda || !PyArg_ParseTuple(arguments, "KiiiOOOi", &address, &swizzle, &item, &type, &box, &shape, &strides,
                                 &padding))
    return NULL;
  if (read_extent(box, shape, strides, &extent) < 0)
    return NULL;
  if (!cuda->TensorMapEncodeTiled)
    return too_old("cuTensorMapEncodeTiled");
  PyObject *object = PyObject_CallObject((PyObject *)tensor_map_type, NULL);
  if (!object)
    return NULL;
  CUresult status = encode(cuda, tensor_map_of(object), &extent, address, swizzle, item, type, padding == 1);
  if (status == CUDA_SUCCESS && mended)
    status = mend(cuda, tensor_map_of(object), &extent, item);
  if (status == CUDA_SUCCESS)
    return object;
  Py_DecRef(object);
  return cuda_error(status);
}

static PyObject *fill_tma_descriptor(PyObject *self, PyObject *arguments) {
  (void)self;
  return new_tiled(arguments, 0);
}

static PyObject *fill_tma_descriptor_tiled(PyObject *self, PyObject *arguments) {
  (void)self;
  return new_tiled(arguments, 1);
}

/* What a map of columns of pixels has besides its extent: corners of the box of pixels, and steps. */
typedef struct {
  int lower[MAX_RANK], upper[MAX_RANK];
  uint32_t steps[MAX_RANK];
} Pixels;

static int read_corner(PyObject *sequence, int out[MAX_RANK], const char *what) {
  uint64_t values[MAX_RANK];
  int rank = read_reversed(sequence, values, what);
  for (int i = 0; i < rank; ++i)
    out[i] = (int)values[i];
  return rank;
}

static int read_pixels(PyObject *lower, PyObject *upper, PyObject *steps, int rank, Pixels *pixels) {
  uint64_t values[MAX_RANK];
  memset(pixels, 0, sizeof *pixels);
  int low = read_corner(lower, pixels->lower, "pixel box");
  int high = low < 0 ? -1 : read_corner(upper, pixels->upper, "pixel box");
  int count = high < 0 ? -1 : read_reversed(steps, values, "element strides");
  if (count < 0)
    return -1;
  if (low != high || count != rank) {
    PyErr_SetString(PyExc_RuntimeError, "Rank mismatch");
    return -1;
  }
  for (int i = 0; i < rank; ++i)
    pixels->steps[i] = (uint32_t)values[i];
  return 0;
}

/* The extent of a map of columns, whose box has two sides whatever its rank is. */
static int read_columns(PyObject *box, PyObject *shape, PyObject *strides, Extent *extent) {
  int sides = read_reversed(box, extent->box, "block size");
  extent->rank = sides < 0 ? -1 : read_reversed(shape, extent->shape, "shape");
  int strides_rank = extent->rank < 0 ? -1 : read_reversed(strides, extent->strides, "strides");
  if (strides_rank < 0)
    return -1;
  if (sides != 2 || strides_rank != extent->rank) {
    PyErr_SetString(PyExc_RuntimeError, "Rank mismatch");
    return -1;
  }
  return 0;
}

static PyObject *fill_tma_descriptor_im2col(PyObject *self, PyObject *arguments) {
  unsigned long long address;
  int swizzle, item, type, padding;
  PyObject *box, *shape, *strides, *lower, *upper, *steps;
  Extent extent;
  Pixels pixels;
  const Driver *cuda = driver();
  (void)self;
  if (!cuda || !PyArg_ParseTuple(arguments, "KiiiOOOiOOO", &address, &swizzle, &item, &type, &box, &shape, &strides,
                                 &padding, &lower, &upper, &steps))
    return NULL;
  if (read_columns(box, shape, strides, &extent) < 0 || read_pixels(lower, upper, steps, extent.rank, &pixels) < 0)
    return NULL;
  if (!cuda->TensorMapEncodeIm2col)
    return too_old("cuTensorMapEncodeIm2col");
  PyObject *object = PyObject_CallObject((PyObject *)tensor_map_type, NULL);
  if (!object)
    return NULL;
  uint64_t bytes[MAX_RANK];
  measure_strides(&extent, item, bytes);
  CUresult status = cuda->TensorMapEncodeIm2col(
      tensor_map_of(object), type, (uint32_t)extent.rank, (void *)(uintptr_t)address, extent.shape, bytes, pixels.lower,
      pixels.upper, (uint32_t)extent.box[0], (uint32_t)extent.box[1], pixels.steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, out_of_bounds(padding == 1));
  if (status == CUDA_SUCCESS)
    return object;
  Py_DecRef(object);
  return cuda_error(status);
}

/* ---- the module ----------------------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"launcher", new_launcher, METH_VARARGS, "A function that launches any kernel whose arguments are so described."},
    {"packed_launcher", new_packed_launcher, METH_VARARGS, "The same, called as Triton 3.8 does."},
    {"load_binary", load_binary, METH_VARARGS, "Load a cubin: (module, function, registers, spills, max threads)."},
    {"unload_module", unload_module, METH_VARARGS, "Free a module that load_binary made."},
    {"get_device_properties", get_device_properties, METH_VARARGS, "The properties of a device, as a dict."},
    {"get_device_capability", get_device_capability, METH_VARARGS, "The compute capability of a device."},
    {"get_current_device", get_current_device, METH_VARARGS, "The device of this thread."},
    {"set_current_device", set_current_device, METH_VARARGS, "Make a device this thread's."},
    {"get_default_stream", get_default_stream, METH_VARARGS, "Make a device this thread's; its default stream."},
    {"cuOccupancyMaxActiveClusters", max_active_clusters, METH_VARARGS, "How many clusters can run at once."},
    {"set_printf_fifo_size", set_printf_fifo_size, METH_VARARGS, "Set the size in bytes of the device printf buffer."},
    {"fill_tma_descriptor", fill_tma_descriptor, METH_VARARGS, "A tensor map of a tiled tensor."},
    {"fill_tma_descriptor_tiled", fill_tma_descriptor_tiled, METH_VARARGS, "The same, mended for older drivers."},
    {"fill_tma_descriptor_im2col", fill_tma_descriptor_im2col, METH_VARARGS, "A tensor map of columns of pixels."},
    {0},
};

static PyModuleDef definition = {
    .ob_base = {.ob_refcnt = 1}, .m_name = "_composer_launch", .m_size = -1, .m_methods = methods};

static PyType_Slot tensor_map_slots[] = {{0, NULL}};

static PyType_Spec tensor_map_spec = {
    .name = "triton.backends.nvidia.PyCUtensorMap",
    .basicsize = sizeof(TensorMapObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = tensor_map_slots,
};

__attribute__((visibility("default"))) PyObject *PyInit__composer_launch(void) {
  if (start_launch() < 0)
    return NULL;
  PyObject *type = PyType_FromSpec(&tensor_map_spec);
  PyObject *module = type ? PyModule_Create2(&definition, PYTHON_ABI_VERSION) : NULL;
  if (!module)
    return NULL;
  tensor_map_type = (PyTypeObject *)type;
  Py_IncRef(type);
  if (PyModule_AddObject(module, "PyCUtensorMap", type) < 0)
    return NULL;
  return module;
}

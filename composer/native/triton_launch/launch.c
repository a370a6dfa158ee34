/* One launcher for every kernel signature.
 *
 * Triton 3.5 writes, compiles and loads a C launcher per signature; 3.8 has one that reads Python objects at each
 * launch, and compiles that. Here the signature is a short string, read once into a plan, and one function interprets
 * the plan at each launch. What reaches cuLaunchKernelEx is the same, byte for byte.
 *
 * Codes, one per kernel argument:
 *   P  pointer: int, None, or an object with data_ptr()       T  tensor map, passed by value
 *   b h i L    signed integers of 8, 16, 32, 64 bits          B H I K  unsigned ones
 *   s u        of any width, by the kernel: signed, unsigned  x  constexpr: taken and not passed on
 *   e g f d    fp16, bf16, fp32, fp64 from a Python number
 *   ( ... )    a tuple of these, flattened
 * Integers obey the format units of the same letters of PyArg_ParseTuple, which upstream's launchers use: signed ones
 * and `b` are checked for overflow, unsigned ones are masked. Triton 3.8 checks for 64 bits only: `s` and `u`.
 */
#include <math.h>
#include <string.h>

#include "module.h"

/* Positions of the arguments that come before the kernel's own. */
enum { GRID_X, GRID_Y, GRID_Z, STREAM, FUNCTION, COOPERATIVE, PDL, GLOBAL_SCRATCH, PROFILE_SCRATCH, METADATA,
       LAUNCH_METADATA, ENTER_HOOK, EXIT_HOOK, FIXED };

/* CUDA passes at most 32,764 bytes of arguments, so more leaves than this cannot be meant. */
enum { MAX_LEAVES = 8192, MAX_DEPTH = 32 };

typedef struct {
  Py_ssize_t top;    /* arguments at the outermost level */
  Py_ssize_t leaves; /* arguments after flattening */
  char codes[];
} Plan;

typedef struct {
  PyObject *object; /* borrowed: a pointer or a tensor map, resolved after the enter hook as upstream does */
  uint64_t value;
} Leaf;

static const char plan_name[] = "triton.backends.nvidia.launch_plan";
static PyObject *data_ptr_name;

/* ---- conversions ---------------------------------------------------------------------------------------------- */

static int ranged(PyObject *object, long low, long high, const char *kind, uint64_t *out) {
  long value = PyLong_AsLong(object);
  if (value == -1 && PyErr_Occurred())
    return -1;
  if (value < low || value > high) {
    PyErr_Format(PyExc_OverflowError, "%s is %s", kind, value < low ? "less than minimum" : "greater than maximum");
    return -1;
  }
  *out = (uint64_t)value;
  return 0;
}

static int masked(PyObject *object, uint64_t *out) {
  *out = PyLong_AsUnsignedLongMask(object);
  return *out == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static int masked_int(PyObject *object, uint64_t *out) {
  if (!PyLong_Check(object)) {
    PyErr_SetString(PyExc_TypeError, "argument must be int");
    return -1;
  }
  *out = PyLong_AsUnsignedLongLongMask(object);
  return *out == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static uint32_t bits_of_float(double number) {
  float narrow = (float)number;
  uint32_t bits;
  memcpy(&bits, &narrow, sizeof bits);
  return bits;
}

/* IEEE 754 binary16, ties to even; -1 with OverflowError where a finite number has none. */
static int half_bits(double number, uint64_t *out) {
  uint64_t sign = signbit(number) ? 0x8000 : 0;
  if (isnan(number) || isinf(number)) {
    *out = sign | (isnan(number) ? 0x7e00 : 0x7c00);
    return 0;
  }
  int exponent;
  frexp(number, &exponent); /* |number| = 0.1... x 2^exponent */
  int step = (number == 0 || exponent < -13 ? -13 : exponent) - 11;
  double units = ldexp(fabs(number), -step); /* below 2^11: significand in units of the last place, implicit bit in */
  uint64_t whole = (uint64_t)units;
  double rest = units - (double)whole;
  whole += rest > 0.5 || (rest == 0.5 && (whole & 1));
  uint64_t bits = ((uint64_t)(step + 24) << 10) + whole; /* a carry out of the significand raises the exponent */
  if (bits >= 0x7c00) {
    PyErr_SetString(PyExc_OverflowError, "float too large to pack with e format");
    return -1;
  }
  *out = sign | bits;
  return 0;
}

static int floating(PyObject *object, char code, uint64_t *out) {
  double number = PyFloat_AsDouble(object);
  if (number == -1.0 && PyErr_Occurred())
    return -1;
  switch (code) {
  case 'e':
    return half_bits(number, out);
  case 'g':
    *out = bits_of_float(number) >> 16;
    return 0;
  case 'f':
    *out = bits_of_float(number);
    return 0;
  default:
    memcpy(out, &number, sizeof number);
    return 0;
  }
}

static int scalar(PyObject *object, char code, uint64_t *out) {
  switch (code) {
  case 'b':
    return ranged(object, 0, UINT8_MAX, "unsigned byte integer", out);
  case 'h':
    return ranged(object, INT16_MIN, INT16_MAX, "signed short integer", out);
  case 'i':
    return ranged(object, INT32_MIN, INT32_MAX, "signed integer", out);
  case 'L':
  case 's':
    *out = (uint64_t)PyLong_AsLongLong(object);
    return *out == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
  case 'u':
    *out = PyLong_AsUnsignedLongLong(object);
    return *out == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
  case 'B':
  case 'H':
  case 'I':
    return masked(object, out);
  case 'K':
    return masked_int(object, out);
  default:
    return floating(object, code, out);
  }
}

/* The device address behind `object`; `index` names the argument in messages. */
static int device_pointer(const Driver *cuda, PyObject *object, int index, uint64_t *out) {
  *out = 0;
  if (object == Py_None)
    return 0;
  if (PyLong_Check(object)) {
    *out = PyLong_AsUnsignedLongLong(object);
    return *out == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
  }
  PyObject *address = PyObject_CallMethodObjArgs(object, data_ptr_name, NULL);
  if (!address) {
    PyErr_SetString(PyExc_TypeError, "Pointer argument must be either uint64 or have data_ptr method");
    return -1;
  }
  int is_int = PyLong_Check(address);
  uint64_t pointer = is_int ? PyLong_AsUnsignedLongLong(address) : 0;
  Py_DecRef(address);
  if (!is_int) {
    PyErr_SetString(PyExc_TypeError, "data_ptr method of Pointer object must return 64-bit int");
    return -1;
  }
  if (pointer == (uint64_t)-1 && PyErr_Occurred())
    return -1;
  if (!pointer)
    return 0;
  CUresult status = cuda->PointerGetAttribute(out, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, pointer);
  if (status == CUDA_SUCCESS)
    return 0;
  if (status == CUDA_ERROR_INVALID_VALUE)
    PyErr_Format(PyExc_ValueError, "Pointer argument (at %d) cannot be accessed from Triton (cpu tensor?)", index);
  else
    cuda_error(status);
  return -1;
}

/* ---- binding arguments to the plan ---------------------------------------------------------------------------- */

typedef struct {
  const char *code; /* the next code */
  Leaf *leaf;       /* the next leaf */
  PyObject *kept;   /* tuples made of other sequences, as a linked list of pairs; or NULL */
} Binding;

static int bind_one(Binding *binding, PyObject *object);

static int bind_tuple(Binding *binding, PyObject *sequence) {
  PyObject *items = sequence;
  if (!PyTuple_Check(sequence)) {
    if (!PySequence_Check(sequence)) {
      PyErr_SetString(PyExc_TypeError, "a tuple argument must be a sequence");
      return -1;
    }
    items = PySequence_Tuple(sequence);
    if (!items)
      return -1;
    /* The leaves borrow from `items`: keep it until the launch is over. */
    PyObject *pair = Py_BuildValue("(NN)", items, binding->kept ? binding->kept : new_none());
    binding->kept = pair;
    if (!pair)
      return -1;
  }
  Py_ssize_t size = PyTuple_Size(items), taken = 0;
  for (; *binding->code != ')'; ++taken) {
    if (taken == size)
      break;
    if (bind_one(binding, PyTuple_GetItem(items, taken)) < 0)
      return -1;
  }
  if (*binding->code != ')' || taken != size) {
    PyErr_Format(PyExc_TypeError, "a tuple argument has %zd items, not as many as the kernel was compiled for", size);
    return -1;
  }
  ++binding->code;
  return 0;
}

static int bind_one(Binding *binding, PyObject *object) {
  char code = *binding->code++;
  if (code == '(')
    return bind_tuple(binding, object);
  Leaf *leaf = binding->leaf++;
  leaf->object = object;
  return code == 'P' || code == 'T' || code == 'x' ? 0 : scalar(object, code, &leaf->value);
}

static int resolve(const Driver *cuda, const Plan *plan, Leaf *leaves, void **params) {
  const char *code = plan->codes;
  size_t passed = 0;
  for (Py_ssize_t i = 0; i < plan->leaves; ++code) {
    if (*code == '(' || *code == ')')
      continue;
    Leaf *leaf = &leaves[i];
    params[passed] = &leaf->value;
    if (*code == 'P' && device_pointer(cuda, leaf->object, (int)i, &leaf->value) < 0)
      return -1;
    if (*code == 'T') {
      if (leaf->object->ob_type != tensor_map_type) {
        PyErr_SetString(PyExc_TypeError, "object must be of type PyCUtensorMap");
        return -1;
      }
      params[passed] = tensor_map_of(leaf->object);
    }
    passed += *code != 'x';
    ++i;
  }
  return (int)passed;
}

/* ---- the launch ----------------------------------------------------------------------------------------------- */

typedef struct {
  int packed; /* called as Triton 3.8 does */
  int grid[3];
  uint64_t stream, function;
  int cooperative, pdl;
  int num_warps, num_ctas, shared_memory, cluster[3];
} Shape;

static int read_int(PyObject *object, int *out) {
  uint64_t value;
  if (ranged(object, INT32_MIN, INT32_MAX, "signed integer", &value) < 0)
    return -1;
  *out = (int)value;
  return 0;
}

static int read_shape(PyObject *const *arguments, Shape *shape) {
  for (int i = 0; i < 3; ++i)
    if (read_int(arguments[GRID_X + i], &shape->grid[i]) < 0)
      return -1;
  if (masked_int(arguments[STREAM], &shape->stream) < 0 || masked_int(arguments[FUNCTION], &shape->function) < 0)
    return -1;
  shape->cooperative = PyObject_IsTrue(arguments[COOPERATIVE]);
  shape->pdl = PyObject_IsTrue(arguments[PDL]);
  return shape->cooperative < 0 || shape->pdl < 0 ? -1 : 0;
}

static int read_metadata(PyObject *metadata, Shape *shape) {
  int *fields[] = {&shape->num_warps,  &shape->num_ctas,   &shape->shared_memory,
                   &shape->cluster[0], &shape->cluster[1], &shape->cluster[2]};
  int given = shape->packed ? 3 : 6;
  if (!PyTuple_Check(metadata) || PyTuple_Size(metadata) != given) {
    PyErr_SetString(PyExc_TypeError, "kernel_metadata must be a tuple");
    return -1;
  }
  for (int i = 0; i < given; ++i)
    if (read_int(PyTuple_GetItem(metadata, i), fields[i]) < 0)
      return -1;
  if (shape->packed) {
    shape->cluster[0] = shape->num_ctas;
    shape->cluster[1] = shape->cluster[2] = 1;
  }
  return 0;
}

static uint32_t fill_attributes(const Shape *shape, CUlaunchAttribute attributes[4]) {
  uint32_t count = 0;
  memset(attributes, 0, 4 * sizeof *attributes);
  if (shape->pdl) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attributes[count++].value.flag = 1;
  }
  if (shape->cooperative) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    attributes[count++].value.flag = 1;
  }
  if (shape->num_ctas != 1) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    for (int i = 0; i < 3; ++i)
      attributes[count].value.dim[i] = (uint32_t)shape->cluster[i];
    attributes[++count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE;
    attributes[count++].value.flag = CU_CLUSTER_SCHEDULING_POLICY_SPREAD;
  }
  return count;
}

static int submit(const Driver *cuda, const Shape *shape, void **params) {
  /* The sign of the product of the grid's sides, without forming the product. */
  int64_t plane = (int64_t)shape->grid[0] * shape->grid[1];
  if (!((plane > 0 && shape->grid[2] > 0) || (plane < 0 && shape->grid[2] < 0)))
    return 0;
  if (!cuda->LaunchKernelEx) {
    too_old("cuLaunchKernelEx");
    return -1;
  }
  int clustered = shape->num_ctas != 1;
  CUlaunchAttribute attributes[4];
  CUlaunchConfig config = {
      .gridDimX = (uint32_t)shape->grid[0] * (clustered ? (uint32_t)shape->cluster[0] : 1),
      .gridDimY = (uint32_t)shape->grid[1] * (clustered ? (uint32_t)shape->cluster[1] : 1),
      .gridDimZ = (uint32_t)shape->grid[2] * (clustered ? (uint32_t)shape->cluster[2] : 1),
      .blockDimX = 32 * (uint32_t)shape->num_warps,
      .blockDimY = 1,
      .blockDimZ = 1,
      .sharedMemBytes = (uint32_t)shape->shared_memory,
      .hStream = (CUstream)shape->stream,
      .attrs = attributes,
      .numAttrs = fill_attributes(shape, attributes),
  };
  CUfunction kernel = (CUfunction)shape->function;
  PyThreadState *state = PyEval_SaveThread();
  CUresult status = CUDA_SUCCESS;
  if (shape->packed && shape->num_ctas == 16) /* more than what every GPU with clusters has */
    status = cuda->FuncSetAttribute(kernel, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1);
  if (status == CUDA_SUCCESS)
    status = cuda->LaunchKernelEx(&config, kernel, params, NULL);
  PyEval_RestoreThread(state);
  if (status == CUDA_SUCCESS)
    return 0;
  cuda_error(status);
  return -1;
}

static int call_hook(PyObject *hook, PyObject *metadata) {
  if (hook == Py_None)
    return 0;
  PyObject *result = PyObject_CallFunctionObjArgs(hook, metadata, NULL);
  if (!result)
    return -1;
  Py_DecRef(result);
  return 0;
}

/* Everything after the arguments are bound: what upstream's launcher does between its hooks. */
static int run(const Driver *cuda, const Plan *plan, PyObject *const *arguments, const Shape *shape, Leaf *leaves) {
  void *params[plan->leaves + 2];
  uint64_t scratch[2];
  if (call_hook(arguments[ENTER_HOOK], arguments[LAUNCH_METADATA]) < 0)
    return -1;
  for (int i = 0; i < 2; ++i)
    if (device_pointer(cuda, arguments[GLOBAL_SCRATCH + i], -1, &scratch[i]) < 0)
      return -1;
  int passed = resolve(cuda, plan, leaves, params);
  if (passed < 0)
    return -1;
  params[passed] = &scratch[0];
  params[passed + 1] = &scratch[1];
  if (submit(cuda, shape, params) < 0)
    return -1;
  return call_hook(arguments[EXIT_HOOK], arguments[LAUNCH_METADATA]);
}

static PyObject *launch_as(PyObject *self, PyObject *const *arguments, Py_ssize_t count, int packed) {
  const Plan *plan = PyCapsule_GetPointer(self, plan_name);
  const Driver *cuda = driver();
  if (!plan || !cuda)
    return NULL;
  CUresult context = ensure_context(cuda, 0); /* before anything asks the driver about a pointer */
  if (context != CUDA_SUCCESS)
    return cuda_error(context);
  if (count != FIXED + plan->top)
    return PyErr_Format(PyExc_TypeError, "launch takes exactly %zd arguments (%zd given)", FIXED + plan->top, count);
  Shape shape = {.packed = packed};
  Leaf leaves[plan->leaves + 1];
  Binding binding = {.code = plan->codes, .leaf = leaves};
  int status = read_shape(arguments, &shape);
  for (Py_ssize_t i = FIXED; status == 0 && i < count; ++i)
    status = bind_one(&binding, arguments[i]);
  if (status == 0)
    status = read_metadata(arguments[METADATA], &shape);
  if (status == 0)
    status = run(cuda, plan, arguments, &shape, leaves);
  Py_DecRef(binding.kept);
  return status == 0 ? new_none() : NULL;
}

static PyObject *launch(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
  return launch_as(self, arguments, count, 0);
}

/* As Triton 3.8 calls it: the metadata and the hooks before the scratch buffers, and the kernel's own arguments as one
 * sequence at the end.
 */
static PyObject *launch_packed(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
  const Plan *plan = PyCapsule_GetPointer(self, plan_name);
  if (!plan)
    return NULL;
  if (count != FIXED + 1)
    return PyErr_Format(PyExc_TypeError, "launch takes exactly %d arguments (%zd given)", FIXED + 1, count);
  PyObject *own = PySequence_Tuple(arguments[FIXED]);
  if (!own)
    return NULL;
  PyObject *result = NULL, *flat[FIXED + plan->top];
  if (PyTuple_Size(own) != plan->top) {
    PyErr_Format(PyExc_TypeError, "the kernel takes exactly %zd arguments (%zd given)", plan->top, PyTuple_Size(own));
  } else {
    enum { SCRATCH = METADATA + 2 }; /* where the two buffers are in this order */
    memcpy(flat, arguments, sizeof *flat * GLOBAL_SCRATCH);
    memcpy(flat + GLOBAL_SCRATCH, arguments + SCRATCH, sizeof *flat * 2);
    memcpy(flat + METADATA, arguments + GLOBAL_SCRATCH, sizeof *flat * 4);
    for (Py_ssize_t i = 0; i < plan->top; ++i)
      flat[FIXED + i] = PyTuple_GetItem(own, i);
    result = launch_as(self, flat, FIXED + plan->top, 1);
  }
  Py_DecRef(own);
  return result;
}

/* ---- plans ---------------------------------------------------------------------------------------------------- */

static void free_plan(PyObject *capsule) { PyMem_Free(PyCapsule_GetPointer(capsule, plan_name)); }

/* Count the arguments of `codes`; -1 where it is not a description. */
static int measure(const char *codes, Py_ssize_t *top, Py_ssize_t *leaves) {
  int depth = 0;
  *top = *leaves = 0;
  for (; *codes; ++codes) {
    if (*codes == ')') {
      if (--depth < 0)
        return -1;
      continue;
    }
    *top += depth == 0;
    if (*codes == '(')
      ++depth;
    else if (strchr("PTbhiLBHIKsuegfdx", *codes))
      ++*leaves;
    else
      return -1;
    if (depth > MAX_DEPTH || *leaves > MAX_LEAVES)
      return -1;
  }
  return depth ? -1 : 0;
}

static PyMethodDef flat_method = {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL, "Launch one kernel."};
static PyMethodDef packed_method = {
    "launch", (PyCFunction)(void (*)(void))launch_packed, METH_FASTCALL, "Launch one kernel."};

static PyObject *make_launcher(PyObject *arguments, PyMethodDef *method) {
  const char *codes;
  Py_ssize_t top, leaves;
  if (!PyArg_ParseTuple(arguments, "s", &codes))
    return NULL;
  if (measure(codes, &top, &leaves) < 0)
    return PyErr_Format(PyExc_ValueError, "not a description of kernel arguments: '%s'", codes);
  Plan *plan = PyMem_Malloc(sizeof *plan + strlen(codes) + 1);
  if (!plan)
    return PyErr_NoMemory();
  plan->top = top;
  plan->leaves = leaves;
  strcpy(plan->codes, codes);
  PyObject *capsule = PyCapsule_New(plan, plan_name, free_plan);
  if (!capsule) {
    PyMem_Free(plan);
    return NULL;
  }
  PyObject *function = PyCFunction_NewEx(method, capsule, NULL);
  Py_DecRef(capsule);
  return function;
}

PyObject *new_launcher(PyObject *module, PyObject *arguments) {
  (void)module;
  return make_launcher(arguments, &flat_method);
}

PyObject *new_packed_launcher(PyObject *module, PyObject *arguments) {
  (void)module;
  return make_launcher(arguments, &packed_method);
}

int start_launch(void) {
  data_ptr_name = PyUnicode_InternFromString("data_ptr");
  return data_ptr_name ? 0 : -1;
}

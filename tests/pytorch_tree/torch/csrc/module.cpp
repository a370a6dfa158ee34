#include <Python.h>

extern "C" {
const char *show_config();
#ifdef USE_CUDA
const char *cuda_arch_list();
int cudnn_version();
#endif
}

// Floating point in a loop, so that the flags of the build show here, too.
extern "C" void sum(float *out, const float *in, int n) {
  for (int i = 0; i < n; ++i) out[i] += in[i] * 1.5f;
}

static PyObject *show(PyObject *, PyObject *) {
#ifdef USE_CUDA
  return Py_BuildValue("ssi", show_config(), cuda_arch_list(), cudnn_version());
#else
  return Py_BuildValue("ssi", show_config(), "", 0);
#endif
}

static PyMethodDef methods[] = {{"show", show, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "torch._C", nullptr, -1, methods};

extern "C" PyObject *initModule() { return PyModule_Create(&module); }

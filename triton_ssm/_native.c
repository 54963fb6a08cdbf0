// A call that was recorded, done again: whether it is of the recorded kind, its outputs, its launches.
//
// Built with the compiler that Triton builds its launchers with, and kept in the same cache. Python decides everything when it
// records (`_native.py`); here it is only compared, in 2 us where Python takes 4, and every kernel is launched from parameters that
// lie ready, but for pointers and tensor maps, instead of from forty Python objects.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdalign.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "cuda.h"

enum { ENTRIES = 26, VALUES = 64, POINTERS = 128, PARAMETERS = 1024, BYTES = 16384, MAP = sizeof(CUtensorMap) };

typedef CUresult (*launch_t)(const CUlaunchConfig *, CUfunction, void **, void **);
typedef CUresult (*context_t)(CUcontext *);
typedef CUresult (*message_t)(CUresult, const char **);

// As `_native.py` writes them.
typedef struct {
  int64_t function, grid[3], threads, shared, cooperative, pdl, n_parameters;
} Launch;
typedef struct {
  int64_t offset, place;
} Patch;
typedef struct {
  int64_t launch, context, message;
} Driver;

typedef struct {
  uint64_t address;
  char bytes[MAP];
} Map;

typedef struct {
  PyObject_HEAD
  PyObject *state;  // the tuple that all these belong to
  PyObject *names, *options, *circumstances, *check, *empty, *outputs, *scratch, *stream_of, *device, *maps, *result, *take, *give;
  const int64_t *tensors, *alignment, *same_as, *twin_of, *offsets, *parameters;
  const Launch *launches;
  const Patch *patches, *map_patches;
  const char *template;
  Driver driver;
  Map *latest;  // tensor maps: torch gives the same memory out again and again
  Py_ssize_t n_args, n_names, n_tensors, n_same_as, n_offsets, n_launches, n_parameters, n_patches, n_map_patches, n_template;
} Replay;

static PyObject *data_ptr;  // the name

static bool read_bytes(PyObject *state, Py_ssize_t index, size_t size, const void **data, Py_ssize_t *count) {
  PyObject *bytes = PyTuple_GET_ITEM(state, index);
  if (!PyBytes_Check(bytes) || PyBytes_GET_SIZE(bytes) % size) {
    PyErr_Format(PyExc_TypeError, "entry %zd: expected bytes, in %zu", index, size);
    return false;
  }
  *data = PyBytes_AS_STRING(bytes);
  *count = PyBytes_GET_SIZE(bytes) / size;
  return true;
}

static bool read_tuple(PyObject *state, Py_ssize_t index, PyObject **tuple) {
  *tuple = PyTuple_GET_ITEM(state, index);
  if (!PyTuple_Check(*tuple)) {
    PyErr_Format(PyExc_TypeError, "entry %zd: expected a tuple", index);
    return false;
  }
  return true;
}

static bool fit(const Patch *patches, Py_ssize_t n, Py_ssize_t size, Py_ssize_t n_bytes, Py_ssize_t n_pointers) {
  for (; n > 0; n--, patches++)
    if (patches->offset < 0 || patches->offset + size > n_bytes || patches->place < 0 || patches->place >= n_pointers)
      return false;
  return true;
}

static bool read_state(Replay *self, PyObject *state) {
  Py_ssize_t n_alignment, n_twin_of, n_driver, total = 0;
  const Driver *driver;
  if (!PyTuple_CheckExact(state) || PyTuple_GET_SIZE(state) != ENTRIES) {
    PyErr_Format(PyExc_TypeError, "state: expected a tuple of %d entries", ENTRIES);
    return false;
  }
  if (!read_tuple(state, 1, &self->names) || !read_tuple(state, 2, &self->options) ||
      !read_bytes(state, 3, 8, (const void **)&self->tensors, &self->n_tensors) ||
      !read_bytes(state, 4, 8, (const void **)&self->alignment, &n_alignment) ||
      !read_bytes(state, 5, 8, (const void **)&self->same_as, &self->n_same_as) ||
      !read_bytes(state, 6, 8, (const void **)&self->twin_of, &n_twin_of) ||
      !read_tuple(state, 8, &self->circumstances) || !read_tuple(state, 10, &self->outputs) ||
      !read_bytes(state, 12, 8, (const void **)&self->offsets, &self->n_offsets) ||
      !read_bytes(state, 15, sizeof(Launch), (const void **)&self->launches, &self->n_launches) ||
      !read_bytes(state, 16, 8, (const void **)&self->parameters, &self->n_parameters) ||
      !read_bytes(state, 17, 1, (const void **)&self->template, &self->n_template) ||
      !read_bytes(state, 18, sizeof(Patch), (const void **)&self->patches, &self->n_patches) ||
      !read_bytes(state, 19, sizeof(Patch), (const void **)&self->map_patches, &self->n_map_patches) ||
      !read_tuple(state, 20, &self->maps) ||
      !read_bytes(state, 21, sizeof(Driver), (const void **)&driver, &n_driver))
    return false;
  self->n_args = PyLong_AsSsize_t(PyTuple_GET_ITEM(state, 0));
  if (self->n_args < 0) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "entry 0: expected a number of arguments");
    return false;
  }
  self->check = PyTuple_GET_ITEM(state, 7);
  self->empty = PyTuple_GET_ITEM(state, 9);
  self->scratch = PyTuple_GET_ITEM(state, 11);
  self->stream_of = PyTuple_GET_ITEM(state, 13);
  self->device = PyTuple_GET_ITEM(state, 14);
  self->result = PyTuple_GET_ITEM(state, 22);
  self->take = PyTuple_GET_ITEM(state, 24);
  self->give = PyTuple_GET_ITEM(state, 25);
  self->n_names = PyTuple_GET_SIZE(self->names);

  Py_ssize_t n_values = self->n_args + self->n_names;
  Py_ssize_t n_pointers = self->n_tensors + PyTuple_GET_SIZE(self->outputs) + self->n_offsets;
  bool sound = n_values <= VALUES && n_pointers <= POINTERS && self->n_parameters <= PARAMETERS &&
               self->n_template <= BYTES && n_alignment == self->n_tensors && n_twin_of == self->n_tensors && n_driver == 1 &&
               (self->n_same_as == 0 || self->n_same_as == self->n_tensors) &&
               PyTuple_GET_SIZE(self->options) == n_values - self->n_tensors;
  for (Py_ssize_t i = 0; sound && i < self->n_tensors; i++)
    sound = self->tensors[i] >= 0 && self->tensors[i] < n_values && self->twin_of[i] < i;
  for (Py_ssize_t i = 0; sound && i < self->n_parameters; i++)
    sound = self->parameters[i] >= 0 && self->parameters[i] < self->n_template;
  sound = sound && fit(self->patches, self->n_patches, 8, self->n_template, n_pointers) &&
          fit(self->map_patches, self->n_map_patches, MAP, self->n_template, n_pointers) &&
          self->n_map_patches == PyTuple_GET_SIZE(self->maps);
  for (Py_ssize_t i = 0; sound && i < self->n_launches; i++) total += self->launches[i].n_parameters;
  if (!sound || total != self->n_parameters) {
    PyErr_SetString(PyExc_ValueError, "state: too large, or its parts do not fit one another");
    return false;
  }
  self->driver = *driver;
  self->latest = PyMem_Calloc(self->n_map_patches + 1, sizeof(Map));
  if (self->latest == NULL) PyErr_NoMemory();
  return self->latest != NULL;
}

static PyObject *replay_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  PyObject *state;
  if (kwargs != NULL && PyDict_GET_SIZE(kwargs)) {
    PyErr_SetString(PyExc_TypeError, "Replay: expected no keyword");
    return NULL;
  }
  if (!PyArg_ParseTuple(args, "O", &state)) return NULL;
  Replay *self = (Replay *)type->tp_alloc(type, 0);
  if (self == NULL) return NULL;
  self->state = Py_NewRef(state);
  if (!read_state(self, state)) {
    Py_DECREF(self);
    return NULL;
  }
  return (PyObject *)self;
}

static void replay_dealloc(Replay *self) {
  PyTypeObject *type = Py_TYPE(self);
  Py_XDECREF(self->state);
  PyMem_Free(self->latest);
  type->tp_free(self);
  Py_DECREF(type);
}

// 1 equals True, and only one of them is a bool.
static int equal(PyObject *value, PyObject *expected) {
  if (Py_TYPE(value) != Py_TYPE(expected)) return 0;
  return PyObject_RichCompareBool(value, expected, Py_EQ);
}

static int same_option(PyObject *value, PyObject *expected) {
  if (Py_TYPE(value) != Py_TYPE(expected)) return 0;
  if (!PyTuple_CheckExact(value) && !PyList_CheckExact(value)) return equal(value, expected);
  Py_ssize_t n = PySequence_Fast_GET_SIZE(value);
  if (n != PySequence_Fast_GET_SIZE(expected)) return 0;
  for (Py_ssize_t i = 0; i < n; i++) {
    int same = equal(PySequence_Fast_GET_ITEM(value, i), PySequence_Fast_GET_ITEM(expected, i));
    if (same != 1) return same;
  }
  return 1;
}

static int answers(PyObject *called, PyObject *expected) {
  if (called == NULL) return -1;
  int same = PyObject_RichCompareBool(called, expected, Py_EQ);
  Py_DECREF(called);
  return same;
}

static bool number_of(PyObject *number, uint64_t *value) {
  if (number == NULL) return false;
  *value = PyLong_AsUnsignedLongLong(number);
  Py_DECREF(number);
  return !(*value == (uint64_t)-1 && PyErr_Occurred());
}

static bool pointer_of(PyObject *tensor, uint64_t *pointer) {
  return number_of(PyObject_CallMethodNoArgs(tensor, data_ptr), pointer);
}

// Whether a call is of this kind: 1, 0, or -1 with an exception. Its values, which are borrowed, and its tensors' pointers.
static int matches(Replay *self, PyObject *args, PyObject *kwargs, PyObject **values, uint64_t *pointers) {
  if (PyTuple_GET_SIZE(args) != self->n_args || PyDict_GET_SIZE(kwargs) != self->n_names) return 0;
  for (Py_ssize_t i = 0; i < self->n_args; i++) values[i] = PyTuple_GET_ITEM(args, i);
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; PyDict_Next(kwargs, &position, &key, &value); i++) {
    PyObject *name = PyTuple_GET_ITEM(self->names, i);
    if (key != name && PyUnicode_Compare(key, name) != 0) return 0;
    values[self->n_args + i] = value;
  }
  Py_ssize_t tensor = 0, option = 0, n_values = self->n_args + self->n_names;
  PyObject *tensors[VALUES], *distinct[VALUES];
  Py_ssize_t n_distinct = 0;
  for (Py_ssize_t i = 0; i < n_values; i++) {
    if (tensor < self->n_tensors && self->tensors[tensor] == i) {
      int64_t twin = self->twin_of[tensor];
      tensors[tensor++] = values[i];
      if (twin < 0) distinct[n_distinct++] = values[i];
      else if (tensors[twin] != values[i]) return 0;
      continue;
    }
    int same = same_option(values[i], PyTuple_GET_ITEM(self->options, option++));
    if (same != 1) return same;
  }
  int same = answers(PyObject_Vectorcall(self->check, distinct, n_distinct, NULL), Py_True);
  if (same != 1) return same;
  for (Py_ssize_t i = 0; i < self->n_tensors; i++) {
    if (!pointer_of(tensors[i], &pointers[i])) return -1;
    if ((int64_t)(pointers[i] & 15) != self->alignment[i]) return 0;
  }
  for (Py_ssize_t i = 0; i < self->n_same_as; i++) {
    Py_ssize_t first = 0;
    while (pointers[first] != pointers[i]) first++;
    if (first != self->same_as[i]) return 0;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(self->circumstances); i++) {
    PyObject *pair = PyTuple_GET_ITEM(self->circumstances, i);
    same = answers(PyObject_CallNoArgs(PyTuple_GET_ITEM(pair, 0)), PyTuple_GET_ITEM(pair, 1));
    if (same != 1) return same;
  }
  // A thread that never used CUDA has no context: Triton's own launch makes one.
  CUcontext context = NULL;
  return ((context_t)self->driver.context)(&context) == CUDA_SUCCESS && context != NULL;
}

static PyObject *made(Replay *self, PyObject *as, uint64_t *pointer) {
  PyObject *tensor = PyObject_Vectorcall(self->empty, ((PyTupleObject *)as)->ob_item, PyTuple_GET_SIZE(as), NULL);
  if (tensor != NULL && !pointer_of(tensor, pointer)) Py_CLEAR(tensor);
  return tensor;
}

// Memory for what does not outlive the call: the allocator's own, whose address is given back, or a tensor.
static PyObject *take_scratch(Replay *self, PyObject *stream, uint64_t *pointer) {
  if (self->take == Py_None) return made(self, self->scratch, pointer);
  PyObject *size = PyTuple_GET_ITEM(PyTuple_GET_ITEM(self->scratch, 0), 0);
  PyObject *number = PyObject_CallFunctionObjArgs(self->take, size, stream, NULL);
  if (number == NULL || !number_of(Py_NewRef(number), pointer)) Py_CLEAR(number);
  return number;
}

static void give_scratch(Replay *self, PyObject *scratch) {
  if (scratch != NULL && self->take != Py_None) {
    PyObject *raised = PyErr_GetRaisedException();  // of a launch, which goes first
    PyObject *given = PyObject_CallOneArg(self->give, scratch);
    if (given == NULL && raised != NULL) PyErr_Clear();
    if (raised != NULL) PyErr_SetRaisedException(raised);
    Py_XDECREF(given);
  }
  Py_XDECREF(scratch);
}

// What a call returns: None, an argument (from 0 on), an output (from -1 down), or a tuple of such.
static PyObject *result_of(PyObject *form, PyObject **values, PyObject **outputs) {
  if (form == Py_None) Py_RETURN_NONE;
  if (PyLong_CheckExact(form)) {
    long index = PyLong_AsLong(form);
    return Py_NewRef(index >= 0 ? values[index] : outputs[-1 - index]);
  }
  Py_ssize_t n = PyTuple_GET_SIZE(form);
  PyObject *result = PyTuple_New(n);
  for (Py_ssize_t i = 0; result != NULL && i < n; i++) {
    PyObject *part = result_of(PyTuple_GET_ITEM(form, i), values, outputs);
    if (part == NULL) Py_CLEAR(result);
    else PyTuple_SET_ITEM(result, i, part);
  }
  return result;
}

static CUresult launch_all(Replay *self, CUstream stream, void **parameters) {
  for (Py_ssize_t i = 0; i < self->n_launches; i++) {
    const Launch *launch = &self->launches[i];
    CUlaunchAttribute attributes[2];
    unsigned int n = 0;
    memset(attributes, 0, sizeof attributes);
    if (launch->pdl) {
      attributes[n].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
      attributes[n++].value.programmaticStreamSerializationAllowed = 1;
    }
    if (launch->cooperative) {
      attributes[n].id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
      attributes[n++].value.cooperative = 1;
    }
    CUlaunchConfig config = {
        .gridDimX = launch->grid[0], .gridDimY = launch->grid[1], .gridDimZ = launch->grid[2],
        .blockDimX = launch->threads, .blockDimY = 1, .blockDimZ = 1, .sharedMemBytes = launch->shared,
        .hStream = stream, .attrs = attributes, .numAttrs = n,
    };
    CUresult code = ((launch_t)self->driver.launch)(&config, (CUfunction)launch->function, parameters, NULL);
    if (code != CUDA_SUCCESS) return code;
    parameters += launch->n_parameters;
  }
  return CUDA_SUCCESS;
}

static bool read_map(PyObject *maps, Map *map) {
  PyObject *address = PyLong_FromUnsignedLongLong(map->address);
  PyObject *bytes = address == NULL ? NULL : PyObject_GetItem(maps, address);
  Py_XDECREF(address);
  if (bytes == NULL) return false;
  bool sound = PyBytes_CheckExact(bytes) && PyBytes_GET_SIZE(bytes) == MAP;
  if (sound) memcpy(map->bytes, PyBytes_AS_STRING(bytes), MAP);
  else PyErr_SetString(PyExc_TypeError, "a tensor map: expected bytes, 128 of them");
  Py_DECREF(bytes);
  return sound;
}

static bool fill_maps(Replay *self, const uint64_t *pointers, char *memory) {
  for (Py_ssize_t i = 0; i < self->n_map_patches; i++) {
    Map *latest = &self->latest[i], map;
    map.address = pointers[self->map_patches[i].place];
    if (latest->address != map.address) {
      if (!read_map(PyTuple_GET_ITEM(self->maps, i), &map)) return false;  // in which other threads may run
      *latest = map;
    }
    memcpy(memory + self->map_patches[i].offset, latest->bytes, MAP);
  }
  return true;
}

static bool run(Replay *self, uint64_t stream, const uint64_t *pointers) {
  alignas(64) char memory[BYTES];
  void *parameters[PARAMETERS];
  memcpy(memory, self->template, self->n_template);
  for (Py_ssize_t i = 0; i < self->n_patches; i++)
    memcpy(memory + self->patches[i].offset, &pointers[self->patches[i].place], 8);
  if (!fill_maps(self, pointers, memory)) return false;
  for (Py_ssize_t i = 0; i < self->n_parameters; i++) parameters[i] = memory + self->parameters[i];

  CUresult code;
  Py_BEGIN_ALLOW_THREADS;  // a full queue makes a launch wait
  code = launch_all(self, (CUstream)stream, parameters);
  Py_END_ALLOW_THREADS;
  if (code != CUDA_SUCCESS) {
    const char *message = NULL;
    ((message_t)self->driver.message)(code, &message);
    PyErr_Format(PyExc_RuntimeError, "Triton Error [CUDA]: %s", message == NULL ? "unknown" : message);
  }
  return code == CUDA_SUCCESS;
}

// replay.attempt(args, kwargs): the call's result, or NotImplemented where it is of another kind.
static PyObject *attempt(Replay *self, PyObject *const *given, Py_ssize_t n_given) {
  PyObject *values[VALUES], *outputs[POINTERS], *scratch = NULL, *result = NULL;
  uint64_t pointers[POINTERS], start, handle;
  Py_ssize_t n_outputs = 0, n = self->n_tensors;
  if (n_given != 2 || !PyTuple_CheckExact(given[0]) || !PyDict_CheckExact(given[1])) {
    PyErr_SetString(PyExc_TypeError, "attempt: expected a call's arguments, a tuple and a dict");
    return NULL;
  }
  int same = matches(self, given[0], given[1], values, pointers);
  if (same < 0) return NULL;
  if (same == 0) return Py_NewRef(Py_NotImplemented);

  PyObject *stream = PyObject_CallOneArg(self->stream_of, self->device);
  if (stream == NULL || !number_of(Py_NewRef(stream), &handle)) goto done;
  while (n_outputs < PyTuple_GET_SIZE(self->outputs)) {
    outputs[n_outputs] = made(self, PyTuple_GET_ITEM(self->outputs, n_outputs), &pointers[n]);
    if (outputs[n_outputs] == NULL) goto done;
    n_outputs++, n++;
  }
  if (self->scratch != Py_None) {
    scratch = take_scratch(self, stream, &start);  // held until everything is launched
    if (scratch == NULL) goto done;
    for (Py_ssize_t i = 0; i < self->n_offsets; i++) pointers[n + i] = start + self->offsets[i];
  }
  if (run(self, handle, pointers)) result = result_of(self->result, values, outputs);
  give_scratch(self, scratch);
  if (PyErr_Occurred()) Py_CLEAR(result);
done:
  Py_XDECREF(stream);
  while (n_outputs > 0) Py_DECREF(outputs[--n_outputs]);
  return result;
}

static PyMethodDef methods[] = {
    {"attempt", (PyCFunction)(void (*)(void))attempt, METH_FASTCALL, "attempt(args, kwargs): the call, or NotImplemented"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot slots[] = {
    {Py_tp_new, replay_new}, {Py_tp_dealloc, replay_dealloc}, {Py_tp_methods, methods}, {0, NULL}};
static PyType_Spec spec = {"twin_ssm_replay.Replay", sizeof(Replay), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "twin_ssm_replay", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_twin_ssm_replay(void) {
  data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject *type = data_ptr == NULL ? NULL : PyType_FromSpec(&spec);
  PyObject *made_module = type == NULL ? NULL : PyModule_Create(&module);
  if (made_module != NULL && PyModule_AddObjectRef(made_module, "Replay", type) < 0) Py_CLEAR(made_module);
  Py_XDECREF(type);
  return made_module;
}

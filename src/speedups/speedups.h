/* What the parts of `pillarbox._speedups` share: the module's state, and how each part adds itself to the module. */

#ifndef PILLARBOX_SPEEDUPS_H
#define PILLARBOX_SPEEDUPS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <stdint.h>

enum { ID_MIDDLE_BYTES = 11 }; /* "-7xxx-8xxx-" */

typedef struct {
    PyTypeObject *segment_counters;
    PyTypeObject *writer_state;
    PyTypeObject *enqueue;
    PyObject *os_write; /* called directly instead */
    PyObject *acquire, *release, *append, *attend, *complete, *undo; /* names of methods */
} AppendState;

typedef struct {
    PyTypeObject *commit_future;
    PyObject *cancelled_error;
    PyObject *invalid_state_error;
    PyObject *call_soon;
    PyObject *context_name; /* ("context",) */
    PyObject *lines;
    PyObject *events;
    PyObject *loop;
} FutureState;

typedef struct {
    uint64_t count;               /* the last 48 bits of the ids */
    char middle[ID_MIDDLE_BYTES]; /* begins with NUL before the first `reseed` */
} EventState;

typedef struct {
    AppendState append;
    FutureState future;
    EventState event;
} SpeedupsState;

static inline SpeedupsState *
state_of_module(PyObject *module)
{
    return (SpeedupsState *)PyModule_GetState(module);
}

/* Each adds the functions and types of its part to the module. 0, or -1 with an exception set. */
int append_exec(PyObject *module);
int decode_exec(PyObject *module);
int dirscan_exec(PyObject *module);
int batch_io_exec(PyObject *module);
int future_exec(PyObject *module);
int event_exec(PyObject *module);

/* For the garbage collector; the other parts hold no objects. */
int append_traverse(AppendState *state, visitproc visit, void *arg);
void append_clear(AppendState *state);
int future_traverse(FutureState *state, visitproc visit, void *arg);
void future_clear(FutureState *state);

/* Add a type to the module; `type` is a strong reference to it then, where it is not NULL. */
static inline int
add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type)
{
    PyObject *made = PyType_FromModuleAndSpec(module, spec, NULL);
    int added = made == NULL ? -1 : PyModule_AddType(module, (PyTypeObject *)made);
    if (type != NULL) {
        *type = (PyTypeObject *)made;
    }
    else {
        Py_XDECREF(made);
    }
    return added;
}

/* The sum of two numbers, or the greatest or least that there is: a sum that overflows would be undefined. */
static inline long long
add_saturated(long long one, long long other)
{
    long long sum;
    if (__builtin_add_overflow(one, other, &sum)) {
        return other > 0 ? INT64_MAX : INT64_MIN;
    }
    return sum;
}

#endif

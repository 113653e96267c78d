/* Shared by the source files of `pillarbox._speedups`: the module's state, and the functions that add each part to the module. */

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
    PyObject *os_write; /* `os.write`; where a writer uses it, write(2) is called directly */
    PyObject *acquire, *release, *append, *notify_threshold, *complete_append, *undo_append; /* names of methods */
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
    char middle[ID_MIDDLE_BYTES]; /* starts with NUL before the first `reseed` */
} EventState;

typedef struct {
    AppendState append;
    FutureState future;
    EventState event;
    PyObject *fork_handler; /* called once in a forked child; NULL before it is set */
    unsigned forks_handled;
} SpeedupsState;

static inline SpeedupsState *
state_of_module(PyObject *module)
{
    return (SpeedupsState *)PyModule_GetState(module);
}

/* Each adds the functions and types of its part to the module. Returns 0, or -1 with an exception set. */
int append_exec(PyObject *module);
int decode_exec(PyObject *module);
int dirscan_exec(PyObject *module);
int batch_io_exec(PyObject *module);
int future_exec(PyObject *module);
int event_exec(PyObject *module);
int fork_exec(PyObject *module);

extern unsigned pillarbox_forks;

/* Handle a fork of this process. Returns 0, or -1 with an exception set. */
int handle_fork(SpeedupsState *state);

/* The same, where one has happened since the last call. */
static inline int
check_fork(SpeedupsState *state)
{
    return state->forks_handled == pillarbox_forks ? 0 : handle_fork(state);
}

/* For the garbage collector. The other parts hold no objects. */
int append_traverse(AppendState *state, visitproc visit, void *arg);
void append_clear(AppendState *state);
int future_traverse(FutureState *state, visitproc visit, void *arg);
void future_clear(FutureState *state);

/* Add a type to the module. If `type` is not NULL, it receives a strong reference to the type. */
static inline int
add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type)
{
    PyObject *new_type = PyType_FromModuleAndSpec(module, spec, NULL);
    int result = new_type == NULL ? -1 : PyModule_AddType(module, (PyTypeObject *)new_type);
    if (type != NULL) {
        *type = (PyTypeObject *)new_type;
    }
    else {
        Py_XDECREF(new_type);
    }
    return result;
}

/* The sum of two numbers, limited to the range of the type (signed overflow is undefined behaviour). */
static inline long long
add_saturated(long long left, long long right)
{
    long long sum;
    if (__builtin_add_overflow(left, right, &sum)) {
        return right > 0 ? INT64_MAX : INT64_MIN;
    }
    return sum;
}

#endif

/* `pillarbox._speedups`: the compiled parts of the package, as one extension module.

The extension is optional. `pillarbox/_native.py` and `pillarbox/event.py` do the same in Python, and the tests require the same
behaviour of both. docs/dev/performance-native.md says why each part is compiled and how much faster it is.

No part relies on the GIL to protect its own state: `append` holds the writer's lock, `future` runs on the thread of the event
loop, `dirscan` lets one thread at a time read a directory, and the counter of `event` is atomic. */

#include "speedups.h"

static int
speedups_exec(PyObject *module)
{
    static int (*const parts[])(PyObject *)
        = {append_exec, decode_exec, dirscan_exec, batch_io_exec, future_exec, event_exec, fork_exec};
    for (size_t part = 0; part < sizeof parts / sizeof *parts; part++) {
        if (parts[part](module) < 0) {
            return -1;
        }
    }
    return 0;
}

static int
speedups_traverse(PyObject *module, visitproc visit, void *arg)
{
    SpeedupsState *state = state_of_module(module);
    Py_VISIT(state->fork_handler);
    int result = append_traverse(&state->append, visit, arg);
    return result ? result : future_traverse(&state->future, visit, arg);
}

static int
speedups_clear(PyObject *module)
{
    SpeedupsState *state = state_of_module(module);
    Py_CLEAR(state->fork_handler);
    append_clear(&state->append);
    future_clear(&state->future);
    return 0;
}

static PyModuleDef_Slot speedups_slots[] = {
    {Py_mod_exec, speedups_exec},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef speedups_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_speedups",
    .m_doc = "The compiled parts of Pillarbox; `pillarbox._native` chooses between them and the same code in Python.",
    .m_size = sizeof(SpeedupsState),
    .m_slots = speedups_slots,
    .m_traverse = speedups_traverse,
    .m_clear = speedups_clear,
};

PyMODINIT_FUNC
PyInit__speedups(void)
{
    return PyModuleDef_Init(&speedups_module);
}

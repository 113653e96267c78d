/* Notices that the process was forked, also by C code that does not call the hooks of `os.register_at_fork`, as a server that
   embeds Python may do. `pillarbox/forks.py` compares process ids instead.

   The child closes its parent's files at once. It may never use an outbox again, and as long as it had them open it would hold
   the parent's locks on them. */

#include "speedups.h"

#include <pthread.h>
#include <unistd.h>

unsigned pillarbox_forks; /* how often this process is a child of a fork, since the extension was loaded */

enum { NOTED_FILES_MAX = 65536 };
static volatile unsigned char is_noted[NOTED_FILES_MAX]; /* by descriptor: a file that a child must close */
static volatile int highest_noted = -1;

/* Called by the C library in the child, where hardly anything is allowed. */
static void
handle_fork_in_child(void)
{
    int error = errno;
    pillarbox_forks++;
    for (int fd = 0; fd <= highest_noted; fd++) {
        if (is_noted[fd]) {
            is_noted[fd] = 0;
            close(fd);
        }
    }
    highest_noted = -1;
    errno = error;
}

int
handle_fork(SpeedupsState *state)
{
    state->forks_handled = pillarbox_forks; /* first: the handler itself uses functions that check */
    if (state->fork_handler == NULL) {
        return 0;
    }
    PyObject *result = PyObject_CallNoArgs(state->fork_handler);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

static PyObject *
check_fork_function(PyObject *module, PyObject *Py_UNUSED(no_args))
{
    if (check_fork(state_of_module(module)) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
set_fork_handler(PyObject *module, PyObject *handler)
{
    SpeedupsState *state = state_of_module(module);
    Py_XSETREF(state->fork_handler, Py_NewRef(handler));
    Py_RETURN_NONE;
}

static PyObject *
mark_fork_handled(PyObject *module, PyObject *Py_UNUSED(no_args))
{
    state_of_module(module)->forks_handled = pillarbox_forks;
    Py_RETURN_NONE;
}

static PyObject *
reset_interpreter(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(no_args))
{
    PyOS_AfterFork_Child();
    Py_RETURN_NONE;
}

static PyObject *
note_open(PyObject *Py_UNUSED(module), PyObject *number)
{
    int fd = (int)PyLong_AsLong(number);
    if (fd == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (fd >= 0 && fd < NOTED_FILES_MAX) {
        is_noted[fd] = 1;
        if (fd > highest_noted) {
            highest_noted = fd;
        }
    }
    Py_RETURN_NONE;
}

static PyObject *
note_closed(PyObject *Py_UNUSED(module), PyObject *number)
{
    int fd = (int)PyLong_AsLong(number);
    if (fd == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (fd < 0 || fd >= NOTED_FILES_MAX) {
        Py_RETURN_TRUE;
    }
    int was_noted = is_noted[fd];
    is_noted[fd] = 0;
    return PyBool_FromLong(was_noted);
}

static PyMethodDef fork_functions[] = {
    {"check_fork", check_fork_function, METH_NOARGS,
     "check_fork($module, /)\n--\n\nCall the handler if this process was forked since the last check."},
    {"set_fork_handler", set_fork_handler, METH_O,
     "set_fork_handler($module, handler, /)\n--\n\nSet what is called, without arguments, at the first check after a fork."},
    {"mark_fork_handled", mark_fork_handled, METH_NOARGS,
     "mark_fork_handled($module, /)\n--\n\nNote that the last fork was handled, so that no check calls the handler for it."},
    {"reset_interpreter", reset_interpreter, METH_NOARGS,
     "reset_interpreter($module, /)\n--\n\nDo what Python does in a child that it has forked itself, which calls its hooks."},
    {"note_open", note_open, METH_O, "note_open($module, fd, /)\n--\n\nHave each forked child close a file, whoever forks it."},
    {"note_closed", note_closed, METH_O,
     "note_closed($module, fd, /)\n--\n\nForget an open file. False if a fork has closed it."},
    {NULL, NULL, 0, NULL},
};

int
fork_exec(PyObject *module)
{
    static int is_registered;
    if (!is_registered) {
        if (pthread_atfork(NULL, NULL, handle_fork_in_child) != 0) {
            PyErr_NoMemory();
            return -1;
        }
        is_registered = 1;
    }
    state_of_module(module)->forks_handled = pillarbox_forks;
    return PyModule_AddFunctions(module, fork_functions);
}

/* System calls as calls of one Python function: `system_call` of `tests/crash/compiled_order.py`.

It is called as system_call(name, *arguments), and answers with a whole number: the result, or an errno as a negative number; for
what returns more, with a tuple or with bytes. The code of the package has given up the interpreter lock here, so each call takes
it and gives it back. Another greenlet may run meanwhile, also in here. */

#define PILLARBOX_SIMULATED_CALLS_C
#include "simulated_calls.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <string.h>

/* What the handler answers: a new reference, or NULL with errno set. */
static PyObject *
ask(const char *name, const char *format, ...)
{
    static PyObject *handler;
    if (handler == NULL) {
        PyObject *module = PyImport_ImportModule("tests.crash.compiled_order");
        handler = module == NULL ? NULL : PyObject_GetAttrString(module, "system_call");
        Py_XDECREF(module);
    }
    va_list values;
    va_start(values, format);
    PyObject *arguments = handler == NULL ? NULL : Py_VaBuildValue(format, values);
    va_end(values);
    PyObject *bound = arguments == NULL ? NULL : Py_BuildValue("(s)", name);
    PyObject *all = bound == NULL ? NULL : PySequence_Concat(bound, arguments);
    PyObject *answer = all == NULL ? NULL : PyObject_CallObject(handler, all);
    Py_XDECREF(all);
    Py_XDECREF(bound);
    Py_XDECREF(arguments);
    if (answer == NULL) { /* the handler keeps what is raised to itself */
        PyErr_Print();
        Py_FatalError("the handler of simulated system calls has raised");
    }
    if (PyLong_Check(answer) && PyLong_AsLong(answer) < 0) {
        errno = (int)-PyLong_AsLong(answer);
        Py_CLEAR(answer);
    }
    return answer;
}

/* The same as a number. */
#define NUMBER(...)                                                                                                                \
    do {                                                                                                                           \
        PyGILState_STATE lock = PyGILState_Ensure();                                                                               \
        PyObject *answer = ask(__VA_ARGS__);                                                                                       \
        int error = errno;                                                                                                         \
        long result = answer == NULL ? -1 : PyLong_AsLong(answer);                                                                 \
        Py_XDECREF(answer);                                                                                                        \
        PyGILState_Release(lock);                                                                                                  \
        errno = error;                                                                                                             \
        return (int)result;                                                                                                        \
    } while (0)

int
simulated_open(const char *path, int flags, ...)
{
    NUMBER("open", "(si)", path, flags);
}

int
simulated_close(int fd)
{
    NUMBER("close", "(i)", fd);
}

int
simulated_flock(int fd, int operation)
{
    NUMBER("flock", "(ii)", fd, operation);
}

/* Fill in what is answered: (inode, names, bytes). */
static int
fill(PyObject *answer, struct stat *facts)
{
    unsigned long inode, names;
    long long size;
    if (answer == NULL) {
        return -1;
    }
    memset(facts, 0, sizeof *facts);
    if (!PyArg_ParseTuple(answer, "kkL", &inode, &names, &size)) {
        PyErr_Print();
        Py_FatalError("the handler of simulated system calls answers nonsense");
    }
    facts->st_mode = S_IFREG | 0600;
    facts->st_uid = geteuid();
    facts->st_dev = 1;
    facts->st_ino = inode;
    facts->st_nlink = names;
    facts->st_size = size;
    return 0;
}

#define FACTS(facts, ...)                                                                                                          \
    do {                                                                                                                           \
        PyGILState_STATE lock = PyGILState_Ensure();                                                                               \
        PyObject *answer = ask(__VA_ARGS__);                                                                                       \
        int error = errno;                                                                                                         \
        int result = fill(answer, facts);                                                                                          \
        Py_XDECREF(answer);                                                                                                        \
        PyGILState_Release(lock);                                                                                                  \
        errno = error;                                                                                                             \
        return result;                                                                                                             \
    } while (0)

int
simulated_fstat(int fd, struct stat *facts)
{
    FACTS(facts, "fstat", "(i)", fd);
}

int
simulated_lstat(const char *path, struct stat *facts)
{
    FACTS(facts, "lstat", "(s)", path);
}

int
simulated_fstatat(int directory, const char *name, struct stat *facts, int flags)
{
    FACTS(facts, "fstatat", "(isi)", directory, name, flags);
}

int
simulated_rename(const char *source, const char *target)
{
    NUMBER("rename", "(ss)", source, target);
}

int
simulated_fchown(int fd, uid_t user, gid_t group)
{
    NUMBER("fchown", "(iII)", fd, (unsigned)user, (unsigned)group);
}

int
simulated_sync_file_range(int fd, off_t offset, off_t count, unsigned flags)
{
    NUMBER("sync_file_range", "(iLLI)", fd, (long long)offset, (long long)count, flags);
}

int
simulated_fdatasync(int fd)
{
    NUMBER("fdatasync", "(i)", fd);
}

int
simulated_fsync(int fd)
{
    NUMBER("fsync", "(i)", fd);
}

ssize_t
simulated_pread(int fd, void *buffer, size_t count, off_t offset)
{
    PyGILState_STATE lock = PyGILState_Ensure();
    PyObject *answer = ask("pread", "(inL)", fd, (Py_ssize_t)count, (long long)offset);
    int error = errno;
    ssize_t size = -1;
    if (answer != NULL) {
        size = PyBytes_GET_SIZE(answer);
        memcpy(buffer, PyBytes_AS_STRING(answer), (size_t)size);
        Py_DECREF(answer);
    }
    PyGILState_Release(lock);
    errno = error;
    return size;
}

ssize_t
simulated_write(int fd, const void *buffer, size_t count)
{
    NUMBER("write", "(iy#)", fd, buffer, (Py_ssize_t)count);
}

int
simulated_ftruncate(int fd, off_t size)
{
    NUMBER("ftruncate", "(iL)", fd, (long long)size);
}

/* An open directory: the names that were there when it was opened, and the errno that reading them ends with, or 0. */
typedef struct {
    PyObject *names;
    Py_ssize_t next;
    int error;
    int number;
    struct dirent entry;
} Directory;

DIR *
simulated_opendir(const char *path)
{
    PyGILState_STATE lock = PyGILState_Ensure();
    PyObject *answer = ask("opendir", "(s)", path);
    int error = errno;
    Directory *directory = NULL;
    if (answer != NULL) {
        directory = PyMem_RawCalloc(1, sizeof *directory);
        if (!PyArg_ParseTuple(answer, "iOi", &directory->number, &directory->names, &directory->error)) {
            PyErr_Print();
            Py_FatalError("the handler of simulated system calls answers nonsense");
        }
        Py_INCREF(directory->names);
        Py_DECREF(answer);
    }
    PyGILState_Release(lock);
    errno = error;
    return (DIR *)directory;
}

struct dirent *
simulated_readdir(DIR *opened)
{
    Directory *directory = (Directory *)opened;
    PyGILState_STATE lock = PyGILState_Ensure();
    bool ended = directory->next == PyList_GET_SIZE(directory->names);
    if (!ended) {
        const char *name = PyUnicode_AsUTF8(PyList_GET_ITEM(directory->names, directory->next++));
        strncpy(directory->entry.d_name, name, sizeof directory->entry.d_name - 1);
        directory->entry.d_type = DT_REG;
    }
    PyGILState_Release(lock);
    if (ended && directory->error) {
        errno = directory->error;
    }
    return ended ? NULL : &directory->entry;
}

int
simulated_closedir(DIR *opened)
{
    Directory *directory = (Directory *)opened;
    PyGILState_STATE lock = PyGILState_Ensure();
    Py_XDECREF(ask("closedir", "(i)", directory->number));
    Py_DECREF(directory->names);
    PyMem_RawFree(directory);
    PyGILState_Release(lock);
    return 0;
}

int
simulated_dirfd(DIR *opened)
{
    return ((Directory *)opened)->number;
}

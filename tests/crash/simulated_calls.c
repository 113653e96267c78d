/* Replaces system calls by calls of one Python function, `system_call` of `tests/crash/compiled_order.py`.

It is called as system_call(name, *arguments), and returns an integer: the result, or a negative errno. For calls with more
results it returns a tuple or bytes. The code of the package has released the GIL, so each call takes it and releases it again.
Another greenlet may run meanwhile, also in this code. */

#define PILLARBOX_SIMULATED_CALLS_C
#include "simulated_calls.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <string.h>

/* Call the handler. Returns a new reference to its result, or NULL with errno set. */
static PyObject *
call_handler(const char *name, const char *format, ...)
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
    PyObject *name_tuple = arguments == NULL ? NULL : Py_BuildValue("(s)", name);
    PyObject *all = name_tuple == NULL ? NULL : PySequence_Concat(name_tuple, arguments);
    PyObject *result_object = all == NULL ? NULL : PyObject_CallObject(handler, all);
    Py_XDECREF(all);
    Py_XDECREF(name_tuple);
    Py_XDECREF(arguments);
    if (result_object == NULL) { /* the handler stores exceptions, and never raises */
        PyErr_Print();
        Py_FatalError("the handler of simulated system calls has raised");
    }
    if (PyLong_Check(result_object) && PyLong_AsLong(result_object) < 0) {
        errno = (int)-PyLong_AsLong(result_object);
        Py_CLEAR(result_object);
    }
    return result_object;
}

/* Call the handler, and return its result as a number. */
#define RETURN_NUMBER(...)                                                                                                         \
    do {                                                                                                                           \
        PyGILState_STATE lock = PyGILState_Ensure();                                                                               \
        PyObject *result_object = call_handler(__VA_ARGS__);                                                                       \
        int error = errno;                                                                                                         \
        long result = result_object == NULL ? -1 : PyLong_AsLong(result_object);                                                   \
        Py_XDECREF(result_object);                                                                                                 \
        PyGILState_Release(lock);                                                                                                  \
        errno = error;                                                                                                             \
        return (int)result;                                                                                                        \
    } while (0)

int
simulated_open(const char *path, int flags, ...)
{
    RETURN_NUMBER("open", "(si)", path, flags);
}

int
simulated_close(int fd)
{
    RETURN_NUMBER("close", "(i)", fd);
}

/* The sources move descriptors of standard input, output and error; those of the simulated disk are higher. */
int
simulated_fcntl(int Py_UNUSED(fd))
{
    errno = EBADF;
    return -1;
}

int
simulated_flock(int fd, int operation)
{
    RETURN_NUMBER("flock", "(ii)", fd, operation);
}

/* Fill in the result of the handler: (inode, names, bytes). */
static int
fill(PyObject *result_object, struct stat *info)
{
    unsigned long inode, names;
    long long size;
    if (result_object == NULL) {
        return -1;
    }
    memset(info, 0, sizeof *info);
    if (!PyArg_ParseTuple(result_object, "kkL", &inode, &names, &size)) {
        PyErr_Print();
        Py_FatalError("the handler of simulated system calls returned an invalid result");
    }
    info->st_mode = S_IFREG | 0600;
    info->st_uid = geteuid();
    info->st_dev = 1;
    info->st_ino = inode;
    info->st_nlink = names;
    info->st_size = size;
    return 0;
}

#define RETURN_STAT(info, ...)                                                                                                     \
    do {                                                                                                                           \
        PyGILState_STATE lock = PyGILState_Ensure();                                                                               \
        PyObject *result_object = call_handler(__VA_ARGS__);                                                                       \
        int error = errno;                                                                                                         \
        int result = fill(result_object, info);                                                                                    \
        Py_XDECREF(result_object);                                                                                                 \
        PyGILState_Release(lock);                                                                                                  \
        errno = error;                                                                                                             \
        return result;                                                                                                             \
    } while (0)

int
simulated_fstat(int fd, struct stat *info)
{
    RETURN_STAT(info, "fstat", "(i)", fd);
}

int
simulated_lstat(const char *path, struct stat *info)
{
    RETURN_STAT(info, "lstat", "(s)", path);
}

int
simulated_fstatat(int directory, const char *name, struct stat *info, int flags)
{
    RETURN_STAT(info, "fstatat", "(isi)", directory, name, flags);
}

int
simulated_rename(const char *source, const char *target)
{
    RETURN_NUMBER("rename", "(ss)", source, target);
}

int
simulated_fchown(int fd, uid_t user, gid_t group)
{
    RETURN_NUMBER("fchown", "(iII)", fd, (unsigned)user, (unsigned)group);
}

int
simulated_sync_file_range(int fd, off_t offset, off_t count, unsigned flags)
{
    RETURN_NUMBER("sync_file_range", "(iLLI)", fd, (long long)offset, (long long)count, flags);
}

int
simulated_fdatasync(int fd)
{
    RETURN_NUMBER("fdatasync", "(i)", fd);
}

int
simulated_fsync(int fd)
{
    RETURN_NUMBER("fsync", "(i)", fd);
}

ssize_t
simulated_pread(int fd, void *buffer, size_t count, off_t offset)
{
    PyGILState_STATE lock = PyGILState_Ensure();
    PyObject *result_object = call_handler("pread", "(inL)", fd, (Py_ssize_t)count, (long long)offset);
    int error = errno;
    ssize_t size = -1;
    if (result_object != NULL) {
        size = PyBytes_GET_SIZE(result_object);
        memcpy(buffer, PyBytes_AS_STRING(result_object), (size_t)size);
        Py_DECREF(result_object);
    }
    PyGILState_Release(lock);
    errno = error;
    return size;
}

ssize_t
simulated_write(int fd, const void *buffer, size_t count)
{
    RETURN_NUMBER("write", "(iy#)", fd, buffer, (Py_ssize_t)count);
}

int
simulated_ftruncate(int fd, off_t size)
{
    RETURN_NUMBER("ftruncate", "(iL)", fd, (long long)size);
}

/* An open directory: the names at the time when it was opened, and the errno with which reading ends, or 0. */
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
    PyObject *result_object = call_handler("opendir", "(s)", path);
    int error = errno;
    Directory *directory = NULL;
    if (result_object != NULL) {
        directory = PyMem_RawCalloc(1, sizeof *directory);
        if (!PyArg_ParseTuple(result_object, "iOi", &directory->number, &directory->names, &directory->error)) {
            PyErr_Print();
            Py_FatalError("the handler of simulated system calls returned an invalid result");
        }
        Py_INCREF(directory->names);
        Py_DECREF(result_object);
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
    Py_XDECREF(call_handler("closedir", "(i)", directory->number));
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

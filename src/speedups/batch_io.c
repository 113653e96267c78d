/* Makes several system calls in one call, with the GIL released. `store/filesystem.py` makes them one by one in Python.

A thread that takes the GIL back after each system call delays the threads that run Python each time, for longer than most of
these system calls take. No function here decides how to handle an error: it returns the errno. */

#define _GNU_SOURCE
#include "speedups.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* Encoded paths. */
typedef struct {
    Py_ssize_t count;
    PyObject **encoded; /* bytes */
} Paths;

static void
free_paths(Paths *paths)
{
    for (Py_ssize_t at = 0; at < paths->count; at++) {
        Py_DECREF(paths->encoded[at]);
    }
    PyMem_Free(paths->encoded);
    paths->count = 0;
    paths->encoded = NULL;
}

/* Encode a sequence of paths. Returns 0, or -1 with an exception set. Works on a copy, because other threads may change the
   sequence meanwhile. */
static int
encode(PyObject *sequence, Paths *paths)
{
    paths->count = 0;
    PyObject *tuple = PySequence_Tuple(sequence);
    paths->encoded = tuple == NULL ? NULL : PyMem_New(PyObject *, (size_t)PyTuple_GET_SIZE(tuple) + 1);
    if (tuple != NULL && paths->encoded == NULL) {
        PyErr_NoMemory();
    }
    for (Py_ssize_t at = 0; paths->encoded != NULL && at < PyTuple_GET_SIZE(tuple); at++) {
        if (!PyUnicode_FSConverter(PyTuple_GET_ITEM(tuple, at), &paths->encoded[at])) {
            free_paths(paths);
            break;
        }
        paths->count++;
    }
    Py_XDECREF(tuple);
    return paths->encoded == NULL ? -1 : 0;
}

static const char *
path_at(const Paths *paths, Py_ssize_t at)
{
    return PyBytes_AS_STRING(paths->encoded[at]);
}

/* Convert a sequence of numbers to an array. The caller frees it with PyMem_Free. Returns NULL with an exception set. */
static int *
numbers_of(PyObject *sequence, Py_ssize_t *count)
{
    PyObject *tuple = PySequence_Tuple(sequence);
    if (tuple == NULL) {
        return NULL;
    }
    *count = PyTuple_GET_SIZE(tuple);
    int *numbers = PyMem_New(int, (size_t)*count + 1);
    if (numbers == NULL) {
        PyErr_NoMemory();
    }
    for (Py_ssize_t at = 0; numbers != NULL && at < *count; at++) {
        long number = PyLong_AsLong(PyTuple_GET_ITEM(tuple, at));
        if (number != (int)number && !PyErr_Occurred()) {
            PyErr_SetString(PyExc_OverflowError, "descriptor out of range");
        }
        if (PyErr_Occurred()) {
            PyMem_Free(numbers);
            numbers = NULL;
        }
        else {
            numbers[at] = (int)number;
        }
    }
    Py_DECREF(tuple);
    return numbers;
}

static PyObject *
list_of(const int *numbers, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t at = 0; list != NULL && at < count; at++) {
        PyObject *number = PyLong_FromLong(numbers[at]);
        if (number == NULL) {
            Py_CLEAR(list);
        }
        else {
            PyList_SET_ITEM(list, at, number);
        }
    }
    return list;
}

/* Start the writeback of each file, and wait for it. This makes no file durable. The kernel reports a writeback error only once,
   so an error is stored in `errors`, and the file is not synced afterwards. Where the system does not support the call, `errors`
   is 0, and the sync after it writes the data. */
static void
write_back_each(const int *fds, int *errors, Py_ssize_t count)
{
#ifdef SYNC_FILE_RANGE_WRITE
    const unsigned both = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
    enum { NOT_STARTED = -1 };
    for (Py_ssize_t at = 0; at < count; at++) {
        if (sync_file_range(fds[at], 0, 0, SYNC_FILE_RANGE_WRITE) < 0) {
            int unknown = errno == ENOSYS || errno == EINVAL || errno == ESPIPE || errno == EOPNOTSUPP;
            errors[at] = unknown ? NOT_STARTED : errno;
        }
    }
    for (Py_ssize_t at = 0; at < count; at++) {
        if (errors[at] == 0 && sync_file_range(fds[at], 0, 0, both) < 0) {
            errors[at] = errno;
        }
    }
    for (Py_ssize_t at = 0; at < count; at++) {
        errors[at] = errors[at] == NOT_STARTED ? 0 : errors[at];
    }
#else
    (void)fds, (void)errors, (void)count;
#endif
}

static int
sync_data(int fd)
{
#ifdef F_FULLFSYNC
    return fcntl(fd, F_FULLFSYNC); /* on macOS, fsync leaves the data in the drive's cache */
#else
    return fdatasync(fd);
#endif
}

/* Sync several files. Returns a list with 0 or the errno of each. All files are written back before the first is synced, so that
   one commit of the file system's journal covers them all: writers to other files may have to wait during a commit. */
static PyObject *
sync_each(PyObject *Py_UNUSED(self), PyObject *sequence)
{
    Py_ssize_t count;
    int *fds = numbers_of(sequence, &count);
    int *errors = fds == NULL ? NULL : PyMem_Calloc((size_t)count + 1, sizeof *errors);
    if (errors == NULL) {
        PyMem_Free(fds);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    if (count > 1) {
        write_back_each(fds, errors, count);
    }
    for (Py_ssize_t at = 0; at < count; at++) {
        while (errors[at] == 0 && sync_data(fds[at]) < 0) {
            if (errno != EINTR) {
                errors[at] = errno;
            }
        }
    }
    Py_END_ALLOW_THREADS
    PyObject *list = list_of(errors, count);
    PyMem_Free(fds);
    PyMem_Free(errors);
    return list;
}

/* Rename files up to the first failure. Returns the number of renamed files, and 0 or the errno of the failure. */
static PyObject *
rename_each(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *from, *to;
    Paths sources, targets;
    if (!PyArg_ParseTuple(args, "OO:rename_each", &from, &to) || encode(from, &sources) < 0) {
        return NULL;
    }
    if (encode(to, &targets) < 0) {
        free_paths(&sources);
        return NULL;
    }
    Py_ssize_t done = 0;
    int error = 0;
    if (sources.count == targets.count) {
        Py_BEGIN_ALLOW_THREADS
        for (; done < sources.count && error == 0; done += error == 0) {
            error = rename(path_at(&sources, done), path_at(&targets, done)) < 0 ? errno : 0;
        }
        Py_END_ALLOW_THREADS
    }
    else {
        PyErr_SetString(PyExc_ValueError, "rename_each needs as many sources as targets");
    }
    free_paths(&sources);
    free_paths(&targets);
    return PyErr_Occurred() ? NULL : Py_BuildValue("ni", done, error);
}

enum { FIRST_FD = 3 }; /* below it are standard input, output and error */

/* Open a file, never as standard input, output or error: where a program has closed one of these, what C code prints would be
   written into the file. Returns the descriptor, or -1 with errno set. */
static int
open_above_stdio(const char *path, int flags, int mode)
{
    int fd;
    do {
        fd = open(path, flags, mode);
    } while (fd < 0 && errno == EINTR);
    if (fd < 0 || fd >= FIRST_FD) {
        return fd;
    }
    int above = fcntl(fd, F_DUPFD_CLOEXEC, FIRST_FD);
    int error = errno;
    close(fd);
    errno = error;
    return above;
}

/* Create a file and lock it. Returns its descriptor; -1 if another process locked or removed it first; -2 with errno set. */
static int
create_locked(const char *path, int flags, int mode, long uid, long gid)
{
    struct stat info;
    int fd = open_above_stdio(path, flags, mode);
    if (fd < 0) {
        return -2;
    }
    if (uid >= 0 && fchown(fd, (uid_t)uid, (gid_t)gid) < 0) {
        errno = 0; /* ignored: the file system may not support owners */
    }
    int locked = flock(fd, LOCK_EX | LOCK_NB);
    if (locked == 0 && fstat(fd, &info) == 0) {
        if (info.st_nlink > 0) {
            return fd;
        }
        errno = EWOULDBLOCK;
    }
    int error = errno;
    close(fd);
    errno = error;
    return error == EWOULDBLOCK ? -1 : -2;
}

/* Create and lock files up to the first failure. Returns a list with the descriptor of each file, or -1 where another process
   locked it first; and 0 or the errno of the failure. */
static PyObject *
create_each(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *sequence;
    int flags, mode;
    long uid, gid;
    Paths paths;
    if (!PyArg_ParseTuple(args, "Oiill:create_each", &sequence, &flags, &mode, &uid, &gid) || encode(sequence, &paths) < 0) {
        return NULL;
    }
    int *fds = PyMem_New(int, (size_t)paths.count + 1);
    Py_ssize_t done = 0;
    int error = 0;
    if (fds != NULL) {
        Py_BEGIN_ALLOW_THREADS
        for (; done < paths.count && error == 0; done += error == 0) {
            fds[done] = create_locked(path_at(&paths, done), flags, mode, uid, gid);
            error = fds[done] == -2 ? errno : 0;
        }
        Py_END_ALLOW_THREADS
    }
    free_paths(&paths);
    PyObject *list = fds == NULL ? PyErr_NoMemory() : list_of(fds, done);
    if (list == NULL) {
        for (Py_ssize_t at = 0; at < done; at++) {
            close(fds[at]);
        }
    }
    PyMem_Free(fds);
    return list == NULL ? NULL : Py_BuildValue("Ni", list, error);
}

/* Open an existing file if it is safe to use: a regular file, with one hard link (or more if `linked`), owned by the user `owner`
   (or by anybody if `owner` is negative). Returns its descriptor; -1 with errno set; -2 if the file is not safe to use. */
static int
open_owned(const char *path, int flags, int linked, long long owner)
{
    struct stat info;
    int fd = open_above_stdio(path, flags, 0);
    if (fd < 0) {
        return -1;
    }
    if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && (linked || info.st_nlink <= 1)
        && (owner < 0 || info.st_uid == (uid_t)owner)) {
        return fd;
    }
    close(fd);
    return -2;
}

/* Returns the descriptor, or -1: then the caller opens the file step by step, and finds the reason. */
static PyObject *
open_existing(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *path;
    int flags, linked;
    long long owner;
    if (!PyArg_ParseTuple(args, "O&ipL:open_existing", PyUnicode_FSConverter, &path, &flags, &linked, &owner)) {
        return NULL;
    }
    int fd;
    Py_BEGIN_ALLOW_THREADS
    fd = open_owned(PyBytes_AS_STRING(path), flags, linked, owner);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    return PyLong_FromLong(fd < 0 ? -1 : fd);
}

/* Open and lock an existing file. Returns its descriptor, or a negative number if that fails, or if the path no longer names the
   file once it is locked. */
static int
open_owned_locked(const char *path, int flags, int linked, int shared, long long owner)
{
    struct stat opened, named;
    int fd = open_owned(path, flags, linked, owner);
    if (fd >= 0
        && (flock(fd, (shared ? LOCK_SH : LOCK_EX) | LOCK_NB) < 0 || fstat(fd, &opened) < 0 || lstat(path, &named) < 0
            || opened.st_ino != named.st_ino || opened.st_dev != named.st_dev)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static PyObject *
open_locked(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *path;
    int flags, linked, shared;
    long long owner;
    if (!PyArg_ParseTuple(args, "O&ippL:open_locked", PyUnicode_FSConverter, &path, &flags, &linked, &shared, &owner)) {
        return NULL;
    }
    int fd;
    Py_BEGIN_ALLOW_THREADS
    fd = open_owned_locked(PyBytes_AS_STRING(path), flags, linked, shared, owner);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    return PyLong_FromLong(fd < 0 ? -1 : fd);
}

/* Append lines to a file that ends with a whole line and is smaller than `below` bytes. Returns whether all were written. If not,
   the file is unchanged or ends with a torn line. */
static int
append_lines(int fd, const char *lines, Py_ssize_t size, long long below)
{
    struct stat info;
    char last;
    if (fstat(fd, &info) < 0 || info.st_size == 0 || info.st_size >= below || pread(fd, &last, 1, info.st_size - 1) != 1
        || last != '\n') {
        return 0;
    }
    Py_ssize_t written;
    do {
        written = write(fd, lines, (size_t)size);
    } while (written < 0 && errno == EINTR);
    if (written > 0 && written < size && ftruncate(fd, info.st_size) < 0) {
        return 0; /* the line stays torn, and the next append starts a new line */
    }
    return written == size;
}

/* Lock the file `lock`, and append lines to the file `path`. Returns the descriptor of the latter; or -1, and then nothing was
   written, or a torn line that could not be cut off. */
static PyObject *
append_locked(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *lock, *path;
    const char *lines;
    Py_ssize_t size;
    int flags;
    long long below, owner;
    if (!PyArg_ParseTuple(args, "O&O&y#iLL:append_locked", PyUnicode_FSConverter, &lock, PyUnicode_FSConverter, &path, &lines,
                          &size, &flags, &below, &owner)) {
        return NULL;
    }
    int fd = -1;
    Py_BEGIN_ALLOW_THREADS
    int lock_fd = open_owned_locked(PyBytes_AS_STRING(lock), flags, 0, 0, owner);
    if (lock_fd >= 0) {
        fd = open_owned(PyBytes_AS_STRING(path), flags | O_APPEND, 0, owner);
        if (fd >= 0 && !append_lines(fd, lines, size, below)) {
            close(fd);
            fd = -1;
        }
        close(lock_fd);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(lock);
    Py_DECREF(path);
    return PyLong_FromLong(fd < 0 ? -1 : fd);
}

/* Close files. Errors are ignored, because the kernel closes the descriptor even if it reports one. */
static PyObject *
close_each(PyObject *Py_UNUSED(self), PyObject *sequence)
{
    Py_ssize_t count;
    int *fds = numbers_of(sequence, &count);
    if (fds == NULL) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t at = 0; at < count; at++) {
        close(fds[at]);
    }
    Py_END_ALLOW_THREADS
    PyMem_Free(fds);
    Py_RETURN_NONE;
}

/* Sync a directory. Returns 0 or the errno. */
static PyObject *
sync_directory(PyObject *Py_UNUSED(self), PyObject *path)
{
    PyObject *encoded;
    if (!PyUnicode_FSConverter(path, &encoded)) {
        return NULL;
    }
    int error = 0;
    Py_BEGIN_ALLOW_THREADS
    int fd = open_above_stdio(PyBytes_AS_STRING(encoded), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    while (fd >= 0 && fsync(fd) < 0) {
        if (errno != EINTR) {
            error = errno;
            break;
        }
    }
    error = fd < 0 ? errno : error;
    if (fd >= 0) {
        close(fd);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(encoded);
    return PyLong_FromLong(error);
}

static PyMethodDef batch_io_functions[] = {
    {"sync_each", sync_each, METH_O, "sync_each(descriptors): a list with 0 or the errno of each file."},
    {"rename_each", rename_each, METH_VARARGS,
     "rename_each(sources, targets): rename files up to the first failure; the number of renamed files, and its errno or 0."},
    {"create_each", create_each, METH_VARARGS,
     "create_each(paths, flags, mode, uid, gid): create and lock files up to the first failure; their descriptors (-1 for a file "
     "that another process locked first), and its errno or 0. A uid of -1 leaves the owner as it is."},
    {"open_existing", open_existing, METH_VARARGS,
     "open_existing(path, flags, linked, owner): the descriptor of a file that is safe to use, or -1."},
    {"open_locked", open_locked, METH_VARARGS,
     "open_locked(path, flags, linked, shared, owner): lock a file that is safe to use and is still named `path`; its descriptor, or "
     "-1."},
    {"append_locked", append_locked, METH_VARARGS,
     "append_locked(lock, path, lines, flags, below, owner): lock one file, and append lines to another; the latter's descriptor, or "
     "-1."},
    {"close_each", close_each, METH_O, "close_each(descriptors): close files, and ignore errors."},
    {"sync_directory", sync_directory, METH_O, "sync_directory(path): sync a directory; 0 or the errno."},
    {NULL, NULL, 0, NULL},
};

int
batch_io_exec(PyObject *module)
{
    return PyModule_AddFunctions(module, batch_io_functions);
}

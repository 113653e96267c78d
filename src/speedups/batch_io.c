/* Several system calls in one call, without the interpreter lock; `store/filesystem.py` has the same in Python, one by one.

A thread that takes the interpreter lock back after each system call makes those that run Python wait for it each time, for
longer than most of these calls take. Nothing here decides anything; an error is returned as its errno. */

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

/* Encode a sequence of paths; 0, or -1 with an exception set. Of a copy: other threads could change the sequence meanwhile. */
static int
encode(PyObject *sequence, Paths *paths)
{
    paths->count = 0;
    PyObject *found = PySequence_Tuple(sequence);
    paths->encoded = found == NULL ? NULL : PyMem_New(PyObject *, (size_t)PyTuple_GET_SIZE(found) + 1);
    if (found != NULL && paths->encoded == NULL) {
        PyErr_NoMemory();
    }
    for (Py_ssize_t at = 0; paths->encoded != NULL && at < PyTuple_GET_SIZE(found); at++) {
        if (!PyUnicode_FSConverter(PyTuple_GET_ITEM(found, at), &paths->encoded[at])) {
            free_paths(paths);
            break;
        }
        paths->count++;
    }
    Py_XDECREF(found);
    return paths->encoded == NULL ? -1 : 0;
}

static const char *
path_at(const Paths *paths, Py_ssize_t at)
{
    return PyBytes_AS_STRING(paths->encoded[at]);
}

/* The numbers in a sequence as an array, to be freed with PyMem_Free; NULL with an exception set. */
static int *
numbers_of(PyObject *sequence, Py_ssize_t *count)
{
    PyObject *found = PySequence_Tuple(sequence);
    if (found == NULL) {
        return NULL;
    }
    *count = PyTuple_GET_SIZE(found);
    int *numbers = PyMem_New(int, (size_t)*count + 1);
    if (numbers == NULL) {
        PyErr_NoMemory();
    }
    for (Py_ssize_t at = 0; numbers != NULL && at < *count; at++) {
        long number = PyLong_AsLong(PyTuple_GET_ITEM(found, at));
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
    Py_DECREF(found);
    return numbers;
}

static PyObject *
list_of(const int *numbers, Py_ssize_t count)
{
    PyObject *found = PyList_New(count);
    for (Py_ssize_t at = 0; found != NULL && at < count; at++) {
        PyObject *number = PyLong_FromLong(numbers[at]);
        if (number == NULL) {
            Py_CLEAR(found);
        }
        else {
            PyList_SET_ITEM(found, at, number);
        }
    }
    return found;
}

/* Start writing the data of each file back, and wait for it. No file is durable then. A later sync does not report an error
   that was reported here, so the error is kept; only where writing could not be started at all, the sync decides. */
static void
write_each(const int *fds, int *errors, Py_ssize_t count)
{
#ifdef SYNC_FILE_RANGE_WRITE
    const unsigned both = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
    enum { NOT_BEGUN = -1 };
    for (Py_ssize_t at = 0; at < count; at++) {
        if (sync_file_range(fds[at], 0, 0, SYNC_FILE_RANGE_WRITE) < 0) {
            int unknown = errno == ENOSYS || errno == EINVAL || errno == ESPIPE || errno == EOPNOTSUPP;
            errors[at] = unknown ? NOT_BEGUN : errno;
        }
    }
    for (Py_ssize_t at = 0; at < count; at++) {
        if (errors[at] == 0 && sync_file_range(fds[at], 0, 0, both) < 0) {
            errors[at] = errno;
        }
    }
    for (Py_ssize_t at = 0; at < count; at++) {
        errors[at] = errors[at] == NOT_BEGUN ? 0 : errors[at];
    }
#else
    (void)fds, (void)errors, (void)count;
#endif
}

static int
sync_data(int fd)
{
#ifdef F_FULLFSYNC
    return fcntl(fd, F_FULLFSYNC); /* there fsync leaves the data in the drive's cache */
#else
    return fdatasync(fd);
#endif
}

/* Sync each of several files; for each 0 or its errno. All of them are written back before the first is synced: then one commit
   of the file system's journal covers them all, and during a commit writers to other files may have to wait. */
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
        write_each(fds, errors, count);
    }
    for (Py_ssize_t at = 0; at < count; at++) {
        while (errors[at] == 0 && sync_data(fds[at]) < 0) {
            if (errno != EINTR) {
                errors[at] = errno;
            }
        }
    }
    Py_END_ALLOW_THREADS
    PyObject *found = list_of(errors, count);
    PyMem_Free(fds);
    PyMem_Free(errors);
    return found;
}

/* Rename each up to the first that fails: how many were renamed, and the errno of the next one or 0. */
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
        PyErr_SetString(PyExc_ValueError, "as many sources as targets");
    }
    free_paths(&sources);
    free_paths(&targets);
    return PyErr_Occurred() ? NULL : Py_BuildValue("ni", done, error);
}

/* Create a file and take its lock: its descriptor; -1 if another process locked or removed it first; -2 with errno set. */
static int
create_locked(const char *path, int flags, int mode, long uid, long gid)
{
    struct stat found;
    int fd;
    do {
        fd = open(path, flags, mode);
    } while (fd < 0 && errno == EINTR);
    if (fd < 0) {
        return -2;
    }
    if (uid >= 0 && fchown(fd, (uid_t)uid, (gid_t)gid) < 0) {
        errno = 0; /* the file system has no owners */
    }
    int locked = flock(fd, LOCK_EX | LOCK_NB);
    if (locked == 0 && fstat(fd, &found) == 0) {
        if (found.st_nlink > 0) {
            return fd;
        }
        errno = EWOULDBLOCK;
    }
    int error = errno;
    close(fd);
    errno = error;
    return error == EWOULDBLOCK ? -1 : -2;
}

/* Create each up to the first that fails: the descriptors, or -1, and the errno of the next one or 0. */
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
    PyObject *found = fds == NULL ? PyErr_NoMemory() : list_of(fds, done);
    if (found == NULL) {
        for (Py_ssize_t at = 0; at < done; at++) {
            close(fds[at]);
        }
    }
    PyMem_Free(fds);
    return found == NULL ? NULL : Py_BuildValue("Ni", found, error);
}

/* Open an existing file if it is safe to use: regular, with one name (or more if `linked`), and owned by this user, unless that
   is root. Its descriptor; -1 with errno set; -2 if it is not safe to use. */
static int
open_owned(const char *path, int flags, int linked)
{
    struct stat found;
    int fd;
    do {
        fd = open(path, flags);
    } while (fd < 0 && errno == EINTR);
    if (fd < 0) {
        return -1;
    }
    uid_t user = geteuid();
    if (fstat(fd, &found) == 0 && S_ISREG(found.st_mode) && (linked || found.st_nlink <= 1)
        && (user == 0 || found.st_uid == user)) {
        return fd;
    }
    close(fd);
    return -2;
}

/* The descriptor, or -1: then the caller finds out why. */
static PyObject *
open_existing(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *path;
    int flags, linked;
    if (!PyArg_ParseTuple(args, "O&ip:open_existing", PyUnicode_FSConverter, &path, &flags, &linked)) {
        return NULL;
    }
    int fd;
    Py_BEGIN_ALLOW_THREADS
    fd = open_owned(PyBytes_AS_STRING(path), flags, linked);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    return PyLong_FromLong(fd < 0 ? -1 : fd);
}

/* The same with its lock, if the path still names the file once it is locked. */
static int
open_owned_locked(const char *path, int flags, int linked, int shared)
{
    struct stat opened, named;
    int fd = open_owned(path, flags, linked);
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
    if (!PyArg_ParseTuple(args, "O&ipp:open_locked", PyUnicode_FSConverter, &path, &flags, &linked, &shared)) {
        return NULL;
    }
    int fd;
    Py_BEGIN_ALLOW_THREADS
    fd = open_owned_locked(PyBytes_AS_STRING(path), flags, linked, shared);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    return PyLong_FromLong(fd < 0 ? -1 : fd);
}

/* Append lines to a file that ends in a whole line and is smaller than `below`; whether all were written. If not, the file is
   as it was, or ends in a torn line. */
static int
append_lines(int fd, const char *lines, Py_ssize_t size, long long below)
{
    struct stat found;
    char last;
    if (fstat(fd, &found) < 0 || found.st_size == 0 || found.st_size >= below || pread(fd, &last, 1, found.st_size - 1) != 1
        || last != '\n') {
        return 0;
    }
    Py_ssize_t written;
    do {
        written = write(fd, lines, (size_t)size);
    } while (written < 0 && errno == EINTR);
    if (written > 0 && written < size && ftruncate(fd, found.st_size) < 0) {
        return 0; /* torn: the next append starts a new line */
    }
    return written == size;
}

/* Append lines to an existing file while the lock of another one is held: the descriptor of the file; or -1, and then nothing
   was written but a part that cannot be cut off. */
static PyObject *
append_locked(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *lock, *path;
    const char *lines;
    Py_ssize_t size;
    int flags;
    long long below;
    if (!PyArg_ParseTuple(args, "O&O&y#iL:append_locked", PyUnicode_FSConverter, &lock, PyUnicode_FSConverter, &path, &lines, &size,
                          &flags, &below)) {
        return NULL;
    }
    int fd = -1;
    Py_BEGIN_ALLOW_THREADS
    int held = open_owned_locked(PyBytes_AS_STRING(lock), flags, 0, 0);
    if (held >= 0) {
        fd = open_owned(PyBytes_AS_STRING(path), flags | O_APPEND, 0);
        if (fd >= 0 && !append_lines(fd, lines, size, below)) {
            close(fd);
            fd = -1;
        }
        close(held);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(lock);
    Py_DECREF(path);
    return PyLong_FromLong(fd < 0 ? -1 : fd);
}

/* Close each. Errors are ignored: the descriptor is gone. */
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

/* Sync a directory: 0 or the errno. */
static PyObject *
sync_directory(PyObject *Py_UNUSED(self), PyObject *path)
{
    PyObject *encoded;
    if (!PyUnicode_FSConverter(path, &encoded)) {
        return NULL;
    }
    int error = 0;
    Py_BEGIN_ALLOW_THREADS
    int fd = open(PyBytes_AS_STRING(encoded), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
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
    {"sync_each", sync_each, METH_O, "sync_each(descriptors): for each 0 or its errno."},
    {"rename_each", rename_each, METH_VARARGS,
     "rename_each(sources, targets): up to the first that fails, how many are renamed, and the errno of the next one or 0."},
    {"create_each", create_each, METH_VARARGS,
     "create_each(paths, flags, mode, uid, gid): up to the first that fails, the descriptors of new, locked files, -1 for one that "
     "another process locked first; and the errno of the next one or 0. A uid of -1 changes no owner."},
    {"open_existing", open_existing, METH_VARARGS,
     "open_existing(path, flags, linked): the descriptor of a file that is safe to use, or -1."},
    {"open_locked", open_locked, METH_VARARGS,
     "open_locked(path, flags, linked, shared): the same with its lock, and only while the path still names it."},
    {"append_locked", append_locked, METH_VARARGS,
     "append_locked(lock, path, lines, flags, below): the descriptor of the file once the lines are there, or -1."},
    {"close_each", close_each, METH_O, "close_each(descriptors)."},
    {"sync_directory", sync_directory, METH_O, "sync_directory(path): 0 or the errno."},
    {NULL, NULL, 0, NULL},
};

int
batch_io_exec(PyObject *module)
{
    return PyModule_AddFunctions(module, batch_io_functions);
}

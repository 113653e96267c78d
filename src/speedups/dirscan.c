/* Reads directories without the interpreter lock; `store/dirscan.py` has the same in Python.

Each system call of a thread that gives the lock up for it and takes it again costs whoever accepts events 15 to 60 us; a
directory with 200,000 files takes as many. Here the lock comes back once in some thousands of files, to check for signals, and
only the names that the caller asks for become objects. */

#include "speedups.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum {
    AT_ONCE = 4096, /* entries between two looks for signals */
    CHUNK_BYTES = 1 << 15, /* of the names that become objects in one go */
    STAMP_DIGITS = 16,
    NAME_BYTES = 4096, /* more than any system gives, and it may be more than `struct dirent` says */
};

typedef struct {
    const char *bytes;
    size_t length;
} Text;

/* Names that begin and end so; with `whole` those that are `begin`, no more and no less. */
typedef struct {
    Text begin;
    Text end;
    bool whole;
} Pattern;

/* The bytes belong to the texts in the tuple, which must stay. */
typedef struct {
    Pattern *each;
    Py_ssize_t count;
} Patterns;

/* One file of a directory. `name` is good until the next. */
typedef struct {
    const char *name;
    size_t length;
    long long size;
    Py_ssize_t pattern; /* the first that it follows */
} File;

typedef enum { MORE, FOUND, END, FAILED } Step;

static int
read_patterns(PyObject *tuple, Patterns *patterns)
{
    patterns->count = PyTuple_GET_SIZE(tuple);
    patterns->each = PyMem_Calloc((size_t)patterns->count + 1, sizeof(Pattern));
    if (patterns->each == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t index = 0; index < patterns->count; index++) {
        Pattern *pattern = &patterns->each[index];
        Py_ssize_t begin, end = 0;
        PyObject *one = PyTuple_GET_ITEM(tuple, index);
        if (!PyTuple_Check(one)) {
            PyErr_SetString(PyExc_TypeError, "a pattern is a tuple");
            return -1;
        }
        if (!PyArg_ParseTuple(one, "s#z#:pattern", &pattern->begin.bytes, &begin, &pattern->end.bytes, &end)) {
            return -1;
        }
        pattern->whole = pattern->end.bytes == NULL;
        pattern->begin.length = (size_t)begin;
        pattern->end.length = (size_t)end;
    }
    return 0;
}

static bool
follows(const File *file, const Pattern *pattern)
{
    Text begin = pattern->begin, end = pattern->end;
    if (file->length < begin.length || memcmp(file->name, begin.bytes, begin.length) != 0) {
        return false;
    }
    if (pattern->whole) {
        return file->length == begin.length;
    }
    return file->length >= end.length && memcmp(file->name + file->length - end.length, end.bytes, end.length) == 0;
}

/* The next entry: FOUND where it is a regular file whose name follows a pattern. Without the lock; errors are in errno. */
static Step
next_entry(DIR *directory, Patterns patterns, bool sizes, File *file)
{
    errno = 0;
    struct dirent *entry = readdir(directory);
    if (entry == NULL) {
        return errno ? FAILED : END;
    }
    if (entry->d_type != DT_REG && entry->d_type != DT_UNKNOWN) {
        return MORE;
    }
    *file = (File){entry->d_name, strlen(entry->d_name), 0, 0};
    while (file->pattern < patterns.count && !follows(file, &patterns.each[file->pattern])) {
        file->pattern++;
    }
    if (file->pattern == patterns.count) {
        return MORE;
    }
    if (sizes || entry->d_type == DT_UNKNOWN) {
        struct stat facts;
        if (fstatat(dirfd(directory), entry->d_name, &facts, AT_SYMLINK_NOFOLLOW) < 0) {
            return errno == ENOENT ? MORE : FAILED; /* it went away meanwhile */
        }
        if (!S_ISREG(facts.st_mode)) {
            return MORE;
        }
        file->size = facts.st_size;
    }
    return FOUND;
}

static PyObject *
failed(PyObject *path)
{
    return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
}

/* Calls `each` for these files, without the lock; `each` returns -1 where there is no memory. -1 with an exception set. */
static int
read_all(PyObject *path, Patterns patterns, bool sizes, int (*each)(void *, const File *), void *context)
{
    PyObject *encoded;
    if (!PyUnicode_FSConverter(path, &encoded)) {
        return -1;
    }
    DIR *directory;
    Py_BEGIN_ALLOW_THREADS
    directory = opendir(PyBytes_AS_STRING(encoded));
    Py_END_ALLOW_THREADS
    Py_DECREF(encoded);
    if (directory == NULL) {
        failed(path);
        return -1;
    }
    Step step = MORE;
    int error = 0;
    bool interrupted = false, full = false;
    while (step <= FOUND && !full && !interrupted) {
        Py_BEGIN_ALLOW_THREADS
        File file;
        for (int left = AT_ONCE; left > 0 && step <= FOUND && !full; left--) {
            step = next_entry(directory, patterns, sizes, &file);
            full = step == FOUND && each(context, &file) < 0;
        }
        error = errno;
        Py_END_ALLOW_THREADS
        interrupted = step <= FOUND && PyErr_CheckSignals() < 0;
    }
    Py_BEGIN_ALLOW_THREADS
    closedir(directory);
    Py_END_ALLOW_THREADS
    if (interrupted) {
        return -1;
    }
    if (full) {
        PyErr_NoMemory();
        return -1;
    }
    if (step == FAILED) {
        errno = error;
        failed(path);
        return -1;
    }
    return 0;
}

/* The names, or names and sizes, in chunks. */

typedef struct {
    PyObject_HEAD
    DIR *directory; /* NULL at the end, and while somebody reads on */
    PyObject *path;
    PyObject *tuple;
    Patterns patterns;
    bool sizes;
    char *names; /* of one part, each with its zero behind it */
    long long *each;
} DirectoryChunks;

static int
chunks_init(PyObject *object, PyObject *args, PyObject *named)
{
    static char *names[] = {"path", "patterns", "sizes", NULL};
    DirectoryChunks *chunks = (DirectoryChunks *)object;
    PyObject *path, *tuple;
    int sizes;
    if (chunks->path != NULL || !PyArg_ParseTupleAndKeywords(args, named, "UO!p:DirectoryChunks", names, &path, &PyTuple_Type, &tuple, &sizes)) {
        return PyErr_Occurred() ? -1 : (PyErr_SetString(PyExc_TypeError, "made already"), -1);
    }
    chunks->sizes = sizes;
    chunks->path = Py_NewRef(path);
    chunks->tuple = Py_NewRef(tuple);
    chunks->names = malloc(CHUNK_BYTES);
    chunks->each = malloc(CHUNK_BYTES / 2 * sizeof(long long)); /* the shortest name has one byte */
    PyObject *encoded = NULL;
    if (chunks->names == NULL || chunks->each == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (read_patterns(tuple, &chunks->patterns) < 0 || !PyUnicode_FSConverter(path, &encoded)) {
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS
    chunks->directory = opendir(PyBytes_AS_STRING(encoded));
    Py_END_ALLOW_THREADS
    Py_DECREF(encoded);
    return chunks->directory == NULL ? (failed(path), -1) : 0;
}

static void
chunks_dealloc(PyObject *object)
{
    DirectoryChunks *chunks = (DirectoryChunks *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (chunks->directory != NULL) {
        closedir(chunks->directory);
    }
    free(chunks->names);
    free(chunks->each);
    Py_XDECREF(chunks->path);
    PyMem_Free(chunks->patterns.each);
    Py_XDECREF(chunks->tuple);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *
object_of(const DirectoryChunks *chunks, const char *name, size_t length, long long size)
{
    PyObject *text = PyUnicode_DecodeFSDefaultAndSize(name, (Py_ssize_t)length);
    return text == NULL || !chunks->sizes ? text : Py_BuildValue("NL", text, size);
}

/* A list of what is in the buffer. The garbage collector must not show the list to anybody while it is not filled. */
static PyObject *
list_of_chunk(const DirectoryChunks *chunks, Py_ssize_t files)
{
    PyObject *list = PyList_New(files);
    if (list == NULL) {
        return NULL;
    }
    PyObject_GC_UnTrack(list);
    const char *name = chunks->names;
    for (Py_ssize_t index = 0; index < files; index++) {
        size_t length = strlen(name);
        PyObject *file = object_of(chunks, name, length, chunks->each[index]);
        if (file == NULL) {
            Py_DECREF(list);
            return NULL;
        }
        PyList_SET_ITEM(list, index, file);
        name += length + 1;
    }
    PyObject_GC_Track(list);
    return list;
}

static PyObject *
chunks_next(PyObject *object)
{
    DirectoryChunks *chunks = (DirectoryChunks *)object;
    DIR *directory = __atomic_exchange_n(&chunks->directory, NULL, __ATOMIC_ACQ_REL);
    if (directory == NULL) {
        return NULL;
    }
    Step step = MORE;
    Py_ssize_t files = 0;
    size_t used = 0;
    int error;
    Py_BEGIN_ALLOW_THREADS
    File file;
    for (int left = AT_ONCE; left > 0 && step <= FOUND && used + NAME_BYTES < CHUNK_BYTES; left--) {
        step = next_entry(directory, chunks->patterns, chunks->sizes, &file);
        if (step == FOUND && file.length >= NAME_BYTES) {
            errno = ENAMETOOLONG;
            step = FAILED;
        }
        if (step == FOUND) {
            memcpy(chunks->names + used, file.name, file.length + 1);
            chunks->each[files++] = file.size;
            used += file.length + 1;
        }
    }
    error = errno;
    if (step > FOUND) {
        closedir(directory);
    }
    Py_END_ALLOW_THREADS
    PyObject *list = NULL;
    if (step == FAILED) {
        errno = error;
        failed(chunks->path);
    }
    else if (step != END || files > 0) {
        list = list_of_chunk(chunks, files);
    }
    if (step <= FOUND) { /* not before the buffer is read: whoever reads on overwrites it */
        __atomic_store_n(&chunks->directory, directory, __ATOMIC_RELEASE);
    }
    return list;
}

static PyType_Slot chunks_slots[] = {
    {Py_tp_doc, "DirectoryChunks(path, patterns, sizes): lists of the names that follow a pattern, or of names and sizes."},
    {Py_tp_init, chunks_init},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, chunks_dealloc},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, chunks_next},
    {0, NULL},
};

static PyType_Spec chunks_spec = {
    .name = "pillarbox._speedups.DirectoryChunks",
    .basicsize = sizeof(DirectoryChunks),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = chunks_slots,
};

/* What a directory adds up to. */

typedef struct {
    long long files, bytes, empty;
    long long first, last; /* of the stamps; -1: there is none */
} Sum;

typedef struct {
    Sum *each;
    Patterns patterns;
} Sums;

static long long
stamp_in(const File *file, size_t at)
{
    if (file->length <= at + STAMP_DIGITS || file->name[at + STAMP_DIGITS] != '-') {
        return -1;
    }
    long long stamp = 0;
    for (const char *digit = file->name + at; digit < file->name + at + STAMP_DIGITS; digit++) {
        if (*digit < '0' || *digit > '9') {
            return -1;
        }
        stamp = stamp * 10 + (*digit - '0');
    }
    return stamp;
}

static int
add_up(void *context, const File *file)
{
    Sums *sums = context;
    Sum *sum = &sums->each[file->pattern];
    sum->files++;
    sum->bytes = add_saturated(sum->bytes, file->size); /* of sparse files there may be more than fits */
    sum->empty += file->size == 0;
    long long stamp = stamp_in(file, sums->patterns.each[file->pattern].begin.length);
    if (stamp >= 0) {
        sum->first = sum->first < 0 || stamp < sum->first ? stamp : sum->first;
        sum->last = stamp > sum->last ? stamp : sum->last;
    }
    return 0;
}

static PyObject *
stamp_object(long long stamp)
{
    return stamp < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(stamp);
}

static PyObject *
scan_sums(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *path, *tuple, *result = NULL;
    if (!PyArg_ParseTuple(args, "UO!:scan_sums", &path, &PyTuple_Type, &tuple)) {
        return NULL;
    }
    Sums all = {NULL, {NULL, 0}};
    if (read_patterns(tuple, &all.patterns) < 0) {
        goto done;
    }
    all.each = PyMem_Calloc((size_t)all.patterns.count + 1, sizeof(Sum));
    if (all.each == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t index = 0; index < all.patterns.count; index++) {
        all.each[index].first = all.each[index].last = -1;
    }
    if (read_all(path, all.patterns, true, add_up, &all) < 0) {
        goto done;
    }
    result = PyList_New(all.patterns.count);
    if (result != NULL) {
        PyObject_GC_UnTrack(result); /* the garbage collector must not show it to anybody while it is not filled */
    }
    for (Py_ssize_t index = 0; result != NULL && index < all.patterns.count; index++) {
        Sum *sum = &all.each[index];
        PyObject *one
            = Py_BuildValue("LLLNN", sum->files, sum->bytes, sum->empty, stamp_object(sum->first), stamp_object(sum->last));
        if (one == NULL) {
            Py_CLEAR(result);
            break;
        }
        PyList_SET_ITEM(result, index, one);
    }
    if (result != NULL) {
        PyObject_GC_Track(result);
    }
done:
    PyMem_Free(all.each);
    PyMem_Free(all.patterns.each);
    return result;
}

/* The first names in order. Names are compared as bytes, which is the order of their characters. */

typedef struct {
    const char *after;
    const char *until; /* NULL: no end */
    char **heap;       /* the greatest on top */
    size_t used, most, room;
    char *last;
    long long files;
} First;

static int
by_name(const void *one, const void *other)
{
    return strcmp(*(char *const *)one, *(char *const *)other);
}

static void
sift_down(First *first, size_t at)
{
    char **heap = first->heap;
    for (size_t child; (child = 2 * at + 1) < first->used; at = child) {
        child += child + 1 < first->used && strcmp(heap[child + 1], heap[child]) > 0;
        if (strcmp(heap[at], heap[child]) >= 0) {
            return;
        }
        char *above = heap[at];
        heap[at] = heap[child];
        heap[child] = above;
    }
}

static void
sift_up(First *first, size_t at)
{
    char **heap = first->heap;
    for (size_t above; at > 0 && strcmp(heap[above = (at - 1) / 2], heap[at]) < 0; at = above) {
        char *below = heap[at];
        heap[at] = heap[above];
        heap[above] = below;
    }
}

static int
push(First *first, const File *file)
{
    bool replaces = first->used == first->most;
    if (replaces && (first->most == 0 || strcmp(file->name, first->heap[0]) >= 0)) {
        return 0;
    }
    if (first->used == first->room && !replaces) {
        size_t room = first->room ? 2 * first->room : 64;
        char **heap = realloc(first->heap, room * sizeof *heap);
        if (heap == NULL) {
            return -1;
        }
        first->heap = heap;
        first->room = room;
    }
    char *name = strdup(file->name);
    if (name == NULL) {
        return -1;
    }
    if (replaces) {
        free(first->heap[0]);
        first->heap[0] = name;
        sift_down(first, 0);
    }
    else {
        first->heap[first->used++] = name;
        sift_up(first, first->used - 1);
    }
    return 0;
}

static int
add_name(void *context, const File *file)
{
    First *first = context;
    if (strcmp(file->name, first->after) <= 0 || (first->until != NULL && strcmp(file->name, first->until) > 0)) {
        return 0;
    }
    first->files++;
    if (first->last == NULL || strcmp(file->name, first->last) > 0) {
        char *last = strdup(file->name);
        if (last == NULL) {
            return -1;
        }
        free(first->last);
        first->last = last;
    }
    return push(first, file);
}

static PyObject *
names_of(const First *first)
{
    PyObject *names = PyList_New((Py_ssize_t)first->used);
    for (size_t index = 0; names != NULL && index < first->used; index++) {
        PyObject *name = PyUnicode_DecodeFSDefault(first->heap[index]);
        if (name == NULL) {
            Py_CLEAR(names);
            break;
        }
        PyList_SET_ITEM(names, (Py_ssize_t)index, name);
    }
    return names;
}

static PyObject *
scan_first(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *path, *tuple, *after, *until, *result = NULL, *low = NULL, *high = NULL;
    Py_ssize_t most;
    if (!PyArg_ParseTuple(args, "UO!UUn:scan_first", &path, &PyTuple_Type, &tuple, &after, &until, &most)) {
        return NULL;
    }
    First found = {.most = most < 0 ? 0 : (size_t)most};
    Patterns patterns = {NULL, 0};
    if (read_patterns(tuple, &patterns) < 0) {
        goto done;
    }
    if (!PyUnicode_FSConverter(after, &low) || !PyUnicode_FSConverter(until, &high)) {
        goto done;
    }
    found.after = PyBytes_AS_STRING(low);
    found.until = PyBytes_GET_SIZE(high) ? PyBytes_AS_STRING(high) : NULL;
    if (read_all(path, patterns, false, add_name, &found) < 0) {
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    if (found.used) {
        qsort(found.heap, found.used, sizeof *found.heap, by_name);
    }
    Py_END_ALLOW_THREADS
    PyObject *names = names_of(&found);
    PyObject *last = names == NULL ? NULL : PyUnicode_DecodeFSDefault(found.last == NULL ? "" : found.last);
    if (last == NULL) {
        Py_XDECREF(names);
        goto done;
    }
    result = Py_BuildValue("NNL", names, last, found.files);
done:
    for (size_t index = 0; index < found.used; index++) {
        free(found.heap[index]);
    }
    free(found.heap);
    free(found.last);
    PyMem_Free(patterns.each);
    Py_XDECREF(low);
    Py_XDECREF(high);
    return result;
}

static PyMethodDef dirscan_functions[] = {
    {"scan_sums", scan_sums, METH_VARARGS,
     "scan_sums(path, patterns): of each, files, bytes, empty files, and the least and the greatest stamp."},
    {"scan_first", scan_first, METH_VARARGS,
     "scan_first(path, patterns, after, until, most): the first names in order, the last of all, and how many there are."},
    {NULL, NULL, 0, NULL},
};

int
dirscan_exec(PyObject *module)
{
    return add_type(module, &chunks_spec, NULL) < 0 ? -1 : PyModule_AddFunctions(module, dirscan_functions);
}

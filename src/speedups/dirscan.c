/* Reads directories with the GIL released. `store/dirscan.py` does the same in Python.

Each time a thread releases the GIL for a system call and takes it back, the threads that accept events lose 15 to 60 us. Reading
a directory of 200,000 files in Python does that 200,000 times. This code takes the GIL back once in some thousands of files, to
check for signals, and creates objects only for the names that the caller asks for. */

#include "speedups.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    SIGNAL_CHECK_ENTRIES = 4096, /* entries between two checks for signals */
    CHUNK_BYTES = 1 << 15, /* of the names of one chunk */
    TIMESTAMP_DIGITS = 16,
    NAME_BYTES = 4096, /* no system has longer names; they may be longer than the array in `struct dirent` */
};

typedef struct {
    const char *bytes;
    size_t length;
} Text;

#define TIMESTAMP_MAX 4133980800000000LL /* `TIMESTAMP_MAX_MICROS` of `store/dirscan.py` */

/* Matches names with a prefix and a suffix; with `is_exact`, only the name that equals the prefix. */
typedef struct {
    Text prefix;
    Text suffix;
    bool is_exact;
} Pattern;

/* The bytes belong to the strings in the tuple of the caller, which must stay alive. */
typedef struct {
    Pattern *each;
    Py_ssize_t count;
} Patterns;

/* One file of a directory. `name` is valid until the next entry is read. */
typedef struct {
    const char *name;
    size_t length;
    long long size;
    Py_ssize_t pattern; /* index of the first pattern that matches */
} File;

/* Files of these users count: of the owner of the directory, and of this process. Everybody else's are skipped. */
typedef struct {
    uid_t directory, process;
} Owners;

typedef enum { SKIPPED, MATCHED, END, FAILED } Step;

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
        Py_ssize_t prefix_length, suffix_length = 0;
        PyObject *pair = PyTuple_GET_ITEM(tuple, index);
        if (!PyTuple_Check(pair)) {
            PyErr_SetString(PyExc_TypeError, "a pattern must be a tuple");
            return -1;
        }
        if (!PyArg_ParseTuple(pair, "s#z#:pattern", &pattern->prefix.bytes, &prefix_length, &pattern->suffix.bytes,
                              &suffix_length)) {
            return -1;
        }
        pattern->is_exact = pattern->suffix.bytes == NULL;
        pattern->prefix.length = (size_t)prefix_length;
        pattern->suffix.length = (size_t)suffix_length;
    }
    return 0;
}

static bool
matches(const File *file, const Pattern *pattern)
{
    Text prefix = pattern->prefix, suffix = pattern->suffix;
    if (file->length < prefix.length || memcmp(file->name, prefix.bytes, prefix.length) != 0) {
        return false;
    }
    if (pattern->is_exact) {
        return file->length == prefix.length;
    }
    return file->length >= suffix.length
           && memcmp(file->name + file->length - suffix.length, suffix.bytes, suffix.length) == 0;
}

static Owners
owners_of(DIR *directory)
{
    struct stat info;
    Owners owners = {geteuid(), geteuid()};
    if (fstat(dirfd(directory), &info) == 0) {
        owners.directory = info.st_uid;
    }
    return owners;
}

/* Read the next entry. MATCHED if it is a regular file whose name matches a pattern, and with `counted` a file of one of the
   owners, with its size; FAILED with errno set. Runs without the GIL. */
static Step
next_entry(DIR *directory, Patterns patterns, bool counted, Owners owners, File *file)
{
    errno = 0;
    struct dirent *entry = readdir(directory);
    if (entry == NULL) {
        return errno ? FAILED : END;
    }
    if (entry->d_type != DT_REG && entry->d_type != DT_UNKNOWN) {
        return SKIPPED;
    }
    *file = (File){entry->d_name, strlen(entry->d_name), 0, 0};
    while (file->pattern < patterns.count && !matches(file, &patterns.each[file->pattern])) {
        file->pattern++;
    }
    if (file->pattern == patterns.count) {
        return SKIPPED;
    }
    if (counted || entry->d_type == DT_UNKNOWN) {
        struct stat info;
        if (fstatat(dirfd(directory), entry->d_name, &info, AT_SYMLINK_NOFOLLOW) < 0) {
            return errno == ENOENT ? SKIPPED : FAILED; /* ENOENT: the file was renamed or removed during the scan */
        }
        if (!S_ISREG(info.st_mode)) {
            return SKIPPED;
        }
        if (counted && info.st_uid != owners.directory && info.st_uid != owners.process) {
            return SKIPPED;
        }
        file->size = info.st_size;
    }
    return MATCHED;
}

static PyObject *
set_os_error(PyObject *path)
{
    return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
}

/* Call `visit` for each file that matches, without the GIL. `visit` returns -1 if memory runs out. Returns 0, or -1 with an
   exception set. */
static int
read_all(PyObject *path, Patterns patterns, bool counted, int (*visit)(void *, const File *), void *context)
{
    PyObject *encoded;
    if (!PyUnicode_FSConverter(path, &encoded)) {
        return -1;
    }
    DIR *directory;
    Owners owners = {0, 0};
    Py_BEGIN_ALLOW_THREADS
    directory = opendir(PyBytes_AS_STRING(encoded));
    if (directory != NULL && counted) {
        owners = owners_of(directory);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(encoded);
    if (directory == NULL) {
        set_os_error(path);
        return -1;
    }
    Step step = SKIPPED;
    int error = 0;
    bool interrupted = false, no_memory = false;
    while (step <= MATCHED && !no_memory && !interrupted) {
        Py_BEGIN_ALLOW_THREADS
        File file;
        for (int read = 0; read < SIGNAL_CHECK_ENTRIES && step <= MATCHED && !no_memory; read++) {
            step = next_entry(directory, patterns, counted, owners, &file);
            no_memory = step == MATCHED && visit(context, &file) < 0;
        }
        error = errno;
        Py_END_ALLOW_THREADS
        interrupted = step <= MATCHED && PyErr_CheckSignals() < 0;
    }
    Py_BEGIN_ALLOW_THREADS
    closedir(directory);
    Py_END_ALLOW_THREADS
    if (interrupted) {
        return -1;
    }
    if (no_memory) {
        PyErr_NoMemory();
        return -1;
    }
    if (step == FAILED) {
        errno = error;
        set_os_error(path);
        return -1;
    }
    return 0;
}

/* DirectoryChunks: an iterator over the names in a directory, or the names and sizes, in chunks. */

typedef struct {
    PyObject_HEAD
    DIR *directory; /* NULL at the end, and while a thread reads the next chunk */
    PyObject *path;
    PyObject *tuple; /* owns the bytes of `patterns` */
    Patterns patterns;
    bool sizes, counted;
    Owners owners; /* with `counted` */
    char *names; /* of one chunk, each terminated by NUL */
    long long *file_sizes; /* of one chunk */
} DirectoryChunks;

static int
chunks_init(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"path", "patterns", "sizes", "counted", NULL};
    DirectoryChunks *chunks = (DirectoryChunks *)object;
    PyObject *path, *tuple;
    int sizes, counted = 0;
    if (chunks->path != NULL) {
        PyErr_SetString(PyExc_TypeError, "DirectoryChunks is initialized already");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "UO!p|p:DirectoryChunks", names, &path, &PyTuple_Type, &tuple, &sizes,
                                     &counted)) {
        return -1;
    }
    chunks->sizes = sizes;
    chunks->counted = counted || sizes;
    chunks->path = Py_NewRef(path);
    chunks->tuple = Py_NewRef(tuple);
    chunks->names = malloc(CHUNK_BYTES);
    chunks->file_sizes = malloc(CHUNK_BYTES / 2 * sizeof(long long)); /* a name has at least one byte, and its NUL */
    PyObject *encoded = NULL;
    if (chunks->names == NULL || chunks->file_sizes == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (read_patterns(tuple, &chunks->patterns) < 0 || !PyUnicode_FSConverter(path, &encoded)) {
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS
    chunks->directory = opendir(PyBytes_AS_STRING(encoded));
    if (chunks->directory != NULL && chunks->counted) {
        chunks->owners = owners_of(chunks->directory);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(encoded);
    return chunks->directory == NULL ? (set_os_error(path), -1) : 0;
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
    free(chunks->file_sizes);
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

/* Make a list of the files in the buffer. While the list is not filled, it is untracked, so that `gc.get_objects` does not return
   it. */
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
        PyObject *file = object_of(chunks, name, length, chunks->file_sizes[index]);
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
    Step step = SKIPPED;
    Py_ssize_t files = 0;
    size_t used = 0;
    int error;
    Py_BEGIN_ALLOW_THREADS
    File file;
    for (int read = 0; read < SIGNAL_CHECK_ENTRIES && step <= MATCHED && used + NAME_BYTES < CHUNK_BYTES; read++) {
        step = next_entry(directory, chunks->patterns, chunks->counted, chunks->owners, &file);
        if (step == MATCHED && file.length >= NAME_BYTES) {
            errno = ENAMETOOLONG;
            step = FAILED;
        }
        if (step == MATCHED) {
            memcpy(chunks->names + used, file.name, file.length + 1);
            chunks->file_sizes[files++] = file.size;
            used += file.length + 1;
        }
    }
    error = errno;
    if (step > MATCHED) {
        closedir(directory);
    }
    Py_END_ALLOW_THREADS
    PyObject *list = NULL;
    if (step == FAILED) {
        errno = error;
        set_os_error(chunks->path);
    }
    else if (step != END || files > 0) {
        list = list_of_chunk(chunks, files);
    }
    if (step <= MATCHED) { /* only now, because the thread that reads the next chunk overwrites the buffer */
        __atomic_store_n(&chunks->directory, directory, __ATOMIC_RELEASE);
    }
    return list;
}

static PyType_Slot chunks_slots[] = {
    {Py_tp_doc, "DirectoryChunks(path, patterns, sizes, counted): lists of the names that match a pattern, or of names and "
     "sizes; with `counted` or sizes, of the files of this user and of the directory's owner."},
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

/* The totals of a directory, for each pattern. */

typedef struct {
    long long files, bytes, empty_files;
    long long oldest, newest; /* timestamps in the names; -1 if no name has one */
} Totals;

typedef struct {
    Totals *each;
    Patterns patterns;
} PatternTotals;

/* The timestamp in a name, at `offset`; -1 if there is none, or one that no clock of ours has made. */
static long long
timestamp_in(const File *file, size_t offset)
{
    if (file->length <= offset + TIMESTAMP_DIGITS || file->name[offset + TIMESTAMP_DIGITS] != '-') {
        return -1;
    }
    long long timestamp = 0;
    for (const char *digit = file->name + offset; digit < file->name + offset + TIMESTAMP_DIGITS; digit++) {
        if (*digit < '0' || *digit > '9') {
            return -1;
        }
        timestamp = timestamp * 10 + (*digit - '0');
    }
    return timestamp > TIMESTAMP_MAX ? -1 : timestamp;
}

static int
add_to_totals(void *context, const File *file)
{
    PatternTotals *all = context;
    Totals *totals = &all->each[file->pattern];
    totals->files++;
    totals->bytes = add_saturated(totals->bytes, file->size); /* the sizes of sparse files may overflow */
    totals->empty_files += file->size == 0;
    long long timestamp = timestamp_in(file, all->patterns.each[file->pattern].prefix.length);
    if (timestamp >= 0) {
        totals->oldest = totals->oldest < 0 || timestamp < totals->oldest ? timestamp : totals->oldest;
        totals->newest = timestamp > totals->newest ? timestamp : totals->newest;
    }
    return 0;
}

static PyObject *
timestamp_object(long long timestamp)
{
    return timestamp < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(timestamp);
}

static PyObject *
scan_sums(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *path, *tuple, *result = NULL;
    if (!PyArg_ParseTuple(args, "UO!:scan_sums", &path, &PyTuple_Type, &tuple)) {
        return NULL;
    }
    PatternTotals all = {NULL, {NULL, 0}};
    if (read_patterns(tuple, &all.patterns) < 0) {
        goto done;
    }
    all.each = PyMem_Calloc((size_t)all.patterns.count + 1, sizeof(Totals));
    if (all.each == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t index = 0; index < all.patterns.count; index++) {
        all.each[index].oldest = all.each[index].newest = -1;
    }
    if (read_all(path, all.patterns, true, add_to_totals, &all) < 0) {
        goto done;
    }
    result = PyList_New(all.patterns.count);
    if (result != NULL) {
        PyObject_GC_UnTrack(result); /* `gc.get_objects` must not return it while it is not filled */
    }
    for (Py_ssize_t index = 0; result != NULL && index < all.patterns.count; index++) {
        Totals *totals = &all.each[index];
        PyObject *tuple_of_totals = Py_BuildValue("LLLNN", totals->files, totals->bytes, totals->empty_files,
                                                  timestamp_object(totals->oldest), timestamp_object(totals->newest));
        if (tuple_of_totals == NULL) {
            Py_CLEAR(result);
            break;
        }
        PyList_SET_ITEM(result, index, tuple_of_totals);
    }
    if (result != NULL) {
        PyObject_GC_Track(result);
    }
done:
    PyMem_Free(all.each);
    PyMem_Free(all.patterns.each);
    return result;
}

/* The first names of a directory, in order. Names are compared as bytes; in UTF-8 that is the order of their characters. */

typedef struct {
    const char *after; /* exclusive */
    const char *until; /* inclusive; NULL: no end */
    char **heap;       /* a max-heap of the `count` smallest names so far */
    size_t count, count_max, capacity;
    char *last;        /* the greatest name in the range; NULL if there is none */
    long long files;
} FirstNames;

static int
compare_names(const void *left, const void *right)
{
    return strcmp(*(char *const *)left, *(char *const *)right);
}

static void
sift_down(FirstNames *first, size_t index)
{
    char **heap = first->heap;
    for (size_t child; (child = 2 * index + 1) < first->count; index = child) {
        child += child + 1 < first->count && strcmp(heap[child + 1], heap[child]) > 0;
        if (strcmp(heap[index], heap[child]) >= 0) {
            return;
        }
        char *name = heap[index];
        heap[index] = heap[child];
        heap[child] = name;
    }
}

static void
sift_up(FirstNames *first, size_t index)
{
    char **heap = first->heap;
    for (size_t parent; index > 0 && strcmp(heap[parent = (index - 1) / 2], heap[index]) < 0; index = parent) {
        char *name = heap[index];
        heap[index] = heap[parent];
        heap[parent] = name;
    }
}

/* Add a name to the heap if it is among the first `count_max` so far. Returns -1 if memory runs out. */
static int
push_name(FirstNames *first, const File *file)
{
    bool replaces = first->count == first->count_max;
    if (replaces && (first->count_max == 0 || strcmp(file->name, first->heap[0]) >= 0)) {
        return 0;
    }
    if (first->count == first->capacity && !replaces) {
        size_t capacity = first->capacity ? 2 * first->capacity : 64;
        char **heap = realloc(first->heap, capacity * sizeof *heap);
        if (heap == NULL) {
            return -1;
        }
        first->heap = heap;
        first->capacity = capacity;
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
        first->heap[first->count++] = name;
        sift_up(first, first->count - 1);
    }
    return 0;
}

static int
add_name(void *context, const File *file)
{
    FirstNames *first = context;
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
    return push_name(first, file);
}

static PyObject *
names_of(const FirstNames *first)
{
    PyObject *names = PyList_New((Py_ssize_t)first->count);
    for (size_t index = 0; names != NULL && index < first->count; index++) {
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
    PyObject *path, *tuple, *after, *until, *result = NULL, *after_bytes = NULL, *until_bytes = NULL;
    Py_ssize_t most;
    if (!PyArg_ParseTuple(args, "UO!UUn:scan_first", &path, &PyTuple_Type, &tuple, &after, &until, &most)) {
        return NULL;
    }
    FirstNames first = {.count_max = most < 0 ? 0 : (size_t)most};
    Patterns patterns = {NULL, 0};
    if (read_patterns(tuple, &patterns) < 0) {
        goto done;
    }
    if (!PyUnicode_FSConverter(after, &after_bytes) || !PyUnicode_FSConverter(until, &until_bytes)) {
        goto done;
    }
    first.after = PyBytes_AS_STRING(after_bytes);
    first.until = PyBytes_GET_SIZE(until_bytes) ? PyBytes_AS_STRING(until_bytes) : NULL;
    if (read_all(path, patterns, false, add_name, &first) < 0) {
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    if (first.count) {
        qsort(first.heap, first.count, sizeof *first.heap, compare_names);
    }
    Py_END_ALLOW_THREADS
    PyObject *names = names_of(&first);
    PyObject *last = names == NULL ? NULL : PyUnicode_DecodeFSDefault(first.last == NULL ? "" : first.last);
    if (last == NULL) {
        Py_XDECREF(names);
        goto done;
    }
    result = Py_BuildValue("NNL", names, last, first.files);
done:
    for (size_t index = 0; index < first.count; index++) {
        free(first.heap[index]);
    }
    free(first.heap);
    free(first.last);
    PyMem_Free(patterns.each);
    Py_XDECREF(after_bytes);
    Py_XDECREF(until_bytes);
    return result;
}

static PyMethodDef dirscan_functions[] = {
    {"scan_sums", scan_sums, METH_VARARGS,
     "scan_sums(path, patterns): for each pattern the files, bytes, empty files, and the oldest and newest timestamp."},
    {"scan_first", scan_first, METH_VARARGS,
     "scan_first(path, patterns, after, until, most): the first names in order, the last of all names, and their number."},
    {NULL, NULL, 0, NULL},
};

int
dirscan_exec(PyObject *module)
{
    return add_type(module, &chunks_spec, NULL) < 0 ? -1 : PyModule_AddFunctions(module, dirscan_functions);
}

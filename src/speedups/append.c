/* The hot path of the store: appends one event to the active segment. `Writer.build_enqueue` does the same in Python.

This code handles only the simple case: the event encodes, the segment has room for its line, and one write writes all of it.
In every other case it calls the same methods of the writer as the closure in Python. It follows the rules of that closure: it
holds the lock, writes once, and keeps the limit at IN_PROGRESS while it changes the segment. */

#include "speedups.h"

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define CARRYLESS
#endif

static const char HEAD[] = "{\"event\":";
static const char TAIL[] = ",\"crc\":\"";
static const char END[] = "\"}\n";
enum {
    HEAD_BYTES = sizeof HEAD - 1,
    TAIL_BYTES = sizeof TAIL - 1,
    END_BYTES = sizeof END - 1,
    CRC_BYTES = 8,
    OVERHEAD = HEAD_BYTES + TAIL_BYTES + CRC_BYTES + END_BYTES,
    STACK_BYTES = 4096, /* a longer line is allocated on the heap */
};
static const long long IN_PROGRESS = -1; /* the limit while an append is under way; nothing fits into a negative limit */

/* CRC-32 (IEEE 802.3, as in zlib), eight bytes at a time: M. Kounavis and F. Berry, "Novel Table Lookup-Based Algorithms for
   High-Performance CRC Generation", IEEE Transactions on Computers 57 (2008). */
static uint32_t crc_table[8][256];

static void
fill_crc_table(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
        }
        crc_table[0][byte] = crc;
    }
    for (uint32_t byte = 0; byte < 256; byte++) {
        for (int slice = 1; slice < 8; slice++) {
            uint32_t previous = crc_table[slice - 1][byte];
            crc_table[slice][byte] = previous >> 8 ^ crc_table[0][previous & 0xFF];
        }
    }
}

static uint32_t
update_crc_by_table(uint32_t crc, const unsigned char *at, Py_ssize_t size)
{
    for (; size >= 8; size -= 8, at += 8) {
        uint32_t low = crc ^ ((uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24);
        crc = crc_table[7][low & 0xFF] ^ crc_table[6][low >> 8 & 0xFF] ^ crc_table[5][low >> 16 & 0xFF]
              ^ crc_table[4][low >> 24] ^ crc_table[3][at[4]] ^ crc_table[2][at[5]] ^ crc_table[1][at[6]]
              ^ crc_table[0][at[7]];
    }
    for (; size > 0; size--, at++) {
        crc = crc >> 8 ^ crc_table[0][(crc ^ *at) & 0xFF];
    }
    return crc;
}

#ifdef CARRYLESS
/* The same checksum by carry-less multiplication. `size` is a multiple of 16, and at least 64. Algorithm and constants (those of
   the reflected polynomial): V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction",
   Intel 2009. */
#define FOLDS __attribute__((target("pclmul,sse2")))

static int has_carryless; /* whether this processor has the instruction */

static inline FOLDS __m128i
load(const unsigned char *at)
{
    return _mm_loadu_si128((const __m128i *)at);
}

static inline FOLDS __m128i
fold(__m128i sum, __m128i by, __m128i next)
{
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(sum, by, 0x00), _mm_clmulepi64_si128(sum, by, 0x11)), next);
}

static FOLDS uint32_t
update_crc_by_folding(uint32_t crc, const unsigned char *at, Py_ssize_t size)
{
    const __m128i by_512 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4);
    const __m128i by_128 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    const __m128i by_64 = _mm_set_epi64x(0, 0x163cd6124);
    const __m128i reduce = _mm_set_epi64x(0x1f7011641, 0x1db710641); /* Barrett's quotient, the polynomial */
    const __m128i low_halves = _mm_set_epi32(0, -1, 0, -1);
    __m128i sum[4];
    for (int lane = 0; lane < 4; lane++) {
        sum[lane] = load(at + 16 * lane);
    }
    sum[0] = _mm_xor_si128(sum[0], _mm_cvtsi32_si128((int)crc));
    for (at += 64, size -= 64; size >= 64; at += 64, size -= 64) {
        for (int lane = 0; lane < 4; lane++) {
            sum[lane] = fold(sum[lane], by_512, load(at + 16 * lane));
        }
    }
    __m128i all = fold(fold(fold(sum[0], by_128, sum[1]), by_128, sum[2]), by_128, sum[3]);
    for (; size >= 16; at += 16, size -= 16) {
        all = fold(all, by_128, load(at));
    }
    all = _mm_xor_si128(_mm_srli_si128(all, 8), _mm_clmulepi64_si128(all, by_128, 0x10));
    all = _mm_xor_si128(_mm_srli_si128(all, 4), _mm_clmulepi64_si128(_mm_and_si128(all, low_halves), by_64, 0x00));
    __m128i quotient = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(all, low_halves), reduce, 0x10), low_halves);
    all = _mm_xor_si128(all, _mm_clmulepi64_si128(quotient, reduce, 0x00));
    return (uint32_t)_mm_cvtsi128_si32(_mm_srli_si128(all, 4));
}
#endif

static uint32_t
crc32_of(const unsigned char *at, Py_ssize_t size)
{
    uint32_t crc = 0xFFFFFFFFu;
#ifdef CARRYLESS
    if (has_carryless && size >= 64) {
        Py_ssize_t blocks = size & ~(Py_ssize_t)15;
        crc = update_crc_by_folding(crc, at, blocks);
        at += blocks;
        size -= blocks;
    }
#endif
    return ~update_crc_by_table(crc, at, size);
}

/* Write the part of a record that follows the payload. */
static void
put_tail(char *to, uint32_t crc)
{
    static const char digits[] = "0123456789abcdef";
    memcpy(to, TAIL, TAIL_BYTES);
    to += TAIL_BYTES;
    for (int shift = 28; shift >= 0; shift -= 4) {
        *to++ = digits[crc >> shift & 0xF];
    }
    memcpy(to, END, END_BYTES);
}

/* Write the record of `payload` to `to`, which has room for `size` + OVERHEAD bytes. */
static void
put_record(char *to, const char *payload, Py_ssize_t size)
{
    memcpy(to, HEAD, HEAD_BYTES);
    memcpy(to + HEAD_BYTES, payload, (size_t)size);
    put_tail(to + HEAD_BYTES + size, crc32_of((const unsigned char *)payload, size));
}

/* SegmentCounters: the fields of a segment that the hot path reads and writes. */

typedef struct {
    PyObject_HEAD
    int fd;
    long long bytes, events, threshold_events;
} SegmentCounters;

static PyMemberDef counters_members[] = {
    {"fd", T_INT, offsetof(SegmentCounters, fd), 0, NULL},
    {"bytes", T_LONGLONG, offsetof(SegmentCounters, bytes), 0, NULL},
    {"events", T_LONGLONG, offsetof(SegmentCounters, events), 0, NULL},
    {"threshold_events", T_LONGLONG, offsetof(SegmentCounters, threshold_events), 0, NULL},
    {NULL},
};

static void
counters_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot counters_slots[] = {
    {Py_tp_doc, "The fields of a segment that the hot path reads and writes; at `threshold_events` events it calls the writer."},
    {Py_tp_members, counters_members},
    {Py_tp_dealloc, counters_dealloc},
    {0, NULL},
};

static PyType_Spec counters_spec = {
    "pillarbox._speedups.SegmentCounters", sizeof(SegmentCounters), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, counters_slots,
};

/* WriterState: the fields of a writer that the hot path reads and writes. */

typedef struct {
    PyObject_HEAD
    PyObject *lock;
    PyObject *file; /* SegmentCounters */
    long long limit;
    char append_interrupted;
} WriterState;

static PyMemberDef writer_members[] = {
    {"lock", T_OBJECT_EX, offsetof(WriterState, lock), 0, NULL},
    {"_file", T_OBJECT_EX, offsetof(WriterState, file), 0, NULL},
    {"_limit", T_LONGLONG, offsetof(WriterState, limit), 0, NULL},
    {"_append_interrupted", T_BOOL, offsetof(WriterState, append_interrupted), 0, NULL},
    {NULL},
};

static int
writer_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((WriterState *)self)->lock);
    Py_VISIT(((WriterState *)self)->file);
    return 0;
}

static int
writer_clear(PyObject *self)
{
    Py_CLEAR(((WriterState *)self)->lock);
    Py_CLEAR(((WriterState *)self)->file);
    return 0;
}

static void
writer_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    writer_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot writer_slots[] = {
    {Py_tp_doc, "The fields of a writer that the hot path reads and writes."},
    {Py_tp_members, writer_members},
    {Py_tp_traverse, writer_traverse},
    {Py_tp_clear, writer_clear},
    {Py_tp_dealloc, writer_dealloc},
    {0, NULL},
};

static PyType_Spec writer_spec = {
    "pillarbox._speedups.WriterState", sizeof(WriterState), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    writer_slots,
};

/* Enqueue: appends one event to the active segment. */

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    AppendState *state;
    PyObject *dict;
    PyObject *writer;    /* WriterState */
    PyObject *plain;     /* the closure in Python, which handles every case */
    PyObject *encode;    /* event -> bytes */
    PyObject *type;      /* the type of the events */
    PyObject *append_unstarted;     /* (line, 1) -> outcome; called where the writer has not started */
    PyObject *write;     /* NULL: call write(2) directly */
    PyObject *enqueued;  /* the outcome of a stored event */
    Py_ssize_t bytes_max;
    int power; /* a call without `durability` waits for the sync */
} Enqueue;

/* Write a line. Returns the number of bytes written, or -1 with an exception set. */
static Py_ssize_t
write_line(Enqueue *self, int fd, const char *line, Py_ssize_t size)
{
    if (self->write != NULL) {
        PyObject *bytes = PyBytes_FromStringAndSize(line, size);
        PyObject *number = bytes == NULL ? NULL : PyLong_FromLong(fd);
        PyObject *result = NULL;
        if (number != NULL) {
            result = PyObject_CallFunctionObjArgs(self->write, number, bytes, NULL);
        }
        Py_XDECREF(number);
        Py_XDECREF(bytes);
        if (result == NULL) {
            return -1;
        }
        Py_ssize_t written = PyLong_AsSsize_t(result);
        Py_DECREF(result);
        return written;
    }
    for (;;) {
        Py_ssize_t written;
        int error;
        Py_BEGIN_ALLOW_THREADS
        written = write(fd, line, (size_t)size);
        error = errno;
        Py_END_ALLOW_THREADS
        if (written >= 0) {
            return written;
        }
        if (error != EINTR) {
            errno = error;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        if (PyErr_CheckSignals() < 0) {
            return -1;
        }
    }
}

/* Handle the exception of a failed append. Of an `OSError` the writer makes an outcome. Any other exception stays set; the limit
   stays at IN_PROGRESS, and the writer repairs the segment at its next append. */
static PyObject *
handle_append_error(Enqueue *self, WriterState *writer)
{
    if (!PyErr_ExceptionMatches(PyExc_OSError)) {
        writer->append_interrupted = 1;
        return NULL;
    }
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    PyObject *events = PyLong_FromLong(1);
    PyObject *outcome = NULL;
    if (error != NULL && events != NULL) {
        outcome = PyObject_CallMethodObjArgs((PyObject *)writer, self->state->undo_append, error, events, NULL);
    }
    Py_XDECREF(events);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(trace);
    return outcome;
}

/* After a short write: write the whole line again. Returns whether that succeeded; if not, an exception is set. */
static int
complete_append(Enqueue *self, WriterState *writer, SegmentCounters *file, const char *line, Py_ssize_t size, Py_ssize_t written)
{
    PyObject *bytes = PyBytes_FromStringAndSize(line, size);
    PyObject *count = PyLong_FromSsize_t(written);
    PyObject *result = NULL;
    if (bytes != NULL && count != NULL) {
        result = PyObject_CallMethodObjArgs((PyObject *)writer, self->state->complete_append, (PyObject *)file, bytes, count, NULL);
    }
    Py_XDECREF(bytes);
    Py_XDECREF(count);
    Py_XDECREF(result);
    return result != NULL;
}

/* Write a line and count it; the lock is held and the limit is IN_PROGRESS. Returns a new reference to the outcome, or NULL with
   an exception set. */
static PyObject *
append(Enqueue *self, WriterState *writer, SegmentCounters *file, long long limit, const char *line, Py_ssize_t size)
{
    Py_ssize_t written = write_line(self, file->fd, line, size);
    if (written < 0 || (written != size && !complete_append(self, writer, file, line, size, written))) {
        return handle_append_error(self, writer);
    }
    file->bytes = add_saturated(file->bytes, size);
    file->events = add_saturated(file->events, 1);
    writer->limit = limit;
    if (file->events >= file->threshold_events) {
        PyObject *result = PyObject_CallMethodNoArgs((PyObject *)writer, self->state->notify_threshold);
        if (result == NULL) {
            return handle_append_error(self, writer);
        }
        Py_DECREF(result);
    }
    return Py_NewRef(self->enqueued);
}

/* Take the lock and append a line. Returns a new reference to the outcome; NULL with an exception set; or NULL without an
   exception if the line does not fit, or the segment is not one of the expected type. */
static PyObject *
append_locked(Enqueue *self, const char *line, Py_ssize_t size)
{
    WriterState *writer = (WriterState *)self->writer;
    PyObject *lock = writer->lock; /* read at each call, because a forked child replaces it */
    if (lock == NULL) {
        PyErr_SetString(PyExc_AttributeError, "lock");
        return NULL;
    }
    Py_INCREF(lock);
    PyObject *result = PyObject_CallMethodNoArgs(lock, self->state->acquire);
    if (result == NULL) {
        Py_DECREF(lock);
        return NULL;
    }
    Py_DECREF(result);
    PyObject *outcome = NULL;
    SegmentCounters *file = (SegmentCounters *)writer->file;
    long long limit = writer->limit;
    if (file != NULL && PyObject_TypeCheck(file, self->state->segment_counters) && add_saturated(file->bytes, size) <= limit) {
        Py_INCREF(file);
        writer->limit = IN_PROGRESS;
        outcome = append(self, writer, file, limit, line, size);
        Py_DECREF(file);
    }
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    result = PyObject_CallMethodNoArgs(lock, self->state->release);
    Py_DECREF(lock);
    if (result == NULL) { /* this thread no longer owns the lock; that error replaces any other */
        Py_CLEAR(outcome);
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        return NULL;
    }
    Py_DECREF(result);
    PyErr_Restore(type, error, trace);
    return outcome;
}

/* Append a line through the method of the writer, which handles every case. */
static PyObject *
append_slowly(Enqueue *self, const char *line, Py_ssize_t size)
{
    PyObject *bytes = PyBytes_FromStringAndSize(line, size);
    PyObject *events = PyLong_FromLong(1);
    PyObject *outcome = NULL;
    if (bytes != NULL && events != NULL) {
        outcome = PyObject_CallMethodObjArgs(self->writer, self->state->append, bytes, events, NULL);
        if (outcome == Py_None) {
            Py_DECREF(outcome);
            outcome = PyObject_CallFunctionObjArgs(self->append_unstarted, bytes, events, NULL);
        }
    }
    Py_XDECREF(bytes);
    Py_XDECREF(events);
    return outcome;
}

static PyObject *
enqueue_call(PyObject *callable, PyObject *const *args, size_t flagged, PyObject *names)
{
    Enqueue *self = (Enqueue *)callable;
    if (check_fork((SpeedupsState *)self->state) < 0) { /* `append` is the first member of that */
        return NULL;
    }
    Py_ssize_t count = PyVectorcall_NARGS(flagged);
    if (count != 1 || self->power || (names != NULL && PyTuple_GET_SIZE(names) > 0)) {
        return PyObject_Vectorcall(self->plain, args, flagged, names);
    }
    PyObject *event = args[0];
    if ((PyObject *)Py_TYPE(event) != self->type) {
        return PyObject_Vectorcall(self->plain, args, flagged, names);
    }
    PyObject *payload = PyObject_CallOneArg(self->encode, event);
    if (payload == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_Exception)) {
            return NULL;
        }
        PyErr_Clear(); /* the closure in Python drops the event and logs why */
        return PyObject_Vectorcall(self->plain, args, flagged, names);
    }
    if (!PyBytes_CheckExact(payload) || PyBytes_GET_SIZE(payload) > self->bytes_max) {
        Py_DECREF(payload);
        return PyObject_Vectorcall(self->plain, args, flagged, names);
    }
    char stack[STACK_BYTES];
    Py_ssize_t size = PyBytes_GET_SIZE(payload) + OVERHEAD;
    char *line = size <= STACK_BYTES ? stack : PyMem_Malloc((size_t)size);
    if (line == NULL) {
        Py_DECREF(payload);
        return PyErr_NoMemory();
    }
    put_record(line, PyBytes_AS_STRING(payload), size - OVERHEAD);
    Py_DECREF(payload);
    PyObject *outcome = append_locked(self, line, size);
    if (outcome == NULL && !PyErr_Occurred()) {
        outcome = append_slowly(self, line, size);
    }
    if (line != stack) {
        PyMem_Free(line);
    }
    return outcome;
}

static PyObject *
enqueue_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"writer", "plain", "encode", "event_type", "bytes_max", "append_unstarted", "write", "enqueued", "power", NULL};
    SpeedupsState *module_state = PyType_GetModuleState(type);
    AppendState *state = module_state == NULL ? NULL : &module_state->append;
    PyObject *writer, *plain, *encode, *event_type, *append_unstarted, *write, *enqueued;
    Py_ssize_t bytes_max;
    int power;
    if (state == NULL
        || !PyArg_ParseTupleAndKeywords(args, keywords, "O!OOO!nOOOp:Enqueue", names, state->writer_state, &writer, &plain, &encode,
                                        &PyType_Type, &event_type, &bytes_max, &append_unstarted, &write, &enqueued, &power)) {
        return NULL;
    }
    Enqueue *self = (Enqueue *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->vectorcall = enqueue_call;
    self->state = state;
    self->writer = Py_NewRef(writer);
    self->plain = Py_NewRef(plain);
    self->encode = Py_NewRef(encode);
    self->type = Py_NewRef(event_type);
    self->append_unstarted = Py_NewRef(append_unstarted);
    self->write = write == state->os_write ? NULL : Py_NewRef(write);
    self->enqueued = Py_NewRef(enqueued);
    self->bytes_max = bytes_max;
    self->power = power;
    return (PyObject *)self;
}

static int
enqueue_traverse(PyObject *object, visitproc visit, void *arg)
{
    Enqueue *self = (Enqueue *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->dict);
    Py_VISIT(self->writer);
    Py_VISIT(self->plain);
    Py_VISIT(self->encode);
    Py_VISIT(self->type);
    Py_VISIT(self->append_unstarted);
    Py_VISIT(self->write);
    Py_VISIT(self->enqueued);
    return 0;
}

/* The call of an `Enqueue` that the garbage collector has cleared. */
static PyObject *
call_cleared(PyObject *Py_UNUSED(self), PyObject *const *Py_UNUSED(args), size_t Py_UNUSED(flagged), PyObject *Py_UNUSED(names))
{
    PyErr_SetString(PyExc_RuntimeError, "this enqueue function has been garbage collected");
    return NULL;
}

static int
enqueue_clear(PyObject *object)
{
    Enqueue *self = (Enqueue *)object;
    self->vectorcall = call_cleared;
    Py_CLEAR(self->dict);
    Py_CLEAR(self->writer);
    Py_CLEAR(self->plain);
    Py_CLEAR(self->encode);
    Py_CLEAR(self->type);
    Py_CLEAR(self->append_unstarted);
    Py_CLEAR(self->write);
    Py_CLEAR(self->enqueued);
    return 0;
}

static void
enqueue_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    enqueue_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMemberDef enqueue_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Enqueue, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(Enqueue, dict), READONLY, NULL},
    {NULL},
};

static PyGetSetDef enqueue_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL},
};

static PyType_Slot enqueue_slots[] = {
    {Py_tp_doc, "The closure of `Writer.build_enqueue`, compiled for the simple case. `plain` is the closure, called otherwise."},
    {Py_tp_new, enqueue_new},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_members, enqueue_members},
    {Py_tp_getset, enqueue_getset},
    {Py_tp_traverse, enqueue_traverse},
    {Py_tp_clear, enqueue_clear},
    {Py_tp_dealloc, enqueue_dealloc},
    {0, NULL},
};

static PyType_Spec enqueue_spec = {
    "pillarbox._speedups.Enqueue", sizeof(Enqueue), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, enqueue_slots,
};

/* Records. */

static PyObject *
encode_record(PyObject *Py_UNUSED(self), PyObject *payload)
{
    if (!PyBytes_Check(payload)) {
        return PyErr_Format(PyExc_TypeError, "payload must be bytes, not %.200s", Py_TYPE(payload)->tp_name);
    }
    PyObject *record = PyBytes_FromStringAndSize(NULL, PyBytes_GET_SIZE(payload) + OVERHEAD);
    if (record != NULL) {
        put_record(PyBytes_AS_STRING(record), PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload));
    }
    return record;
}

static PyObject *
decode_record(PyObject *Py_UNUSED(self), PyObject *line)
{
    if (!PyBytes_Check(line)) {
        return PyErr_Format(PyExc_TypeError, "line must be bytes, not %.200s", Py_TYPE(line)->tp_name);
    }
    Py_ssize_t size = PyBytes_GET_SIZE(line) - (OVERHEAD - 1);
    const char *at = PyBytes_AS_STRING(line);
    if (size < 0 || memcmp(at, HEAD, HEAD_BYTES) != 0) {
        Py_RETURN_NONE;
    }
    at += HEAD_BYTES;
    char tail[TAIL_BYTES + CRC_BYTES + END_BYTES];
    put_tail(tail, crc32_of((const unsigned char *)at, size));
    if (memcmp(at + size, tail, sizeof tail - 1) != 0) { /* `line` has no line feed */
        Py_RETURN_NONE;
    }
    return PyBytes_FromStringAndSize(at, size);
}

/* Joined records, in a bytes object that grows; `size` bytes of it are used. */
typedef struct {
    PyObject *bytes;
    Py_ssize_t size;
} Records;

/* Reserve `count` more bytes. Returns where they begin, or NULL with an exception set. */
static char *
reserve(Records *records, Py_ssize_t count)
{
    Py_ssize_t capacity = PyBytes_GET_SIZE(records->bytes);
    if (count > capacity - records->size) {
        if (count > PY_SSIZE_T_MAX / 2 - capacity || _PyBytes_Resize(&records->bytes, 2 * capacity + count) < 0) {
            if (!PyErr_Occurred()) {
                PyErr_NoMemory();
            }
            return NULL;
        }
    }
    char *at = PyBytes_AS_STRING(records->bytes) + records->size;
    records->size += count;
    return at;
}

/* Add the record of one event. Returns a new reference to None, or to the `Dropped` of an event that has no record; NULL with an
   exception set. */
static PyObject *
add_event(Records *records, PyObject *event, PyObject *encode, PyTypeObject *type, Py_ssize_t bytes_max, PyObject *encode_other)
{
    if (Py_TYPE(event) == type) {
        PyObject *payload = PyObject_CallOneArg(encode, event);
        if (payload == NULL) {
            if (!PyErr_ExceptionMatches(PyExc_Exception)) {
                return NULL;
            }
            PyErr_Clear();
        }
        else if (PyBytes_CheckExact(payload) && PyBytes_GET_SIZE(payload) <= bytes_max) {
            char *at = reserve(records, PyBytes_GET_SIZE(payload) + OVERHEAD);
            if (at != NULL) {
                put_record(at, PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload));
            }
            Py_DECREF(payload);
            return at == NULL ? NULL : Py_NewRef(Py_None);
        }
        Py_XDECREF(payload);
    }
    PyObject *record = PyObject_CallOneArg(encode_other, event);
    if (record == NULL || !PyBytes_CheckExact(record)) {
        return record;
    }
    char *at = reserve(records, PyBytes_GET_SIZE(record));
    if (at != NULL) {
        memcpy(at, PyBytes_AS_STRING(record), (size_t)PyBytes_GET_SIZE(record));
    }
    Py_DECREF(record);
    return at == NULL ? NULL : Py_NewRef(Py_None);
}

static PyObject *
encode_records(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *events, *encode, *type, *encode_other;
    Py_ssize_t bytes_max;
    if (!PyArg_ParseTuple(args, "OOO!nO:encode_records", &events, &encode, &PyType_Type, &type, &bytes_max, &encode_other)) {
        return NULL;
    }
    PyObject *iterator = PyObject_GetIter(events);
    PyObject *dropped = PyList_New(0);
    Records records = {PyBytes_FromStringAndSize(NULL, STACK_BYTES), 0};
    PyObject *event;
    if (iterator == NULL || dropped == NULL || records.bytes == NULL) {
        goto error;
    }
    while ((event = PyIter_Next(iterator)) != NULL) {
        PyObject *result = add_event(&records, event, encode, (PyTypeObject *)type, bytes_max, encode_other);
        Py_DECREF(event);
        if (result == NULL || PyList_Append(dropped, result) < 0) {
            Py_XDECREF(result);
            goto error;
        }
        Py_DECREF(result);
    }
    if (PyErr_Occurred() || _PyBytes_Resize(&records.bytes, records.size) < 0) {
        goto error;
    }
    Py_DECREF(iterator);
    return Py_BuildValue("NN", records.bytes, dropped);
error:
    Py_XDECREF(iterator);
    Py_XDECREF(dropped);
    Py_XDECREF(records.bytes);
    return NULL;
}

static PyMethodDef append_functions[] = {
    {"encode_record", encode_record, METH_O, "The record of a payload."},
    {"decode_record", decode_record, METH_O,
     "The payload of a record, which is given without its line feed; None if `encode_record` would not have written it so."},
    {"encode_records", encode_records, METH_VARARGS,
     "encode_records(events, encode, event_type, bytes_max, encode_other): the joined records of all events, and a list with None "
     "or `Dropped` for each event."},
    {NULL, NULL, 0, NULL},
};

int
append_exec(PyObject *module)
{
    AppendState *state = &state_of_module(module)->append;
    fill_crc_table();
#ifdef CARRYLESS
    has_carryless = __builtin_cpu_supports("pclmul");
#endif
    if (PyModule_AddFunctions(module, append_functions) < 0
        || add_type(module, &counters_spec, &state->segment_counters) < 0
        || add_type(module, &writer_spec, &state->writer_state) < 0 || add_type(module, &enqueue_spec, &state->enqueue) < 0) {
        return -1;
    }
    state->acquire = PyUnicode_InternFromString("acquire");
    state->release = PyUnicode_InternFromString("release");
    state->append = PyUnicode_InternFromString("append");
    state->notify_threshold = PyUnicode_InternFromString("_notify_threshold");
    state->complete_append = PyUnicode_InternFromString("_complete_append");
    state->undo_append = PyUnicode_InternFromString("_undo_append");
    PyObject *os = PyImport_ImportModule("os");
    state->os_write = os == NULL ? NULL : PyObject_GetAttrString(os, "write");
    Py_XDECREF(os);
    return PyErr_Occurred() ? -1 : 0;
}

int
append_traverse(AppendState *state, visitproc visit, void *arg)
{
    Py_VISIT(state->segment_counters);
    Py_VISIT(state->writer_state);
    Py_VISIT(state->enqueue);
    Py_VISIT(state->os_write);
    return 0;
}

void
append_clear(AppendState *state)
{
    Py_CLEAR(state->segment_counters);
    Py_CLEAR(state->writer_state);
    Py_CLEAR(state->enqueue);
    Py_CLEAR(state->os_write);
    Py_CLEAR(state->acquire);
    Py_CLEAR(state->release);
    Py_CLEAR(state->append);
    Py_CLEAR(state->notify_threshold);
    Py_CLEAR(state->complete_append);
    Py_CLEAR(state->undo_append);
}

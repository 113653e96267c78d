/* The future that a coroutine awaits until its event is durable. `_native.py` does the same in Python.

It implements asyncio's protocol for foreign futures (`_asyncio_future_blocking`), and uses nothing else of asyncio that is
private. Other threads than the event loop's may only create a future and read its constant fields. */

#include "speedups.h"

#include <string.h>

enum { PENDING, CANCELLED, DONE };

typedef struct {
    PyObject_HEAD
    PyObject *lines;
    Py_ssize_t events;
    PyObject *loop;
    PyObject *outcome; /* DONE: the outcome; CANCELLED: the message, or NULL */
    PyObject *callback;
    PyObject *context;
    PyObject *more; /* NULL, or a list of (callback, context); a task adds one callback, and needs no list */
    int state;
    char blocking;
} CommitFuture;

static FutureState *
state_of(PyObject *future)
{
    return &state_of_module(PyType_GetModule(Py_TYPE(future)))->future;
}

static PyObject *
future_vectorcall(PyObject *type, PyObject *const *args, size_t flags, PyObject *names)
{
    if (PyVectorcall_NARGS(flags) != 3 || (names != NULL && PyTuple_GET_SIZE(names) > 0)) {
        PyErr_SetString(PyExc_TypeError, "CommitFuture takes lines, events and a loop");
        return NULL;
    }
    if (!PyBytes_Check(args[0])) {
        return PyErr_Format(PyExc_TypeError, "lines must be bytes, not %.200s", Py_TYPE(args[0])->tp_name);
    }
    Py_ssize_t events = PyLong_AsSsize_t(args[1]);
    if (events == -1 && PyErr_Occurred()) {
        return NULL;
    }
    CommitFuture *self = PyObject_GC_New(CommitFuture, (PyTypeObject *)type);
    if (self == NULL) {
        return NULL;
    }
    self->lines = Py_NewRef(args[0]);
    self->events = events;
    self->loop = Py_NewRef(args[2]);
    self->outcome = self->callback = self->context = self->more = NULL;
    self->state = PENDING;
    self->blocking = 0;
    PyObject_GC_Track((PyObject *)self);
    return (PyObject *)self;
}

static PyObject *
future_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    if (keywords != NULL && PyDict_GET_SIZE(keywords) > 0) {
        PyErr_SetString(PyExc_TypeError, "CommitFuture takes no keywords");
        return NULL;
    }
    return future_vectorcall((PyObject *)type, ((PyTupleObject *)args)->ob_item, (size_t)PyTuple_GET_SIZE(args), NULL);
}

static int
object_traverse(PyObject *object, visitproc visit, void *arg)
{
    CommitFuture *self = (CommitFuture *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->loop);
    Py_VISIT(self->outcome);
    Py_VISIT(self->callback);
    Py_VISIT(self->context);
    Py_VISIT(self->more);
    return 0;
}

static int
object_clear(PyObject *object)
{
    CommitFuture *self = (CommitFuture *)object;
    Py_CLEAR(self->outcome);
    Py_CLEAR(self->callback);
    Py_CLEAR(self->context);
    Py_CLEAR(self->more);
    return 0;
}

static void
future_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    object_clear(object);
    Py_CLEAR(((CommitFuture *)object)->lines);
    Py_CLEAR(((CommitFuture *)object)->loop);
    PyObject_GC_Del(object);
    Py_DECREF(type);
}

/* Returns a new reference to the outcome; NULL with an exception set if the future is pending or cancelled. */
static PyObject *
outcome_of(CommitFuture *self)
{
    if (self->state == DONE) {
        return Py_NewRef(self->outcome);
    }
    FutureState *state = state_of((PyObject *)self);
    if (self->state == PENDING) {
        PyErr_SetString(state->invalid_state_error, "Result is not set.");
    } else if (self->outcome != NULL) {
        PyErr_SetObject(state->cancelled_error, self->outcome);
    } else {
        PyErr_SetNone(state->cancelled_error);
    }
    return NULL;
}

static PySendResult
future_send(PyObject *object, PyObject *Py_UNUSED(value), PyObject **result)
{
    CommitFuture *self = (CommitFuture *)object;
    if (self->state == PENDING) {
        self->blocking = 1;
        *result = Py_NewRef(object);
        return PYGEN_NEXT;
    }
    *result = outcome_of(self);
    return *result == NULL ? PYGEN_ERROR : PYGEN_RETURN;
}

static PyObject *
future_next(PyObject *object)
{
    PyObject *result;
    if (future_send(object, Py_None, &result) == PYGEN_RETURN) {
        PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, result);
        Py_DECREF(result);
        if (stop != NULL) {
            PyErr_SetObject(PyExc_StopIteration, stop);
            Py_DECREF(stop);
        }
        return NULL;
    }
    return result;
}

/* Schedule a callback for the next iteration of the event loop. */
static int
call_soon(CommitFuture *self, PyObject *callback, PyObject *context)
{
    FutureState *state = state_of((PyObject *)self);
    PyObject *args[] = {self->loop, callback, (PyObject *)self, context};
    PyObject *handle = PyObject_VectorcallMethod(state->call_soon, args, 3, state->context_name);
    Py_XDECREF(handle);
    return handle == NULL ? -1 : 0;
}

/* Remove the next callback. Returns 1; 0 if there is none; -1 with an exception set. */
static int
pop_callback(CommitFuture *self, PyObject **callback, PyObject **context)
{
    if (self->callback != NULL) {
        *callback = self->callback;
        *context = self->context;
        self->callback = self->context = NULL;
        return 1;
    }
    if (self->more == NULL || PyList_GET_SIZE(self->more) == 0) {
        return 0;
    }
    PyObject *pair = PyList_GET_ITEM(self->more, 0);
    *callback = Py_NewRef(PyTuple_GET_ITEM(pair, 0));
    *context = Py_NewRef(PyTuple_GET_ITEM(pair, 1));
    return PyList_SetSlice(self->more, 0, 1, NULL) < 0 ? -1 : 1;
}

static int
schedule_callbacks(CommitFuture *self)
{
    PyObject *callback, *context;
    int popped;
    while ((popped = pop_callback(self, &callback, &context)) == 1) {
        int called = call_soon(self, callback, context);
        Py_DECREF(callback);
        Py_DECREF(context);
        if (called < 0) {
            return -1;
        }
    }
    return popped;
}

/* Call a callback in its context. Returns 0, or -1 with the exception of the callback set. */
static int
call_now(CommitFuture *self, PyObject *callback, PyObject *context)
{
    if (PyContext_Enter(context) < 0) {
        return -1;
    }
    PyObject *result = PyObject_CallOneArg(callback, (PyObject *)self);
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (PyContext_Exit(context) < 0) {
        PyErr_WriteUnraisable(context);
    }
    PyErr_Restore(type, error, trace);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* Set the outcome, call the first callback now, and schedule the others. */
static int
resolve_future(CommitFuture *self, PyObject *outcome)
{
    if (self->state != PENDING) {
        return 0;
    }
    self->outcome = Py_NewRef(outcome);
    self->state = DONE;
    PyObject *callback, *context;
    int popped = pop_callback(self, &callback, &context);
    if (popped != 1) {
        return popped;
    }
    int called = call_now(self, callback, context);
    Py_DECREF(callback);
    Py_DECREF(context);
    if (self->more == NULL) {
        return called;
    }
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (schedule_callbacks(self) < 0) {
        PyErr_WriteUnraisable((PyObject *)self);
    }
    PyErr_Restore(type, error, trace);
    return called;
}

static PyObject *
add_done_callback(PyObject *object, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    CommitFuture *self = (CommitFuture *)object;
    Py_ssize_t keywords = names == NULL ? 0 : PyTuple_GET_SIZE(names);
    if (count != 1 || keywords > 1
        || (keywords == 1 && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "context") != 0)) {
        PyErr_SetString(PyExc_TypeError, "add_done_callback takes a function and the keyword argument context");
        return NULL;
    }
    PyObject *callback = args[0];
    PyObject *context = keywords == 1 && args[1] != Py_None ? Py_NewRef(args[1]) : PyContext_CopyCurrent();
    if (context == NULL) {
        return NULL;
    }
    int added = 0;
    if (self->state != PENDING) {
        added = call_soon(self, callback, context);
    } else if (self->callback == NULL && (self->more == NULL || PyList_GET_SIZE(self->more) == 0)) {
        self->callback = Py_NewRef(callback);
        self->context = Py_NewRef(context);
    } else {
        PyObject *pair = PyTuple_Pack(2, callback, context);
        if (self->more == NULL) {
            self->more = PyList_New(0);
        }
        added = pair == NULL || self->more == NULL ? -1 : PyList_Append(self->more, pair);
        Py_XDECREF(pair);
    }
    Py_DECREF(context);
    if (added < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* Returns a list of all (callback, context) pairs, in order. */
static PyObject *
callbacks_of(const CommitFuture *self)
{
    PyObject *pairs = self->more == NULL ? PyList_New(0) : PyList_GetSlice(self->more, 0, PyList_GET_SIZE(self->more));
    if (pairs != NULL && self->callback != NULL) {
        PyObject *pair = PyTuple_Pack(2, self->callback, self->context);
        if (pair == NULL || PyList_Insert(pairs, 0, pair) < 0) {
            Py_CLEAR(pairs);
        }
        Py_XDECREF(pair);
    }
    return pairs;
}

/* Whether a list contains a pair of these two objects (compared by identity). */
static int
has_pair(PyObject *pairs, PyObject *callback, PyObject *context)
{
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(pairs); at++) {
        PyObject *pair = PyList_GET_ITEM(pairs, at);
        if (PyTuple_GET_ITEM(pair, 0) == callback && PyTuple_GET_ITEM(pair, 1) == context) {
            return 1;
        }
    }
    return 0;
}

/* Remove the callbacks that are in a list of pairs. Returns how many were removed, or -1 with an exception set. Runs no Python
   code that could change the callbacks meanwhile. */
static Py_ssize_t
remove_pairs(CommitFuture *self, PyObject *removed)
{
    PyObject *old = callbacks_of(self), *remaining = PyList_New(0);
    Py_ssize_t count = 0;
    int failed = old == NULL || remaining == NULL;
    for (Py_ssize_t at = 0; !failed && at < PyList_GET_SIZE(old); at++) {
        PyObject *pair = PyList_GET_ITEM(old, at);
        int is_removed = has_pair(removed, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1));
        count += is_removed;
        failed = !is_removed && PyList_Append(remaining, pair) < 0;
    }
    if (!failed) {
        PyObject *callback = self->callback, *context = self->context, *more = self->more;
        self->callback = self->context = NULL;
        self->more = Py_NewRef(remaining); /* `callback` stays empty, so that the order is kept */
        Py_XDECREF(callback);
        Py_XDECREF(context);
        Py_XDECREF(more);
    }
    Py_XDECREF(old);
    Py_XDECREF(remaining);
    return failed ? -1 : count;
}

/* Compares all callbacks before it removes any: a comparison may run Python code, and if one raises, no callback is removed. */
static PyObject *
remove_done_callback(PyObject *object, PyObject *callback)
{
    CommitFuture *self = (CommitFuture *)object;
    PyObject *pairs = callbacks_of(self), *equal = PyList_New(0);
    Py_ssize_t removed = pairs == NULL || equal == NULL ? -1 : 0;
    for (Py_ssize_t at = 0; removed == 0 && at < PyList_GET_SIZE(pairs); at++) {
        PyObject *pair = Py_NewRef(PyList_GET_ITEM(pairs, at));
        int same = PyObject_RichCompareBool(PyTuple_GET_ITEM(pair, 0), callback, Py_EQ);
        if (same < 0 || (same && PyList_Append(equal, pair) < 0)) {
            removed = -1;
        }
        Py_DECREF(pair);
    }
    if (removed == 0) {
        removed = remove_pairs(self, equal);
    }
    Py_XDECREF(pairs);
    Py_XDECREF(equal);
    return removed < 0 ? NULL : PyLong_FromSsize_t(removed);
}

static PyObject *
cancel_future(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"msg", NULL};
    CommitFuture *self = (CommitFuture *)object;
    PyObject *message = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O:cancel", names, &message)) {
        return NULL;
    }
    if (self->state != PENDING) {
        Py_RETURN_FALSE;
    }
    self->state = CANCELLED;
    self->outcome = message == Py_None ? NULL : Py_NewRef(message);
    if (schedule_callbacks(self) < 0) {
        return NULL;
    }
    Py_RETURN_TRUE;
}

static PyObject *
future_result(PyObject *object, PyObject *Py_UNUSED(no_args))
{
    return outcome_of((CommitFuture *)object);
}

static PyObject *
future_exception(PyObject *object, PyObject *Py_UNUSED(no_args))
{
    PyObject *outcome = outcome_of((CommitFuture *)object);
    if (outcome == NULL) {
        return NULL;
    }
    Py_DECREF(outcome);
    Py_RETURN_NONE;
}

static PyObject *
is_done(PyObject *object, PyObject *Py_UNUSED(no_args))
{
    return PyBool_FromLong(((CommitFuture *)object)->state != PENDING);
}

static PyObject *
is_cancelled(PyObject *object, PyObject *Py_UNUSED(no_args))
{
    return PyBool_FromLong(((CommitFuture *)object)->state == CANCELLED);
}

static PyObject *
get_loop(PyObject *object, PyObject *Py_UNUSED(no_args))
{
    return Py_NewRef(((CommitFuture *)object)->loop);
}

static PyMethodDef future_methods[] = {
    {"add_done_callback", (PyCFunction)(void (*)(void))add_done_callback, METH_FASTCALL | METH_KEYWORDS,
     "As `asyncio.Future.add_done_callback`."},
    {"remove_done_callback", remove_done_callback, METH_O, "As `asyncio.Future.remove_done_callback`."},
    {"cancel", (PyCFunction)(void (*)(void))cancel_future, METH_VARARGS | METH_KEYWORDS,
     "Cancel the future. Returns False if it is done already."},
    {"result", future_result, METH_NOARGS, "The outcome. Raises if the future is pending or cancelled."},
    {"exception", future_exception, METH_NOARGS, "None, because an outcome is never an exception."},
    {"done", is_done, METH_NOARGS, "Whether the future has its outcome or is cancelled."},
    {"cancelled", is_cancelled, METH_NOARGS, "Whether the future is cancelled."},
    {"get_loop", get_loop, METH_NOARGS, "The event loop of the future."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef future_members[] = {
    {"lines", T_OBJECT_EX, offsetof(CommitFuture, lines), READONLY, NULL},
    {"events", T_PYSSIZET, offsetof(CommitFuture, events), READONLY, NULL},
    {"loop", T_OBJECT_EX, offsetof(CommitFuture, loop), READONLY, NULL},
    {"_asyncio_future_blocking", T_BOOL, offsetof(CommitFuture, blocking), 0, NULL},
    {NULL},
};

static PyType_Slot future_slots[] = {
    {Py_tp_doc, "CommitFuture(lines, events, loop): a future for the outcome of whole lines that hold some events."},
    {Py_tp_new, future_new},
    {Py_tp_traverse, object_traverse},
    {Py_tp_clear, object_clear},
    {Py_tp_dealloc, future_dealloc},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, future_next},
    {Py_am_await, PyObject_SelfIter},
    {Py_am_send, future_send},
    {Py_tp_methods, future_methods},
    {Py_tp_members, future_members},
    {0, NULL},
};

static PyType_Spec future_spec = {
    "pillarbox._speedups.CommitFuture", sizeof(CommitFuture), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, future_slots,
};

/* Resolve futures, and remove those that were resolved from the list, even if a callback raises. */
static PyObject *
resolve_futures(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    FutureState *state = &state_of_module(module)->future;
    if (count != 2 || !PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "resolve_futures takes a list of futures and an outcome");
        return NULL;
    }
    PyObject *futures = args[0], *outcome = args[1];
    Py_ssize_t resolved = 0;
    int failed = 0;
    while (!failed && resolved < PyList_GET_SIZE(futures)) {
        PyObject *future = Py_NewRef(PyList_GET_ITEM(futures, resolved));
        resolved++;
        if (Py_IS_TYPE(future, state->commit_future)) {
            failed = resolve_future((CommitFuture *)future, outcome) < 0;
        } else {
            PyErr_SetString(PyExc_TypeError, "not a CommitFuture");
            failed = 1;
        }
        Py_DECREF(future);
    }
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (PyList_SetSlice(futures, 0, resolved, NULL) < 0) {
        PyErr_WriteUnraisable(futures);
    }
    PyErr_Restore(type, error, trace);
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* Read the lines, the events and the loop of a queue entry. Sets new references. Returns 0, or -1 with an exception set. */
static int
read_entry(FutureState *state, PyObject *entry, PyObject **lines, Py_ssize_t *events, PyObject **loop)
{
    if (Py_IS_TYPE(entry, state->commit_future)) {
        CommitFuture *future = (CommitFuture *)entry;
        *lines = Py_NewRef(future->lines);
        *events = future->events;
        *loop = Py_NewRef(future->loop);
        return 0;
    }
    PyObject *number = PyObject_GetAttr(entry, state->events);
    *events = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    *lines = PyErr_Occurred() ? NULL : PyObject_GetAttr(entry, state->lines);
    *loop = *lines == NULL ? NULL : PyObject_GetAttr(entry, state->loop);
    if (*loop != NULL && !PyBytes_Check(*lines)) {
        PyErr_SetString(PyExc_TypeError, "lines must be bytes");
        Py_CLEAR(*loop);
    }
    if (*loop == NULL) {
        Py_XDECREF(*lines);
        return -1;
    }
    return 0;
}

/* A group that is being gathered. Each attribute of an entry is read only once, because it may have changed the next time. */
typedef struct {
    PyObject **lines; /* `count` bytes objects */
    Py_ssize_t count;
    long long events, bytes;
    PyObject *loop; /* the loop of all entries; Ellipsis if they have different ones; NULL if there is no entry */
} Group;

static PyObject *
join_lines(const Group *group)
{
    if (group->count == 1) {
        return Py_NewRef(group->lines[0]);
    }
    if (group->bytes > PY_SSIZE_T_MAX) {
        return PyErr_NoMemory();
    }
    PyObject *joined = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)group->bytes);
    char *to = joined == NULL ? NULL : PyBytes_AS_STRING(joined);
    for (Py_ssize_t at = 0; joined != NULL && at < group->count; at++) {
        Py_ssize_t size = PyBytes_GET_SIZE(group->lines[at]);
        memcpy(to, PyBytes_AS_STRING(group->lines[at]), (size_t)size);
        to += size;
    }
    return joined;
}

/* Add an entry to the group. Returns 1; 0 if there is no room for it; -1 with an exception set. */
static int
add_entry(FutureState *state, Group *group, PyObject *entry, Py_ssize_t room_events, Py_ssize_t room_bytes)
{
    PyObject *lines, *loop;
    Py_ssize_t events;
    if (read_entry(state, entry, &lines, &events, &loop) < 0) {
        return -1;
    }
    long long total_events, total_bytes;
    int overflows = __builtin_add_overflow(group->events, events, &total_events);
    overflows |= __builtin_add_overflow(group->bytes, PyBytes_GET_SIZE(lines), &total_bytes);
    if (group->count > 0 && (overflows || total_events > room_events || total_bytes > room_bytes)) {
        Py_DECREF(lines);
        Py_DECREF(loop);
        return 0;
    }
    group->lines[group->count++] = lines;
    group->events = total_events;
    group->bytes = total_bytes;
    if (group->loop == NULL) {
        group->loop = Py_NewRef(loop);
    } else if (group->loop != loop) {
        Py_SETREF(group->loop, Py_NewRef(Py_Ellipsis));
    }
    Py_DECREF(loop);
    return 1;
}

/* gather_group(queue, most, room_events, room_bytes) -> (entries, joined lines, number of events, loop or Ellipsis) */
static PyObject *
gather_group(PyObject *module, PyObject *args)
{
    FutureState *state = &state_of_module(module)->future;
    PyObject *queue, *result = NULL;
    Py_ssize_t most, room_events, room_bytes;
    if (!PyArg_ParseTuple(args, "O!nnn:gather_group", &PyList_Type, &queue, &most, &room_events, &room_bytes)) {
        return NULL;
    }
    most = room_events < most ? room_events : most; /* each entry has at least one event */
    PyObject *entries = PyList_GetSlice(queue, 0, most > 1 ? most : 1);
    if (entries == NULL) {
        return NULL;
    }
    Py_ssize_t size = PyList_GET_SIZE(entries);
    Group group = {PyMem_New(PyObject *, (size_t)size + 1), 0, 0, 0, NULL};
    if (group.lines == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    int added = 1;
    while (added == 1 && group.count < size && group.count < PyList_GET_SIZE(entries)) {
        PyObject *entry = Py_NewRef(PyList_GET_ITEM(entries, group.count)); /* its attributes may run any code */
        added = add_entry(state, &group, entry, room_events, room_bytes);
        Py_DECREF(entry);
    }
    if (added < 0 || PyList_SetSlice(entries, group.count, PyList_GET_SIZE(entries), NULL) < 0) {
        goto done;
    }
    PyObject *lines = join_lines(&group);
    if (lines != NULL) {
        result = Py_BuildValue("ONLO", entries, lines, group.events, group.loop != NULL ? group.loop : Py_Ellipsis);
    }
done:
    for (Py_ssize_t at = 0; at < group.count; at++) {
        Py_DECREF(group.lines[at]);
    }
    PyMem_Free(group.lines);
    Py_XDECREF(group.loop);
    Py_DECREF(entries);
    return result;
}

static PyMethodDef future_functions[] = {
    {"gather_group", gather_group, METH_VARARGS,
     "gather_group(queue, most, room_events, room_bytes): entries from the front of the queue, their joined lines, the number of "
     "their events, and their loop (Ellipsis if they have different ones)."},
    {"resolve_futures", (PyCFunction)(void (*)(void))resolve_futures, METH_FASTCALL,
     "resolve_futures(futures, outcome): set the outcome of each, call its callbacks in their contexts, and empty the list."},
    {NULL, NULL, 0, NULL},
};

int
future_exec(PyObject *module)
{
    FutureState *state = &state_of_module(module)->future;
    if (PyModule_AddFunctions(module, future_functions) < 0 || add_type(module, &future_spec, &state->commit_future) < 0) {
        return -1;
    }
    state->commit_future->tp_vectorcall = future_vectorcall;
    PyObject *exceptions = PyImport_ImportModule("asyncio.exceptions");
    if (exceptions == NULL) {
        return -1;
    }
    state->cancelled_error = PyObject_GetAttrString(exceptions, "CancelledError");
    state->invalid_state_error = PyObject_GetAttrString(exceptions, "InvalidStateError");
    Py_DECREF(exceptions);
    state->lines = PyUnicode_InternFromString("lines");
    state->events = PyUnicode_InternFromString("events");
    state->loop = PyUnicode_InternFromString("loop");
    state->call_soon = PyUnicode_InternFromString("call_soon");
    state->context_name = Py_BuildValue("(s)", "context");
    return PyErr_Occurred() ? -1 : 0;
}

int
future_traverse(FutureState *state, visitproc visit, void *arg)
{
    Py_VISIT(state->commit_future);
    Py_VISIT(state->cancelled_error);
    Py_VISIT(state->invalid_state_error);
    return 0;
}

void
future_clear(FutureState *state)
{
    Py_CLEAR(state->commit_future);
    Py_CLEAR(state->cancelled_error);
    Py_CLEAR(state->invalid_state_error);
    Py_CLEAR(state->call_soon);
    Py_CLEAR(state->context_name);
    Py_CLEAR(state->lines);
    Py_CLEAR(state->events);
    Py_CLEAR(state->loop);
}

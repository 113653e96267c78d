/* Makes the id and the time of an event, and checks the types of its fields. `pillarbox/event.py` does the same in Python. */

#include "speedups.h"

#include <string.h>
#include <time.h>

enum {
    MILLIS_DIGITS = 12,
    COUNT_DIGITS = 12,
    ID_BYTES = MILLIS_DIGITS + 1 + ID_MIDDLE_BYTES + COUNT_DIGITS,
};

/* Ids and times. */

static char *
put_digits(char *to, uint64_t value, int count)
{
    static const char digits[] = "0123456789abcdef";
    for (int shift = 4 * (count - 1); shift >= 0; shift -= 4) {
        *to++ = digits[value >> shift & 0xF];
    }
    return to;
}

static PyObject *
new_event_id(PyObject *module, PyObject *Py_UNUSED(no_args))
{
    if (check_fork(state_of_module(module)) < 0) { /* or the ids would be those of the parent */
        return NULL;
    }
    EventState *state = &state_of_module(module)->event;
    if (state->middle[0] == '\0') {
        PyErr_SetString(PyExc_RuntimeError, "reseed() must be called first");
        return NULL;
    }
    PyObject *id = PyUnicode_New(ID_BYTES, 127);
    if (id == NULL) {
        return NULL;
    }
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t millis = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
#ifdef Py_GIL_DISABLED
    uint64_t count = __atomic_fetch_add(&state->count, 1, __ATOMIC_RELAXED);
#else
    uint64_t count = state->count++;
#endif
    char *to = (char *)PyUnicode_1BYTE_DATA(id);
    to = put_digits(to, millis >> 16, 8);
    *to++ = '-';
    to = put_digits(to, millis, 4);
    memcpy(to, state->middle, ID_MIDDLE_BYTES);
    put_digits(to + ID_MIDDLE_BYTES, count, COUNT_DIGITS);
    return id;
}

static PyObject *
now_micros(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(no_args))
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return PyLong_FromLongLong((long long)now.tv_sec * 1000000 + now.tv_nsec / 1000);
}

static PyObject *
reseed(PyObject *module, PyObject *args)
{
    EventState *state = &state_of_module(module)->event;
    const char *middle;
    Py_ssize_t size;
    unsigned long long first;
    if (!PyArg_ParseTuple(args, "s#K:reseed", &middle, &size, &first)) {
        return NULL;
    }
    int is_ascii = 1;
    for (Py_ssize_t at = 0; at < size; at++) {
        is_ascii &= middle[at] != '\0' && !(middle[at] & 0x80);
    }
    if (size != ID_MIDDLE_BYTES || !is_ascii) {
        PyErr_SetString(PyExc_ValueError, "the middle of an id must have 11 characters, all of them ASCII");
        return NULL;
    }
    memcpy(state->middle, middle, ID_MIDDLE_BYTES);
    state->count = first;
    Py_RETURN_NONE;
}

/* EventCheck: whether the fields of an event have the right types. */

typedef struct {
    Py_ssize_t offset; /* of the member within the event */
    char optional;     /* None is allowed */
} TextMember;

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *plain; /* the same check in Python, which reports what is wrong */
    PyObject *is_json;
    PyObject *type; /* the type that the offsets belong to; NULL before `bind` */
    TextMember *texts;
    Py_ssize_t count;
    Py_ssize_t json, micros; /* offsets of these members */
} EventCheck;

/* Whether a value is text that can be encoded as UTF-8. */
static int
is_text(PyObject *value)
{
    if (value == NULL || !PyUnicode_Check(value)) {
        return 0;
    }
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(value) < 0) {
        PyErr_Clear();
        return 0;
    }
#endif
    if (PyUnicode_KIND(value) == PyUnicode_1BYTE_KIND) {
        return 1;
    }
    for (Py_ssize_t at = 0; at < PyUnicode_GET_LENGTH(value); at++) {
        if (Py_UNICODE_IS_SURROGATE(PyUnicode_READ_CHAR(value, at))) {
            return 0;
        }
    }
    return 1;
}

static inline PyObject *
member_at(PyObject *event, Py_ssize_t offset)
{
    return *(PyObject **)((char *)event + offset);
}

static int
is_json_text(EventCheck *self, PyObject *value)
{
    if (!is_text(value)) {
        return 0;
    }
    if (PyUnicode_GET_LENGTH(value) == 2 && PyUnicode_READ_CHAR(value, 0) == '{' && PyUnicode_READ_CHAR(value, 1) == '}') {
        return 1;
    }
    Py_INCREF(value); /* the called code could replace the field, and so free the value */
    PyObject *result = PyObject_CallOneArg(self->is_json, value);
    Py_DECREF(value);
    if (result == NULL && PyErr_ExceptionMatches(PyExc_Exception)) {
        PyErr_Clear(); /* the check in Python finds the error again, and reports it */
    }
    Py_XDECREF(result);
    return result != NULL;
}

static int
has_valid_types(EventCheck *self, PyObject *event)
{
    for (Py_ssize_t index = 0; index < self->count; index++) {
        PyObject *value = member_at(event, self->texts[index].offset);
        if (!(value == Py_None && self->texts[index].optional) && !is_text(value)) {
            return 0;
        }
    }
    PyObject *micros = member_at(event, self->micros);
    int overflow = 1;
    if (micros != NULL && PyLong_CheckExact(micros)) {
        PyLong_AsLongLongAndOverflow(micros, &overflow);
    }
    return !overflow && is_json_text(self, member_at(event, self->json));
}

static PyObject *
check_call(PyObject *callable, PyObject *const *args, size_t nargsf, PyObject *names)
{
    EventCheck *self = (EventCheck *)callable;
    if (names == NULL && PyVectorcall_NARGS(nargsf) == 1 && (PyObject *)Py_TYPE(args[0]) == self->type) {
        if (has_valid_types(self, args[0])) {
            Py_RETURN_NONE;
        }
        if (PyErr_Occurred()) { /* an interrupt */
            return NULL;
        }
    }
    if (self->plain == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this check has been garbage collected");
        return NULL;
    }
    return PyObject_Vectorcall(self->plain, args, nargsf, names);
}

/* The offset of a member of `type`; -1 with an exception set if it is not a slot that holds an object. */
static Py_ssize_t
offset_of(PyObject *type, PyObject *name)
{
    PyObject *descriptor = PyObject_GetAttr(type, name);
    if (descriptor == NULL) {
        return -1;
    }
    Py_ssize_t offset = -1;
    if (Py_IS_TYPE(descriptor, &PyMemberDescr_Type) && PyType_IsSubtype((PyTypeObject *)type, PyDescr_TYPE(descriptor))
        && ((PyMemberDescrObject *)descriptor)->d_member->type == T_OBJECT_EX) {
        offset = ((PyMemberDescrObject *)descriptor)->d_member->offset;
    } else {
        PyErr_Format(PyExc_TypeError, "%R is not a slot of %R", name, type);
    }
    Py_DECREF(descriptor);
    return offset;
}

static PyObject *
check_bind(PyObject *callable, PyObject *args)
{
    EventCheck *self = (EventCheck *)callable;
    PyObject *type, *required, *optional, *json, *micros;
    if (!PyArg_ParseTuple(args, "O!O!O!UU:bind", &PyType_Type, &type, &PyTuple_Type, &required, &PyTuple_Type, &optional, &json,
                          &micros)) {
        return NULL;
    }
    if (self->type != NULL) {
        PyErr_SetString(PyExc_ValueError, "the check is bound already");
        return NULL;
    }
    Py_ssize_t required_count = PyTuple_GET_SIZE(required), count = required_count + PyTuple_GET_SIZE(optional);
    PyMem_Free(self->texts);
    self->texts = PyMem_New(TextMember, count);
    if (self->texts == NULL) {
        return PyErr_NoMemory();
    }
    for (Py_ssize_t index = 0; index < count; index++) {
        int is_optional = index >= required_count;
        PyObject *name = is_optional ? PyTuple_GET_ITEM(optional, index - required_count) : PyTuple_GET_ITEM(required, index);
        self->texts[index] = (TextMember){offset_of(type, name), (char)is_optional};
        if (self->texts[index].offset < 0) {
            return NULL;
        }
    }
    self->count = count;
    if ((self->json = offset_of(type, json)) < 0 || (self->micros = offset_of(type, micros)) < 0) {
        return NULL;
    }
    self->type = Py_NewRef(type);
    Py_RETURN_NONE;
}

static PyObject *
check_new(PyTypeObject *type, PyObject *args, PyObject *names)
{
    static char *keywords[] = {"", "", NULL};
    PyObject *plain, *is_json;
    if (!PyArg_ParseTupleAndKeywords(args, names, "OO:EventCheck", keywords, &plain, &is_json)) {
        return NULL;
    }
    EventCheck *self = (EventCheck *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->call = check_call;
        self->plain = Py_NewRef(plain);
        self->is_json = Py_NewRef(is_json);
    }
    return (PyObject *)self;
}

/* Bind to an event, as a function in a class body does, so that the check is a method of the event. */
static PyObject *
check_get(PyObject *self, PyObject *event, PyObject *Py_UNUSED(type))
{
    return event == NULL ? Py_NewRef(self) : PyMethod_New(self, event);
}

static int
check_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((EventCheck *)self)->plain);
    Py_VISIT(((EventCheck *)self)->is_json);
    Py_VISIT(((EventCheck *)self)->type);
    return 0;
}

static int
check_clear(PyObject *self)
{
    Py_CLEAR(((EventCheck *)self)->plain);
    Py_CLEAR(((EventCheck *)self)->is_json);
    Py_CLEAR(((EventCheck *)self)->type);
    return 0;
}

static void
check_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    check_clear(self);
    PyMem_Free(((EventCheck *)self)->texts);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef check_methods[] = {
    {"bind", check_bind, METH_VARARGS, "Read the members of events of this type directly, through the offsets of their slots."},
    {NULL},
};

static PyMemberDef check_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(EventCheck, call), READONLY, NULL},
    {"__wrapped__", T_OBJECT_EX, offsetof(EventCheck, plain), READONLY, NULL},
    {NULL},
};

static PyType_Slot check_slots[] = {
    {Py_tp_doc, "Passes an event whose members have the right types. Calls the check in Python for every other object."},
    {Py_tp_new, check_new},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_descr_get, check_get},
    {Py_tp_methods, check_methods},
    {Py_tp_members, check_members},
    {Py_tp_traverse, check_traverse},
    {Py_tp_clear, check_clear},
    {Py_tp_dealloc, check_dealloc},
    {0, NULL},
};

static PyType_Spec check_spec = {
    "pillarbox._speedups.EventCheck", sizeof(EventCheck), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    check_slots,
};

static PyMethodDef event_functions[] = {
    {"new_event_id", new_event_id, METH_NOARGS, "new_event_id($module, /)\n--\n\nA new id: a UUID of version 7, as text."},
    {"now_micros", now_micros, METH_NOARGS,
     "now_micros($module, /)\n--\n\nWall time in microseconds since 1970, the unit of `occurred_at_micros`."},
    {"reseed", reseed, METH_VARARGS,
     "reseed($module, middle, first, /)\n--\n\nSet the middle part of the ids, and the first number of the counter at their end."},
    {NULL, NULL, 0, NULL},
};

int
event_exec(PyObject *module)
{
    return add_type(module, &check_spec, NULL) < 0 ? -1 : PyModule_AddFunctions(module, event_functions);
}

/* The reader's simple case, compiled. Optional: `store/plain.py` has the same in Python, and the tests hold both to the same.

A line that is exactly what the writer writes, whose payload is UTF-8 and JSON, gives its payload. At the first line that is
anything else this stops, and the reader in Python says what it is. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

/* Whether the text of a payload is UTF-8, strictly. */
static int
is_utf8(PyObject *payload)
{
    const char *at = PyBytes_AS_STRING(payload);
    Py_ssize_t size = PyBytes_GET_SIZE(payload);
    unsigned char high = 0;
    for (Py_ssize_t i = 0; i < size; i++) {
        high |= (unsigned char)at[i];
    }
    if (high < 0x80) {
        return 1;
    }
    PyObject *text = PyUnicode_DecodeUTF8(at, size, NULL);
    Py_XDECREF(text);
    return text != NULL;
}

/* The payload of a line without its line feed, a new reference; NULL where it is no simple one, with or without an exception. */
static PyObject *
payload_of(const char *at, Py_ssize_t size, PyObject *value, PyObject *check)
{
    PyObject *line = PyBytes_FromStringAndSize(at, size);
    if (line == NULL) {
        return NULL;
    }
    PyObject *found = PyObject_CallOneArg(value, line);
    Py_DECREF(line);
    if (found == NULL || !PyBytes_Check(found) || !is_utf8(found)) {
        Py_XDECREF(found);
        return NULL;
    }
    PyObject *checked = PyObject_CallOneArg(check, found);
    if (checked == NULL) {
        Py_DECREF(found);
        return NULL;
    }
    Py_DECREF(checked);
    return found;
}

static PyObject *
records(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *data, *value, *check;
    Py_ssize_t offset, most;
    if (!PyArg_ParseTuple(arguments, "O!nnOO:records", &PyBytes_Type, &data, &offset, &most, &value, &check)) {
        return NULL;
    }
    const char *begin = PyBytes_AS_STRING(data), *end = begin + PyBytes_GET_SIZE(data);
    if (offset < 0 || offset > end - begin) {
        return PyErr_Format(PyExc_ValueError, "offset %zd is not within the %zd bytes", offset, end - begin);
    }
    PyObject *payloads = PyList_New(0);
    const char *at = begin + offset, *feed;
    while (payloads != NULL && PyList_GET_SIZE(payloads) < most && (feed = memchr(at, '\n', (size_t)(end - at))) != NULL) {
        PyObject *payload = payload_of(at, feed - at, value, check);
        if (payload == NULL) {
            /* What is wrong, if anything is, the reader in Python finds again; an interrupt is not its business. */
            if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) {
                Py_CLEAR(payloads);
            }
            else {
                PyErr_Clear();
            }
            break;
        }
        if (PyList_Append(payloads, payload) < 0) {
            Py_CLEAR(payloads);
        }
        Py_DECREF(payload);
        at = feed + 1;
    }
    return payloads == NULL ? NULL : Py_BuildValue("(Nn)", payloads, (Py_ssize_t)(at - begin));
}

static PyMethodDef functions[] = {
    {"records", records, METH_VARARGS,
     "records(data, offset, most, value, check): the payloads of the simple lines from an offset on, and where they end."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* nothing is kept from one call to the next */
#endif
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_lines",
    .m_doc = "The reader's simple case, compiled: see `pillarbox.store.speed`.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__lines(void)
{
    return PyModuleDef_Init(&module);
}

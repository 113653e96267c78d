/* Decodes well-formed lines of a batch file. `_native.py` does the same in Python.

A line is well-formed if it has exactly the shape that the writer gives it, and its payload is UTF-8 and JSON. Decoding stops at
the first line that is not; the reader in Python finds out what is wrong with that line. */

#include "speedups.h"

#include <string.h>

/* Whether a payload is strict UTF-8. Where it is not, an exception is set. */
static int
is_utf8(PyObject *payload)
{
    const char *at = PyBytes_AS_STRING(payload);
    Py_ssize_t size = PyBytes_GET_SIZE(payload);
    unsigned char all_bits = 0;
    for (Py_ssize_t i = 0; i < size; i++) {
        all_bits |= (unsigned char)at[i];
    }
    if (all_bits < 0x80) {
        return 1;
    }
    PyObject *text = PyUnicode_DecodeUTF8(at, size, NULL);
    Py_XDECREF(text);
    return text != NULL;
}

/* Decode a line, which is given without its line feed. Returns a new reference to the payload; or NULL if the line is not
   well-formed, with or without an exception set. */
static PyObject *
payload_of(const char *at, Py_ssize_t size, PyObject *decode_record, PyObject *check)
{
    PyObject *line = PyBytes_FromStringAndSize(at, size);
    if (line == NULL) {
        return NULL;
    }
    PyObject *payload = PyObject_CallOneArg(decode_record, line);
    Py_DECREF(line);
    if (payload == NULL || !PyBytes_Check(payload) || !is_utf8(payload)) {
        Py_XDECREF(payload);
        return NULL;
    }
    PyObject *checked = PyObject_CallOneArg(check, payload);
    if (checked == NULL) {
        Py_DECREF(payload);
        return NULL;
    }
    Py_DECREF(checked);
    return payload;
}

static PyObject *
decode_records(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *data, *decode_record, *check;
    Py_ssize_t offset, most;
    if (!PyArg_ParseTuple(arguments, "O!nnOO:decode_records", &PyBytes_Type, &data, &offset, &most, &decode_record, &check)) {
        return NULL;
    }
    const char *begin = PyBytes_AS_STRING(data), *end = begin + PyBytes_GET_SIZE(data);
    if (offset < 0 || offset > end - begin) {
        return PyErr_Format(PyExc_ValueError, "offset %zd is not within the %zd bytes", offset, end - begin);
    }
    PyObject *payloads = PyList_New(0);
    const char *at = begin + offset, *feed;
    while (payloads != NULL && PyList_GET_SIZE(payloads) < most && (feed = memchr(at, '\n', (size_t)(end - at))) != NULL) {
        PyObject *payload = payload_of(at, feed - at, decode_record, check);
        if (payload == NULL) {
            /* The reader in Python finds the error of the line again. An interrupt is passed on to the caller. */
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

static PyMethodDef decode_functions[] = {
    {"decode_records", decode_records, METH_VARARGS,
     "decode_records(data, offset, most, decode_record, check): the payloads of up to `most` well-formed lines from an offset on, "
     "and the offset after them."},
    {NULL, NULL, 0, NULL},
};

int
decode_exec(PyObject *module)
{
    return PyModule_AddFunctions(module, decode_functions);
}

/* The ways in and out of a stage, the reading of finished events, and the packing of steps, without an interpreter.

   Between two steps a server runs millions of instructions, so whatever a step touches is out of the caches: what costs
   is how much of it there is. What is written here is what `capture/plain.py` says, which is used where this is not built; what
   happens seldom stands in Python alone, in `capture/stages.py`, and is called from both. Nothing here gives the GIL away, and
   no signal handler runs between two lines of it. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <structmember.h>
#include <time.h>

#define MAX_STAGES 1024
#define MAX_NAME 256

static PyObject *open_step;  /* the context variable of `context.py` */
static PyObject *test_clock; /* a clock in the place of the host's, for tests */
static PyObject *str_again, *str_another_pair, *str_capture_check, *str_close, *str_current_stream_key, *str_free,
    *str_handle, *str_handles, *str_not_entered, *str_not_exited, *str_qualname, *str_record_end, *str_record_start,
    *str_side, *str_step, *str_stream, *str_streams, *str_timed, *str_too_many;

static int now_ns(long long *ns)
{
    if (test_clock != NULL) {
        PyObject *told = PyObject_CallNoArgs(test_clock);
        if (told == NULL)
            return -1;
        *ns = PyLong_AsLongLong(told);
        Py_DECREF(told);
        return *ns == -1 && PyErr_Occurred() ? -1 : 0;
    }
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    *ns = time.tv_sec * 1000000000LL + time.tv_nsec;
    return 0;
}

/* Records: see `capture/plain.py` for what their fields are. */

typedef struct {
    PyObject_HEAD
    PyObject *attributes, *capture, *error, *ids, *kind, *number, *opened_ns, *rank, *requests, *stages;
    long long closed_ns;
    char bare, hang_reported;
} StepRecord;

typedef struct {
    PyObject_HEAD
    PyObject *attributes, *capture, *device_ns, *duration_ns, *error, *name, *pair, *step, *stream;
    long long entered_ns, exited_ns;
} StageRecord;

static PyTypeObject StepRecord_Type, StageRecord_Type;

#define VISIT_STEP(X) \
    X(attributes) X(capture) X(error) X(ids) X(kind) X(number) X(opened_ns) X(rank) X(requests) X(stages)
#define VISIT_STAGE(X) \
    X(attributes) X(capture) X(device_ns) X(duration_ns) X(error) X(name) X(pair) X(step) X(stream)
#define VISIT(field) Py_VISIT(self->field);
#define CLEAR(field) Py_CLEAR(self->field);

static int step_traverse(StepRecord *self, visitproc visit, void *arg)
{
    VISIT_STEP(VISIT)
    return 0;
}

static int step_clear(StepRecord *self)
{
    VISIT_STEP(CLEAR)
    return 0;
}

static void step_dealloc(StepRecord *self)
{
    PyObject_GC_UnTrack(self);
    step_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int stage_traverse(StageRecord *self, visitproc visit, void *arg)
{
    VISIT_STAGE(VISIT)
    return 0;
}

static int stage_clear(StageRecord *self)
{
    VISIT_STAGE(CLEAR)
    return 0;
}

static void stage_dealloc(StageRecord *self)
{
    PyObject_GC_UnTrack(self);
    stage_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMemberDef step_members[] = {
#define MEMBER(field) {#field, T_OBJECT_EX, offsetof(StepRecord, field), 0, NULL},
    VISIT_STEP(MEMBER)
#undef MEMBER
    {"closed_ns", T_LONGLONG, offsetof(StepRecord, closed_ns), 0, NULL},
    {"bare", T_BOOL, offsetof(StepRecord, bare), 0, NULL},
    {"hang_reported", T_BOOL, offsetof(StepRecord, hang_reported), 0, NULL},
    {NULL},
};

static PyMemberDef stage_members[] = {
#define MEMBER(field) {#field, T_OBJECT_EX, offsetof(StageRecord, field), 0, NULL},
    VISIT_STAGE(MEMBER)
#undef MEMBER
    {"entered_ns", T_LONGLONG, offsetof(StageRecord, entered_ns), 0, NULL},
    {"exited_ns", T_LONGLONG, offsetof(StageRecord, exited_ns), 0, NULL},
    {NULL},
};

/* Sets a field to an object, which it takes over. */
#define GIVE(field, object) do { PyObject *given = (object); Py_XSETREF(field, given); } while (0)
#define ABSENT(object) ((object) == NULL || (object) == Py_None)

static PyObject *take_error(void)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(value, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return value;
}

/* What an attribute of an object is, as a flag; -1 with an error. */
static int flag(PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    if (value == NULL)
        return -1;
    int is = PyObject_IsTrue(value);
    Py_DECREF(value);
    return is;
}

/* Calls a method of an event pair with its stream's handle: a record. */
static int record(PyObject *pair, PyObject *method, PyObject *stream)
{
    PyObject *handle = PyObject_GetAttr(stream, str_handle);
    if (handle == NULL)
        return -1;
    PyObject *call = PyObject_GetAttr(pair, method);
    PyObject *done = call == NULL ? NULL : PyObject_CallOneArg(call, handle);
    Py_XDECREF(call);
    Py_DECREF(handle);
    if (done == NULL)
        return -1;
    Py_DECREF(done);
    return 0;
}

/* The step that is open here, by way of Python where it is not the usual one. A new reference; NULL with an error. */
static PyObject *find_step(StageRecord *self)
{
    PyObject *found;
    if (PyContextVar_Get(open_step, NULL, &found) < 0)
        return NULL;
    if (PyObject_TypeCheck(found, &StepRecord_Type)) {
        StepRecord *step = (StepRecord *)found;
        if (!step->closed_ns && !step->bare && step->capture == self->capture)
            return found;
    }
    PyObject *step = PyObject_CallMethodOneArg((PyObject *)self, str_step, found);
    Py_DECREF(found);
    return step;
}

/* The current stream. A new reference; NULL with an error. */
static PyObject *find_stream(PyObject *capture)
{
    PyObject *stream = NULL, *key = NULL;
    PyObject *streams = PyObject_GetAttr(capture, str_streams);
    PyObject *look_up = streams == NULL ? NULL : PyObject_GetAttr(capture, str_current_stream_key);
    if (look_up != NULL && (key = PyObject_CallNoArgs(look_up)) != NULL) {
        stream = PyDict_GetItemWithError(streams, key);
        Py_XINCREF(stream);
    }
    Py_XDECREF(key);
    Py_XDECREF(look_up);
    Py_XDECREF(streams);
    if (stream == NULL && !PyErr_Occurred())
        stream = PyObject_CallMethodNoArgs(capture, str_stream);
    return stream;
}

/* A free event pair of the stream, or None. A new reference; NULL with an error. */
static PyObject *find_pair(StageRecord *self, PyObject *step, PyObject *stream)
{
    PyObject *pair = NULL;
    int timed = flag(stream, str_timed);
    if (timed < 0)
        return NULL;
    if (!timed) {
        PyObject *stages = ((StepRecord *)step)->stages;
        if (PyList_GET_SIZE(stages) >= MAX_STAGES)
            return PyObject_CallMethodNoArgs((PyObject *)self, str_too_many);
        Py_RETURN_NONE;
    }
    PyObject *free_pairs = PyObject_GetAttr(stream, str_free);
    if (free_pairs == NULL)
        return NULL;
    Py_ssize_t last = PyList_GET_SIZE(free_pairs) - 1;
    if (last >= 0) {
        pair = PyList_GET_ITEM(free_pairs, last);
        Py_INCREF(pair);
        if (PyList_SetSlice(free_pairs, last, last + 1, NULL) < 0)
            Py_CLEAR(pair);
    }
    Py_DECREF(free_pairs);
    if (pair == NULL && !PyErr_Occurred())
        pair = PyObject_CallMethodObjArgs((PyObject *)self, str_another_pair, step, stream, NULL);
    return pair;
}

static int enter(StageRecord *self, PyObject **pair)
{
    PyObject *step = find_step(self);
    if (ABSENT(step)) {
        Py_XDECREF(step);
        return step == NULL ? -1 : 0;
    }
    PyObject *stream = find_stream(self->capture);
    int side = stream == NULL ? -1 : flag(stream, str_side);
    if (side < 0 || (*pair = find_pair(self, step, stream)) == NULL)
        goto failed;
    if (side) {
        PyObject *free_to_record = PyObject_CallMethodNoArgs((PyObject *)self, str_capture_check);
        if (free_to_record == NULL)
            goto failed;
        Py_DECREF(free_to_record);
    }
    Py_INCREF(*pair);
    GIVE(self->pair, *pair);
    Py_INCREF(stream);
    GIVE(self->stream, stream);
    self->exited_ns = 0;
    if (now_ns(&self->entered_ns) < 0 || PyList_Append(((StepRecord *)step)->stages, (PyObject *)self) < 0)
        goto failed;
    GIVE(self->step, step);
    int recorded = *pair == Py_None ? 0 : record(*pair, str_record_start, stream);
    Py_DECREF(stream);
    return recorded;

failed:
    Py_DECREF(step);
    Py_XDECREF(stream);
    return -1;
}

static PyObject *stage_enter(StageRecord *self, PyObject *Py_UNUSED(nothing))
{
    if (!ABSENT(self->step)) {
        PyObject *again = PyObject_CallMethodNoArgs((PyObject *)self, str_again);
        if (again == NULL)
            return NULL;
        Py_DECREF(again);
        if (again == Py_False)
            Py_RETURN_NONE;
    }
    PyObject *pair = NULL;
    int failed = enter(self, &pair);
    PyObject *result = Py_None;
    Py_INCREF(result);
    if (failed) {
        PyObject *error = take_error();
        Py_SETREF(result, PyObject_CallMethodObjArgs(
            (PyObject *)self, str_not_entered, pair == NULL ? Py_None : pair, error, NULL));
        Py_DECREF(error);
    }
    Py_XDECREF(pair);
    return result;
}

static PyObject *stage_exit(StageRecord *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "__exit__() takes the type, the value and the traceback of an exception");
        return NULL;
    }
    if (ABSENT(self->step))
        Py_RETURN_NONE;
    PyObject *step = self->step, *result = NULL;
    Py_INCREF(step);
    long long exited_ns = 0;
    int failed = now_ns(&exited_ns);
    Py_INCREF(args[0]);
    GIVE(self->error, args[0]);
    if (!failed && !ABSENT(self->pair))
        failed = record(self->pair, str_record_end, self->stream);
    if (!failed) {
        self->exited_ns = exited_ns; /* last: from here on the idle thread may find the stage done */
        int ends = 1;
        if (PyObject_TypeCheck(step, &StepRecord_Type)) {
            StepRecord *around = (StepRecord *)step;
            ends = around->bare && PyList_GET_SIZE(around->stages) > 0 &&
                   PyList_GET_ITEM(around->stages, 0) == (PyObject *)self;
        }
        if (!ends) {
            Py_DECREF(step);
            Py_RETURN_NONE;
        }
        result = PyObject_CallMethodNoArgs(step, str_close);
    }
    if (result == NULL) {
        PyObject *error = take_error(), *exited = PyLong_FromLongLong(exited_ns);
        if (exited != NULL)
            result = PyObject_CallMethodObjArgs((PyObject *)self, str_not_exited, step, exited, error, NULL);
        Py_XDECREF(exited);
        Py_DECREF(error);
    }
    Py_DECREF(step);
    return result;
}

static PyMethodDef stage_methods[] = {
    {"__enter__", (PyCFunction)stage_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))stage_exit, METH_FASTCALL, NULL},
    {NULL},
};

static PyTypeObject StepRecord_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "otel_npu._native.StepRecord",
    .tp_basicsize = sizeof(StepRecord),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)step_dealloc,
    .tp_traverse = (traverseproc)step_traverse,
    .tp_clear = (inquiry)step_clear,
    .tp_members = step_members,
};

static PyTypeObject StageRecord_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "otel_npu._native.StageRecord",
    .tp_basicsize = sizeof(StageRecord),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)stage_dealloc,
    .tp_traverse = (traverseproc)stage_traverse,
    .tp_clear = (inquiry)stage_clear,
    .tp_members = stage_members,
    .tp_methods = stage_methods,
};

static PyObject *new_stage(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 4 || !PyType_Check(args[0]) || !PyType_IsSubtype((PyTypeObject *)args[0], &StageRecord_Type)) {
        PyErr_SetString(PyExc_TypeError, "new_stage() takes a class of stages, a capture, a name and attributes");
        return NULL;
    }
    PyTypeObject *type = (PyTypeObject *)args[0];
    StageRecord *stage = (StageRecord *)type->tp_alloc(type, 0);
    if (stage == NULL)
        return NULL;
    Py_INCREF(args[1]);
    stage->capture = args[1];
    Py_INCREF(args[2]);
    stage->name = args[2];
    Py_INCREF(args[3]);
    stage->attributes = args[3];
    Py_INCREF(Py_None);
    stage->step = Py_None;
    return (PyObject *)stage;
}

/* Packing: steps as msgpack, in the form of `frames.Steps`. */

typedef struct {
    char *bytes;
    Py_ssize_t length, room;
} Packet;

static char *make_room(Packet *packet, Py_ssize_t more)
{
    if (packet->length + more > packet->room) {
        Py_ssize_t room = (packet->length + more) * 2;
        char *bytes = PyMem_Realloc(packet->bytes, room);
        if (bytes == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
        packet->bytes = bytes;
        packet->room = room;
    }
    char *at = packet->bytes + packet->length;
    packet->length += more;
    return at;
}

static int put_big_endian(Packet *packet, unsigned char tag, unsigned long long value, int bytes)
{
    char *at = make_room(packet, 1 + bytes);
    if (at == NULL)
        return -1;
    *at++ = (char)tag;
    for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8)
        *at++ = (char)(value >> shift);
    return 0;
}

static int put_byte(Packet *packet, unsigned char byte) { return put_big_endian(packet, byte, 0, 0); }

static int put_int(Packet *packet, long long value)
{
    if (value >= 0 && value < 128)
        return put_byte(packet, (unsigned char)value);
    if (value < 0)
        return put_big_endian(packet, 0xd3, (unsigned long long)value, 8);
    if (value <= 0xffff)
        return put_big_endian(packet, 0xcd, (unsigned long long)value, 2);
    if (value <= 0xffffffffLL)
        return put_big_endian(packet, 0xce, (unsigned long long)value, 4);
    return put_big_endian(packet, 0xcf, (unsigned long long)value, 8);
}

static int put_array(Packet *packet, Py_ssize_t length)
{
    return length < 16 ? put_byte(packet, (unsigned char)(0x90 | length)) : put_big_endian(packet, 0xdc, length, 2);
}

static int put_raw(Packet *packet, const char *bytes, Py_ssize_t length)
{
    char *at = make_room(packet, length);
    if (at == NULL)
        return -1;
    memcpy(at, bytes, length);
    return 0;
}

static int put_int_object(Packet *packet, PyObject *object)
{
    long long value = PyLong_AsLongLong(object);
    return value == -1 && PyErr_Occurred() ? -1 : put_int(packet, value);
}

static int put_int_or_none(Packet *packet, PyObject *object)
{
    return ABSENT(object) ? put_byte(packet, 0xc0) : put_int_object(packet, object);
}

/* A text of bounded length; another, or what is none, as `text` makes one of it. */
static int put_text(Packet *packet, PyObject *object, PyObject *text)
{
    if (PyUnicode_CheckExact(object) && PyUnicode_GET_LENGTH(object) <= MAX_NAME) {
        Py_ssize_t length;
        const char *bytes = PyUnicode_AsUTF8AndSize(object, &length);
        if (bytes != NULL) {
            int put = length < 32    ? put_byte(packet, (unsigned char)(0xa0 | length))
                      : length < 256 ? put_big_endian(packet, 0xd9, length, 1)
                                     : put_big_endian(packet, 0xda, length, 2);
            return put < 0 ? -1 : put_raw(packet, bytes, length);
        }
        PyErr_Clear(); /* half of a surrogate pair */
    }
    if (text == NULL) {
        PyErr_SetString(PyExc_ValueError, "a text that can't be sent");
        return -1;
    }
    PyObject *made = PyObject_CallOneArg(text, object);
    int put = made == NULL ? -1 : put_text(packet, made, NULL);
    Py_XDECREF(made);
    return put;
}

static int put_bytes(Packet *packet, PyObject *object)
{
    char *bytes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(object, &bytes, &length) < 0)
        return -1;
    if (length > 255) {
        PyErr_SetString(PyExc_ValueError, "an id that is too long");
        return -1;
    }
    return put_big_endian(packet, 0xc4, length, 1) < 0 ? -1 : put_raw(packet, bytes, length);
}

/* The type of an error by its name. */
static int put_error(Packet *packet, PyObject *error, PyObject *text)
{
    if (ABSENT(error))
        return put_byte(packet, 0xc0);
    PyObject *name = PyObject_GetAttr(error, str_qualname);
    int put = name == NULL ? -1 : put_text(packet, name, text);
    Py_XDECREF(name);
    return put;
}

/* Whatever is seldom there, as the encoder for all things encodes it; nil for what is empty. */
static int put_other(Packet *packet, PyObject *object, PyObject *encode)
{
    int there = ABSENT(object) ? 0 : PyObject_IsTrue(object);
    if (there < 1)
        return there < 0 ? -1 : put_byte(packet, 0xc0);
    PyObject *encoded = PyObject_CallOneArg(encode, object);
    char *bytes;
    Py_ssize_t length;
    int put = encoded == NULL || PyBytes_AsStringAndSize(encoded, &bytes, &length) < 0
                  ? -1
                  : put_raw(packet, bytes, length);
    Py_XDECREF(encoded);
    return put;
}

static PyObject *str_device_index, *str_stream_id;

static int put_attribute(Packet *packet, PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    int put = value == NULL ? -1 : put_int_object(packet, value);
    Py_XDECREF(value);
    return put;
}

static int put_stage(Packet *packet, PyObject *object, PyObject *text, PyObject *encode)
{
    if (!PyObject_TypeCheck(object, &StageRecord_Type)) {
        PyErr_SetString(PyExc_TypeError, "not a stage");
        return -1;
    }
    StageRecord *stage = (StageRecord *)object;
    long long host_ns = stage->exited_ns - stage->entered_ns;
    return put_array(packet, 10) < 0 || put_text(packet, stage->name, text) < 0 || put_byte(packet, 0xff) < 0 ||
                   put_int(packet, stage->entered_ns) < 0 || put_int(packet, stage->exited_ns) < 0 ||
                   put_int_or_none(packet, stage->device_ns) < 0 ||
                   (ABSENT(stage->duration_ns) ? put_int(packet, host_ns)
                                               : put_int_object(packet, stage->duration_ns)) < 0 ||
                   put_attribute(packet, stage->stream, str_device_index) < 0 ||
                   put_attribute(packet, stage->stream, str_stream_id) < 0 ||
                   put_error(packet, stage->error, text) < 0 || put_other(packet, stage->attributes, encode) < 0
               ? -1
               : 0;
}

/* Ids as they are in a tuple, before the flag that says whether they are kept; absent ones as empty bytes. */
static int put_ids(Packet *packet, PyObject *ids)
{
    if (ABSENT(ids))
        return put_raw(packet, "\xc4\0\xc4\0\xc4\0", 6);
    if (!PyTuple_Check(ids) || PyTuple_GET_SIZE(ids) != 4) {
        PyErr_SetString(PyExc_TypeError, "not ids");
        return -1;
    }
    for (int index = 0; index < 3; index++)
        if (put_bytes(packet, PyTuple_GET_ITEM(ids, index)) < 0)
            return -1;
    return 0;
}

static int put_rank(Packet *packet, PyObject *rank)
{
    if (rank == NULL || !PyTuple_Check(rank) || PyTuple_GET_SIZE(rank) != 2) {
        PyErr_SetString(PyExc_TypeError, "not a rank");
        return -1;
    }
    return put_int_object(packet, PyTuple_GET_ITEM(rank, 0)) < 0
               ? -1
               : put_byte(packet, PyTuple_GET_ITEM(rank, 1) == Py_True ? 0xc3 : 0xc2);
}

/* The spans that a step is linked to: worked out in Python, where there are any. */
static int put_links(Packet *packet, StepRecord *step, PyObject *links_of, PyObject *encode)
{
    int any = ABSENT(step->requests) || ABSENT(step->ids) ? 0 : PyObject_IsTrue(step->requests);
    if (any < 1)
        return any < 0 ? -1 : put_array(packet, 0);
    PyObject *links = PyObject_CallOneArg(links_of, (PyObject *)step);
    int put = links == NULL             ? -1
              : PyList_Check(links) && !PyList_GET_SIZE(links) ? put_array(packet, 0)
                                                               : put_other(packet, links, encode);
    Py_XDECREF(links);
    return put;
}

static int put_step(Packet *packet, StepRecord *step, long long seen_ns, PyObject *dropped, PyObject *text,
                    PyObject *encode, PyObject *links_of)
{
    if (put_big_endian(packet, 0xdc, 18, 2) < 0 || put_raw(packet, "\xa4step", 5) < 0 ||
        put_ids(packet, step->ids) < 0 || put_byte(packet, step->bare ? 0xc3 : 0xc2) < 0 ||
        put_rank(packet, step->rank) < 0 || put_int_object(packet, step->number) < 0 ||
        put_text(packet, step->kind, text) < 0 || put_int_object(packet, step->opened_ns) < 0 ||
        put_int(packet, step->closed_ns) < 0 || put_int(packet, seen_ns) < 0 ||
        put_error(packet, step->error, text) < 0 || put_other(packet, step->attributes, encode) < 0 ||
        put_links(packet, step, links_of, encode) < 0)
        return -1;
    int dropped_some = dropped == NULL ? 0 : PyObject_IsTrue(dropped);
    if (dropped_some < 0 || (dropped_some ? put_other(packet, dropped, encode) : put_byte(packet, 0x80)) < 0)
        return -1;
    PyObject *stages = step->stages;
    Py_ssize_t count = PyList_GET_SIZE(stages);
    if (put_array(packet, count) < 0)
        return -1;
    for (Py_ssize_t index = 0; index < count; index++) {
        if (index >= PyList_GET_SIZE(stages)) {
            PyErr_SetString(PyExc_RuntimeError, "a step has lost stages while it was packed");
            return -1;
        }
        PyObject *stage = PyList_GET_ITEM(stages, index);
        Py_INCREF(stage);
        int put = put_stage(packet, stage, text, encode);
        Py_DECREF(stage);
        if (put < 0)
            return -1;
    }
    int kept = !ABSENT(step->ids) && PyTuple_GET_ITEM(step->ids, 3) == Py_True;
    return put_byte(packet, kept ? 0xc3 : 0xc2);
}

static PyObject *pack(PyObject *module, PyObject *args)
{
    PyObject *steps, *dropped, *text, *encode, *links_of;
    long long seen_ns;
    if (!PyArg_ParseTuple(args, "O!LOOOO", &PyList_Type, &steps, &seen_ns, &dropped, &text, &encode, &links_of))
        return NULL;
    Packet packet = {NULL, 0, 0};
    PyObject *packed = NULL;
    Py_ssize_t count = PyList_GET_SIZE(steps);
    if (put_array(&packet, 2) < 0 || put_raw(&packet, "\xa5steps", 6) < 0 || put_array(&packet, count) < 0)
        goto done;
    for (Py_ssize_t index = 0; index < count && index < PyList_GET_SIZE(steps); index++) {
        PyObject *step = PyList_GET_ITEM(steps, index);
        if (!PyObject_TypeCheck(step, &StepRecord_Type)) {
            PyErr_SetString(PyExc_TypeError, "not a step");
            goto done;
        }
        if (put_step(&packet, (StepRecord *)step, seen_ns, index ? NULL : dropped, text, encode, links_of) < 0)
            goto done;
    }
    packed = PyBytes_FromStringAndSize(packet.bytes, packet.length);
done:
    PyMem_Free(packet.bytes);
    return packed;
}

/* Reading: an NPU's events by their raw handles, as `devices/npu.py` says. */

typedef int (*Elapsed)(float *, void *, void *);
typedef int (*Timestamp)(void *, unsigned long long *);

static PyObject *read_events(PyObject *module, PyObject *args)
{
    PyObject *elapsed_address, *timestamp_address, *pairs, *handles_of;
    if (!PyArg_ParseTuple(args, "OOO!O", &elapsed_address, &timestamp_address, &PyList_Type, &pairs, &handles_of))
        return NULL;
    Elapsed elapsed = (Elapsed)PyLong_AsVoidPtr(elapsed_address);
    Timestamp timestamp = (Timestamp)PyLong_AsVoidPtr(timestamp_address);
    if (PyErr_Occurred())
        return NULL;
    PyObject *times = PyList_New(0);
    void *anchor = NULL;
    unsigned long long anchor_us = 0;
    for (Py_ssize_t index = 0; times != NULL && index < PyList_GET_SIZE(pairs); index++) {
        PyObject *pair = PyList_GET_ITEM(pairs, index);
        PyObject *handles = PyObject_GetAttr(pair, str_handles);
        if (handles == Py_None) {
            Py_DECREF(handles);
            handles = PyObject_CallOneArg(handles_of, pair);
        }
        if (handles == NULL || !PyTuple_Check(handles) || PyTuple_GET_SIZE(handles) != 2) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_TypeError, "an event pair has two handles");
            Py_XDECREF(handles);
            Py_CLEAR(times);
            break;
        }
        void *start = PyLong_AsVoidPtr(PyTuple_GET_ITEM(handles, 0));
        void *end = PyLong_AsVoidPtr(PyTuple_GET_ITEM(handles, 1));
        Py_DECREF(handles);
        float until_start = 0, length = 0;
        const char *failed = "aclrtEventGetTimestamp";
        int error = PyErr_Occurred() ? -1 : 0;
        if (!error && anchor == NULL) {
            anchor = start;
            error = timestamp(anchor, &anchor_us);
        }
        if (!error) {
            failed = "aclrtEventElapsedTime";
            error = elapsed(&until_start, anchor, start);
            if (!error)
                error = elapsed(&length, start, end);
        }
        if (error) {
            if (!PyErr_Occurred()) {
                PyObject *arguments = Py_BuildValue("iN", error, PyUnicode_FromFormat("%s failed", failed));
                if (arguments != NULL)
                    PyErr_SetObject(PyExc_OSError, arguments);
                Py_XDECREF(arguments);
            }
            Py_CLEAR(times);
            break;
        }
        PyObject *time = Py_BuildValue(
            "LL", (long long)anchor_us * 1000 + llrint((double)until_start * 1e6), llrint((double)length * 1e6));
        if (time == NULL || PyList_Append(times, time) < 0)
            Py_CLEAR(times);
        Py_XDECREF(time);
    }
    return times;
}

static PyObject *use(PyObject *module, PyObject *variable)
{
    if (!PyContextVar_CheckExact(variable)) {
        PyErr_SetString(PyExc_TypeError, "not a context variable");
        return NULL;
    }
    Py_INCREF(variable);
    GIVE(open_step, variable);
    Py_RETURN_NONE;
}

static PyObject *use_clock(PyObject *module, PyObject *clock)
{
    if (clock == Py_None)
        Py_CLEAR(test_clock);
    else {
        Py_INCREF(clock);
        GIVE(test_clock, clock);
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"new_stage", (PyCFunction)(void (*)(void))new_stage, METH_FASTCALL, "A stage to be entered."},
    {"pack", pack, METH_VARARGS, "Steps as one packet."},
    {"read_events", read_events, METH_VARARGS, "Start and duration of finished event pairs, in nanoseconds."},
    {"use", use, METH_O, "Where the open step is."},
    {"use_clock", use_clock, METH_O, "A clock in the place of the host's, for tests; None for the host's."},
    {NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "otel_npu._native",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__native(void)
{
    static const struct { PyObject **name; const char *text; } names[] = {
        {&str_again, "_enter_again"}, {&str_another_pair, "_another_pair"}, {&str_capture_check, "_capture_check"},
        {&str_close, "close"}, {&str_current_stream_key, "current_stream_key"}, {&str_device_index, "device_index"},
        {&str_free, "free"}, {&str_handle, "handle"}, {&str_handles, "handles"}, {&str_not_entered, "_not_entered"},
        {&str_not_exited, "_not_exited"}, {&str_qualname, "__qualname__"}, {&str_record_end, "record_end"},
        {&str_record_start, "record_start"}, {&str_side, "side"}, {&str_step, "_step"}, {&str_stream, "stream"},
        {&str_stream_id, "stream_id"}, {&str_streams, "streams"}, {&str_timed, "timed"}, {&str_too_many, "_too_many"},
    };
    for (size_t index = 0; index < sizeof names / sizeof *names; index++)
        if ((*names[index].name = PyUnicode_InternFromString(names[index].text)) == NULL)
            return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL || PyType_Ready(&StepRecord_Type) < 0 || PyType_Ready(&StageRecord_Type) < 0 ||
        PyModule_AddObjectRef(module, "StepRecord", (PyObject *)&StepRecord_Type) < 0 ||
        PyModule_AddObjectRef(module, "StageRecord", (PyObject *)&StageRecord_Type) < 0) {
        Py_XDECREF(module);
        return NULL;
    }
    return module;
}

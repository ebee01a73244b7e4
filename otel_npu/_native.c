/* The ways in and out of a step and a stage, the reading of finished events, the packing of steps, and what goes round vLLM's
   functions in a usual step, without an interpreter.

   Between two steps a server runs millions of instructions, so whatever a step touches is out of the caches: what costs
   is how much of it there is. What is written here is what `capture/plain.py` says, which is used where this is not built; what
   happens seldom stands in Python alone, in `capture/steps.py` and `capture/stages.py`, and is called from both. Of vLLM's hooks
   the usual step is here, and all of it in `vllm/worker.py` and `vllm/engine.py`. Nothing here gives the GIL away, and
   no signal handler runs between two lines of it. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <structmember.h>
#include <time.h>

#define MAX_STAGES 1024
#define MAX_NAME 256

static PyObject *open_step; /* the context variable of `context.py` */
static PyTypeObject *Ids;   /* the named tuple of `context.py` */
static PyObject *no_rank;   /* of `context.py` */
static PyObject *append;    /* `deque.append` */
static PyObject *host_stream; /* of `devices/cpu.py` */
static long long batch_ns, max_pending; /* of `plain.py` */
static PyObject *test_clock; /* a clock in the place of the host's, for tests */
#define NAMES(X) \
    X(again, "_enter_again") X(allow, "allow") X(another_pair, "_another_pair") \
    X(capture_check, "_capture_check") X(choose, "_choose") X(close, "close") \
    X(device_index, "device_index") X(drafts, "scheduled_spec_decode_tokens") X(dues, "dues") \
    X(finish_reason, "finish_reason") X(finished, "finished_req_ids") X(new_requests, "scheduled_new_reqs") \
    X(new_tokens, "new_token_ids") X(outputs, "outputs") X(preempted, "preempted_req_ids") \
    X(request_id, "request_id") X(scheduled_tokens, "num_scheduled_tokens") X(send_deferred, "send_deferred") \
    X(total_tokens, "total_num_scheduled_tokens") \
    X(find_place, "_find_place") X(forward_context, "_forward_context") X(forward_module, "vllm.forward_context") \
    X(free, "free") X(graph_mode, "cudagraph_runtime_mode") X(handle, "handle") X(handles, "handles") \
    X(interval_ns, "interval_ns") X(let_go, "let_go") \
    X(not_entered, "_not_entered") X(not_exited, "_not_exited") X(not_opened, "_not_opened") X(open, "open") \
    X(open_again, "_open_again") \
    X(opentelemetry, "opentelemetry.trace") X(qualname, "__qualname__") X(record_end, "record_end") \
    X(record_start, "record_start") X(side, "side") X(slack_ns, "slack_ns") X(step, "_step") \
    X(recorder, "_recorder") X(step_closed, "step_closed") X(stream, "stream") X(stream_id, "stream_id") X(thread, "thread") X(timed, "timed") \
    X(too_many, "_too_many")
#define DECLARE(name, text) static PyObject *str_##name;
NAMES(DECLARE)

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
    PyObject *current_stream_key, *limiter, *local, *step_numbers, *streams;
    long long batch;
    unsigned long long serial; /* which one it is, of all that ever were */
    char device_is_open_question, root_traces, running;
} CaptureRecord;

typedef struct {
    PyObject_HEAD
    PyObject *lock, *open, *pending, *thread;
    long long waiting, waiting_since_ns;
    char busy;
} ThreadRecord;

typedef struct {
    PyObject_HEAD
    PyObject *attributes, *capture, *error, *ids, *kind, *outer, *rank, *requests, *stages, *thread;
    long long closed_ns, number, opened_ns;
    char bare, hang_reported;
    char chosen, kept;            /* whether its ids are these, and nobody has asked for `ids` yet */
    unsigned char trace_length, parent_length;
    unsigned char new_ids[16 + 8 + 8]; /* the trace's, its own, its parent's */
} StepRecord;

typedef struct {
    PyObject_HEAD
    PyObject *attributes, *capture, *device_ns, *duration_ns, *error, *name, *pair, *step, *stream;
    long long entered_ns, exited_ns;
    char host;
} StageRecord;

typedef struct {
    PyObject_HEAD
    PyObject *step;
} Handle;

static PyTypeObject CaptureRecord_Type, Handle_Type, StageRecord_Type, StepRecord_Type, ThreadRecord_Type;

#define VISIT_CAPTURE(X) X(current_stream_key) X(limiter) X(local) X(step_numbers) X(streams)
#define VISIT_THREAD(X) X(lock) X(open) X(pending) X(thread)
#define VISIT_STEP(X) \
    X(attributes) X(capture) X(error) X(ids) X(kind) X(outer) X(rank) X(requests) X(stages) X(thread)
#define VISIT_STAGE(X) \
    X(attributes) X(capture) X(device_ns) X(duration_ns) X(error) X(name) X(pair) X(step) X(stream)
#define VISIT(field) Py_VISIT(self->field);
#define CLEAR(field) Py_CLEAR(self->field);

/* How the garbage collector goes through a record, and how it is let go. */
#define RECORD(Record, record, FIELDS) \
    static int record##_traverse(Record *self, visitproc visit, void *arg) \
    { \
        FIELDS(VISIT) \
        return 0; \
    } \
    static int record##_clear(Record *self) \
    { \
        FIELDS(CLEAR) \
        return 0; \
    } \
    static void record##_dealloc(Record *self) \
    { \
        PyObject_GC_UnTrack(self); \
        record##_clear(self); \
        Py_TYPE(self)->tp_free((PyObject *)self); \
    }

RECORD(CaptureRecord, capture, VISIT_CAPTURE)
RECORD(ThreadRecord, thread, VISIT_THREAD)
RECORD(StepRecord, step, VISIT_STEP)
RECORD(StageRecord, stage, VISIT_STAGE)

static PyObject *capture_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static unsigned long long captures;
    CaptureRecord *self = (CaptureRecord *)type->tp_alloc(type, 0);
    if (self != NULL)
        self->serial = ++captures;
    return (PyObject *)self;
}

static PyMemberDef capture_members[] = {
#define MEMBER(field) {#field, T_OBJECT_EX, offsetof(CaptureRecord, field), 0, NULL},
    VISIT_CAPTURE(MEMBER)
#undef MEMBER
    {"batch", T_LONGLONG, offsetof(CaptureRecord, batch), 0, NULL},
    {"device_is_open_question", T_BOOL, offsetof(CaptureRecord, device_is_open_question), 0, NULL},
    {"root_traces", T_BOOL, offsetof(CaptureRecord, root_traces), 0, NULL},
    {"running", T_BOOL, offsetof(CaptureRecord, running), 0, NULL},
    {NULL},
};

static PyMemberDef thread_members[] = {
#define MEMBER(field) {#field, T_OBJECT_EX, offsetof(ThreadRecord, field), 0, NULL},
    VISIT_THREAD(MEMBER)
#undef MEMBER
    {"waiting", T_LONGLONG, offsetof(ThreadRecord, waiting), 0, NULL},
    {"waiting_since_ns", T_LONGLONG, offsetof(ThreadRecord, waiting_since_ns), 0, NULL},
    {"busy", T_BOOL, offsetof(ThreadRecord, busy), 0, NULL},
    {NULL},
};

static PyMemberDef step_members[] = {
#define MEMBER(field) {#field, T_OBJECT_EX, offsetof(StepRecord, field), 0, NULL},
    MEMBER(attributes) MEMBER(error) MEMBER(kind) MEMBER(outer) MEMBER(rank) MEMBER(requests) MEMBER(stages)
    MEMBER(thread)
#undef MEMBER
    {"capture", T_OBJECT_EX, offsetof(StepRecord, capture), READONLY, NULL},
    {"closed_ns", T_LONGLONG, offsetof(StepRecord, closed_ns), 0, NULL},
    {"number", T_LONGLONG, offsetof(StepRecord, number), 0, NULL},
    {"opened_ns", T_LONGLONG, offsetof(StepRecord, opened_ns), 0, NULL},
    {"bare", T_BOOL, offsetof(StepRecord, bare), 0, NULL},
    {"hang_reported", T_BOOL, offsetof(StepRecord, hang_reported), 0, NULL},
    {NULL},
};

static PyMemberDef stage_members[] = {
#define MEMBER(field) {#field, T_OBJECT_EX, offsetof(StageRecord, field), 0, NULL},
    MEMBER(attributes) MEMBER(error) MEMBER(name) MEMBER(pair) MEMBER(step) MEMBER(stream)
#undef MEMBER
    {"device_ns", T_OBJECT, offsetof(StageRecord, device_ns), 0, NULL},
    {"duration_ns", T_OBJECT, offsetof(StageRecord, duration_ns), 0, NULL},
    {"capture", T_OBJECT_EX, offsetof(StageRecord, capture), READONLY, NULL},
    {"entered_ns", T_LONGLONG, offsetof(StageRecord, entered_ns), 0, NULL},
    {"exited_ns", T_LONGLONG, offsetof(StageRecord, exited_ns), 0, NULL},
    {"host", T_BOOL, offsetof(StageRecord, host), 0, NULL},
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

/* What has become of an error: raised again if what was made of it says that it goes on. Takes both over. */
static int settle(PyObject *goes_on, PyObject *error)
{
    int raise = goes_on == NULL ? -1 : PyObject_IsTrue(goes_on);
    Py_XDECREF(goes_on);
    if (raise < 1) {
        Py_DECREF(error);
        return raise;
    }
    PyObject *type = (PyObject *)Py_TYPE(error);
    Py_INCREF(type);
    PyErr_Restore(type, error, PyException_GetTraceback(error));
    return -1;
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

/* Random numbers for ids, not to be guessed from a model's seed: xoshiro256**, by Blackman and Vigna. */

static unsigned long long random_state[4];

static unsigned long long next_random(void)
{
    unsigned long long *s = random_state, result = s[1] * 5, shifted = s[1] << 17;
    result = ((result << 7) | (result >> 57)) * 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= shifted;
    s[3] = (s[3] << 45) | (s[3] >> 19);
    return result;
}

static PyObject *random_bytes(PyObject *module, PyObject *count)
{
    Py_ssize_t length = PyLong_AsSsize_t(count);
    if (length == -1 && PyErr_Occurred())
        return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, length);
    for (Py_ssize_t at = 0; bytes != NULL && at < length; at += 8) {
        unsigned long long value = next_random();
        memcpy(PyBytes_AS_STRING(bytes) + at, &value, length - at < 8 ? length - at : 8);
    }
    return bytes;
}

static PyObject *seed(PyObject *module, PyObject *bytes)
{
    if (!PyBytes_Check(bytes) || PyBytes_GET_SIZE(bytes) != sizeof random_state) {
        PyErr_SetString(PyExc_ValueError, "a seed has 32 bytes");
        return NULL;
    }
    memcpy(random_state, PyBytes_AS_STRING(bytes), sizeof random_state);
    random_state[0] |= 1; /* never all zero */
    Py_RETURN_NONE;
}

/* Steps: see `capture/plain.py`. */

/* Whether a limiter lets a step of this kind pass: `Limiter.allow`, without being called. -1 with an error. */
static int allow(PyObject *limiter, PyObject *kind)
{
    PyObject *allowed = NULL, *dues = PyObject_GetAttr(limiter, str_dues);
    PyObject *interval = dues == NULL ? NULL : PyObject_GetAttr(limiter, str_interval_ns);
    PyObject *slack = interval == NULL ? NULL : PyObject_GetAttr(limiter, str_slack_ns);
    PyObject *due = slack == NULL ? NULL : PyDict_GetItemWithError(dues, kind);
    int is = -1;
    if (due == NULL) {
        if (slack != NULL && !PyErr_Occurred() && (allowed = PyObject_CallMethodOneArg(limiter, str_allow, kind)))
            is = PyObject_IsTrue(allowed);
    } else {
        long long now, due_ns = PyLong_AsLongLong(due), interval_ns = PyLong_AsLongLong(interval),
                       slack_ns = PyLong_AsLongLong(slack);
        if (!PyErr_Occurred() && now_ns(&now) == 0) {
            is = due_ns - now <= slack_ns;
            if (is) {
                PyObject *next = PyLong_FromLongLong((due_ns > now ? due_ns : now) + interval_ns);
                if (next == NULL || PyDict_SetItem(dues, kind, next) < 0)
                    is = -1;
                Py_XDECREF(next);
            }
        }
    }
    Py_XDECREF(allowed);
    Py_XDECREF(dues);
    Py_XDECREF(interval);
    Py_XDECREF(slack);
    return is;
}

/* Ids of a step that lies in nothing; by way of Python where there may be a span of the program's. */
static int choose(StepRecord *step)
{
    CaptureRecord *capture = (CaptureRecord *)step->capture;
    PyObject *modules = PyImport_GetModuleDict(); /* borrowed */
    if (!ABSENT(step->outer) || !capture->root_traces || PyDict_Contains(modules, str_opentelemetry) != 0) {
        PyObject *ids = PyErr_Occurred() ? NULL : PyObject_CallMethodNoArgs((PyObject *)step, str_choose);
        if (ids == NULL)
            return -1;
        GIVE(step->ids, ids);
        return 0;
    }
    int kept = allow(capture->limiter, step->kind);
    if (kept < 0)
        return -1;
    unsigned long long bytes[3] = {next_random(), next_random(), next_random()};
    memcpy(step->new_ids, bytes, sizeof bytes);
    step->trace_length = 16;
    step->parent_length = 0;
    step->kept = (char)kept;
    step->chosen = 1;
    return 0;
}

/* The ids as a tuple, made when somebody asks. */
static PyObject *step_get_ids(StepRecord *self, void *closure)
{
    if (self->chosen) {
        PyObject *fields =
            Py_BuildValue("((y#y#y#O))", self->new_ids, (Py_ssize_t)self->trace_length, self->new_ids + 16,
                          (Py_ssize_t)8, self->new_ids + 24, (Py_ssize_t)self->parent_length,
                          self->kept ? Py_True : Py_False);
        PyObject *ids = fields == NULL ? NULL : PyTuple_Type.tp_new(Ids, fields, NULL);
        Py_XDECREF(fields);
        if (ids == NULL)
            return NULL;
        self->chosen = 0;
        GIVE(self->ids, ids);
    }
    PyObject *ids = self->ids == NULL ? Py_None : self->ids;
    return Py_NewRef(ids);
}

static int step_set_ids(StepRecord *self, PyObject *ids, void *closure)
{
    self->chosen = 0;
    Py_XINCREF(ids);
    GIVE(self->ids, ids);
    return 0;
}

static PyGetSetDef step_attributes[] = {
    {"ids", (getter)step_get_ids, (setter)step_set_ids, NULL, NULL},
    {NULL},
};

/* Where the step lies; 0 if it is left out. By way of Python where it lies in another, or where the device is open. */
static int find_place(StepRecord *self)
{
    PyObject *around;
    if (PyContextVar_Get(open_step, NULL, &around) < 0)
        return -1;
    int simple = around == Py_None;
    GIVE(self->outer, around);
    if (!simple || ((CaptureRecord *)self->capture)->device_is_open_question) {
        PyObject *place = PyObject_CallMethodNoArgs((PyObject *)self, str_find_place);
        int found = place == NULL ? -1 : PyObject_IsTrue(place);
        Py_XDECREF(place);
        return found;
    }
    return 1;
}

static int set_open(PyObject *step)
{
    PyObject *token = PyContextVar_Set(open_step, step == NULL ? Py_None : step);
    Py_XDECREF(token);
    return token == NULL ? -1 : 0;
}

/* Puts the step among its thread's open ones, or takes it out. */
static int list_open(StepRecord *self, int open)
{
    PyObject *key = PyLong_FromVoidPtr(self), *steps = ((ThreadRecord *)self->thread)->open;
    int failed = key == NULL || (open ? PyDict_SetItem(steps, key, (PyObject *)self) : PyDict_DelItem(steps, key)) < 0;
    Py_XDECREF(key);
    if (failed && !open && PyErr_ExceptionMatches(PyExc_KeyError)) {
        PyErr_Clear();
        return 0;
    }
    return failed ? -1 : 0;
}

/* The calling thread's record: what `capture.local.thread` gives, and who was asked last is remembered. As long as a
   thread runs and its capture is there, so is the record. A new reference; NULL with an error. */
static PyObject *find_thread(CaptureRecord *capture)
{
    static __thread unsigned long long last;
    static __thread PyObject *thread;
    if (last == capture->serial)
        return Py_NewRef(thread);
    PyObject *found = PyObject_GetAttr(capture->local, str_thread);
    if (found != NULL && !PyObject_TypeCheck(found, &ThreadRecord_Type)) {
        PyErr_SetString(PyExc_TypeError, "not a thread");
        Py_CLEAR(found);
    }
    if (found != NULL) {
        last = capture->serial;
        thread = found;
    }
    return found;
}

static int begin_step(StepRecord *self)
{
    CaptureRecord *capture = (CaptureRecord *)self->capture;
    int place = find_place(self);
    if (place < 1)
        return place;
    PyObject *thread = find_thread(capture);
    if (thread == NULL)
        return -1;
    GIVE(self->thread, thread);
    if (!self->number) {
        PyObject *number = PyIter_Next(capture->step_numbers);
        if (number == NULL)
            return -1;
        self->number = PyLong_AsLongLong(number);
        Py_DECREF(number);
    }
    if (!self->chosen && ABSENT(self->ids) && choose(self) < 0)
        return -1;
    if (now_ns(&self->opened_ns) < 0)
        return -1;
    self->closed_ns = 0;
    return list_open(self, 1) < 0 ? -1 : set_open((PyObject *)self);
}

static PyObject *step_open(StepRecord *self, PyObject *Py_UNUSED(nothing))
{
    if (self->closed_ns != -1) {
        PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self, str_open_again);
        Py_XDECREF(done);
        return done == NULL ? NULL : Py_NewRef((PyObject *)self);
    }
    if (begin_step(self) < 0) {
        PyObject *error = take_error();
        if (settle(PyObject_CallMethodOneArg((PyObject *)self, str_not_opened, error), error) < 0)
            return NULL;
    }
    return Py_NewRef((PyObject *)self);
}

static int close_step(StepRecord *self, PyObject *error)
{
    ThreadRecord *thread = (ThreadRecord *)self->thread;
    long long closed_ns;
    if (now_ns(&closed_ns) < 0)
        return -1;
    Py_INCREF(error);
    GIVE(self->error, error);
    self->closed_ns = closed_ns;
    PyObject *current;
    if (PyContextVar_Get(open_step, NULL, &current) < 0)
        return -1;
    int is_current = current == (PyObject *)self;
    Py_DECREF(current);
    if (is_current && set_open(self->outer) < 0)
        return -1;
    PyObject *arguments[] = {thread->pending, (PyObject *)self};
    PyObject *appended = PyObject_Vectorcall(append, arguments, 2, NULL);
    Py_XDECREF(appended);
    if (appended == NULL || list_open(self, 0) < 0)
        return -1;
    /* What `Recorder.step_closed` does when nothing is due. */
    thread->waiting += 1 + PyList_GET_SIZE(self->stages);
    CaptureRecord *capture = (CaptureRecord *)self->capture;
    if (capture->running && thread->waiting < capture->batch) {
        Py_ssize_t pending = PyObject_Length(thread->pending);
        if (pending == 1)
            thread->waiting_since_ns = closed_ns;
        if (pending < 0)
            return -1;
        if (pending <= max_pending && closed_ns - thread->waiting_since_ns <= batch_ns)
            return 0;
    }
    PyObject *closed = PyLong_FromLongLong(closed_ns), *done = NULL;
    if (closed != NULL)
        done = PyObject_CallMethodObjArgs(self->capture, str_step_closed, (PyObject *)thread, closed, NULL);
    Py_XDECREF(closed);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static PyObject *step_close(StepRecord *self, PyObject *const *args, Py_ssize_t count)
{
    if (count > 1) {
        PyErr_SetString(PyExc_TypeError, "close() takes the type of an error");
        return NULL;
    }
    if (self->closed_ns == 0) {
        Py_INCREF(self);
        int failed = close_step(self, count ? args[0] : Py_None);
        Py_DECREF(self);
        if (failed < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef step_methods[] = {
    {"open", (PyCFunction)step_open, METH_NOARGS, "Begin the step on the calling thread."},
    {"close", (PyCFunction)(void (*)(void))step_close, METH_FASTCALL, "End the step: it waits for the device now."},
    {NULL},
};

/* A step in the program's hands. */

static PyObject *handle_open(Handle *self, PyObject *Py_UNUSED(nothing))
{
    PyObject *opened = PyObject_CallMethodNoArgs(self->step, str_open);
    Py_XDECREF(opened);
    return opened == NULL ? NULL : Py_NewRef((PyObject *)self);
}

static PyObject *handle_enter(Handle *self, PyObject *Py_UNUSED(nothing))
{
    PyObject *opened = PyObject_CallMethodNoArgs(self->step, str_open);
    Py_XDECREF(opened);
    if (opened == NULL)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *handle_close(Handle *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"error", NULL};
    PyObject *error = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O", names, &error))
        return NULL;
    return PyObject_CallMethodOneArg(self->step, str_close, error);
}

static PyObject *handle_exit(Handle *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "__exit__() takes the type, the value and the traceback of an exception");
        return NULL;
    }
    return PyObject_CallMethodOneArg(self->step, str_close, args[0]);
}

static PyObject *handle_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *step;
    if (!PyArg_ParseTuple(args, "O!", &StepRecord_Type, &step))
        return NULL;
    Handle *handle = (Handle *)type->tp_alloc(type, 0);
    if (handle != NULL) {
        Py_INCREF(step);
        handle->step = step;
    }
    return (PyObject *)handle;
}

static void handle_dealloc(Handle *self)
{
    StepRecord *step = (StepRecord *)self->step;
    if (step != NULL && step->closed_ns == 0) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        PyObject *done = PyObject_CallMethodNoArgs(self->step, str_let_go);
        if (done == NULL)
            PyErr_WriteUnraisable(self->step);
        Py_XDECREF(done);
        PyErr_Restore(type, value, traceback);
    }
    Py_XDECREF(self->step);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMemberDef handle_members[] = {
    {"step", T_OBJECT, offsetof(Handle, step), READONLY, NULL},
    {NULL},
};

static PyMethodDef handle_methods[] = {
    {"open", (PyCFunction)handle_open, METH_NOARGS, "Begin the step on the calling thread."},
    {"close", (PyCFunction)(void (*)(void))handle_close, METH_VARARGS | METH_KEYWORDS,
     "End the step. `error` is the type of what went wrong in it."},
    {"__enter__", (PyCFunction)handle_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))handle_exit, METH_FASTCALL, NULL},
    {NULL},
};

static PyTypeObject Handle_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "otel_npu._native.Handle",
    .tp_doc = "A step in the program's hands. Let go while it is open, it is closed.",
    .tp_basicsize = sizeof(Handle),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = handle_new,
    .tp_dealloc = (destructor)handle_dealloc,
    .tp_members = handle_members,
    .tp_methods = handle_methods,
};

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
static PyObject *find_stream(CaptureRecord *capture)
{
    PyObject *key = PyObject_CallNoArgs(capture->current_stream_key);
    PyObject *stream = key == NULL ? NULL : PyDict_GetItemWithError(capture->streams, key);
    Py_XINCREF(stream);
    Py_XDECREF(key);
    if (stream == NULL && !PyErr_Occurred())
        stream = PyObject_CallMethodNoArgs((PyObject *)capture, str_stream);
    return stream;
}

/* A free event pair of the stream, or None. A new reference; NULL with an error. */
static PyObject *find_pair(StageRecord *self, PyObject *step, PyObject *stream)
{
    PyObject *pair = NULL;
    int timed = stream == host_stream ? 0 : flag(stream, str_timed);
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
    PyObject *stream = self->host ? Py_NewRef(host_stream) : find_stream((CaptureRecord *)self->capture);
    int side = stream == NULL ? -1 : stream == host_stream ? 0 : flag(stream, str_side);
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
    if (failed) {
        PyObject *error = take_error(), *given = pair == NULL ? Py_None : pair;
        failed = settle(PyObject_CallMethodObjArgs((PyObject *)self, str_not_entered, given, error, NULL), error);
    }
    Py_XDECREF(pair);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
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
        PyObject *error = take_error(), *exited = PyLong_FromLongLong(exited_ns), *goes_on = NULL;
        if (exited != NULL)
            goes_on = PyObject_CallMethodObjArgs((PyObject *)self, str_not_exited, step, exited, error, NULL);
        Py_XDECREF(exited);
        if (settle(goes_on, error) == 0)
            result = Py_NewRef(Py_None);
    }
    Py_DECREF(step);
    return result;
}

static PyMethodDef stage_methods[] = {
    {"__enter__", (PyCFunction)stage_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))stage_exit, METH_FASTCALL, NULL},
    {NULL},
};

static PyTypeObject CaptureRecord_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "otel_npu._native.CaptureRecord",
    .tp_basicsize = sizeof(CaptureRecord),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = capture_new,
    .tp_dealloc = (destructor)capture_dealloc,
    .tp_traverse = (traverseproc)capture_traverse,
    .tp_clear = (inquiry)capture_clear,
    .tp_members = capture_members,
};

static PyTypeObject ThreadRecord_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "otel_npu._native.ThreadRecord",
    .tp_basicsize = sizeof(ThreadRecord),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)thread_dealloc,
    .tp_traverse = (traverseproc)thread_traverse,
    .tp_clear = (inquiry)thread_clear,
    .tp_members = thread_members,
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
    .tp_getset = step_attributes,
    .tp_methods = step_methods,
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

static int is_class(PyObject *object, PyTypeObject *of)
{
    return PyType_Check(object) && PyType_IsSubtype((PyTypeObject *)object, of);
}

static StepRecord *make_step(PyTypeObject *of, PyObject *capture, PyObject *kind, PyObject *requests, PyObject *attributes)
{
    StepRecord *step = (StepRecord *)of->tp_alloc(of, 0);
    if (step == NULL)
        return NULL;
    step->capture = Py_NewRef(capture);
    step->kind = Py_NewRef(kind);
    step->requests = Py_NewRef(requests);
    step->attributes = Py_NewRef(attributes);
    step->rank = Py_NewRef(no_rank);
    step->closed_ns = -1;
    step->error = Py_NewRef(Py_None);
    step->outer = Py_NewRef(Py_None);
    step->stages = PyList_New(0);
    if (step->stages == NULL)
        Py_CLEAR(step);
    return step;
}

static PyObject *new_step(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count < 5 || count > 8 || !is_class(args[0], &StepRecord_Type) ||
        !PyObject_TypeCheck(args[1], &CaptureRecord_Type)) {
        PyErr_SetString(PyExc_TypeError, "new_step() takes a class of steps, a capture, and what it says of the step");
        return NULL;
    }
    long long number = count > 7 ? PyLong_AsLongLong(args[7]) : 0;
    if (number == -1 && PyErr_Occurred())
        return NULL;
    StepRecord *step = make_step((PyTypeObject *)args[0], args[1], args[2], args[3], args[4]);
    if (step == NULL)
        return NULL;
    step->number = number;
    if (count > 5)
        step->ids = Py_NewRef(args[5]);
    if (count > 6)
        GIVE(step->rank, Py_NewRef(args[6]));
    return (PyObject *)step;
}

static PyObject *make_stage(PyTypeObject *of, PyObject *capture, PyObject *name, PyObject *attributes, int host)
{
    StageRecord *stage = (StageRecord *)of->tp_alloc(of, 0);
    if (stage == NULL)
        return NULL;
    stage->capture = Py_NewRef(capture);
    stage->name = Py_NewRef(name);
    stage->attributes = Py_NewRef(attributes);
    stage->step = Py_NewRef(Py_None);
    stage->host = (char)host;
    return (PyObject *)stage;
}

static PyObject *new_stage(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count < 4 || count > 5 || !is_class(args[0], &StageRecord_Type) ||
        !PyObject_TypeCheck(args[1], &CaptureRecord_Type)) {
        PyErr_SetString(PyExc_TypeError, "new_stage() takes a class of stages, a capture, a name and attributes");
        return NULL;
    }
    return make_stage((PyTypeObject *)args[0], args[1], args[2], args[3], count == 5 && args[4] == Py_True);
}

/* `stage()` and `step()` of `capture/switch.py`, as far as they are called with a name alone while tracing is on, or
   while it is off with a name that is known; else the function in Python is called. */

static struct {
    PyObject *globals, *off_stages, *no_requests;
    PyTypeObject *Stage, *Step;
    PyObject *stage, *step;
} front;

/* What captures, borrowed, or NULL. */
static PyObject *capturing(void)
{
    PyObject *recorder = PyDict_GetItemWithError(front.globals, str_recorder);
    return recorder != NULL && PyObject_TypeCheck(recorder, &CaptureRecord_Type) ? recorder : NULL;
}

static PyObject *front_stage(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    if (count == 1 && keywords == NULL && PyUnicode_CheckExact(args[0])) {
        PyObject *capture = capturing();
        if (capture != NULL) {
            PyObject *attributes = PyDict_New();
            PyObject *stage = attributes == NULL ? NULL : make_stage(front.Stage, capture, args[0], attributes, 0);
            Py_XDECREF(attributes);
            return stage;
        }
        PyObject *off = PyErr_Occurred() ? NULL : PyDict_GetItemWithError(front.off_stages, args[0]);
        if (off != NULL)
            return Py_NewRef(off);
        if (PyErr_Occurred())
            return NULL;
    }
    return PyObject_Vectorcall(front.stage, args, count, keywords);
}

static PyObject *front_step(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    PyObject *capture = count == 1 && keywords == NULL && PyUnicode_CheckExact(args[0]) ? capturing() : NULL;
    if (capture == NULL)
        return PyErr_Occurred() ? NULL : PyObject_Vectorcall(front.step, args, count, keywords);
    StepRecord *step = make_step(front.Step, capture, args[0], front.no_requests, Py_None);
    Handle *handle = step == NULL ? NULL : (Handle *)Handle_Type.tp_alloc(&Handle_Type, 0);
    if (handle == NULL)
        Py_XDECREF(step);
    else
        handle->step = (PyObject *)step;
    return (PyObject *)handle;
}

/* `scope()` of `vllm/worker.py`: where no step is open, and where a worker's is and the scope is known; else the function
   in Python is called. What is known is None for what is no stage, or a name, attributes, whether the host times it, and
   whether it is the forward, in a mode of which Python has told what to say. */

#define MODES 8

static struct {
    PyObject *scope, *known, *nothing, *without;
    struct {
        PyObject *mode, *attributes;
    } modes[MODES];
    int next_mode;
} scopes;

static PyObject *remember_mode(PyObject *module, PyObject *args)
{
    PyObject *mode, *attributes;
    if (!PyArg_ParseTuple(args, "OO", &mode, &attributes))
        return NULL;
    GIVE(scopes.modes[scopes.next_mode].mode, Py_NewRef(mode));
    GIVE(scopes.modes[scopes.next_mode].attributes, Py_NewRef(attributes));
    scopes.next_mode = (scopes.next_mode + 1) % MODES;
    Py_RETURN_NONE;
}

/* Say of a step in which mode its forward runs; whether that was done, or there is nothing to say. 0 with or without an
   error: what a signal handler raised goes on. */
static int note_mode(StepRecord *step)
{
    PyObject *module = PyDict_GetItemWithError(PyImport_GetModuleDict(), str_forward_module);
    if (module == NULL && !PyErr_Occurred())
        return 1;
    PyObject *context = module == NULL ? NULL : PyObject_GetAttr(module, str_forward_context);
    PyObject *mode = ABSENT(context) ? NULL : PyObject_GetAttr(context, str_graph_mode);
    int noted = context == Py_None;
    for (int at = 0; mode != NULL && at < MODES && !noted; at++)
        if (scopes.modes[at].mode == mode) {
            GIVE(step->attributes, Py_NewRef(scopes.modes[at].attributes));
            noted = 1;
        }
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Clear(); /* what is not there Python does not find either */
    Py_XDECREF(context);
    Py_XDECREF(mode);
    return noted;
}

static PyObject *front_scope(PyObject *module, PyObject *name)
{
    PyObject *found, *made = NULL, *known = NULL;
    if (PyContextVar_Get(open_step, NULL, &found) < 0)
        return NULL;
    if (found == Py_None)
        made = Py_NewRef(scopes.nothing);
    else if (PyUnicode_CheckExact(name) && PyObject_TypeCheck(found, &StepRecord_Type) &&
             (known = PyDict_GetItemWithError(scopes.known, name)) != NULL) {
        StepRecord *step = (StepRecord *)found;
        if (step->rank != no_rank && step->closed_ns == 0 && step->kind != scopes.without && capturing() == step->capture &&
            (known == Py_None || PyTuple_GET_ITEM(known, 3) != Py_True || note_mode(step)))
            made = known == Py_None ? Py_NewRef(scopes.nothing)
                                    : make_stage(front.Stage, step->capture, PyTuple_GET_ITEM(known, 0),
                                                 PyTuple_GET_ITEM(known, 1), PyTuple_GET_ITEM(known, 2) == Py_True);
    }
    if (made == NULL && !PyErr_Occurred())
        made = PyObject_CallOneArg(scopes.scope, name);
    Py_DECREF(found);
    return made;
}

static PyObject *scope_in_front(PyObject *module, PyObject *args)
{
    static PyMethodDef definition = {"scope", front_scope, METH_O, "The function in Python, for what is known."};
    PyObject *scope, *known, *nothing, *without, *raw, *of;
    Py_ssize_t at = 0;
    if (!PyArg_ParseTuple(args, "OO!OO", &scope, &PyDict_Type, &known, &nothing, &without))
        return NULL;
    while (PyDict_Next(known, &at, &raw, &of))
        if (of != Py_None && (!PyTuple_Check(of) || PyTuple_GET_SIZE(of) != 4)) {
            PyErr_SetString(PyExc_TypeError, "a scope is None, or a name, attributes and two flags");
            return NULL;
        }
    if (front.Stage == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "before there are stages");
        return NULL;
    }
    GIVE(scopes.scope, Py_NewRef(scope));
    GIVE(scopes.known, Py_NewRef(known));
    GIVE(scopes.nothing, Py_NewRef(nothing));
    GIVE(scopes.without, Py_NewRef(without));
    return PyCFunction_New(&definition, NULL);
}

/* vLLM's functions with ours round them, for the usual step; for any other what is in `vllm/worker.py` and `vllm/engine.py` is called.
   What runs round them in Python would be half a dozen functions at each step, all of them out of the caches. */

typedef struct {
    PyObject_HEAD
    PyObject *rank, *step, *told;
    char usual;
} WorkerRecord;

typedef struct {
    PyObject_HEAD
    PyObject *deferred;
    long long deferred_since_ns;
} ChannelRecord;

typedef struct {
    PyObject_HEAD
    PyObject *kind, *span_id, *tokens;
    long long repeated;
} ListedRecord;

typedef struct {
    PyObject_HEAD
    PyObject *channel, *frame, *limiter, *listed, *running, *slow, *step_numbers, *told, *unsent, *word;
} EngineRecord;

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *attributes, *inside, *otherwise, *after, *record;
} Around;

#define VISIT_WORKER(X) X(rank) X(step) X(told)
#define VISIT_CHANNEL(X) X(deferred)
#define VISIT_LISTED(X) X(kind) X(span_id) X(tokens)
#define VISIT_ENGINE(X) X(channel) X(frame) X(limiter) X(listed) X(running) X(slow) X(step_numbers) X(told) X(unsent) X(word)
#define VISIT_AROUND(X) X(attributes) X(inside) X(otherwise) X(after) X(record)

RECORD(WorkerRecord, worker, VISIT_WORKER)
RECORD(ChannelRecord, channel, VISIT_CHANNEL)
RECORD(ListedRecord, listed, VISIT_LISTED)
RECORD(EngineRecord, engine, VISIT_ENGINE)
RECORD(Around, around, VISIT_AROUND)

#define RECORD_TYPE(Record, record, MORE) \
    static PyTypeObject Record##_Type = { \
        PyVarObject_HEAD_INIT(NULL, 0) \
        .tp_name = "otel_npu._native." #Record, \
        .tp_basicsize = sizeof(Record), \
        .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | MORE, \
        .tp_new = PyType_GenericNew, \
        .tp_dealloc = (destructor)record##_dealloc, \
        .tp_traverse = (traverseproc)record##_traverse, \
        .tp_clear = (inquiry)record##_clear, \
        .tp_members = record##_members, \
    };

#define OBJECT(Record, field) {#field, T_OBJECT, offsetof(Record, field), 0, NULL},
#define NUMBER(Record, field) {#field, T_LONGLONG, offsetof(Record, field), 0, NULL},

static PyMemberDef worker_members[] = {
    OBJECT(WorkerRecord, rank) OBJECT(WorkerRecord, step) OBJECT(WorkerRecord, told)
    {"usual", T_BOOL, offsetof(WorkerRecord, usual), 0, NULL},
    {NULL},
};
RECORD_TYPE(WorkerRecord, worker, Py_TPFLAGS_BASETYPE)

static PyMemberDef channel_members[] = {
    OBJECT(ChannelRecord, deferred) NUMBER(ChannelRecord, deferred_since_ns)
    {NULL},
};
RECORD_TYPE(ChannelRecord, channel, Py_TPFLAGS_BASETYPE)

static PyMemberDef listed_members[] = {
    OBJECT(ListedRecord, kind) OBJECT(ListedRecord, span_id) OBJECT(ListedRecord, tokens)
    NUMBER(ListedRecord, repeated)
    {NULL},
};
RECORD_TYPE(ListedRecord, listed, Py_TPFLAGS_BASETYPE)

static PyMemberDef engine_members[] = {
    OBJECT(EngineRecord, channel) OBJECT(EngineRecord, frame) OBJECT(EngineRecord, limiter)
    OBJECT(EngineRecord, listed) OBJECT(EngineRecord, running) OBJECT(EngineRecord, slow)
    OBJECT(EngineRecord, step_numbers) OBJECT(EngineRecord, told) OBJECT(EngineRecord, unsent)
    OBJECT(EngineRecord, word)
    {NULL},
};
RECORD_TYPE(EngineRecord, engine, Py_TPFLAGS_BASETYPE)

static struct {
    PyObject *steps, *step, *fault, *no_drops; /* names of attributes, and what is told of an error of ours */
    long long most_deferred, deferred_ns, list_every, most_running;
} hooks;

static PyObject *use_hooks(PyObject *module, PyObject *args)
{
    PyObject *steps, *step, *fault;
    if (!PyArg_ParseTuple(args, "UUOLLLL", &steps, &step, &fault, &hooks.most_deferred, &hooks.deferred_ns,
                          &hooks.list_every, &hooks.most_running))
        return NULL;
    GIVE(hooks.steps, Py_NewRef(steps));
    GIVE(hooks.step, Py_NewRef(step));
    GIVE(hooks.fault, Py_NewRef(fault));
    if (hooks.no_drops == NULL)
        hooks.no_drops = PyDict_New();
    Py_RETURN_NONE;
}

/* Tell of an error of ours, so that it is not the caller's; -1 if it was none of ours, and goes on. */
static int tell_fault(void)
{
    if (!PyErr_Occurred())
        return 0;
    PyObject *error = take_error(), *told = error == NULL ? NULL : PyObject_CallOneArg(hooks.fault, error);
    Py_XDECREF(told);
    Py_XDECREF(error);
    return told == NULL ? -1 : 0;
}

/* An attribute that may not be there: NULL, without an error, if it is not. */
static PyObject *look_up(PyObject *object, PyObject *name)
{
    PyObject *found = PyObject_GetAttr(object, name);
    if (found == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Clear();
    return found;
}

/* Whether what an attribute holds is empty, None, or not there; -1 with an error. */
static int is_empty(PyObject *object, PyObject *name)
{
    PyObject *held = look_up(object, name);
    if (held == NULL)
        return PyErr_Occurred() ? -1 : 1;
    Py_ssize_t length = held == Py_None ? 0 : PyObject_Length(held);
    Py_DECREF(held);
    return length < 0 ? -1 : length == 0;
}

/* A worker's record; NULL, without an error, where it has none yet. */
static WorkerRecord *record_of(PyObject *worker)
{
    PyObject *found = look_up(worker, hooks.steps);
    if (found != NULL && !PyObject_TypeCheck(found, &WorkerRecord_Type))
        Py_CLEAR(found);
    return (WorkerRecord *)found;
}

/* Opens the step of a scheduler's output, as `WorkerSteps.open` does; 0 if it is not a usual one, -1 with an error. */
static int open_usual(WorkerRecord *worker, PyObject *output)
{
    PyObject *capture = capturing();
    if (!worker->usual || !ABSENT(worker->step) || capture == NULL || capture != worker->told)
        return PyErr_Occurred() ? -1 : 0;
    PyObject *told = look_up(output, hooks.step), *tokens = NULL;
    if (told != NULL && PyTuple_CheckExact(told) && PyTuple_GET_SIZE(told) == 6)
        tokens = PyObject_GetAttr(output, str_total_tokens);
    int runs = tokens == NULL ? 0 : PyObject_IsTrue(tokens);
    Py_XDECREF(tokens);
    if (runs < 1) {
        Py_XDECREF(told);
        return PyErr_Occurred() ? -1 : 0;
    }
    PyObject *trace_id = PyTuple_GET_ITEM(told, 0), *parent_id = PyTuple_GET_ITEM(told, 1),
             *kind = PyTuple_GET_ITEM(told, 3), *slow = PyTuple_GET_ITEM(told, 5);
    StepRecord *step = NULL;
    int usual = PyBytes_Check(trace_id) && PyBytes_GET_SIZE(trace_id) <= 16 && PyBytes_Check(parent_id) &&
                PyBytes_GET_SIZE(parent_id) <= 8 && PyTuple_Check(slow) && !PyTuple_GET_SIZE(slow);
    int overflow = 0;
    usual = usual && PyLong_Check(PyTuple_GET_ITEM(told, 2));
    long long number = usual ? PyLong_AsLongLongAndOverflow(PyTuple_GET_ITEM(told, 2), &overflow) : 0;
    if (usual && !overflow)
        step = make_step(front.Step, capture, kind, front.no_requests, Py_None);
    if (step != NULL) {
        unsigned long long span_id = next_random();
        step->number = number;
        step->trace_length = (unsigned char)PyBytes_GET_SIZE(trace_id);
        step->parent_length = (unsigned char)PyBytes_GET_SIZE(parent_id);
        memcpy(step->new_ids, PyBytes_AS_STRING(trace_id), step->trace_length);
        memcpy(step->new_ids + 16, &span_id, 8);
        memcpy(step->new_ids + 24, PyBytes_AS_STRING(parent_id), step->parent_length);
        step->kept = PyTuple_GET_ITEM(told, 4) == Py_True;
        step->chosen = 1;
        GIVE(step->rank, Py_XNewRef(worker->rank));
    }
    Py_DECREF(told);
    if (step == NULL)
        return PyErr_Occurred() ? -1 : 0;
    PyObject *opened = step_open(step, NULL);
    Py_XDECREF(opened);
    if (opened != NULL && step->closed_ns == 0)
        GIVE(worker->step, Py_NewRef((PyObject *)step));
    Py_DECREF(step);
    return opened == NULL ? -1 : 1;
}

/* Closes a worker's step, if it has one open, as `WorkerSteps.close` does; -1 with an error that goes on. */
static int close_usual(WorkerRecord *worker, PyObject *error)
{
    StepRecord *step = (StepRecord *)worker->step;
    if (ABSENT((PyObject *)step) || !PyObject_TypeCheck((PyObject *)step, &StepRecord_Type))
        return 0;
    worker->step = NULL;
    int failed = step->closed_ns == 0 ? close_step(step, error) : 0;
    Py_DECREF(step);
    return failed < 0 ? tell_fault() : 0;
}

/* The same once vLLM has come back with this result, or NULL with its error; the result. Takes the record over. */
static PyObject *close_after(WorkerRecord *worker, PyObject *result)
{
    PyObject *type = Py_None, *value = NULL, *traceback = NULL;
    if (result == NULL)
        PyErr_Fetch(&type, &value, &traceback);
    int failed = close_usual(worker, type);
    Py_DECREF(worker);
    if (result == NULL && !failed)
        PyErr_Restore(type, value, traceback);
    else if (result == NULL) {
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(traceback);
    }
    if (failed)
        Py_CLEAR(result);
    return result;
}

/* `Worker.execute_model`: its step ends here where the output is returned. */
static PyObject *execute_model(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Around *self = (Around *)callable;
    WorkerRecord *worker = PyVectorcall_NARGS(flags) == 2 && keywords == NULL ? record_of(args[0]) : NULL;
    int opened = worker == NULL ? 0 : open_usual(worker, args[1]);
    if (opened < 0 || PyErr_Occurred())
        opened = tell_fault();
    if (opened < 1) {
        Py_XDECREF(worker);
        return opened < 0 ? NULL : PyObject_Vectorcall(self->otherwise, args, flags, keywords);
    }
    PyObject *result = PyObject_Vectorcall(self->inside, args, flags, keywords);
    if (result != Py_None)
        return close_after(worker, result);
    Py_DECREF(worker);
    return result;
}

/* `Worker.sample_tokens`: the step ends. */
static PyObject *sample_tokens(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Around *self = (Around *)callable;
    WorkerRecord *worker = PyVectorcall_NARGS(flags) ? record_of(args[0]) : NULL;
    if (worker == NULL) {
        if (PyErr_Occurred() && tell_fault() < 0)
            return NULL;
        return PyObject_Vectorcall(self->otherwise, args, flags, keywords);
    }
    return close_after(worker, PyObject_Vectorcall(self->inside, args, flags, keywords));
}

/* `Channel.defer` without drop counts. */
static int defer(PyObject *channel, PyObject *make, PyObject *arguments, long long at_ns)
{
    if (channel == NULL || !PyObject_TypeCheck(channel, &ChannelRecord_Type) || arguments == NULL || make == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "not a channel");
        return -1;
    }
    ChannelRecord *to = (ChannelRecord *)channel;
    PyObject *entry = PyTuple_Pack(3, hooks.no_drops, make, arguments);
    Py_ssize_t waiting = entry == NULL ? -1 : PyObject_Length(to->deferred);
    if (!waiting)
        to->deferred_since_ns = at_ns;
    PyObject *given[] = {to->deferred, entry};
    PyObject *done = waiting < 0 ? NULL : PyObject_Vectorcall(append, given, 2, NULL);
    Py_XDECREF(entry);
    if (done != NULL && (waiting + 1 >= hooks.most_deferred || at_ns - to->deferred_since_ns > hooks.deferred_ns)) {
        Py_DECREF(done);
        done = PyObject_CallMethodNoArgs(channel, str_send_deferred);
    }
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Tells of a step that is for the same requests as the one before it, as `EngineSteps._scheduled` does; 0 if it is none. */
static int tell_repeated(EngineRecord *engine, PyObject *output, long long opened_ns)
{
    CaptureRecord *recorder = (CaptureRecord *)capturing();
    if (recorder == NULL || (PyObject *)recorder != engine->told || ABSENT(engine->listed) ||
        !PyObject_TypeCheck(engine->listed, &ListedRecord_Type) || PyObject_Length(engine->slow) ||
        PyObject_Length(engine->unsent))
        return PyErr_Occurred() ? -1 : 0;
    ListedRecord *listed = (ListedRecord *)engine->listed;
    if (ABSENT(listed->span_id) || listed->repeated + 1 >= hooks.list_every)
        return 0;
    int nothing_new = is_empty(output, str_finished);
    if (nothing_new == 1)
        nothing_new = is_empty(output, str_new_requests);
    if (nothing_new == 1)
        nothing_new = is_empty(output, str_preempted);
    if (nothing_new < 1)
        return nothing_new;
    PyObject *tokens = PyObject_GetAttr(output, str_scheduled_tokens),
             *total = tokens == NULL ? NULL : PyObject_GetAttr(output, str_total_tokens);
    int same = total == NULL ? -1 : PyObject_RichCompareBool(tokens, listed->tokens, Py_EQ);
    Py_ssize_t requests = same == 1 ? PyObject_Length(tokens) : 0;
    long long count = same == 1 ? PyLong_AsLongLong(total) : 0, scheduled_ns = 0;
    Py_XDECREF(tokens);
    if (same < 1 || count < 1 || PyErr_Occurred() || now_ns(&scheduled_ns) < 0) {
        Py_XDECREF(total);
        return PyErr_Occurred() ? -1 : 0;
    }
    listed->repeated++;
    unsigned long long random[3] = {next_random(), next_random(), next_random()};
    int kept = recorder->root_traces ? allow(engine->limiter, listed->kind) : 0, failed = -1;
    PyObject *is_kept = kept ? Py_True : Py_False, *number = kept < 0 ? NULL : PyIter_Next(engine->step_numbers);
    PyObject *trace_id = PyBytes_FromStringAndSize((char *)(random + 1), recorder->root_traces ? 16 : 0),
             *span_id = PyBytes_FromStringAndSize((char *)random, 8), *told = NULL, *running = NULL,
             *arguments = NULL;
    if (number != NULL && trace_id != NULL && span_id != NULL) {
        told = PyTuple_Pack(6, trace_id, span_id, number, listed->kind, is_kept, front.no_requests);
        running = Py_BuildValue("L(Oi)OO", opened_ns, listed->kind, 64 - __builtin_clzll((unsigned long long)count),
                                is_kept, listed);
        arguments = Py_BuildValue("OOOOLLOnOO", trace_id, span_id, number, listed->kind, opened_ns, scheduled_ns,
                                  total, requests, is_kept, listed->span_id);
    }
    if (told != NULL && running != NULL && arguments != NULL &&
        PyDict_SetItem(engine->running, span_id, running) == 0 && PyObject_SetAttr(output, hooks.step, told) == 0)
        failed = defer(engine->channel, engine->frame, arguments, scheduled_ns);
    PyObject *first = NULL;
    Py_ssize_t at = 0;
    if (!failed && PyDict_GET_SIZE(engine->running) > hooks.most_running && PyDict_Next(engine->running, &at, &first, NULL)) {
        Py_INCREF(first);
        failed = PyDict_DelItem(engine->running, first); /* of those before them no output will come */
        Py_DECREF(first);
    }
    Py_XDECREF(arguments);
    Py_XDECREF(running);
    Py_XDECREF(told);
    Py_XDECREF(span_id);
    Py_XDECREF(trace_id);
    Py_XDECREF(number);
    Py_DECREF(total);
    return failed ? -1 : 1;
}

/* `Scheduler.schedule`: a step begins. */
static PyObject *schedule(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Around *self = (Around *)callable;
    long long opened_ns;
    if (now_ns(&opened_ns) < 0)
        return NULL;
    PyObject *output = PyObject_Vectorcall(self->inside, args, flags, keywords);
    if (output == NULL)
        return NULL;
    int told = tell_repeated((EngineRecord *)self->record, output, opened_ns);
    if (!told) {
        PyObject *done = PyObject_CallFunction(self->after, "OL", output, opened_ns);
        told = done == NULL ? -1 : 1;
        Py_XDECREF(done);
    } else if (told < 0)
        told = tell_fault();
    if (told < 0)
        Py_CLEAR(output);
    return output;
}

/* Whether an output is one more token of a request of the step, which goes on; -1 with an error. */
static int goes_on(PyObject *output, PyObject *tokens)
{
    PyObject *reason = PyObject_GetAttr(output, str_finish_reason);
    int is = reason == NULL ? -1 : reason == Py_None;
    Py_XDECREF(reason);
    PyObject *new_tokens = is == 1 ? PyObject_GetAttr(output, str_new_tokens) : NULL;
    if (is == 1) {
        Py_ssize_t length = new_tokens == NULL ? -1 : PyObject_Length(new_tokens);
        is = length < 0 ? -1 : length == 1;
        Py_XDECREF(new_tokens);
    }
    PyObject *request = is == 1 ? PyObject_GetAttr(output, str_request_id) : NULL;
    if (is == 1) {
        is = request == NULL ? -1 : PyDict_Contains(tokens, request);
        Py_XDECREF(request);
    }
    return is;
}

/* Tells of the output of a step, if it is a token for each of its requests, as `EngineSteps._updated` does; 0 if not. */
static int tell_each_has_one(EngineRecord *engine, PyObject *output, PyObject *result)
{
    PyObject *recorder = capturing(), *of = result, *key;
    Py_ssize_t at = 0;
    if (recorder == NULL || recorder != engine->told ||
        (PyDict_Check(result) && (PyDict_GET_SIZE(result) != 1 || !PyDict_Next(result, &at, &key, &of))))
        return PyErr_Occurred() ? -1 : 0;
    PyObject *told = look_up(output, hooks.step);
    if (told == NULL || !PyTuple_CheckExact(told) || PyTuple_GET_SIZE(told) != 6) {
        Py_XDECREF(told);
        return PyErr_Occurred() ? -1 : 0;
    }
    PyObject *span_id = Py_NewRef(PyTuple_GET_ITEM(told, 1)), *outputs = NULL, *arguments = NULL;
    PyObject *running = PyDict_GetItemWithError(engine->running, span_id);
    Py_XINCREF(running);
    Py_DECREF(told);
    int all = running != NULL && PyTuple_CheckExact(running) && PyTuple_GET_SIZE(running) == 4 &&
              PyObject_TypeCheck(PyTuple_GET_ITEM(running, 3), &ListedRecord_Type);
    PyObject *tokens = all ? ((ListedRecord *)PyTuple_GET_ITEM(running, 3))->tokens : NULL;
    if (all) {
        outputs = PyObject_GetAttr(of, str_outputs);
        all = outputs != NULL && PyList_CheckExact(outputs) && PyDict_CheckExact(tokens) &&
              PyList_GET_SIZE(outputs) == PyDict_GET_SIZE(tokens);
    }
    for (Py_ssize_t index = 0; all == 1 && index < PyList_GET_SIZE(outputs); index++)
        all = goes_on(PyList_GET_ITEM(outputs, index), tokens);
    long long updated_ns;
    if (all == 1) {
        all = -1;
        if (now_ns(&updated_ns) == 0 && PyDict_DelItem(engine->running, span_id) == 0)
            arguments = Py_BuildValue("OOLOi", recorder, span_id, updated_ns, running, 1);
        if (arguments != NULL && defer(engine->channel, engine->word, arguments, updated_ns) == 0)
            all = 1;
    }
    Py_XDECREF(arguments);
    Py_XDECREF(outputs);
    Py_XDECREF(running);
    Py_DECREF(span_id);
    return PyErr_Occurred() ? -1 : all;
}

/* `Scheduler.update_from_output`: a step has its output. */
static PyObject *update_from_output(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Around *self = (Around *)callable;
    int usual = PyVectorcall_NARGS(flags) == 2 && keywords == NULL ? is_empty(args[0], str_drafts) : 0;
    if (usual < 1) {
        if (usual < 0 && tell_fault() < 0)
            return NULL;
        return PyObject_Vectorcall(self->otherwise, args, flags, keywords);
    }
    PyObject *result = PyObject_Vectorcall(self->inside, args, flags, keywords);
    if (result == NULL)
        return NULL;
    int told = tell_each_has_one((EngineRecord *)self->record, args[0], result);
    if (!told) {
        PyObject *done = PyObject_CallFunctionObjArgs(self->after, args[0], Py_None, result, NULL);
        told = done == NULL ? -1 : 1;
        Py_XDECREF(done);
    } else if (told < 0)
        told = tell_fault();
    if (told < 0)
        Py_CLEAR(result);
    return result;
}

static PyObject *around_get(PyObject *self, PyObject *object, PyObject *type)
{
    return object == NULL || object == Py_None ? Py_NewRef(self) : PyMethod_New(self, object);
}

static PyGetSetDef around_attributes[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL},
};

static PyTypeObject Around_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "otel_npu._native.Around",
    .tp_basicsize = sizeof(Around),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Around, call),
    .tp_descr_get = around_get,
    .tp_dictoffset = offsetof(Around, attributes),
    .tp_getset = around_attributes,
    .tp_dealloc = (destructor)around_dealloc,
    .tp_traverse = (traverseproc)around_traverse,
    .tp_clear = (inquiry)around_clear,
};

static PyObject *put_around(vectorcallfunc call, PyObject *inside, PyObject *otherwise, PyObject *after, PyObject *record)
{
    Around *around = (Around *)Around_Type.tp_alloc(&Around_Type, 0);
    if (around != NULL) {
        around->call = call;
        around->inside = Py_XNewRef(inside);
        around->otherwise = Py_XNewRef(otherwise);
        around->after = Py_XNewRef(after);
        around->record = Py_XNewRef(record);
    }
    return (PyObject *)around;
}

/* Each of these takes the function inside, and what stands for it in Python. */

static PyObject *around_execute_model(PyObject *module, PyObject *args)
{
    PyObject *inside, *otherwise;
    return PyArg_ParseTuple(args, "OO", &inside, &otherwise) ? put_around(execute_model, inside, otherwise, NULL, NULL)
                                                             : NULL;
}

static PyObject *around_sample_tokens(PyObject *module, PyObject *args)
{
    PyObject *inside, *otherwise;
    return PyArg_ParseTuple(args, "OO", &inside, &otherwise) ? put_around(sample_tokens, inside, otherwise, NULL, NULL)
                                                             : NULL;
}

static PyObject *around_schedule(PyObject *module, PyObject *args)
{
    PyObject *inside, *after, *record;
    return PyArg_ParseTuple(args, "OOO!", &inside, &after, &EngineRecord_Type, &record)
               ? put_around(schedule, inside, NULL, after, record)
               : NULL;
}

static PyObject *around_update(PyObject *module, PyObject *args)
{
    PyObject *inside, *otherwise, *after, *record;
    return PyArg_ParseTuple(args, "OOOO!", &inside, &otherwise, &after, &EngineRecord_Type, &record)
               ? put_around(update_from_output, inside, otherwise, after, record)
               : NULL;
}

/* A function of ours with the name, the signature and the text of the one in Python that it goes before. */
static PyObject *stand_before(PyObject *function, PyMethodDef *definition, const char *signature, PyObject *module)
{
    PyObject *text = PyObject_GetAttrString(function, "__doc__");
    const char *said = text == NULL || text == Py_None ? "" : PyUnicode_AsUTF8(text);
    char *whole = said == NULL ? NULL : PyMem_Malloc(strlen(signature) + strlen(said) + 1);
    if (whole != NULL) {
        definition->ml_doc = strcat(strcpy(whole, signature), said); /* as long as the process */
        definition->ml_flags = METH_FASTCALL | METH_KEYWORDS;
    }
    Py_XDECREF(text);
    if (whole == NULL)
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    return PyCFunction_NewEx(definition, NULL, module);
}

static PyObject *stand_in_front(PyObject *module, PyObject *args)
{
    static PyMethodDef definitions[] = {
        {"stage", (PyCFunction)(void (*)(void))front_stage, METH_FASTCALL | METH_KEYWORDS, NULL},
        {"step", (PyCFunction)(void (*)(void))front_step, METH_FASTCALL | METH_KEYWORDS, NULL},
    };
    PyObject *globals, *off_stages, *Stage, *Step, *stage, *step, *name;
    if (!PyArg_ParseTuple(args, "O!O!O!O!OOO", &PyDict_Type, &globals, &PyDict_Type, &off_stages, &PyType_Type, &Stage,
                          &PyType_Type, &Step, &stage, &step, &name))
        return NULL;
    if (!is_class(Stage, &StageRecord_Type) || !is_class(Step, &StepRecord_Type)) {
        PyErr_SetString(PyExc_TypeError, "not the classes of stages and of steps");
        return NULL;
    }
    GIVE(front.globals, Py_NewRef(globals));
    GIVE(front.off_stages, Py_NewRef(off_stages));
    GIVE(front.no_requests, PyTuple_New(0));
    GIVE(front.stage, Py_NewRef(stage));
    GIVE(front.step, Py_NewRef(step));
    front.Stage = (PyTypeObject *)Py_NewRef(Stage);
    front.Step = (PyTypeObject *)Py_NewRef(Step);
    PyObject *of_stage = stand_before(stage, definitions, "stage($module, name, /, **attributes)\n--\n\n", name);
    PyObject *of_step = stand_before(
        step, definitions + 1, "step($module, kind='', /, *, requests=(), **attributes)\n--\n\n", name);
    return of_stage == NULL || of_step == NULL ? NULL : Py_BuildValue("NN", of_stage, of_step);
}

/* Packing: steps as msgpack, in the form of `frames.Several`. */

#define MAX_ONCE 16

typedef struct {
    char *bytes;
    Py_ssize_t length, room;
    int known; /* attributes that are in it already: many steps say the same of themselves and of their stages */
    struct {
        PyObject *object;
        Py_ssize_t at, length;
    } once[MAX_ONCE];
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

/* Attributes, encoded once a packet where many have the same ones. */
static int put_attributes(Packet *packet, PyObject *object, PyObject *encode)
{
    for (int index = 0; index < packet->known; index++)
        if (packet->once[index].object == object) {
            Py_ssize_t at = packet->once[index].at, length = packet->once[index].length;
            char *room = make_room(packet, length);
            if (room == NULL)
                return -1;
            memcpy(room, packet->bytes + at, length);
            return 0;
        }
    Py_ssize_t at = packet->length;
    if (put_other(packet, object, encode) < 0)
        return -1;
    if (packet->known < MAX_ONCE && packet->length - at > 1) {
        packet->once[packet->known].object = Py_NewRef(object);
        packet->once[packet->known].at = at;
        packet->once[packet->known++].length = packet->length - at;
    }
    return 0;
}

/* Of a stream; the host's only one is the first of the first device. */
static int put_attribute(Packet *packet, PyObject *object, PyObject *name)
{
    if (object == host_stream)
        return put_int(packet, 0);
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
                   put_error(packet, stage->error, text) < 0 || put_attributes(packet, stage->attributes, encode) < 0
               ? -1
               : 0;
}

/* Ids as they are in a tuple, before the flag that says whether they are kept; absent ones as empty bytes. */
static int put_ids(Packet *packet, StepRecord *step)
{
    PyObject *ids = step->ids;
    if (step->chosen) {
        const char *bytes = (const char *)step->new_ids;
        return put_big_endian(packet, 0xc4, step->trace_length, 1) < 0 ||
                       put_raw(packet, bytes, step->trace_length) < 0 || put_big_endian(packet, 0xc4, 8, 1) < 0 ||
                       put_raw(packet, bytes + 16, 8) < 0 ||
                       put_big_endian(packet, 0xc4, step->parent_length, 1) < 0 ||
                       put_raw(packet, bytes + 24, step->parent_length) < 0
                   ? -1
                   : 0;
    }
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
    int there = !ABSENT(step->requests) && (step->chosen || !ABSENT(step->ids));
    int any = there ? PyObject_IsTrue(step->requests) : 0;
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
    if (put_big_endian(packet, 0xdc, 18, 2) < 0 || put_raw(packet, "\xa4step", 5) < 0 || put_ids(packet, step) < 0 || put_byte(packet, step->bare ? 0xc3 : 0xc2) < 0 ||
        put_rank(packet, step->rank) < 0 || put_int(packet, step->number) < 0 ||
        put_text(packet, step->kind, text) < 0 || put_int(packet, step->opened_ns) < 0 ||
        put_int(packet, step->closed_ns) < 0 || put_int(packet, seen_ns) < 0 ||
        put_error(packet, step->error, text) < 0 || put_attributes(packet, step->attributes, encode) < 0 ||
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
    int kept = step->chosen ? step->kept : !ABSENT(step->ids) && PyTuple_GET_ITEM(step->ids, 3) == Py_True;
    return put_byte(packet, kept ? 0xc3 : 0xc2);
}

static PyObject *pack(PyObject *module, PyObject *args)
{
    PyObject *steps, *dropped, *text, *encode, *links_of;
    long long seen_ns;
    if (!PyArg_ParseTuple(args, "O!LOOOO", &PyList_Type, &steps, &seen_ns, &dropped, &text, &encode, &links_of))
        return NULL;
    Packet packet = {0};
    PyObject *packed = NULL;
    Py_ssize_t count = PyList_GET_SIZE(steps);
    if (put_array(&packet, 2) < 0 || put_raw(&packet, "\xa7several", 8) < 0 || put_array(&packet, count) < 0)
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
    while (packet.known)
        Py_DECREF(packet.once[--packet.known].object);
    PyMem_Free(packet.bytes);
    return packed;
}

/* Resolving: which of a batch's stages the device has to be asked of. */

/* The stages of a step, borrowed; NULL with an error. */
static PyObject *stages_of(PyObject *step)
{
    if (PyObject_TypeCheck(step, &StepRecord_Type) && ((StepRecord *)step)->stages != NULL)
        return ((StepRecord *)step)->stages;
    PyErr_SetString(PyExc_TypeError, "not a step");
    return NULL;
}

/* The next stage of a list, borrowed; NULL at its end or, with an error, where there is none. */
static StageRecord *next_stage(PyObject *stages, Py_ssize_t *index)
{
    if (*index >= PyList_GET_SIZE(stages))
        return NULL;
    PyObject *stage = PyList_GET_ITEM(stages, (*index)++);
    if (PyObject_TypeCheck(stage, &StageRecord_Type))
        return (StageRecord *)stage;
    PyErr_SetString(PyExc_TypeError, "not a stage");
    return NULL;
}

static PyObject *last_stages(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "last_stages() takes a step and the streams that need not be asked");
        return NULL;
    }
    PyObject *last = PyDict_New(); /* first: to make it may let others run, who let go of the stages */
    PyObject *stages = last == NULL ? NULL : stages_of(args[0]);
    Py_ssize_t index = 0;
    StageRecord *stage;
    while (stages != NULL && (stage = next_stage(stages, &index)) != NULL) {
        if (!stage->exited_ns) {
            Py_DECREF(last);
            Py_RETURN_NONE;
        }
        if (ABSENT(stage->pair))
            continue;
        PyObject *stream = PyLong_FromVoidPtr(stage->stream);
        int done = stream == NULL ? -1 : PySet_Contains(args[1], stream);
        PyObject *before = done ? NULL : PyDict_GetItemWithError(last, stream);
        if (!done && (before == NULL || stage->exited_ns >= ((StageRecord *)before)->exited_ns) && !PyErr_Occurred())
            PyDict_SetItem(last, stream, (PyObject *)stage);
        Py_XDECREF(stream);
        if (PyErr_Occurred())
            break;
    }
    if (stages == NULL || PyErr_Occurred())
        Py_CLEAR(last);
    return last;
}

static PyObject *timed(PyObject *module, PyObject *step)
{
    PyObject *found = PyList_New(0), *stages = found == NULL ? NULL : stages_of(step); /* as above */
    Py_ssize_t index = 0;
    StageRecord *stage;
    while (stages != NULL && (stage = next_stage(stages, &index)) != NULL)
        if (!ABSENT(stage->pair) && PyList_Append(found, (PyObject *)stage) < 0)
            break;
    if (stages == NULL || PyErr_Occurred())
        Py_CLEAR(found);
    return found;
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

static PyObject *use(PyObject *module, PyObject *args)
{
    PyObject *variable, *ids, *rank, *stream;
    if (!PyArg_ParseTuple(args, "O!O!OOLL", &PyContextVar_Type, &variable, &PyType_Type, &ids, &rank, &stream,
                          &batch_ns, &max_pending))
        return NULL;
    GIVE(host_stream, Py_NewRef(stream));
    GIVE(open_step, Py_NewRef(variable));
    Py_INCREF(ids);
    Py_XSETREF(Ids, (PyTypeObject *)ids);
    GIVE(no_rank, Py_NewRef(rank));
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
    {"stand_in_front", stand_in_front, METH_VARARGS, "The functions that go before `stage` and `step` in Python."},
    {"remember_mode", remember_mode, METH_VARARGS, "What is to be said of a step whose forward runs in this mode."},
    {"scope_in_front", scope_in_front, METH_VARARGS, "The function that goes before `scope` of vLLM's worker."},
    {"around_execute_model", around_execute_model, METH_VARARGS, "What goes round a worker's `execute_model`."},
    {"around_sample_tokens", around_sample_tokens, METH_VARARGS, "What goes round a worker's `sample_tokens`."},
    {"around_schedule", around_schedule, METH_VARARGS, "What goes round a scheduler's `schedule`."},
    {"around_update", around_update, METH_VARARGS, "What goes round a scheduler's `update_from_output`."},
    {"use_hooks", use_hooks, METH_VARARGS, "What those go by: names of attributes, what an error of ours is told, and bounds."},
    {"new_step", (PyCFunction)(void (*)(void))new_step, METH_FASTCALL, "A step to be opened."},
    {"new_stage", (PyCFunction)(void (*)(void))new_stage, METH_FASTCALL, "A stage to be entered."},
    {"last_stages", (PyCFunction)(void (*)(void))last_stages, METH_FASTCALL, "What to ask whether a step is done."},
    {"timed", timed, METH_O, "The stages of a step that have event pairs."},
    {"pack", pack, METH_VARARGS, "Steps as one packet."},
    {"read_events", read_events, METH_VARARGS, "Start and duration of finished event pairs, in nanoseconds."},
    {"random_bytes", random_bytes, METH_O, "So many random bytes, for ids."},
    {"seed", seed, METH_O, "Begin the random numbers anew, from 32 bytes."},
    {"use", use, METH_VARARGS, "Where the open step is, the class of ids, the rank of none, the host's stream, how long a batch may wait, and how many steps."},
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
#define INTERN(name, text) \
    if ((str_##name = PyUnicode_InternFromString(text)) == NULL) \
        return NULL;
    NAMES(INTERN)
    PyObject *collections = PyImport_ImportModule("collections");
    PyObject *deque = collections == NULL ? NULL : PyObject_GetAttrString(collections, "deque");
    append = deque == NULL ? NULL : PyObject_GetAttrString(deque, "append");
    Py_XDECREF(collections);
    Py_XDECREF(deque);
    if (append == NULL)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    PyTypeObject *types[] = {&CaptureRecord_Type, &Handle_Type,        &StageRecord_Type,  &StepRecord_Type,
                             &ThreadRecord_Type,  &WorkerRecord_Type,  &ChannelRecord_Type, &ListedRecord_Type,
                             &EngineRecord_Type,  &Around_Type};
    for (size_t index = 0; module != NULL && index < sizeof types / sizeof *types; index++)
        if (PyModule_AddType(module, types[index]) < 0)
            Py_CLEAR(module);
    return module;
}

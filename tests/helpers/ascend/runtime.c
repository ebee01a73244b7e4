/*
 * A simulated Ascend runtime: the part of CANN's ACL that torch_npu needs to run streams, events,
 * kernels and graph capture on a machine without an NPU.  Built as libascendcl.so; every other symbol
 * that the wheel links is a generated stub that returns 0 (see build.py).
 *
 * The device is a virtual timeline, without worker threads.  A stream is an in-order queue; a task gets
 * its completion time, in host nanoseconds, as soon as everything before it has one.  Whether something
 * "has happened" is then a comparison with the clock.  Only a task behind a hung kernel has to be kept
 * in memory, so memory does not grow with what has run.
 *
 * Written from the published signatures of acl_rt.h, with typed pointers for its opaque handles.  Events
 * are CANN's "Ex" events: a query before the first record says complete, a record replaces the last one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define API __attribute__((visibility("default")))

/* Error codes of acl_base_rt.h. */
enum {
    OK = 0,
    E_PARAM = 107000,
    E_DEVICE = 107001,
    E_NO_CONTEXT = 107002,
    E_NO_TIMESTAMP = 107006,
    E_STREAM_CAPTURED = 107027,
    E_EVENT_CAPTURED = 107028,
    E_NOT_CAPTURED = 107029,
    E_MEMORY = 207001,
    E_TIMEOUT = 507046,
};

#define MAX_DEVICES 16
/* Completion time of what waits for a hung kernel; half the range, so that sums don't overflow. */
#define NEVER (INT64_MAX / 2)

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards what is not atomic or thread-local */
static pthread_cond_t changed; /* what a blocked call waits for may have happened */
static int device_count = 2;
static _Thread_local int current_device = -1;

static void unlock(int *unused)
{
    (void)unused;
    pthread_mutex_unlock(&mutex);
}

/* Holds the lock until the end of the scope, whichever way it is left. */
#define LOCKED __attribute__((cleanup(unlock), unused)) int locked = pthread_mutex_lock(&mutex)
#define TRY(call) do { int error_ = (call); if (error_) return error_; } while (0)

static int64_t later(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- Settings, counters and faults, by name so that the tests need no shared header ---- */

enum setting {
    DISPATCH_DELAY, LAUNCH_DISPATCH_DELAY, VISIBLE_LATENCY, RECORD_COST, LAUNCH_LATENCY, TICK, SETTINGS
};
static const char *const setting_names[] = {
    "dispatch_delay_ns", "launch_dispatch_delay_ns", "visible_latency_ns",
    "record_cost_ns", "launch_latency_ns", "tick_ns",
};
static const int64_t setting_defaults[SETTINGS] = {[TICK] = 20}; /* 50 MHz, as on 910B and A3 */
static _Atomic int64_t settings[SETTINGS];

enum call {
    CREATE, DESTROY, RECORD, QUERY, ELAPSED, TIMESTAMP,
    SYNCHRONIZE_EVENT, SYNCHRONIZE_STREAM, SYNCHRONIZE_DEVICE, SYNCHRONIZE,
    SET_DEVICE, LAUNCH, LIVE_EVENTS, CALLS
};
static const char *const call_names[] = {
    "create", "destroy", "record", "query", "elapsed", "timestamp",
    "synchronize_event", "synchronize_stream", "synchronize_device", "synchronize",
    "set_device", "launch", "live_events",
};
static int64_t counters[CALLS];
static struct { int error, times; } faults[CALLS];

static int find(const char *name, const char *const *names, int count)
{
    for (int i = 0; i < count; i++)
        if (!strcmp(name, names[i])) return i;
    return -1;
}

/* Counts a call and returns the error that the test injected into it, if any. */
static int enter(enum call call)
{
    counters[call]++;
    /* Synchronizations are counted apart, but a fault is for whichever comes first. */
    if (call >= SYNCHRONIZE_EVENT && call <= SYNCHRONIZE_DEVICE) return enter(SYNCHRONIZE);
    if (faults[call].times <= 0) return OK;
    faults[call].times--;
    return faults[call].error;
}

/* ---- Clocks: the host's (real or manual) and each device's, a line over the host's ---- */

#define DEFAULT_OFFSET_NS 123456789000LL /* a device doesn't start when the host does */

static bool manual;
static int64_t manual_ns;
/* Every line that a device's clock has followed: what completed before a reset keeps its timestamp. */
struct line { int64_t host_start, device_start; double drift_ppm; };
static struct { struct line *lines; int count; } clocks[MAX_DEVICES];

static int64_t monotonic_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int64_t now_ns(void) { return manual ? manual_ns : monotonic_ns(); }

static struct timespec to_timespec(int64_t ns)
{
    return (struct timespec){ns / 1000000000LL, ns % 1000000000LL};
}

/* Blocks the calling thread in real time.  Without the lock: other threads go on. */
static void delay(enum setting setting)
{
    struct timespec left = to_timespec(settings[setting]);
    while ((left.tv_sec || left.tv_nsec) && nanosleep(&left, &left) && errno == EINTR) {}
}

static int64_t device_ns(int device, int64_t host_ns)
{
    const struct line *line = &clocks[device].lines[clocks[device].count - 1];
    while (line > clocks[device].lines && line->host_start > host_ns) line--;
    int64_t passed = host_ns - line->host_start;
    return line->device_start + passed + llround((double)passed * line->drift_ppm * 1e-6);
}

static void set_clock(int device, int64_t device_start, double drift_ppm)
{
    int *count = &clocks[device].count;
    /* Lines from the future are left over from a manual clock that ran ahead. */
    while (*count > 0 && clocks[device].lines[*count - 1].host_start >= now_ns()) --*count;
    clocks[device].lines = realloc(clocks[device].lines, (size_t)(*count + 1) * sizeof(struct line));
    clocks[device].lines[(*count)++] = (struct line){now_ns(), device_start, drift_ppm};
}

/* ---- Moments: when a task completed, shared by all that refer to it ---- */

struct moment { int64_t at; int device, references; };

static struct moment *new_moment(int device)
{
    struct moment *moment = malloc(sizeof *moment);
    *moment = (struct moment){.at = NEVER, .device = device, .references = 1};
    return moment;
}

static struct moment *keep(struct moment *moment)
{
    if (moment) moment->references++;
    return moment;
}

static void drop(struct moment *moment)
{
    if (moment && --moment->references == 0) free(moment);
}

/* When the host sees that it has happened. */
static int64_t visible_at(const struct moment *moment) { return moment->at + settings[VISIBLE_LATENCY]; }

/* Blocks until the host sees it, then drops it.  timeout_ms <= 0: for ever.  Unlocks while it waits. */
static int wait_for(struct moment *moment, int timeout_ms)
{
    int64_t give_up = timeout_ms > 0 ? monotonic_ns() + timeout_ms * 1000000LL : NEVER;
    int error = OK;
    while (!error && now_ns() < visible_at(moment)) {
        if (manual && moment->at < NEVER) {
            manual_ns = visible_at(moment); /* a blocked thread can't advance the clock, so blocking does */
        } else if (monotonic_ns() >= give_up) {
            error = E_TIMEOUT;
        } else {
            struct timespec until = to_timespec(visible_at(moment) < give_up ? visible_at(moment) : give_up);
            pthread_cond_timedwait(&changed, &mutex, &until);
        }
    }
    drop(moment);
    return error;
}

/* ---- Streams and their tasks ---- */

/* Starts when it has arrived, its stream is free and its gate has opened; ends `duration` later. */
struct task {
    int64_t arrives, duration;
    struct moment *gate, *end; /* each may be NULL */
    struct task *next;
};

/* A captured graph.  All that a replay shows is how long its kernels take. */
struct graph { bool capturing; int64_t duration; int references; };

#define STREAM_MAGIC 0x53545245u
struct stream {
    uint32_t magic;
    int device, id;
    int64_t free_at;           /* when all tasks that have a completion time are done */
    struct task *first, *last; /* tasks behind a closed gate */
    struct graph *capture;     /* while its tasks are captured instead of run */
    struct stream *next;
};
static struct stream *streams;
static int next_stream_id;

static int check_stream(const struct stream *stream)
{
    if (!stream || stream->magic != STREAM_MAGIC) return E_PARAM;
    return stream->capture ? E_STREAM_CAPTURED : OK;
}

/* Gives the task its place on the timeline, unless its gate is closed. */
static bool run(struct stream *stream, struct task *task)
{
    if (task->gate && task->gate->at == NEVER) return false;
    int64_t start = later(stream->free_at, task->arrives);
    if (task->gate) start = later(start, task->gate->at);
    stream->free_at = start + task->duration;
    if (task->end) task->end->at = stream->free_at;
    drop(task->gate);
    drop(task->end);
    return true;
}

static void submit(struct stream *stream, int64_t duration, struct moment *gate, struct moment *end)
{
    struct task task = {now_ns() + settings[LAUNCH_LATENCY], duration, keep(gate), keep(end), NULL};
    if (!stream->first && run(stream, &task)) return;
    struct task *blocked = malloc(sizeof *blocked);
    *blocked = task;
    if (stream->first) stream->last->next = blocked;
    else stream->first = blocked;
    stream->last = blocked;
}

static void remove_first(struct stream *stream)
{
    struct task *task = stream->first;
    stream->first = task->next;
    free(task);
}

/* After a gate has opened: run what can run now, which may open gates on other streams. */
static void run_blocked(void)
{
    for (bool moved = true; moved;) {
        moved = false;
        for (struct stream *stream = streams; stream; stream = stream->next)
            for (; stream->first && run(stream, stream->first); moved = true) remove_first(stream);
    }
    pthread_cond_broadcast(&changed);
}

static void launch(struct stream *stream, int64_t duration)
{
    if (stream->capture) stream->capture->duration += duration;
    else submit(stream, duration, NULL, NULL);
}

/* The moment at which all that is in the stream now is done. */
static struct moment *end_of(struct stream *stream)
{
    struct moment *end = new_moment(stream->device);
    submit(stream, 0, NULL, end);
    return end;
}

API int aclrtCreateStreamWithConfig(struct stream **out, uint32_t priority, uint32_t flag)
{
    (void)priority, (void)flag;
    LOCKED;
    if (current_device < 0) return E_NO_CONTEXT;
    struct stream *stream = malloc(sizeof *stream);
    *stream = (struct stream){
        .magic = STREAM_MAGIC, .device = current_device, .id = next_stream_id++, .next = streams,
    };
    *out = streams = stream;
    return OK;
}

API int aclrtCreateStream(struct stream **out) { return aclrtCreateStreamWithConfig(out, 0, 0); }

/* Tasks that are still behind a hung kernel are discarded: their events never complete. */
API int aclrtDestroyStream(struct stream *stream)
{
    LOCKED;
    TRY(check_stream(stream));
    struct stream **link = &streams;
    while (*link != stream) link = &(*link)->next;
    *link = stream->next;
    for (; stream->first; remove_first(stream)) {
        drop(stream->first->gate);
        drop(stream->first->end);
    }
    stream->magic = 0;
    free(stream);
    return OK;
}

API int aclrtDestroyStreamForce(struct stream *stream) { return aclrtDestroyStream(stream); }

API int aclrtStreamQuery(const struct stream *stream, int *status)
{
    LOCKED;
    TRY(check_stream(stream));
    *status = stream->first || now_ns() < stream->free_at + settings[VISIBLE_LATENCY]; /* 0: complete */
    return OK;
}

API int aclrtSynchronizeStreamWithTimeout(struct stream *stream, int32_t timeout_ms)
{
    LOCKED;
    TRY(enter(SYNCHRONIZE_STREAM));
    TRY(check_stream(stream));
    return wait_for(end_of(stream), timeout_ms);
}

API int aclrtSynchronizeStream(struct stream *stream) { return aclrtSynchronizeStreamWithTimeout(stream, 0); }

API int aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms)
{
    LOCKED;
    TRY(enter(SYNCHRONIZE_DEVICE));
    /* All ends are taken first: while this waits, other threads make and destroy streams. */
    struct moment **ends = malloc((size_t)(next_stream_id + 1) * sizeof *ends);
    int count = 0, error = OK;
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->device == current_device && !stream->capture) ends[count++] = end_of(stream);
    while (count--) {
        if (error) drop(ends[count]);
        else error = wait_for(ends[count], timeout_ms);
    }
    free(ends);
    return error;
}

API int aclrtSynchronizeDevice(void) { return aclrtSynchronizeDeviceWithTimeout(0); }

/* ---- Events ---- */

/* Flags of aclrtCreateEventExWithFlag. */
enum { FLAG_SYNC = 0x01, FLAG_TIME_LINE = 0x08, FLAG_EXTERNAL = 0x20, FLAG_IPC = 0x40 };

#define EVENT_MAGIC 0x45564e54u
struct event {
    uint32_t magic, flags;
    struct moment *last;    /* its latest record; NULL before the first */
    struct graph *captured; /* the graph that captured its latest record, if one did */
};

/* The truth log: where each executed record really landed. */
struct logged { struct event *event; int stream_id; struct moment *moment; };
static struct { struct logged *entries; int64_t size, capacity; bool on, overflowed; } truth_log;

static int check_event(const struct event *event)
{
    if (!event || event->magic != EVENT_MAGIC) return E_PARAM;
    return event->captured && event->captured->capturing ? E_EVENT_CAPTURED : OK;
}

static void set_captured(struct event *event, struct graph *graph)
{
    if (graph) graph->references++;
    if (event->captured && --event->captured->references == 0) free(event->captured);
    event->captured = graph;
}

static void log_record(struct event *event, const struct stream *stream)
{
    if (!truth_log.on) return;
    truth_log.overflowed = truth_log.size == truth_log.capacity;
    truth_log.on = !truth_log.overflowed; /* a log with a hole is no truth: keep nothing more */
    if (!truth_log.on) return;
    truth_log.entries[truth_log.size++] = (struct logged){event, stream->id, keep(event->last)};
}

API int aclrtCreateEventExWithFlag(struct event **out, uint32_t flags)
{
    LOCKED;
    TRY(enter(CREATE));
    if (current_device < 0) return E_NO_CONTEXT;
    *out = malloc(sizeof **out);
    **out = (struct event){.magic = EVENT_MAGIC, .flags = flags};
    counters[LIVE_EVENTS]++;
    return OK;
}

/* torch_npu insists on this one too, but calls the other. */
API int aclrtCreateEventWithFlag(struct event **out, uint32_t flags)
{
    return aclrtCreateEventExWithFlag(out, flags);
}

API int aclrtDestroyEvent(struct event *event)
{
    LOCKED;
    TRY(enter(DESTROY));
    if (check_event(event) == E_PARAM) return E_PARAM;
    drop(event->last);
    set_captured(event, NULL);
    event->magic = 0;
    free(event);
    counters[LIVE_EVENTS]--;
    return OK;
}

API int aclrtRecordEvent(struct event *event, struct stream *stream)
{
    delay(DISPATCH_DELAY);
    LOCKED;
    TRY(enter(RECORD));
    if (check_event(event) == E_PARAM || check_stream(stream) == E_PARAM) return E_PARAM;
    if (current_device < 0) return E_NO_CONTEXT;
    if (stream->capture) {
        /* The graph gets the record, the event keeps what it had: its old moment, or none. */
        if (event->flags & (FLAG_SYNC | FLAG_EXTERNAL | FLAG_IPC)) set_captured(event, stream->capture);
        return OK;
    }
    set_captured(event, NULL);
    drop(event->last);
    event->last = new_moment(stream->device);
    submit(stream, settings[RECORD_COST], NULL, event->last);
    log_record(event, stream);
    return OK;
}

API int aclrtStreamWaitEvent(struct stream *stream, struct event *event)
{
    LOCKED;
    if (check_event(event) == E_PARAM || check_stream(stream) == E_PARAM) return E_PARAM;
    if (event->last && !stream->capture) submit(stream, 0, event->last, NULL);
    return OK;
}

API int aclrtQueryEventStatus(const struct event *event, int *status)
{
    LOCKED;
    TRY(enter(QUERY));
    TRY(check_event(event));
    *status = !event->last || now_ns() >= visible_at(event->last); /* 1: complete */
    return OK;
}

API int aclrtSynchronizeEvent(const struct event *event)
{
    LOCKED;
    TRY(enter(SYNCHRONIZE_EVENT));
    TRY(check_event(event));
    return event->last ? wait_for(keep(event->last), 0) : OK;
}

/* The event's time in ns of the device's clock, cut to its ticks as the hardware does. */
static int read_clock(const struct event *event, int64_t *ns)
{
    TRY(check_event(event));
    if (!event->last) return E_PARAM;
    if (!(event->flags & FLAG_TIME_LINE) || now_ns() < event->last->at) return E_NO_TIMESTAMP;
    int64_t exact = device_ns(event->last->device, event->last->at);
    *ns = exact - exact % settings[TICK];
    return OK;
}

API int aclrtEventElapsedTime(float *milliseconds, const struct event *start, const struct event *end)
{
    LOCKED;
    int64_t start_ns, end_ns;
    TRY(enter(ELAPSED));
    TRY(read_clock(start, &start_ns));
    TRY(read_clock(end, &end_ns));
    *milliseconds = (float)((double)(end_ns - start_ns) / 1e6);
    return OK;
}

API int aclrtEventGetTimestamp(const struct event *event, uint64_t *microseconds)
{
    LOCKED;
    int64_t ns;
    TRY(enter(TIMESTAMP));
    TRY(read_clock(event, &ns));
    *microseconds = (uint64_t)ns / 1000;
    return OK;
}

/* ---- Kernels: aclnnSleep, which torch.npu._sleep(n) sends through torch_npu's task queue ---- */

/* An aclIntArray is opaque to its users: here its values. */
API int64_t *aclCreateIntArray(const int64_t *values, uint64_t count)
{
    return memcpy(malloc((count + 1) * sizeof *values), values, count * sizeof *values);
}

API int aclDestroyIntArray(int64_t *array)
{
    free(array);
    return OK;
}

API int aclnnSleepGetWorkspaceSize(const int64_t *cycles, uint64_t *workspace_size, int64_t **executor)
{
    *workspace_size = 0;
    *executor = malloc(sizeof **executor);
    **executor = cycles[0]; /* a cycle is a nanosecond */
    return OK;
}

API int aclnnSleep(void *workspace, uint64_t workspace_size, int64_t *executor, struct stream *stream)
{
    (void)workspace, (void)workspace_size;
    int64_t duration = *executor;
    free(executor);
    delay(LAUNCH_DISPATCH_DELAY);
    LOCKED;
    TRY(enter(LAUNCH));
    if (check_stream(stream) == E_PARAM) return E_PARAM;
    launch(stream, duration);
    return OK;
}

/* ---- Graph capture ---- */

API int aclmdlRICaptureBegin(struct stream *stream, int mode)
{
    (void)mode;
    LOCKED;
    TRY(check_stream(stream));
    stream->capture = malloc(sizeof *stream->capture);
    *stream->capture = (struct graph){.capturing = true, .references = 1};
    return OK;
}

API int aclmdlRICaptureGetInfo(const struct stream *stream, int *status, struct graph **graph)
{
    LOCKED;
    *status = stream->capture != NULL;
    if (graph) *graph = stream->capture;
    return OK;
}

API int aclmdlRICaptureEnd(struct stream *stream, struct graph **graph)
{
    LOCKED;
    if (!stream->capture) return E_NOT_CAPTURED;
    *graph = stream->capture;
    (*graph)->capturing = false;
    stream->capture = NULL;
    return OK;
}

API int aclmdlRIExecuteAsync(const struct graph *graph, struct stream *stream)
{
    LOCKED;
    TRY(check_stream(stream));
    launch(stream, graph->duration);
    return OK;
}

API int aclmdlRIDestroy(struct graph *graph)
{
    LOCKED;
    if (--graph->references == 0) free(graph); /* events that it captured may still point at it */
    return OK;
}

/* ---- Devices and contexts: one context a device, its handle the device's number plus one ---- */

API const char *aclrtGetSocName(void) { return "Ascend910B3"; }

API const char *aclGetRecentErrMsg(void) { return ""; } /* a stub's NULL would be made a std::string */

API int aclrtGetDeviceCount(uint32_t *count)
{
    *count = (uint32_t)device_count;
    return OK;
}

API int aclrtSetDevice(int32_t device)
{
    LOCKED;
    TRY(enter(SET_DEVICE));
    if (device < 0 || device >= device_count) return E_DEVICE;
    current_device = device;
    return OK;
}

API int aclrtGetDevice(int32_t *device)
{
    *device = current_device;
    return current_device < 0 ? E_NO_CONTEXT : OK;
}

API int aclrtGetCurrentContext(void **context)
{
    *context = (void *)(intptr_t)(current_device + 1);
    return current_device < 0 ? E_NO_CONTEXT : OK;
}

API int aclrtSetCurrentContext(void *context)
{
    current_device = (int)(intptr_t)context - 1;
    return OK;
}

API int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active)
{
    (void)device;
    if (flags) *flags = 0;
    *active = 1;
    return OK;
}

API int aclsysGetVersionStr(const char *package, char *version)
{
    (void)package;
    strcpy(version, "9.0.0");
    return OK;
}

API int aclrtGetSysParamOpt(int option, int64_t *value)
{
    (void)option;
    *value = 0;
    return OK;
}

/* Looked up by name and missed when absent, so they exist; what they set means nothing here. */
#define ACCEPTED(name) API int name(void) { return OK; }
ACCEPTED(aclSetCompileopt)
ACCEPTED(aclrtCtxSetSysParamOpt)
ACCEPTED(aclrtSetDeviceSatMode)
ACCEPTED(aclrtSetOpExecuteTimeOutV2)
ACCEPTED(aclrtSetStreamFailureMode)

/* ---- Memory: the host's, copied at once, because no test measures a copy ---- */

API int aclrtMallocAlign32(void **out, size_t size, int policy)
{
    (void)policy;
    return posix_memalign(out, 512, size ? size : 512) ? E_MEMORY : OK;
}

API int aclrtMallocHost(void **out, size_t size) { return aclrtMallocAlign32(out, size, 0); }

API int aclrtFree(void *memory)
{
    free(memory);
    return OK;
}

API int aclrtFreeHost(void *memory) { return aclrtFree(memory); }

API int aclrtMemcpy(void *to, size_t capacity, const void *from, size_t size, int kind)
{
    (void)capacity, (void)kind;
    memmove(to, from, size);
    return OK;
}

API int aclrtMemcpyAsync(void *to, size_t capacity, const void *from, size_t size, int kind, void *stream)
{
    (void)stream;
    return aclrtMemcpy(to, capacity, from, size, kind);
}

API int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes)
{
    (void)kind;
    *free_bytes = *total_bytes = (size_t)64 << 30;
    return OK;
}

/* ---- Test controls: what simulator.py calls.  Those that return int: 0, or not 0 for a bad argument ---- */

__attribute__((constructor)) static void start(void)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &monotonic);
    const char *count = getenv("ASCEND_SIMULATOR_DEVICES");
    if (count && atoi(count) > 0) device_count = atoi(count) < MAX_DEVICES ? atoi(count) : MAX_DEVICES;
    for (int i = 0; i < SETTINGS; i++) settings[i] = setting_defaults[i];
    for (int device = 0; device < device_count; device++) set_clock(device, now_ns() + DEFAULT_OFFSET_NS, 0);
}

API int sim_launch(struct stream *stream, int64_t duration_ns)
{
    LOCKED;
    if (check_stream(stream) == E_PARAM) return E_PARAM;
    launch(stream, duration_ns);
    return OK;
}

/* A kernel that hangs is a gate that only sim_release opens.  Returns the gate, or NULL for a bad stream. */
API struct moment *sim_hold(struct stream *stream)
{
    LOCKED;
    if (check_stream(stream)) return NULL;
    struct moment *gate = new_moment(stream->device);
    submit(stream, 0, gate, NULL);
    return gate;
}

API void sim_release(struct moment *gate)
{
    LOCKED;
    gate->at = now_ns();
    drop(gate);
    run_blocked();
}

API void sim_manual_clock(int on)
{
    LOCKED;
    if (on && !manual) manual_ns = monotonic_ns();
    manual = on;
    /* It may have run ahead of the real clock; new work must not wait until that has caught up. */
    for (struct stream *stream = streams; stream && !on; stream = stream->next)
        if (stream->free_at > now_ns()) stream->free_at = now_ns();
    pthread_cond_broadcast(&changed);
}

API void sim_advance(int64_t ns)
{
    LOCKED;
    manual_ns += ns;
    pthread_cond_broadcast(&changed);
}

API int64_t sim_now_ns(void)
{
    LOCKED;
    return now_ns();
}

API int sim_device_count(void) { return device_count; }

API int64_t sim_device_ns(int device)
{
    LOCKED;
    return device_ns(device, now_ns());
}

API void sim_set_clock(int device, int64_t offset_ns, double drift_ppm)
{
    LOCKED;
    set_clock(device, now_ns() + offset_ns, drift_ppm);
}

API void sim_default_clock(int device) { sim_set_clock(device, DEFAULT_OFFSET_NS, 0); }

API void sim_reset_device(int device)
{
    LOCKED;
    set_clock(device, 0, 0);
}

API int sim_configure(const char *name, int64_t value)
{
    int setting = find(name, setting_names, SETTINGS);
    if (setting < 0) return E_PARAM;
    settings[setting] = value;
    return OK;
}

API void sim_defaults(void)
{
    LOCKED;
    for (int i = 0; i < SETTINGS; i++) settings[i] = setting_defaults[i];
    memset(faults, 0, sizeof faults);
}

API int sim_fail(const char *name, int error, int times)
{
    LOCKED;
    int call = find(name, call_names, CALLS);
    if (call < 0) return E_PARAM;
    faults[call].error = error;
    faults[call].times = times;
    return OK;
}

/* -1: there is no such counter. */
API int64_t sim_count(const char *name)
{
    LOCKED;
    int call = find(name, call_names, CALLS);
    return call < 0 ? -1 : counters[call];
}

/* Forgets the old log and starts one of at most `capacity` records; of 0, none. */
API void sim_truth_start(int64_t capacity)
{
    LOCKED;
    while (truth_log.size) drop(truth_log.entries[--truth_log.size].moment);
    free(truth_log.entries);
    truth_log.entries = malloc((size_t)(capacity + 1) * sizeof *truth_log.entries);
    truth_log.capacity = capacity;
    truth_log.overflowed = false;
    truth_log.on = capacity > 0;
}

API void sim_truth_stop(void)
{
    LOCKED;
    truth_log.on = false;
}

struct truth { int64_t event, device, stream_id, device_ns, host_ns; };

/* Fills in what has executed by now, at most the log's capacity.  -1: records are missing from the log. */
API int64_t sim_truth(struct truth *out)
{
    LOCKED;
    int64_t count = 0, now = now_ns();
    if (truth_log.overflowed) return -1;
    for (struct logged *entry = truth_log.entries; entry < truth_log.entries + truth_log.size; entry++) {
        const struct moment *moment = entry->moment;
        if (now < moment->at) continue;
        out[count++] = (struct truth){
            (intptr_t)entry->event, moment->device, entry->stream_id,
            device_ns(moment->device, moment->at), moment->at,
        };
    }
    return count;
}

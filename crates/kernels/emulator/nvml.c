// A library with the functions of NVML that herd asks for, and known answers: for tests on machines without one.
// UNSUPPORTED: the GPU has nothing of what was asked. OLD: functions under their former names, and one is missing.

#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10 };

#ifdef UNSUPPORTED
#define ANSWER(set) { return NOT_SUPPORTED; }
#else
#define ANSWER(set) { set; return SUCCESS; }
#endif

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct {
    void *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} Event;

static int gpu, events, events_left = 2;

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
    if (strcmp(bus, "0000:17:00.0") != 0) return NOT_FOUND;
    *device = &gpu;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    if (device != &gpu) return NOT_FOUND;
    ANSWER((memory->total = 80ull << 30, memory->used = 61ull << 30, memory->free = 19ull << 30))
}

int nvmlDeviceGetClockInfo(void *device, unsigned kind, unsigned *mhz) {
    if (device != &gpu || kind < 1 || 2 < kind) return NOT_FOUND;
    ANSWER(*mhz = kind == 1 ? 1980 : 2619)
}

#ifndef OLD
int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *celsius) {
    if (device != &gpu || sensor != 0) return NOT_FOUND;
    ANSWER(*celsius = 45)
}
#endif

int nvmlDeviceGetTotalEccErrors(void *device, unsigned kind, unsigned counter, unsigned long long *errors) {
    // Uncorrected, since the driver was loaded.
    if (device != &gpu || kind != 1 || counter != 0) return NOT_FOUND;
    ANSWER(*errors = 3)
}

#ifdef OLD
#define REASONS nvmlDeviceGetCurrentClocksThrottleReasons
#define WAIT nvmlEventSetWait
#else
#define REASONS nvmlDeviceGetCurrentClocksEventReasons
#define WAIT nvmlEventSetWait_v2
#endif

int REASONS(void *device, unsigned long long *reasons) {
    if (device != &gpu) return NOT_FOUND;
    // Idle, a power cap, and one that is not known yet.
    ANSWER(*reasons = 0x1 | 0x4 | 0x4000)
}

int nvmlEventSetCreate(void **set) { ANSWER(*set = &events) }
int nvmlEventSetFree(void *set) { return set == &events ? SUCCESS : NOT_FOUND; }

int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
    return device == &gpu && types == 8 && set == &events ? SUCCESS : NOT_SUPPORTED;
}

int WAIT(void *set, Event *event, unsigned timeout_ms) {
    if (set != &events || timeout_ms != 0) return NOT_FOUND;
    if (events_left == 0) return TIMEOUT;
    events_left -= 1;
    event->device = &gpu;
    event->type = 8;
    // 31 first, then 79.
    event->data = events_left == 1 ? 31 : 79;
    return SUCCESS;
}

// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 that writes down what it is called with, for test_cuda_bindings.py: it shows that the arguments of
// CudaDriver pass through the real cuda-bindings as they are meant. Functions that are not listed return 0.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
typedef struct { int type, id; } Location;
typedef struct { int type, handle_types; Location location; } Prop;  // the head of CUmemAllocationProp
typedef struct { Location location; int flags; } Access;             // the head of CUmemAccessDesc

static void say(const char *format, u64 a, u64 b, u64 c, u64 d) {
  FILE *log = fopen(getenv("CUDA_STUB_LOG"), "a");
  fprintf(log, format, a, b, c, d);
  fputc('\n', log);
  fclose(log);
}
#define SAY(format, a, b, c, d) say(format, (u64)(a), (u64)(b), (u64)(c), (u64)(d))

static int nothing(void) { return 0; }
static int device_get(int *device, int ordinal) { SAY("cuDeviceGet %llu", ordinal, 0, 0, 0); *device = 40; return 0; }
static int bus_id(char *text, int length, int device) {
  SAY("cuDeviceGetPCIBusId %llu %llu", length, device, 0, 0);
  strcpy(text, "0000:3B:00.0");
  return 0;
}
static int retain(void **context, int device) { SAY("cuDevicePrimaryCtxRetain %llu", device, 0, 0, 0); *context = (void *)0x77; return 0; }
static int set_current(void *context) { SAY("cuCtxSetCurrent %#llx", context, 0, 0, 0); return 0; }
static int exchange(int *mode) { SAY("cuThreadExchangeStreamCaptureMode %llu", *mode, 0, 0, 0); return 0; }
static int granularity(size_t *out, const Prop *prop, int flag) {
  SAY("cuMemGetAllocationGranularity type=%llu location=%llu:%llu flag=%llu", prop->type, prop->location.type, prop->location.id, flag);
  *out = 2 << 20;
  return 0;
}
static int reserve(u64 *out, size_t size, size_t align, u64 address, u64 flags) {
  SAY("cuMemAddressReserve %#llx %#llx %llu %llu", size, align, address, flags);
  *out = 0xa00000000000;
  return 0;
}
static int address_free(u64 address, size_t size) { SAY("cuMemAddressFree %#llx %#llx", address, size, 0, 0); return 0; }
static int create(u64 *handle, size_t size, const Prop *prop, u64 flags) {
  SAY("cuMemCreate %#llx location=%llu:%llu %llu", size, prop->location.type, prop->location.id, flags);
  *handle = 0xb0b0;
  return size > 1ull << 40 ? 2 : 0;
}
static int release(u64 handle) { SAY("cuMemRelease %#llx", handle, 0, 0, 0); return 0; }
static int map(u64 address, size_t size, size_t offset, u64 handle, u64 flags) {
  if (flags) return 1;
  SAY("cuMemMap %#llx %#llx %llu %#llx", address, size, offset, handle);
  return 0;
}
static int set_access(u64 address, size_t size, const Access *access, size_t count) {
  SAY("cuMemSetAccess %#llx %#llx", address, size, 0, 0);
  SAY(" location=%llu:%llu flags=%llu count=%llu", access->location.type, access->location.id, access->flags, count);
  return 0;
}
static int unmap(u64 address, size_t size) { SAY("cuMemUnmap %#llx %#llx", address, size, 0, 0); return 0; }
static int host_alloc(void **out, size_t size, unsigned flags) {
  SAY("cuMemHostAlloc %#llx %llu", size, flags, 0, 0);
  *out = (void *)0xc000;
  return 0;
}
static int host_free(void *address) { SAY("cuMemFreeHost %#llx", address, 0, 0, 0); return 0; }
static int host_register(void *address, size_t size, unsigned flags) { SAY("cuMemHostRegister %#llx %#llx %llu", address, size, flags, 0); return 0; }
static int host_unregister(void *address) { SAY("cuMemHostUnregister %#llx", address, 0, 0, 0); return 0; }
static int stream_create(void **out, unsigned flags) { SAY("cuStreamCreate %llu", flags, 0, 0, 0); *out = (void *)0xd000; return 0; }
static int stream_sync(void *stream) { SAY("cuStreamSynchronize %#llx", stream, 0, 0, 0); return 0; }
static int wait_event(void *stream, void *event, unsigned flags) { SAY("cuStreamWaitEvent %#llx %#llx %llu", stream, event, flags, 0); return 0; }
static int event_create(void **out, unsigned flags) { SAY("cuEventCreate %llu", flags, 0, 0, 0); *out = (void *)(flags == 1 ? 0xe001 : 0xe000); return 0; }
static int event_record(void *event, void *stream) { SAY("cuEventRecord %#llx %#llx", event, stream, 0, 0); return 0; }
static int event_sync(void *event) { SAY("cuEventSynchronize %#llx", event, 0, 0, 0); return 0; }
static int event_query(void *event) { SAY("cuEventQuery %#llx", event, 0, 0, 0); return event == (void *)0xe000 ? 600 : 0; }
static int elapsed(float *ms, void *start, void *end) { SAY("cuEventElapsedTime %#llx %#llx", start, end, 0, 0); *ms = 2.5f; return 0; }
static int memset_async(u64 address, unsigned char byte, size_t size, void *stream) {
  SAY("cuMemsetD8Async %#llx %llu %#llx %#llx", address, byte, size, stream);
  return 0;
}
static int copy_in(u64 address, const void *host, size_t size, void *stream) {
  SAY("cuMemcpyHtoDAsync %#llx %#llx %#llx %#llx", address, host, size, stream);
  return 0;
}
static int copy_out(void *host, u64 address, size_t size, void *stream) {
  SAY("cuMemcpyDtoHAsync %#llx %#llx %#llx %#llx", host, address, size, stream);
  return 0;
}

static const struct { const char *name; void *function; } functions[] = {
    {"cuDeviceGet", device_get}, {"cuDeviceGetPCIBusId", bus_id}, {"cuDevicePrimaryCtxRetain", retain},
    {"cuCtxSetCurrent", set_current}, {"cuThreadExchangeStreamCaptureMode", exchange},
    {"cuMemGetAllocationGranularity", granularity}, {"cuMemAddressReserve", reserve},
    {"cuMemAddressFree", address_free}, {"cuMemCreate", create}, {"cuMemRelease", release}, {"cuMemMap", map},
    {"cuMemSetAccess", set_access}, {"cuMemUnmap", unmap}, {"cuMemHostAlloc", host_alloc},
    {"cuMemFreeHost", host_free}, {"cuMemHostRegister", host_register}, {"cuMemHostUnregister", host_unregister}, {"cuStreamCreate", stream_create}, {"cuStreamSynchronize", stream_sync},
    {"cuStreamWaitEvent", wait_event}, {"cuEventCreate", event_create}, {"cuEventRecord", event_record},
    {"cuEventSynchronize", event_sync}, {"cuEventQuery", event_query}, {"cuEventElapsedTime", elapsed}, {"cuMemsetD8Async", memset_async}, {"cuMemcpyHtoDAsync", copy_in},
    {"cuMemcpyDtoHAsync", copy_out},
};

int cuInit(unsigned flags) { return (int)flags; }
int cuGetProcAddress_v2(const char *name, void **function, int version, u64 flags, void *status) {
  *function = nothing;
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
    if (!strcmp(functions[i].name, name)) *function = functions[i].function;
  if (!strcmp(name, "cuInit")) *function = cuInit;
  if (!strcmp(name, "cuGetProcAddress")) *function = cuGetProcAddress_v2;
  return 0;
}

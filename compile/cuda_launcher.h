/* The kernels and the code of one CUDA library, as cuda_link.py writes them down, and the driver. */
#ifndef NORMGRAPH_CUDA_LAUNCHER_H_
#define NORMGRAPH_CUDA_LAUNCHER_H_

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

/* params: p pointer, l int64, i int32, b bool, f float, d double. launch: x y z the grid, X Y Z the
 * block, m bytes of dynamic shared memory; c: its blocks wait for one another. */
typedef struct {
  const char *name, *params, *launch;
} normgraph_kernel;

/* Machine code for a capability (90 for sm_90), or PTX. */
typedef struct {
  int capability, ptx;
  const unsigned char* data;
} normgraph_image;

/* The part of the driver API that is used, by its stable numbers and names. */
typedef int status;
typedef void *context, *module, *function, *stream, *pool;
typedef uint64_t address;
enum { NOT_INITIALIZED = 3, TOO_LARGE = 720, DEVICE_TYPE_CUDA = 2, CAPTURE_RELAXED = 2 };
enum { ATTR_MAJOR = 75, ATTR_MINOR = 76, ATTR_POOLS = 115 };
enum { MAX_DYNAMIC_SHARED = 8, SHARED_CARVEOUT = 9, POOL_KEEPS = 4, JIT_LOG = 5, JIT_LOG_BYTES = 6 };

/* CUmemPoolProps */
typedef struct {
  int alloc_type, handle_types, location_type, location_id;
  void* win32;
  size_t max_size;
  unsigned char reserved[56];
} pool_properties;

typedef struct {
  status (*init)(unsigned);
  status (*driver_version)(int*);
  status (*device_get)(int*, int);
  status (*device_attribute)(int*, int, int);
  status (*context_retain)(context*, int);
  status (*context_current)(context*);
  status (*context_push)(context);
  status (*context_pop)(context*);
  status (*module_load)(module*, const void*, unsigned, int*, void**);
  status (*module_function)(function*, module, const char*);
  status (*function_attribute)(function, int, int);
  status (*occupancy)(int*, function, int, size_t);
  status (*launch)(function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   stream, void**, void**);
  status (*launch_together)(function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                            unsigned, stream, void**);
  status (*error_name)(status, const char**);
  status (*error_string)(status, const char**);
  status (*exchange_capture_mode)(int*);
  status (*pool_create)(pool*, const pool_properties*);
  status (*pool_set)(pool, int, void*);
  status (*pool_alloc)(address*, size_t, pool, stream);
  status (*pool_free)(address, stream);
} driver_api;

/* A device this library has been loaded on. */
typedef struct {
  context primary;
  function* functions; /* in the order of normgraph_kernels */
  int* dynamic_shared; /* bytes a function may use so far */
  pool workspaces;     /* made with the first of them */
  int apart;           /* it has refused to launch blocks together */
} device;

#pragma GCC visibility push(hidden)
extern const normgraph_kernel normgraph_kernels[];
extern const int normgraph_kernel_count;
extern const normgraph_image normgraph_images[];
extern const int normgraph_image_count;
extern const char normgraph_image_names[];

/* cuda_device.c */

extern driver_api normgraph_cu;
extern pthread_mutex_t normgraph_lock;
/* The device of the call this thread is in. */
extern _Thread_local int normgraph_device;

/* Set the error that the call ends with; the result is -1. */
int normgraph_fail(const char* text);
int normgraph_failed(status code, const char* doing);
/* The current device with this library's code on it, loaded the first time; NULL: an error is set. */
device* normgraph_loaded(void);
/* The same of a device that is loaded already. */
device* normgraph_opened(void);
/* Makes the device's context current where it is not; `pushed` says whether to undo that. */
int normgraph_enter(device* here, int* pushed);
void normgraph_leave(int pushed);

/* cuda_team.c */

/* Whether so many blocks of a kernel that wait for one another can be resident together. */
int normgraph_have_room(const device* here, int index, unsigned threads, unsigned shared,
                        int64_t blocks);
/* They cannot: host code that asks gets to know it, and is told of no teams from now on. */
void normgraph_refuse(device* here);
#pragma GCC visibility pop

#endif

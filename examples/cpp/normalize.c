/* Instance norm forward and backward on a picture, from C.
 *
 * usage: normalize LIBRARY PICTURE.ppm
 * LIBRARY: the .so of an artifact of instance_norm over (N, 3, H, W) in float32 for this CPU; it
 * is not checked here. docs/c-hosts.md has the command that compiles this, and describes the calls.
 */
#include <dlfcn.h>
#include <stdarg.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#include "picture.h"
#include "plain_norm.h"

enum { MOST_TENSORS = 8 };
enum { NONE, WRITE, ADD }; /* what is asked of an output, two bits each */

static const double eps = 1e-5; /* of the spec; the manifest says it */

/* A compact float32 tensor on the CPU over memory of ours. */
typedef struct {
  DLTensor head;
  int64_t shape[4];
} tensor;

static void describe(tensor* it, float* data, int rank, const int64_t* shape) {
  memset(it, 0, sizeof *it);
  memcpy(it->shape, shape, (size_t)rank * sizeof *shape);
  it->head.data = data;
  it->head.device.device_type = kDLCPU;
  it->head.ndim = rank;
  it->head.dtype.code = kDLFloat;
  it->head.dtype.bits = 32;
  it->head.dtype.lanes = 1;
  it->head.shape = it->shape;
  it->head.strides = NULL; /* compact, row-major */
}

/* Prints what went wrong in the call that failed last on this thread. */
static void print_error(void) {
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  if (!error) return;
  const TVMFFIErrorCell* cell = (const TVMFFIErrorCell*)((char*)error + sizeof(TVMFFIObject));
  fprintf(stderr, "%.*s: %.*s\n", (int)cell->kind.size, cell->kind.data, (int)cell->message.size,
          cell->message.data);
  TVMFFIObjectDecRef(error);
}

/* Calls a function of the library with tensors and the request; the last argument is NULL. */
static int call(void* library, const char* symbol, int64_t request, ...) {
  TVMFFISafeCallType function = (TVMFFISafeCallType)dlsym(library, symbol);
  if (!function) {
    fprintf(stderr, "the library has no %s\n", symbol);
    return 0;
  }
  TVMFFIAny arguments[MOST_TENSORS + 1], result;
  memset(arguments, 0, sizeof arguments);
  memset(&result, 0, sizeof result);
  int count = 0;
  va_list rest;
  va_start(rest, request);
  for (tensor* each; count < MOST_TENSORS && (each = va_arg(rest, tensor*)); ++count) {
    arguments[count].type_index = kTVMFFIDLTensorPtr;
    arguments[count].v_ptr = &each->head;
  }
  va_end(rest);
  arguments[count].type_index = kTVMFFIInt;
  arguments[count].v_int64 = request;
  if (function(NULL, arguments, count + 1, &result) == 0) return 1;
  print_error();
  return 0;
}

/* The whole computation; 1 where everything is right. */
static int run(void* library, const picture* photo) {
  size_t m = (size_t)(photo->height * photo->width), count = 3 * m;
  float* memory = (float*)malloc(3 * count * sizeof(float));
  double* answers = (double*)malloc(2 * count * sizeof(double));
  if (!memory || !answers) return fprintf(stderr, "no memory\n"), 0;
  float *y_data = memory, *dy_data = y_data + count, *dx_data = dy_data + count;
  float gamma_data[3] = {0.5f, 1.0f, 2.0f}, beta_data[3] = {0.1f, 0.0f, -0.3f};
  float mean_data[3], inv_std_data[3], dgamma_data[3], dbeta_data[3], one[1];

  tensor x, gamma, beta, y, mean, inv_std, dy, dx, dgamma, dbeta, no_dx, no_dbeta;
  const int64_t image[] = {1, 3, photo->height, photo->width}, planes[] = {1, 3, 1, 1};
  const int64_t channels[] = {3}, ones[] = {1, 1, 1, 1};
  describe(&x, photo->values, 4, image);
  describe(&gamma, gamma_data, 1, channels);
  describe(&beta, beta_data, 1, channels);
  describe(&y, y_data, 4, image);
  describe(&mean, mean_data, 4, planes);
  describe(&inv_std, inv_std_data, 4, planes);
  int64_t all_three = WRITE | WRITE << 2 | WRITE << 4;
  if (!call(library, "__tvm_ffi_forward", all_three, &x, &gamma, &beta, &y, &mean, &inv_std, NULL))
    return 0;

  /* The gradient of sum(y^4) / 4. */
  for (size_t i = 0; i < count; ++i) dy_data[i] = y_data[i] * y_data[i] * y_data[i];
  describe(&dy, dy_data, 4, image);
  describe(&dx, dx_data, 4, image);
  describe(&dgamma, dgamma_data, 1, channels);
  describe(&dbeta, dbeta_data, 1, channels);
  if (!call(library, "__tvm_ffi_backward", all_three, &dy, &x, &gamma, &mean, &inv_std, &dx,
            &dgamma, &dbeta, NULL))
    return 0;

  /* Once more, only to add to dgamma: the other outputs need no memory of their size. */
  describe(&no_dx, one, 4, ones);
  describe(&no_dbeta, one, 1, ones);
  if (!call(library, "__tvm_ffi_backward", NONE | ADD << 2 | NONE << 4, &dy, &x, &gamma, &mean,
            &inv_std, &no_dx, &dgamma, &no_dbeta, NULL))
    return 0;

  double *right_y = answers, *right_dx = answers + count;
  double right_mean[3], right_inv_std[3], right_dgamma[3], right_dbeta[3];
  for (size_t c = 0; c < 3; ++c) {
    const float* plane = photo->values + c * m;
    plain_forward(plane, m, gamma_data[c], beta_data[c], eps, right_y + c * m, &right_mean[c],
                  &right_inv_std[c]);
    plain_backward(dy_data + c * m, plane, m, gamma_data[c], right_mean[c], right_inv_std[c],
                   right_dx + c * m, &right_dgamma[c], &right_dbeta[c]);
    right_dgamma[c] *= 2; /* it was added to itself */
  }
  int right = is_close("y", y_data, right_y, count, 1e-5);
  right &= is_close("mean", mean_data, right_mean, 3, 1e-6);
  right &= is_close("inv_std", inv_std_data, right_inv_std, 3, 1e-5);
  right &= is_close("dx", dx_data, right_dx, count, 1e-5);
  right &= is_close("dgamma", dgamma_data, right_dgamma, 3, 1e-5);
  right &= is_close("dbeta", dbeta_data, right_dbeta, 3, 1e-5);
  free(memory);
  free(answers);
  return right;
}

int main(int argc, char** argv) {
  picture photo;
  if (argc != 3) return fprintf(stderr, "usage: %s LIBRARY PICTURE.ppm\n", argv[0]), 2;
  if (!read_picture(argv[2], &photo)) return fprintf(stderr, "%s: no PPM picture\n", argv[2]), 2;
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 3;
  int right = run(library, &photo);
  free(photo.values);
  return right ? 0 : 1;
}

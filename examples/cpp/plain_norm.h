/* Instance norm by plain loops in double: what the kernels' results are held against. */
#ifndef PLAIN_NORM_H_
#define PLAIN_NORM_H_

#include <math.h>
#include <stddef.h>
#include <stdio.h>

/* One plane of m values: y = (x - mean) * inv_std * gamma + beta. */
static inline void plain_forward(const float* x, size_t m, double gamma, double beta, double eps,
                                 double* y, double* mean, double* inv_std) {
  double sum = 0, squares = 0;
  for (size_t i = 0; i < m; ++i) sum += x[i];
  *mean = sum / (double)m;
  for (size_t i = 0; i < m; ++i) squares += (x[i] - *mean) * (x[i] - *mean);
  *inv_std = 1 / sqrt(squares / (double)m + eps);
  for (size_t i = 0; i < m; ++i) y[i] = (x[i] - *mean) * *inv_std * gamma + beta;
}

/* Its gradients: dx = gamma * inv_std * (dy - dbeta/m - x_hat * dgamma/m). */
static inline void plain_backward(const float* dy, const float* x, size_t m, double gamma,
                                  double mean, double inv_std, double* dx, double* dgamma,
                                  double* dbeta) {
  *dgamma = *dbeta = 0;
  for (size_t i = 0; i < m; ++i) {
    *dgamma += dy[i] * (x[i] - mean) * inv_std;
    *dbeta += dy[i];
  }
  for (size_t i = 0; i < m; ++i) {
    double x_hat = (x[i] - mean) * inv_std;
    dx[i] = gamma * inv_std * (dy[i] - *dbeta / (double)m - x_hat * *dgamma / (double)m);
  }
}

/* Prints the largest error relative to the largest answer; 1 where it is within the bound. */
static inline int is_close(const char* name, const float* got, const double* answer, size_t count,
                           double bound) {
  double error = 0, scale = 0;
  for (size_t i = 0; i < count; ++i) {
    double difference = fabs(got[i] - answer[i]);
    /* Not max(): a NaN has to stay. */
    if (!(difference <= error)) error = difference;
    if (fabs(answer[i]) > scale) scale = fabs(answer[i]);
  }
  int close = error <= bound * scale;
  printf("%-8s error %.1e of the largest value %.4g: %s\n", name, error / scale, scale,
         close ? "ok" : "WRONG");
  return close;
}

#endif

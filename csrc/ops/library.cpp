// Defines the operators; each backend registers its kernels for them.
#include "dense.h"
#include "factored.h"
#include "factored_linear.h"
#include "power_iteration.h"

STABLE_TORCH_LIBRARY(zoext, m) {
  using namespace zoext::ops;
  for (const char* schema : {normal_schema, noise_axpy_schema, noise_copy_schema, noise_copies_schema,
                             noise_window_schema, factored_axpy_schema, factored_copy_schema,
                             factored_window_schema, factored_linear_schema, power_iteration_schema})
    m.def(schema);
}

// The Python module medbridge._native. Each part of the extension binds its own functions; none holds Python code elsewhere.
#include "arrays.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native routines of medbridge; use them through medbridge.support.";
  medbridge::bind_passk(m);
  medbridge::bind_votes(m);
  medbridge::bind_rewards(m);
  medbridge::bind_bootstrap(m);
  medbridge::bind_spectrum(m);
}

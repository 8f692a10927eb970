#include "arrays.h"

namespace medbridge {

void bind_bootstrap(py::module_&) {}

}  // namespace medbridge

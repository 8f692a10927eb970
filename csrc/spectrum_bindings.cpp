#include "arrays.h"

namespace medbridge {

void bind_spectrum(py::module_&) {}

}  // namespace medbridge

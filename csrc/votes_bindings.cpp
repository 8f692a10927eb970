#include "arrays.h"

namespace medbridge {

void bind_votes(py::module_&) {}

}  // namespace medbridge

#include "arrays.h"

namespace medbridge {

void bind_rewards(py::module_&) {}

}  // namespace medbridge

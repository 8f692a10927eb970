#pragma once

namespace medbridge {}

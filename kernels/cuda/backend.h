// The backend of a CUDA device: copies to it, launches, copies back.
#pragma once

#include <memory>
#include <string>

#include "kernels/backend.h"

namespace moeaudit::kernels::cuda {

/// Null, and why, where no device can be used. Calls of several threads take turns.
std::unique_ptr<Backend> open_backend(std::string* why_not);

}  // namespace moeaudit::kernels::cuda

// Copies out of mapped tensors; a page that cannot be read is a false, not a SIGBUS.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "audit/tensors/guarded_read.h"
#include "audit/traces/trace.h"

namespace moeaudit {
namespace {

bool inside(const TensorView& view, std::int64_t first, std::int64_t count) {
  const std::int64_t size = size_of(view.dtype);
  if (size == 0 || first < 0 || count < 0) return false;
  const std::int64_t stored = static_cast<std::int64_t>(view.bytes.size()) / size;
  return first <= stored && count <= stored - first;
}

template <class Out>
bool decode_guarded(const TensorView& view, std::int64_t first, std::int64_t count, Out* out) {
  const ReadGuard guard;
  bool decoded = false;
  return guard.guarded([&] { decoded = decode(view, first, count, out); }) && decoded;
}

/// to(value): any integer to Out.
template <class Out, class To>
bool copy_integers(const TensorView& view, std::int64_t first, std::int64_t count, Out* out, To to) {
  if (!inside(view, first, count)) return false;
  const std::byte* from = view.bytes.data() + first * size_of(view.dtype);
  auto copy = [&]<class Stored>(Stored value) {
    for (std::int64_t i = 0; i < count; ++i) {
      std::memcpy(&value, from + i * static_cast<std::int64_t>(sizeof value), sizeof value);
      out[i] = to(value);
    }
  };
  bool known = true;
  const ReadGuard guard;
  const bool read = guard.guarded([&] {
    switch (view.dtype) {
      case DType::kI64: copy(std::int64_t{}); break;
      case DType::kI32: copy(std::int32_t{}); break;
      case DType::kI16: copy(std::int16_t{}); break;
      case DType::kI8: copy(std::int8_t{}); break;
      case DType::kU64: copy(std::uint64_t{}); break;
      case DType::kU32: copy(std::uint32_t{}); break;
      case DType::kU16: copy(std::uint16_t{}); break;
      case DType::kU8:
      case DType::kBool: copy(std::uint8_t{}); break;
      default: known = false;
    }
  });
  return read && known;
}

}  // namespace

bool read_values(const TensorView& view, std::int64_t first, std::int64_t count, double* out) {
  return decode_guarded(view, first, count, out);
}

bool read_values(const TensorView& view, std::int64_t first, std::int64_t count, float* out) {
  return decode_guarded(view, first, count, out);
}

bool read_ids(const TensorView& view, std::int64_t first, std::int64_t count, std::int32_t* out) {
  return copy_integers(view, first, count, out, [](auto value) {
    constexpr std::int32_t kNoExpert = std::numeric_limits<std::int32_t>::max();
    return std::in_range<std::int32_t>(value) ? static_cast<std::int32_t>(value) : kNoExpert;
  });
}

bool read_counts(const TensorView& view, std::int64_t first, std::int64_t count, std::int64_t* out) {
  return copy_integers(view, first, count, out, [](auto value) {
    return std::in_range<std::int64_t>(value) ? static_cast<std::int64_t>(value)
                                              : std::numeric_limits<std::int64_t>::max();
  });
}

bool read_flags(const TensorView& view, std::int64_t first, std::int64_t count, std::uint8_t* out) {
  return copy_integers(view, first, count, out, [](auto value) { return static_cast<std::uint8_t>(value != 0); });
}

void drop_pages(const TensorView& view, std::int64_t count) {
  if (view.file < 0 || !inside(view, 0, count)) return;  // memory of our own would be lost, not read again
  static const std::uintptr_t page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto from = reinterpret_cast<std::uintptr_t>(view.bytes.data());
  const std::uintptr_t begin = (from + page - 1) / page * page;
  const std::uintptr_t end = (from + static_cast<std::uintptr_t>(count * size_of(view.dtype))) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace moeaudit

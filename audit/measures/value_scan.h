// The weight scan of a tensor's values, whatever the way they are stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "audit/tensors/stored_values.h"
#include "kernels/host/weight_scan.h"

namespace moeaudit {

/// Scans runs of one tensor. Long runs are cut into pieces that do not depend on threads, so the result does not
/// either. The hash is of the stored bytes; of a coded tensor, whose codes mean nothing without their scales, of its
/// values as float64.
class ValueScan {
 public:
  ValueScan(const TensorStore& store, const TensorView& tensor);

  const StoredValues& values() const { return values_; }
  /// Values of one piece, the last one of a run may be shorter.
  std::int64_t piece_length() const { return piece_; }
  /// Bytes that values [first, first + count) take, without their scales. Runs begin at whole bytes.
  std::span<const std::byte> bytes(std::int64_t first, std::int64_t count) const;

  /// One piece of a run, count <= piece_length(). `scratch` has room for scratch_length() values; nothing is allocated.
  kernels::ScanResult piece(std::int64_t first, std::int64_t count, double* scratch) const;
  static std::int64_t scratch_length();
  /// All pieces of a run in order.
  kernels::ScanResult run(std::int64_t first, std::int64_t count, double* scratch) const;

 private:
  StoredValues values_;
  const TensorView* tensor_;
  kernels::Stored stored_;
  std::int64_t piece_;
};

/// 16 hex digits.
std::string hash_text(std::uint64_t hash);

}  // namespace moeaudit

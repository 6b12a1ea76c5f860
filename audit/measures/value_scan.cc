#include "audit/measures/value_scan.h"

#include <algorithm>
#include <cstdio>

namespace moeaudit {

namespace k = kernels;

namespace {

constexpr std::int64_t kCodedPiece = std::int64_t{1} << 18;  // values of a coded piece
constexpr std::int64_t kCodedScratch = std::int64_t{1}
                                       << 13;  // decoded at a time: 64 KiB, the first levels of the cache

k::Stored stored_of(const StoredValues& values, DType dtype) {
  if (values.kind() != StoredValues::Kind::kPlain) return k::Stored::kBytes;
  switch (dtype) {
    case DType::kF64: return k::Stored::kF64;
    case DType::kF32: return k::Stored::kF32;
    case DType::kBF16: return k::Stored::kBF16;
    case DType::kF16: return k::Stored::kF16;
    case DType::kF8E4M3: return k::Stored::kE4M3;
    case DType::kF8E5M2: return k::Stored::kE5M2;
    default: return k::Stored::kBytes;
  }
}

}  // namespace

ValueScan::ValueScan(const TensorStore& store, const TensorView& tensor)
    : values_(StoredValues::of(store, tensor)), tensor_(&tensor), stored_(stored_of(values_, tensor.dtype)) {
  piece_ = values_.kind() == StoredValues::Kind::kCoded ? kCodedPiece : k::kScanPiece / k::stored_size(stored_);
}

std::int64_t ValueScan::scratch_length() { return kCodedScratch; }

std::span<const std::byte> ValueScan::bytes(std::int64_t first, std::int64_t count) const {
  const std::int64_t size = values_.kind() == StoredValues::Kind::kPlain ? k::stored_size(stored_) : 1;
  const auto at = static_cast<std::size_t>(values_.two_a_byte() ? first / 2 : first * size);
  const auto length = static_cast<std::size_t>(values_.two_a_byte() ? count / 2 + count % 2 : count * size);
  return tensor_->bytes.subspan(at, length);
}

k::ScanResult ValueScan::piece(std::int64_t first, std::int64_t count, double* scratch) const {
  k::ScanResult result;
  if (values_.kind() != StoredValues::Kind::kCoded) {
    k::scan_piece(stored_, bytes(first, count).data(), count, &result);
    return result;
  }
  for (std::int64_t from = 0; from < count; from += kCodedScratch) {
    const std::int64_t n = std::min(kCodedScratch, count - from);
    values_.decode(first + from, n, scratch);
    k::ScanResult part;
    k::scan_piece(k::Stored::kF64, scratch, n, &part);
    k::append(part, &result);
  }
  return result;
}

k::ScanResult ValueScan::run(std::int64_t first, std::int64_t count, double* scratch) const {
  k::ScanResult result;
  for (std::int64_t from = 0; from < count; from += piece_) {
    k::append(piece(first + from, std::min(piece_, count - from), scratch), &result);
  }
  return result;
}

std::string hash_text(std::uint64_t hash) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace moeaudit

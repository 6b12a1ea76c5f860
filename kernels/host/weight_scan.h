// One pass over stored weights: what is not finite, smallest and largest value, exact zeros, sum, sum of squares, and a
// hash of the bytes. Host kernel.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/host/router.h"

namespace moeaudit::kernels {

/// How one value is stored, little-endian. kE4M3 has no infinities (float8_e4m3fn: S.1111.111 is NaN). kBytes holds no
/// values: it is only hashed.
enum class Stored { kF64, kF32, kBF16, kF16, kE4M3, kE5M2, kI8, kBytes };

constexpr std::int64_t stored_size(Stored type) {
  return type == Stored::kF64 ? 8 : type == Stored::kF32 ? 4 : type == Stored::kBF16 || type == Stored::kF16 ? 2 : 1;
}

/// What is known of a run of values. `min` and `max` are over the finite ones, NaN if there are none; a zero among them
/// is +0. The sums are over the finite values, too; with kBytes `min`, `max` and the sums are NaN.
struct ScanResult {
  std::int64_t elements = 0;
  std::int64_t non_finite = 0;         // NaN and infinities
  std::int64_t first_non_finite = -1;  // index of the first one, -1 if there is none
  std::int64_t zeros = 0;              // exact zeros of either sign
  double min = std::numeric_limits<double>::quiet_NaN();
  double max = std::numeric_limits<double>::quiet_NaN();
  double sum = 0;
  double sum_of_squares = 0;
  std::uint64_t hash = 0x9e3779b97f4a7c15;
};

/// Scans values[0, count), stored as `type` from `data` on (any alignment; data[0, count * stored_size) is read,
/// nothing behind it).
///
/// The result depends on the bytes alone, not on vector width, alignment or threads. Sums are in float64. Squares of 32
/// and fewer bits are exact there, so a fused multiply-add has the bits of a separate one; squares of float64 values
/// are rounded before they are added. Order:
///   - pieces of kScanPiece bytes, each from zero; their sums are added in order (append());
///   - in a piece, blocks of kScanBlock bytes, each from zero; value i of a block goes to accumulator i mod 16 (mod 8
///   for
///     float64), in order of i; the accumulators of the blocks are added in order, each to its own;
///   - at the end of a piece accumulator j + h is added to j, for h = 8, 4, 2, 1 (float64: from 4) and all j < h.
///
/// The hash has 64 bits and is meant to find equal tensors, not to withstand forgers. A piece is read as steps of eight
/// 64-bit words w, the last step padded with zeros; lane i of four becomes fold((w[2i] ^ key[i]) * (w[2i + 1] ^
/// lane[i])), where fold xors the halves of the 128-bit product. The length, the lanes and then the pieces are chained
/// through the finaliser of splitmix64.
inline constexpr std::int64_t kScanPiece = 1 << 20;
inline constexpr std::int64_t kScanBlock = 1 << 14;

Status scan(Stored type, const void* data, std::int64_t count, ScanResult* result);

/// What `scan` does for one piece, count * stored_size(type) <= kScanPiece: to spread the pieces of a tensor over
/// threads. append()ed in order to a ScanResult{}, the pieces give what scan() gives.
Status scan_piece(Stored type, const void* data, std::int64_t count, ScanResult* piece);
void append(const ScanResult& piece, ScanResult* result);

}  // namespace moeaudit::kernels

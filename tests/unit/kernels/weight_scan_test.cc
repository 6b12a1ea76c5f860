// Weight scan: the written order of the sums and the written hash bit for bit, on every instruction set; what is not
// finite; any length and alignment.
#include "kernels/host/weight_scan.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "audit/tensors/tensor_store.h"
#include "tests/support/on_every_target.h"

namespace moeaudit::kernels {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr Stored kAll[] = {Stored::kF64,  Stored::kF32,  Stored::kBF16, Stored::kF16,
                           Stored::kE4M3, Stored::kE5M2, Stored::kI8};
DType dtype_of(Stored s) {
  switch (s) {
    case Stored::kF64: return DType::kF64;
    case Stored::kF32: return DType::kF32;
    case Stored::kBF16: return DType::kBF16;
    case Stored::kF16: return DType::kF16;
    case Stored::kE4M3: return DType::kF8E4M3;
    case Stored::kE5M2: return DType::kF8E5M2;
    case Stored::kI8: return DType::kI8;
    case Stored::kBytes: return DType::kU8;
  }
  return DType::kUnknown;
}

/// The values, by the decoder of the tensor store: another piece of code than the kernel's.
std::vector<double> values_of(Stored type, const std::uint8_t* data, std::int64_t count) {
  TensorView view;
  view.dtype = dtype_of(type);
  view.bytes = {reinterpret_cast<const std::byte*>(data), static_cast<std::size_t>(count * stored_size(type))};
  std::vector<double> values(static_cast<std::size_t>(count));
  EXPECT_TRUE(decode(view, 0, count, values.data()));
  return values;
}

/// The order that weight_scan.h writes down, as plain loops.
ScanResult by_the_book(Stored type, const Bytes& bytes, std::int64_t count) {
  const std::vector<double> values = values_of(type, bytes.data(), count);
  const std::int64_t size = stored_size(type), lanes = type == Stored::kF64 ? 8 : 16;
  const std::int64_t block = 16384 / size, piece = 1048576 / size;
  ScanResult r;
  r.elements = count;
  for (std::int64_t p = 0; p < count; p += piece) {
    double sum[16] = {}, square[16] = {};
    const std::int64_t piece_end = std::min(count, p + piece);
    for (std::int64_t b = p; b < piece_end; b += block) {
      double block_sum[16] = {}, block_square[16] = {};
      const std::int64_t end = std::min(piece_end, b + block);
      for (std::int64_t i = b; i < end; ++i) {
        const double v = values[i];
        if (!std::isfinite(v)) {
          if (r.non_finite++ == 0) r.first_non_finite = i;
          continue;
        }
        r.zeros += v == 0;
        if (!(r.min <= v)) r.min = v;
        if (!(r.max >= v)) r.max = v;
        block_sum[(i - b) % lanes] += v;
        const double squared = v * v;
        block_square[(i - b) % lanes] += squared;
      }
      for (int l = 0; l < lanes; ++l) {
        sum[l] += block_sum[l];
        square[l] += block_square[l];
      }
    }
    for (std::int64_t half = lanes / 2; half > 0; half /= 2) {
      for (std::int64_t l = 0; l < half; ++l) {
        sum[l] += sum[l + half];
        square[l] += square[l + half];
      }
    }
    r.sum += sum[0];
    r.sum_of_squares += square[0];
  }
  return r;
}

void expect_same(const ScanResult& got, const ScanResult& want, bool with_hash) {
  const auto same = [](double a, double b) {
    return (std::isnan(a) && std::isnan(b)) || (a == 0 && b == 0 && !std::signbit(a)) ||
           (a != 0 && std::memcmp(&a, &b, sizeof a) == 0);
  };
  EXPECT_EQ(got.elements, want.elements);
  EXPECT_EQ(got.non_finite, want.non_finite);
  EXPECT_EQ(got.first_non_finite, want.first_non_finite);
  EXPECT_EQ(got.zeros, want.zeros);
  EXPECT_TRUE(same(got.min, want.min)) << got.min << " " << want.min;
  EXPECT_TRUE(same(got.max, want.max)) << got.max << " " << want.max;
  EXPECT_TRUE(same(got.sum, want.sum)) << got.sum << " " << want.sum;
  EXPECT_TRUE(same(got.sum_of_squares, want.sum_of_squares)) << got.sum_of_squares << " " << want.sum_of_squares;
  if (with_hash) {
    EXPECT_EQ(got.hash, want.hash);
  }
}

template <class F>
void on_every_target(F&& f) {
  const int seen = test::on_every_target([&] {
    SCOPED_TRACE(host_backend());
    f();
  });
  EXPECT_GE(seen, 2) << "only one instruction set could be tried";
}

Bytes random_bytes(std::size_t n, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(n + 8);
  for (std::size_t i = 0; i < n; i += 8) {
    const std::uint64_t word = random();
    std::memcpy(bytes.data() + i, &word, 8);
  }
  bytes.resize(n);
  return bytes;
}

/// Random codes with what is not finite made a number, but for every `nth` value (0: for all).
Bytes mostly_finite(Stored type, std::int64_t count, std::uint64_t seed, std::int64_t nth) {
  Bytes bytes = random_bytes(static_cast<std::size_t>(count * stored_size(type)), seed);
  const std::vector<double> values = values_of(type, bytes.data(), count);
  const std::int64_t size = stored_size(type);
  for (std::int64_t i = 0; i < count; ++i) {
    if (std::isfinite(values[i]) || (nth > 0 && i % nth == 0)) continue;
    bytes[(i + 1) * size - 1] &= 0x8f;  // top of the exponent gone
  }
  return bytes;
}

TEST(WeightScan, WrittenOrderOnEveryTarget) {
  for (const Stored type : kAll) {
    const std::int64_t size = stored_size(type), block = kScanBlock / size, piece = kScanPiece / size;
    for (const std::int64_t count : {std::int64_t{0}, std::int64_t{1}, std::int64_t{7}, std::int64_t{16},
                                     std::int64_t{33}, 64 / size - 1, 64 / size, 64 / size + 1, 1024 / size + 3,
                                     block - 1, block, block + 5, 3 * block + 17, piece, piece + block + 21}) {
      SCOPED_TRACE(testing::Message() << "type " << static_cast<int>(type) << ", " << count << " values");
      for (const std::int64_t nth : {0, 1, 97}) {
        const Bytes bytes = mostly_finite(type, count, 7 + count, nth);
        const ScanResult want = by_the_book(type, bytes, count);
        if (nth == 0) {
          EXPECT_EQ(want.non_finite, 0);
        }
        std::set<std::uint64_t> hashes;
        on_every_target([&] {
          ScanResult got;
          ASSERT_EQ(scan(type, bytes.data(), count, &got), Status::kOk);
          expect_same(got, want, false);
          ScanResult plain;  // the hash is of the bytes, whatever they stand for
          ASSERT_EQ(scan(Stored::kBytes, bytes.data(), count * size, &plain), Status::kOk);
          EXPECT_EQ(plain.hash, got.hash);
          hashes.insert(got.hash);
        });
        EXPECT_EQ(hashes.size(), 1u);
      }
    }
  }
}

/// Every code of the formats of 8 and 16 bits, alone and in a crowd.
TEST(WeightScan, EveryCode) {
  for (const Stored type : {Stored::kBF16, Stored::kF16, Stored::kE4M3, Stored::kE5M2, Stored::kI8}) {
    const std::int64_t size = stored_size(type), codes = std::int64_t{1} << 8 * size;
    Bytes all(static_cast<std::size_t>(codes * size));
    for (std::int64_t c = 0; c < codes; ++c) std::memcpy(all.data() + c * size, &c, static_cast<std::size_t>(size));
    const ScanResult want = by_the_book(type, all, codes);
    on_every_target([&] {
      ScanResult got;
      scan(type, all.data(), codes, &got);
      expect_same(got, want, false);
      for (std::int64_t c = 0; c < codes; c += size == 2 ? 37 : 1) {
        Bytes one(static_cast<std::size_t>(64 * size));
        for (std::int64_t i = 0; i < 64; ++i) std::memcpy(one.data() + i * size, &c, static_cast<std::size_t>(size));
        scan(type, one.data(), 64, &got);
        expect_same(got, by_the_book(type, one, 64), false);
      }
    });
  }
}

TEST(WeightScan, AlignmentDoesNotShow) {
  for (const Stored type : kAll) {
    const std::int64_t count = 3000;
    const Bytes bytes = mostly_finite(type, count, 11, 500);
    ScanResult want;
    scan(type, bytes.data(), count, &want);
    Bytes shifted(bytes.size() + 9);
    for (int by = 1; by < 9; ++by) {
      std::memcpy(shifted.data() + by, bytes.data(), bytes.size());
      ScanResult got;
      scan(type, shifted.data() + by, count, &got);
      expect_same(got, want, true);
    }
  }
}

TEST(WeightScan, PiecesInOrderGiveTheWhole) {
  const std::int64_t count = 5 * (kScanPiece / 2) + 77;
  const Bytes bytes = mostly_finite(Stored::kBF16, count, 12, 101);
  ScanResult whole, joined;
  scan(Stored::kBF16, bytes.data(), count, &whole);
  for (std::int64_t from = 0; from < count; from += kScanPiece / 2) {
    ScanResult piece;
    ASSERT_EQ(scan_piece(Stored::kBF16, bytes.data() + 2 * from, std::min(kScanPiece / 2, count - from), &piece),
              Status::kOk);
    append(piece, &joined);
  }
  expect_same(joined, whole, true);
  EXPECT_GT(whole.non_finite, 0);
}

TEST(WeightScan, Planted) {
  std::vector<float> v(10'000, 0.5f);
  v[1] = -0.0f;
  v[2] = 0.0f;
  v[4097] = -3.0f;
  v[5000] = std::numeric_limits<float>::denorm_min();
  v[8191] = std::bit_cast<float>(0xffc12345u);  // a NaN with sign and payload
  v[9000] = -std::numeric_limits<float>::infinity();
  v[9999] = 7.0f;
  ScanResult r;
  scan(Stored::kF32, v.data(), 10'000, &r);
  EXPECT_EQ(r.non_finite, 2);
  EXPECT_EQ(r.first_non_finite, 8191);
  EXPECT_EQ(r.zeros, 2);
  EXPECT_EQ(r.min, -3);
  EXPECT_EQ(r.max, 7);
  EXPECT_EQ(r.sum, 0.5 * 9993 - 3 + 7);
  EXPECT_EQ(r.sum_of_squares, 0.25 * 9993 + 9 + 49);  // 2^-298 is lost beside it
}

TEST(WeightScan, NothingFinite) {
  const std::vector<float> v(100, std::numeric_limits<float>::quiet_NaN());
  ScanResult r;
  scan(Stored::kF32, v.data(), 100, &r);
  EXPECT_EQ(r.non_finite, 100);
  EXPECT_EQ(r.first_non_finite, 0);
  EXPECT_TRUE(std::isnan(r.min) && std::isnan(r.max));
  EXPECT_EQ(r.sum, 0);
  ScanResult empty;
  EXPECT_EQ(scan(Stored::kF32, nullptr, 0, &empty), Status::kOk);
  EXPECT_TRUE(std::isnan(empty.min));
  EXPECT_EQ(empty.elements, 0);
}

/// One changed bit, exchanged runs, one more zero: another hash, each time.
TEST(WeightScan, HashSeesWhatChanges) {
  const auto hash = [](const Bytes& b) {
    ScanResult r;
    scan(Stored::kBytes, b.data(), static_cast<std::int64_t>(b.size()), &r);
    return r.hash;
  };
  const std::size_t size = 3 * kScanPiece / 2;
  const Bytes bytes = random_bytes(size, 13);
  std::set<std::uint64_t> seen = {hash(bytes)};
  std::size_t tried = 1;
  const auto expect_new = [&](const Bytes& b) {
    ++tried;
    seen.insert(hash(b));
  };
  for (std::size_t bit = 3; bit < 8 * size; bit = bit * 3 + 1) {
    Bytes b = bytes;
    b[bit / 8] ^= 1 << bit % 8;
    expect_new(b);
  }
  for (const std::size_t run : {4u, 8u, 64u, 1024u, 16384u, 524288u}) {
    Bytes b = bytes;
    std::swap_ranges(b.begin(), b.begin() + static_cast<std::ptrdiff_t>(run),
                     b.begin() + static_cast<std::ptrdiff_t>(run));
    expect_new(b);
  }
  for (const std::size_t zeros : {1u, 7u, 8u, 63u, 64u, 65u, 1024u, 1048576u, 1048577u}) expect_new(Bytes(zeros, 0));
  for (std::size_t i = 0; i < 4096; ++i) {  // single bits in zeros: where they are must show
    Bytes b(512, 0);
    b[i / 8] = static_cast<std::uint8_t>(1 << i % 8);
    expect_new(b);
  }
  EXPECT_EQ(seen.size(), tried);
}

TEST(WeightScan, RefusesBadArguments) {
  ScanResult r;
  const float v = 1;
  EXPECT_EQ(scan(Stored::kF32, nullptr, 1, &r), Status::kNullPointer);
  EXPECT_EQ(scan(Stored::kF32, &v, 1, nullptr), Status::kNullPointer);
  EXPECT_EQ(scan(Stored::kF32, &v, -1, &r), Status::kBadShape);
  EXPECT_EQ(scan_piece(Stored::kF32, &v, kScanPiece / 4 + 1, &r), Status::kBadShape);
}

}  // namespace
}  // namespace moeaudit::kernels

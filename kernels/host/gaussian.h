// Unit Gaussian numbers by counter: number i of stream s is a pure function of (seed, s, i), the same on every platform
// (std::normal_distribution is not), so any thread may make any part.
#pragma once

#include <array>
#include <cstdint>

namespace moeaudit::kernels {

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

/// Inverse of the normal distribution function, p in (0, 1): algorithm AS 241 PPND16 (Wichura, Applied Statistics 37,
/// 1988), relative accuracy about 1e-16, with log_exact_order() for the tails.
double normal_quantile(double p);

/// out[0, count) = numbers first .. first + count of stream `stream`: normal_quantile((u + 1/2) / 2^32) of the 32-bit
/// outputs u of Philox with counter {i / 4, stream} and key `seed`. |out| <= 6.34.
void unit_gaussians(std::uint64_t seed, std::uint64_t stream, std::int64_t first, std::int64_t count, float* out);

}  // namespace moeaudit::kernels

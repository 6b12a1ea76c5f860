// Weights through NF4 and row-wise int8, and back.
#include "kernels/host/quantised_weights.h"

#include <algorithm>
#include <cmath>

namespace moeaudit::kernels {

const float kNf4Values[16] = {-1.0f,
                              -0.6961928009986877f,
                              -0.5250730514526367f,
                              -0.39491748809814453f,
                              -0.28444138169288635f,
                              -0.18477343022823334f,
                              -0.09105003625154495f,
                              0.0f,
                              0.07958029955625534f,
                              0.16093020141124725f,
                              0.24611230194568634f,
                              0.33791524171829224f,
                              0.44070982933044434f,
                              0.5626170039176941f,
                              0.7229568362236023f,
                              1.0f};

namespace {

float largest_magnitude(const float* w, std::int64_t count) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(w[i]));
  return largest;
}

float nearest_nf4(float v) {
  int n = 0;
  while (n < 15 && v > 0.5f * (kNf4Values[n] + kNf4Values[n + 1])) ++n;
  return kNf4Values[n];
}

}  // namespace

void nf4_round_trip(const float* w, std::int64_t count, float* out) {
  for (std::int64_t first = 0; first < count; first += kNf4Block) {
    const std::int64_t length = std::min(kNf4Block, count - first);
    const float scale = largest_magnitude(w + first, length);
    for (std::int64_t i = first; i < first + length; ++i)
      out[i] = scale > 0.0f ? nearest_nf4(w[i] / scale) * scale : 0.0f;
  }
}

void int8_row_round_trip(const float* w, std::int64_t rows, std::int64_t columns, float* out) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* from = w + row * columns;
    float* to = out + row * columns;
    const float scale = largest_magnitude(from, columns);
    const float up = 127.0f / scale;
    const float down = scale * (1.0f / 127.0f);
    for (std::int64_t i = 0; i < columns; ++i) to[i] = scale > 0.0f ? std::nearbyint(from[i] * up) * down : 0.0f;
  }
}

}  // namespace moeaudit::kernels

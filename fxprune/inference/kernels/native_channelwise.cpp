// channels_last, each channel by itself: depthwise convolution and max pooling. SIMD lanes are channels; a tile is a few
// neighbouring pixels of one output row, and goes over all channels.
#include <algorithm>
#include <limits>
#include <vector>

#include "native_conv.h"
#include "native_vectors.h"

namespace fxprune {
namespace {

#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int kPixels = 4;  // 16 registers: 4 sums, 3 weights, 6 pixels
#else
constexpr int kPixels = 8;
#endif

// One tap row that lies inside the input: where it starts in x, for the first pixel of a tile, and in the weights.
struct TapRow {
  const float* x;
  const float* weights;
};

struct Tile {
  const TapRow* rows;
  int64_t row_count;
  int64_t taps;          // in a row
  int64_t pixel_stride;  // floats between the inputs of neighbouring output pixels
  int64_t tap_stride;    // floats between the inputs of neighbouring taps of a row
  int64_t channels;
  const float* bias;      // or null
  const float* residual;  // of the first pixel, or null
  float* y;               // of the first pixel
  float minimum, maximum;
};

// Templates take the number of lanes, not the type: a template argument loses the alignment that is said of it.
template <int LANES>
using V = typename Vector<LANES>::type;

struct Sum {
  static constexpr bool weighs = true;
  template <int LANES>
  static V<LANES> start(const Tile& t, int64_t c) {
    return t.bias ? *reinterpret_cast<const V<LANES>*>(t.bias + c) : V<LANES>{};
  }
  template <int LANES>
  static V<LANES> step(V<LANES> sum, V<LANES> x, V<LANES> weight) {
    return sum + x * weight;
  }
  template <int LANES>
  static V<LANES> finish(const Tile& t, V<LANES> sum, int64_t place) {
    const V<LANES> minimum = t.minimum - V<LANES>{}, maximum = t.maximum - V<LANES>{};
    if (t.residual) sum += *reinterpret_cast<const V<LANES>*>(t.residual + place);
    sum = sum < minimum ? minimum : sum;  // NaN stays NaN
    return sum > maximum ? maximum : sum;
  }
};

struct Largest {
  static constexpr bool weighs = false;
  template <int LANES>
  static V<LANES> start(const Tile&, int64_t) {
    return -std::numeric_limits<float>::infinity() - V<LANES>{};
  }
  template <int LANES>
  static V<LANES> step(V<LANES> largest, V<LANES> x, V<LANES>) {
    largest = x > largest ? x : largest;
    return x != x ? x : largest;  // NaN goes through
  }
  template <int LANES>
  static V<LANES> finish(const Tile&, V<LANES> largest, int64_t) {
    return largest;
  }
};

// One tap row of all pixels of a tile.
template <typename Rule, int LANES, int PIXELS>
inline void step(const Tile& t, V<LANES>* value, const float* x, const float* w) {
  for (int64_t tap = 0; tap < t.taps; ++tap, x += t.tap_stride, w += t.channels) {
    V<LANES> weight{};
    if constexpr (Rule::weighs) weight = *reinterpret_cast<const V<LANES>*>(w);
#pragma GCC unroll 8
    for (int m = 0; m < PIXELS; ++m)
      value[m] = Rule::template step<LANES>(value[m], *reinterpret_cast<const V<LANES>*>(x + m * t.pixel_stride), weight);
  }
}

// The same for three neighbouring taps: each pixel of the input is read once.
template <typename Rule, int LANES, int PIXELS, int STRIDE>
inline void step_of_three(const Tile& t, V<LANES>* value, const float* x, const float* w) {
  constexpr int READ = (PIXELS - 1) * STRIDE + 3;
  V<LANES> weight[3]{}, read[READ];
  if constexpr (Rule::weighs) {
#pragma GCC unroll 3
    for (int tap = 0; tap < 3; ++tap) weight[tap] = *reinterpret_cast<const V<LANES>*>(w + tap * t.channels);
  }
#pragma GCC unroll 17
  for (int i = 0; i < READ; ++i) read[i] = *reinterpret_cast<const V<LANES>*>(x + i * t.channels);
#pragma GCC unroll 8
  for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 3
    for (int tap = 0; tap < 3; ++tap) value[m] = Rule::template step<LANES>(value[m], read[m * STRIDE + tap], weight[tap]);
}

template <typename Rule, int LANES, int PIXELS>
void tile(const Tile& t) {
  const bool three = t.taps == 3 && t.tap_stride == t.channels;
  const int64_t stride = three ? t.pixel_stride / t.channels : 0;
  for (int64_t c = 0; c < t.channels; c += LANES) {
    c = std::min(c, t.channels - LANES);  // the last vector may repeat some channels
    V<LANES> value[PIXELS];
#pragma GCC unroll 8
    for (int m = 0; m < PIXELS; ++m) value[m] = Rule::template start<LANES>(t, c);
    for (int64_t r = 0; r < t.row_count; ++r) {
      const float* x = t.rows[r].x + c;
      const float* w = t.rows[r].weights + c;
      if (stride == 1) step_of_three<Rule, LANES, PIXELS, 1>(t, value, x, w);
      else if (stride == 2) step_of_three<Rule, LANES, PIXELS, 2>(t, value, x, w);
      else step<Rule, LANES, PIXELS>(t, value, x, w);
    }
#pragma GCC unroll 8
    for (int m = 0; m < PIXELS; ++m) {
      const int64_t place = m * t.channels + c;
      *reinterpret_cast<V<LANES>*>(t.y + place) = Rule::template finish<LANES>(t, value[m], place);
    }
  }
}

template <typename Rule, int LANES, int PIXELS = kPixels>
void tile_of(const Tile& t, int64_t pixels) {
  if constexpr (PIXELS == 1) {
    tile<Rule, LANES, 1>(t);
  } else {
    pixels == PIXELS ? tile<Rule, LANES, PIXELS>(t) : tile_of<Rule, LANES, PIXELS - 1>(t, pixels);
  }
}

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step; }

template <typename Rule, int LANES>
void run(const Geometry& g, const ChannelwiseOperands& a, int64_t first_row, int64_t last_row) {
  const int64_t reach = (g.kernel_width - 1) * g.dilation_width;
  // The columns all of whose taps lie inside the input.
  const int64_t low = std::min(g.out_width, rounded_up(g.padding_width, g.stride_width));
  const int64_t fits = g.width - 1 - reach + g.padding_width;
  const int64_t high = std::max(low, fits < 0 ? 0 : std::min(g.out_width, fits / g.stride_width + 1));
  std::vector<TapRow> rows(g.kernel_height);
  Tile t{};
  t.rows = rows.data();
  t.pixel_stride = g.stride_width * g.channels;
  t.tap_stride = g.dilation_width * g.channels;
  t.channels = g.channels;
  t.bias = a.bias;
  t.minimum = a.minimum;
  t.maximum = a.maximum;
  for (int64_t row = first_row; row < last_row; ++row) {
    const float* image = a.x + row / g.out_height * g.height * g.width * g.channels;
    const int64_t top = row % g.out_height * g.stride_height - g.padding_height;
    for (int64_t column = 0; column < g.out_width;) {
      const int64_t left = column * g.stride_width - g.padding_width;
      int64_t pixels = 1, first = 0, last = g.kernel_width;
      if (column >= low && column < high) {
        pixels = std::min<int64_t>(kPixels, high - column);
      } else {
        first = left < 0 ? rounded_up(-left, g.dilation_width) : 0;
        last = left >= g.width ? 0 : std::min(last, (g.width - 1 - left) / g.dilation_width + 1);
      }
      t.taps = std::max<int64_t>(0, last - first);
      t.row_count = 0;
      for (int64_t kh = 0; kh < g.kernel_height; ++kh) {
        const int64_t ih = top + kh * g.dilation_height;
        if (ih < 0 || ih >= g.height) continue;
        const float* x = image + (ih * g.width + left + first * g.dilation_width) * g.channels;
        rows[t.row_count++] = {x, a.weights + (kh * g.kernel_width + first) * g.channels};
      }
      const int64_t place = (row * g.out_width + column) * g.channels;
      t.y = a.y + place;
      t.residual = a.residual ? a.residual + place : nullptr;
      tile_of<Rule, LANES>(t, pixels);
      column += pixels;
    }
  }
}

template <typename Rule>
void run_widest(const Geometry& g, const ChannelwiseOperands& a, int64_t first_row, int64_t last_row) {
#if defined(__AVX512F__)
  if (g.channels >= 16) return run<Rule, 16>(g, a, first_row, last_row);
#endif
#if defined(__AVX__)
  if (g.channels >= 8) return run<Rule, 8>(g, a, first_row, last_row);
#endif
  if (g.channels >= 4) return run<Rule, 4>(g, a, first_row, last_row);
  run<Rule, 1>(g, a, first_row, last_row);
}

}  // namespace

void run_depthwise(const Geometry& g, const ChannelwiseOperands& a, int64_t first_row, int64_t last_row) {
  run_widest<Sum>(g, a, first_row, last_row);
}

void run_max_pool(const Geometry& g, const ChannelwiseOperands& a, int64_t first_row, int64_t last_row) {
  run_widest<Largest>(g, a, first_row, last_row);
}

}  // namespace fxprune

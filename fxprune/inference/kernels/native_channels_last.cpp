// channels_last: SIMD lanes are output channels. The work is cut into tiles of a few neighbouring pixels of one output row
// times one panel of filters, whose sums stay in registers.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "native_conv.h"
#include "native_vectors.h"

namespace fxprune {
namespace {

#if defined(__AVX512F__)
constexpr int kPixels = 14;  // 32 registers: 14 pixels x 2 vectors, 2 of weights, 1 of input
constexpr int kPixelsOfTwo = 14;
#elif defined(__AVX__)
constexpr int kPixels = 12;  // 16 registers: 6 x 2 or 12 x 1
constexpr int kPixelsOfTwo = 6;
#else
constexpr int kPixels = 14;  // NEON has 32 registers
constexpr int kPixelsOfTwo = 12;
#endif

// One tap row that lies inside the input: where it starts in x and in the weights.
struct TapRow {
  const float* x;
  int64_t weights;
};

struct Tile {
  const TapRow* rows;
  int64_t row_count;
  int64_t pixel_stride;  // floats between the inputs of neighbouring output pixels
  int64_t tap_stride;    // floats between the inputs of neighbouring taps of a row
  int64_t taps;          // in a row
  int64_t kept;
  const int32_t* index;
  const float* weights;
  const float* bias;
  const float* residual;  // of the first pixel, or null
  float* y;               // of the first pixel
  int64_t out_channels;
  const int32_t* out;
  int64_t filters;
  bool contiguous;  // the panel fills its registers and is written to neighbouring channels
  float minimum, maximum;
};

template <int LANES, int VECTORS, int PIXELS>
void tile(const Tile& t) {
  using V = typename Vector<LANES>::type;
  constexpr int WIDTH = LANES * VECTORS;
  V sum[PIXELS][VECTORS];
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[m][v] = *reinterpret_cast<const V*>(t.bias + v * LANES);

  // Fourteen addresses from two pointers and three strides: x86 adds one register, times 1, 2 or 4, to another.
  const int64_t one = t.pixel_stride, three = 3 * one, five = 5 * one, seven = 7 * one;
  for (int64_t r = 0; r < t.row_count; ++r) {
    const float* x_tap = t.rows[r].x;
    const float* w = t.weights + t.rows[r].weights;
    for (int64_t tap = 0; tap < t.taps; ++tap, x_tap += t.tap_stride) {
      for (int64_t k = 0; k < t.kept; ++k, w += WIDTH) {
        const float* low = x_tap + t.index[k];
        const float* high = low + seven;
        V weight[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) weight[v] = *reinterpret_cast<const V*>(w + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < PIXELS; ++m) {
          const float* base = m < 7 ? low : high;
          const int step = m % 7;
          const float x = step == 0   ? base[0]
                          : step == 1 ? base[one]
                          : step == 2 ? base[2 * one]
                          : step == 3 ? base[three]
                          : step == 4 ? base[4 * one]
                          : step == 5 ? base[five]
                                      : base[2 * three];
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) sum[m][v] += x * weight[v];
        }
      }
    }
  }

  if (t.contiguous) {
    const V minimum = t.minimum - V{}, maximum = t.maximum - V{};
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t place = m * t.out_channels + t.out[0] + v * LANES;
        V value = sum[m][v];
        if (t.residual) value += *reinterpret_cast<const V*>(t.residual + place);
        value = value < minimum ? minimum : value;  // NaN stays NaN
        value = value > maximum ? maximum : value;
        *reinterpret_cast<V*>(t.y + place) = value;
      }
    return;
  }
  float values[PIXELS][WIDTH];
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<V*>(&values[m][v * LANES]) = sum[m][v];
  for (int64_t o = 0; o < t.filters; ++o) {
    float* y = t.y + t.out[o];
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; ++m) y[m * t.out_channels] = values[m][o];
  }
}

using TileFunction = void (*)(const Tile&);

template <int LANES, int VECTORS, int PIXELS>
struct Table {
  static TileFunction find(int64_t pixels) {
    return pixels == PIXELS ? &tile<LANES, VECTORS, PIXELS> : Table<LANES, VECTORS, PIXELS - 1>::find(pixels);
  }
};
template <int LANES, int VECTORS>
struct Table<LANES, VECTORS, 0> {
  static TileFunction find(int64_t) { return nullptr; }
};

TileFunction tile_function(const Panel& panel, int64_t pixels) {
  if (panel.vectors == 2) return Table<kWidest, 2, kPixelsOfTwo>::find(pixels);
  if (panel.lanes == kWidest) return Table<kWidest, 1, kPixels>::find(pixels);
#if defined(__AVX512F__)
  if (panel.lanes == 8) return Table<8, 1, kPixels>::find(pixels);
#endif
  return Table<4, 1, kPixels>::find(pixels);
}

bool is_contiguous(const Operands& operands, const Panel& panel) {
  if (panel.filters != panel.lanes * panel.vectors) return false;
  for (int64_t o = 1; o < panel.filters; ++o)
    if (operands.out[panel.first + o] != operands.out[panel.first] + o) return false;
  return true;
}

// The input rows of a task, with the padding columns on both sides as zeros, so that the pixels of a tile stand at one
// distance from another also at the edges.
class PaddedRows {
 public:
  PaddedRows(const Geometry& g, const float* x, const Task& task, float* scratch) : g_(g), x_(x), scratch_(scratch) {
    if (!g.padding_width) return;
    width_ = g.width + 2 * g.padding_width;
    for (int64_t row = task.first_row; row < task.last_row; ++row) copy(row);
  }

  // Start of input row `kh` of output row `row` (padding included); null where it lies outside the image.
  const float* find(int64_t row, int64_t kh) const {
    const int64_t ih = input_row(row, kh);
    if (ih < 0 || ih >= g_.height) return nullptr;
    const int64_t source = row / g_.out_height * g_.height + ih;
    if (!g_.padding_width) return x_ + source * g_.width * g_.channels;
    return scratch_ + (source - first_) * width_ * g_.channels;
  }

 private:
  int64_t input_row(int64_t row, int64_t kh) const {
    return row % g_.out_height * g_.stride_height - g_.padding_height + kh * g_.dilation_height;
  }

  // Copies the rows of the image that output row `row` may read, but for those that an earlier one has copied.
  void copy(int64_t row) {
    const int64_t image = row / g_.out_height * g_.height;
    const int64_t low = std::max<int64_t>(input_row(row, 0), 0);
    const int64_t high = std::min(input_row(row, g_.kernel_height - 1), g_.height - 1);
    if (first_ < 0) first_ = image + std::min(low, g_.height);  // all below the image: the next one comes first
    const int64_t pad = g_.padding_width * g_.channels, inner = g_.width * g_.channels;
    for (int64_t source = std::max(next_, image + low); source <= image + high; ++source) {
      float* to = scratch_ + (source - first_) * width_ * g_.channels;
      std::memset(to, 0, pad * sizeof(float));
      std::memcpy(to + pad, x_ + source * inner, inner * sizeof(float));
      std::memset(to + pad + inner, 0, pad * sizeof(float));
    }
    next_ = std::max(next_, image + high + 1);
  }

  const Geometry& g_;
  const float* x_;
  float* scratch_;
  int64_t width_ = 0, first_ = -1, next_ = -1;
};

// Adds the residual and keeps the bounds where the sums of a task have been stored.
void sweep(const Geometry& g, const Operands& a, const Task& task) {
  const bool whole = task.first_panel == 0 && task.last_panel == a.panel_count;
  const int64_t first = a.panels[task.first_panel].first;
  const int64_t last = a.panels[task.last_panel - 1].first + a.panels[task.last_panel - 1].filters;
  for (int64_t row = task.first_row; row < task.last_row; ++row) {
    const int64_t begin = (row * g.out_width + task.first_column) * g.out_channels;
    const int64_t end = (row * g.out_width + task.last_column) * g.out_channels;
    const auto finish = [&](int64_t place) {
      float value = a.y[place] + (a.residual ? a.residual[place] : 0.0f);
      value = value < a.minimum ? a.minimum : value;
      a.y[place] = value > a.maximum ? a.maximum : value;
    };
    if (whole) {
      for (int64_t place = begin; place < end; ++place) finish(place);
    } else {
      for (int64_t pixel = begin; pixel < end; pixel += g.out_channels)
        for (int64_t o = first; o < last; ++o) finish(pixel + a.out[o]);
    }
  }
}

}  // namespace

int64_t widest_lanes() { return kWidest; }

bool has_panel(int64_t lanes, int64_t vectors, bool channels_last) {
  if (!channels_last) return vectors == 1 && (lanes == 1 || lanes == 2 || lanes == 4 || lanes == 8) && lanes <= most_filters();
  return vectors == 2 ? lanes == kWidest : vectors == 1 && lanes >= 4 && lanes <= kWidest && !(lanes & (lanes - 1));
}

int64_t channels_last_scratch(const Geometry& g, int64_t rows) {
  if (!g.padding_width) return 0;
  // From one output row to the next the input moves on by the stride, from one image to the next by what is left of it.
  const int64_t reach = (g.kernel_height - 1) * g.dilation_height + 1;
  const int64_t images = (rows - 1) / g.out_height + 1;
  const int64_t rest = std::max<int64_t>(0, g.height - g.out_height * g.stride_height);
  const int64_t span = (rows - 1) * g.stride_height + reach + images * rest;
  return std::min(span, g.images * g.height) * (g.width + 2 * g.padding_width) * g.channels;
}

void run_channels_last(const Geometry& g, const Operands& a, const Task& task, float* scratch) {
  const PaddedRows rows(g, a.x, task, scratch);
  // Sums that go to scattered channels are stored as they are; residual and bounds follow in a sweep over whole pixels,
  // which needs all panels.
  bool scattered = false;
  for (int64_t p = task.first_panel; p < task.last_panel; ++p) scattered |= !is_contiguous(a, a.panels[p]);
  const int64_t columns = task.last_column - task.first_column;
  std::vector<TapRow> taps(g.kernel_height * (task.last_row - task.first_row));
  std::vector<int64_t> tap_counts(task.last_row - task.first_row);

  for (int64_t p = task.first_panel; p < task.last_panel; ++p) {
    const Panel& panel = a.panels[p];
    const int64_t most = panel.vectors == 2 ? kPixelsOfTwo : kPixels;
    const int64_t count = (columns + most - 1) / most;
    const int64_t width = panel.lanes * panel.vectors;
    const int64_t tap_row = g.kernel_width * g.kept * width;
    const TileFunction large = tile_function(panel, (columns + count - 1) / count);
    const TileFunction small = tile_function(panel, columns / count);
    for (int64_t row = task.first_row; row < task.last_row; ++row) {
      TapRow* found = &taps[(row - task.first_row) * g.kernel_height];
      int64_t& tap_count = tap_counts[row - task.first_row];
      tap_count = 0;
      for (int64_t kh = 0; kh < g.kernel_height; ++kh)
        if (const float* start = rows.find(row, kh))
          found[tap_count++] = {start + task.first_column * g.stride_width * g.channels, kh * tap_row};
    }

    Tile t{};
    t.pixel_stride = g.stride_width * g.channels;
    t.tap_stride = g.dilation_width * g.channels;
    t.taps = g.kernel_width;
    t.kept = g.kept;
    t.index = a.index + panel.group * g.kept;
    t.weights = a.weights + panel.weights;
    t.bias = a.bias + panel.bias;
    t.out_channels = g.out_channels;
    t.out = a.out + panel.first;
    t.filters = panel.filters;
    t.contiguous = is_contiguous(a, panel);
    t.minimum = scattered ? -std::numeric_limits<float>::infinity() : a.minimum;
    t.maximum = scattered ? std::numeric_limits<float>::infinity() : a.maximum;
    for (int64_t row = task.first_row; row < task.last_row; ++row) {
      TapRow* found = &taps[(row - task.first_row) * g.kernel_height];
      t.rows = found;
      t.row_count = tap_counts[row - task.first_row];
      int64_t column = task.first_column;
      for (int64_t part = 0; part < count; ++part) {
        const int64_t stop = task.first_column + columns * (part + 1) / count;
        const int64_t pixels = stop - column;
        const int64_t start = (row * g.out_width + column) * g.out_channels;
        t.y = a.y + start;
        t.residual = a.residual && !scattered ? a.residual + start : nullptr;
        (pixels == columns / count ? small : large)(t);
        for (int64_t r = 0; r < t.row_count; ++r) found[r].x += pixels * t.pixel_stride;
        column = stop;
      }
    }
  }
  if (scattered) sweep(g, a, task);
}

}  // namespace fxprune

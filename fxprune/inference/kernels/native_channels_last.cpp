// channels_last: SIMD lanes are output channels. The work is cut into tiles of a few neighbouring pixels of one output row,
// with AVX2 of several, times one panel of filters, whose sums stay in registers.
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

// Tiles of few pixels may go across the ends of rows, so that narrow images fill the registers too; six addresses fit
// into registers of their own.
constexpr int kPixelsAcross = 6;
constexpr bool kGoesAcross = kPixelsOfTwo == kPixelsAcross;

// One tap row that lies inside the input: where it starts in x and in the weights.
struct TapRow {
  const float* x;
  int64_t weights;
};

// The same of a tile that goes across rows: where it starts for each pixel.
struct TapRows {
  const float* x[kPixelsAcross];
  int64_t weights;
};

struct Tile {
  const TapRow* rows;
  const TapRows* across;  // instead of `rows`, of a tile that goes across rows
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
  bool fetches;     // see `fetch_results`
  float minimum, maximum;
};

constexpr int64_t kLongSum = 64;

// Lets the cache lines that the results go to, and those of the residual, come while the sums are computed.
template <int LANES, int VECTORS, int PIXELS>
inline void fetch_results(const Tile& t) {
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t place = m * t.out_channels + t.out[0] + v * LANES;
      __builtin_prefetch(t.y + place, 0, 2);
      if (t.residual) __builtin_prefetch(t.residual + place, 0, 2);
    }
}

template <int LANES, int VECTORS, int PIXELS>
struct Sums {
  using V = typename Vector<LANES>::type;
  static constexpr int WIDTH = LANES * VECTORS;
  V sum[PIXELS][VECTORS];

  inline __attribute__((always_inline)) void start(const Tile& t) {
    if (t.fetches) fetch_results<LANES, VECTORS, PIXELS>(t);
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[m][v] = *reinterpret_cast<const V*>(t.bias + v * LANES);
  }

  // What one kept channel adds; `input(m)` is its value for pixel `m`.
  template <typename Input>
  inline __attribute__((always_inline)) void add(const float* w, const Input& input) {
    V weight[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) weight[v] = *reinterpret_cast<const V*>(w + v * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; ++m) {
      const float x = input(m);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[m][v] += x * weight[v];
    }
  }

  inline __attribute__((always_inline)) void store(const Tile& t) const {
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
};

template <int LANES, int VECTORS, int PIXELS>
void tile(const Tile& t) {
  Sums<LANES, VECTORS, PIXELS> sums;
  sums.start(t);
  // Fourteen addresses from two pointers and three strides: x86 adds one register, times 1, 2 or 4, to another.
  const int64_t one = t.pixel_stride, three = 3 * one, five = 5 * one, seven = 7 * one;
  for (int64_t r = 0; r < t.row_count; ++r) {
    const float* x_tap = t.rows[r].x;
    const float* w = t.weights + t.rows[r].weights;
    for (int64_t tap = 0; tap < t.taps; ++tap, x_tap += t.tap_stride) {
      for (int64_t k = 0; k < t.kept; ++k, w += sums.WIDTH) {
        const float* low = x_tap + t.index[k];
        const float* high = low + seven;
        sums.add(w, [=](int m) {
          const float* base = m < 7 ? low : high;
          const int step = m % 7;
          return step == 0   ? base[0]
                 : step == 1 ? base[one]
                 : step == 2 ? base[2 * one]
                 : step == 3 ? base[three]
                 : step == 4 ? base[4 * one]
                 : step == 5 ? base[five]
                             : base[2 * three];
        });
      }
    }
  }
  sums.store(t);
}

template <int LANES, int VECTORS, int PIXELS>
void tile_across(const Tile& t) {
  Sums<LANES, VECTORS, PIXELS> sums;
  sums.start(t);
  for (int64_t r = 0; r < t.row_count; ++r) {
    const float* x[PIXELS];
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; ++m) x[m] = t.across[r].x[m];
    const float* w = t.weights + t.across[r].weights;
    for (int64_t tap = 0; tap < t.taps; ++tap) {
      for (int64_t k = 0; k < t.kept; ++k, w += sums.WIDTH) {
        const int64_t channel = t.index[k];
        sums.add(w, [&](int m) { return x[m][channel]; });
      }
#pragma GCC unroll 16
      for (int m = 0; m < PIXELS; ++m) x[m] += t.tap_stride;
    }
  }
  sums.store(t);
}

using TileFunction = void (*)(const Tile&);

template <int LANES, int VECTORS, int PIXELS>
TileFunction tile_of(int64_t pixels) {
  if constexpr (PIXELS == 0) return nullptr;
  else return pixels == PIXELS ? &tile<LANES, VECTORS, PIXELS> : tile_of<LANES, VECTORS, PIXELS - 1>(pixels);
}

template <int PIXELS = kPixelsAcross>
TileFunction tile_across_of(int64_t pixels) {
  if constexpr (PIXELS == 0) return nullptr;
  else return pixels == PIXELS ? &tile_across<kWidest, 2, PIXELS> : tile_across_of<PIXELS - 1>(pixels);
}

TileFunction tile_function(const Panel& panel, int64_t pixels) {
  if (panel.vectors == 2) return tile_of<kWidest, 2, kPixelsOfTwo>(pixels);
  if (panel.lanes == kWidest) return tile_of<kWidest, 1, kPixels>(pixels);
#if defined(__AVX512F__)
  if (panel.lanes == 8) return tile_of<8, 1, kPixels>(pixels);
#endif
  return tile_of<4, 1, kPixels>(pixels);
}

bool is_contiguous(const Operands& operands, const Panel& panel) {
  if (panel.filters != panel.lanes * panel.vectors) return false;
  for (int64_t o = 1; o < panel.filters; ++o)
    if (operands.out[panel.first + o] != operands.out[panel.first] + o) return false;
  return true;
}

// Pixels at a distance of a multiple of 4 KiB share so few sets of an L1 cache (64 sets of 64 bytes) that those of one
// tile would push each other out.
constexpr int64_t kSharing = 1024, kApart = 16;  // floats

bool is_pointwise(const Geometry& g) {
  return g.kernel_height == 1 && g.kernel_width == 1 && !(g.padding_height | g.padding_width);
}

bool shares_sets(const Geometry& g) { return g.channels * g.stride_width % kSharing == 0; }

// Where a task finds its input. It is copied
//
// - with padding columns on both sides as zeros, so that the pixels of a tile stand at one distance from another also at
//   the edges;
// - if its pixels would share sets of the cache: somewhat further apart, and of a strided 1x1 convolution only those that
//   it reads.
class Input {
 public:
  Input(const Geometry& g, const float* x, const Task& task, float* scratch)
      : g_(g), task_(task), x_(x), scratch_(scratch), pixel_(g.channels + (shares_sets(g) ? kApart : 0)) {
    if (kGoesAcross && g.padding_height) zeros_.resize(((g.kernel_width - 1) * g.dilation_width + 1) * pixel_);
    if (g.padding_width) {
      width_ = g.width + 2 * g.padding_width;
      for (int64_t row = task.first_row; row < task.last_row; ++row) copy_padded(row);
    } else if (is_pointwise(g) && shares_sets(g)) {
      width_ = task.last_column - task.first_column;
      for (int64_t row = task.first_row; row < task.last_row; ++row) copy_pixels(row);
    } else {
      pixel_ = g.channels;
    }
  }

  static int64_t scratch_size(const Geometry& g, int64_t rows, int64_t columns) {
    const int64_t pixel = g.channels + (shares_sets(g) ? kApart : 0);
    if (!g.padding_width) return is_pointwise(g) && shares_sets(g) ? rows * columns * pixel : 0;
    // From one output row to the next the input moves on by the stride, from one image to the next by what is left of it.
    const int64_t reach = (g.kernel_height - 1) * g.dilation_height + 1;
    const int64_t images = (rows - 1) / g.out_height + 1;
    const int64_t rest = std::max<int64_t>(0, g.height - g.out_height * g.stride_height);
    const int64_t span = (rows - 1) * g.stride_height + reach + images * rest;
    return std::min(span, g.images * g.height) * (g.width + 2 * g.padding_width) * pixel;
  }

  // Floats between the inputs of neighbouring output pixels, and of neighbouring taps of a row.
  int64_t pixel_stride() const { return width_ && !g_.padding_width ? pixel_ : g_.stride_width * pixel_; }
  int64_t tap_stride() const { return g_.dilation_width * pixel_; }

  // A row of zeros, for what lies above and below the image.
  const float* zeros() const { return zeros_.data(); }

  // What the first column of the task reads of input row `kh` of output row `row`; null where that lies outside the image.
  const float* find(int64_t row, int64_t kh) const {
    if (width_ && !g_.padding_width) return scratch_ + (row - task_.first_row) * width_ * pixel_;
    const int64_t ih = input_row(row, kh);
    if (ih < 0 || ih >= g_.height) return nullptr;
    const int64_t source = row / g_.out_height * g_.height + ih;
    const float* start = width_ ? scratch_ + (source - first_) * width_ * pixel_ : x_ + source * g_.width * pixel_;
    return start + task_.first_column * g_.stride_width * pixel_;
  }

 private:
  int64_t input_row(int64_t row, int64_t kh) const {
    return row % g_.out_height * g_.stride_height - g_.padding_height + kh * g_.dilation_height;
  }

  // Copies pixels that lie `step` apart; returns where the next one goes.
  float* copy(float* to, const float* from, int64_t pixels, int64_t step) const {
    if (pixel_ == step) {
      std::memcpy(to, from, pixels * step * sizeof(float));
    } else {
      for (int64_t i = 0; i < pixels; ++i)
        std::memcpy(to + i * pixel_, from + i * step, g_.channels * sizeof(float));
    }
    return to + pixels * pixel_;
  }

  // The rows of the image that output row `row` may read, but for those that an earlier one has copied.
  void copy_padded(int64_t row) {
    const int64_t image = row / g_.out_height * g_.height;
    const int64_t low = std::max<int64_t>(input_row(row, 0), 0);
    const int64_t high = std::min(input_row(row, g_.kernel_height - 1), g_.height - 1);
    if (first_ < 0) first_ = image + std::min(low, g_.height);  // all below the image: the next one comes first
    const int64_t pad = g_.padding_width * pixel_;
    for (int64_t source = std::max(next_, image + low); source <= image + high; ++source) {
      float* to = scratch_ + (source - first_) * width_ * pixel_;
      std::memset(to, 0, pad * sizeof(float));
      to = copy(to + pad, x_ + source * g_.width * g_.channels, g_.width, g_.channels);
      std::memset(to, 0, pad * sizeof(float));
    }
    next_ = std::max(next_, image + high + 1);
  }

  // The pixels that output row `row` reads.
  void copy_pixels(int64_t row) {
    const int64_t source = row / g_.out_height * g_.height + input_row(row, 0);
    const float* from = x_ + (source * g_.width + task_.first_column * g_.stride_width) * g_.channels;
    copy(scratch_ + (row - task_.first_row) * width_ * pixel_, from, width_, g_.stride_width * g_.channels);
  }

  const Geometry& g_;
  const Task& task_;
  const float* x_;
  float* scratch_;
  int64_t pixel_;      // floats between neighbouring pixels
  int64_t width_ = 0;  // pixels in a row of the copy, if there is one
  int64_t first_ = -1, next_ = -1;
  std::vector<float> zeros_;
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

// Computes one panel of filters, tile after tile.
class PanelRun {
 public:
  PanelRun(const Geometry& g, const Operands& a, const Task& task, const Input& input, const Panel& panel, bool scattered)
      : g_(g), a_(a), task_(task), input_(input), panel_(panel), adds_(a.residual && !scattered),
        columns_(task.last_column - task.first_column), tap_row_(g.kernel_width * g.kept * panel.lanes * panel.vectors),
        rows_(g.kernel_height), across_(g.kernel_height) {
    tile_.pixel_stride = input.pixel_stride();
    tile_.tap_stride = input.tap_stride();
    tile_.taps = g.kernel_width;
    tile_.kept = g.kept;
    tile_.index = a.index + panel.group * g.kept;
    tile_.weights = a.weights + panel.weights;
    tile_.bias = a.bias + panel.bias;
    tile_.out_channels = g.out_channels;
    tile_.out = a.out + panel.first;
    tile_.filters = panel.filters;
    tile_.contiguous = is_contiguous(a, panel);
    // It costs as much as a few steps of a sum, and a short one is over before anything has come.
    tile_.fetches = tile_.contiguous && (adds_ || g.kept * g.kernel_height * g.kernel_width >= kLongSum);
    tile_.minimum = scattered ? -std::numeric_limits<float>::infinity() : a.minimum;
    tile_.maximum = scattered ? std::numeric_limits<float>::infinity() : a.maximum;
  }

  void run() {
    if (goes_across()) {
      run_across();
    } else {
      for (int64_t row = task_.first_row; row < task_.last_row; ++row) run_row(row);
    }
  }

 private:
  // Whether rows fit the tiles so badly that more addresses in registers are the lesser evil.
  bool goes_across() const {
    if (!kGoesAcross || panel_.vectors != 2 || columns_ != g_.out_width) return false;
    const int64_t rows = task_.last_row - task_.first_row;
    const int64_t tiles = (columns_ + kPixelsAcross - 1) / kPixelsAcross * rows;
    return 6 * tiles >= 7 * ((rows * columns_ + kPixelsAcross - 1) / kPixelsAcross);
  }

  void run_row(int64_t row) {
    const int64_t most = panel_.vectors == 2 ? kPixelsOfTwo : kPixels;
    const int64_t count = (columns_ + most - 1) / most;
    const TileFunction large = tile_function(panel_, (columns_ + count - 1) / count);
    const TileFunction small = tile_function(panel_, columns_ / count);
    TapRow* rows = rows_.data();
    tile_.rows = rows;
    tile_.row_count = 0;
    for (int64_t kh = 0; kh < g_.kernel_height; ++kh)
      if (const float* start = input_.find(row, kh)) rows[tile_.row_count++] = {start, kh * tap_row_};
    int64_t column = task_.first_column;
    for (int64_t part = 0; part < count; ++part) {
      const int64_t stop = task_.first_column + columns_ * (part + 1) / count;
      const int64_t pixels = stop - column;
      compute(pixels == columns_ / count ? small : large, row * g_.out_width + column);
      for (int64_t r = 0; r < tile_.row_count; ++r) rows[r].x += pixels * tile_.pixel_stride;
      column = stop;
    }
  }

  // All rows of the task in one: a tile may begin in one and end in the next.
  void run_across() {
    const int64_t pixels = (task_.last_row - task_.first_row) * columns_;
    const int64_t count = (pixels + kPixelsAcross - 1) / kPixelsAcross;
    TapRows* rows = across_.data();
    tile_.across = rows;
    for (int64_t part = 0; part < count; ++part) {
      const int64_t begin = pixels * part / count, end = pixels * (part + 1) / count;
      tile_.row_count = 0;
      for (int64_t kh = 0; kh < g_.kernel_height; ++kh) {
        bool is_inside = false;
        TapRows& found = rows[tile_.row_count];
        found.weights = kh * tap_row_;
        for (int64_t pixel = begin; pixel < end; ++pixel) {
          const float* start = input_.find(task_.first_row + pixel / columns_, kh);
          is_inside |= start != nullptr;
          found.x[pixel - begin] = start ? start + pixel % columns_ * tile_.pixel_stride : input_.zeros();
        }
        tile_.row_count += is_inside;
      }
      compute(tile_across_of(end - begin), task_.first_row * g_.out_width + begin);
    }
  }

  void compute(TileFunction function, int64_t pixel) {
    const int64_t start = pixel * g_.out_channels;
    tile_.y = a_.y + start;
    tile_.residual = adds_ ? a_.residual + start : nullptr;
    function(tile_);
  }

  const Geometry& g_;
  const Operands& a_;
  const Task& task_;
  const Input& input_;
  const Panel& panel_;
  bool adds_;
  int64_t columns_, tap_row_;
  std::vector<TapRow> rows_;
  std::vector<TapRows> across_;
  Tile tile_{};
};

}  // namespace

int64_t widest_lanes() { return kWidest; }

bool has_panel(int64_t lanes, int64_t vectors, bool channels_last) {
  if (!channels_last) return vectors == 1 && (lanes == 1 || lanes == 2 || lanes == 4 || lanes == 8) && lanes <= most_filters();
  return vectors == 2 ? lanes == kWidest : vectors == 1 && lanes >= 4 && lanes <= kWidest && !(lanes & (lanes - 1));
}

int64_t channels_last_scratch(const Geometry& g, int64_t rows, int64_t columns) {
  return Input::scratch_size(g, rows, columns);
}

void run_channels_last(const Geometry& g, const Operands& a, const Task& task, float* scratch) {
  const Input input(g, a.x, task, scratch);
  // Sums that go to scattered channels are stored as they are; residual and bounds follow in a sweep over whole pixels,
  // which needs all panels.
  bool scattered = false;
  for (int64_t p = task.first_panel; p < task.last_panel; ++p) scattered |= !is_contiguous(a, a.panels[p]);
  for (int64_t p = task.first_panel; p < task.last_panel; ++p)
    PanelRun(g, a, task, input, a.panels[p], scattered).run();
  if (scattered) sweep(g, a, task);
}

}  // namespace fxprune

// Contiguous (N, C, H, W): SIMD lanes are neighbouring pixels of a plane, so that groups of any width, even of two filters,
// fill the registers, and filters may be written to any channel. A panel is 8, 4, 2 or 1 filters. For narrow networks.
#include <algorithm>
#include <cstring>
#include <vector>

#include "native_conv.h"
#include "native_vectors.h"

namespace fxprune {
namespace {

#if defined(__AVX512F__)
constexpr int kFilters = 8;  // 32 registers: 8 filters x 3 vectors of pixels, 3 of input, 1 weight
constexpr int kVectorsOf8 = 3, kVectorsOf4 = 6, kVectorsOf2 = 8, kVectorsOf1 = 8;
#elif defined(__AVX__)
constexpr int kFilters = 4;  // 16 registers: 4 filters x 3 vectors, 3 of input, 1 weight
constexpr int kVectorsOf8 = 1, kVectorsOf4 = 3, kVectorsOf2 = 4, kVectorsOf1 = 6;
#else
constexpr int kFilters = 8;  // NEON: 8 filters x 2 vectors
constexpr int kVectorsOf8 = 2, kVectorsOf4 = 4, kVectorsOf2 = 6, kVectorsOf1 = 8;
#endif

// Where the input of a task lies: rows with padding columns, each row split by the phase of the column stride so that
// neighbouring output pixels read neighbouring floats. `plane` and `row` are floats from one to the next.
struct Planes {
  const float* start;
  int64_t plane, row, phase;
};

// Vectors of pixels that are computed together.
struct Block {
  int64_t offset[8];  // of the input of each vector of pixels, from the start of a plane
  int64_t place[8];   // of its output, from the start of a plane
  int64_t count[8];   // pixels of it that exist
};

struct Step {
  const Geometry& g;
  const Operands& a;
  const Panel& panel;
  const Planes& planes;
  const int64_t* taps;  // offset of each tap
  int64_t image;
  int64_t next;  // floats from one row of pixels to the next
};

// A vector of pixels: of one row, or of two rows of half a vector each, `next` floats apart.
template <int LANES, bool HALVES>
typename Vector<LANES>::type load(const float* x, int64_t next) {
  if constexpr (HALVES) {
    using Half = typename Vector<LANES / 2>::type;
    const Half low = *reinterpret_cast<const Half*>(x), high = *reinterpret_cast<const Half*>(x + next);
    if constexpr (LANES == 16)
      return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    else
      return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
  } else {
    return *reinterpret_cast<const typename Vector<LANES>::type*>(x);
  }
}

template <int LANES, bool HALVES, int FILTERS, int VECTORS>
void block(const Step& s, const Block& b) {
  using V = typename Vector<LANES>::type;
  const Geometry& g = s.g;
  const int64_t tap_count = g.kernel_height * g.kernel_width;
  const float* bias = s.a.bias + s.panel.bias;
  const float* w = s.a.weights + s.panel.weights;
  const int32_t* index = s.a.index + s.panel.group * g.kept;
  V sum[FILTERS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < FILTERS; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sum[m][v] = bias[m] - V{};
  const float* x[VECTORS];
  for (int64_t k = 0; k < g.kept; ++k) {
    const float* plane = s.planes.start + index[k] * s.planes.plane;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) x[v] = plane + b.offset[v];
    for (int64_t tap = 0; tap < tap_count; ++tap, w += FILTERS) {
      V pixels[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) pixels[v] = load<LANES, HALVES>(x[v] + s.taps[tap], s.next);
#pragma GCC unroll 8
      for (int m = 0; m < FILTERS; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[m][v] += w[m] * pixels[v];
    }
  }
  const V minimum = s.a.minimum - V{}, maximum = s.a.maximum - V{};
#pragma GCC unroll 8
  for (int m = 0; m < FILTERS; ++m) {
    const int64_t plane = (s.image * g.out_channels + s.a.out[s.panel.first + m]) * g.out_height * g.out_width;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t place = plane + b.place[v];
      if (b.count[v] == LANES) {
        V value = sum[m][v];
        if (s.a.residual) value += *reinterpret_cast<const V*>(s.a.residual + place);
        value = value < minimum ? minimum : value;  // NaN stays NaN
        value = value > maximum ? maximum : value;
        *reinterpret_cast<V*>(s.a.y + place) = value;
      } else {
        float values[LANES];
        *reinterpret_cast<V*>(values) = sum[m][v];
        for (int64_t i = 0; i < b.count[v]; ++i) {
          float value = values[i] + (s.a.residual ? s.a.residual[place + i] : 0.0f);
          value = value < s.a.minimum ? s.a.minimum : value;
          s.a.y[place + i] = value > s.a.maximum ? s.a.maximum : value;
        }
      }
    }
  }
}

using BlockFunction = void (*)(const Step&, const Block&);

template <int LANES, bool HALVES>
BlockFunction block_function(int64_t filters) {
  switch (filters) {
    case 1: return &block<LANES, HALVES, 1, kVectorsOf1>;
    case 2: return &block<LANES, HALVES, 2, kVectorsOf2>;
    case 4: return &block<LANES, HALVES, 4, kVectorsOf4>;
    default: return &block<LANES, HALVES, 8, kVectorsOf8>;
  }
}

int64_t vectors_of(int64_t filters) {
  return filters == 1 ? kVectorsOf1 : filters == 2 ? kVectorsOf2 : filters == 4 ? kVectorsOf4 : kVectorsOf8;
}

// Lanes for rows of this many pixels: a vector of half the width wastes less of a short row.
int64_t lanes_for(int64_t pixels) { return pixels <= kWidest / 2 && kWidest > 4 ? kWidest / 2 : kWidest; }

// Whether the input can be read where it is.
bool is_plain(const Geometry& g) {
  return !g.padding_width && !g.padding_height && g.stride_width == 1 && g.out_width >= lanes_for(g.out_width);
}

int64_t first_input_row(const Geometry& g, int64_t row) { return row * g.stride_height - g.padding_height; }

int64_t input_rows(const Geometry& g, int64_t rows) {
  return (rows - 1) * g.stride_height + (g.kernel_height - 1) * g.dilation_height + 1;
}

int64_t phase_width(const Geometry& g) {
  return (g.width + 2 * g.padding_width + g.stride_width - 1) / g.stride_width;
}

// Copies the rows that a task reads, with zeros around them, each row as `stride_width` interleaved ones.
Planes padded(const Geometry& g, const float* x, int64_t first_row, int64_t rows, float* scratch) {
  const int64_t height = input_rows(g, rows), phase = phase_width(g), row = phase * g.stride_width;
  const int64_t first = first_input_row(g, first_row);
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t h = 0; h < height; ++h) {
      float* to = scratch + (c * height + h) * row;
      const int64_t ih = first + h;
      if (ih < 0 || ih >= g.height) {
        std::memset(to, 0, row * sizeof(float));
        continue;
      }
      const float* from = x + (c * g.height + ih) * g.width;
      if (g.stride_width == 1) {
        std::memset(to, 0, g.padding_width * sizeof(float));
        std::memcpy(to + g.padding_width, from, g.width * sizeof(float));
        std::memset(to + g.padding_width + g.width, 0, g.padding_width * sizeof(float));
        continue;
      }
      for (int64_t f = 0; f < g.stride_width; ++f)
        for (int64_t q = 0; q < phase; ++q) {
          const int64_t column = q * g.stride_width + f - g.padding_width;
          to[f * phase + q] = column < 0 || column >= g.width ? 0.0f : from[column];
        }
    }
  return {scratch, height * row, row, phase};
}

template <int LANES, bool HALVES>
void run_lanes(const Geometry& g, const Operands& a, const Task& task, const Planes& planes, int64_t* taps) {
  const int64_t rows = task.last_row - task.first_row;
  for (int64_t kh = 0; kh < g.kernel_height; ++kh)
    for (int64_t kw = 0; kw < g.kernel_width; ++kw) {
      const int64_t column = kw * g.dilation_width;
      taps[kh * g.kernel_width + kw] = kh * g.dilation_height * planes.row + column % g.stride_width * planes.phase +
                                       column / g.stride_width;
    }
  const int64_t per_row = HALVES ? 1 : (g.out_width + LANES - 1) / LANES;
  const int64_t total = HALVES ? (rows + 1) / 2 : rows * per_row;
  for (int64_t p = task.first_panel; p < task.last_panel; ++p) {
    const Step step{g, a, a.panels[p], planes, taps, task.image, g.stride_height * planes.row};
    const int64_t vectors = vectors_of(step.panel.lanes);
    const BlockFunction function = block_function<LANES, HALVES>(step.panel.lanes);
    for (int64_t first = 0; first < total; first += vectors) {
      Block b;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t which = std::min(first + v, total - 1);
        const int64_t row = HALVES ? std::min(2 * which, rows - 2) : which / per_row;
        // The last vector of a row overlaps the one before; a row shorter than a vector is filled up with junk.
        const int64_t column = HALVES ? 0 : std::max<int64_t>(0, std::min(which % per_row * LANES, g.out_width - LANES));
        b.offset[v] = row * g.stride_height * planes.row + column;
        b.place[v] = (task.first_row + row) * g.out_width + column;
        b.count[v] = HALVES ? LANES : std::min<int64_t>(LANES, g.out_width);
      }
      function(step, b);
    }
  }
}

}  // namespace

int64_t most_filters() { return kFilters; }

int64_t contiguous_scratch(const Geometry& g, int64_t rows) {
  if (is_plain(g)) return 0;
  // A vector at the end of the last row may reach beyond it.
  return g.channels * input_rows(g, rows) * phase_width(g) * g.stride_width + kWidest;
}

void run_contiguous(const Geometry& g, const Operands& a, const Task& task, float* scratch) {
  const float* x = a.x + task.image * g.channels * g.height * g.width;
  const Planes planes = is_plain(g) ? Planes{x + task.first_row * g.stride_height * g.width, g.height * g.width, g.width, 0}
                                    : padded(g, x, task.first_row, task.last_row - task.first_row, scratch);
  std::vector<int64_t> taps(g.kernel_height * g.kernel_width);
  const int64_t lanes = lanes_for(g.out_width);
  if (lanes == kWidest)
    run_lanes<kWidest, false>(g, a, task, planes, taps.data());
  else if (kWidest >= 8 && g.out_width == lanes && task.last_row - task.first_row > 1)
    run_lanes<kWidest < 8 ? 8 : kWidest, true>(g, a, task, planes, taps.data());
  else
    run_lanes<kWidest == 4 ? 4 : kWidest / 2, false>(g, a, task, planes, taps.data());
}

}  // namespace fxprune

// Grouped convolution over gathered channels with bias, residual and clamp, float32, channels_last. No torch in here.
//
//   y[n, oh, ow, out[o]] = clamp(bias[o] + residual[n, oh, ow, out[o]]
//                                + sum over taps and k of x[n, ih, iw, index[g][k]] * w[o, k, tap])
//
// A direct convolution: the kept set of a group is an address table, so nothing is gathered in memory. SIMD lanes are
// output channels. The work is cut into tiles of a few neighbouring pixels of one output row times one *panel* of
// filters, whose sums stay in registers.
#pragma once
#include <cstdint>

namespace fxprune {

// Filters of one group that are computed together: `vectors` registers of `lanes` floats.
struct Panel {
  int64_t group;
  int64_t first;    // first filter of the panel, counted over all groups
  int64_t filters;  // at most lanes * vectors; the rest of the registers hold zeros
  int64_t lanes;
  int64_t vectors;
  int64_t weights;  // offset of w[tap][k][lanes * vectors] in the packed weights
  int64_t bias;     // offset of bias[lanes * vectors]
};

struct Geometry {
  int64_t images, height, width, channels;       // x (images, height, width, channels)
  int64_t out_height, out_width, out_channels;   // y and residual
  int64_t kept;                                  // channels that a group reads
  int64_t kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
  int64_t dilation_height, dilation_width;
};

struct Operands {
  const float* x;
  const float* weights;   // packed, panel after panel
  const float* bias;      // packed, zeros where there is none
  const int32_t* index;   // (groups, kept)
  const int32_t* out;     // (out_channels): where filter o is written
  const float* residual;  // or null
  float minimum, maximum;
  float* y;
  const Panel* panels;
  int64_t panel_count;
};

// What a thread can do at a time: neighbouring tiles of pixels, and a range of panels.
struct Task {
  int64_t first_row, last_row;    // rows of output over all images: n * out_height + oh
  int64_t first_column, last_column;
  int64_t first_panel, last_panel;
};

// Floats of scratch that `run` needs for tasks of up to `rows` rows; 0 if the input is read where it is.
int64_t scratch_size(const Geometry& geometry, int64_t rows);

void run(const Geometry& geometry, const Operands& operands, const Task& task, float* scratch);

// Width of the widest register in floats, and how many registers of it a panel may have.
int64_t widest_lanes();

// Whether there is a tile for panels of this shape.
bool has_tile(int64_t lanes, int64_t vectors);

}  // namespace fxprune

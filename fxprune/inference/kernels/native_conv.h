// Grouped convolution over gathered channels with bias, residual and clamp, float32. No torch in here.
//
//   y[n, oh, ow, out[o]] = clamp(bias[o] + residual[n, oh, ow, out[o]]
//                                + sum over taps and k of x[n, ih, iw, index[g][k]] * w[o, k, tap])
//
// A direct convolution: the kept set of a group is an address table, so nothing is gathered in memory. There is one for
// each memory format; both compute a *panel* of filters of one group at a time and keep its sums in registers.
#pragma once
#include <cstdint>

namespace fxprune {

// Filters of one group that are computed together, in `lanes * vectors` places; zeros fill those that are left over.
struct Panel {
  int64_t group;
  int64_t first;  // first filter of the panel, counted over all groups
  int64_t filters;
  int64_t lanes;
  int64_t vectors;
  int64_t weights;  // offset in the packed weights: [tap][k][place] for channels_last, else [k][tap][place]
  int64_t bias;     // offset in the packed bias: [place]
};

struct Geometry {
  int64_t images, height, width, channels;      // of x
  int64_t out_height, out_width, out_channels;  // of y and residual
  int64_t kept;                                 // channels that a group reads
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

// Of a convolution with one filter for each channel, or of a pooling.
struct ChannelwiseOperands {
  const float* x;
  const float* weights;   // (taps, channels); unused by a pooling
  const float* bias;      // (channels), or null
  const float* residual;  // or null
  float minimum, maximum;
  float* y;
};

// What a thread does at a time.
struct Task {
  int64_t image;                // contiguous only; rows of channels_last count over all images
  int64_t first_row, last_row;  // of the output
  int64_t first_column, last_column;  // channels_last only
  int64_t first_panel, last_panel;
};

// Floats of scratch that a task of up to so many rows and columns needs; 0 if the input is read where it is.
int64_t channels_last_scratch(const Geometry& geometry, int64_t rows, int64_t columns);
int64_t contiguous_scratch(const Geometry& geometry, int64_t rows);

void run_channels_last(const Geometry& geometry, const Operands& operands, const Task& task, float* scratch);
void run_contiguous(const Geometry& geometry, const Operands& operands, const Task& task, float* scratch);

// channels_last, rows of the output counted over all images.
void run_depthwise(const Geometry& geometry, const ChannelwiseOperands& operands, int64_t first_row, int64_t last_row);
void run_max_pool(const Geometry& geometry, const ChannelwiseOperands& operands, int64_t first_row, int64_t last_row);

// What panels there are: channels_last up to two vectors of `widest_lanes`, one vector of a power of two from 4 on;
// contiguous 1, 2, 4 or 8 filters up to `most_filters`, which are its `lanes`.
int64_t widest_lanes();
int64_t most_filters();
bool has_panel(int64_t lanes, int64_t vectors, bool channels_last);

}  // namespace fxprune

// The operators fxprune_native: checks, allocation and threads around the kernels.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "native_conv.h"

namespace {

constexpr int64_t kBudget = 64 * 1024;  // floats of input or output that a task works on: a quarter of a 1 MiB L2 cache

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

bool is_within(const at::Tensor& places, int64_t stop) {
  const int32_t* first = places.const_data_ptr<int32_t>();
  return std::all_of(first, first + places.numel(), [&](int32_t place) { return place >= 0 && place < stop; });
}

// Tables that disagree would make the kernel read or write outside of its memory.
void check_tables(const at::Tensor& weights, const at::Tensor& bias, const at::Tensor& panels, const at::Tensor& index,
                  const at::Tensor& out, int64_t taps, int64_t channels, bool channels_last) {
  TORCH_CHECK(panels.dim() == 2 && panels.size(1) == sizeof(fxprune::Panel) / sizeof(int64_t) && index.dim() == 2 &&
                  out.dim() == 1,
              "fxprune: panels must be (P, 7), index (groups, kept) and out (O), not ", panels.sizes(), ", ",
              index.sizes(), " and ", out.sizes());
  for (const at::Tensor* table : {&weights, &bias, &panels, &index, &out})
    TORCH_CHECK(table->is_contiguous() && table->device().is_cpu(), "fxprune: a table ", table->sizes(),
                " is not contiguous memory of the CPU");
  TORCH_CHECK(is_within(index, channels), "fxprune: the index reads outside of the ", channels, " channels");
  TORCH_CHECK(is_within(out, out.size(0)), "fxprune: filters are written outside of the ", out.size(0), " channels");
  const auto* panel = reinterpret_cast<const fxprune::Panel*>(panels.const_data_ptr<int64_t>());
  int64_t filters = 0;
  for (int64_t i = 0; i < panels.size(0); ++i, ++panel) {
    const int64_t width = panel->lanes * panel->vectors;
    TORCH_CHECK(panel->group >= 0 && panel->group < index.size(0) && panel->first == filters && panel->filters > 0 &&
                    panel->filters <= width && (channels_last || panel->filters == width) &&
                    fxprune::has_panel(panel->lanes, panel->vectors, channels_last) &&
                    panel->weights >= 0 && panel->weights + taps * index.size(1) * width <= weights.numel() &&
                    panel->bias >= 0 && panel->bias + width <= bias.numel(),
                "fxprune: panel ", i, " does not fit the weights, the bias or the index; pack them anew");
    filters += panel->filters;
  }
  TORCH_CHECK(filters == out.size(0), "fxprune: the panels have ", filters, " filters, and out has ", out.size(0));
}

// Runs `work(i, scratch)` for all `i` below `tasks`, in threads.
template <typename Work>
void in_parallel(int64_t tasks, int64_t scratch_size, const Work& work) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[scratch_size]);  // not set to zero: that takes time
    for (int64_t i = begin; i < end; ++i) work(i, scratch.get());
  });
}

// How many shares of the panels give each thread a task, if there are `tasks` with all panels.
int64_t shares(int64_t tasks, int64_t panels) {
  const int64_t threads = at::get_num_threads();
  return std::min(panels, tasks >= threads ? 1 : (threads + tasks - 1) / tasks);
}

// Tasks: as many pixels as have their input and output in the cache, all panels. Rows that are longer are cut, short
// ones taken together, over all images.
void run_channels_last(fxprune::Geometry g, const fxprune::Operands& a) {
  if (g.kernel_height * g.kernel_width * g.stride_height * g.stride_width == 1 && !(g.padding_height | g.padding_width)) {
    g.width = g.out_width = g.images * g.height * g.width;  // all pixels are one row
    g.images = g.height = g.out_height = 1;
  }
  const int64_t rows = g.images * g.out_height;
  const int64_t per_row = g.out_width * std::max(g.stride_width * g.stride_height * g.channels, g.out_channels);
  const int64_t cuts = g.padding_width ? 1 : std::max<int64_t>(1, (per_row + kBudget - 1) / kBudget);
  const int64_t row_step = std::min(rows, std::max<int64_t>(1, kBudget / per_row));
  const int64_t parts = (rows + row_step - 1) / row_step;
  const int64_t splits = shares(parts * cuts, a.panel_count);
  const int64_t scratch_size = fxprune::channels_last_scratch(g, row_step, (g.out_width + cuts - 1) / cuts);
  in_parallel(parts * cuts * splits, scratch_size, [&](int64_t i, float* scratch) {
    const int64_t split = i % splits, cut = i / splits % cuts, part = i / splits / cuts;
    fxprune::Task task{};
    task.first_row = rows * part / parts;
    task.last_row = rows * (part + 1) / parts;
    task.first_column = g.out_width * cut / cuts;
    task.last_column = g.out_width * (cut + 1) / cuts;
    task.first_panel = a.panel_count * split / splits;
    task.last_panel = a.panel_count * (split + 1) / splits;
    fxprune::run_channels_last(g, a, task, scratch);
  });
}

// Tasks: as many rows of an image as have their input and output in the cache, but not so few that copying the rows
// around them takes long.
void run_contiguous(fxprune::Geometry g, const fxprune::Operands& a) {
  if (g.kernel_height * g.kernel_width * g.stride_height * g.stride_width == 1 && !(g.padding_height | g.padding_width)) {
    g.width = g.out_width = g.height * g.width;  // all pixels of an image are one row
    g.height = g.out_height = 1;
  }
  const int64_t per_row = std::max(g.width * g.stride_height * g.channels, g.out_width * g.out_channels);
  const int64_t row_step = std::min(g.out_height, std::max<int64_t>(4, kBudget / per_row));
  const int64_t parts = (g.out_height + row_step - 1) / row_step;
  const int64_t splits = shares(g.images * parts, a.panel_count);
  in_parallel(g.images * parts * splits, fxprune::contiguous_scratch(g, row_step), [&](int64_t i, float* scratch) {
    const int64_t split = i % splits, part = i / splits % parts;
    fxprune::Task task{};
    task.image = i / splits / parts;
    task.first_row = g.out_height * part / parts;
    task.last_row = g.out_height * (part + 1) / parts;
    task.first_panel = a.panel_count * split / splits;
    task.last_panel = a.panel_count * (split + 1) / splits;
    fxprune::run_contiguous(g, a, task, scratch);
  });
}

// Rows of the output, as many at a time as have their input and output in the cache.
template <typename Run>
void run_channelwise(const fxprune::Geometry& g, const fxprune::ChannelwiseOperands& a, const Run& run) {
  const int64_t rows = g.images * g.out_height;
  const int64_t per_row = std::max(g.width * g.stride_height, g.out_width) * g.channels;
  const int64_t step = std::max<int64_t>(1, kBudget / std::max<int64_t>(1, per_row));
  at::parallel_for(0, rows, step, [&](int64_t begin, int64_t end) { run(g, a, begin, end); });
}

void check_input(const at::Tensor& input) {
  TORCH_CHECK(input.dim() == 4 && input.scalar_type() == at::kFloat && input.device().is_cpu(),
              "fxprune: the compiled kernel takes float32 (N, C, H, W) on the CPU, not ", input.scalar_type(), " ",
              input.sizes(), " on ", input.device());
}

void check_window(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const auto is_pair = [](at::IntArrayRef values, int64_t least) {
    return values.size() == 2 && values[0] >= least && values[1] >= least;
  };
  TORCH_CHECK(is_pair(kernel, 1) && is_pair(stride, 1) && is_pair(padding, 0) && is_pair(dilation, 1),
              "fxprune: no convolution or pooling has kernel ", kernel, ", stride ", stride, ", padding ", padding, ", dilation ",
              dilation);
}

fxprune::Geometry geometry(const at::Tensor& x, int64_t out_channels, int64_t kept, at::IntArrayRef kernel,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  fxprune::Geometry g{};
  g.images = x.size(0);
  g.channels = x.size(1);
  g.height = x.size(2);
  g.width = x.size(3);
  g.kept = kept;
  g.out_channels = out_channels;
  g.kernel_height = kernel[0];
  g.kernel_width = kernel[1];
  g.stride_height = stride[0];
  g.stride_width = stride[1];
  g.padding_height = padding[0];
  g.padding_width = padding[1];
  g.dilation_height = dilation[0];
  g.dilation_width = dilation[1];
  g.out_height = out_size(g.height, kernel[0], stride[0], padding[0], dilation[0]);
  g.out_width = out_size(g.width, kernel[1], stride[1], padding[1], dilation[1]);
  TORCH_CHECK(g.out_height > 0 && g.out_width > 0, "fxprune: an input of ", g.height, "x", g.width,
              " is smaller than the kernel");
  return g;
}

at::Tensor result(const fxprune::Geometry& g, const at::Tensor& x, at::MemoryFormat format) {
  return at::empty({g.images, g.out_channels, g.out_height, g.out_width}, x.options().memory_format(format));
}

// The residual in the format of `y`; undefined if there is none.
at::Tensor added(const std::optional<at::Tensor>& residual, const at::Tensor& y, at::MemoryFormat format) {
  if (!residual) return {};
  TORCH_CHECK(residual->sizes() == y.sizes() && residual->scalar_type() == at::kFloat,
              "fxprune: the residual must be float32 ", y.sizes(), ", not ", residual->scalar_type(), " ",
              residual->sizes());
  return residual->contiguous(format);
}

const float* data_of(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

float bound(std::optional<double> value, float otherwise) {
  return value ? static_cast<float>(*value) : otherwise;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// panels (P, 7) int64, see fxprune::Panel; index (groups, kept) int32; out (O,) int32.
at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weights, const at::Tensor& bias, const at::Tensor& panels,
                  const at::Tensor& index, const at::Tensor& out, const std::optional<at::Tensor>& residual,
                  at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                  int64_t channels, std::optional<double> minimum, std::optional<double> maximum, bool channels_last) {
  check_input(input);
  TORCH_CHECK(input.size(1) == channels, "fxprune: the convolution reads ", channels, " channels; the input has ",
              input.size(1));
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor x = input.contiguous(format);
  check_window(kernel, stride, padding, dilation);
  check_tables(weights, bias, panels, index, out, kernel[0] * kernel[1], channels, channels_last);
  const fxprune::Geometry g = geometry(x, out.size(0), index.size(1), kernel, stride, padding, dilation);
  at::Tensor y = result(g, x, format);
  const at::Tensor addend = added(residual, y, format);
  if (!y.numel()) return y;

  fxprune::Operands a{};
  a.x = data_of(x);
  a.weights = data_of(weights);
  a.bias = data_of(bias);
  a.index = index.const_data_ptr<int32_t>();
  a.out = out.const_data_ptr<int32_t>();
  a.residual = data_of(addend);
  a.minimum = bound(minimum, -kInfinity);
  a.maximum = bound(maximum, kInfinity);
  a.y = y.data_ptr<float>();
  a.panels = reinterpret_cast<const fxprune::Panel*>(panels.const_data_ptr<int64_t>());
  a.panel_count = panels.size(0);
  channels_last ? run_channels_last(g, a) : run_contiguous(g, a);
  return y;
}

// weights (taps, C) and bias (C,) float32.
at::Tensor depthwise_conv2d(const at::Tensor& input, const at::Tensor& weights, const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual, at::IntArrayRef kernel, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, std::optional<double> minimum,
                            std::optional<double> maximum) {
  check_input(input);
  const auto format = at::MemoryFormat::ChannelsLast;
  const at::Tensor x = input.contiguous(format);
  check_window(kernel, stride, padding, dilation);
  const fxprune::Geometry g = geometry(x, x.size(1), 1, kernel, stride, padding, dilation);
  const auto is_table = [&](const at::Tensor& table, at::IntArrayRef sizes) {
    return table.sizes() == sizes && table.is_contiguous() && table.device().is_cpu() &&
           table.scalar_type() == at::kFloat;
  };
  TORCH_CHECK(is_table(weights, {kernel[0] * kernel[1], g.channels}), "fxprune: the weights ", weights.sizes(),
              " are not contiguous float32 (", kernel[0] * kernel[1], ", ", g.channels, ")");
  TORCH_CHECK(!bias || is_table(*bias, {g.channels}), "fxprune: the bias is not contiguous float32 (", g.channels, ")");
  at::Tensor y = result(g, x, format);
  const at::Tensor addend = added(residual, y, format);
  if (!y.numel()) return y;

  fxprune::ChannelwiseOperands a{};
  a.x = data_of(x);
  a.weights = data_of(weights);
  a.bias = bias ? data_of(*bias) : nullptr;
  a.residual = data_of(addend);
  a.minimum = bound(minimum, -kInfinity);
  a.maximum = bound(maximum, kInfinity);
  a.y = y.data_ptr<float>();
  run_channelwise(g, a, fxprune::run_depthwise);
  return y;
}

at::Tensor max_pool2d(const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation) {
  check_input(input);
  const auto format = at::MemoryFormat::ChannelsLast;
  const at::Tensor x = input.contiguous(format);
  check_window(kernel, stride, padding, dilation);
  const fxprune::Geometry g = geometry(x, x.size(1), 1, kernel, stride, padding, dilation);
  TORCH_CHECK(padding[0] * 2 <= kernel[0] && padding[1] * 2 <= kernel[1], "fxprune: padding ", padding,
              " is more than half of the kernel ", kernel);
  at::Tensor y = result(g, x, format);
  if (!y.numel()) return y;
  fxprune::ChannelwiseOperands a{};
  a.x = data_of(x);
  a.y = y.data_ptr<float>();
  run_channelwise(g, a, fxprune::run_max_pool);
  return y;
}

int64_t widest_lanes() { return fxprune::widest_lanes(); }
int64_t most_filters() { return fxprune::most_filters(); }

}  // namespace

TORCH_LIBRARY(fxprune_native, m) {
  m.def("widest_lanes() -> int", &widest_lanes);
  m.def("most_filters() -> int", &most_filters);
  m.def(
      "conv2d(Tensor input, Tensor weights, Tensor bias, Tensor panels, Tensor index, Tensor out, Tensor? residual, "
      "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, int channels, float? minimum, float? maximum, "
      "bool channels_last=True) -> Tensor");
  m.def(
      "depthwise_conv2d(Tensor input, Tensor weights, Tensor? bias, Tensor? residual, int[2] kernel, int[2] stride, "
      "int[2] padding, int[2] dilation, float? minimum, float? maximum) -> Tensor");
  m.def("max_pool2d(Tensor input, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
}

TORCH_LIBRARY_IMPL(fxprune_native, CPU, m) {
  m.impl("conv2d", &conv2d);
  m.impl("depthwise_conv2d", &depthwise_conv2d);
  m.impl("max_pool2d", &max_pool2d);
}

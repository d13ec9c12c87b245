// The operator fxprune_native::conv2d: checks, allocation and threads around the kernel of native_conv.cpp.
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
                  const at::Tensor& out, int64_t taps, int64_t channels) {
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
                    panel->filters <= width && fxprune::has_tile(panel->lanes, panel->vectors) &&
                    panel->weights >= 0 && panel->weights + taps * index.size(1) * width <= weights.numel() &&
                    panel->bias >= 0 && panel->bias + width <= bias.numel(),
                "fxprune: panel ", i, " does not fit the weights, the bias or the index; pack them anew");
    filters += panel->filters;
  }
  TORCH_CHECK(filters == out.size(0), "fxprune: the panels have ", filters, " filters, and out has ", out.size(0));
}

// panels (P, 7) int64, see fxprune::Panel; index (groups, kept) int32; out (O,) int32.
at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weights, const at::Tensor& bias, const at::Tensor& panels,
                  const at::Tensor& index, const at::Tensor& out, const std::optional<at::Tensor>& residual,
                  at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                  int64_t channels, std::optional<double> minimum, std::optional<double> maximum) {
  TORCH_CHECK(input.dim() == 4 && input.scalar_type() == at::kFloat && input.device().is_cpu(),
              "fxprune: the compiled convolution takes float32 (N, C, H, W) on the CPU, not ", input.scalar_type(), " ",
              input.sizes(), " on ", input.device());
  TORCH_CHECK(input.size(1) == channels, "fxprune: the convolution reads ", channels, " channels; the input has ",
              input.size(1));
  const auto is_pair = [](at::IntArrayRef values, int64_t least) {
    return values.size() == 2 && values[0] >= least && values[1] >= least;
  };
  TORCH_CHECK(is_pair(kernel, 1) && is_pair(stride, 1) && is_pair(padding, 0) && is_pair(dilation, 1),
              "fxprune: no convolution has kernel ", kernel, ", stride ", stride, ", padding ", padding, ", dilation ",
              dilation);
  check_tables(weights, bias, panels, index, out, kernel[0] * kernel[1], channels);
  const at::Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  fxprune::Geometry g{};
  g.images = x.size(0);
  g.channels = channels;
  g.height = x.size(2);
  g.width = x.size(3);
  g.kept = index.size(1);
  g.out_channels = out.size(0);
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
  at::Tensor y = at::empty({g.images, g.out_channels, g.out_height, g.out_width},
                           x.options().memory_format(at::MemoryFormat::ChannelsLast));
  at::Tensor added;
  if (residual) {
    TORCH_CHECK(residual->sizes() == y.sizes() && residual->scalar_type() == at::kFloat,
                "fxprune: the residual must be float32 ", y.sizes(), ", not ", residual->scalar_type(), " ",
                residual->sizes());
    added = residual->contiguous(at::MemoryFormat::ChannelsLast);
  }
  if (!y.numel()) return y;
  if (kernel[0] * kernel[1] == 1 && stride[0] * stride[1] == 1 && !(padding[0] | padding[1])) {
    g.width = g.out_width = g.images * g.height * g.width;  // all pixels are one row
    g.images = g.height = g.out_height = 1;
  }

  constexpr double infinity = std::numeric_limits<double>::infinity();
  fxprune::Operands a{};
  a.x = x.const_data_ptr<float>();
  a.weights = weights.const_data_ptr<float>();
  a.bias = bias.const_data_ptr<float>();
  a.index = index.const_data_ptr<int32_t>();
  a.out = out.const_data_ptr<int32_t>();
  a.residual = added.defined() ? added.const_data_ptr<float>() : nullptr;
  a.minimum = static_cast<float>(minimum.value_or(-infinity));
  a.maximum = static_cast<float>(maximum.value_or(infinity));
  a.y = y.data_ptr<float>();
  a.panels = reinterpret_cast<const fxprune::Panel*>(panels.const_data_ptr<int64_t>());
  a.panel_count = panels.size(0);

  // Tasks: as many pixels as have their input and output in the cache, all panels. Rows that are longer are cut, short ones taken
  // together; where that gives fewer tasks than threads, each takes a share of the panels.
  const int64_t rows = g.images * g.out_height;
  const int64_t per_row = g.out_width * std::max(g.stride_width * g.stride_height * g.channels, g.out_channels);
  const int64_t cuts = g.padding_width ? 1 : std::max<int64_t>(1, (per_row + kBudget - 1) / kBudget);
  const int64_t row_step = std::min(rows, std::max<int64_t>(1, kBudget / std::max<int64_t>(per_row, 1)));
  const int64_t row_tasks = (rows + row_step - 1) / row_step;
  const int64_t threads = at::get_num_threads();
  const int64_t splits = std::min(a.panel_count, row_tasks * cuts >= threads ? 1 : (threads + row_tasks * cuts - 1) / (row_tasks * cuts));
  const int64_t scratch_size = fxprune::scratch_size(g, row_step);
  at::parallel_for(0, row_tasks * cuts * splits, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[scratch_size]);  // not set to zero: that takes time
    for (int64_t i = begin; i < end; ++i) {
      const int64_t split = i % splits, cut = i / splits % cuts, part = i / splits / cuts;
      fxprune::Task task{};
      task.first_row = rows * part / row_tasks;
      task.last_row = rows * (part + 1) / row_tasks;
      task.first_column = g.out_width * cut / cuts;
      task.last_column = g.out_width * (cut + 1) / cuts;
      task.first_panel = a.panel_count * split / splits;
      task.last_panel = a.panel_count * (split + 1) / splits;
      fxprune::run(g, a, task, scratch.get());
    }
  });
  return y;
}

int64_t widest_lanes() { return fxprune::widest_lanes(); }

}  // namespace

TORCH_LIBRARY(fxprune_native, m) {
  m.def("widest_lanes() -> int", &widest_lanes);
  m.def(
      "conv2d(Tensor input, Tensor weights, Tensor bias, Tensor panels, Tensor index, Tensor out, Tensor? residual, "
      "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, int channels, float? minimum, float? maximum) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(fxprune_native, CPU, m) { m.impl("conv2d", &conv2d); }

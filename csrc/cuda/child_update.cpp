// The steps of the ChildTuning optimizers for PyTorch on CUDA devices. The arithmetic is in kernels/cuda.
//
// Numbers of steps are on the CPU, as everywhere. What is read from the device, and waits for it: a learning rate or weight decay that is a
// tensor there, and found_inf and grad_scale, of which GradScaler has read the first anyway. The norm of max_grad_norm stays there.
#include "kernels/cuda/child_update.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "batch.h"
#include "child_update_arguments.h"
#include "device.h"

namespace pykernels {
namespace {

using cuda::ChildLaunch;
using cuda::ChildSlice;

// Puts the slices into `launch`, as many as it has room for, and calls use(), until all have been in it.
template <class Use>
void in_launches(ChildLaunch& launch, const std::vector<ChildSlice>& slices, Use use) {
  for (size_t first = 0; first < slices.size();) {
    launch.count = 0;
    launch.chunks = 0;
    for (; first < slices.size() && launch.count < cuda::kChildTensors; first++) {
      ChildSlice& t = launch.tensors[launch.count++] = slices[first];
      t.first_chunk = launch.chunks;
      launch.chunks += (t.elements + cuda::kChildChunk - 1) / cuda::kChildChunk;
    }
    use();
  }
}

at::Tensor workspace(int64_t count, at::ScalarType dtype, const at::Tensor& like) {
  return at::empty({count}, like.options().dtype(dtype));
}

class CudaChildCall : public ChildArguments {
 public:
  explicit CudaChildCall(const ChildInputs& in)
      : ChildArguments(in, in.square_sum && in.square_sum->device() == in.params[0].device()), moment_elements_(tensors.size()) {
    check_dtype(dtype, in.params[0]);
    for (size_t i = 0; i < tensors.size(); i++) {
      if (!tensors[i].runs) continue;
      keep_.push_back(in.runs.get(i)->contiguous().to(in.params[i].device()));
      tensors[i].runs = reinterpret_cast<const ElementRun*>(keep_.back().const_data_ptr<int64_t>());
    }
  }

  static void check_dtype(Dtype dtype, const at::Tensor& t) {
    TORCH_CHECK_TYPE(dtype != Dtype::float64, "params: expected float32, bfloat16 or float16 on CUDA, got ", t.scalar_type());
  }

  // Moments number `which` of each tensor, 0 or 1. How many elements a mask selects is known to the device alone: fewer moments than the
  // parameter has elements are taken for those of the selected ones, and none behind them are touched.
  void set_moments(const char* name, at::TensorList moments, int which) {
    check_moments(name, moments);
    for (size_t i = 0; i < tensors.size(); i++) {
      ChildTensor& t = tensors[i];
      const int64_t numel = in_.params[i].numel(), count = moments[i].numel();
      TORCH_CHECK_VALUE(count == numel || (t.mask && count < numel), name, "[", i, "]: expected ", numel, " elements like the parameter",
                        t.mask ? ", or one for each that the mask selects" : "", ", got ", count);
      TORCH_CHECK_VALUE(which == 0 || count == moment_elements_[i], name, "[", i, "]: expected ", moment_elements_[i],
                        " elements like the first moments, got ", count);
      moment_elements_[i] = count;
      t.compact = count < numel;
      (which == 0 ? t.m : t.v) = elements_of(moments[i]);
    }
  }

  void run(bool sgd, at::TensorList changed, cudaStream_t stream) {
    const at::Tensor& like = in_.params[0];
    ChildLaunch launch{};
    launch.args = args;
    launch.dtype = dtype;
    launch.sgd = sgd;
    at::Tensor square_sum;
    if (in_.square_sum && in_.square_sum->device() == like.device()) {
      square_sum = in_.square_sum->to(at::kDouble);
      launch.square_sum = square_sum.const_data_ptr<double>();
      launch.max_grad_norm = in_.max_grad_norm;
      launch.norm_factor = in_.grad_scale ? 1 / in_.grad_scale->item<double>() : 1;
    }
    std::vector<ChildSlice> slices;
    bool any_compact = false;
    for (size_t i = 0; i < tensors.size(); i++) {
      const ChildTensor& t = tensors[i];
      if (in_.params[i].numel() == 0) continue;
      const bool wide = aligned(t.p) && aligned(t.g) && (t.compact || (aligned(t.m) && aligned(t.v)));
      slices.push_back({t, in_.params[i].numel(), moment_elements_[i], 0, wide});
      any_compact |= t.compact;
    }
    in_launches(launch, slices, [&] {
      at::Tensor selected;
      if (any_compact) {
        selected = workspace(launch.chunks, at::kLong, like);
        launch.selected = selected.mutable_data_ptr<int64_t>();
        check_cuda(cuda::pykernels_cuda_child_update_count(&launch, stream), "child_update_count");
      }
      check_cuda(cuda::pykernels_cuda_child_update(&launch, stream), "child_update");
    });
    finish(changed);
  }

 private:
  std::vector<int64_t> moment_elements_;
};

void child_adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs, at::TensorList steps,
                  const OptionalTensors& masks, const OptionalTensors& runs, at::IntArrayRef streams, const OptionalTensor& grad_scale,
                  const OptionalTensor& found_inf, const OptionalTensor& square_sum, const at::Tensor& lr, const at::Tensor& weight_decay,
                  double beta1, double beta2, double eps, std::optional<double> reserve_p, double max_grad_norm, int64_t seed,
                  std::string_view where, std::string_view decay, std::string_view order, bool correct_bias, bool maximize,
                  bool stochastic_rounding) {
  TORCH_CHECK_VALUE(!params.empty(), "params: expected at least one tensor, got none");
  const OnDevice device(params[0]);
  CudaChildCall call({params, grads, steps, masks, runs, streams, grad_scale, found_inf, square_sum, lr, weight_decay, reserve_p,
                      max_grad_norm, seed, where, decay, maximize, stochastic_rounding});
  call.set_moments("exp_avgs", exp_avgs, 0);
  call.set_moments("exp_avg_sqs", exp_avg_sqs, 1);
  call.set_adamw({beta1, beta2, eps, order, correct_bias});
  if (call.skips()) return;
  std::vector<at::Tensor> moments(exp_avgs.begin(), exp_avgs.end());
  moments.insert(moments.end(), exp_avg_sqs.begin(), exp_avg_sqs.end());
  call.run(false, moments, device.stream);
}

void child_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList steps,
                const OptionalTensors& masks, const OptionalTensors& runs, at::IntArrayRef streams, const OptionalTensor& grad_scale,
                const OptionalTensor& found_inf, const OptionalTensor& square_sum, const at::Tensor& lr, const at::Tensor& weight_decay,
                double momentum, double dampening, bool nesterov, std::optional<double> reserve_p, double max_grad_norm, int64_t seed,
                std::string_view where, std::string_view decay, bool maximize, bool stochastic_rounding) {
  TORCH_CHECK_VALUE(!params.empty(), "params: expected at least one tensor, got none");
  const OnDevice device(params[0]);
  CudaChildCall call({params, grads, steps, masks, runs, streams, grad_scale, found_inf, square_sum, lr, weight_decay, reserve_p,
                      max_grad_norm, seed, where, decay, maximize, stochastic_rounding});
  if (momentum != 0) call.set_moments("momentum_buffers", momentum_buffers, 0);
  call.set_sgd({momentum, dampening, nesterov});
  if (call.skips()) return;
  call.run(true, momentum != 0 ? momentum_buffers : at::TensorList(), device.stream);
}

at::Tensor square_sum(at::TensorList grads) {
  const Dtype dtype = dtype_of_params(grads);
  const OnDevice device(grads[0]);
  CudaChildCall::check_dtype(dtype, grads[0]);
  std::vector<at::Tensor> keep;
  std::vector<ChildSlice> slices;
  int64_t chunks = 0;
  for (size_t i = 0; i < grads.size(); i++) {
    const at::Tensor& g = grads[i];
    TORCH_CHECK_TYPE(g.layout() == at::kStrided, "grads[", i, "]: expected a dense tensor, got ", g.layout());
    TORCH_CHECK_VALUE(g.device() == grads[0].device() && g.scalar_type() == grads[0].scalar_type(), "grads[", i, "]: expected ",
                      grads[0].scalar_type(), " on ", grads[0].device(), " like the first, got ", g.scalar_type(), " on ", g.device());
    if (g.numel() == 0) continue;
    keep.push_back(g.contiguous());
    ChildSlice slice{};
    slice.g = keep.back().const_data_ptr();
    slice.elements = g.numel();
    slice.wide = aligned(slice.g);
    slices.push_back(slice);
    chunks += (g.numel() + cuda::kChildChunk - 1) / cuda::kChildChunk;
  }
  const at::Tensor sum = at::zeros({}, grads[0].options().dtype(at::kDouble));
  if (chunks == 0) return sum;
  const at::Tensor partials = workspace(chunks, at::kDouble, grads[0]);
  ChildLaunch launch{};
  launch.dtype = dtype;
  launch.partials = partials.mutable_data_ptr<double>();
  in_launches(launch, slices, [&] {
    check_cuda(cuda::pykernels_cuda_child_update_squares(&launch, device.stream), "child_update_squares");
    launch.partials += launch.chunks;
  });
  check_cuda(
      cuda::pykernels_cuda_child_update_sum(partials.const_data_ptr<double>(), chunks, sum.mutable_data_ptr<double>(), device.stream),
      "child_update_sum");
  return sum;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, PYKERNELS_DEVICE_KEY, m) {
  m.impl("_child_adamw_", &child_adamw_);
  m.impl("_child_sgd_", &child_sgd_);
  m.impl("_child_square_sum", &square_sum);
}

}  // namespace pykernels

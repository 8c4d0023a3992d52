// torch's operators for CUDA, computed on the host: each calls the CPU's kernel on the same memory. Loaded where
// numbers are wanted; launches are then those of the project's own kernels only.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Copy.h>
#include <c10/cuda/CUDAFunctions.h>
#include <torch/library.h>

#include <algorithm>
#include <set>

namespace {
using c10::IValue;
using torch::jit::Stack;

// What torch does itself: memory, and copies between host and device.
const std::set<std::string> kTorchs = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::resize_", "aten::set_", "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset", "aten::set_.source_Tensor", "aten::is_set_to", "aten::record_stream",
    "aten::_local_scalar_dense", "aten::_pin_memory", "aten::is_pinned", "aten::copy_", "aten::_efficientzerotensor",
    "aten::_has_same_storage_numel", "aten::_fused_sdp_choice",
};

bool on_gpu(const at::Tensor& tensor) { return tensor.defined() && tensor.is_cuda(); }

// The same memory as a tensor of the host.
at::Tensor host(const at::Tensor& tensor) {
  if (!on_gpu(tensor)) return tensor;
  const auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  if (!tensor.numel()) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  at::Tensor view = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
  if (tensor.is_conj()) view._set_conj(true);
  if (tensor.is_neg()) view._set_neg(true);
  return view;
}

// A tensor of the host, as a new one of the device.
at::Tensor device(const at::Tensor& tensor, c10::Device place) {
  if (!tensor.defined() || !tensor.is_cpu()) return tensor;
  at::Tensor out = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(place));
  if (tensor.numel()) host(out).copy_(tensor);
  return out;
}

template <class Change>
IValue changed(const IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> out;
    for (at::Tensor tensor : value.toTensorList()) out.push_back(change(tensor));
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
      out.push_back(tensor ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    return out;
  }
  return value;
}

// Where the results belong: with the first tensor of a GPU, or where the call says.
c10::Device place_of(at::ArrayRef<IValue> arguments) {
  std::optional<c10::Device> found;
  for (const IValue& argument : arguments) {
    changed(argument, [&](const at::Tensor& tensor) {
      if (on_gpu(tensor) && !found) found = tensor.device();
      return tensor;
    });
  }
  for (const IValue& argument : arguments)
    if (!found && argument.isDevice() && argument.toDevice().is_cuda() && argument.toDevice().has_index())
      found = argument.toDevice();
  return found ? *found : c10::Device(at::kCUDA, c10::cuda::current_device());
}

bool is_written(const c10::AliasInfo* alias) { return alias && alias->isWrite(); }

// Tensors of the host beside those of a GPU: allowed for numbers and, by torch, for indices.
void check_places(const std::string& name, at::ArrayRef<IValue> arguments, c10::Device place) {
  const bool indices = name.find("index") != std::string::npos || name.find("_foreach") != std::string::npos;
  for (const IValue& argument : arguments) {
    if (!argument.isTensor() || !argument.toTensor().defined()) continue;
    const at::Tensor& tensor = argument.toTensor();
    const bool elsewhere = tensor.is_cpu() ? tensor.dim() > 0 && tensor.numel() && !indices
                                           : tensor.is_cuda() && tensor.device() != place;
    TORCH_CHECK(!elsewhere, "Expected all tensors to be on the same device (simulated GPU), but found ",
                tensor.device(), " and ", place, " in ", name);
  }
}

void compute(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), returned = schema.returns().size();
  const std::vector<IValue> given(stack->end() - long(count), stack->end());
  const c10::Device place = place_of(given);
  check_places(toString(op.operator_name()), given, place);
  torch::jit::drop(*stack, count);
  std::vector<IValue> passed;
  for (const IValue& value : given) {
    if (value.isDevice()) passed.push_back(c10::Device(at::kCPU));
    else if (value.isGenerator()) passed.emplace_back();  // the host's own: torch seeds both alike
    else passed.push_back(changed(value, host));
    stack->push_back(passed.back());
  }
  {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    op.callBoxed(stack);
  }
  std::vector<IValue> results(stack->end() - long(returned), stack->end());
  torch::jit::drop(*stack, returned);
  // an output that was empty has got its size now
  for (size_t i = 0; i < count; ++i) {
    if (!is_written(schema.arguments()[i].alias_info())) continue;
    if (!given[i].isTensor() || !on_gpu(given[i].toTensor())) continue;
    const at::Tensor target = given[i].toTensor(), computed = passed[i].toTensor();
    if (target.sizes() == computed.sizes()) continue;
    target.resize_(computed.sizes());
    if (computed.numel()) host(target).copy_(computed);
  }
  for (size_t k = 0; k < returned; ++k) {
    const auto* alias = schema.returns()[k].alias_info();
    size_t same = count;
    for (size_t i = 0; i < count && is_written(alias); ++i) {
      const auto* other = schema.arguments()[i].alias_info();
      if (is_written(other) && *other == *alias) same = i;
    }
    const auto moved = [&](const at::Tensor& tensor) { return device(tensor, place); };
    stack->push_back(same < count ? given[same] : changed(results[k], moved));
  }
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (!to.is_cuda() || !from.is_cuda()) return at::native::copy_(to, from, non_blocking);
  host(to).copy_(host(from));
  return to;
}

bool is_a_view(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns())
    if (result.alias_info() && !result.alias_info()->isWrite()) return true;
  return false;
}

const std::vector<c10::DispatchKey> kHosts = {c10::DispatchKey::CPU, c10::DispatchKey::CompositeExplicitAutograd,
                                              c10::DispatchKey::CompositeExplicitAutogradNonFunctional,
                                              c10::DispatchKey::CompositeImplicitAutograd};

struct Registration {
  std::vector<c10::RegistrationHandleRAII> kept;
  std::unique_ptr<torch::Library> own;

  Registration() {
    own = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    own->impl("copy_", TORCH_FN(copy));
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const auto& name : dispatcher.getAllOpNames()) {
      if (name.name.rfind("aten::", 0) || kTorchs.count(toString(name))) continue;
      const auto op = dispatcher.findOp(name);
      if (!op || !op->hasSchema() || is_a_view(op->schema())) continue;
      if (!op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
      // what the host lacks is written in computing.py; a kernel that is in neither says its name at its launch
      const auto has = [&](c10::DispatchKey key) { return op->hasKernelForDispatchKey(key); };
      if (std::none_of(kHosts.begin(), kHosts.end(), has)) continue;
      const auto kernel = c10::KernelFunction::makeFromBoxedFunction<&compute>();
      kept.push_back(
          dispatcher.registerImpl(name, c10::DispatchKey::CUDA, kernel, std::nullopt, nullptr, "simulated GPU"));
    }
  }
};

// torch warns of each kernel that is replaced
struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};
}  // namespace

extern "C" __attribute__((visibility("default"))) void simulated_gpu_compute() {
  static Silence silence;
  auto* before = c10::WarningUtils::get_warning_handler();
  c10::WarningUtils::set_warning_handler(&silence);
  static auto* registration = new Registration;
  (void)registration;
  c10::WarningUtils::set_warning_handler(before);
}

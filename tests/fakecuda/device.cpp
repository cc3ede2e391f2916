// A device called "cuda" for a CPU build of torch, by which what is meant for a GPU is tested where there is none.
//
// It has memory, a generator and a stream, and no kernels of its own: an operator on its tensors runs the CPU's kernel
// on stand-ins for them, tensors of the CPU in the same memory. What CUDA refuses is refused: tensors of two devices in
// one operator, and generators of another device. Memory that was never written to is full of NaN.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::DispatchKey, c10::DispatchKeySet, c10::Storage, c10::Stream;

namespace {

const Device THE_DEVICE(DeviceType::CUDA, 0);
const Stream THE_STREAM(Stream::DEFAULT, THE_DEVICE);

// --- memory, streams, random numbers: what torch asks of every device -------------------------------------------------

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? std::malloc(bytes) : nullptr;
    if (memory) std::memset(memory, 0xFF, bytes);
    return {memory, memory, &std::free, THE_DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Allocator allocator;
REGISTER_ALLOCATOR(DeviceType::CUDA, &allocator);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return THE_DEVICE; }
  Device getDevice() const override { return THE_DEVICE; }
  Stream getStream(Device) const noexcept override { return THE_STREAM; }
  Stream getDefaultStream(Device) const override { return THE_STREAM; }
  Stream exchangeStream(Stream) const noexcept override { return THE_STREAM; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// A generator of the CPU under the name of the device. Its numbers are others for the same seed, as CUDA's are.
struct Generator final : c10::GeneratorImpl {
  Generator() : c10::GeneratorImpl(THE_DEVICE, DispatchKeySet(DispatchKey::CUDA)) { set_current_seed(seed_); }

  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    cpu.set_current_seed(~seed);
  }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "this generator has no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "this generator has no offset"); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator;
    copy->seed_ = seed_;
    copy->cpu = cpu.clone();
    return copy;
  }

  at::Generator cpu = at::detail::createCPUGenerator();

 private:
  uint64_t seed_ = c10::default_rng_seed_val;
};

const at::Generator& default_generator() {
  static const auto generator = at::make_generator<Generator>();
  return generator;
}

}  // namespace

namespace at {

// torch looks this class up by its name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
  Generator getNewGenerator(DeviceIndex) const override {
    static bool asked = false;  // the first that Python asks for is the default one, which it gets in no other way
    return std::exchange(asked, true) ? make_generator<::Generator>() : default_generator();
  }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace {

// --- operators --------------------------------------------------------------------------------------------------------

Tensor tensor_like(const Tensor& like, Storage storage, DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// The tensors of one operator: the device's, and the CPU's that stand for them.
class Call {
 public:
  Tensor to_cpu(const Tensor& given) {
    if (!given.defined() || !given.is_cuda()) return given;
    for (auto& [tensor, standin] : tensors_)
      if (tensor.is_same(given)) return standin;
    auto standin = tensor_like(given, cpu_storage(given.storage()), DispatchKey::CPU);
    tensors_.emplace_back(given, standin);
    return standin;
  }

  Tensor to_device(const Tensor& result) {
    if (!result.defined() || !result.is_cpu()) return result;
    for (auto& [tensor, standin] : tensors_)
      if (standin.is_same(result)) return tensor;
    return tensor_like(result, device_storage(result.storage()), DispatchKey::CUDA);
  }

  // Gives the device's tensors what the operator has made of their stand-ins' memory and shape, as `out=` may.
  void write_back() {
    for (auto& [storage, standin] : storages_) {
      if (storage.data() == standin.data()) continue;
      storage.set_data_ptr_noswap(same_memory(standin, THE_DEVICE));
      storage.set_nbytes(standin.nbytes());
    }
    for (auto& [tensor, standin] : tensors_)
      if (tensor.sizes() != standin.sizes() || tensor.strides() != standin.strides())
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(standin.sizes(), standin.strides());
  }

 private:
  // The memory of a storage, which is kept alive, under the name of another device.
  static c10::DataPtr same_memory(const Storage& storage, Device device) {
    auto free = [](void* kept) { delete static_cast<Storage*>(kept); };
    return {storage.mutable_data(), new Storage(storage), free, device};
  }
  static Storage under_name(const Storage& storage, Device device, c10::Allocator* of) {
    return Storage(Storage::use_byte_size_t(), storage.nbytes(), same_memory(storage, device), of, /*resizable=*/true);
  }
  Storage cpu_storage(const Storage& given) {
    for (auto& [storage, standin] : storages_)
      if (storage.is_alias_of(given)) return standin;
    auto standin = under_name(given, DeviceType::CPU, c10::GetAllocator(DeviceType::CPU));
    storages_.emplace_back(given, standin);
    return standin;
  }
  Storage device_storage(const Storage& result) {
    for (auto& [storage, standin] : storages_)
      if (standin.is_alias_of(result)) return storage;
    auto storage = under_name(result, THE_DEVICE, &allocator);
    storages_.emplace_back(storage, result);
    return storage;
  }

  std::vector<std::pair<Tensor, Tensor>> tensors_;
  std::vector<std::pair<Storage, Storage>> storages_;
};

// CUDA takes numbers from the host everywhere, and indices in these operators.
void refuse_mixture(const std::string& op, const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cuda() || tensor.dim() == 0) return;
  for (auto* one : {"aten::index", "aten::_index_put_impl_", "aten::_unsafe_index"})
    if (op.rfind(one, 0) == 0) return;
  TORCH_CHECK(false, op, ": Expected all tensors to be on the same device, but found cuda and ", tensor.device());
}

const c10::TypePtr generator_type = c10::OptionalType::create(c10::GeneratorType::get());

c10::IValue argument_on_cpu(Call& call, const std::string& op, const c10::IValue& value, const c10::Type& type) {
  auto converted = [&](const Tensor& tensor) {
    refuse_mixture(op, tensor);
    return call.to_cpu(tensor);
  };
  if (value.isTensor()) return converted(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorList()) list.push_back(converted(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
      list.push_back(tensor ? std::optional(converted(*tensor)) : std::nullopt);
    return list;
  }
  if (value.isDevice()) return Device(DeviceType::CPU);
  if (type == *generator_type) {
    auto generator = value.isNone() ? default_generator() : value.toGenerator();
    TORCH_CHECK(generator.device().is_cuda(), op, ": expected a generator on cuda, but found ", generator.device());
    return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu;
  }
  return value;
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto &arguments = schema.arguments(), &returns = schema.returns();
  Call call;
  auto value = stack->end() - arguments.size();
  for (auto& argument : arguments) {
    *value = argument_on_cpu(call, schema.name(), *value, *argument.type());
    ++value;
  }
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  call.write_back();
  for (auto result = stack->end() - returns.size(); result != stack->end(); ++result) {
    if (result->isTensor()) *result = call.to_device(result->toTensor());
    if (!result->isTensorList()) continue;
    c10::List<Tensor> list;
    for (const Tensor& tensor : result->toTensorList()) list.push_back(call.to_device(tensor));
    *result = list;
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

// --- operators that make or view memory, and those that differ on CUDA ------------------------------------------------

using Size = c10::IntArrayRef;
using Type = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Where = std::optional<Device>;
using Pinned = std::optional<bool>;

Tensor empty(Size size, Type dtype, Layout, Where, Pinned, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &allocator, DispatchKeySet(DispatchKey::CUDA), at::dtype_or_default(dtype), format);
}

Tensor empty_strided(Size size, Size stride, Type dtype, Layout, Where, Pinned) {
  return at::detail::empty_strided_generic(
      size, stride, &allocator, DispatchKeySet(DispatchKey::CUDA), at::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool) {  // between devices too
  at::AutoDispatchBelowADInplaceOrView below;
  Call call;
  call.to_cpu(to).copy_(call.to_cpu(from));
  return to;
}

// On CUDA alone softmax goes from half precision to float32 by itself.
template <Tensor softmax(const Tensor&, int64_t, bool)>
Tensor wide_softmax(const Tensor& x, int64_t dim, bool half_to_float) {
  at::AutoDispatchBelowADInplaceOrView below;
  Call call;
  return call.to_device(softmax(call.to_cpu(half_to_float ? x.to(at::kFloat) : x), dim, false));
}

template <Tensor backward(const Tensor&, const Tensor&, int64_t, at::ScalarType)>
Tensor wide_softmax_backward(const Tensor& grad, const Tensor& y, int64_t dim, at::ScalarType input_dtype) {
  at::AutoDispatchBelowADInplaceOrView below;
  Call call;
  return call.to_device(backward(call.to_cpu(grad), call.to_cpu(y), dim, grad.scalar_type())).to(input_dtype);
}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& x, double p, std::optional<bool>) {  // by the device's generator
  auto mask = at::empty_like(x, x.options().dtype(at::kBool)).bernoulli_(1 - p);
  return {x.mul(mask).mul(1 / (1 - p)), mask};
}

Tensor mm_dtype(const Tensor& a, const Tensor& b, at::ScalarType dtype) { return at::mm(a.to(dtype), b.to(dtype)); }

// That of plain operators, which every device has.
int64_t sdp_choice(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy_);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, Storage)>(&at::native::set_));
  library.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  library.impl("set_.source_Tensor", &at::native::set_tensor_);
  library.impl("_softmax", &wide_softmax<at::_softmax>);
  library.impl("_log_softmax", &wide_softmax<at::_log_softmax>);
  library.impl("_softmax_backward_data", &wide_softmax_backward<at::_softmax_backward_data>);
  library.impl("_log_softmax_backward_data", &wide_softmax_backward<at::_log_softmax_backward_data>);
  library.impl("native_dropout", &native_dropout);
  library.impl("mm.dtype", &mm_dtype);
  library.impl("_fused_sdp_choice", &sdp_choice);
}

}  // namespace

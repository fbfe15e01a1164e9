#include "cpu/runtime.hpp"

#include <stdexcept>
#include <utility>

#include "cpu/dispatch.hpp"

namespace vllmlite::cpu {

Float float_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return Float::f32;
    case DType::float16:
      return Float::f16;
    case DType::bfloat16:
      return Float::bf16;
    default:
      throw TypeError("expected float32, float16 or bfloat16, not " + std::string(name(dtype)));
  }
}

DType dtype_of(Float type) {
  constexpr DType kNames[] = {DType::float32, DType::float16, DType::bfloat16};
  return kNames[static_cast<int>(type)];
}

Runtime::Runtime(const std::string& isa, std::vector<std::vector<int>> places, DType dtype)
    : kernels_(choose_kernels(isa)),
      product_input_(dtype_of(kernels_.linear[static_cast<int>(float_of(dtype))].input)),
      team_(std::move(places)) {}

void Runtime::keep(const Tensor& tensor) {
  // Memory of the arena is reused only by later ops, which are later in the list as well.
  if (!Arena::owns(tensor)) keep(tensor.owner);
}

void Runtime::flush() {
  if (lasting_arena_ != nullptr) throw std::logic_error("a result was asked for while a graph is recorded");
  if (pending_.phases.empty()) return;
  const Recording now = std::exchange(pending_, {});
  team_.run(now.phases);
}

void Runtime::discard_free() {
  flush();
  arena_->discard();
  recordings_arena_->discard();
}

void Runtime::begin_recording() {
  flush();
  pending_ = {};
  lasting_arena_ = std::exchange(arena_, recordings_arena_);
}

std::shared_ptr<Recording> Runtime::end_recording() {
  auto recording = std::make_shared<Recording>(std::exchange(pending_, {}));
  recording->arena = std::exchange(arena_, std::exchange(lasting_arena_, nullptr));
  replay(*recording);
  return recording;
}

void Runtime::abandon_recording() {
  pending_ = {};
  arena_ = std::exchange(lasting_arena_, nullptr);
}

void Runtime::replay(const Recording& recording) {
  flush();
  team_.run(recording.phases);
}

}  // namespace vllmlite::cpu

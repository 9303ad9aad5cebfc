// Tells the emulator which memory PyTorch has allocated on the CPU, so that kernels called by operators are held to the bounds of tensors
// that nobody outside of the operator knows.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstring>

extern "C" {
void ptx_add_range(uint64_t low, uint64_t bytes, int writable);
void ptx_remove_range(uint64_t low);
}

namespace {

class Recording final : public c10::Allocator {
 public:
  explicit Recording(c10::Allocator* inner) : inner_(inner) {}

  c10::DataPtr allocate(size_t bytes) override {
    auto* own = new c10::DataPtr(inner_->allocate(bytes));
    void* data = own->get();
    if (data) ptx_add_range(reinterpret_cast<uint64_t>(data), bytes, 1);
    return {data, own, &release, own->device()};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void release(void* own) {
    auto* data = static_cast<c10::DataPtr*>(own);
    if (data->get()) ptx_remove_range(reinterpret_cast<uint64_t>(data->get()));
    delete data;
  }

  c10::Allocator* inner_;
};

}  // namespace

// From now on for the whole process.
extern "C" __attribute__((visibility("default"))) void ptx_record_allocations() {
  static bool done = false;
  if (!done) c10::SetCPUAllocator(new Recording(c10::GetCPUAllocator()), 1);
  done = true;
}

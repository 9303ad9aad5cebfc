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

c10::DeleterFnPtr inner_release = nullptr;

void release(void* data) {
  if (data) ptx_remove_range(reinterpret_cast<uint64_t>(data));
  inner_release(data);
}

// PyTorch also asks for plain pointers, which needs the context of an allocation to be its address.
class Recording final : public c10::Allocator {
 public:
  explicit Recording(c10::Allocator* inner) : inner_(inner) {
    inner_release = inner->raw_deleter();
    TORCH_CHECK(inner_release, "PyTorch's CPU allocator gives no plain pointers");
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* data = inner_->raw_allocate(bytes);
    if (data) ptx_add_range(reinterpret_cast<uint64_t>(data), bytes, 1);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  c10::Allocator* inner_;
};

}  // namespace

extern "C" {
void (*ptx_after_launcher)(const char* what) = nullptr;
}

// From now on for the whole process.
extern "C" __attribute__((visibility("default"))) void ptx_record_allocations() {
  static bool done = false;
  if (!done) c10::SetCPUAllocator(new Recording(c10::GetCPUAllocator()), 1);
  done = true;
}

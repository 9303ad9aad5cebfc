// What device code calls from outside of its module: printf and assert. And launches by name, for Python.
#include <cstdio>

#include "translated.h"

namespace simt {

// The arguments lie one behind the other, each aligned to its own size.
void device_printf(Thread&, u64 format, u64 arguments, const Site*) {
  u64 at = arguments;
  auto next = [&](u64 bytes) {
    at = (at + bytes - 1) / bytes * bytes;
    at += bytes;
    return at - bytes;
  };
  for (const char* f = reinterpret_cast<const char*>(format); *f; f++) {
    if (*f != '%' || f[1] == '%') {
      std::putchar(*f);
      f += *f == '%';
      continue;
    }
    std::string item(1, *f++);
    bool wide = false;
    while (*f && !std::strchr("diouxXeEfFgGaAcsp", *f)) {
      wide |= *f == 'l' || *f == 'z' || *f == 'j' || *f == 't';
      if (!std::strchr("lhzjt", *f)) item += *f;
      f++;
    }
    const char kind = *f;
    char text[512];
    if (std::strchr("eEfFgGaA", kind))
      std::snprintf(text, sizeof text, (item + kind).c_str(), load<f64>(next(8)));
    else if (kind == 's')
      std::snprintf(text, sizeof text, (item + kind).c_str(), reinterpret_cast<const char*>(load<u64>(next(8))));
    else if (kind == 'p')
      std::snprintf(text, sizeof text, "%p", reinterpret_cast<void*>(load<u64>(next(8))));
    else if (wide)
      std::snprintf(text, sizeof text, (item + "ll" + kind).c_str(), load<u64>(next(8)));
    else
      std::snprintf(text, sizeof text, (item + kind).c_str(), load<u32>(next(4)));
    std::fputs(text, stdout);
  }
  std::fflush(stdout);
}

void device_assert(Thread& t, u64 message, u64 file, u32 line, u64 function, const Site* site) {
  auto text = [](u64 a) { return std::string(reinterpret_cast<const char*>(a)); };
  fail(t, site, kAssert, text(file) + ":" + std::to_string(line) + ": " + text(function) + ": assertion `" + text(message) + "` failed");
}

extern "C" {

const Kernel* ptx_find(const Module* module, const char* name) {
  for (unsigned i = 0; i < module->kernels; i++)
    if (!std::strcmp(module->kernel[i].name, name)) return &module->kernel[i];
  return nullptr;
}

const unsigned* ptx_layout(const Kernel* k, unsigned* parameters, unsigned* bytes) {
  *parameters = k->parameters;
  *bytes = k->parameter_bytes;
  return k->layout;
}

int ptx_run(const Kernel* kernel, const unsigned* grid_and_block, unsigned dynamic_bytes, const void* parameters) {
  const unsigned* d = grid_and_block;
  return ptx_launch(kernel, {d[0], d[1], d[2]}, {d[3], d[4], d[5]}, dynamic_bytes, parameters);
}

}  // extern "C"

}  // namespace simt

// The Python module _C. Loading it registers the operators (ops.cpp); the functions here answer questions about it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "cpu_tier.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def(
      "cpu_tier", [] { return pykernels::cpu_tier_name(pykernels::cpu_tier()); },
      "Name of the instruction set that the CPU kernels use now.");
  m.def(
      "cpu_tiers",
      [] {
        py::list tiers;
        for (const auto& info : pykernels::cpu_tiers()) tiers.append(py::make_tuple(info.name, info.usable(), info.why_not));
        return tiers;
      },
      "All tiers in ascending order: (name, usable here, why not).");
  m.def(
      "set_cpu_tier", [](const std::string& name) { pykernels::set_cpu_tier(name); }, py::arg("name"),
      "Use this tier from now on. RuntimeError if it does not exist or cannot run here.");
  m.def(
      "set_cpu_tier_unchecked", [](const std::string& name) { pykernels::set_cpu_tier(name, false); }, py::arg("name"),
      "Use this tier whatever the processor says: for tests under an instruction emulator.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = PYKERNELS_TORCH_VERSION;
        info["compiler"] = PYKERNELS_COMPILER;
        info["tiers"] = std::map<std::string, std::string>{PYKERNELS_TIER_FLAGS};
        return info;
      },
      "What this library was built with: torch, compiler, and the compiler flags of each tier.");
}

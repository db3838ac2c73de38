// The Python module: what concerns the build and the machine. Nothing here takes a Tensor; importing it registers the
// operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "common/normal_float.h"
#include "cpu/isa.h"
#include "cpu/peak.h"

namespace py = pybind11;
using octavo::cpu::Isa;

#define OCTAVO_TEXT(word) #word
#define OCTAVO_TEXT_OF(macro) OCTAVO_TEXT(macro)

PYBIND11_MODULE(_C, m) {
  m.doc() = "octavo's compiled module: operators (torch.ops.octavo), the CPU's instruction set, the build";
  py::enum_<Isa>(m, "Isa", "CPU instruction set levels, in order")
      .value("portable", Isa::portable)
      .value("avx2", Isa::avx2)
      .value("avx512", Isa::avx512)
      .value("amx", Isa::amx);
  m.def("isa", &octavo::cpu::isa, "The level that the CPU kernels use");
  m.def("set_isa", &octavo::cpu::set_isa, py::arg("level"), "Use this level; ValueError when the machine lacks it");
  m.def(
      "set_isa", [](const std::string& name) { octavo::cpu::set_isa(octavo::cpu::isa_from_name(name)); },
      py::arg("level"));
  m.def("available_isas", &octavo::cpu::available, "The levels that this machine can run");
  m.def("peak", &octavo::cpu::peak, py::arg("kind"), py::arg("iterations"), py::call_guard<py::gil_scoped_release>(),
        "Operations done by a loop at the core's limit ('int8' or 'fma') at the level in force; the caller times it");
  m.def(
      "codebook",
      [](const std::string& name) {
        using namespace octavo;
        const auto list = [](const float* values, int count) { return std::vector<float>(values, values + count); };
        if (name == "dynamic") return list(kSignedMap.value, kCodes);
        if (name == "dynamic unsigned") return list(kUnsignedMap.value, kCodes);
        if (name == "nf8") return list(kNf8.value, kCodes);
        for (const auto& [known, book] : {std::pair{"nf2", &kNf2}, {"nf3", &kNf3}, {"nf4", &kNf4}, {"fp4", &kFp4}})
          if (name == known) return list(book->value, 1 << book->bits);
        throw py::value_error("octavo: no code book is called " + name);
      },
      py::arg("name"), "The values of a code book by their codes: dynamic, dynamic unsigned, nf2, nf3, nf4, nf8, fp4");
  m.def(
      "read_all",
      [](const py::buffer& buffer) {
        const py::buffer_info info = buffer.request();
        if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("octavo: read_all: not contiguous");
        py::gil_scoped_release release;
        return octavo::cpu::read_all(info.ptr, info.size * info.itemsize);
      },
      py::arg("buffer"), "Read a contiguous buffer once and return a sum of its words; the caller times it");
  m.def(
      "build_info",
      [] {
        py::dict info;
#ifdef OCTAVO_WITH_CUDA
        std::string archs = OCTAVO_TEXT_OF(OCTAVO_CUDA_ARCHS);
        std::replace(archs.begin(), archs.end(), '_', ' ');
        info["cuda"] = true;
        info["cuda_archs"] = archs;
#else
        info["cuda"] = false;
        info["cuda_archs"] = "";
#endif
        info["compiler"] = __VERSION__;
        std::vector<std::string> names;
        for (const Isa level : octavo::cpu::available()) names.push_back(octavo::cpu::name_of(level));
        info["isa"] = names;
        return info;
      },
      "How this module was built: cuda, cuda_archs, compiler, isa (levels usable here)");
}

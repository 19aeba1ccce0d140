// The Python module zoext._C over the torch-free core: build information, and raw words, normals and
// signs as NumPy arrays. Importing it also registers the CPU operators, which live in the same
// shared object.

// torch ships the headers of pybind11, and up to version 2.11 its copy refuses to be included where
// TORCH_TARGET_VERSION is defined. This file uses nothing of torch's own, so it needs no target.
#undef TORCH_TARGET_VERSION

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "core/normal.h"
#include "core/rules.h"
#include "core/sign.h"
#include "core/storage.h"
#include "cpu/loops/instruction_set.h"

namespace py = pybind11;

namespace zoext {
namespace {

template <class T>
T checked(const char* name, py::handle value) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    throw py::value_error(std::string(name) + " must be an integer in 0 .. 2^" + std::to_string(8 * sizeof(T)) +
                          " - 1, not " + py::repr(value).cast<std::string>());
  }
}

Field field_of(py::handle seed, py::handle key, py::handle stream) {
  return {checked<uint64_t>("seed", seed), checked<uint32_t>("key", key), checked<uint32_t>("stream", stream)};
}

py::array_t<uint32_t> words(py::handle seed, py::handle key, py::handle stream, py::handle first_block,
                            size_t blocks) {
  const Field field = field_of(seed, key, stream);
  const auto first = checked<uint64_t>("first_block", first_block);
  py::array_t<uint32_t> out({blocks, size_t{4}});
  uint32_t* to = out.mutable_data();
  for (size_t b = 0; b < blocks; ++b) {
    const Words<uint32_t> words = field.words(first + b);
    std::copy_n(words.w, 4, to + 4 * b);
  }
  return out;
}

py::array_t<float> normals(py::handle seed, py::handle key, py::handle stream, py::handle start, size_t count) {
  const Field field = field_of(seed, key, stream);
  const auto first = checked<uint64_t>("start", start);
  py::array_t<float> out(count);
  float* to = out.mutable_data();
  for (size_t i = 0; i < count; ++i) {
    const uint64_t index = first + i;
    const Words<uint32_t> words = field.words(index / 4);
    const int pair = index % 4 / 2 * 2;
    float sine, cosine;
    box_muller(words.w[pair], words.w[pair + 1], sine, cosine);
    to[i] = index % 2 ? cosine : sine;
  }
  return out;
}

py::array_t<float> signs(py::handle seed, py::handle key, py::handle stream, py::handle start, size_t count) {
  const Field field = field_of(seed, key, stream);
  const auto first = checked<uint64_t>("start", start);
  py::array_t<float> out(count);
  float* to = out.mutable_data();
  for (size_t i = 0; i < count; ++i) to[i] = sign_of_bit(sign_word(field, first + i), (first + i) % 32);
  return out;
}

py::array_t<float> normals_of_words(py::array_t<uint32_t, py::array::c_style | py::array::forcecast> words) {
  if (words.size() % 2)
    throw py::value_error("words must come in pairs; there are " + std::to_string(words.size()));
  py::array_t<float> out(words.size());
  const uint32_t* from = words.data();
  float* to = out.mutable_data();
  for (py::ssize_t i = 0; i < words.size(); i += 2) box_muller(from[i], from[i + 1], to[i], to[i + 1]);
  return out;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace
}  // namespace zoext

PYBIND11_MODULE(_C, m) {
  using namespace zoext;
  m.doc() = "The torch-free core of zoext.";
  m.def("words", &words, py::arg("seed"), py::kw_only(), py::arg("key") = 0, py::arg("stream") = 0,
        py::arg("first_block") = 0, py::arg("blocks") = 1,
        "Philox4x32-10 words of consecutive blocks: uint32 array [blocks, 4].");
  m.def("normals", &normals, py::arg("seed"), py::kw_only(), py::arg("key") = 0, py::arg("stream") = 0,
        py::arg("start") = 0, py::arg("count") = 1,
        "Standard normals of the elements start .. start + count - 1: float32 array [count].");
  m.def("signs", &signs, py::arg("seed"), py::kw_only(), py::arg("key") = 0,
        py::arg("stream") = static_cast<uint32_t>(Stream::sign), py::arg("start") = 0, py::arg("count") = 1,
        "Signs (+1 or -1) of the elements start .. start + count - 1: float32 array [count].");
  m.def("normals_of_words", &normals_of_words, py::arg("words"),
        "Box-Muller on consecutive pairs of words: float32 array of as many normals.");
  m.def(
      "step_seed",
      [](py::handle seed, py::handle step, py::handle draw) {
        return step_seed(checked<uint64_t>("seed", seed), checked<uint64_t>("step", step),
                         checked<uint32_t>("draw", draw));
      },
      py::arg("seed"), py::arg("step"), py::arg("draw") = 0,
      "The 64-bit seed of draw `draw` of step `step` of a run with seed `seed`.");
  m.def("available_instruction_sets", &cpu::available_instruction_sets,
        "What this build and this processor can run, best first.");
  m.def("instruction_set", [] { return std::string(cpu::instruction_set().name); }, "The one in use.");
  m.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"),
        "Chooses another one; results do not change by a bit. Not while an operator runs.");
  m.def(
      "rules", [] { return std::vector<std::string>(std::begin(Rules::names), std::end(Rules::names)); },
      "The names of the update rules, in the order of their numbers.");
  m.def(
      "rounded_dtypes",
      [] {
        std::vector<std::string> names;
        Storages::for_each([&](auto storage) {
          using Traits = StorageTraits<decltype(storage)>;
          if (Traits::can_round) names.emplace_back(Traits::name);
        });
        return names;
      },
      "The dtypes of weights that hold less than the arithmetic they are moved in.");
  m.def("compiler", &compiler, "The compiler of this build.");
}

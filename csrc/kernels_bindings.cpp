// The Python module medbridge_kernels._native: checks of numpy arrays and the GIL around grpo and group_advantages, no
// mathematics. Results go into arrays of the caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "group_advantages.h"
#include "grpo.h"

namespace py = pybind11;

namespace medbridge {
namespace {

std::string shape_of(const py::array& array) { return py::str(array.attr("shape")); }

template <class Value>
void check_type(const py::array& array, const char* name) {
  if (!py::isinstance<py::array_t<Value>>(array)) {
    throw py::type_error(std::string(name) + " must have dtype " + std::string(py::str(py::dtype::of<Value>())) + ", got " +
                         std::string(py::str(array.dtype())));
  }
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(Value) != 0) {
    throw py::value_error(std::string(name) + " isn't aligned to its elements");
  }
}

// A vector of `length` values, one beside the other.
template <class Value>
const Value* values(const py::array& array, const char* name, py::ssize_t length) {
  check_type<Value>(array, name);
  if (array.ndim() != 1 || array.shape(0) != length) {
    throw py::value_error(std::string(name) + " must have shape (" + std::to_string(length) + ",), got " + shape_of(array));
  }
  if (length > 1 && array.strides(0) != array.itemsize()) {
    throw py::value_error(std::string(name) + " must be contiguous, got a stride of " + std::to_string(array.strides(0)) +
                          " bytes");
  }
  return static_cast<const Value*>(array.data());
}

template <class Value>
Value* writable(py::array& array, const char* name, py::ssize_t length) {
  values<Value>(array, name, length);
  return static_cast<Value*>(array.mutable_data());  // refuses read-only arrays
}

LogitType type_named(const std::string& name) {
  if (name == "float32") return LogitType::kFloat32;
  if (name == "bfloat16") return LogitType::kBFloat16;
  if (name == "float16") return LogitType::kFloat16;
  throw py::value_error("dtype = '" + name + "': expected 'float32', 'bfloat16' or 'float16'");
}

// Half-precision values come as the int16 of the same bits: numpy has no bfloat16.
void check_matrix(const py::array& array, const char* name, LogitType type) {
  if (type == LogitType::kFloat32) {
    check_type<float>(array, name);
  } else {
    check_type<std::int16_t>(array, name);
  }
  if (array.ndim() != 2) throw py::value_error(std::string(name) + " must be [tokens, vocab], got shape " + shape_of(array));
  if (array.size() > 0 && array.shape(1) > 1 && array.strides(1) != array.itemsize()) {
    throw py::value_error(std::string(name) + " must be contiguous over the vocabulary, got a stride of " +
                          std::to_string(array.strides(1)) + " bytes");
  }
}

// In elements.
std::int64_t row_stride(const py::array& array, const char* name, bool written) {
  if (array.shape(0) == 1 || array.size() == 0) return array.shape(1);  // numpy's strides say nothing then
  const py::ssize_t stride = array.strides(0);
  const py::ssize_t least = written ? array.shape(1) * array.itemsize() : 0;
  if (stride < least || stride % array.itemsize() != 0) {
    throw py::value_error(std::string(name) + ": rows " + std::to_string(stride) + " bytes apart aren't supported" +
                          (written ? ", they must not overlap" : ""));
  }
  return stride / array.itemsize();
}

Logits logits_of(const py::array& array, const std::string& dtype) {
  const LogitType type = type_named(dtype);
  check_matrix(array, "logits", type);
  return {array.data(), type, array.shape(0), array.shape(1), row_stride(array, "logits", false)};
}

using MaybeArray = std::optional<py::array>;

Rows rows_of(const py::array& logits, const std::string& dtype, const py::array& token_ids, const MaybeArray& keep,
             double temperature, const MaybeArray& temperatures) {
  Rows rows;
  rows.logits = logits_of(logits, dtype);
  rows.token_ids = values<std::int64_t>(token_ids, "token_ids", rows.logits.tokens);
  if (keep) rows.keep = values<bool>(*keep, "keep", rows.logits.tokens);
  if (temperatures) rows.temperatures = values<float>(*temperatures, "temperatures", rows.logits.tokens);
  rows.temperature = temperature;
  return rows;
}

void sweep_arrays(const py::array& logits, const std::string& dtype, const py::array& token_ids, const MaybeArray& keep,
                  double temperature, const MaybeArray& temperatures, py::array& logprobs, MaybeArray& entropy,
                  py::array& lse) {
  const Rows rows = rows_of(logits, dtype, token_ids, keep, temperature, temperatures);
  const py::ssize_t tokens = rows.logits.tokens;
  SweepOutputs out;
  out.logprobs = writable<float>(logprobs, "logprobs", tokens);
  if (entropy) out.entropy = writable<float>(*entropy, "entropy", tokens);
  out.lse = writable<double>(lse, "lse", tokens);
  py::gil_scoped_release release;
  sweep(rows, out);
}

// First and past-the-last byte of a matrix with elements.
std::pair<std::uintptr_t, std::uintptr_t> extent(const void* data, const Logits& shape, std::int64_t stride) {
  const auto first = reinterpret_cast<std::uintptr_t>(data);
  const std::int64_t elements = (shape.tokens - 1) * stride + shape.vocab;
  return {first, first + static_cast<std::uintptr_t>(elements) * bytes_of(shape.type)};
}

// The gradient may take the place of the logits, row for row, or lie elsewhere.
void check_overlap(const Logits& logits, const Gradients& gradients) {
  if (logits.tokens == 0 || logits.vocab == 0) return;
  const bool same = gradients.out == logits.data && (gradients.stride == logits.stride || logits.tokens == 1);
  const auto [read_from, read_to] = extent(logits.data, logits, logits.stride);
  const auto [write_from, write_to] = extent(gradients.out, logits, gradients.stride);
  if (!same && read_from < write_to && write_from < read_to) {
    throw py::value_error("out overlaps the logits without being the logits");
  }
}

void sweep_backward_arrays(const py::array& logits, const std::string& dtype, const py::array& token_ids,
                           const MaybeArray& keep, double temperature, const MaybeArray& temperatures, const py::array& lse,
                           const MaybeArray& entropy, const py::array& by_logprob, const MaybeArray& by_entropy,
                           py::array& out) {
  const Rows rows = rows_of(logits, dtype, token_ids, keep, temperature, temperatures);
  const py::ssize_t tokens = rows.logits.tokens;
  check_matrix(out, "out", rows.logits.type);
  if (out.shape(0) != tokens || out.shape(1) != rows.logits.vocab) {
    throw py::value_error("out must have the shape of the logits, " + shape_of(logits) + ", got " + shape_of(out));
  }
  if (by_entropy && !entropy) throw py::value_error("a gradient by the entropy needs the entropy");
  Gradients gradients;
  gradients.lse = values<double>(lse, "lse", tokens);
  if (entropy) gradients.entropy = values<float>(*entropy, "entropy", tokens);
  gradients.by_logprob = values<float>(by_logprob, "by_logprob", tokens);
  if (by_entropy) gradients.by_entropy = values<float>(*by_entropy, "by_entropy", tokens);
  gradients.out = out.mutable_data();
  gradients.stride = row_stride(out, "out", true);
  check_overlap(rows.logits, gradients);
  py::gil_scoped_release release;
  sweep_backward(rows, gradients);
}

GroupBaseline baseline_named(const std::string& name) {
  if (name == "none") return GroupBaseline::kNone;
  if (name == "mean") return GroupBaseline::kMean;
  if (name == "loo") return GroupBaseline::kLeaveOneOut;
  throw py::value_error("baseline = '" + name + "': expected 'mean', 'loo' or 'none'");
}

GroupScale scale_named(const std::string& name) {
  if (name == "none") return GroupScale::kNone;
  if (name == "std") return GroupScale::kStd;
  if (name == "batch_std") return GroupScale::kBatchStd;
  throw py::value_error("scale = '" + name + "': expected 'std', 'batch_std' or 'none'");
}

const std::int64_t* offset_values(const py::array& offsets) {
  return values<std::int64_t>(offsets, "group_offsets", offsets.ndim() == 1 ? offsets.shape(0) : 0);
}

template <class Value>
void advantages_into(const py::array& rewards, const py::array& offsets, const AdvantageOptions& options, py::array& out) {
  const py::ssize_t count = rewards.ndim() == 1 ? rewards.shape(0) : 0;
  const Value* reward = values<Value>(rewards, "rewards", count);
  Value* advantages = writable<Value>(out, "out", count);
  const std::int64_t* offset = offset_values(offsets);
  const std::int64_t bad = first_bad_offset(offset, offsets.shape(0), count);
  if (bad >= 0) {
    const std::string found =
        offsets.shape(0) == 0 ? "no offsets" : "group_offsets[" + std::to_string(bad) + "] = " + std::to_string(offset[bad]);
    throw py::value_error("group_offsets must rise from 0 to the " + std::to_string(count) + " rewards, got " + found);
  }
  py::gil_scoped_release release;
  group_advantages(reward, offset, offsets.shape(0) - 1, options, advantages);
}

void group_advantages_arrays(const py::array& rewards, const py::array& offsets, const std::string& baseline,
                             const std::string& scale, bool unbiased, double eps, py::array& out) {
  const AdvantageOptions options = {baseline_named(baseline), scale_named(scale), unbiased, eps};
  if (py::isinstance<py::array_t<double>>(rewards)) {
    advantages_into<double>(rewards, offsets, options, out);
  } else {
    advantages_into<float>(rewards, offsets, options, out);
  }
}

}  // namespace
}  // namespace medbridge

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native routines of medbridge_kernels; use them through its public functions.";
  m.def("sweep", &medbridge::sweep_arrays, py::arg("logits"), py::arg("dtype"), py::arg("token_ids"), py::arg("keep"),
        py::arg("temperature"), py::arg("temperatures"), py::arg("logprobs"), py::arg("entropy"), py::arg("lse"),
        "See medbridge_kernels.native.sweep.");
  m.def("sweep_backward", &medbridge::sweep_backward_arrays, py::arg("logits"), py::arg("dtype"), py::arg("token_ids"),
        py::arg("keep"), py::arg("temperature"), py::arg("temperatures"), py::arg("lse"), py::arg("entropy"),
        py::arg("by_logprob"), py::arg("by_entropy"), py::arg("out"), "See medbridge_kernels.native.sweep_backward.");
  m.def("group_advantages", &medbridge::group_advantages_arrays, py::arg("rewards"), py::arg("group_offsets"),
        py::arg("baseline"), py::arg("scale"), py::arg("unbiased"), py::arg("eps"), py::arg("out"),
        "See medbridge_kernels.native.group_advantages.");
  m.def("instruction_set", &medbridge::instruction_set, "The instructions in use: avx512, avx2 or portable.");
}

// Maxima, weights and advantages of rewards as Python functions: checks, conversions and the GIL, no mathematics.
#include <cmath>
#include <vector>

#include "arrays.h"
#include "rewards.h"

namespace medbridge {
namespace {

// Rewards with the offsets of their groups, which a rectangular array gets too.
struct Input {
  Values rewards;
  std::vector<std::int64_t> offsets;
  Groups groups() const { return {rewards.data(), offsets.data(), offsets.size() - 1}; }
};

std::string at(const char* name, py::ssize_t index, std::int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

void check_rewards(const Values& rewards) {
  for (py::ssize_t i = 0; i < rewards.size(); ++i) {
    const double value = rewards.data()[i];
    if (std::fabs(value) <= kMaxReward) continue;
    const std::string index = rewards.ndim() == 1
                                  ? std::to_string(i)
                                  : std::to_string(i / rewards.shape(1)) + ", " + std::to_string(i % rewards.shape(1));
    throw py::value_error("rewards[" + index + "] = " + std::string(py::str(py::float_(value))) +
                          (std::isfinite(value) ? ": the largest accepted magnitude is 1e300" : ": rewards must be finite"));
  }
}

std::vector<std::int64_t> checked_offsets(const py::object& offsets_in, py::ssize_t total) {
  const Counts offsets = counts(offsets_in, "offsets");
  if (offsets.size() == 0) throw py::value_error("offsets is empty: it must hold one value per item and one more");
  if (offsets.data()[0] != 0) {
    throw py::value_error(at("offsets", 0, offsets.data()[0]) + ": the first group must start at 0");
  }
  for (py::ssize_t i = 1; i < offsets.size(); ++i) {
    if (offsets.data()[i] < offsets.data()[i - 1]) {
      throw py::value_error(at("offsets", i, offsets.data()[i]) + " is below " +
                            at("offsets", i - 1, offsets.data()[i - 1]) + ": offsets must not decrease");
    }
  }
  const py::ssize_t last = offsets.size() - 1;
  if (offsets.data()[last] != total) {
    throw py::value_error(at("offsets", last, offsets.data()[last]) + ": the last group must end with the last of the " +
                          std::to_string(total) + " rewards");
  }
  return std::vector<std::int64_t>(offsets.data(), offsets.data() + offsets.size());
}

Input input(const py::object& rewards_in, const py::object& offsets_in) {
  Input result;
  if (offsets_in.is_none()) {
    result.rewards = reals(rewards_in, "rewards", 2);
    for (py::ssize_t i = 0; i <= result.rewards.shape(0); ++i) result.offsets.push_back(i * result.rewards.shape(1));
  } else {
    result.rewards = reals(rewards_in, "rewards", 1);
    result.offsets = checked_offsets(offsets_in, result.rewards.size());
  }
  check_rewards(result.rewards);
  return result;
}

Values like(const Values& rewards) {
  return Values(std::vector<py::ssize_t>(rewards.shape(), rewards.shape() + rewards.ndim()));
}

std::int64_t one_k(const py::object& k_in) {
  if (!PyIndex_Check(k_in.ptr()) || PyBool_Check(k_in.ptr())) {
    throw py::value_error("k must be an integer, got " + std::string(py::repr(k_in)));
  }
  const py::object value = py::reinterpret_steal<py::object>(PyNumber_Index(k_in.ptr()));
  if (!value) throw py::error_already_set();
  int overflow = 0;
  const std::int64_t k = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow != 0) throw py::value_error("k = " + std::string(py::str(value)) + " doesn't fit in int64");
  return k;
}

Baseline baseline_named(const py::object& name) {
  const std::string text = py::str(name);
  if (text == "none") return Baseline::kNone;
  if (text == "loo") return Baseline::kLeaveOneOut;
  if (text == "loo_minus_one") return Baseline::kLeaveOneOutMinusOne;
  throw py::value_error("baseline = " + std::string(py::repr(name)) + ": expected 'none', 'loo' or 'loo_minus_one'");
}

Values max_at_k_array(const py::object& rewards_in, const py::object& ks_in, const py::object& offsets_in) {
  const Input in = input(rewards_in, offsets_in);
  const Counts ks = counts(ks_in, "ks");
  Values out({static_cast<py::ssize_t>(in.offsets.size()) - 1, ks.size()});
  {
    py::gil_scoped_release release;
    max_at_k(in.groups(), ks.data(), static_cast<std::size_t>(ks.size()), out.mutable_data());
  }
  return out;
}

Values pass_at_k_weights_array(const py::object& rewards_in, const py::object& k_in, const py::object& baseline_in,
                               const py::object& offsets_in) {
  const Input in = input(rewards_in, offsets_in);
  const std::int64_t k = one_k(k_in);
  const Baseline baseline = baseline_named(baseline_in);
  Values out = like(in.rewards);
  {
    py::gil_scoped_release release;
    pass_at_k_weights(in.groups(), k, baseline, out.mutable_data());
  }
  return out;
}

Values pass_at_k_advantages_array(const py::object& rewards_in, const py::object& k_in, const py::object& offsets_in) {
  const Input in = input(rewards_in, offsets_in);
  const std::int64_t k = one_k(k_in);
  Values out = like(in.rewards);
  {
    py::gil_scoped_release release;
    pass_at_k_advantages(in.groups(), k, out.mutable_data());
  }
  return out;
}

}  // namespace

void bind_rewards(py::module_& m) {
  m.def("max_at_k", &max_at_k_array, py::arg("rewards"), py::arg("ks"), py::arg("offsets") = py::none(),
        "See medbridge.support.rewards.max_at_k.");
  m.def("pass_at_k_weights", &pass_at_k_weights_array, py::arg("rewards"), py::arg("k"), py::arg("baseline") = "none",
        py::arg("offsets") = py::none(), "See medbridge.support.rewards.pass_at_k_weights.");
  m.def("pass_at_k_advantages", &pass_at_k_advantages_array, py::arg("rewards"), py::arg("k"),
        py::arg("offsets") = py::none(), "See medbridge.support.rewards.pass_at_k_advantages.");
}

}  // namespace medbridge

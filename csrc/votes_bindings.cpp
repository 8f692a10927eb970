// Majority votes as a Python function: checks, conversions and the GIL, no mathematics.
#include "arrays.h"
#include "votes.h"

namespace medbridge {
namespace {

void one_per_row(const Counts& votes, const Counts& other, const char* name) {
  if (other.size() != votes.shape(0)) {
    throw py::value_error("votes has shape " + shape_of(votes) + " and " + name + " has shape " + shape_of(other) +
                          ": they must have one row or value per item");
  }
}

Values majority_at_k_array(const py::object& votes_in, const py::object& correct_in, const py::object& ks_in,
                           const py::object& abstained_in) {
  const Counts votes = counts(votes_in, "votes", 2);
  const Counts correct = counts(correct_in, "correct");
  const Counts ks = counts(ks_in, "ks");
  one_per_row(votes, correct, "correct");
  Counts abstained(0);
  const std::int64_t* abstentions = nullptr;
  if (!abstained_in.is_none()) {
    abstained = counts(abstained_in, "abstained");
    one_per_row(votes, abstained, "abstained");
    abstentions = abstained.data();
  }
  Values out({votes.shape(0), ks.size()});
  {
    py::gil_scoped_release release;
    majority_at_k(votes.data(), correct.data(), abstentions, static_cast<std::size_t>(votes.shape(0)),
                  static_cast<std::size_t>(votes.shape(1)), ks.data(), static_cast<std::size_t>(ks.size()),
                  out.mutable_data());
  }
  return out;
}

}  // namespace

void bind_votes(py::module_& m) {
  m.def("majority_at_k", &majority_at_k_array, py::arg("votes"), py::arg("correct"), py::arg("ks"),
        py::arg("abstained") = py::none(), "See medbridge.support.votes.majority_at_k.");
}

}  // namespace medbridge

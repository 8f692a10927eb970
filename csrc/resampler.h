// Exact multinomial counts of draws with replacement, fast where few kinds are drawn from often.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "philox.h"

namespace medbridge {

// Multinomial counts: as many draws with replacement as there are clusters, counted by kind.
//
// A draw at a time is dear where kinds are few. If the count of kind j is Poisson with mean rate * multiplicity[j], all
// independent, then given their sum they are multinomial, whatever the sum. So most of the draws are made as one Poisson
// number per kind, at a rate that leaves some to make one by one; should the sum exceed the number of draws, which says
// nothing about the rest, all is drawn anew. The Poisson means are the same in every replicate, and each number is one look
// into an alias table (Walker 1977).
class Resampler {
 public:
  explicit Resampler(const std::vector<std::uint32_t>& multiplicity) : n_kinds_(multiplicity.size()) {
    std::uint64_t draws = 0;
    for (const std::uint32_t m : multiplicity) draws += m;
    if (draws > std::numeric_limits<std::uint32_t>::max()) {
      throw std::invalid_argument("there are " + std::to_string(draws) + " clusters: at most 4294967295 can be drawn from");
    }
    draws_ = static_cast<std::uint32_t>(draws);
    kind_of_.reserve(draws);
    for (std::size_t j = 0; j < n_kinds_; ++j) {
      kind_of_.insert(kind_of_.end(), multiplicity[j], static_cast<std::uint32_t>(j));
    }

    // Two standard deviations below, so that one replicate in 44 is drawn anew. A Poisson number costs about two draws.
    const double reserve = 2.0 * std::sqrt(static_cast<double>(draws));
    if (2.0 * (static_cast<double>(n_kinds_) + reserve) > static_cast<double>(draws)) return;
    const double rate = 1.0 - reserve / static_cast<double>(draws);
    std::map<std::uint32_t, Table> made;  // few: m different multiplicities add up to at least m^2 / 2
    for (const std::uint32_t m : multiplicity) {
      const auto [place, is_new] = made.try_emplace(m);
      if (is_new) place->second = add_table(rate * m);
      tables_.push_back(place->second);
    }
  }

  // Calls add(kind, times) for what is drawn, a kind maybe more than once. scratch: [kinds]
  template <class Add>
  void draw(PhiloxStream& stream, std::uint32_t* scratch, const Add& add) const {
    if (tables_.empty()) {
      for (std::uint32_t drawn = 0; drawn < draws_; ++drawn) add(kind_of_[stream.below(draws_)], 1u);
      return;
    }
    std::uint64_t drawn;
    do {
      drawn = 0;
      for (std::size_t j = 0; j < n_kinds_; ++j) drawn += scratch[j] = poisson(tables_[j], stream);
    } while (drawn > draws_);
    for (; drawn < draws_; ++drawn) ++scratch[kind_of_[stream.below(draws_)]];
    for (std::size_t j = 0; j < n_kinds_; ++j) add(j, scratch[j]);
  }

 private:
  struct Cell {  // fractions below `cut` give the cell's own number, the others `alias`
    std::uint32_t cut;
    std::uint32_t alias;
  };
  struct Table {  // 2^(32 - shift) cells for the numbers from `least` on
    std::size_t first;
    std::uint32_t least;
    std::uint32_t shift;
  };

  // The first word is the upper half of a random fraction of 64 bits; one time in 2^32 it takes the lower half to decide.
  std::uint32_t poisson(const Table& table, PhiloxStream& stream) const {
    const std::uint32_t upper = stream.word();
    const std::uint32_t place = upper >> table.shift;
    const Cell cell = cells_[table.first + place];
    const std::uint32_t own = table.least + place;
    if (upper == cell.cut) return stream.word() < lower_cuts_[table.first + place] ? own : cell.alias;
    // Without a branch, which no processor could predict.
    return cell.alias ^ ((own ^ cell.alias) & (0u - static_cast<std::uint32_t>(upper < cell.cut)));
  }

  // The alias table of a Poisson distribution, by Vose's method (1991). Numbers that have less than 2^-64 of the mode's
  // probability are left out.
  Table add_table(double mean) {
    const double mode = std::floor(mean);
    std::vector<double> below, probability;
    double p = 1.0;
    for (double x = mode; x > 0.0 && p > 0x1p-64; --x) below.push_back(p *= x / mean);
    probability.assign(below.rbegin(), below.rend());
    probability.push_back(1.0);
    p = 1.0;
    for (double x = mode + 1.0; p > 0x1p-64; ++x) probability.push_back(p *= mean / x);
    Table table{cells_.size(), static_cast<std::uint32_t>(mode - static_cast<double>(below.size())), 31};
    while ((std::size_t{1} << (32 - table.shift)) < probability.size()) --table.shift;
    const std::size_t size = std::size_t{1} << (32 - table.shift);

    double total = 0.0;
    for (const double q : probability) total += q;
    probability.resize(size, 0.0);
    for (double& q : probability) q *= static_cast<double>(size) / total;  // 1: a cell that is filled by its own number
    std::vector<std::size_t> poor, rich;
    for (std::size_t i = 0; i < size; ++i) (probability[i] < 1.0 ? poor : rich).push_back(i);
    cells_.resize(table.first + size);
    lower_cuts_.resize(table.first + size);
    const auto fill = [&](std::size_t i, std::size_t alias) {
      // In a full cell the cut doesn't matter, since the alias is the cell's own number; it is the start.
      const double width = std::ldexp(1.0, 32 + static_cast<int>(table.shift));
      const auto own = alias == i ? 0 : static_cast<std::uint64_t>(probability[i] * width);
      const std::uint64_t cut = (static_cast<std::uint64_t>(i) << (32 + table.shift)) + own;
      cells_[table.first + i] = {static_cast<std::uint32_t>(cut >> 32), table.least + static_cast<std::uint32_t>(alias)};
      lower_cuts_[table.first + i] = static_cast<std::uint32_t>(cut);
    };
    while (!poor.empty() && !rich.empty()) {
      const std::size_t i = poor.back();
      const std::size_t donor = rich.back();
      poor.pop_back();
      fill(i, donor);
      probability[donor] -= 1.0 - probability[i];
      if (probability[donor] < 1.0) {
        rich.pop_back();
        poor.push_back(donor);
      }
    }
    // What is left is full up to rounding.
    for (const std::size_t i : poor) fill(i, i);
    for (const std::size_t i : rich) fill(i, i);
    return table;
  }

  std::size_t n_kinds_;
  std::uint32_t draws_ = 0;
  std::vector<std::uint32_t> kind_of_;     // [draws]
  std::vector<Cell> cells_;
  std::vector<std::uint32_t> lower_cuts_;  // of the cells
  std::vector<Table> tables_;              // [kinds]; empty where every draw is made by itself
};

}  // namespace medbridge

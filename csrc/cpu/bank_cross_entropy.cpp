// Softmax cross entropy over panels of dot products. One query belongs to one thread, which goes
// over its row of the panel while that is in cache: the largest value, then exponentials and their
// sum.
//
// The gradient is (sum of exp(z - max) * column) / sum, less the target. Its sums run along with
// those of the loss, and are shrunk like them where a larger maximum comes up, so that backward
// makes no product again: two in all, as where the logits are kept.
//
// cluster_mean: the mean dot product with the rows of a label is the dot product with their mean.
// The means of one panel of labels are computed, multiplied with the queries, and folded like bank
// rows: the bank is read once, and the product is as much smaller as there are fewer labels than
// rows. Summing up dot products instead, label by label, would spare the means but multiply every
// row.

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/exp.h"
#include "cpu/group.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "half.h"
#include "ops.h"

namespace pyreid {
namespace {

constexpr const char* kOp = "bank_cross_entropy: ";
constexpr int64_t kWorthAThread = 16384;  // values; below, waking a thread costs more

[[noreturn]] void refuse(const char* what, int64_t value, int64_t position) {
  throw std::invalid_argument(kOp + std::string(what) + ", got " + std::to_string(value) +
                              " at position " + std::to_string(position));
}

// Whether the target is one column, which `sum` and the weights leave out: its part of the softmax
// is then 1 less that of the others, without cancellation.
bool has_one_column(const BankCrossEntropy& loss) { return loss.reduce != Reduce::label_uniform; }

// Place of the target of a query: a row of the bank, or of its label.
int64_t target_column(const BankCrossEntropy& loss, int64_t query) {
  return loss.reduce == Reduce::row ? id_at(loss.targets, query) : loss.target_columns[query];
}

// Masked by bits: of a choice between a score and 0, GCC 12 makes wrong code for AVX2.
template <class Id>
void fold_label(const Id* labels, int64_t label, const ScorePanel& panel, const float* scores,
                RunningSoftmax& running) {
  const Id* const mine = labels + panel.first;
  running.target += lane_sum(panel.size, [=](int64_t i) {
    return bits_float(float_bits(scores[i]) & (0u - uint32_t(mine[i] == label)));
  });
  running.matched += lane_sum(panel.size, [=](int64_t i) { return float(mine[i] == label); });
}

void fold(const BankCrossEntropy& loss, const ScorePanel& panel, int64_t query,
          RunningSoftmax& running, float* sums) {
  float* const scores = panel.scores + query * panel.size;
  const int64_t dim = loss.bank.cols;
  if (panel.first == 0) {
    running = {-INFINITY, 0.f, 0.f, 0.f, 0.f, 0.f};
    if (sums != nullptr) std::fill_n(sums, dim, 0.f);
  }
  const float scale = loss.scale;
  const float max = std::max(running.max, scale * lane_max(panel.size, scores));
  running.columns += float(panel.size);
  if (loss.smoothing != 0.f)
    running.total += lane_sum(panel.size, [=](int64_t i) { return scores[i]; });
  if (query < loss.targets.size) {
    if (has_one_column(loss)) {
      const int64_t i = target_column(loss, query) - panel.first;
      if (i >= 0 && i < panel.size) {
        running.target = scores[i];
        running.matched = 1.f;
        scores[i] = -INFINITY;
      }
    } else if (loss.labels.dtype == Dtype::int64) {
      fold_label(static_cast<const int64_t*>(loss.labels.data), id_at(loss.targets, query), panel,
                 scores, running);
    } else {
      fold_label(static_cast<const int32_t*>(loss.labels.data), id_at(loss.targets, query), panel,
                 scores, running);
    }
  }
  for (int64_t i = 0; i < panel.size; ++i) scores[i] = vector_exp(scale * scores[i] - max);
  const float sum = lane_sum(panel.size, [=](int64_t i) { return scores[i]; });
  const float shrink = vector_exp(running.max - max);
  running.sum = running.sum * shrink + sum;
  running.max = max;
  if (sums != nullptr && shrink != 1.f)
    for (int64_t d = 0; d < dim; ++d) sums[d] *= shrink;
}

// The layout of `groups`: the number of labels, first positions of each in the order, the end, the
// order.
struct LabelGroups {
  int32_t* count;
  int32_t* starts;
  int32_t* order;

  explicit LabelGroups(const BankCrossEntropy& loss)
      : count(loss.groups), starts(loss.groups + 1), order(starts + loss.bank.rows + 1) {}
};

template <class Row>
void mean(const Row* bank, const int32_t* rows, int64_t count, int64_t dim, float* mean,
          float* part) {
  constexpr int64_t kPart = 32;
  std::fill_n(mean, dim, 0.f);
  for (int64_t begin = 0; begin < count; begin += kPart) {
    std::fill_n(part, dim, 0.f);
    for (int64_t i = begin; i < std::min(begin + kPart, count); ++i) {
      const Row* const row = bank + rows[i] * dim;
      for (int64_t d = 0; d < dim; ++d) part[d] += widen(row[d]);
    }
    for (int64_t d = 0; d < dim; ++d) mean[d] += part[d];
  }
  for (int64_t d = 0; d < dim; ++d) mean[d] /= float(count);
}

template <class Row>
void all_means(const BankCrossEntropy& loss, int64_t first, const Matrix& means) {
  const LabelGroups groups(loss);
  const int64_t dim = loss.bank.cols;
  const Row* const bank = static_cast<const Row*>(loss.bank.data);
  parallel_for(means.rows, 1 + kWorthAThread / std::max<int64_t>(dim, 1),
               [&](int64_t begin, int64_t end) {
                 std::vector<float> part(dim);
                 for (int64_t i = begin; i < end; ++i) {
                   const int32_t* const rows = groups.starts + first + i;
                   mean(bank, groups.order + rows[0], rows[1] - rows[0], dim,
                        static_cast<float*>(means.data) + i * dim, part.data());
                 }
               });
}

float softmax_sum(const BankCrossEntropy& loss, const RunningSoftmax& running) {
  if (!has_one_column(loss)) return running.sum;
  return running.sum + vector_exp(loss.scale * running.target - running.max);
}

float value(const BankCrossEntropy& loss, const RunningSoftmax& running) {
  const float target = loss.scale * (running.target / running.matched);
  const float mean = loss.scale * (running.total / running.columns);
  const float above = running.max - (1.f - loss.smoothing) * target - loss.smoothing * mean;
  const bool is_largest = has_one_column(loss) && target == running.max;
  return above + (is_largest ? std::log1p(running.sum) : std::log(softmax_sum(loss, running)));
}

// Queries of one target share its row.
template <class Row>
void finish_gradients(const BankCrossEntropy& loss, const RunningSoftmax* running, float* sums) {
  const int64_t dim = loss.bank.cols, batch = loss.targets.size;
  const Row* const bank = static_cast<const Row*>(loss.bank.data);
  const Ids places =
      loss.reduce == Reduce::row ? loss.targets : Ids{loss.target_columns, Dtype::int32, batch};
  const Groups same = group({places});
  const float* const everywhere = sums + batch * dim;
  parallel_for(same.count(), 1 + kWorthAThread / (dim + 1), [&](int64_t begin, int64_t end) {
    std::vector<float> target(dim), part(dim);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t place = target_column(loss, same.positions[same.starts[g]]);
      if (loss.reduce == Reduce::row) {
        for (int64_t d = 0; d < dim; ++d) target[d] = widen(bank[place * dim + d]);
      } else {
        const LabelGroups groups(loss);
        const int32_t* const rows = groups.starts + place;
        mean(bank, groups.order + rows[0], rows[1] - rows[0], dim, target.data(), part.data());
      }
      for (int64_t member = same.starts[g]; member < same.starts[g + 1]; ++member) {
        const int64_t query = same.positions[member];
        const RunningSoftmax& mine = running[query];
        const float sum = softmax_sum(loss, mine), share = loss.scale / sum;
        const float on_target =
            loss.scale * (loss.smoothing - (has_one_column(loss) ? mine.sum / sum : 1.f));
        float* const gradient = sums + query * dim;
        for (int64_t d = 0; d < dim; ++d) gradient[d] = share * gradient[d] + on_target * target[d];
        if (loss.smoothing == 0.f) continue;
        const float on_all = loss.scale * loss.smoothing / mine.columns;
        for (int64_t d = 0; d < dim; ++d) gradient[d] -= on_all * everywhere[d];
      }
    }
  });
}

}  // namespace

size_t group_labels_workspace(const BankCrossEntropy&) { return 0; }

void group_labels(const BankCrossEntropy& loss, void*, Stream) {
  const int64_t rows = loss.bank.rows;
  for (int64_t i = 0; i < rows; ++i)
    if (id_at(loss.labels, i) >= INT32_MAX)
      refuse("labels must be less than 2**31 - 1", id_at(loss.labels, i), i);
  const Groups found = group({loss.labels});  // rows without a label come first
  const LabelGroups groups(loss);
  std::copy(found.positions.begin(), found.positions.end(), groups.order);
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < found.count(); ++i) {
    const int64_t label = id_at(loss.labels, found.positions[found.starts[i]]);
    if (label < 0) continue;
    groups.starts[labels.size()] = int32_t(found.starts[i]);
    labels.push_back(label);
  }
  groups.starts[labels.size()] = int32_t(rows);
  *groups.count = int32_t(labels.size());
  for (int64_t i = 0; i < loss.targets.size; ++i) {
    const int64_t label = id_at(loss.targets, i);
    const auto at = std::lower_bound(labels.begin(), labels.end(), label);
    if (at == labels.end() || *at != label)
      refuse("targets must be labels that a row of the bank has", label, i);
    loss.target_columns[i] = int32_t(at - labels.begin());
  }
}

int64_t label_columns(const BankCrossEntropy& loss) { return *LabelGroups(loss).count; }

void label_means(const BankCrossEntropy& loss, int64_t first, Matrix means, Stream) {
  switch (loss.bank.dtype) {
    case Dtype::float32:
      return all_means<float>(loss, first, means);
    case Dtype::float16:
      return all_means<HostHalf>(loss, first, means);
    default:
      return all_means<HostBFloat16>(loss, first, means);
  }
}

void fold_scores(const BankCrossEntropy& loss, const ScorePanel& panel, RunningSoftmax* running,
                 float* sums, Stream) {
  if (panel.first == 0 && loss.reduce == Reduce::row) {
    const std::string rule = "targets must lie in [0, " + std::to_string(loss.bank.rows) + ")";
    for (int64_t i = 0; i < loss.targets.size; ++i) {
      const int64_t row = id_at(loss.targets, i);
      if (row < 0 || row >= loss.bank.rows) refuse(rule.c_str(), row, i);
    }
  }
  parallel_for(panel.queries, 1 + kWorthAThread / panel.size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      fold(loss, panel, i, running[i], sums == nullptr ? nullptr : sums + i * loss.bank.cols);
  });
}

void finish_losses(const BankCrossEntropy& loss, const RunningSoftmax* running, float* losses,
                   float* sums, Stream) {
  for (int64_t i = 0; i < loss.targets.size; ++i) losses[i] = value(loss, running[i]);
  if (sums == nullptr || loss.targets.size == 0) return;
  switch (loss.bank.dtype) {
    case Dtype::float32:
      return finish_gradients<float>(loss, running, sums);
    case Dtype::float16:
      return finish_gradients<HostHalf>(loss, running, sums);
    default:
      return finish_gradients<HostBFloat16>(loss, running, sums);
  }
}

}  // namespace pyreid

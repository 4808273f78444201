// Softmax over chosen bank rows. First all scores, shared out candidate by candidate, so that few
// queries with long lists keep every thread busy too; then a pass over the scores of each query,
// which turns them into slopes in place. Backward, each query row is a sum of bank rows, owned by
// one thread.

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/group.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "half.h"
#include "ops.h"

namespace pyreid {
namespace {

constexpr int64_t kWorthAThread = 8192;  // elements; below, waking a thread costs more

// Candidate c of query row b: its bank row, or -1 for a pad (and, in the backward, what is out of
// range).
int64_t row_of(const ContrastList& candidates, int64_t b, int64_t c) {
  const int64_t positives = candidates.num_positives;
  const int64_t row =
      c < positives ? id_at(candidates.positives, b * positives + c)
                    : id_at(candidates.negatives, b * candidates.num_negatives + c - positives);
  return row < candidates.bank.rows ? row : -1;
}

// Bank rows as float32, one at a time.
template <class Bank>
class Rows {
 public:
  explicit Rows(const ConstMatrix& bank)
      : bank_(static_cast<const Bank*>(bank.data)),
        dim_(bank.cols),
        widened_(std::is_same_v<Bank, float> ? 0 : bank.cols) {}

  // Valid until the next call.
  const float* get(int64_t row) {
    const Bank* const source = bank_ + row * dim_;
    if constexpr (std::is_same_v<Bank, float>) {
      return source;
    } else {
      float* const values = widened_.data();
      for (int64_t d = 0; d < dim_; ++d) values[d] = widen(source[d]);
      return values;
    }
  }

  // Rows follow each other at random: unless asked for early, each begins with a wait for memory.
  void prefetch(int64_t row) const {
    constexpr int64_t kLine = 64 / sizeof(Bank);
    for (int64_t d = 0; row >= 0 && d < dim_; d += kLine)
      __builtin_prefetch(bank_ + row * dim_ + d);
  }

 private:
  const Bank* const bank_;
  const int64_t dim_;
  std::vector<float> widened_;
};

void check_ids(const char* name, const Ids& ids, int64_t length, int64_t bound) {
  for (int64_t i = 0; i < ids.size; ++i) {
    const int64_t row = id_at(ids, i);
    if (row < -1 || row >= bound)
      throw std::invalid_argument("set_contrast: " + std::string(name) + " must lie in [-1, " +
                                  std::to_string(bound) + "), got " + std::to_string(row) +
                                  " at position (" + std::to_string(i / length) + ", " +
                                  std::to_string(i % length) + ")");
  }
}

template <class Bank>
void score(const SetContrast& contrast) {
  const ContrastList& candidates = contrast.candidates;
  const int64_t count = candidates.count, dim = candidates.bank.cols;
  const int64_t work = 1 + kWorthAThread / (1 + dim * contrast.sets);
  parallel_for(candidates.batch * count, work, [&](int64_t begin, int64_t end) {
    Rows<Bank> rows(candidates.bank);
    for (int64_t i = begin; i < end; ++i) {
      if (i + 1 < end) rows.prefetch(row_of(candidates, (i + 1) / count, (i + 1) % count));
      const int64_t b = i / count, row = row_of(candidates, b, i % count);
      if (row < 0) continue;
      const float* const x = rows.get(row);
      for (int64_t set = 0; set < contrast.sets; ++set) {
        const float* const query = contrast.queries + (set * candidates.batch + b) * dim;
        contrast.slopes[set * candidates.batch * count + i] =
            contrast.scale * lane_sum(dim, [=](int64_t d) { return query[d] * x[d]; });
      }
    }
  });
}

// The scores of one query: loss, and slopes in their place.
struct Softmax {
  const SetContrast& contrast;
  const int64_t b;
  float* const scores;
  const ContrastList& candidates = contrast.candidates;
  const int64_t positives = candidates.num_positives, count = candidates.count;
  float uniform = 0.f;  // weight of each positive where none is given

  bool is_pad(int64_t c) const { return row_of(candidates, b, c) < 0; }
  float weight(int64_t j) const {
    if (contrast.weights == nullptr) return uniform;
    return contrast.weights[(contrast.weights_per_row ? b * positives : 0) + j];
  }

  // Scores from `begin` on become exp(score - top); returns their sum.
  float exponentials(int64_t begin, float top) const {
    float sum = 0.f;
    for (int64_t c = begin; c < count; ++c) {
      scores[c] = is_pad(c) ? 0.f : std::exp(scores[c] - top);
      sum += scores[c];
    }
    return sum;
  }

  float loss() {
    int64_t present = 0;
    for (int64_t j = 0; j < positives; ++j) present += !is_pad(j);
    uniform = present > 0 ? 1.f / float(present) : 0.f;

    const int64_t begin = contrast.own ? positives : 0;
    float top = -INFINITY;
    for (int64_t c = begin; c < count; ++c)
      if (!is_pad(c)) top = std::max(top, scores[c]);
    if (top == -INFINITY) top = 0.f;
    return contrast.own ? own(top) : joint(top);
  }

  float joint(float top) const {
    float loss = 0.f, pull = 0.f;
    for (int64_t j = 0; j < positives; ++j) {
      if (is_pad(j)) continue;
      loss += weight(j) * (top - scores[j]);
      pull += weight(j);
    }
    const float sum = exponentials(0, top);
    if (pull != 0.f) loss += pull * std::log(sum);
    spread(0, pull, sum);
    for (int64_t j = 0; j < positives; ++j)
      if (!is_pad(j)) scores[j] -= contrast.scale * weight(j);
    return loss;
  }

  float own(float top) const {
    const float sum = exponentials(positives, top);
    const float negatives = top + std::log(sum);  // -infinity without any
    float loss = 0.f, pull = 0.f;
    for (int64_t j = 0; j < positives; ++j) {
      if (is_pad(j)) {
        scores[j] = 0.f;
        continue;
      }
      const float behind = negatives - scores[j];
      const float slope = weight(j) / (1.f + std::exp(-behind));
      loss += weight(j) * (std::max(behind, 0.f) + std::log1p(std::exp(-std::fabs(behind))));
      pull += slope;
      scores[j] = -contrast.scale * slope;
    }
    spread(positives, pull, sum);
    return loss;
  }

  // Exponentials from `begin` on become shares of `pull`.
  void spread(int64_t begin, float pull, float sum) const {
    const float share = pull == 0.f ? 0.f : contrast.scale * pull / sum;
    for (int64_t c = begin; c < count; ++c) scores[c] *= share;
  }
};

template <class Bank>
void add_rows(const SetContrastBackward& backward) {
  const ContrastList& candidates = backward.candidates;
  const int64_t count = candidates.count, dim = candidates.bank.cols;
  const int64_t work = 1 + kWorthAThread / (1 + count * dim * backward.sets);
  parallel_for(candidates.batch, work, [&](int64_t begin, int64_t end) {
    Rows<Bank> rows(candidates.bank);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t set = 0; set < backward.sets; ++set)
        std::fill_n(backward.grad_queries + (set * candidates.batch + b) * dim, dim, 0.f);
      for (int64_t c = 0; c < count; ++c) {
        if (c + 1 < count) rows.prefetch(row_of(candidates, b, c + 1));
        const int64_t row = row_of(candidates, b, c);
        if (row < 0) continue;
        const float* const x = rows.get(row);
        for (int64_t set = 0; set < backward.sets; ++set) {
          const int64_t query = set * candidates.batch + b;
          const float slope = backward.grad_loss[query] * backward.slopes[query * count + c];
          float* const grad = backward.grad_queries + query * dim;
          for (int64_t d = 0; d < dim; ++d) grad[d] += slope * x[d];
        }
      }
    }
  });
}

}  // namespace

void set_contrast(const SetContrast& contrast, Stream) {
  const ContrastList& candidates = contrast.candidates;
  const int64_t bound = candidates.bank.rows, count = candidates.count;
  check_ids("positives", candidates.positives, candidates.num_positives, bound);
  check_ids("negatives", candidates.negatives, candidates.num_negatives, bound);
  switch (candidates.bank.dtype) {
    case Dtype::float32:
      score<float>(contrast);
      break;
    case Dtype::float16:
      score<HostHalf>(contrast);
      break;
    default:
      score<HostBFloat16>(contrast);
  }
  parallel_for(contrast.sets * candidates.batch, 1 + kWorthAThread / (1 + count),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   contrast.loss[i] =
                       Softmax{contrast, i % candidates.batch, contrast.slopes + i * count}.loss();
               });
}

size_t set_contrast_backward_workspace(const SetContrastBackward&) { return 0; }

void set_contrast_backward(const SetContrastBackward& backward, void*, Stream) {
  switch (backward.candidates.bank.dtype) {
    case Dtype::float32:
      return add_rows<float>(backward);
    case Dtype::float16:
      return add_rows<HostHalf>(backward);
    default:
      return add_rows<HostBFloat16>(backward);
  }
}

}  // namespace pyreid

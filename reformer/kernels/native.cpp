// LSH attention on the CPU, one softmax over all rounds: see flash.py for the idea and native.py for the caller.
//
// A *line* is the real tokens of one head in the order of one round. A *slot* is a place on a line. What a query
// may see is a run of slots, [low, high), so a block of queries meets the keys from the first one's low to the
// last one's high and no others: in strict mode that is about its own bucket, not two whole chunks.
//
// A line is passed once from its start to its end, with the rows around a segment of it in a buffer that stays
// in the cache. The order of additions does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <omp.h>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, TILE = 8;
#else
constexpr int LANES = 8, TILE = 4;
#endif
using Vec = float __attribute__((vector_size(4 * LANES)));
using Int = int32_t __attribute__((vector_size(4 * LANES)));
using Word = uint32_t __attribute__((vector_size(4 * LANES)));

// Queries that are treated at once.
constexpr int QUERIES = 16;
// Slots of a segment.
constexpr int64_t SEGMENT = 256;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
// The log-sum-exp of a token that attends to itself, for want of others; its weights elsewhere vanish.
constexpr float ALONE = 0x1p108f;
constexpr float LOG2E = 1.44269504088896341f;

}  // namespace

// Strides count floats, of batch rows, heads and tokens; what a token holds is contiguous.
struct Strided {
  float* at;
  int64_t batch, head, token;

  float* operator()(int64_t b, int64_t h, int64_t t) const { return at + b * batch + h * head + t * token; }
};

struct Problem {
  int64_t batch, heads, rounds, seq, dim, value;
  int64_t chunk_length, before, after;
  int64_t strict, causal, count, threads;
  int64_t first_bucket, n_buckets;
  uint64_t seed;
  double scale, epsilon, dropout;
  Strided qk, v, out, dout, dqk, dv;
  const int32_t* buckets;  // batch, heads, rounds, seq
  const uint8_t* real;     // batch, seq; or null
  int32_t* order;          // batch, heads, rounds, seq: positions, ~position where a bucket starts
  float* logsumexp;        // batch, heads, seq; to the base 2
  float* scratch;
};

namespace {

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline Vec spread(float x) { return x - Vec{}; }
inline Int spread(int32_t x) { return x - Int{}; }
inline Word spread(uint32_t x) { return x - Word{}; }

inline Vec load(const float* at) { return *reinterpret_cast<const Vec*>(at); }
inline Int load(const int32_t* at) { return *reinterpret_cast<const Int*>(at); }
inline void store(float* at, Vec x) { *reinterpret_cast<Vec*>(at) = x; }

inline Int iota() {
  Int found{};
  for (int i = 0; i < LANES; ++i) found[i] = i;
  return found;
}

inline float sum(Vec x) {
  float found = 0;
  for (int step = LANES / 2; step; step /= 2) {
    Int other = iota() ^ spread(static_cast<int32_t>(step));
    x += __builtin_shuffle(x, other);
  }
  found = x[0];
  return found;
}

inline float maximum(Vec x) {
  for (int step = LANES / 2; step; step /= 2) {
    Vec y = __builtin_shuffle(x, iota() ^ spread(static_cast<int32_t>(step)));
    x = y > x ? y : x;
  }
  return x[0];
}

// 2^x for x not far above 0, 0 below the smallest normal number; within 2 units in the last place.
inline Vec exp2(Vec x) {
  const Vec shift = spread(0x1.8p23f);
  Vec inside = x < -126.f ? spread(-126.f) : x;
  Vec whole = inside + shift;
  Int exponent = reinterpret_cast<Int>(whole) << 23;
  Vec part = inside - (whole - shift);
  Vec y = spread(1.5403530393381609954e-4f);
  y = y * part + 1.3333558146428443423e-3f;
  y = y * part + 9.6181291076284771619e-3f;
  y = y * part + 5.5504108664821579953e-2f;
  y = y * part + 2.4022650695910071233e-1f;
  y = y * part + 6.9314718055994530942e-1f;
  y = y * part + 1.f;
  y = reinterpret_cast<Vec>(reinterpret_cast<Int>(y) + exponent);
  return x < -126.f ? Vec{} : y;
}

// C = A·B, or C += A·B. A's element (i, k) lies at a[i·a_row + k·a_column]; panel p of row k of B, LANES
// numbers, at b[k·b_row + p·b_panel]; C is row-major.
struct Left {
  const float* at;
  int64_t row, column;
};
struct Right {
  const float* at;
  int64_t row, panel;
};

template <int ROWS, int PANELS, bool ADD>
inline void tile(int64_t depth, Left a, Right b, float* c, int64_t c_row) {
  Vec found[ROWS][PANELS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) found[i][p] = ADD ? load(c + i * c_row + p * LANES) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) right[p] = load(b.at + k * b.row + p * b.panel);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      Vec left = spread(a.at[i * a.row + k * a.column]);
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) found[i][p] += left * right[p];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) store(c + i * c_row + p * LANES, found[i][p]);
}

template <bool ADD>
inline void multiply(int64_t rows, int64_t panels, int64_t depth, Left a, Right b, float* c, int64_t c_row) {
  for (int64_t i = 0; i < rows; i += TILE) {
    Left part{a.at + i * a.row, a.row, a.column};
    float* out = c + i * c_row;
    int64_t p = 0;
    for (; p + 2 <= panels; p += 2)
      tile<TILE, 2, ADD>(depth, part, {b.at + p * b.panel, b.row, b.panel}, out + p * LANES, c_row);
    if (p < panels)
      tile<TILE, 1, ADD>(depth, part, {b.at + p * b.panel, b.row, b.panel}, out + p * LANES, c_row);
  }
}

// Which pairs dropout keeps: a hash of the seed, the head, the round and both positions.
inline uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float kept;

  explicit Dropout(const Problem& p)
      : seed(mix(p.seed)), threshold(static_cast<uint32_t>(p.dropout * 0x1p24)), kept(1 / (1 - p.dropout)) {}

  uint64_t query(uint64_t line, int32_t position) const {
    return mix(mix(seed + line) + static_cast<uint32_t>(position));
  }

  // What the weights of these keys are multiplied by.
  Vec keep(uint64_t query, Int positions) const {
    Word x = reinterpret_cast<Word>(positions) * 0x9E3779B1u + static_cast<uint32_t>(query);
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) + static_cast<uint32_t>(query >> 32);
    x = (x ^ (x >> 16)) * 0x846CA68Bu;
    x = x ^ (x >> 16);
    return (x >> 8) >= threshold ? spread(kept) : Vec{};
  }
};

// Takes pieces of the scratch memory, or only counts them.
class Room {
 public:
  explicit Room(float* at) : at_(at) {}
  template <class T = float>
  T* take(int64_t count) {
    T* found = reinterpret_cast<T*>(at_ + used_);
    used_ += up(count, 16);
    return found;
  }
  int64_t used() const { return used_; }

 private:
  float* at_;
  int64_t used_ = 0;
};

// Sizes that follow from a problem.
struct Plan {
  int64_t dim, value;    // up to whole vectors
  int64_t reach;         // slots before a query that it sees in strict mode
  int64_t back, ahead;   // slots around a segment that it may see
  int64_t capacity;
  int64_t parts, concurrent;  // pieces of a line, lines at once
  bool shared;                // rounds look at each other, so that a pair counts once

  explicit Plan(const Problem& p) {
    dim = up(p.dim, LANES);
    value = up(p.value, LANES);
    int64_t own = p.strict ? 0 : p.chunk_length - 1;
    reach = std::min(p.before * p.chunk_length, p.seq);
    back = up(std::min(reach + own, p.seq), QUERIES);
    ahead = up(p.strict ? 0 : std::min(p.after * p.chunk_length + own, p.seq), QUERIES);
    capacity = back + SEGMENT + ahead + QUERIES;
    int64_t lines = p.batch * p.heads;
    parts = lines >= p.threads ? 1 : std::min((p.threads + lines - 1) / lines, up(p.seq, 1024) / 1024);
    concurrent = parts == 1 ? p.threads : lines;
    shared = p.count && p.rounds > 1;
  }
};

// One head: its rounds are passed one after the other. Codes tell which pairs an earlier round shows, by their
// difference alone: slots with a gap between buckets, or chunks.
struct Line {
  int64_t batch, head, round, n;
  int32_t* position;            // by slot
  int32_t* low;                 // first visible slot, by slot
  int32_t* codes;               // of each round, by position
  int32_t* counts;
  float* total;                 // sum of weights so far, by position
  float* delta;                 // Σ dout·out, by position

  void place(const Problem& p, const Plan& plan, Room& room) {
    position = room.take<int32_t>(p.seq);
    low = room.take<int32_t>(p.seq);
    codes = room.take<int32_t>(plan.shared ? (p.rounds - 1) * p.seq : 0);
    counts = room.take<int32_t>(p.n_buckets + 2);
    total = room.take(p.seq);
    delta = total;
  }

  int64_t number(const Problem& p) const { return batch * p.heads + head; }
  int32_t* order(const Problem& p) const { return p.order + (number(p) * p.rounds + round) * p.seq; }
  float* logsumexp(const Problem& p) const { return p.logsumexp + number(p) * p.seq; }
  uint64_t key(const Problem& p, int64_t r) const { return number(p) * (p.rounds + 1) + r; }
  const uint8_t* real(const Problem& p) const { return p.real ? p.real + batch * p.seq : nullptr; }

  // Stable by bucket; padding has a bucket of its own, after all others.
  void sort(const Problem& p) {
    const int32_t* ids = p.buckets + (number(p) * p.rounds + round) * p.seq;
    const uint8_t* mask = real(p);
    int32_t* found = order(p);
    std::fill(counts, counts + p.n_buckets + 2, 0);
    auto id = [&](int64_t t) { return mask && !mask[t] ? p.n_buckets : ids[t] - p.first_bucket; };
    for (int64_t t = 0; t < p.seq; ++t) ++counts[id(t) + 1];
    for (int64_t i = 0; i <= p.n_buckets; ++i) counts[i + 1] += counts[i];
    // counts[i + 1] is now where bucket i ends. Filled from the end, it comes to be where it starts.
    for (int64_t t = p.seq - 1; t >= 0; --t) found[--counts[id(t) + 1]] = t;
    for (int64_t i = 0; i <= p.n_buckets; ++i) {
      int32_t start = counts[i + 1], end = i == p.n_buckets ? p.seq : counts[i + 2];
      if (start < end) found[start] = ~found[start];
    }
  }

  // Reads the order of a round.
  void read(const Problem& p, const Plan& plan) {
    const int32_t* found = order(p);
    const uint8_t* mask = real(p);
    n = mask ? std::count_if(mask, mask + p.seq, [](uint8_t x) { return x != 0; }) : p.seq;
    int32_t start = 0, bucket = 0;
    for (int32_t s = 0; s < p.seq; ++s) {
      if (found[s] < 0) start = s, ++bucket;
      int32_t chunk = s / p.chunk_length;
      position[s] = found[s] < 0 ? ~found[s] : found[s];
      low[s] = p.strict ? std::max<int32_t>(start, s - plan.reach) : (chunk - p.before) * p.chunk_length;
      if (plan.shared && round + 1 < p.rounds)
        codes[round * p.seq + position[s]] = p.strict ? s + bucket * (plan.reach + 1) : chunk;
    }
  }

  // The slot after the last visible one.
  int64_t high(const Problem& p, int64_t slot) const {
    if (p.strict) return slot;
    return std::min(n, (slot / p.chunk_length + 1 + p.after) * p.chunk_length);
  }
};

// What the weight of a token on itself is multiplied by, where it has no other.
inline float kept_alone(const Problem& p, const Dropout& dropout, const Line& line, int64_t t) {
  if (!(p.dropout > 0)) return 1;
  int32_t position = t;
  return dropout.keep(dropout.query(line.key(p, p.rounds), position), spread(position))[0];
}

inline void copy_row(float* to, const float* from, int64_t count, int64_t width) {
  std::memcpy(to, from, count * 4);
  std::fill(to + count, to + width, 0.f);
}

inline void prefetch(const float* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(row + i);
}

// The rows around a segment of a line, by slot from `base` on.
class Window {
 public:
  Window(const Problem& p, const Plan& plan, Room& room) : p(p), plan(plan), dropout(p) {
    int64_t c = plan.capacity;
    x = room.take(c * plan.dim);
    keys = room.take(c * plan.dim);
    v = room.take(c * plan.value);
    weights = room.take(QUERIES * c);
    norm = room.take(c);
    position = room.take<int32_t>(c);
    earlier = room.take<int32_t>(plan.shared ? (p.rounds - 1) * c : 0);
  }

  // Begins where the queries from `first` on look.
  void start(const Line& on, int64_t first) {
    line = &on;
    base = loaded = std::max<int64_t>(0, first - plan.back);
  }

 protected:
  const Problem& p;
  const Plan& plan;
  const Dropout dropout;
  const Line* line = nullptr;
  int64_t base = 0, loaded = 0;
  float *x, *keys, *v;  // keys by panels: [slot / LANES, dim, LANES]
  float *weights, *norm;
  int32_t *position, *earlier;

  // The queries from `first` up to `end` look at the keys from `low` to `high`, whole panels.
  struct Block {
    int64_t first, end, low, high;
    int64_t panels() const { return (high - low) / LANES; }
  };

  Block block(int64_t first, int64_t end) const {
    int64_t low = std::max<int64_t>(0, line->low[first]), high = std::max(line->high(p, end - 1), low);
    return {first, end, base + (low - base) / LANES * LANES, base + up(high - base, LANES)};
  }

  template <class T>
  void slide(T* at, int64_t by, int64_t width) const {
    std::memmove(at, at + by * width, (loaded - base - by) * width * sizeof(T));
  }

  // Forgets all before a slot.
  void advance(int64_t to) {
    int64_t by = to - base;
    if (by <= 0) return;
    slide(x, by, plan.dim);
    slide(keys, by, plan.dim);
    slide(v, by, plan.value);
    slide(norm, by, 1);
    slide(position, by, 1);
    if (plan.shared)
      for (int64_t r = 0; r < line->round; ++r) slide(earlier + r * plan.capacity, by, 1);
    base = to;
  }

  // Reads the rows of the next slots, as many as queries are treated at once; zeros after the last.
  void load_some() {
    int64_t at = loaded - base;
    for (int64_t i = at; i < at + QUERIES; ++i) {
      int64_t slot = base + i;
      if (slot >= line->n) {
        std::fill(x + i * plan.dim, x + (i + 1) * plan.dim, 0.f);
        std::fill(v + i * plan.value, v + (i + 1) * plan.value, 0.f);
        position[i] = 0;
        norm[i] = 0;
        continue;
      }
      if (slot + QUERIES < line->n) {
        int64_t soon = line->position[slot + QUERIES];
        prefetch(p.qk(line->batch, line->head, soon), p.dim);
        prefetch(p.v(line->batch, line->head, soon), p.value);
      }
      int64_t t = position[i] = line->position[slot];
      copy_row(x + i * plan.dim, p.qk(line->batch, line->head, t), p.dim, plan.dim);
      copy_row(v + i * plan.value, p.v(line->batch, line->head, t), p.value, plan.value);
      Vec square{};
      for (int64_t d = 0; d < plan.dim; d += LANES) {
        Vec y = load(x + i * plan.dim + d);
        square += y * y;
      }
      norm[i] = 1 / std::sqrt(sum(square) / p.dim + static_cast<float>(p.epsilon));
      if (plan.shared)
        for (int64_t r = 0; r < line->round; ++r)
          earlier[r * plan.capacity + i] = line->codes[r * p.seq + t];
    }
    for (int64_t i = at; i < at + QUERIES; i += LANES)
      turn(x + i * plan.dim, plan.dim, norm + i, p.scale * LOG2E, keys + i * plan.dim);
    loaded += QUERIES;
  }

  // LANES rows as a panel, each multiplied by a number of its own.
  static void turn(const float* rows, int64_t width, const float* factors, float factor, float* panel) {
    float by[LANES];
    for (int lane = 0; lane < LANES; ++lane) by[lane] = factors ? factors[lane] * factor : factor;
    for (int64_t d = 0; d < width; ++d)
      for (int lane = 0; lane < LANES; ++lane) panel[d * LANES + lane] = rows[lane * width + d] * by[lane];
  }

  // Scores of a block, logarithms to the base 2 of unnormalised weights; 0 where hidden ones are to be.
  void score(const Block& b) {
    multiply<false>(QUERIES, b.panels(), plan.dim, {x + (b.first - base) * plan.dim, plan.dim, 1},
                    {keys + (b.low - base) * plan.dim, LANES, plan.dim * LANES}, weights, plan.capacity);
  }

  // Which keys of a panel a query sees: all bits set, or none.
  struct Sight {
    int32_t slot, position, low;
    uint32_t span;
  };

  Sight sight(int64_t slot) const {
    int32_t low = line->low[slot];
    return {static_cast<int32_t>(slot), line->position[slot], low,
            static_cast<uint32_t>(line->high(p, slot) - low)};
  }

  Int visible(const Sight& q, int64_t key) const {
    // Differences of codes of pairs that a round shows are this, and so many more.
    const int32_t nearest = p.strict ? 1 : -p.after;
    const uint32_t width = p.strict ? plan.reach : p.before + 1 + p.after;
    Int slots = iota() + static_cast<int32_t>(key);
    Int seen = reinterpret_cast<Word>(slots - q.low) < q.span;
    if (!p.strict) {
      if (p.causal)
        seen &= load(position + (key - base)) < q.position;
      else
        seen &= slots != q.slot;
    }
    if (plan.shared)
      for (int64_t r = 0; r < line->round; ++r) {
        // A round that shows it, too, is the one where it counts.
        Int apart = line->codes[r * p.seq + q.position] - load(earlier + r * plan.capacity + (key - base));
        seen &= reinterpret_cast<Word>(apart - nearest) >= width;
      }
    return seen;
  }
};

class Forward : Window {
 public:
  Forward(const Problem& p, const Plan& plan, Room& room) : Window(p, plan, room) {
    part = room.take(QUERIES * plan.value);
  }

  void pass(const Line& on, int64_t first, int64_t end) {
    start(on, first);
    for (int64_t slot = first; slot < end; slot += SEGMENT) {
      advance(slot - plan.back);
      int64_t stop = std::min(slot + SEGMENT, end);
      while (loaded < std::min(stop + plan.ahead, line->n)) load_some();
      for (int64_t i = slot; i < stop; i += QUERIES) attend(block(i, std::min(i + QUERIES, stop)));
    }
  }

 private:
  float* part;

  void attend(const Block& b) {
    score(b);
    float highest[QUERIES], totals[QUERIES];
    uint64_t key = line->key(p, line->round);
    for (int64_t i = 0; i < b.end - b.first; ++i) {
      float* row = weights + i * plan.capacity;
      Sight q = sight(b.first + i);
      Vec top = spread(-INFINITE);
      Int odd{};
      for (int64_t k = b.low; k < b.high; k += LANES, row += LANES) {
        Vec s = visible(q, k) ? load(row) : spread(-INFINITE);
        store(row, s);
        top = s > top ? s : top;
        odd |= s != s;
      }
      highest[i] = maximum(top);
      row = weights + i * plan.capacity;
      // Where all is hidden, no weight is anything but 0; what is no number stays so.
      Vec from = spread(highest[i] == -INFINITE ? 0.f : highest[i]), total{};
      uint64_t query = p.dropout > 0 ? dropout.query(key, q.position) : 0;
      for (int64_t k = b.low; k < b.high; k += LANES, row += LANES) {
        Vec w = exp2(load(row) - from);
        total += w;
        if (p.dropout > 0) w *= dropout.keep(query, load(position + (k - base)));
        store(row, w);
      }
      totals[i] = sum(total);
    }
    multiply<false>(QUERIES, plan.value / LANES, b.high - b.low, {weights, plan.capacity, 1},
                    {v + (b.low - base) * plan.value, plan.value, LANES}, part, plan.value);
    for (int64_t i = 0; i < b.end - b.first; ++i)
      merge(line->position[b.first + i], part + i * plan.value, highest[i], totals[i]);
  }

  // Adds what a round found to what was found before: one softmax over both.
  void merge(int64_t t, const float* found, float highest, float total) {
    float* out = p.out(line->batch, line->head, t);
    float &sum_highest = line->logsumexp(p)[t], &sum = line->total[t];
    float mine = 0, other = total == 0 ? 0 : 1;
    if (line->round == 0) {
      sum_highest = highest;
      sum = total;
    } else if (total == 0) {
      mine = 1;
    } else {
      float both = std::max(sum_highest, highest);
      mine = sum == 0 ? 0 : std::exp2(sum_highest - both);
      other = std::exp2(highest - both);
      sum = sum * mine + total * other;
      sum_highest = both;
    }
    if (line->round + 1 == p.rounds) {
      if (sum == 0) return alone(t, out);
      mine /= sum;
      other /= sum;
      sum_highest += std::log2(sum);
    }
    if (line->round == 0)
      for (int64_t d = 0; d < p.value; ++d) out[d] = found[d] * other;
    else
      for (int64_t d = 0; d < p.value; ++d) out[d] = out[d] * mine + found[d] * other;
  }

  void alone(int64_t t, float* out) {
    float keep = kept_alone(p, dropout, *line, t);
    const float* own = p.v(line->batch, line->head, t);
    for (int64_t d = 0; d < p.value; ++d) out[d] = own[d] * keep;
    line->logsumexp(p)[t] = ALONE;
  }
};

class Backward : Window {
 public:
  Backward(const Problem& p, const Plan& plan, Room& room) : Window(p, plan, room) {
    int64_t c = plan.capacity;
    values = room.take(c * plan.value);
    dout = room.take(c * plan.value);
    dv = room.take(c * plan.value);
    dq = room.take(c * plan.dim);
    dk = room.take(c * plan.dim);
    slopes = room.take(QUERIES * c);
  }

  // Writes the gradients of the slots from `first` up to `end`.
  void pass(const Line& on, int64_t first, int64_t end) {
    own_first = first;
    own_end = end;
    first = std::max<int64_t>(0, first - plan.ahead);
    end = std::min(end + plan.back, on.n);
    start(on, first);
    for (int64_t slot = first; slot < end; slot += SEGMENT) {
      finish(slot - plan.back);
      int64_t stop = std::min(slot + SEGMENT, end);
      while (loaded < std::min(stop + plan.ahead, line->n)) load_more();
      for (int64_t i = slot; i < stop; i += QUERIES) attend(block(i, std::min(i + QUERIES, stop)));
    }
    finish(loaded);
  }

 private:
  float *values, *dout, *dv, *dq, *dk, *slopes;  // values by panels
  int64_t own_first = 0, own_end = 0;

  void load_more() {
    int64_t at = loaded - base;
    load_some();
    std::fill(dv + at * plan.value, dv + (at + QUERIES) * plan.value, 0.f);
    std::fill(dq + at * plan.dim, dq + (at + QUERIES) * plan.dim, 0.f);
    std::fill(dk + at * plan.dim, dk + (at + QUERIES) * plan.dim, 0.f);
    for (int64_t i = at; i < at + QUERIES; ++i)
      if (base + i < line->n) {
        copy_row(dout + i * plan.value, p.dout(line->batch, line->head, position[i]), p.value, plan.value);
        if (base + i + QUERIES < line->n)
          prefetch(p.dout(line->batch, line->head, line->position[base + i + QUERIES]), p.value);
      } else {
        std::fill(dout + i * plan.value, dout + (i + 1) * plan.value, 0.f);
      }
    for (int64_t i = at; i < at + QUERIES; i += LANES)
      turn(v + i * plan.value, plan.value, nullptr, 1, values + i * plan.value);
  }

  void attend(const Block& b) {
    int64_t ours = b.first - base, theirs = b.low - base, rows = b.end - b.first;
    if (b.low == b.high) return;
    score(b);
    multiply<false>(QUERIES, b.panels(), plan.value, {dout + ours * plan.value, plan.value, 1},
                    {values + theirs * plan.value, LANES, plan.value * LANES}, slopes, plan.capacity);
    uint64_t key = line->key(p, line->round);
    float scale = p.scale;
    for (int64_t i = 0; i < QUERIES; ++i) {
      float *weight = weights + i * plan.capacity, *slope = slopes + i * plan.capacity;
      if (i >= rows) {
        std::fill(weight, weight + (b.high - b.low), 0.f);
        std::fill(slope, slope + (b.high - b.low), 0.f);
        continue;
      }
      Sight q = sight(b.first + i);
      Vec total = spread(line->logsumexp(p)[q.position]), delta = spread(line->delta[q.position]);
      uint64_t query = p.dropout > 0 ? dropout.query(key, q.position) : 0;
      for (int64_t k = b.low; k < b.high; k += LANES, weight += LANES, slope += LANES) {
        Vec w = visible(q, k) ? exp2(load(weight) - total) : Vec{};
        Vec keep = p.dropout > 0 ? dropout.keep(query, load(position + (k - base))) : spread(1.f);
        store(weight, w * keep);
        // With the length of the key, which both of its uses want.
        store(slope, w * (load(slope) * keep - delta) * (load(norm + (k - base)) * scale));
      }
    }
    multiply<true>(b.high - b.low, plan.value / LANES, QUERIES, {weights, 1, plan.capacity},
                   {dout + ours * plan.value, plan.value, LANES}, dv + theirs * plan.value, plan.value);
    multiply<true>(b.high - b.low, plan.dim / LANES, QUERIES, {slopes, 1, plan.capacity},
                   {x + ours * plan.dim, plan.dim, LANES}, dk + theirs * plan.dim, plan.dim);
    multiply<false>(QUERIES, plan.dim / LANES, b.high - b.low, {slopes, plan.capacity, 1},
                    {x + theirs * plan.dim, plan.dim, LANES}, dq + ours * plan.dim, plan.dim);
  }

  // Writes what is complete, all before a slot, and forgets it.
  void finish(int64_t to) {
    for (int64_t slot = std::max(base, own_first); slot < std::min({to, own_end, line->n}); ++slot)
      write(slot - base);
    if (to <= base) return;
    slide(values, to - base, plan.value);
    slide(dout, to - base, plan.value);
    slide(dv, to - base, plan.value);
    slide(dq, to - base, plan.dim);
    slide(dk, to - base, plan.dim);
    advance(to);
  }

  void write(int64_t i) {
    int64_t t = position[i];
    float *dqk_out = p.dqk(line->batch, line->head, t), *dv_out = p.dv(line->batch, line->head, t);
    const float *own = x + i * plan.dim, *by_key = dk + i * plan.dim, *by_query = dq + i * plan.dim;
    Vec product{};
    for (int64_t d = 0; d < plan.dim; d += LANES) product += load(by_key + d) * load(own + d);
    // Keys are x·n·scale with n = (mean x² + ε)^(−½), whose gradient is −n³·x/dim.
    float along = sum(product) * norm[i] * norm[i] / p.dim;
    bool first = line->round == 0;
    for (int64_t d = 0; d < p.dim; ++d)
      dqk_out[d] = (first ? 0 : dqk_out[d]) + by_key[d] + by_query[d] - own[d] * along;
    const float* found = dv + i * plan.value;
    for (int64_t d = 0; d < p.value; ++d) dv_out[d] = (first ? 0 : dv_out[d]) + found[d];
    if (first && line->logsumexp(p)[t] == ALONE) {
      float keep = kept_alone(p, dropout, *line, t);
      for (int64_t d = 0; d < p.value; ++d) dv_out[d] += dout[i * plan.value + d] * keep;
    }
  }
};

// Padding gives zeros.
void clear_padding(const Problem& p, const Line& line, bool backward) {
  const uint8_t* real = line.real(p);
  for (int64_t t = 0; real && t < p.seq; ++t) {
    if (real[t]) continue;
    if (backward) {
      std::fill_n(p.dqk(line.batch, line.head, t), p.dim, 0.f);
      std::fill_n(p.dv(line.batch, line.head, t), p.value, 0.f);
    } else {
      std::fill_n(p.out(line.batch, line.head, t), p.value, 0.f);
      line.logsumexp(p)[t] = ALONE;
    }
  }
}

void find_delta(const Problem& p, const Line& line) {
  for (int64_t t = 0; t < p.seq; ++t) {
    const float *a = p.dout(line.batch, line.head, t), *b = p.out(line.batch, line.head, t);
    float found = 0;
#pragma omp simd reduction(+ : found)
    for (int64_t d = 0; d < p.value; ++d) found += a[d] * b[d];
    line.delta[t] = found;
  }
}

void begin(const Problem& p, const Plan& plan, Line& line, bool backward) {
  if (line.round == 0) {
    clear_padding(p, line, backward);
    if (backward) find_delta(p, line);
  }
  if (!backward) line.sort(p);
  line.read(p, plan);
}

// All lines. Where there are fewer heads than threads, threads share a line, and wait for each other after it.
template <class Pass>
int64_t run(const Problem& p, bool backward, bool only_count) {
  Plan plan(p);
  Room room(p.scratch);
  Line* lines = new Line[plan.concurrent];
  for (int64_t i = 0; i < plan.concurrent; ++i) lines[i].place(p, plan, room);
  int64_t before = room.used();
  Room one(nullptr);
  Pass counted(p, plan, one);
  int64_t each = one.used();
  int64_t needed = before + p.threads * each;
  int64_t heads = p.batch * p.heads;
  if (!only_count) {
#pragma omp parallel num_threads(p.threads)
    {
      Room mine(p.scratch + before + omp_get_thread_num() * each);
      Pass pass(p, plan, mine);
      if (plan.parts == 1) {
        Line& line = lines[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < heads; ++number) {
          line.batch = number / p.heads;
          line.head = number % p.heads;
          for (line.round = 0; line.round < p.rounds; ++line.round) {
            begin(p, plan, line, backward);
            pass.pass(line, 0, line.n);
          }
        }
      } else {
        for (int64_t round = 0; round < p.rounds; ++round) {
#pragma omp for schedule(dynamic)
          for (int64_t number = 0; number < heads; ++number) {
            Line& line = lines[number];
            line.batch = number / p.heads;
            line.head = number % p.heads;
            line.round = round;
            begin(p, plan, line, backward);
          }
#pragma omp for schedule(dynamic) collapse(2)
          for (int64_t number = 0; number < heads; ++number)
            for (int64_t i = 0; i < plan.parts; ++i) {
              const Line& line = lines[number];
              int64_t size = up((line.n + plan.parts - 1) / plan.parts, QUERIES);
              int64_t first = i * size;
              if (first < line.n) pass.pass(line, first, std::min(first + size, line.n));
            }
        }
      }
    }
  }
  delete[] lines;
  return needed;
}

inline int64_t nearest_signed_axis(const float* x, int64_t half) {
  float highest = x[0], lowest = x[0];
#pragma omp simd reduction(max : highest) reduction(min : lowest)
  for (int64_t i = 0; i < half; ++i) {
    highest = x[i] > highest ? x[i] : highest;
    lowest = x[i] < lowest ? x[i] : lowest;
  }
  bool positive = highest >= -lowest;
  float best = positive ? highest : lowest;
  int64_t i = 0;
  while (i + 1 < half && x[i] != best) ++i;
  return positive ? i : i + half;
}

// What the tokens of a decoding step see: `StepSizes` of native.py, in its order.
struct StepSizes {
  int64_t rows, rounds, buckets, band, slots, dim, value, used, once, threads;
  double scale, epsilon, own_score;
};

// The key of a query: at unit length, times √dim · scale.
inline void unit_key(const float* query, const StepSizes& s, float* key) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < s.dim; ++i) squares += query[i] * query[i];
  const float factor = static_cast<float>(s.scale / std::sqrt(squares / s.dim + s.epsilon));
  for (int64_t i = 0; i < s.dim; ++i) key[i] = query[i] * factor;
}

// Move a queue on by one; what it held before goes to the end of `seen`, but for slot 0, which is no token.
inline void push(int32_t* queue, int64_t band, int32_t slot, std::vector<int32_t>& seen) {
  for (int64_t i = 0; i < band; ++i)
    if (queue[i]) seen.push_back(queue[i]);
  std::copy(queue + 1, queue + band, queue);
  queue[band - 1] = slot;
}

// One more token of a row. Its key and value go into the store and its slot into a queue of every round; it attends
// to what these queues held, `once` to each slot, and to itself, with a given score: one softmax over all.
void step(const float* query, const float* value, const int64_t* buckets, int32_t* queues, float* store,
          const StepSizes& s, float* out) {
  const int64_t width = s.dim + s.value;
  unit_key(query, s, store + s.used * width);
  std::copy(value, value + s.value, store + s.used * width + s.dim);
  std::vector<int32_t> seen;
  seen.reserve(s.rounds * s.band + 1);
  for (int64_t round = 0; round < s.rounds; ++round)
    push(queues + (round * s.buckets + buckets[round]) * s.band, s.band, static_cast<int32_t>(s.used), seen);
  std::sort(seen.begin(), seen.end());
  if (s.once) seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  const int64_t last = static_cast<int64_t>(seen.size());
  seen.push_back(static_cast<int32_t>(s.used));
  std::vector<float> weights(seen.size());
  float largest = weights[last] = static_cast<float>(s.own_score);
  for (int64_t n = 0; n < last; ++n) {
    const float* key = store + seen[n] * width;
    float score = 0;
#pragma omp simd reduction(+ : score)
    for (int64_t i = 0; i < s.dim; ++i) score += query[i] * key[i];
    weights[n] = score;
    largest = std::max(largest, score);
  }
  float total = 0;
  std::fill(out, out + s.value, 0.f);
  for (int64_t n = 0; n <= last; ++n) {
    const float weight = std::exp(weights[n] - largest);
    const float* v = store + seen[n] * width + s.dim;
    total += weight;
#pragma omp simd
    for (int64_t i = 0; i < s.value; ++i) out[i] += weight * v[i];
  }
  for (int64_t i = 0; i < s.value; ++i) out[i] /= total;
}

}  // namespace

extern "C" {

// `step` of every row; all arrays are contiguous.
void reformer_step(const float* query, const float* value, const int64_t* buckets, int32_t* queues, float* store,
                   const StepSizes* s, float* out) {
#pragma omp parallel for num_threads(s->threads)
  for (int64_t row = 0; row < s->rows; ++row)
    step(query + row * s->dim, value + row * s->value, buckets + row * s->rounds,
         queues + row * s->rounds * s->buckets * s->band, store + row * s->slots * (s->dim + s->value), *s,
         out + row * s->value);
}

// Floats of scratch memory that a problem needs; 64 bytes aligned.
int64_t reformer_scratch(const Problem* p, int64_t backward) {
  return backward ? run<Backward>(*p, true, true) : run<Forward>(*p, false, true);
}

// Of each row the number of the largest of [x, −x]; the first of equals. Rows lie in four dimensions, `steps`
// floats apart; they are written in their order.
void reformer_nearest_signed_axis(const float* at, const int64_t* sizes, const int64_t* steps, int64_t half,
                                  int64_t threads, int64_t* found) {
#pragma omp parallel for collapse(3) num_threads(threads)
  for (int64_t a = 0; a < sizes[0]; ++a)
    for (int64_t b = 0; b < sizes[1]; ++b)
      for (int64_t c = 0; c < sizes[2]; ++c)
        for (int64_t d = 0; d < sizes[3]; ++d)
          found[((a * sizes[1] + b) * sizes[2] + c) * sizes[3] + d] =
              nearest_signed_axis(at + a * steps[0] + b * steps[1] + c * steps[2] + d * steps[3], half);
}

void reformer_forward(const Problem* p) { run<Forward>(*p, false, false); }

void reformer_backward(const Problem* p) { run<Backward>(*p, true, false); }
}

// Products of a few rows with transposed weights, which are read from memory once for all rows.
//
// R rows x (inputs, float32) times weights of O outputs, in float32, bf16 or whole numbers of 8 bits; sums in float32.
// A thread takes a share of the outputs, OUT of them and up to 4 rows at a time, whose sums stay in registers. Narrow
// weights are read as words of 32 bits, each of PARTS weights, and taken apart part by part: the first parts of LANES
// words, then the second ones. Therefore the inputs are laid out in that order first.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8, REGISTERS = 16;
#else
constexpr int64_t LANES = 4, REGISTERS = 32;
#endif
// Rows at a time, and outputs at a time of one row.
constexpr int64_t ROWS = 4, ONE = 4;
// Outputs of a few rows that are made before those of the next ones.
constexpr int64_t TOGETHER = 24;
// Outputs at a time of several rows: their sums are in registers, beside one factor each, an input, and a mask or none.
template <typename W>
constexpr int64_t MANY = REGISTERS == 32 ? 4 : sizeof(W) == 4 ? 3 : 2;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
// As they lie in memory, at any address.
typedef float StoredFloats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t StoredWords __attribute__((vector_size(4 * LANES), aligned(1)));

struct BFloat16 {
  uint16_t bits;
};

// Memory that begins at a line of the cache: what lies across two lines is read twice.
template <typename T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <typename U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* place, size_t) { ::operator delete(place, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
using Buffer = std::vector<float, Aligned<float>>;

template <int PART>
inline Floats part(const float* weight) {
  return *reinterpret_cast<const StoredFloats*>(weight);
}

template <int PART>
inline Floats part(const BFloat16* weight) {
  Words words = *reinterpret_cast<const StoredWords*>(weight);
  return (Floats)(PART == 0 ? words << 16 : words & 0xffff0000u);
}

template <int PART>
inline Floats part(const int8_t* weight) {
  Words words = *reinterpret_cast<const StoredWords*>(weight);
  return __builtin_convertvector((Ints)(words << (24 - 8 * PART)) >> 24, Floats);
}

inline float value(float weight) { return weight; }
inline float value(int8_t weight) { return weight; }
inline float value(BFloat16 weight) {
  uint32_t word = uint32_t(weight.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof(result));
  return result;
}

template <typename W, int OUT, int COUNT, int PART>
inline void add(Floats (&sums)[OUT][COUNT], const W* weight, const float* x, int64_t inputs, int64_t apart) {
  Floats factors[OUT];
  for (int out = 0; out < OUT; out++) factors[out] = part<PART>(weight + out * apart * inputs);
  for (int row = 0; row < COUNT; row++) {
    Floats input = *reinterpret_cast<const StoredFloats*>(x + row * inputs + PART * LANES);
    for (int out = 0; out < OUT; out++) sums[out][row] += factors[out] * input;
  }
}

// The sum of all lanes, by halves: one after the other, each addition would wait for the one before.
inline float total(Floats values) {
  float lanes[LANES];
  std::memcpy(lanes, &values, sizeof(lanes));
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; lane++) lanes[lane] += lanes[half + lane];
  return lanes[0];
}

// OUT outputs of COUNT rows, each `apart` outputs from the one before.
template <typename W, int OUT, int COUNT>
void tile(const W* weight, const float* x, float* y, int64_t inputs, int64_t outputs, int64_t apart) {
  constexpr int64_t PARTS = 4 / sizeof(W), STEP = LANES * PARTS;
  Floats sums[OUT][COUNT] = {};
  int64_t first = 0;
  for (; first + STEP <= inputs; first += STEP) {
    add<W, OUT, COUNT, 0>(sums, weight + first, x + first, inputs, apart);
    if constexpr (PARTS >= 2) add<W, OUT, COUNT, 1>(sums, weight + first, x + first, inputs, apart);
    if constexpr (PARTS == 4) {
      add<W, OUT, COUNT, 2>(sums, weight + first, x + first, inputs, apart);
      add<W, OUT, COUNT, 3>(sums, weight + first, x + first, inputs, apart);
    }
  }
  for (int out = 0; out < OUT; out++) {
    for (int row = 0; row < COUNT; row++) {
      float sum = total(sums[out][row]);
      for (int64_t i = first; i < inputs; i++) sum += value(weight[out * apart * inputs + i]) * x[row * inputs + i];
      y[row * outputs + out * apart] = sum;
    }
  }
}

// OUT outputs of all rows.
template <typename W, int OUT>
void all_rows(const W* weight, const float* x, float* y, int64_t rows, int64_t inputs, int64_t outputs,
              int64_t apart) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS * inputs, y += ROWS * outputs)
    tile<W, OUT, ROWS>(weight, x, y, inputs, outputs, apart);
  if (rows == 3) tile<W, OUT, 3>(weight, x, y, inputs, outputs, apart);
  if (rows == 2) tile<W, OUT, 2>(weight, x, y, inputs, outputs, apart);
  if (rows == 1) tile<W, OUT, 1>(weight, x, y, inputs, outputs, apart);
}

// A thread's share of the outputs of one weight, for rows whose inputs do not fit into the nearest cache: some outputs for
// a few rows, then the same for the next ones.
template <typename W, int OUT>
void share_of_many(const W* weight, const float* x, float* y, int64_t rows, int64_t inputs, int64_t outputs,
                   int64_t first, int64_t last) {
  for (int64_t block = first; block < last; block += TOGETHER) {
    const int64_t end = std::min(block + TOGETHER, last);
    for (int64_t row = 0; row < rows; row += ROWS) {
      const int64_t count = std::min(ROWS, rows - row);
      const float* input = x + row * inputs;
      float* product = y + row * outputs;
      int64_t out = block;
      for (; out + OUT <= end; out += OUT)
        all_rows<W, OUT>(weight + out * inputs, input, product + out, count, inputs, outputs, 1);
      for (; out < end; out++) all_rows<W, 1>(weight + out * inputs, input, product + out, count, inputs, outputs, 1);
    }
  }
}

// The same for all numbers of rows. Of a few, OUT outputs at a time are streams that lie far apart, since
// memory is read ahead along each.
template <typename W, int OUT>
void share(const W* weight, const float* x, float* y, int64_t rows, int64_t inputs, int64_t outputs, int64_t first,
           int64_t last) {
  if (rows > ROWS) return share_of_many<W, OUT>(weight, x, y, rows, inputs, outputs, first, last);
  const int64_t count = (last - first) / OUT;
  for (int64_t out = first; out < first + count; out++)
    all_rows<W, OUT>(weight + out * inputs, x, y + out, rows, inputs, outputs, count);
  for (int64_t out = first + count * OUT; out < last; out++)
    all_rows<W, 1>(weight + out * inputs, x, y + out, rows, inputs, outputs, 1);
}

// The inputs in the order in which the parts of words come; what does not fill a step stays as it is.
template <typename W>
void lay_out(float* laid, const float* x, int64_t rows, int64_t inputs) {
  constexpr int64_t PARTS = 4 / sizeof(W), STEP = LANES * PARTS;
  for (int64_t row = 0; row < rows; row++, x += inputs, laid += inputs) {
    int64_t first = 0;
    for (; first + STEP <= inputs; first += STEP)
      for (int64_t word = 0; word < LANES; word++)
        for (int64_t part = 0; part < PARTS; part++)
          laid[first + part * LANES + word] = x[first + word * PARTS + part];
    std::memcpy(laid + first, x + first, (inputs - first) * sizeof(float));
  }
}

using torch::stable::Tensor;

// Outputs of all rows, as many at a time as suits their number.
template <typename W>
void share_of(const W* weight, const float* x, float* y, int64_t rows, int64_t inputs, int64_t outputs, int64_t first,
              int64_t last) {
  rows == 1 ? share<W, ONE>(weight, x, y, rows, inputs, outputs, first, last)
            : share<W, MANY<W>>(weight, x, y, rows, inputs, outputs, first, last);
}

// Calls a function with the number of each thread and of all, in all of them.
template <typename Function>
void in_threads(Function function) {
#pragma omp parallel
  {
#ifdef _OPENMP
    function(int64_t(omp_get_thread_num()), int64_t(omp_get_num_threads()));
#else
    function(int64_t(0), int64_t(1));
#endif
  }
}

// Rows [R, I] in the order in which products with weights of this type read them, in `laid` where that is another.
template <typename W>
const float* in_order(const Tensor& x, Buffer& laid) {
  const float* input = reinterpret_cast<const float*>(x.data_ptr());
  if (sizeof(W) == sizeof(float)) return input;
  laid.resize(x.size(0) * x.size(1));
  lay_out<W>(laid.data(), input, x.size(0), x.size(1));
  return laid.data();
}

template <typename W>
void multiply(const std::vector<Tensor>& weights, const Tensor& x, std::vector<Tensor>& products) {
  const int64_t rows = x.size(0), inputs = x.size(1);
  Buffer laid;
  const float* input = in_order<W>(x, laid);
  in_threads([&](int64_t thread, int64_t threads) {
    for (size_t i = 0; i < weights.size(); i++) {
      const int64_t outputs = weights[i].size(0);
      share_of(reinterpret_cast<const W*>(weights[i].data_ptr()), input,
               reinterpret_cast<float*>(products[i].data_ptr()), rows, inputs, outputs, outputs * thread / threads,
               outputs * (thread + 1) / threads);
    }
  });
}

// Of weights [O, I] of one type and x [R, I] in float32, all contiguous: products [R, O] in float32.
std::vector<Tensor> products(std::vector<Tensor> weights, Tensor x) {
  std::vector<Tensor> results;
  STD_TORCH_CHECK(!weights.empty(), "there must be a weight");
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.is_contiguous() && weight.dim() == 2 && weight.size(1) == x.size(1), "weights must be of shape [O, I]");
    STD_TORCH_CHECK(weight.scalar_type() == weights[0].scalar_type(), "weights must be of one type");
    results.push_back(torch::stable::new_empty(x, {x.size(0), weight.size(0)}));
  }
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == torch::headeronly::ScalarType::Float, "x must be contiguous, in float32");
  switch (weights[0].scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      multiply<float>(weights, x, results);
      break;
    case torch::headeronly::ScalarType::BFloat16:
      multiply<BFloat16>(weights, x, results);
      break;
    case torch::headeronly::ScalarType::Char:
      multiply<int8_t>(weights, x, results);
      break;
    default:
      STD_TORCH_CHECK(false, "weights must be in float32, bf16 or int8");
  }
  return results;
}

template <typename W>
void multiply_groups(const Tensor& x, const Tensor& weight, const Tensor& ends, Tensor& y) {
  const int64_t inputs = x.size(1), outputs = weight.size(1);
  const int64_t* end = reinterpret_cast<const int64_t*>(ends.data_ptr());
  Buffer laid;
  const float* input = in_order<W>(x, laid);
  in_threads([&](int64_t thread, int64_t threads) {
    const int64_t first = outputs * thread / threads, last = outputs * (thread + 1) / threads;
    for (int64_t expert = 0, row = 0; expert < weight.size(0); row = end[expert++]) {
      if (end[expert] == row) continue;
      share_of(reinterpret_cast<const W*>(weight.data_ptr()) + expert * outputs * inputs, input + row * inputs,
               reinterpret_cast<float*>(y.data_ptr()) + row * outputs, end[expert] - row, inputs, outputs, first, last);
    }
  });
}

// Of rows x [M, I] in float32 that are sorted by expert, weights [E, O, I] and where the rows of each expert end [E], all
// contiguous: products [M, O] in float32, 0 behind the last end. An expert without rows is not read.
Tensor grouped(Tensor weight, Tensor x, Tensor ends) {
  STD_TORCH_CHECK(weight.is_contiguous() && weight.dim() == 3 && weight.size(2) == x.size(1), "weights must be of shape [E, O, I]");
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == torch::headeronly::ScalarType::Float, "x must be contiguous, in float32");
  STD_TORCH_CHECK(ends.is_contiguous() && ends.scalar_type() == torch::headeronly::ScalarType::Long && ends.size(0) == weight.size(0), "ends must be one an expert");
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(1)});
  std::memset(y.data_ptr(), 0, x.size(0) * weight.size(1) * sizeof(float));
  switch (weight.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      multiply_groups<float>(x, weight, ends, y);
      break;
    case torch::headeronly::ScalarType::BFloat16:
      multiply_groups<BFloat16>(x, weight, ends, y);
      break;
    case torch::headeronly::ScalarType::Char:
      multiply_groups<int8_t>(x, weight, ends, y);
      break;
    default:
      STD_TORCH_CHECK(false, "weights must be in float32, bf16 or int8");
  }
  return y;
}

inline float rounded(float value, float) { return value; }
inline float rounded(float value, BFloat16) {
  if (value != value) return value;
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  word = (word + 0x7fff + ((word >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&value, &word, sizeof(word));
  return value;
}

// e to the power of x, within 2 units in the last place; what float32 cannot hold as a normal number is cut.
inline Floats exponential(Floats x) {
  x = x > 88.0f ? Floats{} + 88.0f : x;
  x = x < -87.0f ? Floats{} - 87.0f : x;
  // Adding this leaves no room for digits behind the point.
  const Floats whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats sum = Floats{} + 1.9875691500e-4f;
  for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * rest + factor;
  sum = sum * rest * rest + rest + 1.0f;
  return sum * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
}

// Changes `count` numbers in place by a function of LANES of them.
template <typename Function>
inline void each(float* values, int64_t count, Function function) {
  int64_t first = 0;
  for (; first + LANES <= count; first += LANES) {
    StoredFloats* place = reinterpret_cast<StoredFloats*>(values + first);
    *place = function(Floats(*place));
  }
  if (first == count) return;
  Floats last = {};
  std::memcpy(&last, values + first, (count - first) * sizeof(float));
  last = function(last);
  std::memcpy(values + first, &last, (count - first) * sizeof(float));
}

// Sums of STEPS * LANES * PARTS elements of the values, times the shares of `slots` slots.
template <typename W, int STEPS>
void weighted(const W* values, const float* shares, float* sums, int64_t slots, int64_t width) {
  constexpr int64_t PARTS = 4 / sizeof(W), STEP = LANES * PARTS;
  Floats totals[STEPS][PARTS] = {};
  for (int64_t slot = 0; slot < slots; slot++, values += width) {
    for (int step = 0; step < STEPS; step++) {
      totals[step][0] += shares[slot] * part<0>(values + step * STEP);
      if constexpr (PARTS == 2) totals[step][1] += shares[slot] * part<1>(values + step * STEP);
    }
  }
  for (int step = 0; step < STEPS; step++)
    for (int64_t word = 0; word < LANES; word++)
      for (int64_t i = 0; i < PARTS; i++) sums[step * STEP + word * PARTS + i] = totals[step][i][word];
}

// Attention of one query of one head to the slots that are used, or to all where none is named, and to the token's own
// key and value.
template <typename W>
void attend_head(const float* query, const float* key, const float* value, const W* keys, const W* values,
                 const bool* used, int64_t slots, int64_t width, float* output) {
  constexpr int64_t STEP = LANES * (4 / sizeof(W));
  if (used) {
    while (slots > 0 && !used[slots - 1]) slots--;
    for (; slots > 0 && !used[0]; slots--, used++, keys += width, values += width) {
    }
  }
  Buffer shares(slots), laid(width);
  lay_out<W>(laid.data(), query, 1, width);
  int64_t slot = 0;
  for (; slot + ONE <= slots; slot += ONE)
    all_rows<W, ONE>(keys + slot * width, laid.data(), shares.data() + slot, 1, width, slots, 1);
  for (; slot < slots; slot++)
    all_rows<W, 1>(keys + slot * width, laid.data(), shares.data() + slot, 1, width, slots, 1);
  float own = 0;
  for (int64_t i = 0; i < width; i++) own += query[i] * key[i];
  float largest = own;
  for (slot = 0; slot < slots; slot++)
    if ((!used || used[slot]) && shares[slot] > largest) largest = shares[slot];
  each(shares.data(), slots, [&](Floats score) { return exponential(score - largest); });
  float total = std::exp(own - largest);
  own = rounded(total, W());
  for (slot = 0; slot < slots; slot++) {
    if (used && !used[slot]) shares[slot] = 0;
    total += shares[slot];
    shares[slot] = rounded(shares[slot], W());
  }
  int64_t first = 0;
  for (; first + 4 * STEP <= width; first += 4 * STEP)
    weighted<W, 4>(values + first, shares.data(), output + first, slots, width);
  for (; first + STEP <= width; first += STEP)
    weighted<W, 1>(values + first, shares.data(), output + first, slots, width);
  for (; first < width; first++) {
    output[first] = 0;
    for (slot = 0; slot < slots; slot++) output[first] += shares[slot] * ::value(values[slot * width + first]);
  }
  for (int64_t i = 0; i < width; i++) output[i] = (output[i] + own * value[i]) / total;
}

template <typename W>
void attend_all(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
                const Tensor& used, const Tensor& row, Tensor& output) {
  const int64_t rows = query.size(0), heads = query.size(1), groups = query.size(2), width = query.size(3);
  const int64_t slots = keys.size(2);
#pragma omp parallel for
  for (int64_t i = 0; i < rows * heads * groups; i++) {
    const int64_t pair = i / groups, head = pair % heads;
    const int64_t stored = reinterpret_cast<const int64_t*>(row.data_ptr())[pair / heads];
    const int64_t first = (stored * heads + head) * slots * width;
    attend_head<W>(reinterpret_cast<const float*>(query.data_ptr()) + i * width,
                   reinterpret_cast<const float*>(key.data_ptr()) + pair * width,
                   reinterpret_cast<const float*>(value.data_ptr()) + pair * width,
                   reinterpret_cast<const W*>(keys.data_ptr()) + first,
                   reinterpret_cast<const W*>(values.data_ptr()) + first,
                   reinterpret_cast<const bool*>(used.data_ptr()) + stored * slots, slots, width,
                   reinterpret_cast<float*>(output.data_ptr()) + i * width);
  }
}

// Of queries [R, H, G, h], keys and values [R, H, h] in float32, stored ones [B, H, S, h], used slots [B, S] and each
// query's row of those [R], all contiguous: [R, H, G, h] in float32. What is not used is not read.
Tensor attend(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor used, Tensor row) {
  for (const Tensor& tensor : {query, key, value, keys, values, used, row})
    STD_TORCH_CHECK(tensor.is_contiguous(), "tensors must be contiguous");
  for (const Tensor& tensor : {query, key, value})
    STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float, "what is new must be in float32");
  STD_TORCH_CHECK(keys.scalar_type() == values.scalar_type(), "keys and values must be of one type");
  Tensor output = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2), query.size(3)});
  switch (keys.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      attend_all<float>(query, key, value, keys, values, used, row, output);
      break;
    case torch::headeronly::ScalarType::BFloat16:
      attend_all<BFloat16>(query, key, value, keys, values, used, row, output);
      break;
    default:
      STD_TORCH_CHECK(false, "stored keys must be in float32 or bf16");
  }
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(mixture_of_depths, CPU, library) {
  library.impl("products", TORCH_BOX(&products));
  library.impl("attend", TORCH_BOX(&attend));
  library.impl("grouped", TORCH_BOX(&grouped));
}

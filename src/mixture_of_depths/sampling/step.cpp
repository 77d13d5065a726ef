// A decode step: one token a row through all blocks, rounded where `step.py` rounds, which is its naive twin.
//
// All threads go through the same blocks side by side. Each makes its share of the outputs of a product and of the heads
// of attention, and waits for the others where it reads theirs. What is small, such as a norm, each makes for itself.
// Structs mirror those of `own_step.py`, field by field; a pointer to nothing means that a model has no such part.
//
// Rows that take part in something are a list of numbers of the batch. Buffers of D, F and so on hold them side by side,
// the hidden states all rows of the batch.

struct Linear {
  const void* weight;
  // Of weights of 8 bits, one an output.
  const float* scale;
  const float* bias;
  int64_t outputs, inputs, bytes;
};

struct Norm {
  const float* weight;
  double eps;
};

struct Router {
  const float* weight;
  // Below 0 where the hidden states are not normed.
  double eps;
  const float* threshold;
  Linear up, down;
  const float* predictor_scale;
  double predictor_eps;
  // Of random routers, by position.
  const float *random_logits, *random_causal;
};

enum Part : int64_t { DENSE, BLOCK, BLOCK_KEEP_KEYS, MLP };
enum Activation : int64_t { IDENTITY, SIGMOID, TANH, ONE_FOR_ALL };

struct Layer {
  int64_t part;
  Norm attention_norm, mlp_norm, query_norm, key_norm;
  Linear query, key, value, output, gate, up, down, bypass_down, bypass_up;
  Router router;
  void *keys, *values;
  int64_t slots;
  // Of each row: how many slots are in use, and whether the token entered.
  int64_t* length;
  bool* entered;
};

struct Step {
  int64_t batch, width, heads, key_heads, head_width, blocks, bytes, activation, threads;
  const void* embedding;
  Norm norm;
  Linear head;
  // By position, rounded.
  const float *cos, *sin;
  // Of each row: the position of its token, and the first slot that is not padding.
  int64_t *position;
  const int64_t* padding;
  const Layer* layers;
};

using Rows = std::vector<int64_t>;

// What threads hand to one another.
struct Shared {
  Buffer hidden, query, key, value, attended, added, gate, up, bypass, predicted, logits, causal;
};

template <typename W>
class Worker {
 public:
  Worker(const Step& step, Shared& shared, int64_t thread, int64_t threads)
      : step(step), shared(shared), thread(thread), threads(threads) {
    for (int64_t row = 0; row < step.batch; row++) every.push_back(row);
  }

  void run(const int64_t* token, const bool* active, float* logits) {
    const int64_t width = step.width;
    for (int64_t row = thread; row < step.batch; row += threads)
      for (int64_t i = 0; i < width; i++)
        hidden(row)[i] = ::value(static_cast<const W*>(step.embedding)[token[row] * width + i]);
    wait();
    for (int64_t number = 0; number < step.blocks; number++) block(step.layers[number], number, active);
    normed(step.norm, every);
    product<W>(step.head, lay(step.head, step.batch), step.batch,
               [&](int64_t row, int64_t out, float sum) { logits[row * step.head.outputs + out] = sum; });
  }

 private:
  void block(const Layer& layer, int64_t number, const bool* active) {
    if (layer.part == DENSE) {
      project(layer, every, true);
      attend(layer, every);
      feed(layer, every);
    } else {
      if (layer.part == MLP) {
        project(layer, every, true);
        attend(layer, every);
      }
      if (layer.part == BLOCK_KEEP_KEYS) keep_keys(layer, every);
      route(layer, number, active);
      bypass(layer);
      if (layer.part != MLP && !entering.empty()) {
        project(layer, entering, layer.part == BLOCK);
        attend(layer, entering);
      }
      if (!entering.empty()) feed(layer, entering);
    }
    if (thread > 0) return;
    for (int64_t row = 0; row < step.batch; row++) layer.length[row] += layer.part != BLOCK || layer.entered[row];
  }

  // Queries of these rows, and their keys and values, too, or those that are kept already.
  void project(const Layer& layer, const Rows& rows, bool with_keys) {
    normed(layer.attention_norm, rows);
    const float* laid = lay(layer.query, rows.size());
    linear<W>(layer.query, laid, rows.size(), shared.query);
    if (with_keys) place(layer, rows, laid);
    wait();
  }

  void keep_keys(const Layer& layer, const Rows& rows) {
    normed(layer.attention_norm, rows);
    place(layer, rows, lay(layer.key, rows.size()));
    wait();
  }

  // Keys and values to the slot behind those in use.
  void place(const Layer& layer, const Rows& rows, const float* laid) {
    const int64_t heads = step.key_heads, width = step.head_width;
    linear<W>(layer.key, laid, rows.size(), shared.key);
    linear<W>(layer.value, laid, rows.size(), shared.value);
    wait();
    for (int64_t i = thread; i < int64_t(rows.size()) * heads; i += threads) {
      const int64_t row = rows[i / heads];
      const int64_t slot = ((row * heads + i % heads) * layer.slots + layer.length[row]) * width;
      float* key = shared.key.data() + i * width;
      turn(key, layer.key_norm, row);
      for (int64_t j = 0; j < width; j++) {
        store(static_cast<W*>(layer.keys)[slot + j], key[j]);
        store(static_cast<W*>(layer.values)[slot + j], shared.value[i * width + j]);
      }
    }
  }

  // What attention adds to these rows: where the MLP alone is routed to the hidden states, else to be added with it.
  void attend(const Layer& layer, const Rows& rows) {
    const int64_t heads = step.heads, width = step.head_width, count = rows.size();
    const float scale = std::pow(double(width), -0.5);
    Buffer key(width), value(width);
    for (int64_t i = thread; i < count * heads; i += threads) {
      const int64_t row = rows[i / heads], head = i % heads * step.key_heads / heads;
      const int64_t first = layer.part == BLOCK ? 0 : step.padding[row], last = layer.length[row];
      const int64_t start = (row * step.key_heads + head) * layer.slots;
      const W* keys = static_cast<const W*>(layer.keys) + start * width;
      const W* values = static_cast<const W*>(layer.values) + start * width;
      for (int64_t j = 0; j < width; j++) {
        key[j] = ::value(keys[last * width + j]);
        value[j] = ::value(values[last * width + j]);
      }
      float* query = shared.query.data() + i * width;
      turn(query, layer.query_norm, row);
      for (int64_t j = 0; j < width; j++) query[j] *= scale;
      float* output = shared.attended.data() + i * width;
      attend_head<W>(query, key.data(), value.data(), keys + first * width, values + first * width, nullptr,
                     last - first, width, output);
      for (int64_t j = 0; j < width; j++) output[j] = rounded(output[j], W());
    }
    wait();
    input.assign(shared.attended.begin(), shared.attended.begin() + count * heads * width);
    product<W>(layer.output, lay(layer.output, count), count, [&](int64_t i, int64_t out, float sum) {
      float& place = layer.part == MLP ? hidden(rows[i])[out] : shared.added[i * step.width + out];
      place = layer.part == MLP ? rounded(place + sum, W()) : sum;
    });
    wait();
  }

  // The MLP of these rows, and what the block leaves on the residual stream.
  void feed(const Layer& layer, const Rows& rows) {
    const int64_t count = rows.size(), width = step.width, outputs = layer.gate.outputs;
    normed(layer.mlp_norm, rows, layer.part == MLP ? nullptr : shared.added.data());
    const float* laid = lay(layer.gate, count);
    linear<W>(layer.gate, laid, count, shared.gate);
    linear<W>(layer.up, laid, count, shared.up);
    const auto [first, last] = own(outputs);
    for (int64_t i = 0; i < count; i++) {
      float *gate = shared.gate.data() + i * outputs, *up = shared.up.data() + i * outputs;
      each(gate + first, last - first, [](Floats x) { return x / (1.0f + exponential(-x)); });
      for (int64_t out = first; out < last; out++) gate[out] = rounded(rounded(gate[out], W()) * up[out], W());
    }
    wait();
    input.assign(shared.gate.begin(), shared.gate.begin() + count * outputs);
    product<W>(layer.down, lay(layer.down, count), count, [&](int64_t i, int64_t out, float sum) {
      float& place = hidden(rows[i])[out];
      if (layer.part != MLP) sum = rounded(shared.added[i * width + out] + sum, W());
      if (layer.part != DENSE) sum = rounded(factors[i] * sum, W());
      place = rounded(place + sum, W());
    });
    wait();
  }

  // Which rows enter. The first thread decides for all: denormal numbers may count in one thread and not in another.
  void route(const Layer& layer, int64_t number, const bool* active) {
    const Router& router = layer.router;
    const int64_t width = step.width, inside = router.up.outputs;
    // Each block has a place of its own, which no thread still reads when another is ahead by a block.
    float* logits = shared.logits.data() + number * step.batch;
    float* causal = shared.causal.data() + number * step.batch;
    float* predicted = shared.predicted.data() + number * step.batch * inside;
    if (router.up.weight) {
      input.assign(shared.hidden.begin(), shared.hidden.end());
      for (int64_t row = 0; row < step.batch; row++)
        norm(input.data() + row * width, nullptr, router.predictor_eps, width);
      product<float>(router.up, input.data(), step.batch, [&](int64_t row, int64_t out, float sum) {
        predicted[row * inside + out] = sum / (1 + std::exp(-sum));
      });
      wait();
    }
    for (int64_t row = 0; thread == 0 && row < step.batch; row++) {
      if (router.random_logits) {
        logits[row] = router.random_logits[step.position[row]];
        causal[row] = router.random_causal[step.position[row]];
      } else {
        input.assign(hidden(row), hidden(row) + width);
        if (router.eps >= 0) norm(input.data(), nullptr, router.eps, width);
        logits[row] = causal[row] = dot(input.data(), router.weight, width);
        if (router.threshold) causal[row] -= *router.threshold;
        if (router.up.weight)
          causal[row] = dot(predicted + row * inside, static_cast<const float*>(router.down.weight), inside) +
                        *router.down.bias + *router.predictor_scale * logits[row];
      }
      layer.entered[row] = causal[row] > 0 && active[row];
    }
    wait();
    entering.clear();
    skipping.clear();
    factors.clear();
    for (int64_t row = 0; row < step.batch; row++) {
      (layer.entered[row] ? entering : skipping).push_back(row);
      if (layer.entered[row]) factors.push_back(gate(logits[row]));
    }
  }

  float gate(float logit) const {
    switch (step.activation) {
      case SIGMOID:
        return 1 / (1 + std::exp(-logit));
      case TANH:
        return std::tanh(logit);
      case ONE_FOR_ALL:
        // No number where the logit is none.
        return 1 + (logit - logit);
      default:
        return logit;
    }
  }

  // What rows that skip take in the place of the routed part.
  void bypass(const Layer& layer) {
    if (!layer.bypass_down.weight || skipping.empty()) return;
    normed(layer.part == MLP ? layer.mlp_norm : layer.attention_norm, skipping);
    linear<W>(layer.bypass_down, lay(layer.bypass_down, skipping.size()), skipping.size(), shared.bypass);
    wait();
    const int64_t count = skipping.size();
    input.assign(shared.bypass.begin(), shared.bypass.begin() + count * layer.bypass_down.outputs);
    product<W>(layer.bypass_up, lay(layer.bypass_up, count), count, [&](int64_t i, int64_t out, float sum) {
      hidden(skipping[i])[out] = rounded(hidden(skipping[i])[out] + sum, W());
    });
    wait();
  }

  // Norm of a head where the model has one, and RoPE, which turns its first half against the second.
  void turn(float* head, const Norm& by, int64_t row) const {
    const int64_t width = step.head_width, half = width / 2;
    const float *cos = step.cos + step.position[row] * width, *sin = step.sin + step.position[row] * width;
    if (by.weight) {
      norm(head, by.weight, by.eps, width);
      for (int64_t i = 0; i < width; i++) head[i] = rounded(head[i], W());
    }
    for (int64_t i = 0; i < half; i++) {
      const float first = head[i], second = head[half + i];
      head[i] = rounded(rounded(first * cos[i], W()) - rounded(second * sin[i], W()), W());
      head[half + i] = rounded(rounded(second * cos[half + i], W()) + rounded(first * sin[half + i], W()), W());
    }
  }

  // To `input`: the norm of these rows of the hidden states, with what is still to be added to them.
  void normed(const Norm& by, const Rows& rows, const float* added = nullptr) {
    const int64_t width = step.width;
    input.resize(rows.size() * width);
    for (size_t i = 0; i < rows.size(); i++) {
      float* row = input.data() + i * width;
      std::memcpy(row, hidden(rows[i]), width * sizeof(float));
      if (added)
        for (int64_t j = 0; j < width; j++) row[j] = rounded(row[j] + added[i * width + j], W());
      norm(row, by.weight, by.eps, width);
      for (int64_t j = 0; j < width; j++) row[j] = rounded(row[j], W());
    }
  }

  // `input` in the order in which products with this map read it.
  const float* lay(const Linear& map, int64_t rows) {
    if (map.bytes == 4) return input.data();
    laid.resize(input.size());
    map.bytes == 2 ? lay_out<BFloat16>(laid.data(), input.data(), rows, map.inputs)
                   : lay_out<int8_t>(laid.data(), input.data(), rows, map.inputs);
    return laid.data();
  }

  // This thread's share of the outputs of a map of some rows, rounded to R, each to `use`.
  template <typename R, typename Use>
  void product(const Linear& map, const float* x, int64_t rows, Use use) {
    const auto [first, last] = own(map.outputs);
    switch (map.bytes) {
      case 4:
        multiply(static_cast<const float*>(map.weight), map, x, rows);
        break;
      case 2:
        multiply(static_cast<const BFloat16*>(map.weight), map, x, rows);
        break;
      default:
        multiply(static_cast<const int8_t*>(map.weight), map, x, rows);
    }
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t out = first; out < last; out++) {
        float sum = sums[row * (last - first) + out - first];
        if (map.scale) sum *= map.scale[out];
        if (map.bias) sum += map.bias[out];
        use(row, out, rounded(sum, R()));
      }
    }
  }

  template <typename R>
  void linear(const Linear& map, const float* x, int64_t rows, Buffer& y) {
    product<R>(map, x, rows, [&](int64_t row, int64_t out, float sum) { y[row * map.outputs + out] = sum; });
  }

  // To `sums`: this thread's outputs of all rows.
  template <typename M>
  void multiply(const M* weight, const Linear& map, const float* x, int64_t rows) {
    const auto [first, last] = own(map.outputs);
    const int64_t outputs = last - first;
    sums.resize(rows * outputs);
    weight += first * map.inputs;
    share_of(weight, x, sums.data(), rows, map.inputs, outputs, 0, outputs);
  }

  static float dot(const float* left, const float* right, int64_t count) {
    Floats sums = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
      sums += *reinterpret_cast<const StoredFloats*>(left + i) * *reinterpret_cast<const StoredFloats*>(right + i);
    float sum = total(sums);
    for (; i < count; i++) sum += left[i] * right[i];
    return sum;
  }

  static void norm(float* row, const float* weight, double eps, int64_t width) {
    const float factor = 1 / std::sqrt(dot(row, row, width) / width + float(eps));
    for (int64_t i = 0; i < width; i++) row[i] *= factor;
    if (weight)
      for (int64_t i = 0; i < width; i++) row[i] *= weight[i];
  }

  static void store(float& place, float value) { place = value; }
  static void store(BFloat16& place, float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    place.bits = word >> 16;
  }

  // The first of this thread's outputs, and the one behind its last.
  std::pair<int64_t, int64_t> own(int64_t outputs) const {
    return {outputs * thread / threads, outputs * (thread + 1) / threads};
  }

  float* hidden(int64_t row) { return shared.hidden.data() + row * step.width; }

  void wait() {
#pragma omp barrier
  }

  const Step& step;
  Shared& shared;
  const int64_t thread, threads;
  Rows every, entering, skipping;
  // Of the rows that enter: what the block's result is multiplied with.
  Buffer factors;
  Buffer input, laid, sums;
};

template <typename W>
void decode(const Step& step, const int64_t* token, const bool* active, float* logits) {
  Shared shared;
  int64_t inside = 0, rank = 0, predicted = 0;
  for (int64_t i = 0; i < step.blocks; i++) {
    inside = std::max(inside, step.layers[i].gate.outputs);
    rank = std::max(rank, step.layers[i].bypass_down.outputs);
    predicted = std::max(predicted, step.layers[i].router.up.outputs);
  }
  const int64_t queries = step.heads * step.head_width, keys = step.key_heads * step.head_width;
  for (auto [buffer, width] : {std::pair(&shared.hidden, step.width), std::pair(&shared.query, queries),
                               std::pair(&shared.key, keys), std::pair(&shared.value, keys),
                               std::pair(&shared.attended, queries), std::pair(&shared.added, step.width),
                               std::pair(&shared.gate, inside), std::pair(&shared.up, inside),
                               std::pair(&shared.bypass, rank), std::pair(&shared.predicted, predicted * step.blocks),
                               std::pair(&shared.logits, step.blocks), std::pair(&shared.causal, step.blocks)})
    buffer->resize(step.batch * width);
#pragma omp parallel num_threads(step.threads)
  {
#ifdef _OPENMP
    Worker<W>(step, shared, omp_get_thread_num(), omp_get_num_threads()).run(token, active, logits);
#else
    Worker<W>(step, shared, 0, 1).run(token, active, logits);
#endif
  }
  for (int64_t row = 0; row < step.batch; row++) step.position[row]++;
}

extern "C" int64_t size_of_step() { return sizeof(Step) + sizeof(Layer); }

extern "C" void decode_step(const Step* step, const int64_t* token, const bool* active, float* logits) {
  step->bytes == 4 ? decode<float>(*step, token, active, logits) : decode<BFloat16>(*step, token, active, logits);
}

#include "warp.h"

#include <algorithm>

namespace simt {
namespace {

template <class T>
T& of(void* const* data, unsigned lane) {
  return *static_cast<T*>(data[lane]);
}

template <class Body>
void each(unsigned lanes, Body body) {
  for (; lanes; lanes &= lanes - 1) body(unsigned(__builtin_ctz(lanes)));
}

struct Shuffled {
  u32 value, result;
  unsigned source;
};

struct Voted {
  bool value;
  u32 lanes;
};

struct Matched {
  u64 value;
  u32 lanes;
  bool all;
};

template <class T>
struct Reduced {
  Reduction operation;
  T value;
};

template <class T>
T reduce(Thread& t, Reduction operation, T value, u32 mask, const Site* site) {
  static constexpr const char* kKinds[] = {"redux.add", "redux.min", "redux.max", "redux.and", "redux.or", "redux.xor"};
  Reduced<T> own{operation, value};
  collective(
      t, mask, kKinds[operation], &own,
      [](void* const* data, unsigned lanes, Thread& last) {
        T total = of<Reduced<T>>(data, last.lane).value;
        each(lanes & ~(1u << last.lane), [&](unsigned l) {
          const Reduced<T>& x = of<Reduced<T>>(data, l);
          switch (x.operation) {
            case kAdd: total = T(u32(total) + u32(x.value)); break;
            case kMin: total = std::min(total, x.value); break;
            case kMax: total = std::max(total, x.value); break;
            case kAnd: total &= x.value; break;
            case kOr: total |= x.value; break;
            case kXor: total ^= x.value; break;
          }
        });
        each(lanes, [&](unsigned l) { of<Reduced<T>>(data, l).value = total; });
      },
      site);
  return own.value;
}

struct Tiles {
  u32 count;
  bool transposed;
  Row row;
  u32 registers[4];
};

// Lane l holds elements (l / 4, l % 4 * 2) and the next in its row of each 8 x 8 matrix of 16-bit elements.
u16 element(const Row& row, unsigned column) { return u16(row.word[column / 2] >> 16 * (column & 1)); }

void gather(const u32 fragment[kWarp], bool transposed, u16 matrix[8][8]) {
  for (unsigned l = 0; l < kWarp; l++)
    for (unsigned h = 0; h < 2; h++) {
      const unsigned i = l / 4, j = l % 4 * 2 + h;
      (transposed ? matrix[j][i] : matrix[i][j]) = u16(fragment[l] >> 16 * h);
    }
}

}  // namespace

u32 shuffle(Thread& t, Shuffle mode, u32 value, u32 b, u32 c, u32 mask, bool& valid, const Site* site) {
  const int lane = int(t.lane), distance = int(b & 31), limit = int(c & 31), segment = int(c >> 8 & 31);
  const int low = lane & segment, high = low | (limit & ~segment);
  int source = 0;
  switch (mode) {
    case kUp32: source = lane - distance, valid = source >= high; break;
    case kDown32: source = lane + distance, valid = source <= high; break;
    case kButterfly32: source = lane ^ distance, valid = source <= high; break;
    case kIndex32: source = low | (distance & ~segment), valid = source <= high; break;
  }
  if (!valid) source = lane;
  Shuffled own{value, ~0u, unsigned(source)};
  collective(
      t, mask, "shfl.sync", &own,
      [](void* const* data, unsigned lanes, Thread&) {
        each(lanes, [&](unsigned l) {
          Shuffled& s = of<Shuffled>(data, l);
          if (lanes >> s.source & 1) s.result = of<Shuffled>(data, s.source).value;
        });
      },
      site);
  return own.result;
}

u32 ballot(Thread& t, bool value, u32 mask, const Site* site) {
  Voted own{value, 0};
  collective(
      t, mask, "vote.sync", &own,
      [](void* const* data, unsigned lanes, Thread&) {
        u32 votes = 0;
        each(lanes, [&](unsigned l) { votes |= u32(of<Voted>(data, l).value) << l; });
        each(lanes, [&](unsigned l) { of<Voted>(data, l).lanes = votes; });
      },
      site);
  return own.lanes;
}

static Matched match(Thread& t, u64 value, u32 mask, const char* kind, const Site* site) {
  Matched own{value, 0, true};
  collective(
      t, mask, kind, &own,
      [](void* const* data, unsigned lanes, Thread&) {
        each(lanes, [&](unsigned l) {
          Matched& m = of<Matched>(data, l);
          each(lanes, [&](unsigned k) { m.lanes |= u32(of<Matched>(data, k).value == m.value) << k; });
          m.all = m.lanes == lanes;
        });
      },
      site);
  return own;
}

u32 match_any(Thread& t, u64 value, u32 mask, const Site* site) { return match(t, value, mask, "match.any", site).lanes; }

u32 match_all(Thread& t, u64 value, u32 mask, bool& all, const Site* site) {
  const Matched m = match(t, value, mask, "match.all", site);
  all = m.all;
  return m.all ? mask : 0;
}

u32 reduce_u32(Thread& t, Reduction operation, u32 value, u32 mask, const Site* site) { return reduce(t, operation, value, mask, site); }
s32 reduce_s32(Thread& t, Reduction operation, s32 value, u32 mask, const Site* site) { return reduce(t, operation, value, mask, site); }

bool elect(Thread& t, u32 mask, u32& leader, const Site* site) {
  u32 own = 0;
  collective(
      t, mask, "elect.sync", &own,
      [](void* const* data, unsigned lanes, Thread&) { each(lanes, [&](unsigned l) { of<u32>(data, l) = u32(__builtin_ctz(lanes)); }); },
      site);
  leader = own;
  return own == t.lane;
}

void exchange_rows(Thread& t, u32 count, bool transposed, const Row& row, u32* registers, const Site* site) {
  Tiles own{count, transposed, row, {}};
  whole_warp(
      t, transposed ? "ldmatrix.trans" : "ldmatrix", &own,
      [](void* const* data, unsigned, Thread& last) {
        const Tiles shape = of<Tiles>(data, last.lane);
        for (u32 k = 0; k < shape.count; k++)
          for (unsigned l = 0; l < kWarp; l++) {
            const unsigned i = l / 4, j = l % 4 * 2;
            auto at = [&](unsigned r, unsigned c) { return element(of<Tiles>(data, 8 * k + r).row, c); };
            const u16 first = shape.transposed ? at(j, i) : at(i, j), second = shape.transposed ? at(j + 1, i) : at(i, j + 1);
            of<Tiles>(data, l).registers[k] = u32(second) << 16 | first;
          }
      },
      site);
  std::copy_n(own.registers, count, registers);
}

void exchange_fragments(Thread& t, u32 count, bool transposed, const u32* registers, Row& row, const Site* site) {
  Tiles own{count, transposed, {}, {}};
  std::copy_n(registers, count, own.registers);
  whole_warp(
      t, transposed ? "stmatrix.trans" : "stmatrix", &own,
      [](void* const* data, unsigned, Thread& last) {
        const Tiles shape = of<Tiles>(data, last.lane);
        for (u32 k = 0; k < shape.count; k++) {
          u32 fragment[kWarp];
          u16 matrix[8][8];
          for (unsigned l = 0; l < kWarp; l++) fragment[l] = of<Tiles>(data, l).registers[k];
          gather(fragment, shape.transposed, matrix);
          for (unsigned i = 0; i < 8; i++) std::memcpy(of<Tiles>(data, 8 * k + i).row.word, matrix[i], sizeof matrix[i]);
        }
      },
      site);
  row = own.row;
}

u32 move_matrix(Thread& t, u32 fragment, const Site* site) {
  whole_warp(
      t, "movmatrix", &fragment,
      [](void* const* data, unsigned, Thread&) {
        u32 before[kWarp];
        u16 matrix[8][8];
        for (unsigned l = 0; l < kWarp; l++) before[l] = of<u32>(data, l);
        gather(before, true, matrix);
        for (unsigned l = 0; l < kWarp; l++) of<u32>(data, l) = u32(matrix[l / 4][l % 4 * 2 + 1]) << 16 | matrix[l / 4][l % 4 * 2];
      },
      site);
  return fragment;
}

}  // namespace simt

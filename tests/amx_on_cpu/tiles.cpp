// Tile code as a compiler makes it, for the tests of the emulator. On a CPU with AMX the same functions run natively.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  void tile(int t, int64_t r, int64_t bytes) {
    rows[t] = uint8_t(r);
    row_bytes[t] = uint16_t(bytes);
  }
};

// The intrinsic names only the address, so GCC 12 drops the stores to a local configuration before it. The operand "m" keeps them.
void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }

}  // namespace

// Linux gives tile registers only to processes that ask. 0: granted.
extern "C" int request() {
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return int(syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData));
}

// c [m, n] fp32 = a [m, k] bf16 times b, whose pairs of rows are interleaved: [k / 2, n, 2]. k even; leading dimensions in bytes. No byte
// outside of the matrices is touched: tails have tiles of their own sizes.
extern "C" void gemm(const char* a, int64_t lda, const char* b, int64_t ldb, char* c, int64_t ldc, int64_t m, int64_t n, int64_t k) {
  const int64_t tail = k % 32;
  for (int64_t i = 0; i < m; i += 16)
    for (int64_t j = 0; j < n; j += 16) {
      const int64_t rows = std::min<int64_t>(16, m - i), columns = std::min<int64_t>(16, n - j);
      Config config;
      config.tile(0, rows, columns * 4);
      config.tile(1, rows, 64);
      config.tile(2, 16, columns * 4);
      if (tail) {
        config.tile(6, rows, tail * 2);
        config.tile(7, tail / 2, columns * 4);
      }
      configure(config);
      _tile_zero(0);
      const char *ai = a + i * lda, *bj = b + j * 4;
      for (int64_t s = 0; s + 32 <= k; s += 32) {
        _tile_loadd(1, ai + s * 2, lda);
        _tile_stream_loadd(2, bj + s / 2 * ldb, ldb);
        _tile_dpbf16ps(0, 1, 2);
      }
      if (tail) {
        _tile_loadd(6, ai + (k - tail) * 2, lda);
        _tile_loadd(7, bj + (k - tail) / 2 * ldb, ldb);
        _tile_dpbf16ps(0, 6, 7);
      }
      _tile_stored(0, c + i * ldc + j * 4, ldc);
      _tile_release();
    }
}

// gemm in a thread whose MXCSR is `mxcsr`; returns the MXCSR found afterwards.
extern "C" uint32_t gemm_under(uint32_t mxcsr, const char* a, int64_t lda, const char* b, int64_t ldb, char* c, int64_t ldc, int64_t m,
                               int64_t n, int64_t k) {
  const uint32_t before = _mm_getcsr();
  _mm_setcsr(mxcsr);
  gemm(a, lda, b, ldb, c, ldc, m, n, k);
  const uint32_t after = _mm_getcsr();
  _mm_setcsr(before);
  return after;
}

// c += a * b in one TDPBF16PS, all three of the sizes in `config` (64 bytes: tiles 3, 4, 5).
extern "C" void accumulate(const void* config, const char* a, int64_t lda, const char* b, int64_t ldb, char* c, int64_t ldc) {
  _tile_loadconfig(config);
  _tile_loadd(3, c, ldc);
  _tile_loadd(4, a, lda);
  _tile_loadd(5, b, ldb);
  _tile_dpbf16ps(3, 4, 5);
  _tile_stored(3, c, ldc);
  _tile_release();
}

// Through tile 5 of `config`. 0: stores what it loaded; 1: the same with TILELOADDT1.
extern "C" void copy(const void* config, int hint, const char* from, int64_t from_stride, char* to, int64_t to_stride) {
  _tile_loadconfig(config);
  if (hint)
    _tile_stream_loadd(5, from, from_stride);
  else
    _tile_loadd(5, from, from_stride);
  _tile_stored(5, to, to_stride);
  _tile_release();
}

extern "C" void load_config(const void* config) { _tile_loadconfig(config); }
extern "C" void store_config(void* config) { _tile_storeconfig(config); }
extern "C" void load_tile(const char* from, int64_t stride) { _tile_loadd(5, from, stride); }
extern "C" void store_tile(char* to, int64_t stride) { _tile_stored(5, to, stride); }
extern "C" void zero_tile() { _tile_zero(5); }
extern "C" void dot() { _tile_dpbf16ps(3, 4, 5); }
extern "C" void release() { _tile_release(); }

// What csrc sees of files that are compiled once per tier: the same names in each tier's namespace.
#pragma once

#if defined(PYKERNELS_X86_TIERS)
#define PYKERNELS_IN_EVERY_TIER(...) \
  namespace generic {                \
  __VA_ARGS__                        \
  }                                  \
  namespace avx2 {                   \
  __VA_ARGS__                        \
  }                                  \
  namespace avx512 {                 \
  __VA_ARGS__                        \
  }                                  \
  namespace avx512_bf16 {            \
  __VA_ARGS__                        \
  }                                  \
  namespace amx {                    \
  __VA_ARGS__                        \
  }
#else
#define PYKERNELS_IN_EVERY_TIER(...) \
  namespace generic {                \
  __VA_ARGS__                        \
  }
#endif

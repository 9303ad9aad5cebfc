// What every operator on sequences does to its batch before its own kernels.
#include "batch.cuh"
#include "elements.cuh"
#include "launch.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kTile = 32, kTileRows = 8;

// Reads along whichever of rows and columns is the denser.
template <class T>
__global__ void __launch_bounds__(kTile* kTileRows)
    stage_rows_kernel(const T* x, int64_t sequence_stride, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t length,
                      int64_t columns, int64_t width, bool along_rows, T* to) {
  __shared__ T tile[kTile][kTile + 2];
  const int64_t row0 = int64_t(blockIdx.x) * kTile, column0 = int64_t(blockIdx.y) * kTile;
  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    const int r = along_rows ? threadIdx.x : i, c = along_rows ? i : threadIdx.x;
    const int64_t row = row0 + r, column = column0 + c;
    T value = from_float<T>(0.f);
    if (row < rows && column < columns) {
      value = x[row / length * sequence_stride + row % length * row_stride + column * column_stride];
    }
    tile[r][c] = value;
  }
  __syncthreads();
  for (int r = threadIdx.y; r < kTile; r += kTileRows) {
    const int64_t row = row0 + r, column = column0 + threadIdx.x;
    if (row < rows && column < width) to[row * width + column] = tile[r][threadIdx.x];
  }
}

__global__ void __launch_bounds__(256) sequence_of_row_kernel(const __grid_constant__ Batch batch, int32_t* to) {
  const int64_t row = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (row >= batch.rows) return;
  int64_t low = 0, high = batch.sequences;  // the first boundary behind the row is in [low + 1, high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (bound(batch, middle) <= row ? low : high) = middle;
  }
  to[row] = int32_t(low);
}

template <class T>
cudaError_t stage_rows(const void* x, int64_t sequence_stride, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t length,
                       int64_t columns, int64_t width, void* to, cudaStream_t stream) {
  const bool along_rows = column_stride > row_stride || column_stride < -row_stride;
  return launch(stage_rows_kernel<T>, dim3(blocks_of(rows, kTile), blocks_of(width, kTile)), dim3(kTile, kTileRows), 0, stream,
                static_cast<const T*>(x), sequence_stride, row_stride, column_stride, rows, length, columns, width, along_rows,
                static_cast<T*>(to));
}

}  // namespace

extern "C" {

cudaError_t pykernels_cuda_stage_rows(Dtype dtype, const void* x, int64_t sequence_stride, int64_t row_stride, int64_t column_stride,
                                      int64_t rows, int64_t length, int64_t columns, int64_t width, void* to, cudaStream_t stream) {
  // Bits are copied, whatever they mean.
  const auto stage = element_size(dtype) == 4 ? stage_rows<float> : stage_rows<bfloat16>;
  return stage(x, sequence_stride, row_stride, column_stride, rows, length, columns, width, to, stream);
}

cudaError_t pykernels_cuda_sequence_of_row(const Batch* batch, int32_t* to, cudaStream_t stream) {
  return launch(sequence_of_row_kernel, dim3(blocks_of(batch->rows, 256)), dim3(256), 0, stream, *batch, to);
}

}  // extern "C"

}  // namespace pykernels::cuda

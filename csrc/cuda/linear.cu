#include <cublasLt.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <tuple>

#include "cuda/kernel.cuh"
#include "cuda/linear.hpp"
#include "cuda/ops.hpp"
#include "tensor/checks.hpp"

namespace vllmlite::cuda {

// ---- Dot products
// Grid: (blocks of 32 rows of w, blocks of kColumns rows of x). Block: 8 warps, each with 4 rows of w; its lanes share
// the columns, kSize of them an access, and add up their sums at the end.

constexpr int kWarps = 8, kRows = 4;

template <typename T, typename Out, int kSize, int kColumns>
static __global__ void dot_product_kernel(const T* x, const T* w, const T* bias, Out* y, int m, int n, int k) {
  using P = Pack<T, kSize>;
  let_next_begin();
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int n0 = (static_cast<int>(blockIdx.x) * kWarps + warp) * kRows;
  const int m0 = static_cast<int>(blockIdx.y) * kColumns;
  if (n0 >= n) return;
  const T* rows[kRows];
  const T* columns[kColumns];
#pragma unroll
  for (int i = 0; i < kRows; ++i) rows[i] = w + static_cast<std::int64_t>(min(n0 + i, n - 1)) * k;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) columns[j] = x + static_cast<std::int64_t>(min(m0 + j, m - 1)) * k;
  float sums[kRows][kColumns] = {};
  for (int at = lane * kSize; at < k; at += 32 * kSize) {
    P a[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) a[i] = *reinterpret_cast<const P*>(rows[i] + at);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const P b = *reinterpret_cast<const P*>(columns[j] + at);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[i][j] = fmaf(to_float(a[i].at[e]), to_float(b.at[e]), sums[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float sum = warp_sum(sums[i][j]);
      if (lane == 0 && n0 + i < n && m0 + j < m)
        y[static_cast<std::int64_t>(m0 + j) * n + n0 + i] =
            from_float<Out>(bias == nullptr ? sum : sum + to_float(bias[n0 + i]));
    }
}

template <typename T, typename Out>
static void run_dot_products(const Runtime& runtime, const Product& product) {
  const auto run = [&](auto* kernel, int columns) {
    const dim3 grid(blocks_for(product.n, kWarps * kRows), blocks_for(product.m, columns));
    launch(runtime, kernel, grid, kWarps * 32, 0, static_cast<const T*>(product.x), static_cast<const T*>(product.w),
           static_cast<const T*>(product.bias), static_cast<Out*>(product.y), product.m, product.n, product.k);
  };
  // Sums depend on the size of accesses, which is a property of the weight, not on how many columns go together.
  const bool packed = product.k % kPack<T> == 0 && aligned(product.x, 16) && aligned(product.w, 16);
  if (packed && product.m > 2)
    run(dot_product_kernel<T, Out, kPack<T>, 8>, 8);
  else if (packed)
    run(dot_product_kernel<T, Out, kPack<T>, 1>, 1);
  else if (product.m > 2)
    run(dot_product_kernel<T, Out, 1, 8>, 8);
  else
    run(dot_product_kernel<T, Out, 1, 1>, 1);
}

void multiply_by_dot_products(const Runtime& runtime, const Product& product) {
  with_float(product.dtype, [&](auto* pointer) {
    using T = Pointee<decltype(pointer)>;
    if (product.out_dtype == DType::float32)
      run_dot_products<T, float>(runtime, product);
    else
      run_dot_products<T, T>(runtime, product);
  });
}

// ---- cuBLASLt

static void check_library(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) throw Error(std::string(call) + ": " + cublasLtGetStatusString(status));
}

static cudaDataType_t type_of(DType dtype) {
  return dtype == DType::float32 ? CUDA_R_32F : dtype == DType::float16 ? CUDA_R_16F : CUDA_R_16BF;
}

static std::uint32_t alignment_of(const void* pointer) {
  std::uint32_t alignment = 256;
  while (!aligned(pointer, alignment)) alignment /= 2;
  return alignment;
}

class Products {
 public:
  explicit Products(Runtime& runtime) : workspace_(runtime.make({kWorkspace}, DType::uint8)) {
    const DeviceGuard guard(runtime.device());
    check_library(cublasLtCreate(&handle_), "cublasLtCreate");
  }
  ~Products() {
    (void)cublasLtDestroy(handle_);
    for (cudaEvent_t event : {begin_, end_})
      if (event != nullptr) (void)cudaEventDestroy(event);
    if (aside_ != nullptr) (void)cudaStreamDestroy(aside_);
  }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  bool multiply(Runtime& runtime, const Product& product);

 private:
  // m of the plan, n, k, dtypes, whether there is a bias, alignments.
  using Key = std::tuple<int, int, int, DType, DType, bool, std::uint32_t, std::uint32_t, std::uint32_t>;

  // How products of nearly as many rows are multiplied.
  struct Plan {
    Plan() = default;
    ~Plan() {
      if (operation != nullptr) (void)cublasLtMatmulDescDestroy(operation);
    }
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
    bool found = false, timed = false;
  };

  void choose(Runtime& runtime, Plan& plan, const Product& product, int rows);
  cublasStatus_t run(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Product& product,
                     cudaStream_t stream);
  // Returns the milliseconds that an algorithm takes if w is not in a cache; infinite if it fails.
  float time(Runtime& runtime, const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Product& product,
             float enough);

  static constexpr std::int64_t kWorkspace = 32 << 20;
  static constexpr std::int64_t kCaches = 64 << 20;  // more than a device's caches hold
  static constexpr int kCandidates = 8;

  cublasLtHandle_t handle_ = nullptr;
  Tensor workspace_;
  cudaStream_t aside_ = nullptr;  // runs the timed products while steps are recorded
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  std::map<Key, Plan> plans_;
};

std::shared_ptr<Products> make_products(Runtime& runtime) { return std::make_shared<Products>(runtime); }

// The rows that a plan is made for: the next of a few numbers. Asking the library takes longer than launching a
// product, and steps with prompts in them have any number of rows.
static int planned_rows(int m) {
  const auto below = static_cast<int>(std::bit_floor(static_cast<unsigned>(std::max(m - 1, 1))));
  const int step = std::clamp(below / (m <= 256 ? 4 : 8), 8, 64);
  return (m + step - 1) / step * step;
}

// The library sees columns first, hence y^T = w x^T.
struct Layouts {
  explicit Layouts(const Product& product, int rows) {
    const cudaDataType_t in = type_of(product.dtype), out = type_of(product.out_dtype);
    const auto m = static_cast<std::uint64_t>(rows), n = static_cast<std::uint64_t>(product.n),
               k = static_cast<std::uint64_t>(product.k);
    const auto set = [](cublasLtMatrixLayoutOpaque_t& layout, cudaDataType_t type, std::uint64_t height,
                        std::uint64_t width) {
      check_library(cublasLtMatrixLayoutInit(&layout, type, height, width, static_cast<std::int64_t>(height)),
                    "cublasLtMatrixLayoutInit");
    };
    set(w, in, k, n);
    set(x, in, k, m);
    set(y, out, n, m);
  }

  cublasLtMatrixLayoutOpaque_t w, x, y;
};

void Products::choose(Runtime& runtime, Plan& plan, const Product& product, int rows) {
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    check_library(cublasLtMatmulDescSetAttribute(plan.operation, attribute, &value, sizeof value),
                  "cublasLtMatmulDescSetAttribute");
  };
  if (plan.operation == nullptr) {
    check_library(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                  "cublasLtMatmulDescCreate");
    set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    if (product.bias != nullptr) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type_of(product.dtype));
    }
  }
  if (product.bias != nullptr) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias);
  plan.timed = runtime.recording();
  cublasLtMatmulPreference_t preference = nullptr;
  check_library(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check_library(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
                  "cublasLtMatmulPreferenceSetAttribute");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::size_t>(kWorkspace));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(product.w));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(product.x));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(product.y));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(product.y));
  Layouts layouts(product, rows);
  cublasLtMatmulHeuristicResult_t results[kCandidates] = {};
  int count = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, plan.operation, &layouts.w, &layouts.x, &layouts.y, &layouts.y,
                                     preference, plan.timed ? kCandidates : 1, results, &count);
  (void)cublasLtMatmulPreferenceDestroy(preference);
  // A bias in 16 bits under sums in 32 counts as an invalid value.
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE || count == 0) return;
  check_library(status, "cublasLtMatmulAlgoGetHeuristic");
  plan.algorithm = results[0].algo;
  plan.found = true;
  // Steps that are recorded run often, and have few sizes: the library's guesses are tried.
  float best = INFINITY;
  for (int i = 0; i < count && count > 1; ++i) {
    const float taken = time(runtime, plan, results[i].algo, product, best * 1.2F);
    if (taken >= best) continue;
    best = taken;
    plan.algorithm = results[i].algo;
  }
}

cublasStatus_t Products::run(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Product& product,
                             cudaStream_t stream) {
  const float one = 1, zero = 0;
  Layouts layouts(product, product.m);
  return cublasLtMatmul(handle_, plan.operation, &one, product.w, &layouts.w, product.x, &layouts.x, &zero, product.y,
                        &layouts.y, product.y, &layouts.y, &algorithm, workspace_.data, kWorkspace, stream);
}

float Products::time(Runtime& runtime, const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Product& product,
                     float enough) {
  constexpr int kRuns = 3;
  if (aside_ == nullptr) {
    VLLMLITE_CUDA_CHECK(cudaStreamCreateWithFlags, &aside_, cudaStreamNonBlocking);
    for (cudaEvent_t* event : {&begin_, &end_}) VLLMLITE_CUDA_CHECK(cudaEventCreate, event);
  }
  const Tensor caches = runtime.make({kCaches}, DType::uint8);
  float least = INFINITY;
  for (int i = -1; i < kRuns; ++i) {
    VLLMLITE_CUDA_CHECK(cudaMemsetAsync, caches.data, 0, caches.bytes(), aside_);
    VLLMLITE_CUDA_CHECK(cudaEventRecord, begin_, aside_);
    if (run(plan, algorithm, product, aside_) != CUBLAS_STATUS_SUCCESS) return INFINITY;
    VLLMLITE_CUDA_CHECK(cudaEventRecord, end_, aside_);
    VLLMLITE_CUDA_CHECK(cudaEventSynchronize, end_);
    float taken = 0;
    VLLMLITE_CUDA_CHECK(cudaEventElapsedTime, &taken, begin_, end_);
    if (i >= 0) least = std::min(least, taken);
    if (i == 0 && least > enough) break;
  }
  return least;
}

bool Products::multiply(Runtime& runtime, const Product& product) {
  const int rows = planned_rows(product.m);
  const Key key{rows,
                product.n,
                product.k,
                product.dtype,
                product.out_dtype,
                product.bias != nullptr,
                alignment_of(product.w),
                alignment_of(product.x),
                alignment_of(product.y)};
  const auto [place, fresh] = plans_.try_emplace(key);
  Plan& plan = place->second;
  if (fresh || (runtime.recording() && !plan.timed)) choose(runtime, plan, product, rows);
  if (!plan.found) return false;
  if (product.bias != nullptr)
    check_library(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &product.bias,
                                                 sizeof product.bias),
                  "cublasLtMatmulDescSetAttribute");
  const cublasStatus_t status = run(plan, plan.algorithm, product, runtime.stream());
  // The algorithm was found for a similar number of rows, and may not support this one.
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return false;
  check_library(status, "cublasLtMatmul");
  return true;
}

bool multiply_by_library(Runtime& runtime, const Product& product) {
  return runtime.products().multiply(runtime, product);
}

// ---- The op

template <typename Rows>
static std::int64_t rows_of(const std::vector<Rows>& parts) {
  std::int64_t rows = 0;
  for (const Rows& part : parts) rows += part.rows;
  return rows;
}

std::int64_t LinearWeight::out() const {
  if (const auto* floats = std::get_if<Tensor>(&weight)) return floats->shape[0];
  if (const auto* bytes = std::get_if<std::vector<ByteRows>>(&weight)) return rows_of(*bytes);
  return rows_of(std::get<std::vector<GroupedRows>>(weight));
}

std::int64_t LinearWeight::in() const {
  if (const auto* floats = std::get_if<Tensor>(&weight)) return floats->shape[1];
  if (const auto* bytes = std::get_if<std::vector<ByteRows>>(&weight)) return bytes->at(0).columns;
  return std::get<std::vector<GroupedRows>>(weight).at(0).columns;
}

Tensor LinearWeight::matrix(Runtime& runtime) const {
  if (const auto* floats = std::get_if<Tensor>(&weight)) return *floats;
  if (const auto* bytes = std::get_if<std::vector<ByteRows>>(&weight)) return dequantise(runtime, *bytes);
  return dequantise(runtime, std::get<std::vector<GroupedRows>>(weight));
}

// Whether a product of floats is a skinny one.
static bool is_skinny(const Runtime& runtime, const Product& product) {
  return product.dtype != DType::float32 && !runtime.batch_invariant() && takes_skinny_product(runtime, product);
}

bool multiplies_skinny(const Runtime& runtime, const Tensor& x, const LinearWeight& weight) {
  const auto* floats = std::get_if<Tensor>(&weight.weight);
  return floats != nullptr && x.bytes() != 0 &&
         is_skinny(runtime, {x.data, floats->data, nullptr, nullptr, static_cast<int>(x.shape[0]),
                             static_cast<int>(weight.out()), static_cast<int>(weight.in()), x.dtype, x.dtype});
}

static void multiply_floats(Runtime& runtime, const Product& product) {
  if (product.dtype == DType::float32)
    multiply_by_dot_products(runtime, product);
  else if (runtime.batch_invariant())
    multiply_batch_invariant(runtime, product);
  else if (is_skinny(runtime, product))
    multiply_skinny(runtime, product);
  else if (!multiply_by_library(runtime, product))
    multiply_by_dot_products(runtime, product);
}

static Tensor multiply_quantised(Runtime& runtime, const ByteActivations& x, const LinearWeight& weight, DType dtype) {
  const auto* parts = std::get_if<std::vector<ByteRows>>(&weight.weight);
  if (parts == nullptr || x.values.shape[1] != parts->at(0).weight.shape[1])
    throw std::invalid_argument("linear: x is quantised for another weight");
  Tensor y = runtime.make({x.values.shape[0], weight.out()}, dtype);
  if (y.bytes() != 0) multiply_bytes(runtime, x, *parts, weight.bias ? &*weight.bias : nullptr, y);
  return y;
}

Tensor linear(Runtime& runtime, const Activations& activations, const LinearWeight& weight, DType dtype) {
  const DeviceGuard guard(runtime.device());
  if (const auto* quantised = std::get_if<ByteActivations>(&activations))
    return multiply_quantised(runtime, *quantised, weight, dtype);
  const Tensor& x = std::get<Tensor>(activations);
  check_rank(x, 2, "x of linear");
  const std::int64_t in = weight.in(), out = weight.out();
  if (x.shape[1] != in)
    throw std::invalid_argument("linear: x must be [rows, " + std::to_string(in) + "], not " + describe(x));
  check_dtype(x, runtime.dtype(), "x of linear");
  Tensor y = runtime.make({x.shape[0], out}, dtype);
  if (y.bytes() == 0) return y;
  const int rows = static_cast<int>(x.shape[0]);
  const Tensor* bias = weight.bias ? &*weight.bias : nullptr;
  const auto* grouped = std::get_if<std::vector<GroupedRows>>(&weight.weight);
  if (grouped != nullptr && dtype == x.dtype && takes_grouped_product(runtime, rows)) {
    multiply_grouped(runtime, x, *grouped, bias, y);
    return y;
  }
  if (const auto* bytes = std::get_if<std::vector<ByteRows>>(&weight.weight)) {
    multiply_bytes(runtime, x, *bytes, bias, y);
    return y;
  }
  const Tensor floats = weight.matrix(runtime);
  multiply_floats(runtime, {x.data, floats.data, bias == nullptr ? nullptr : bias->data, y.data, rows,
                            static_cast<int>(out), static_cast<int>(in), x.dtype, dtype});
  return y;
}

}  // namespace vllmlite::cuda

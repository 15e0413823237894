// One vector type for every instruction set, by the compiler's vector extensions. L lanes of `real` fill one register:
// wider vectors are split badly by compilers. A comparison gives a vector of integers, 0 or -1 per lane.

#if defined(__AVX512F__) && !defined(HALF_REGISTERS)
constexpr int REGISTER = 64, ROWS = 6, COLUMNS = 4;   // register block of a product: ROWS x COLUMNS vectors
#elif defined(__AVX512VL__)
constexpr int REGISTER = 32, ROWS = 6, COLUMNS = 4;
#elif defined(__AVX__)
constexpr int REGISTER = 32, ROWS = 6, COLUMNS = 2;
#elif defined(__aarch64__)
constexpr int REGISTER = 16, ROWS = 6, COLUMNS = 4;
#else
constexpr int REGISTER = 16, ROWS = 6, COLUMNS = 2;
#endif
constexpr int L = REGISTER / sizeof(real);
constexpr int BATCH = (2 * ROWS + L - 1) / L * L;     // rows whose lanes are folded together

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")
typedef real V __attribute__((vector_size(REGISTER)));
typedef integer I __attribute__((vector_size(REGISTER)));
typedef real V_memory __attribute__((vector_size(REGISTER), aligned(sizeof(real)), may_alias));
typedef integer I_memory __attribute__((vector_size(REGISTER), aligned(sizeof(real)), may_alias));
template <int N> struct LanesOf {        // shorter vectors
    typedef real type __attribute__((vector_size(N * sizeof(real))));
    typedef real memory __attribute__((vector_size(N * sizeof(real)), aligned(sizeof(real)), may_alias));
};
template <int N> using Lanes = typename LanesOf<N>::type;
template <int N> using Lanes_memory = typename LanesOf<N>::memory;

INLINE V load(const real* p) { return *(const V_memory*)p; }
INLINE I load(const integer* p) { return *(const I_memory*)p; }
INLINE void store(real* p, V v) { *(V_memory*)p = v; }
template <int W> INLINE Lanes<W> joined(Lanes<W / 2> low, Lanes<W / 2> high) {
    return [&]<int... l>(std::integer_sequence<int, l...>) __attribute__((always_inline)) {
        return __builtin_shufflevector(low, high, l...);
    }(std::make_integer_sequence<int, W>());
}
// The first N lanes of W, the others 0, and back: nothing beyond them is touched. They move in parts whose lengths are powers of two.
template <int N, int W = L> INLINE Lanes<W> load_first(const real* p) {
    if constexpr (N == W) return *(const Lanes_memory<W>*)p;
    else {
        Lanes<W / 2> low, high{};
        if constexpr (N <= W / 2) low = load_first<N, W / 2>(p);
        else { low = *(const Lanes_memory<W / 2>*)p; high = load_first<N - W / 2, W / 2>(p + W / 2); }
        return joined<W>(low, high);
    }
}
template <int N, int W = L> INLINE void store_first(real* p, Lanes<W> v) {
    if constexpr (N == W) *(Lanes_memory<W>*)p = v;
    else {
        const auto half = [&]<int from, int... l>(std::integer_sequence<int, from>, std::integer_sequence<int, l...>) __attribute__((always_inline)) {
            return __builtin_shufflevector(v, v, from + l...);
        };
        const Lanes<W / 2> low = half(std::integer_sequence<int, 0>(), std::make_integer_sequence<int, W / 2>());
        if constexpr (N <= W / 2) store_first<N, W / 2>(p, low);
        else {
            *(Lanes_memory<W / 2>*)p = low;
            store_first<N - W / 2, W / 2>(p + W / 2, half(std::integer_sequence<int, W / 2>(), std::make_integer_sequence<int, W / 2>()));
        }
    }
}
INLINE V splat(real x) { return x - V{}; }
INLINE I splat_integer(integer x) { return x - I{}; }
INLINE I mask_of(bool b) { return splat_integer(-integer(b)); }
INLINE V to_real(I x) { return __builtin_convertvector(x, V); }
INLINE real to_real(integer x) { return real(x); }
INLINE V select(I test, V yes, V no) { return test ? yes : no; }
INLINE I select(I test, I yes, I no) { return test ? yes : no; }
INLINE V larger(V a, V b) { return a > b ? a : b; }
// Holds a value in a register where the compiler would rather read it from memory again for each of its uses.
template <class T> INLINE void keep(T& x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
}
INLINE I lanes() { I x; UNROLL for (int i = 0; i < L; i++) x[i] = i; return x; }

constexpr int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
constexpr real INF = __builtin_inf(), LOWEST = -1e30, EPSILON = REAL_BITS == 32 ? 0x1p-23 : 0x1p-52, LOG2E = 1.44269504088896340736, LN2 = 0.69314718055994530942;

// Lane i of the result is lane from(i) of a, or from(i) - L of b. `from` is known when this is compiled.
template <class From> INLINE V arrange(V a, V b, From) {
    return [&]<int... N>(std::integer_sequence<int, N...>) __attribute__((always_inline)) {
        return __builtin_shufflevector(a, b, From{}(N)...);
    }(std::make_integer_sequence<int, L>());
}
// The same for lanes that are known at run time only. (clang has no such shuffle, but knows one when it sees these loops.)
INLINE V permute(V a, I from) {
#ifdef __clang__
    V y;
    UNROLL for (int i = 0; i < L; i++) y[i] = a[from[i] & (L - 1)];
    return y;
#else
    return __builtin_shuffle(a, from);
#endif
}
INLINE V permute(V a, V b, I from) {
#ifdef __clang__
    return select(from < splat_integer(L), permute(a, from), permute(b, from));
#else
    return __builtin_shuffle(a, b, from);
#endif
}
// Lane i of the result is lane from[i] of a, or 0 where from[i] is L.
INLINE V permute_or_zero(V a, I from) {
#if defined(__AVX512F__) && !defined(__clang__)
    return __builtin_shuffle(a, V{}, from);
#else
    return select(from < splat_integer(L), permute(a, from), V{});
#endif
}
template <int H, class Op> INLINE V fold(V v, Op op) {      // combines lanes that are H apart, then H / 2, ...
    v = op(v, arrange(v, v, [](int i) { return i ^ H; }));
    if constexpr (H > 1) return fold<H / 2>(v, op); else return v;
}
INLINE real sum(V v) { return fold<L / 2>(v, [](V a, V b) { return a + b; })[0]; }
INLINE real largest(V v) { return fold<L / 2>(v, [](V a, V b) { return larger(a, b); })[0]; }
// Lane r of the result: op over the lanes of x[r], r < M <= L. While several rows are left, two are folded into one vector at a time.
template <int M, int H, class Op> INLINE V fold_pairs(const V (&x)[M], Op op) {
    if constexpr (M == 1) {
        if constexpr (H == 0) return x[0]; else return fold<max(H, 1)>(x[0], op);
    } else {
        constexpr int pairs = (M + 1) / 2;
        V y[pairs];
        UNROLL for (int r = 0; r < pairs; r++) {
            const V a = x[2 * r], b = x[min(2 * r + 1, M - 1)];
            y[r] = op(arrange(a, b, [](int l) { return l & H ? L + (l ^ H) : l; }), arrange(a, b, [](int l) { return l & H ? L + l : l | H; }));
        }
        return fold_pairs<pairs, H / 2>(y, op);
    }
}
template <int M, class Op> INLINE V fold_rows(const V (&x)[M], Op op) {
    const V y = fold_pairs<M, L / 2>(x, op);
    return arrange(y, y, [](int r) { int lane = 0; for (int h = L / 2; h && r; h /= 2, r /= 2) lane += r % 2 * h; return lane; });
}
INLINE V lane(V x, int i) { return permute(x, splat_integer(i)); }      // one lane in all

// ---- functions ---------------------------------------------------------------------------------------------------------------
// 2^x = 2^n * 2^r with |r| <= 1/2: adding `round_to_integer` rounds x to n, whose bits then are the low bits of the sum.
#if REAL_BITS == 32
constexpr real round_to_integer = 12582912.f, smallest_exponent = -126.f, largest_exponent = 128.f;
constexpr int mantissa = 23;
// (2^r - 1) / r, relative error 6e-9 before rounding
constexpr real EXP2[] = {0.000154614475f, 0.00133908674f, 0.00961805667f, 0.055503571f, 0.240226509f, 0.693147188f};
INLINE V exp2_minus_one_over(V r) {
    V p = splat(EXP2[0]);
    UNROLL for (int k = 1; k < 6; k++) p = p * r + splat(EXP2[k]);
    return p;
}
#else
constexpr real round_to_integer = 6755399441055744., smallest_exponent = -1022., largest_exponent = 1024.;
constexpr int mantissa = 52;
INLINE V exp2_minus_one_over(V r) {     // the Taylor series: ln(2)^k / k!
    V p = splat(1.3691488853904129e-12);
    p = p * r + splat(2.5678435993488205e-11);
    p = p * r + splat(4.4455382718708116e-10);
    p = p * r + splat(7.0549116208011234e-9);
    p = p * r + splat(1.0178086009239700e-7);
    p = p * r + splat(1.3215486790144309e-6);
    p = p * r + splat(1.5252733804059841e-5);
    p = p * r + splat(1.5403530393381610e-4);
    p = p * r + splat(1.3333558146428443e-3);
    p = p * r + splat(9.6181291076284772e-3);
    p = p * r + splat(5.5504108664821580e-2);
    p = p * r + splat(2.4022650695910072e-1);
    return p * r + splat(6.9314718055994531e-1);
}
#endif
// 2^x, exactly 0 below the smallest exponent; for x < largest_exponent. NaN stays NaN.
INLINE V exp2_vector(V x) {
    V n = x + splat(round_to_integer), r = x - (n - splat(round_to_integer));
    V p = exp2_minus_one_over(r) * r + splat(1);
    V y = (V)((I)p + ((I)n << mantissa));
    return select(x < splat(smallest_exponent), V{}, y);
}
INLINE V exp(V x) {     // x - n ln(2) in two parts, so that a large x keeps its digits
    constexpr real ln2_high = REAL_BITS == 32 ? 0x1.62e4p-1 : 0x1.62e42fefap-1, ln2_low = 0.693147180559945309417L - (long double)ln2_high;
    V t = x * splat(LOG2E) + splat(round_to_integer), n = t - splat(round_to_integer);
    V r = ((x - n * splat(ln2_high)) - n * splat(ln2_low)) * splat(LOG2E);
    V y = (V)((I)(exp2_minus_one_over(r) * r + splat(1)) + ((I)t << mantissa));
    y = select(n < splat(smallest_exponent), V{}, y);
    return select(n >= splat(largest_exponent), splat(INF), y);
}
// e^x - 1 for x <= 0, without cancellation near 0
INLINE V expm1_negative(V x) {
    V t = x * splat(LOG2E), n = t + splat(round_to_integer), whole = n - splat(round_to_integer), r = t - whole;
    V power = (V)((I)splat(1) + ((I)n << mantissa));
    V y = power * (exp2_minus_one_over(r) * r) + (power - splat(1));
    return select(t < splat(smallest_exponent), splat(-1), y);
}
INLINE V magnitude(V x) { return x < V{} ? -x : x; }
INLINE I magnitude(I x) { return x < I{} ? -x : x; }
INLINE V tanh(V x) {
    V e = expm1_negative(splat(-2) * magnitude(x)), y = -e / (e + splat(2));
    return x < V{} ? -y : y;
}
INLINE V sigmoid(V x) { V e = exp(-magnitude(x)), y = splat(1) / (splat(1) + e); return x < V{} ? splat(1) - y : y; }
INLINE V sqrt(V x) { V y; UNROLL for (int i = 0; i < L; i++) y[i] = __builtin_sqrt(x[i]); return y; }
// For positive normal x; NaN and infinity stay. x = 2^e m with m around 1, log2(m) by the series of atanh((m - 1) / (m + 1)).
INLINE V log2(V x) {
#if REAL_BITS == 32
    constexpr integer half = 0x3f3504f3;      // the bits of sqrt(1/2)
    const I e = ((I)x - splat_integer(half)) >> mantissa;
    const V m = (V)((I)x - (e << mantissa)), s = (m - splat(1)) / (m + splat(1)), z = s * s;
    V p = splat(0.320598898f);                // 2 / ln(2) / 9, / 7, ...
    p = p * z + splat(0.412198583f);
    p = p * z + splat(0.577078016f);
    p = p * z + splat(0.961796694f);
    p = p * z + splat(2.88539008f);
    return select(x < splat(INF), p * s + to_real(e), x);
#else
    V y;
    for (int i = 0; i < L; i++) y[i] = __builtin_log2(x[i]);
    return y;
#endif
}
inline V log(V x) { V y; for (int i = 0; i < L; i++) y[i] = __builtin_log(x[i]); return y; }
inline real exp(real x) { return __builtin_exp(x); }
inline real log(real x) { return __builtin_log(x); }
inline real tanh(real x) { return __builtin_tanh(x); }
inline real sqrt(real x) { return __builtin_sqrt(x); }
inline real sigmoid(real x) { return 1 / (1 + __builtin_exp(-x)); }

// Floor division and its remainder, whatever the signs; of integers alone.
INLINE integer floor_div(integer a, integer b) { integer d = a / b; return d - (a % b != 0 && (a < 0) != (b < 0)); }
INLINE integer floor_mod(integer a, integer b) { integer m = a % b; return m != 0 && (m < 0) != (b < 0) ? m + b : m; }
inline I floor_div(I a, I b) { I y; for (int i = 0; i < L; i++) y[i] = floor_div(a[i], b[i]); return y; }
inline I floor_mod(I a, I b) { I y; for (int i = 0; i < L; i++) y[i] = floor_mod(a[i], b[i]); return y; }
// The integer at or below x, which stops at 2^30 on either side; the lowest for NaN.
INLINE integer floor_integer(real x) {
    constexpr integer most = 1 << 30;
    return !(x >= -most) ? -most : x >= most ? most : integer(__builtin_floor(x));
}
inline I floor_integer(V x) { I y; for (int i = 0; i < L; i++) y[i] = floor_integer(x[i]); return y; }

// ---- elements of tensors <-> real -----------------------------------------------------------------------------------------------
#if ELEMENT == FLOAT || ELEMENT == DOUBLE
typedef real element;
INLINE V load_elements(const element* p) { return load(p); }
INLINE void store_elements(element* p, V v) { store(p, v); }
INLINE real get(element x) { return x; }
INLINE element put(real x) { return x; }
#elif ELEMENT == BFLOAT16
typedef uint16_t element;
typedef uint16_t E_memory __attribute__((vector_size(2 * L), aligned(2), may_alias));
typedef uint32_t U __attribute__((vector_size(REGISTER)));
INLINE V load_elements(const element* p) { return (V)(__builtin_convertvector(*(const E_memory*)p, U) << 16); }
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
INLINE void store_elements(element* p, V v) {
#ifdef HALF_REGISTERS
    *(E_memory*)p = (E_memory)_mm256_cvtneps_pbh((__m256)v);
#else
    *(E_memory*)p = (E_memory)_mm512_cvtneps_pbh((__m512)v);
#endif
}
#else
INLINE void store_elements(element* p, V v) {      // to nearest, ties to even
    U u = (U)v, y = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    *(E_memory*)p = __builtin_convertvector(v == v ? y : (U{} + 0x7fc0), E_memory);
}
#endif
INLINE real get(element x) { uint32_t u = uint32_t(x) << 16; real y; memcpy(&y, &u, 4); return y; }
INLINE element put(real x) { uint32_t u; memcpy(&u, &x, 4); return x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : 0x7fc0; }
#else
typedef _Float16 element;
typedef _Float16 E_memory __attribute__((vector_size(2 * L), aligned(2), may_alias));
#if defined(__AVX512F__) && defined(__F16C__) && !defined(HALF_REGISTERS)
#include <immintrin.h>
INLINE V load_elements(const element* p) { return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_elements(element* p, V v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(__F16C__)
#include <immintrin.h>
INLINE V load_elements(const element* p) { return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_elements(element* p, V v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
INLINE V load_elements(const element* p) { return __builtin_convertvector(*(const E_memory*)p, V); }
INLINE void store_elements(element* p, V v) { *(E_memory*)p = __builtin_convertvector(v, E_memory); }
#endif
INLINE real get(element x) { return real(x); }
INLINE element put(real x) { return element(x); }
#endif

// Does a row of W channels end within the first half of its last vector? Products may leave out the other half.
template <int W> constexpr bool half_of_last = L > 2 && up(W, L) - W >= L / 2;
// The vector of a row of W channels that begins at channel d, a multiple of L; the row may end within it.
template <int W> INLINE V load_part(const element* row, int d) {
    constexpr int last = W - (W - 1) / L * L;
    if (W % L == 0 || d + L <= W) return load_elements(row + d);
    if constexpr (sizeof(element) == sizeof(real)) return load_first<last>((const real*)(row + d));
    else {
        element x[L] = {};
        memcpy(x, row + d, last * sizeof(element));
        return load_elements(x);
    }
}
template <int W> INLINE void store_part(element* row, int d, V v) {
    constexpr int last = W - (W - 1) / L * L;
    if (W % L == 0 || d + L <= W) return store_elements(row + d, v);
    if constexpr (sizeof(element) == sizeof(real)) store_first<last>((real*)(row + d), v);
    else {
        element x[L];
        store_elements(x, v);
        memcpy(row + d, x, last * sizeof(element));
    }
}
// A row of W channels, `step` elements apart, to a row padded with zeros to whole vectors, and back times `factor`.
template <int W> INLINE void load_row(const element* src, int64_t step, real* dst) {
    if (step == 1) {
        UNROLL for (int d = 0; d < W; d += L) store(dst + d, load_part<W>(src, d));
    } else {
        for (int d = 0; d < W; d++) dst[d] = get(src[d * step]);
        for (int d = W; d < up(W, L); d++) dst[d] = 0;
    }
}
template <int W> INLINE void store_row(element* dst, int64_t step, const real* src, real factor) {
    if (step == 1) {
        UNROLL for (int d = 0; d < W; d += L) store_part<W>(dst, d, load(src + d) * splat(factor));
    } else for (int d = 0; d < W; d++) dst[d * step] = put(src[d] * factor);
}
template <int W> inline void add_row(element* dst, int64_t step, const real* src, real factor) {
    alignas(REGISTER) real sum[up(W, L)];
    load_row<W>(dst, step, sum);
    for (int d = 0; d < up(W, L); d += L) store(sum + d, load(sum + d) + load(src + d) * splat(factor));
    store_row<W>(dst, step, sum, 1);
}

// ---- words -----------------------------------------------------------------------------------------------------------------------
// What a lane of a product holds: a real, or, where the CPU sums the products of two bfloat16 at once, two neighbours in the
// contracted index. Rows of words are stored as rows of reals.
#if ELEMENT == BFLOAT16 && defined(__AVX512BF16__) && !defined(HALF_REGISTERS)
constexpr int WORD = 2;
INLINE V multiply_add(V a, V b, V sum) { return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
INLINE V splat_word(const real* p) { integer x; memcpy(&x, p, sizeof x); return (V)splat_integer(x); }
// lane by lane a word of one element of `a` and one of `b`
INLINE V pair(const element* a, const element* b) {
    return (V)(__builtin_convertvector(*(const E_memory*)a, U) | __builtin_convertvector(*(const E_memory*)b, U) << 16);
}
#else
constexpr int WORD = 1;
INLINE V multiply_add(V a, V b, V sum) { return sum + a * b; }
INLINE V splat_word(const real* p) { return splat(*p); }
INLINE V pair(const element*, const element*) { return V{}; }
#endif
constexpr int words(int n) { return (n + WORD - 1) / WORD; }
// A row of W channels as words, padded with zeros to whole vectors.
template <int W> INLINE void load_words(const element* src, int64_t step, real* dst) {
    if constexpr (WORD == 1) return load_row<W>(src, step, dst);
    element* to = (element*)dst;
    if (step == 1) memcpy(to, src, W * sizeof(element));
    else for (int d = 0; d < W; d++) to[d] = src[d * step];
    memset(to + W, 0, (up(words(W), L) * WORD - W) * sizeof(element));
}
// The same from reals.
template <int W> INLINE void narrow_row(const real* src, real* dst) {
    element row[W];
    for (int d = 0; d < W; d++) row[d] = put(src[d]);
    load_words<W>(row, 1, dst);
}
// Weights as words: those of the keys from j on in a row, in place of the scores there or of earlier ones.
INLINE void store_weights(real* row, int j, V v) {
    if constexpr (WORD == 1) store(row + j, v);
    else store_elements((element*)row + j, v);
}

// ---- the product: C[rows][vectors] (+)= A B, A's scalars broadcast ------------------------------------------------------------
// Long sums are cut, so that their error does not grow with their length.
constexpr int LONGEST_SUM = 128;
// A[i][t] lies at a + i * row + t * column (so A may be a transpose), B's vectors at b + t * b_row, C's rows c_row apart.
struct Scalars { const real* a; int64_t row, column; };
template <int M, int N>
__attribute__((noinline)) void block(Scalars A, int64_t terms, const real* b, int64_t b_row, real* c, int64_t c_row, bool add) {
    V s[M][N];
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < N; j++) s[i][j] = V{};
    const real* a = A.a;
    for (int64_t t = 0; t < terms; t++, a += A.column, b += b_row) {
        V x[N];
        UNROLL for (int j = 0; j < N; j++) x[j] = load(b + j * L);
        UNROLL for (int i = 0; i < M; i++) {
            V y = splat(a[i * A.row]);
            UNROLL for (int j = 0; j < N; j++) s[i][j] += y * x[j];
        }
    }
    if (add) { UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < N; j++) s[i][j] += load(c + i * c_row + j * L); }
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < N; j++) store(c + i * c_row + j * L, s[i][j]);
}
template <int M> INLINE void block_row(int n, Scalars A, int64_t terms, const real* b, int64_t b_row, real* c, int64_t c_row, bool add) {
    switch (n) {
        case 1: return block<M, 1>(A, terms, b, b_row, c, c_row, add);
        case 2: return block<M, 2>(A, terms, b, b_row, c, c_row, add);
        case 3: if constexpr (COLUMNS > 2) return block<M, 3>(A, terms, b, b_row, c, c_row, add); break;
        default: if constexpr (COLUMNS > 3) return block<M, 4>(A, terms, b, b_row, c, c_row, add);
    }
}
// at most ROWS rows, at most COLUMNS vectors
INLINE void block_of(int m, int n, Scalars A, int64_t terms, const real* b, int64_t b_row, real* c, int64_t c_row, bool add) {
    switch (m) {
        case 1: return block_row<1>(n, A, terms, b, b_row, c, c_row, add);
        case 2: return block_row<2>(n, A, terms, b, b_row, c, c_row, add);
        case 3: return block_row<3>(n, A, terms, b, b_row, c, c_row, add);
        case 4: return block_row<4>(n, A, terms, b, b_row, c, c_row, add);
        case 5: if constexpr (ROWS > 4) return block_row<5>(n, A, terms, b, b_row, c, c_row, add); break;
        default: if constexpr (ROWS > 5) return block_row<6>(n, A, terms, b, b_row, c, c_row, add);
    }
}
// The next part of `left` things taken at most `most` at a time, in parts that differ by one at most.
constexpr INLINE int share(int left, int most) { const int parts = (left + most - 1) / most; return (left + parts - 1) / parts; }

// C[rows][W channels] (+)= A B, B and C row by row
template <int W> INLINE void multiply(int rows, Scalars A, int64_t terms, const real* b, int64_t b_row, real* c, int64_t c_row, bool add) {
    constexpr int vectors = up(W, L) / L;
    for (int i = 0, m; i < rows; i += m) {
        m = share(rows - i, ROWS);
        for (int j = 0, n; j < vectors; j += n) {
            n = share(vectors - j, COLUMNS);
            for (int64_t t = 0, some; t < terms; t += some) {
                some = share(terms - t, LONGEST_SUM);
                block_of(m, n, {A.a + i * A.row + t * A.column, A.row, A.column}, some, b + t * b_row + j * L, b_row, c + i * c_row + j * L, c_row, add || t);
            }
        }
    }
}
template <int W> INLINE void multiply(int rows, Scalars A, int64_t terms, const real* b, real* c, bool add) {
    multiply<W>(rows, A, terms, b, up(W, L), c, up(W, L), add);
}

// The same, written as elements: row i of the product, times `factor`, goes to `to` + offset[i], where channels are adjacent; at most
// LONGEST_SUM terms. These are N vectors from vector `at` on, of which the last is half as long where SHORT.
template <int W, int M, int N, bool SHORT>
__attribute__((noinline)) void block_out(int at, Scalars A, int64_t terms, const real* b, element* to, const int64_t* offset, real factor) {
    constexpr int whole = N - SHORT, T = SHORT ? L / 2 : 1;
    V s[M][N];
    Lanes<T> tail[M];
    UNROLL for (int i = 0; i < M; i++) { UNROLL for (int j = 0; j < whole; j++) s[i][j] = V{}; tail[i] = Lanes<T>{}; }
    const real* a = A.a;
    b += at * L;
    for (int64_t t = 0; t < terms; t++, a += A.column, b += up(W, L)) {
        V x[N];
        Lanes<T> x_tail;
        UNROLL for (int j = 0; j < whole; j++) x[j] = load(b + j * L);
        if constexpr (SHORT) x_tail = load_first<T, T>(b + whole * L);
        UNROLL for (int i = 0; i < M; i++) {
            const V y = splat(a[i * A.row]);
            UNROLL for (int j = 0; j < whole; j++) s[i][j] += y * x[j];
            if constexpr (SHORT) tail[i] += (a[i * A.row] - Lanes<T>{}) * x_tail;
        }
    }
    if constexpr (SHORT) UNROLL for (int i = 0; i < M; i++) s[i][whole] = joined<L>(tail[i], Lanes<L / 2>{});
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < N; j++) store_part<W>(to + offset[i], (at + j) * L, s[i][j] * splat(factor));
}
template <int W, int AT = 0> INLINE void multiply_out(int m, Scalars A, int64_t terms, const real* b, element* to, const int64_t* offset, real factor) {
    constexpr int vectors = up(W, L) / L, N = share(vectors - AT, COLUMNS);
    constexpr bool ends = AT + N == vectors, SHORT = ends && half_of_last<W>;
    switch (m) {
        case 1: block_out<W, 1, N, SHORT>(AT, A, terms, b, to, offset, factor); break;
        case 2: block_out<W, 2, N, SHORT>(AT, A, terms, b, to, offset, factor); break;
        case 3: block_out<W, 3, N, SHORT>(AT, A, terms, b, to, offset, factor); break;
        case 4: block_out<W, 4, N, SHORT>(AT, A, terms, b, to, offset, factor); break;
        case 5: if constexpr (ROWS > 4) block_out<W, 5, N, SHORT>(AT, A, terms, b, to, offset, factor); break;
        default: if constexpr (ROWS > 5) block_out<W, 6, N, SHORT>(AT, A, terms, b, to, offset, factor);
    }
    if constexpr (!ends) multiply_out<W, AT + N>(m, A, terms, b, to, offset, factor);
}

// ---- transposed panels -----------------------------------------------------------------------------------------------------------
// Rows of W channels become panels of up to COLUMNS vectors of rows: panel p holds rows first(p) * L .., channel by channel.
struct Panels {
    real* data;
    int vectors = 0, count = 1;
    INLINE void resize(int rows) { vectors = (rows + L - 1) / L; count = (vectors + COLUMNS - 1) / COLUMNS; }
    INLINE int first(int p) const { const int even = vectors / count, more = vectors % count; return p * even + (p < more ? p : more); }
};
template <int H> INLINE void exchange(V (&x)[L]) {      // swaps the off-diagonal H x H blocks of each 2H x 2H block
    UNROLL for (int i = 0; i < L; i++) if (!(i & H)) {
        V a = x[i], b = x[i + H];
        x[i] = arrange(a, b, [](int l) { return l & H ? L + l - H : l; });
        x[i + H] = arrange(a, b, [](int l) { return l & H ? L + l : l + H; });
    }
}
INLINE void transpose(V (&x)[L]) {
    if constexpr (L > 8) exchange<8>(x);
    if constexpr (L > 4) exchange<4>(x);
    if constexpr (L > 2) exchange<2>(x);
    exchange<1>(x);
}
// load(i, d): L channels of row i from channel d on, padded with zeros
template <int W, class Load> INLINE void pack_rows(Panels& panels, int rows, Load load_part) {
    panels.resize(rows);
    for (int p = 0; p < panels.count; p++) {
        const int begin = panels.first(p), width = (panels.first(p + 1) - begin) * L;
        for (int v = 0; v * L < width; v++) {
            const int first = (begin + v) * L, there = min(rows - first, L);
            real* dst = panels.data + (int64_t)begin * L * W + v * L;
#pragma GCC unroll 1    // a transpose is long, and its source takes longer to build the more often it occurs
            for (int d = 0; d < W; d += L) {
                V x[L], few[L];
                if (there == L) { UNROLL for (int i = 0; i < L; i++) x[i] = load_part(first + i, d); }
                else {
#pragma GCC unroll 1
                    for (int i = 0; i < L; i++) few[i] = i < there ? load_part(first + i, d) : V{};
                    UNROLL for (int i = 0; i < L; i++) x[i] = few[i];
                }
                transpose(x);
                if (d + L <= W) { UNROLL for (int i = 0; i < L; i++) store(dst + (int64_t)(d + i) * width, x[i]); }
                else for (int i = 0; i < W - d; i++) store(dst + (int64_t)(d + i) * width, x[i]);
            }
        }
    }
}
// rows of `src`, up(W, L) apart
template <int W> void pack_panels(Panels& panels, const real* src, int rows) {
    pack_rows<W>(panels, rows, [&](int i, int d) __attribute__((always_inline)) { return load(src + (int64_t)i * up(W, L) + d); });
}
// C[m rows][vectors from .. to of the panels' rows] = A[m][W] times the panels; A's rows are up(W, L) apart
template <int W> INLINE void multiply_panels(int m, const real* a, const Panels& panels, int from, int to, real* c, int64_t c_row) {
    for (int p = 0; p < panels.count; p++) {
        const int begin = panels.first(p), end = panels.first(p + 1), x = max(begin, from), y = min(end, to);
        if (x >= y) continue;
        constexpr int some = (W + (W + 63) / 64 - 1) / ((W + 63) / 64);
        const int64_t width = (end - begin) * L;
        const real* b = panels.data + begin * L * W + (x - begin) * L;
        for (int d = 0; d < W; d += some) block_of(m, y - x, {a + d, up(W, L), 1}, min(some, W - d), b + d * width, width, c + x * L, c_row, d);
    }
}

// Memory of one thread, kept between calls and grown when a call needs more.
struct Arena {
    char* base = nullptr;
    size_t size = 0, used = 0;
    void reserve(size_t bytes) {
        used = 0;
        if (bytes <= size) return;
        free(base);
        size = up(bytes, 4096);
        base = (char*)aligned_alloc(4096, size);
    }
    template <class T> T* take(size_t n) { T* p = (T*)(base + used); used += up(n * sizeof(T), 64); return p; }
};

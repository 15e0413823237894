// Tokens are cut into parts, and parts into blocks: sums stay short, every thread has work, and the order never depends on threads.
constexpr int64_t DP = up(D, L), KP = up(K, L), PART = 1024, BLOCK = 64;
struct Layout { int64_t batch, head, token, channel; };
struct Problem {
    int64_t batch, heads, tokens, threads;
    double scale;
    const element *q, *k, *v;
    element* out;
    const element* grad_out;
    element *dq, *dk, *dv;
    Layout q_layout, k_layout, v_layout, out_layout, grad_out_layout, dq_layout, dk_layout, dv_layout;
};
struct Rows { const real* data; int64_t step; };

// Some tokens of a tensor as rows of reals: where they lie if a product can take them from there, else copied to `buffer`.
template <int W> INLINE Rows rows_of(const element* src, const Layout& t, int64_t tokens, real* buffer) {
    if constexpr (sizeof(element) == sizeof(real) && W % L == 0) if (t.channel == 1) return {(const real*)src, t.token};
    for (int64_t n = 0; n < tokens; n++) load_row<W>(src + n * t.token, t.channel, buffer + n * up(W, L));
    return {buffer, up(W, L)};
}
INLINE int64_t base(const Layout& t, int64_t b, int64_t h, int64_t token) { return b * t.batch + h * t.head + token * t.token; }
// the lines of the next block's rows, a block ahead of their use
template <int W> INLINE void prefetch_rows(const element* src, const Layout& t, int64_t tokens) {
    if (t.channel == 1) for (int64_t n = 0; n < tokens; n++) for (int d = 0; d < W; d += 64 / (int)sizeof(element)) __builtin_prefetch(src + n * t.token + d, 0, 2);
}

struct Channel {
    const Problem& P;
    real *x, *y, *z;    // rows of a block
    real* sum;
    Channel(const Problem& P, Arena& arena) : P(P) {
        constexpr int64_t W = max(DP, KP);
        arena.reserve(sizeof(real) * (3 * BLOCK * W + DP * KP) + 256);
        for (real** p : {&x, &y, &z}) *p = arena.take<real>(BLOCK * W);
        sum = arena.take<real>(DP * KP);
    }
    // to[i][j] = sum over the tokens [from, to) of a[n][i] b[n][j]
    void contract(const element* a, const Layout& ta, const element* b, const Layout& tb, int64_t batch, int64_t head, int64_t from, int64_t to, real* out) {
        memset(out, 0, sizeof(real) * D * KP);
        for (int64_t group = from; group < to; group += 4 * BLOCK) {
            const int64_t stop = min(to, group + 4 * BLOCK);
            for (int64_t n = group; n < stop; n += BLOCK) {
                const int64_t count = min(BLOCK, stop - n), ahead = max<int64_t>(min(BLOCK, to - n - BLOCK), 0);
                const Rows left = rows_of<D>(a + base(ta, batch, head, n), ta, count, x), right = rows_of<K>(b + base(tb, batch, head, n), tb, count, y);
                prefetch_rows<D>(a + base(ta, batch, head, n + BLOCK), ta, ahead);
                prefetch_rows<K>(b + base(tb, batch, head, n + BLOCK), tb, ahead);
                multiply<K>(D, {left.data, 1, left.step}, count, right.data, right.step, sum, KP, n > group);
            }
            for (int64_t i = 0; i < D * KP; i += L) store(out + i, load(out + i) + load(sum + i));
        }
    }
    // rows [from, to) of out = rows of a times the matrix m, whose rows are up(W, L) apart
    template <int R, int W> void expand(const element* a, const Layout& ta, const real* m, element* out, const Layout& tout, int64_t batch, int64_t head, int64_t from, int64_t to) {
        for (int64_t n = from; n < to; n += BLOCK) {
            const int64_t count = min(BLOCK, to - n), ahead = max<int64_t>(min(BLOCK, to - n - BLOCK), 0);
            const Rows rows = rows_of<R>(a + base(ta, batch, head, n), ta, count, x);
            prefetch_rows<R>(a + base(ta, batch, head, n + BLOCK), ta, ahead);
            element* dst = out + base(tout, batch, head, n);
            if constexpr (sizeof(element) == sizeof(real) && W % L == 0) if (tout.channel == 1) {
                multiply<W>(count, {rows.data, rows.step, 1}, R, m, up(W, L), (real*)dst, tout.token, false);
                continue;
            }
            multiply<W>(count, {rows.data, rows.step, 1}, R, m, z, false);
            for (int64_t i = 0; i < count; i++) store_row<W>(dst + i * tout.token, tout.channel, z + i * up(W, L), 1);
        }
    }
    // rows of S to rows of A, in place
    void softmax(real* s) const {
        const V unit = splat(real(P.scale * 1.4426950408889634));
        for (int i = 0; i < D; i++) {
            real* row = s + i * KP;
            auto inside = [](int j, V x) { return select(lanes() + splat_integer(j) < splat_integer(K), x, splat(-INF)); };
            V best = splat(-INF), sums{};
            for (int j = 0; j < KP; j += L) best = larger(best, inside(j, load(row + j) * unit));
            const V shift = splat(largest(best));
            for (int j = 0; j < KP; j += L) { const V e = exp2_vector(inside(j, load(row + j) * unit - shift)); sums += e; store(row + j, e); }
            const V inverse = splat(1 / attnc::sum(sums));
            for (int j = 0; j < KP; j += L) store(row + j, load(row + j) * inverse);
        }
    }
};
INLINE void transpose_matrix(const real* from, real* to) { for (int i = 0; i < D; i++) for (int j = 0; j < K; j++) to[j * DP + i] = from[i * KP + j]; }
INLINE void add_parts(const real* parts, int64_t count, real* to) {
    memcpy(to, parts, sizeof(real) * D * KP);
    for (int64_t p = 1; p < count; p++) for (int64_t i = 0; i < D * KP; i += L) store(to + i, load(to + i) + load(parts + p * D * KP + i));
}

extern "C" void channel(const Problem* problem) {
    const Problem& P = *problem;
    constexpr int MATRICES = BACKWARD ? 2 : 1, RESULTS = BACKWARD ? 3 : 1;
    const int64_t parts = max<int64_t>((P.tokens + PART - 1) / PART, 1), groups = P.batch * P.heads, size = D * KP, result = max(D * KP, K * DP);
    // per (batch, head): the parts of S (and of dA), then what phase three multiplies by
    real* sums = (real*)aligned_alloc(64, sizeof(real) * groups * parts * MATRICES * size);
    real* matrices = (real*)aligned_alloc(64, up(sizeof(real) * groups * RESULTS * result, 64));
#pragma omp parallel num_threads(P.threads)
    {
        static thread_local Arena arena;
        Channel work(P, arena);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < groups * parts; item++) {
            const int64_t g = item / parts, b = g / P.heads, h = g % P.heads, p = item % parts, from = P.tokens * p / parts, to = P.tokens * (p + 1) / parts;
            real* s = sums + g * parts * MATRICES * size + p * size;
            work.contract(P.q, P.q_layout, P.k, P.k_layout, b, h, from, to, s);
            if constexpr (BACKWARD) work.contract(P.grad_out, P.grad_out_layout, P.v, P.v_layout, b, h, from, to, s + parts * size);
        }
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; g++) {
            real *s = sums + g * parts * MATRICES * size, *m = matrices + g * RESULTS * result;
            memset(m, 0, sizeof(real) * RESULTS * result);
            if constexpr (BACKWARD) {       // m: A, dS transposed, dS (both times the scale)
                real *a = m, *slope_t = m + result, *slope = m + 2 * result;
                add_parts(s, parts, a);
                work.softmax(a);
                add_parts(s + parts * size, parts, slope);
                for (int i = 0; i < D; i++) {
                    V dot{};
                    for (int j = 0; j < KP; j += L) dot += load(a + i * KP + j) * load(slope + i * KP + j);
                    const V mean = splat(sum(dot)), scale = splat(real(P.scale));
                    for (int j = 0; j < KP; j += L) store(slope + i * KP + j, load(a + i * KP + j) * (load(slope + i * KP + j) - mean) * scale);
                }
                transpose_matrix(slope, slope_t);
            } else {                        // m: A transposed
                add_parts(s, parts, s);
                work.softmax(s);
                transpose_matrix(s, m);
            }
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < groups * parts; item++) {
            const int64_t g = item / parts, b = g / P.heads, h = g % P.heads, p = item % parts, from = P.tokens * p / parts, to = P.tokens * (p + 1) / parts;
            const real* m = matrices + g * RESULTS * result;
            if constexpr (BACKWARD) {
                work.expand<D, K>(P.grad_out, P.grad_out_layout, m, P.dv, P.dv_layout, b, h, from, to);
                work.expand<K, D>(P.k, P.k_layout, m + result, P.dq, P.dq_layout, b, h, from, to);
                work.expand<D, K>(P.q, P.q_layout, m + 2 * result, P.dk, P.dk_layout, b, h, from, to);
            } else work.expand<K, D>(P.v, P.v_layout, m, P.out, P.out_layout, b, h, from, to);
        }
    }
    free(sums);
    free(matrices);
}

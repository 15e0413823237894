// Both products keep a block of their result in registers while rows stream past, and fetch the rows that come next a line or two
// at a time between multiplications: a burst of fetches would fill the line buffers and stall the loop.
constexpr int64_t DP = up(D, L), KP = up(K, L);
constexpr int REGISTERS = ROWS * COLUMNS;       // vectors of a result that fit
constexpr int BLOCK = max<int>(32, min<int>(64, 24576 / sizeof(real) / (DP + KP) / 16 * 16));   // tokens at a time
constexpr int64_t PART = 1024, MOST_PARTS = 16;
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

// Some tokens of one (batch, head) of a tensor.
struct Tokens {
    element* data;
    int64_t step, channel;
    INLINE Tokens from(int64_t n) const { return {data + n * step, step, channel}; }
};
// The same as rows of reals: where they lie if they can be read from there, else copied to `buffer`. WHOLE: read in whole vectors.
struct Rows { const real* data; int64_t step; };
template <int W, bool WHOLE> INLINE Rows rows_of(const Tokens& t, int64_t count, real* buffer) {
    constexpr int64_t P = up(W, L);
    if constexpr (sizeof(element) == sizeof(real) && (W % L == 0 || !WHOLE)) if (t.channel == 1) return {(const real*)t.data, t.step};
    int64_t n = 0;
    if (t.step == 1 && t.channel != 1) for (; n + L <= count; n += L) for (int d = 0; d < W; d += L) {      // channels first
        V tile[L];
        UNROLL for (int i = 0; i < L; i++) {
            const element* row = t.data + (d + i) * t.channel + n;
            tile[i] = d + i < W ? load_elements(row) : V{};
            if (d + i < W) __builtin_prefetch(row + BLOCK, 0, 2);
        }
        transpose(tile);
        UNROLL for (int i = 0; i < L; i++) store(buffer + (n + i) * P + d, tile[i]);
    }
    for (; n < count; n++) load_row<W>(t.data + n * t.step, t.channel, buffer + n * P);
    return {buffer, P};
}
template <int W> INLINE void write_rows(const Tokens& t, int64_t count, const real* buffer) {
    constexpr int64_t P = up(W, L);
    int64_t n = 0;
    if (t.step == 1 && t.channel != 1) for (; n + L <= count; n += L) for (int d = 0; d < W; d += L) {
        V tile[L];
        UNROLL for (int i = 0; i < L; i++) tile[i] = load(buffer + (n + i) * P + d);
        transpose(tile);
        UNROLL for (int i = 0; i < L; i++) if (d + i < W) {
            element* row = t.data + (d + i) * t.channel + n;
            store_elements(row, tile[i]);
            __builtin_prefetch(row + BLOCK, 1, 2);
        }
    }
    for (; n < count; n++) store_row<W>(t.data + n * t.step, t.channel, buffer + n * P, 1);
}

// ---- looking ahead: every product walks one tensor of K channels beside one of D channels ------------------------------------------
constexpr int LINE = 64 / sizeof(element), K_LINES = (K + LINE - 1) / LINE, LINES = K_LINES + (D + LINE - 1) / LINE;
template <int COUNT> struct Lines {      // of one token, then of the next
    const element* at[COUNT];
    int64_t step[COUNT];
    INLINE void fetch() { UNROLL for (int i = 0; i < COUNT; i++) { __builtin_prefetch(at[i], 0, 2); at[i] += step[i]; } }
};
struct Pair {
    Tokens k, d;
    // the part of a token's lines that call number `call` of COUNT lines each fetches
    template <int COUNT> INLINE Lines<COUNT> lines(int call, int64_t token) const {
        Lines<COUNT> x;
        UNROLL for (int i = 0; i < COUNT; i++) {
            const int line = min(call * COUNT + i, LINES - 1);
            const Tokens& t = line < K_LINES ? k : d;
            const bool dense = t.channel == 1;
            x.step[i] = dense ? t.step : 0;
            x.at[i] = t.data + (dense ? token * t.step + (line < K_LINES ? line : line - K_LINES) * LINE : 0);
        }
        return x;
    }
};

// ---- tokens contracted: C[j][i] = sum over n of a[n][j] b[n][i] ---------------------------------------------------------------------
// M rows j, N vectors of lanes i. Each block of tokens is summed from zero, so that sums stay short.
template <int M, int N, int COUNT>
__attribute__((noinline)) void contract_block(Rows a, Rows b, int64_t tokens, real* c, Lines<COUNT> ahead) {
    V s[M][N];
    UNROLL for (int j = 0; j < M; j++) UNROLL for (int i = 0; i < N; i++) s[j][i] = V{};
    for (int64_t n = 0; n < tokens; n++, a.data += a.step, b.data += b.step) {
        ahead.fetch();
        V x[N];
        UNROLL for (int i = 0; i < N; i++) x[i] = load(b.data + i * L);
        UNROLL for (int j = 0; j < M; j++) {
            const V y = splat(a.data[j]);
            UNROLL for (int i = 0; i < N; i++) s[j][i] += y * x[i];
        }
    }
    UNROLL for (int j = 0; j < M; j++) UNROLL for (int i = 0; i < N; i++) store(c + j * DP + i * L, load(c + j * DP + i * L) + s[j][i]);
}
constexpr int parts_of(int n, int most) { return (n + most - 1) / most; }
constexpr int contract_calls() {
    int calls = 0;
    for (int i = 0, n; i < DP / L; i += n) { n = share(DP / L - i, COLUMNS); calls += parts_of(K, REGISTERS / n); }
    return calls;
}
constexpr int CONTRACT_LINES = parts_of(LINES, contract_calls());
template <int N> INLINE int contract_column(Rows a, Rows b, int64_t tokens, real* c, const Pair& ahead, int64_t token, int call) {
    constexpr int most = REGISTERS / N, big = share(K, most);
    for (int j = 0, m; j < K; j += m, call++) {
        m = share(K - j, most);
        const auto lines = ahead.lines<CONTRACT_LINES>(call, token);
        if (m == big) contract_block<big, N>({a.data + j, a.step}, b, tokens, c + j * DP, lines);
        else if constexpr (big > 1) contract_block<big - 1, N>({a.data + j, a.step}, b, tokens, c + j * DP, lines);
    }
    return call;
}

// ---- channels contracted: C[n][i] = sum over t < TERMS of a[n][t] m[t][i] -------------------------------------------------------------
template <int M, int N, int TERMS, int COUNT>
__attribute__((noinline)) void expand_block(Rows a, const real* m, int64_t m_row, real* c, int64_t c_row, Lines<COUNT> ahead) {
    // a few terms, then the lines of a token (of several where tokens outnumber terms)
    constexpr int pace = max(TERMS / M, 1), each = parts_of(M, TERMS), turns = parts_of(M, each);
    V s[M][N];
    UNROLL for (int n = 0; n < M; n++) UNROLL for (int i = 0; i < N; i++) s[n][i] = V{};
    auto term = [&](int t) __attribute__((always_inline)) {
        V x[N];
        UNROLL for (int i = 0; i < N; i++) x[i] = load(m + i * L);
        UNROLL for (int n = 0; n < M; n++) {
            const V y = splat(a.data[n * a.step + t]);
            UNROLL for (int i = 0; i < N; i++) s[n][i] += y * x[i];
        }
        m += m_row;
    };
    int t = 0;
    for (int turn = 0; turn < turns; turn++) {
        UNROLL for (int i = 0; i < each; i++) ahead.fetch();
        _Pragma("GCC unroll 4") for (int i = 0; i < pace; i++) term(t++);
    }
    for (; t < TERMS; t++) term(t);
    UNROLL for (int n = 0; n < M; n++) UNROLL for (int i = 0; i < N; i++) store(c + n * c_row + i * L, s[n][i]);
}
// `count` tokens; W lanes of the result
template <int TERMS, int W> INLINE void expand_rows(Rows a, int64_t count, const real* m, real* c, int64_t c_row, const Pair& ahead, int64_t token) {
    constexpr int vectors = up(W, L) / L, calls = parts_of(vectors, COLUMNS), big = share(vectors, COLUMNS), lines = parts_of(LINES, calls);
    auto column = [&]<int M, int N>(int64_t n, int i, int call, std::integer_sequence<int, M, N>) __attribute__((always_inline)) {
        expand_block<M, N, TERMS>({a.data + n * a.step, a.step}, m + i * L, up(W, L), c + n * c_row + i * L, c_row, ahead.lines<lines>(call, token + n));
    };
    auto rows = [&]<int M>(int64_t n, std::integer_sequence<int, M>) __attribute__((always_inline)) {
        for (int i = 0, call = 0, some; i < vectors; i += some, call++) {
            some = share(vectors - i, COLUMNS);
            if (some == big) column(n, i, call, std::integer_sequence<int, M, big>());
            else if constexpr (big > 1) column(n, i, call, std::integer_sequence<int, M, big - 1>());
        }
    };
    constexpr int M = REGISTERS / big;
    int64_t n = 0;
    for (; n + M <= count; n += M) rows(n, std::integer_sequence<int, M>());
    for (; n + 4 <= count; n += 4) rows(n, std::integer_sequence<int, 4>());
    for (; n < count; n++) rows(n, std::integer_sequence<int, 1>());
}

// ---- one (batch, head) --------------------------------------------------------------------------------------------------------------
struct Channel {
    // S and dA are kept transposed, so that a softmax runs over vectors; results: A transposed, or A, dS transposed, dS
    static constexpr int SUMS = BACKWARD ? 2 : 1, RESULTS = BACKWARD ? 3 : 1;
    static constexpr int64_t SIZE = K * DP, RESULT = max(K * DP, D * KP);
    const Problem& P;
    real *x, *y, *z;            // rows of a block
    real *sums, *part, *matrices;
    Channel(const Problem& P, Arena& arena) : P(P) {
        constexpr int64_t W = max(DP, KP);
        arena.reserve(sizeof(real) * (3 * BLOCK * W + 2 * SUMS * SIZE + RESULTS * RESULT) + 64 * 6);
        for (real** p : {&x, &y, &z}) *p = arena.take<real>(BLOCK * W);
        sums = arena.take<real>(SUMS * SIZE); part = arena.take<real>(SUMS * SIZE); matrices = arena.take<real>(RESULTS * RESULT);
    }
    // What is walked, in this order.
    struct Walks { Pair scores, slopes, values, queries, keys; };
    Walks walks(int64_t g) const {
        auto of = [&](const element* data, const Layout& t) {
            return Tokens{const_cast<element*>(data) + g / P.heads * t.batch + g % P.heads * t.head, t.token, t.channel};
        };
        const Tokens q = of(P.q, P.q_layout), k = of(P.k, P.k_layout), v = of(P.v, P.v_layout);
        if constexpr (!BACKWARD) return {{k, q}, {}, {v, of(P.out, P.out_layout)}, {}, {}};
        const Tokens grad_out = of(P.grad_out, P.grad_out_layout);
        return {{k, q}, {v, grad_out}, {of(P.dv, P.dv_layout), grad_out}, {k, of(P.dq, P.dq_layout)}, {of(P.dk, P.dk_layout), q}};
    }

    // out[j][i] = sum over the tokens [from, to) of k[n][j] d[n][i]
    void contract(const Pair& all, int64_t from, int64_t to, const Pair& next, real* out) {
        memset(out, 0, sizeof(real) * SIZE);
        for (int64_t n = from, count; n < to; n += count) {
            count = min<int64_t>(up(share(to - n, BLOCK), L), to - n);
            const Rows a = rows_of<K, false>(all.k.from(n), count, x), b = rows_of<D, true>(all.d.from(n), count, y);
            const bool inside = n + count < to;
            const Pair& ahead = inside ? all : next;
            const int64_t token = inside ? n + count : 0;
            constexpr int vectors = DP / L, big = share(vectors, COLUMNS);
            for (int i = 0, call = 0, some; i < vectors; i += some) {
                some = share(vectors - i, COLUMNS);
                const Rows lanes{b.data + i * L, b.step};
                if (some == big) call = contract_column<big>(a, lanes, count, out + i * L, ahead, token, call);
                else if constexpr (big > 1) call = contract_column<big - 1>(a, lanes, count, out + i * L, ahead, token, call);
            }
        }
    }
    void contract_part(const Walks& w, int64_t from, int64_t to, real* out) {
        contract(w.scores, from, to, BACKWARD ? w.slopes : w.values, out);
        if constexpr (BACKWARD) contract(w.slopes, from, to, w.values, out + SIZE);
    }
    static void add(const real* part, real* to) { for (int64_t i = 0; i < SUMS * SIZE; i += L) store(to + i, load(to + i) + load(part + i)); }

    // rows [from, to) of `out` (W channels) = rows of `a` (R channels) times the matrix m
    template <int R, int W> void expand(const Tokens& a, const real* m, const Tokens& out, const Pair& all, int64_t from, int64_t to, const Pair& next) {
        constexpr int M = REGISTERS / share(up(W, L) / L, COLUMNS), most = max(BLOCK / M, 1) * M;
        for (int64_t n = from, count; n < to; n += count) {
            count = min<int64_t>(to - n, most);
            const Rows rows = rows_of<R, false>(a.from(n), count, x);
            const bool inside = n + BLOCK < to;
            const Pair& ahead = inside ? all : next;
            const int64_t token = inside ? n + BLOCK : n - max(from, to - BLOCK);
            const Tokens dst = out.from(n);
            if constexpr (sizeof(element) == sizeof(real) && W % L == 0) if (out.channel == 1) {
                expand_rows<R, W>(rows, count, m, (real*)dst.data, out.step, ahead, token);
                continue;
            }
            expand_rows<R, W>(rows, count, m, z, up(W, L), ahead, token);
            write_rows<W>(dst, count, z);
        }
    }
    void expand_part(const Walks& w, const real* m, int64_t from, int64_t to, const Pair& next) {
        if constexpr (BACKWARD) {
            expand<D, K>(w.values.d, m, w.values.k, w.values, from, to, w.queries);
            expand<K, D>(w.queries.k, m + RESULT, w.queries.d, w.queries, from, to, w.keys);
            expand<D, K>(w.keys.d, m + 2 * RESULT, w.keys.k, w.keys, from, to, next);
        } else expand<K, D>(w.values.k, m, w.values.d, w.values, from, to, next);
    }

    // S to A, in place: the softmax of a row of S is that of a lane here
    void softmax(real* s) const {
        const V unit = splat(real(P.scale * 1.4426950408889634));
        for (int i = 0; i < DP; i += L) {
            V best = load(s + i) * unit, total{};
            for (int j = 1; j < K; j++) best = larger(best, load(s + j * DP + i) * unit);
            for (int j = 0; j < K; j++) {
                const V e = exp2_vector(load(s + j * DP + i) * unit - best);
                total += e;
                store(s + j * DP + i, e);
            }
            const V inverse = splat(1) / total;
            for (int j = 0; j < K; j++) store(s + j * DP + i, load(s + j * DP + i) * inverse);
        }
    }
    static void turn(const real* from, real* to) {
        for (int j = 0; j < K; j += L) for (int i = 0; i < D; i += L) {
            V tile[L];
            UNROLL for (int l = 0; l < L; l++) tile[l] = j + l < K ? load(from + (j + l) * DP + i) : V{};
            transpose(tile);
            UNROLL for (int l = 0; l < L; l++) if (i + l < D) store(to + (i + l) * KP + j, tile[l]);
        }
    }
    void prepare(real* s, real* m) const {
        softmax(s);
        if constexpr (!BACKWARD) { memcpy(m, s, sizeof(real) * SIZE); return; }
        turn(s, m);
        real* slope = s + SIZE;
        const V scale = splat(real(P.scale));
        for (int i = 0; i < DP; i += L) {
            V mean{};
            for (int j = 0; j < K; j++) mean += load(s + j * DP + i) * load(slope + j * DP + i);
            for (int j = 0; j < K; j++) store(m + RESULT + j * DP + i, load(s + j * DP + i) * (load(slope + j * DP + i) - mean) * scale);
        }
        turn(m + RESULT, m + 2 * RESULT);
    }
};

// Tokens are summed in parts whatever the threads, so their number never shows in a result. Where there are heads enough for all
// threads, each does whole heads; else parts are shared out.
extern "C" bool channel(const Problem* problem) {
    const Problem& P = *problem;
    const int64_t groups = P.batch * P.heads, parts = max<int64_t>(min((P.tokens + PART - 1) / PART, MOST_PARTS), 1);
    const int64_t idle = (P.threads - groups % P.threads) % P.threads;      // threads without a head in the last round
    const bool whole = parts == 1 || 8 * idle <= groups;
    auto border = [&](int64_t p) { return P.tokens * p / parts; };
    static thread_local Arena memory;
    real *sums = nullptr, *matrices = nullptr;      // of all heads
    constexpr int64_t SUM = Channel::SUMS * Channel::SIZE, RESULT = Channel::RESULTS * Channel::RESULT;
    if (!whole) {
        memory.reserve(sizeof(real) * groups * (parts * SUM + RESULT) + 128);
        sums = memory.take<real>(groups * parts * SUM); matrices = memory.take<real>(groups * RESULT);
    }
#pragma omp parallel num_threads(P.threads)
    {
        static thread_local Arena arena;
        Channel work(P, arena);
        if (whole) {
            const int64_t n = omp_get_num_threads(), me = omp_get_thread_num();
            for (int64_t g = groups * me / n; g < groups * (me + 1) / n; g++) {
                const auto w = work.walks(g);
                for (int64_t p = 0; p < parts; p++) {
                    work.contract_part(w, border(p), border(p + 1), p ? work.part : work.sums);
                    if (p) work.add(work.part, work.sums);
                }
                work.prepare(work.sums, work.matrices);
                work.expand_part(w, work.matrices, 0, P.tokens, work.walks(min(g + 1, groups - 1)).scores);
            }
        } else {
#pragma omp for schedule(static)
            for (int64_t item = 0; item < groups * parts; item++)
                work.contract_part(work.walks(item / parts), border(item % parts), border(item % parts + 1), sums + item * SUM);
#pragma omp for schedule(static)
            for (int64_t g = 0; g < groups; g++) {
                real* s = sums + g * parts * SUM;
                for (int64_t p = 1; p < parts; p++) work.add(s + p * SUM, s);
                work.prepare(s, matrices + g * RESULT);
            }
#pragma omp for schedule(static)
            for (int64_t item = 0; item < groups * parts; item++) {
                const auto w = work.walks(item / parts);
                work.expand_part(w, matrices + item / parts * RESULT, border(item % parts), border(item % parts + 1), w.scores);
            }
        }
    }
    return true;
}

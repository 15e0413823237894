// ---- bands: where every query sees BAND consecutive keys of the last axis ------------------------------------------------------
// Lanes are L queries of one row (one residue class), and key t of a lane is key lo + t of its own, so a box of keys is neither
// masked nor padded. The keys of L queries lie in two vectors that start at the first lane's: key t of all lanes is one permutation
// of them, or one load where lo grows by one per lane. A group of GROUP rows of queries walks down the rows; each row of keys that
// it meets is transposed once, into a ring of rows [channel][key]. A clamped border and the interior are the same code.
constexpr int REGISTERS = ROWS > 4 ? 32 : 16;
constexpr int GROUP = REGISTERS == 32 ? 4 : 2, SUMS = 4;         // rows of queries; channels of output that are summed at once
constexpr int64_t RING = 384 << 10, CELLS = 192 << 10;           // bytes of a ring (a part of the L2 cache), most bytes of scores
constexpr int Y = max(RANK - 2, 0), X = RANK - 1;                // axis of the rows, axis along a row
enum Way { STRAIGHT, ONE, TWO };                                 // keys of a block: by loads, permuted out of one vector or of two

// Tokens src[i * step], i < count <= L, to columns: dst[d * stride + i]. Lanes from `count` on repeat the last token.
template <int W> INLINE void load_columns(const element* src, int64_t step, int64_t channel, int count, real* dst, int64_t stride) {
    if (W >= L && channel == 1) {
        for (int c = 0; c < W; c += L) {
            const int d = min(c, W - L);          // the last vector of channels may overlap the one before
            V x[L];
            if (count == L) { UNROLL for (int i = 0; i < L; i++) x[i] = load_elements(src + i * step + d); }
            else { UNROLL for (int i = 0; i < L; i++) x[i] = load_elements(src + min(i, count - 1) * step + d); }
            transpose(x);
            UNROLL for (int i = 0; i < L; i++) store(dst + (d + i) * stride, x[i]);
        }
    } else for (int i = 0; i < L; i++) {
        const element* token = src + min(i, count - 1) * step;
        for (int d = 0; d < W; d++) dst[d * stride + i] = get(token[d * channel]);
    }
}
template <int W> INLINE void store_columns(const real* src, element* dst, int64_t step, int64_t channel, int count) {
    if (W >= L && channel == 1) {
        for (int c = 0; c < W; c += L) {
            const int d = min(c, W - L);
            V x[L];
            UNROLL for (int i = 0; i < L; i++) x[i] = load(src + (d + i) * L);
            transpose(x);
            UNROLL for (int i = 0; i < L; i++) if (i < count) store_elements(dst + i * step + d, x[i]);
        }
    } else for (int i = 0; i < count; i++) for (int d = 0; d < W; d++) dst[i * step + d * channel] = put(src[d * L + i]);
}
// queries of one residue class
INLINE int64_t tokens_of(int64_t length, int64_t split, int64_t residue) {
    return residue < length ? (length - residue + split - 1) / split : 0;
}

// How a call's tokens are cut, from its tables; `fits`: they are a band that this kernel takes.
struct Plan {
    bool fits = false;
    int64_t planes = 1;          // most products of keys of the axes before Y
    int64_t lines = 1, seen = 1; // most rows of keys that a group, that a row meets in one plane
    int64_t strips = 1;          // parts of a row: a ring holds one part
    int64_t stride = 0;          // of a ring's channels
    int64_t chunks = 1;          // parts of the rows, so that every thread has some
    int64_t items = 0;

    explicit Plan(const Problem& P) {
        const Axis &x = P.axes[X], &y = P.axes[Y];
        if (!(P.scale > 0) || P.q_prefix || P.k_prefix) return;
        items = P.batch * P.heads;
        for (int a = 0; a < RANK; a++) {
            const Axis& axis = P.axes[a];
            int64_t most = 1;
            for (int64_t r = 0; r < axis.split; r++) {
                const int32_t *lo = axis.lo + r * axis.columns, *hi = axis.hi + r * axis.columns;
                const int64_t n = tokens_of(P.q_grid[a], axis.split, r);
                for (int64_t j = 0; j < n; j++) {
                    if (hi[j] < lo[j] || (j && (lo[j] < lo[j - 1] || hi[j] < hi[j - 1]))) return;
                    if (a == X && hi[j] - lo[j] + 1 != BAND) return;
                    if (a == X && j % L == 0 && hi[min(j + L, n) - 1] - lo[j] >= 2 * L) return;
                    if (a == Y && j % GROUP == 0) lines = max<int64_t>(lines, hi[min(j + GROUP, n) - 1] - lo[j] + 1);
                    most = max<int64_t>(most, hi[j] - lo[j] + 1);
                }
            }
            if (a < Y) { planes *= most; items *= P.q_grid[a]; }
            if (a == Y) seen = most;
            if (a >= Y) items *= min(axis.split, P.q_grid[a]);
        }
        if (scores() * (int64_t)sizeof(real) > CELLS) return;
        const int64_t blocks = (tokens_of(P.q_grid[X], x.split, 0) + L - 1) / L;
        for (strips = 1;; strips++) {
            int64_t span = 1;
            for (int64_t r = 0; r < x.split; r++) for (int64_t s = 0; s < strips; s++) {
                const int64_t n = tokens_of(P.q_grid[X], x.split, r);
                const int64_t from = blocks * s / strips * L, to = min(blocks * (s + 1) / strips * L, n);
                if (from < to) span = max<int64_t>(span, x.hi[r * x.columns + to - 1] - x.lo[r * x.columns + from] + 1);
            }
            stride = up(span, L);
            if (stride / L % 2 == 0) stride += L;      // rows a power of two apart would share cache sets
            if (strips >= blocks || (int64_t)sizeof(real) * ring() <= RING) break;
        }
        items *= strips;
        const int64_t groups = (tokens_of(P.q_grid[Y], y.split, 0) + GROUP - 1) / GROUP;
        if (items && items % P.threads && items < 8 * P.threads) chunks = min(groups, (4 * P.threads + items - 1) / items);
        items *= chunks;
        fits = true;
    }
    int64_t scores() const { return GROUP * planes * seen * BAND * L; }
    int64_t ring() const { return planes * lines * stride * (D + DV) + 2 * L; }
};

struct Band {
    const Problem& P;
    const Plan& plan;
    V unit;
    real *keys, *values, *q, *o, *s;         // rings [plane][row][channel][key], [query row][channel][L], [query row][key][L]
    int64_t *k_plane, *v_plane;              // offsets of the planes of keys
    I lane[BAND];                            // where key t of each lane lies in the two vectors
    int rows, planes;                        // of the group, of keys
    const int32_t *lo, *hi;                  // the rows of keys that the group's rows see
    int64_t first;                           // the block's first key in a ring's row
    // what the next group needs, token by token
    struct Ahead {
        const element *k, *v, *q, *out;
        int64_t k_line, v_line, q_line, out_line, k_step, v_step, q_step, out_step;
        int lines, count, line, i;
    } ahead;

    Band(const Problem& P, const Plan& plan, Arena& arena) : P(P), plan(plan) {
        unit = splat(real(P.scale * 1.4426950408889634));
        arena.reserve(sizeof(real) * (plan.ring() + plan.scores() + GROUP * L * (D + DV)) + plan.planes * 16 + 64 * 8);
        keys = arena.take<real>(plan.planes * plan.lines * plan.stride * D);
        values = arena.take<real>(plan.planes * plan.lines * plan.stride * DV + 2 * L);
        q = arena.take<real>(GROUP * D * L); o = arena.take<real>(GROUP * DV * L); s = arena.take<real>(plan.scores());
        k_plane = arena.take<int64_t>(plan.planes); v_plane = arena.take<int64_t>(plan.planes);
    }
    template <int W> INLINE real* ring_row(real* ring, int plane, int64_t line) const {
        return ring + (plane * plan.lines + line % plan.lines) * W * plan.stride;
    }
    INLINE real* cell(int row, int plane, int64_t line) const {
        return s + (row * plan.planes * plan.seen + plane * (hi[row] - lo[row] + 1) + line - lo[row]) * (BAND * L);
    }
    template <Way WAY> INLINE V key(const real* row, int t) const {
        if constexpr (WAY == STRAIGHT) return load(row + t);
        else if constexpr (WAY == ONE) return permute(load(row), lane[t]);
        else return permute(load(row), load(row + L), lane[t]);
    }
    INLINE void look_ahead() {
        if (ahead.line >= ahead.lines) return;
        prefetch<D, 3>(ahead.k + ahead.line * ahead.k_line + ahead.i * ahead.k_step, 1);
        prefetch<DV, 3>(ahead.v + ahead.line * ahead.v_line + ahead.i * ahead.v_step, 1);
        prefetch<D, 3>(ahead.q + ahead.line * ahead.q_line + ahead.i * ahead.q_step, 1);
        prefetch_for_writing<DV>(ahead.out + ahead.line * ahead.out_line + ahead.i * ahead.out_step, 1);
        if (++ahead.i == ahead.count) { ahead.i = 0; ahead.line++; }
    }
    // N rows of queries against keys FROM .. of one row of keys, as many at a time as registers hold
    template <Way WAY, int N, int FROM = 0> INLINE void dots(const real* x, const real* row, real* const* out, V* best) const {
        constexpr int T = share(BAND - FROM, max(1, (REGISTERS - N) / N));
        constexpr int part = (D + (D + 63) / 64 - 1) / ((D + 63) / 64);      // sums are cut where a panel's are: the same bits
        for (int from = 0; from < D; from += part) {
            V a[N][T];
            UNROLL for (int r = 0; r < N; r++) UNROLL for (int t = 0; t < T; t++) a[r][t] = V{};
            const real* channel = row + from * plan.stride;
            for (int d = from; d < min(from + part, D); d++, channel += plan.stride) {
                V y[N];
                UNROLL for (int r = 0; r < N; r++) y[r] = load(x + (r * D + d) * L);
                UNROLL for (int t = 0; t < T; t++) {
                    const V z = key<WAY>(channel, FROM + t);
                    UNROLL for (int r = 0; r < N; r++) a[r][t] += y[r] * z;
                }
            }
            UNROLL for (int r = 0; r < N; r++) UNROLL for (int t = 0; t < T; t++) {
                real* to = out[r] + (FROM + t) * L;
                if (from) a[r][t] += load(to);
                if (from + part >= D) best[r] = larger(best[r], a[r][t]);
                store(to, a[r][t]);
            }
        }
        if constexpr (FROM + T < BAND) dots<WAY, N, FROM + T>(x, row, out, best);
    }
    // f(plane, line, a, b): the group's rows a .. b - 1 see row `line` of a plane. (The ends are monotone.)
    template <class F> INLINE void each_line(F f) const {
        for (int plane = 0; plane < planes; plane++) for (int64_t line = lo[0], a = 0, b = 0; line <= hi[rows - 1]; line++) {
            while (hi[a] < line) a++;
            while (b < rows && lo[b] <= line) b++;
            if (a < b) f(plane, line, int(a), int(b));
        }
    }
    template <Way WAY> __attribute__((noinline)) void scores(V* best) const {
        each_line([&](int plane, int64_t line, int a, int b) __attribute__((always_inline)) {
            real* out[GROUP];
            for (int r = a; r < b; r++) out[r - a] = cell(r, plane, line);
            const real *row = ring_row<D>(keys, plane, line) + first, *x = q + a * D * L;
            switch (b - a) {
                case 1: return dots<WAY, 1>(x, row, out, best + a);
                case 2: return dots<WAY, 2>(x, row, out, best + a);
                case 3: if constexpr (GROUP > 2) return dots<WAY, 3>(x, row, out, best + a); break;
                default: if constexpr (GROUP > 3) return dots<WAY, 4>(x, row, out, best + a);
            }
        });
    }
    template <Way WAY, int A, int B, int N> INLINE void add(const real* row, int plane, int64_t line, V (&sum)[GROUP][N]) const {
        if constexpr (B <= GROUP) {
            const real* p[GROUP];
            UNROLL for (int r = A; r < B; r++) p[r] = cell(r, plane, line);
            for (int t = 0; t < BAND; t++) {
                V w[GROUP];
                UNROLL for (int r = A; r < B; r++) w[r] = load(p[r] + t * L);
                UNROLL for (int d = 0; d < N; d++) {
                    const V x = key<WAY>(row + d * plan.stride, t);
                    UNROLL for (int r = A; r < B; r++) sum[r][d] += w[r] * x;
                }
            }
        }
    }
    // N channels of output from channel d on: o = factor * sum over keys of weight * value
    template <Way WAY, int N> __attribute__((noinline)) void channels(int d, const V* factor) {
        V sum[GROUP][N];
        UNROLL for (int r = 0; r < GROUP; r++) UNROLL for (int i = 0; i < N; i++) sum[r][i] = V{};
        for (int plane = 0; plane < planes; plane++) for (int64_t line = lo[0], a = 0, b = 0; line <= hi[rows - 1]; line++) {
            while (hi[a] < line) a++;
            while (b < rows && lo[b] <= line) b++;
            look_ahead();
            const real* row = ring_row<DV>(values, plane, line) + d * plan.stride + first;
            switch (a * 8 + b) {      // (every run of rows is a case, so that the sums stay in registers)
                case 1: add<WAY, 0, 1>(row, plane, line, sum); break;
                case 2: add<WAY, 0, 2>(row, plane, line, sum); break;
                case 3: add<WAY, 0, 3>(row, plane, line, sum); break;
                case 4: add<WAY, 0, 4>(row, plane, line, sum); break;
                case 10: add<WAY, 1, 2>(row, plane, line, sum); break;
                case 11: add<WAY, 1, 3>(row, plane, line, sum); break;
                case 12: add<WAY, 1, 4>(row, plane, line, sum); break;
                case 19: add<WAY, 2, 3>(row, plane, line, sum); break;
                case 20: add<WAY, 2, 4>(row, plane, line, sum); break;
                case 28: add<WAY, 3, 4>(row, plane, line, sum); break;
            }
        }
        UNROLL for (int r = 0; r < GROUP; r++) UNROLL for (int i = 0; i < N; i++)
            store(o + (r * DV + d + i) * L, sum[r][i] * factor[r]);
    }
    template <Way WAY> void block(V* log_sum) {
        V best[GROUP], factor[GROUP];
        for (int r = 0; r < GROUP; r++) { best[r] = splat(LOWEST); factor[r] = V{}; }
        scores<WAY>(best);
        for (int r = 0; r < rows; r++) {
            real* p = cell(r, 0, lo[r]);
            const V shift = best[r] * unit;
            V total{};
            for (int64_t i = 0; i < planes * (hi[r] - lo[r] + 1) * BAND; i++) {
                const V e = exp2_vector(load(p + i * L) * unit - shift);
                total += e;
                store(p + i * L, e);
            }
            const I none = total <= V{};
            factor[r] = select(none, V{}, splat(1) / total);
            log_sum[r] = select(none, splat(-INF), (shift + log2(total)) * splat(LN2));
        }
        int d = 0;
        for (; d + SUMS <= DV; d += SUMS) channels<WAY, SUMS>(d, factor);
        if constexpr (DV % SUMS != 0) channels<WAY, DV % SUMS>(d, factor);
    }
    // The block of `count` queries from `x` on: where its keys lie in a ring's row that starts with key `begin`.
    Way aim(const int32_t* x_lo, int64_t x, int count, int64_t begin) {
        first = x_lo[x] - begin;
        bool straight = true;
        int last = 0;
        for (int i = 0; i < L; i++) {
            const int from = x_lo[x + min(i, count - 1)] - x_lo[x];
            straight &= i >= count || from == i;
            last = from + BAND - 1;
            for (int t = 0; t < BAND; t++) lane[t][i] = from + t;
        }
        return straight ? STRAIGHT : last < L ? ONE : TWO;
    }
    void run(int64_t item) {
        const Axis &x = P.axes[X], &y = P.axes[Y];
        int64_t rest = item, index[RANK], residue[RANK];
        auto take = [&](int64_t n) { const int64_t i = rest % n; rest /= n; return i; };
        const int64_t chunk = take(plan.chunks), strip = take(plan.strips);
        for (int a = RANK - 1; a >= 0; a--) {
            const int64_t split = P.axes[a].split;
            if (a >= Y) residue[a] = take(min(split, P.q_grid[a]));
            else { const int64_t c = take(P.q_grid[a]); residue[a] = c % split; index[a] = c / split; }
        }
        const int64_t h = take(P.heads), b = rest, kv = h / (P.heads / P.kv_heads);
        const int64_t nx = tokens_of(P.q_grid[X], x.split, residue[X]), ny = tokens_of(P.q_grid[Y], y.split, residue[Y]);
        const int64_t blocks = (tokens_of(P.q_grid[X], x.split, 0) + L - 1) / L;
        const int64_t groups = (tokens_of(P.q_grid[Y], y.split, 0) + GROUP - 1) / GROUP;
        const int64_t x_from = blocks * strip / plan.strips * L, x_to = min(blocks * (strip + 1) / plan.strips * L, nx);
        const int64_t y_from = groups * chunk / plan.chunks * GROUP, y_to = min(groups * (chunk + 1) / plan.chunks * GROUP, ny);
        if (x_from >= x_to || y_from >= y_to) return;
        const int32_t *x_lo = x.lo + residue[X] * x.columns, *x_hi = x.hi + residue[X] * x.columns;
        const int32_t *y_lo = y.lo + residue[Y] * y.columns, *y_hi = y.hi + residue[Y] * y.columns;
        const int64_t key_from = x_lo[x_from], key_to = x_hi[x_to - 1] + 1;

        // offsets of the plane of queries and of the planes of keys; tokens from there on are rows of the two last axes
        auto corner = [&](const Layout& t, int64_t head) {
            return b * t.batch + head * t.head + t.start + residue[Y] * t.axis[Y] + residue[X] * t.axis[X];
        };
        auto place = [&](const Layout& t, int64_t head) {
            int64_t at = corner(t, head);
            for (int a = 0; a < Y; a++) at += (residue[a] + P.axes[a].split * index[a]) * t.axis[a];
            return at;
        };
        const element* q_from = P.q + place(P.q_layout, h);
        element* out_from = P.out + place(P.out_layout, h);
        real* lse_from = P.lse + place(P.lse_layout, h);
        planes = 1;
        k_plane[0] = corner(P.k_layout, kv); v_plane[0] = corner(P.v_layout, kv);
        for (int a = 0; a < Y; a++) {       // each axis multiplies the planes by its interval
            const Axis& axis = P.axes[a];
            const int64_t query = residue[a] * axis.columns + index[a], begin = axis.lo[query], n = axis.hi[query] - begin + 1;
            for (int64_t i = planes * n - 1; i >= 0; i--) {
                const int64_t coordinate = residue[a] + axis.split * (begin + i % n);
                k_plane[i] = k_plane[i / n] + coordinate * P.k_layout.axis[a];
                v_plane[i] = v_plane[i / n] + coordinate * P.v_layout.axis[a];
            }
            planes *= n;
        }
        const int64_t q_line = y.split * P.q_layout.axis[Y], q_step = x.split * P.q_layout.axis[X];
        const int64_t out_line = y.split * P.out_layout.axis[Y], out_step = x.split * P.out_layout.axis[X];
        const int64_t k_line = y.split * P.k_layout.axis[Y], k_step = x.split * P.k_layout.axis[X];
        const int64_t v_line = y.split * P.v_layout.axis[Y], v_step = x.split * P.v_layout.axis[X];
        const int64_t lse_line = y.split * P.lse_layout.axis[Y], lse_step = x.split * P.lse_layout.axis[X];
        const bool dense = P.q_layout.channel == 1 && P.k_layout.channel == 1
                           && P.v_layout.channel == 1 && P.out_layout.channel == 1;

        int64_t have = y_lo[y_from];        // the next row of keys to transpose
        for (int64_t row = y_from; row < y_to; row += GROUP) {
            rows = min<int64_t>(GROUP, y_to - row);
            lo = y_lo + row; hi = y_hi + row;
            for (have = max<int64_t>(have, lo[0]); have <= hi[rows - 1]; have++) for (int plane = 0; plane < planes; plane++) {
                const element* k = P.k + k_plane[plane] + have * k_line + key_from * k_step;
                const element* v = P.v + v_plane[plane] + have * v_line + key_from * v_step;
                real *to_k = ring_row<D>(keys, plane, have), *to_v = ring_row<DV>(values, plane, have);
                for (int64_t i = 0; i < key_to - key_from; i += L) {
                    const int count = min<int64_t>(L, key_to - key_from - i);
                    load_columns<D>(k + i * k_step, k_step, P.k_layout.channel, count, to_k + i, plan.stride);
                    load_columns<DV>(v + i * v_step, v_step, P.v_layout.channel, count, to_v + i, plan.stride);
                }
            }
            const int64_t next = row + GROUP;
            const int64_t new_lines = next < y_to ? y_hi[min(next + GROUP, y_to) - 1] + 1 - have : 0;
            for (int64_t at = x_from; at < x_to; at += L) {
                const int count = min<int64_t>(L, x_to - at);
                for (int r = 0; r < rows; r++)
                    load_columns<D>(q_from + (row + r) * q_line + at * q_step, q_step, P.q_layout.channel, count, q + r * D * L, L);
                const Way way = aim(x_lo, at, count, key_from);
                ahead = {P.k + k_plane[planes - 1] + have * k_line + x_lo[at] * k_step,
                         P.v + v_plane[planes - 1] + have * v_line + x_lo[at] * v_step,
                         q_from + next * q_line + at * q_step, out_from + next * out_line + at * out_step,
                         k_line, v_line, q_line, out_line, k_step, v_step, q_step, out_step,
                         dense ? int(min(min<int64_t>(new_lines, GROUP), y_to - next)) : 0, count, 0, 0};
                V log_sum[GROUP];
                if (way == STRAIGHT) block<STRAIGHT>(log_sum);
                else if (way == ONE) block<ONE>(log_sum);
                else block<TWO>(log_sum);
                for (int r = 0; r < rows; r++) {
                    element* out = out_from + (row + r) * out_line + at * out_step;
                    store_columns<DV>(o + r * DV * L, out, out_step, P.out_layout.channel, count);
                    real* lse = lse_from + (row + r) * lse_line + at * lse_step;
                    for (int i = 0; i < count; i++) lse[i * lse_step] = log_sum[r][i];
                }
            }
        }
    }
};
inline bool band_forward(const Problem& P) {
    const Plan plan(P);
    if (!plan.fits) return false;
#pragma omp parallel num_threads(P.threads)
    {
        static thread_local Arena arena;
        Band work(P, plan, arena);
        const int64_t n = omp_get_num_threads(), me = omp_get_thread_num();
        for (int64_t item = plan.items * me / n; item < plan.items * (me + 1) / n; item++) work.run(item);
    }
    return true;
}

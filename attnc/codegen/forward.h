// ---- forward: softmax in one pass over the key chunks, with a running maximum and sum per query -----------------------------------
struct Aimed {              // a tile, its first chunk of keys, and where its rows lie in each (batch, head)
    Tile tile;
    Keys keys;
    int64_t *q_offset, *out_offset, *lse_offset, number, prefix_from;
    static size_t bytes() { return Tile::bytes() + Keys::bytes() + 3 * (TILE * 8 + 64); }
    void allocate(Arena& arena) {
        tile.allocate(arena); keys.allocate(arena);
        for (int64_t** p : {&q_offset, &out_offset, &lse_offset}) *p = arena.take<int64_t>(TILE);
        number = -1;
    }
    void aim(const Problem& P, int64_t t, int64_t tiles) {
        number = t;
        prefix_from = 0;
        if (t < tiles) {
            int64_t piece[RANK];
            for (int a = RANK - 1; a >= 0; t /= P.axes[a].pieces, a--) piece[a] = t % P.axes[a].pieces;
            tile.aim(P, piece);
        } else {
            prefix_from = (t - tiles) * TILE;
            tile.aim_prefix(P, prefix_from, min(P.q_prefix, prefix_from + TILE));
        }
        tile.place(P, P.q_layout, prefix_from, q_offset);
        tile.place(P, P.out_layout, prefix_from, out_offset);
        tile.place(P, P.lse_layout, prefix_from, lse_offset);
        keys.count = 0;
        if (tile.chunks(P)) keys.aim(P, tile, 0);
    }
};
// What the next item needs, prefetched a few rows at a time: all at once would fill the line buffers.
struct Ahead {
    const Aimed* aimed;
    const element *q, *k, *v, *out;
    int query, key, queries, keys, pace;
};
struct Forward {
    const Problem& P;
    Aimed aimed[2], *here = aimed, *next = aimed + 1;
    Loads loads;
    Masks masks;
    Numbers numbers;
    Panels panels;
    Ahead ahead;
    real *q, *k, *v, *scores, *o, *maximum, *total, *log_sum;
    static constexpr int QW = words(D), QP = up(QW, L);     // words of a row of q or k
    real odd_keys[2 * QP];
    int odd;                // keys that are in no panel
    element* out;
    static constexpr int64_t STRIDE = CHUNK + L;      // of rows of scores: a power of two would make stores look like later loads
    bool* started;
    const real** q_row;     // [queries] where their channels lie

    explicit Forward(const Problem& P, Arena& arena) : P(P), loads(P) {
        arena.reserve(2 * Aimed::bytes() + Masks::bytes() + loads.bytes(false) + 64 * 16 + TILE * 33
                      + sizeof(real) * (TILE * (DP + VP + 3) + 3 * L + CHUNK * (2 * DP + VP) + ROWS * STRIDE));
        aimed[0].allocate(arena); aimed[1].allocate(arena);
        loads.allocate(arena, false);
        masks.rows = arena.take<real>(Masks::MOST * CHUNK);
        q = arena.take<real>(TILE * DP); o = arena.take<real>(TILE * VP);
        for (real** p : {&maximum, &total, &log_sum}) *p = arena.take<real>(TILE + L);
        started = arena.take<bool>(TILE); q_row = arena.take<const real*>(TILE);
        k = arena.take<real>(CHUNK * DP); panels.data = arena.take<real>(CHUNK * DP); v = arena.take<real>(CHUNK * VP);
        scores = arena.take<real>(ROWS * STRIDE);
    }

    // q . k of queries i .. i + M - 1 and N vectors of keys from key j on (b: the vectors in their panel, b_row apart), to `scores`.
    // finished: as scores, with their maxima per lane; all queries see all these keys.
    template <int M, int N>
    __attribute__((noinline)) void score_block(bool finished, int i, int j, const real* b, int64_t b_row, const real* const (*elements)[LOADS + 1], V* best) const {
        constexpr int parts = WORD > 1 ? 1 : (D + 63) / 64, most = (QW + parts - 1) / parts;     // sums are cut, so that their error does not grow
        real* row = scores + j;
        const real* a[M];
        UNROLL for (int r = 0; r < M; r++) a[r] = q_row[i + r];
        V s[M][N];
        for (int from = 0; from < QW; from += most) {
            UNROLL for (int r = 0; r < M; r++) UNROLL for (int n = 0; n < N; n++) s[r][n] = V{};
            for (int d = from; d < min(from + most, QW); d++, b += b_row) {
                V x[N];
                UNROLL for (int n = 0; n < N; n++) x[n] = load(b + n * L);
                UNROLL for (int r = 0; r < M; r++) {
                    const V y = splat_word(a[r] + d);
                    UNROLL for (int n = 0; n < N; n++) s[r][n] = multiply_add(y, x[n], s[r][n]);
                }
            }
            if (from) UNROLL for (int r = 0; r < M; r++) UNROLL for (int n = 0; n < N; n++) s[r][n] += load(row + r * STRIDE + n * L);
            if (from + most < QW) UNROLL for (int r = 0; r < M; r++) UNROLL for (int n = 0; n < N; n++) store(row + r * STRIDE + n * L, s[r][n]);
        }
        if (finished) {
            const Numbers numbers = this->numbers;
            const I inside = lanes() < splat_integer(here->keys.count - j - (N - 1) * L);      // of the last vector
            UNROLL for (int r = 0; r < M; r++) UNROLL for (int n = 0; n < N; n++) {
                V x = s[r][n];
                if constexpr (!PLAIN_SCORE) x = score(P, numbers, here->tile.terms[i + r], here->keys.terms, elements[r], j + n * L, x);
                if (n == N - 1) x = select(inside, x, splat(-INF));
                best[r] = larger(best[r], x);
                store(row + r * STRIDE + n * L, x);
            }
        } else UNROLL for (int r = 0; r < M; r++) UNROLL for (int n = 0; n < N; n++) store(row + r * STRIDE + n * L, s[r][n]);
    }
    template <int M> INLINE void score_rows(bool finished, int n, int i, int j, const real* b, int64_t b_row, const real* const (*elements)[LOADS + 1], V* best) const {
        switch (n) {
            case 1: return score_block<M, 1>(finished, i, j, b, b_row, elements, best);
            case 2: return score_block<M, 2>(finished, i, j, b, b_row, elements, best);
            case 3: if constexpr (COLUMNS > 2) return score_block<M, 3>(finished, i, j, b, b_row, elements, best); break;
            default: if constexpr (COLUMNS > 3) return score_block<M, 4>(finished, i, j, b, b_row, elements, best);
        }
    }
    // The same for the one or two keys after the last whole vector, which a vector of their own would mostly waste: sums over lanes of
    // channels.
    template <int M> INLINE void odd_scores(int i, const real* const (*elements)[LOADS + 1], V* best) const {
        const Numbers numbers = this->numbers;
        const int j = here->keys.count - odd;
        V dot[2];
        for (int t = 0; t < odd; t++) {
            V s[M];
            UNROLL for (int r = 0; r < M; r++) s[r] = V{};
            for (int d = 0; d < QP; d += L) {
                const V y = load(odd_keys + t * QP + d);
                UNROLL for (int r = 0; r < M; r++) s[r] = multiply_add(load(q_row[i + r] + d), y, s[r]);
            }
            dot[t] = fold_rows<M>(s, [](V a, V b) { return a + b; });
        }
        UNROLL for (int r = 0; r < M; r++) {
            V x = odd > 1 ? select(lanes() < splat_integer(1), lane(dot[0], r), lane(dot[1], r)) : lane(dot[0], r);
            if constexpr (!PLAIN_SCORE) x = score(P, numbers, here->tile.terms[i + r], here->keys.terms, elements[r], j, x);
            x = select(lanes() < splat_integer(odd), x, splat(-INF));
            best[r] = larger(best[r], x);
            store(scores + r * STRIDE + j, x);
        }
    }
    // Products in `scores` of queries i .. i + m - 1 and the keys [from, to) become scores, -inf where a query does not see a key.
    __attribute__((noinline)) void check_rows(int i, int m, int from, int to, bool plain, const real* const (*elements)[LOADS + 1], V* best) const {
        const Tile& tile = here->tile;
        const Keys& keys = here->keys;
        bool axes = false;
        for (int a = 0; a < RANK; a++) axes |= tile.checked[a] && !keys.prefix;
        for (int r = 0; r < m; r++) {
            const real* row = masks.row(i + r);
            const Run run = run_of(tile, keys, i + r);
            const bool always = (RESIDUAL && !plain) || (axes && !row);
            for (int j = from; j < to; j += L) {
                V x = load(scores + r * STRIDE + j);
                if constexpr (!PLAIN_SCORE) x = plain ? x * splat(numbers.scale) : score(P, numbers, tile.terms[i + r], keys.terms, elements[r], j, x);
                if (row) x += load(row + j);
                if (always || j < run.begin || j + L > run.end) x = select(visible(P, numbers, tile, keys, run, i + r, j, plain), x, splat(-INF));
                best[r] = larger(best[r], x);
                store(scores + r * STRIDE + j, x);
            }
        }
    }
    // N vectors of output of M queries, from vector `at` on: o = o * before + weights * values; where `after` is given they are finished
    // and written times that.
    template <int M, int N>
    __attribute__((noinline)) void value_block(int i, int at, Run run, const V* before, const V* after) {
        V sum[M][N];
        real* rows = o + i * VP + at * L;
        if (before) { UNROLL for (int r = 0; r < M; r++) UNROLL for (int n = 0; n < N; n++) sum[r][n] = load(rows + r * VP + n * L) * before[r]; }
        else { UNROLL for (int r = 0; r < M; r++) UNROLL for (int n = 0; n < N; n++) sum[r][n] = V{}; }
        const int first = run.begin / WORD, end = words(run.end);
        const real *weight = scores + first, *value = v + first * VP + at * L;
        for (int t = first; t < end; t++, weight++, value += VP) {
            V x[N];
            UNROLL for (int n = 0; n < N; n++) x[n] = load(value + n * L);
            UNROLL for (int r = 0; r < M; r++) {
                const V y = splat_word(weight + r * STRIDE);
                UNROLL for (int n = 0; n < N; n++) sum[r][n] = multiply_add(y, x[n], sum[r][n]);
            }
        }
        if (after) UNROLL for (int r = 0; r < M; r++) {
            element* to = out + here->out_offset[i + r] + at * L;
            UNROLL for (int n = 0; n < N; n++) store_elements(to + n * L, sum[r][n] * after[r]);
        } else UNROLL for (int r = 0; r < M; r++) UNROLL for (int n = 0; n < N; n++) store(rows + r * VP + n * L, sum[r][n]);
    }
    template <int M, int AT = 0> INLINE void value_rows(int i, Run run, const V* before, const V* after) {
        constexpr int N = share(VP / L - AT, COLUMNS);
        value_block<M, N>(i, AT, run, before, after);
        if constexpr (AT + N < VP / L) value_rows<M, AT + N>(i, run, before, after);
    }
    // What m queries from i on see of the chunk: keys that any of them sees, that all see; whether more than these ends is to be checked.
    struct Sight {
        Run run, clear;
        bool check, plain;
    };
    __attribute__((noinline)) Sight sight_of(int i, int m) const {
        const Tile& tile = here->tile;
        const Keys& keys = here->keys;
        Sight s{run_of_rows(tile, keys, i, m), run_of(tile, keys, i), false, tile.prefix || keys.prefix};
        for (int r = 1; r < m; r++) {
            const Run x = run_of(tile, keys, i + r);
            s.clear = {max(s.clear.begin, x.begin), min(s.clear.end, x.end)};
        }
        s.check = s.plain ? !PLAIN_SCORE : RESIDUAL || !USES_SCORE;
        for (int a = 0; a < RANK; a++) s.check |= tile.checked[a] && !keys.prefix;
@LISTS@        if (keys.full) s.check = !USES_SCORE;
        return s;
    }
    __attribute__((noinline)) void find_elements(int i, int m, int from, int to, const real* (*elements)[LOADS + 1]) const {
        for (int r = 0; r < m; r++) loads.rows(P, numbers, here->tile, here->keys, i + r, r, from, to, elements[r]);
    }
    // M queries from i on against the packed chunk; `last`: no more follow
    template <int M> void rows(int i, bool last) {
        const bool more = started[i];       // (rows of a block start together)
        const Sight sight = sight_of(i, M);
        const Run run = sight.run;
        const bool plain = sight.plain;
        if (run.begin >= run.end) {
            if (last && more) finish(i, M);
            return;
        }
        const int first = run.begin / L, end = (run.end + L - 1) / L, from = first * L, to = end * L;
        V best[M];
        const real* elements[M][LOADS + 1];
        UNROLL for (int r = 0; r < M; r++) best[r] = splat(LOWEST);
        if (LOADS && !plain) find_elements(i, M, from, to, elements);
        for (int p = 0; p < panels.count; p++) {
            const int begin = panels.first(p), x = max(begin, first), y = min(panels.first(p + 1), end);
            if (x >= y) continue;
            const real* b = panels.data + begin * L * QW + (x - begin) * L;
            const int64_t width = (panels.first(p + 1) - begin) * L;
            const bool checked = sight.check || x * L < sight.clear.begin || min(y * L, here->keys.count) > sight.clear.end;
            if (USES_SCORE || plain) score_rows<M>(!checked, y - x, i, x * L, b, width, elements, best);
            else for (int r = 0; r < M; r++) memset(scores + r * STRIDE + x * L, 0, sizeof(real) * (y - x) * L);
            if (checked) check_rows(i, M, x * L, y * L, plain, elements, best);
        }
        if constexpr (M <= L && D % (WORD * L) == 0) if (odd) odd_scores<M>(i, elements, best);
        // maxima, sums and factors of L rows at a time
        constexpr int groups = (M + L - 1) / L;
        const V unit = unit_of(numbers);
        V now[groups], sums[M], before[M], after[M];
        const auto bigger = [](V a, V b) { return larger(a, b); };
        const auto plus = [](V a, V b) { return a + b; };
        each_group<M>([&]<int G, int N>() __attribute__((always_inline)) {
            const V top = fold_rows<N>((const V(&)[N])best[G * L], bigger);
            now[G] = larger(load(maximum + i + G * L), PLAIN_SCORE ? top * splat(numbers.scale_log2e) : top);
        });
        UNROLL for (int r = 0; r < M; r++) { best[r] = lane(now[r / L], r % L); sums[r] = V{}; }
        for (int j = from; j < to; j += L) {
            V e[M];
            if constexpr (SOFTMAX) {
                UNROLL for (int r = 0; r < M; r++) e[r] = exponent(load(scores + r * STRIDE + j), best[r], unit);
                UNROLL for (int r = 0; r < M; r++) e[r] = exp2_vector(e[r]);
            } else UNROLL for (int r = 0; r < M; r++) e[r] = weight_of(natural(load(scores + r * STRIDE + j), numbers));
            UNROLL for (int r = 0; r < M; r++) {
                sums[r] += e[r];
                if (POST && !plain) e[r] *= post(P, numbers, here->tile.terms[i + r], here->keys.terms, elements[r], j);
@DROPOUT@                e[r] *= dropout(P, numbers, here->tile.terms[i + r], here->keys.terms, j);
                store_weights(scores + r * STRIDE, j, e[r]);
            }
        }
        each_group<M>([&]<int G, int N>() __attribute__((always_inline)) {
            const V old = load(maximum + i + G * L), factor = SOFTMAX ? exp2_vector((old - now[G]) * splat(PLAIN_SCORE ? 1 : LOG2E)) : splat(1);
            const V all = SOFTMAX ? fold_rows<N>((const V(&)[N])sums[G * L], plus) + load(total + i + G * L) * factor : splat(1);
            const V inverse = select(all > V{}, splat(1) / all, select(all <= V{}, V{}, all));      // 0 of no weights, NaN of a NaN
            const I mine = lanes() < splat_integer(N);
            store(maximum + i + G * L, select(mine, now[G], old));
            store(total + i + G * L, select(mine, all, load(total + i + G * L)));
            UNROLL for (int r = 0; r < N; r++) { before[G * L + r] = lane(factor, r); after[G * L + r] = lane(inverse, r); }
        });
        for (int r = 0; r < M; r++) started[i + r] = true;
        const bool direct = last && DV % L == 0 && P.out_layout.channel == 1;
        constexpr int longest = WORD > 1 ? CHUNK : LONGEST_SUM;         // sums are cut here, too
        const int start = run.begin / WORD * WORD;
        for (int t = start; t < run.end; t += longest) {
            const int stop = min(t + longest, run.end);
            value_rows<M>(i, {t, stop}, more || t > start ? before : nullptr, direct && stop == run.end ? after : nullptr);
            if (t == start) UNROLL for (int r = 0; r < M; r++) before[r] = splat(1);
        }
        if (last && !direct) finish(i, M);
    }
    // f<G, N>(): rows G * L .. G * L + N - 1 of M
    template <int M, int G = 0, class F> static INLINE void each_group(F f) {
        f.template operator()<G, min(M - G * L, L)>();
        if constexpr (M > (G + 1) * L) each_group<M, G + 1>(f);
    }
    // Queries whose last chunk has been, from `o`.
    void finish(int i, int m) {
        for (int r = i; r < i + m; r++) {
            const real all = total[r];
            store_row<DV>(out + here->out_offset[r], P.out_layout.channel, o + r * VP, all > 0 ? 1 / all : all <= 0 ? 0 : all);
        }
    }
    void rows(int i, int m, bool last) {
        switch (m) {
            case 1: return rows<1>(i, last);
            case 2: return rows<2>(i, last);
            case 3: return rows<3>(i, last);
            case 4: return rows<4>(i, last);
            case 5: if constexpr (ROWS > 4) return rows<5>(i, last); break;
            default: if constexpr (ROWS > 5) return rows<6>(i, last);
        }
    }
    INLINE void look_ahead() {
        for (int n = 0; n < ahead.pace && ahead.query < ahead.queries; n++, ahead.query++) {
            prefetch<D>(ahead.q + ahead.aimed->q_offset[ahead.query], P.q_layout.channel);
            prefetch_for_writing<DV>(ahead.out + ahead.aimed->out_offset[ahead.query], P.out_layout.channel);
        }
        for (int n = 0; n < ahead.pace && ahead.key < ahead.keys; n++, ahead.key++) {
            if (PADDED && !ahead.aimed->keys.real_key[ahead.key]) continue;
            prefetch<D>(ahead.k + ahead.aimed->keys.k_offset[ahead.key], P.k_layout.channel);
            prefetch<DV>(ahead.v + ahead.aimed->keys.v_offset[ahead.key], P.v_layout.channel);
        }
    }
    // A query's softmax over other keys, from its output and log-sum-exp; or its sum of weighted values, whose total stays 1.
    void take_up(int i, real lse) {
        load_row<DV>(out + here->out_offset[i], P.out_layout.channel, o + i * VP);
        if (!SOFTMAX) total[i] = 1;
        if (lse == -INF) return;
        maximum[i] = PLAIN_SCORE ? lse * LOG2E : lse;
        total[i] = 1;
    }
    template <class T> static INLINE T* corner(T* data, const Layout& t, int64_t b, int64_t h) { return data + b * t.batch + h * t.head; }
    // `here` for one (batch, head). Looks ahead to `next` for another one, or not.
    void run(int64_t b, int64_t h, bool more, int64_t next_b, int64_t next_h) {
        Tile& tile = here->tile;
        Keys& keys = here->keys;
        tile.look_at(P, b, h);
        numbers = numbers_of(P, tile);
        out = corner(P.out, P.out_layout, b, h);
        const element* q_corner = corner(P.q, P.q_layout, b, h);
        real* lse = corner(P.lse, P.lse_layout, b, h);
        for (int i = 0; i < tile.queries; i++) {
            const element* row = q_corner + here->q_offset[i];
            if (WORD * sizeof(element) == sizeof(real) && D % WORD == 0 && P.q_layout.channel == 1 && P.scale > 0) q_row[i] = (const real*)row;
            else {
                load_query_words(P, row, q + i * DP);
                q_row[i] = q + i * DP;
            }
            maximum[i] = LOWEST; total[i] = 0; started[i] = P.continues;
            if (P.continues) take_up(i, lse[here->lse_offset[i]]);
        }
        const int64_t chunks = tile.chunks(P), kv = tile.kv_head, group = P.heads / P.kv_heads;
        const element *k_corner = corner(P.k, P.k_layout, b, kv), *v_corner = corner(P.v, P.v_layout, b, kv);
        ahead = {next, corner(P.q, P.q_layout, next_b, next_h), corner(P.k, P.k_layout, next_b, next_h / group),
                 corner(P.v, P.v_layout, next_b, next_h / group), corner(P.out, P.out_layout, next_b, next_h),
                 0, 0, more ? next->tile.queries : 0, more ? next->keys.count : 0, 0};
        ahead.pace = (max(ahead.queries, ahead.keys) * ROWS + tile.queries - 1) / tile.queries;
        for (int64_t n = 0; n < chunks; n++) {
            if (keys.chunk != n) keys.aim(P, tile, n);
            keys.look_at(P, tile);
            odd = keys.count % L;
            if (odd > 2 || keys.count < L || D % (WORD * L) || ROWS > L || !USES_SCORE || !tile.uniform || RESIDUAL || PADDED || tile.prefix || keys.prefix) odd = 0;
            for (int t = 0; t < odd; t++) load_words<D>(k_corner + keys.k_offset[keys.count - odd + t], P.k_layout.channel, odd_keys + t * QP);
            keys.pack_words<D>(k_corner, P.k_layout.channel, keys.k_offset, P.pad_k + kv * P.pad_k_head, k, panels, odd);
            keys.gather_words<DV>(v_corner, P.v_layout.channel, keys.v_offset, P.pad_v + kv * P.pad_v_head, v);
            masks.aim(tile, keys);
            loads.aim(P, numbers, tile, keys, nullptr);
            for (int i = 0, m; i < tile.queries; i += m) {
                m = share(tile.queries - i, ROWS);
                rows(i, m, n + 1 == chunks);
                if (n + 1 == chunks) look_ahead();
            }
        }
        // log-sum-exp of L queries at a time; a row without keys has -inf, one with a NaN keeps it
        for (int i = tile.queries; i < up(tile.queries, L); i++) { maximum[i] = 0; total[i] = 1; }
        for (int i = 0; i < tile.queries; i += L) {
            const V sums = load(total + i), most = load(maximum + i);
            const V logs = PLAIN_SCORE ? (most + log2(sums)) * splat(LN2) : most + log2(sums) * splat(LN2);
            store(log_sum + i, select(sums > V{}, logs, select(sums <= V{}, splat(-INF), sums)));
        }
        for (int i = 0; i < tile.queries; i++) {
            if (total[i] <= 0) for (int d = 0; d < DV; d++) out[here->out_offset[i] + d * P.out_layout.channel] = put(0);
            lse[here->lse_offset[i]] = SOFTMAX ? log_sum[i] : -INF;
        }
    }
};
extern "C" bool attend_forward(const Problem* problem) {
    const Problem& P = *problem;
    int64_t tiles = 1;
    for (int a = 0; a < RANK; a++) tiles *= P.axes[a].pieces;
    const int64_t all = tiles + (P.q_prefix + TILE - 1) / TILE, items = P.batch * P.heads * all;
#pragma omp parallel num_threads(P.threads)
    {
        static thread_local Arena arena;
        Forward work(P, arena);
        const int64_t n = omp_get_num_threads(), me = omp_get_thread_num(), stop = items * (me + 1) / n;
        int64_t b, h, tile, item = items * me / n;
        if (item < stop) {
            work.loads.order.item(P, P.heads, item, all, b, h, tile);
            work.here->aim(P, tile, tiles);
        }
        for (; item < stop; item++) {
            const bool more = item + 1 < stop;
            int64_t next_b = b, next_h = h, next_tile = tile;
            if (more) work.loads.order.item(P, P.heads, item + 1, all, next_b, next_h, next_tile);
            Aimed *const here = work.here, *const other = here == work.aimed ? work.aimed + 1 : work.aimed;
            work.next = next_tile == here->number ? here : other;
            if (work.next->number != next_tile) work.next->aim(P, next_tile, tiles);
            work.run(b, h, more, next_b, next_h);
            work.here = work.next;
            b = next_b; h = next_h;
        }
    }
    return true;
}

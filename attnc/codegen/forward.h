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
// (Not a static of the class: that would be one for all libraries of a process, whatever their `real` is.)
constexpr real ONES[ROWS] = {1, 1, 1, 1, 1, 1};
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
    alignas(REGISTER) real odd_scores[2][BATCH];    // theirs with the queries at hand
    int batch;              // the first query whose scores are at hand
    element* out;
    static constexpr int64_t STRIDE = CHUNK + L;      // of rows of scores: a power of two would make stores look like later loads
    bool* started;
    const real** q_row;     // [queries] where their channels lie

    explicit Forward(const Problem& P, Arena& arena) : P(P), loads(P) {
        arena.reserve(2 * Aimed::bytes() + Masks::bytes() + loads.bytes(false) + 64 * 16 + TILE * 33
                      + sizeof(real) * (TILE * (DP + VP) + 3 * (TILE + BATCH) + CHUNK * (2 * DP + VP) + BATCH * STRIDE) + 8 * BATCH);
        aimed[0].allocate(arena); aimed[1].allocate(arena);
        loads.allocate(arena, false);
        masks.rows = arena.take<real>(Masks::MOST * CHUNK);
        q = arena.take<real>(TILE * DP); o = arena.take<real>(TILE * VP);
        for (real** p : {&maximum, &total, &log_sum}) *p = arena.take<real>(TILE + BATCH);
        started = arena.take<bool>(TILE); q_row = arena.take<const real*>(TILE + BATCH);
        k = arena.take<real>(CHUNK * DP); panels.data = arena.take<real>(CHUNK * DP); v = arena.take<real>(CHUNK * VP);
        scores = arena.take<real>(BATCH * STRIDE);
    }
    INLINE real* scores_of(int i) const { return scores + (i - batch) * STRIDE; }

    // q . k of queries i .. i + M - 1 and N vectors of keys from key j on (b: the vectors in their panel, b_row apart), to `scores`.
    // finished: as scores, with their maxima per lane; all queries see all these keys.
    template <int M, int N>
    __attribute__((noinline)) void score_block(bool finished, int i, int j, const real* b, int64_t b_row, const real* const (*elements)[LOADS + 1], V* best) const {
        constexpr int parts = WORD > 1 ? 1 : (D + 63) / 64, most = (QW + parts - 1) / parts;     // sums are cut, so that their error does not grow
        real* row = scores_of(i) + j;
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
            UNROLL for (int r = 0; r < M; r++) {
                const real* mine[LOADS + 1];        // (copies: a store of scores might change the members)
                UNROLL for (int l = 0; l < LOADS; l++) mine[l] = elements[r][l];
                V most = best[r];
                UNROLL for (int n = 0; n < N; n++) {
                    V x = s[r][n];
                    if constexpr (!PLAIN_SCORE) x = score(P, numbers, here->tile.terms[i + r], here->keys.terms, mine, j + n * L, x);
                    if (n == N - 1) x = select(inside, x, splat(-INF));
                    most = larger(most, x);
                    store(row + r * STRIDE + n * L, x);
                }
                best[r] = most;
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
    void score_rows(bool finished, int m, int n, int i, int j, const real* b, int64_t b_row, const real* const (*elements)[LOADS + 1], V* best) const {
        switch (m) {
            case 1: return score_rows<1>(finished, n, i, j, b, b_row, elements, best);
            case 2: return score_rows<2>(finished, n, i, j, b, b_row, elements, best);
            case 3: return score_rows<3>(finished, n, i, j, b, b_row, elements, best);
            case 4: return score_rows<4>(finished, n, i, j, b, b_row, elements, best);
            case 5: if constexpr (ROWS > 4) return score_rows<5>(finished, n, i, j, b, b_row, elements, best); break;
            default: if constexpr (ROWS > 5) return score_rows<6>(finished, n, i, j, b, b_row, elements, best);
        }
    }
    // Scores of the one or two keys after the last whole vector, which a vector of their own would mostly waste: sums over lanes of
    // channels, of m queries from i on, to `odd_scores`, where lanes are queries.
    __attribute__((noinline)) void score_odd(int i, int m, const real* const (*elements)[LOADS + 1]) {
        const Numbers numbers = this->numbers;
        const int j = here->keys.count - odd;
        for (int g = 0; g < m; g += L) {
            for (int t = 0; t < odd; t++) {
                V s[L];
                UNROLL for (int r = 0; r < L; r++) s[r] = V{};
                for (int d = 0; d < QP; d += L) {
                    const V y = load(odd_keys + t * QP + d);
                    UNROLL for (int r = 0; r < L; r++) s[r] = multiply_add(d + L <= QW ? load(q_row[i + g + r] + d) : load_first<QW - (QW - 1) / L * L>(q_row[i + g + r] + d), y, s[r]);
                }
                store(odd_scores[t] + g, fold_rows<L>(s, [](V a, V b) { return a + b; }));
            }
            if constexpr (!PLAIN_SCORE) for (int r = g; r < min(g + L, m); r++) {
                V x = splat(odd_scores[0][r]);
                if (odd > 1) x = select(lanes() < splat_integer(1), x, splat(odd_scores[1][r]));
                x = score(P, numbers, here->tile.terms[i + r], here->keys.terms, elements[r], j, x);
                for (int t = 0; t < odd; t++) odd_scores[t][r] = x[t];
            }
        }
    }
    // The weights of these keys, of queries in lanes from r of the batch on, added to their sums and put into their rows.
    INLINE V weigh_odd(int r, int m, V shift, V unit, V sum) {
        const int j = here->keys.count - odd;
        for (int t = 0; t < odd; t++) {
            const V e = exp2_vector(exponent(load(odd_scores[t] + r), shift, unit));
            sum += e;
            for (int l = 0; l < min(m - r, L); l++) {
                real* const row = scores + (r + l) * STRIDE;
                if constexpr (WORD == 1) row[j + t] = e[l];
                else { element* const to = (element*)row + j; to[t] = put(e[l]); if (odd == 1) to[1] = 0; }
            }
        }
        return sum;
    }
    // Products in `scores` of queries i .. i + m - 1 and the keys [from, to) become scores, -inf where a query does not see a key.
    __attribute__((noinline)) void check_rows(int i, int m, int from, int to, bool plain, const real* const (*elements)[LOADS + 1], V* best) const {
        const Tile& tile = here->tile;
        const Keys& keys = here->keys;
        bool axes = false;
        for (int a = 0; a < RANK; a++) axes |= tile.checked[a] && !keys.prefix;
        for (int r = 0; r < m; r++) {
            real* const products = scores_of(i + r);
            const real* row = masks.row(i + r);
            const Run run = run_of(tile, keys, i + r);
            const bool always = (tile.asks() && !plain) || (axes && !row);
            for (int j = from; j < to; j += L) {
                V x = load(products + j);
                if constexpr (!PLAIN_SCORE) x = plain ? x * splat(numbers.scale) : score(P, numbers, tile.terms[i + r], keys.terms, elements[r], j, x);
                if (row) x += load(row + j);
                if (always || j < run.begin || j + L > run.end) x = select(visible(P, numbers, tile, keys, run, i + r, j, plain), x, splat(-INF));
                best[r] = larger(best[r], x);
                store(products + j, x);
            }
        }
    }
    // N vectors of output of M queries, from vector `at` on: o = o * before + weights * values; where `after` is given they are finished
    // and written times that. Where the row ends within the first half of its last vector, SHORT, that is half as long.
    template <int M, int N, bool SHORT>
    __attribute__((noinline)) void value_block(int i, int at, Run run, const real* before, const real* after) {
        constexpr int W = N - SHORT, T = SHORT ? L / 2 : 1;
        V sum[M][N];
        Lanes<T> tail[M];
        real* rows = o + i * VP + at * L;
        UNROLL for (int r = 0; r < M; r++) {
            UNROLL for (int n = 0; n < W; n++) sum[r][n] = V{};
            tail[r] = Lanes<T>{};
        }
        const int first = run.begin / WORD, end = words(run.end);
        const real *weight = scores_of(i) + first, *value = v + first * VP + at * L;
        for (int t = first; t < end; t++, weight++, value += VP) {
            V x[N];
            Lanes<T> x_tail;
            UNROLL for (int n = 0; n < W; n++) x[n] = load(value + n * L);
            if constexpr (SHORT) x_tail = load_first<T, T>(value + W * L);
            UNROLL for (int r = 0; r < M; r++) {
                const V y = splat_word(weight + r * STRIDE);
                UNROLL for (int n = 0; n < W; n++) sum[r][n] = multiply_add(y, x[n], sum[r][n]);
                if constexpr (SHORT) tail[r] += (weight[r * STRIDE] - Lanes<T>{}) * x_tail;
            }
        }
        if constexpr (SHORT) UNROLL for (int r = 0; r < M; r++) sum[r][W] = joined<L>(tail[r], Lanes<L / 2>{});
        if (before) UNROLL for (int r = 0; r < M; r++) UNROLL for (int n = 0; n < N; n++) sum[r][n] += load(rows + r * VP + n * L) * splat(before[r]);
        if (after) UNROLL for (int r = 0; r < M; r++) {
            element* to = out + here->out_offset[i + r];
            UNROLL for (int n = 0; n < N; n++) store_part<DV>(to, (at + n) * L, sum[r][n] * splat(after[r]));
        } else UNROLL for (int r = 0; r < M; r++) UNROLL for (int n = 0; n < N; n++) store(rows + r * VP + n * L, sum[r][n]);
    }
    template <int M, int AT = 0> INLINE void value_rows(int i, Run run, const real* before, const real* after) {
        constexpr int N = share(VP / L - AT, COLUMNS);
        constexpr bool ends = AT + N == VP / L;
        value_block<M, N, ends && half_of_last<DV> && WORD == 1>(i, AT, run, before, after);
        if constexpr (!ends) value_rows<M, AT + N>(i, run, before, after);
    }
    void value_rows(int m, int i, Run run, const real* before, const real* after) {
        switch (m) {
            case 1: return value_rows<1>(i, run, before, after);
            case 2: return value_rows<2>(i, run, before, after);
            case 3: return value_rows<3>(i, run, before, after);
            case 4: return value_rows<4>(i, run, before, after);
            case 5: if constexpr (ROWS > 4) return value_rows<5>(i, run, before, after); break;
            default: if constexpr (ROWS > 5) return value_rows<6>(i, run, before, after);
        }
    }
    // What m queries from i on see of the chunk: keys that any of them sees, that all see; whether more than these ends is to be checked.
    struct Sight {
        Run run, clear;
        bool check, plain;
    };
    __attribute__((noinline)) Sight sight_of(int i, int m) const {
        const Tile& tile = here->tile;
        const Keys& keys = here->keys;
        Sight s{run_of(tile, keys, i), run_of(tile, keys, i), false, tile.prefix || keys.prefix};
        if (!tile.uniform) {
            s.run = run_of_rows(tile, keys, i, m);
            for (int r = 1; r < m; r++) {
                const Run x = run_of(tile, keys, i + r);
                s.clear = {max(s.clear.begin, x.begin), min(s.clear.end, x.end)};
            }
        }
        s.check = s.plain ? !PLAIN_SCORE : tile.asks() || !USES_SCORE;
        for (int a = 0; a < RANK; a++) s.check |= tile.checked[a] && !keys.prefix;
@LISTS@        if (keys.full) s.check = !USES_SCORE;
        return s;
    }
    // Products of m queries from i on, a block, with the vectors of keys that they see, and what follows from them.
    void score_panels(int i, int m, const Sight& sight, const real* const (*elements)[LOADS + 1], V* best) const {
        const int first = sight.run.begin / L, end = (sight.run.end + L - 1) / L;
        for (int p = 0; p < panels.count; p++) {
            const int begin = panels.first(p), x = max(begin, first), y = min(panels.first(p + 1), end);
            if (x >= y) continue;
            const real* b = panels.data + begin * L * QW + (x - begin) * L;
            const int64_t width = (panels.first(p + 1) - begin) * L;
            const bool checked = sight.check || x * L < sight.clear.begin || min(y * L, here->keys.count) > sight.clear.end;
            if (USES_SCORE || sight.plain) score_rows(!checked, m, y - x, i, x * L, b, width, elements, best);
            else for (int r = 0; r < m; r++) memset(scores_of(i + r) + x * L, 0, sizeof(real) * (y - x) * L);
            if (checked) check_rows(i, m, x * L, y * L, sight.plain, elements, best);
        }
    }
    // m <= BATCH queries from i on against the packed chunk, in steps that each go over all of them: what one step leaves, the next
    // finds ready. last: no more chunks follow.
    __attribute__((noinline)) void rows(int i, int m, bool last) {
        const V unit = unit_of(numbers);
        const auto bigger = [](V a, V b) { return larger(a, b); };
        const auto plus = [](V a, V b) { return a + b; };
        Sight sights[BATCH];                // of the block that starts at this row
        const real* elements[BATCH][LOADS + 1];
        V fold[BATCH];                      // per row, over its lanes: the largest score, then the sum
        alignas(REGISTER) real factor[BATCH], inverse[BATCH];
        batch = i;
        for (int r = 0; r < up(m, L); r++) fold[r] = splat(LOWEST);
        for (int r = 0, n; r < m; r += n) {
            n = share(m - r, ROWS);
            const Sight& sight = sights[r] = sight_of(i + r, n);
            if (LOADS && !sight.plain) for (int t = r; t < r + n; t++)
                loads.rows(P, numbers, here->tile, here->keys, i + t, t, sight.run.begin / L * L, up(sight.run.end, L), elements[t]);
            score_panels(i + r, n, sight, elements + r, fold + r);
            if (last) look_ahead();
        }
        if (odd) score_odd(i, m, elements);
        for (int g = 0; g < m; g += L) {
            V top = fold_rows<L>((const V(&)[L])fold[g], bigger);
            for (int t = 0; t < odd; t++) top = larger(top, load(odd_scores[t] + g));
            const V old = load(maximum + i + g);
            const V now = larger(old, PLAIN_SCORE ? top * splat(numbers.scale_log2e) : top);
            if constexpr (SOFTMAX) store(factor + g, exp2_vector((old - now) * splat(PLAIN_SCORE ? 1 : LOG2E)));
            store(maximum + i + g, select(lanes() < splat_integer(m - g), now, old));
        }
        for (int r = 0, n; r < m; r += n) {
            n = share(m - r, ROWS);
            const Sight& sight = sights[r];
            const int from = sight.run.begin / L * L, to = odd ? here->keys.count - odd : up(sight.run.end, L);
            const bool plain = sight.plain;
            for (int t = r; t < r + n; t++) {
                real* const row = scores_of(i + t);
                const V shift = splat(maximum[i + t]);
                V sum{};
                for (int j = from; j < to; j += L) {
                    V e;
                    if constexpr (SOFTMAX) e = exp2_vector(exponent(load(row + j), shift, unit));
                    else e = weight_of(natural(load(row + j), numbers));
                    sum += e;
                    if (POST && !plain) e *= post(P, numbers, here->tile.terms[i + t], here->keys.terms, elements[t], j);
@DROPOUT@                    e *= dropout(P, numbers, here->tile.terms[i + t], here->keys.terms, j);
                    store_weights(row, j, e);
                }
                fold[t] = sum;
            }
        }
        for (int g = 0; g < m; g += L) {
            const V old = load(total + i + g);
            V sum = splat(1);
            if constexpr (SOFTMAX) sum = weigh_odd(g, m, load(maximum + i + g), unit, fold_rows<L>((const V(&)[L])fold[g], plus) + old * load(factor + g));
            store(inverse + g, select(sum > V{}, splat(1) / sum, select(sum <= V{}, V{}, sum)));      // 0 of no weights, NaN of a NaN
            store(total + i + g, select(lanes() < splat_integer(m - g), sum, old));
            if constexpr (!SOFTMAX) store(factor + g, splat(1));
        }
        const bool direct = last && P.out_layout.channel == 1;
        constexpr int longest = WORD > 1 ? CHUNK : LONGEST_SUM;         // sums are cut here, too
        for (int r = 0, n; r < m; r += n) {
            n = share(m - r, ROWS);
            const Run run = sights[r].run;
            const bool more = started[i + r], some = run.begin < run.end;       // (rows of a block start together)
            for (int t = run.begin / WORD * WORD; t < run.end; t += longest) {
                const int stop = min(t + longest, run.end);
                const real* before = t > run.begin ? ONES : more ? factor + r : nullptr;
                value_rows(n, i + r, {t, stop}, before, direct && stop == run.end ? inverse + r : nullptr);
            }
            for (int t = r; t < r + n; t++) started[i + t] |= some;
            if (last && (some ? !direct : more)) finish(i + r, n);
            if (last) look_ahead();
        }
    }
    // Queries whose last chunk has been, from `o`.
    void finish(int i, int m) {
        for (int r = i; r < i + m; r++) {
            const real all = total[r];
            store_row<DV>(out + here->out_offset[r], P.out_layout.channel, o + r * VP, all > 0 ? 1 / all : all <= 0 ? 0 : all);
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
        real* lse = P.lse ? corner(P.lse, P.lse_layout, b, h) : nullptr;
        for (int i = 0; i < tile.queries; i++) {
            const element* row = q_corner + here->q_offset[i];
            if (!UNIT_Q && WORD * sizeof(element) == sizeof(real) && D % WORD == 0 && P.q_layout.channel == 1 && P.scale > 0) q_row[i] = (const real*)row;
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
        ahead.pace = (max(ahead.queries, ahead.keys) * ROWS + 2 * tile.queries - 1) / (2 * tile.queries);     // (twice for each block)
        for (int i = tile.queries; i < tile.queries + BATCH; i++) q_row[i] = q_row[tile.queries - 1];
        for (int64_t n = 0; n < chunks; n++) {
            if (keys.chunk != n) keys.aim(P, tile, n);
            keys.look_at(P, tile);
            odd = keys.count % L;
            if (odd > 2 || keys.count < L || D % WORD || !SOFTMAX || POST || !USES_SCORE || !tile.uniform || tile.asks() || PADDED || tile.prefix || keys.prefix) odd = 0;
@DROPOUT@            odd = 0;
            for (int t = 0; t < odd; t++) keys.load_key(k_corner + keys.k_offset[keys.count - odd + t], P.k_layout.channel, odd_keys + t * QP);
            keys.pack_words(k_corner, P.k_layout.channel, keys.k_offset, P.pad_k + kv * P.pad_k_head, k, panels, odd);
            keys.gather_words<DV>(v_corner, P.v_layout.channel, keys.v_offset, P.pad_v + kv * P.pad_v_head, v);
            masks.aim(tile, keys);
            loads.aim(P, numbers, tile, keys, nullptr);
            for (int i = 0, m; i < tile.queries; i += m) {
                m = min<int>(share(tile.queries - i, ROWS) * (BATCH / ROWS), tile.queries - i);     // whole blocks of rows
                rows(i, m, n + 1 == chunks);
            }
        }
        for (int i = 0; i < tile.queries; i++)
            if (total[i] <= 0 || !started[i]) for (int d = 0; d < DV; d++) out[here->out_offset[i] + d * P.out_layout.channel] = put(0);
        if (!lse) return;
        // log-sum-exp of L queries at a time; a row without keys has -inf, one with a NaN keeps it
        for (int i = tile.queries; i < up(tile.queries, L); i++) { maximum[i] = 0; total[i] = 1; }
        for (int i = 0; i < tile.queries; i += L) {
            const V sums = load(total + i), most = load(maximum + i);
            const V logs = PLAIN_SCORE ? (most + log2(sums)) * splat(LN2) : most + log2(sums) * splat(LN2);
            store(log_sum + i, select(sums > V{}, logs, select(sums <= V{}, splat(-INF), sums)));
        }
        for (int i = 0; i < tile.queries; i++) lse[here->lse_offset[i]] = SOFTMAX ? log_sum[i] : -INF;
    }
};
// Items for the thread that asks, in runs that get shorter: one that begins late or is held up leaves its share to the others.
struct Supply {
    const int64_t items, threads;
    int64_t next = 0;
    bool take(int64_t& item, int64_t& stop) {
#pragma omp critical
        {
            item = next;
            next = stop = threads == 1 ? items : min(items, next + (items - next) / (2 * threads) + 1);
        }
        return item < stop;
    }
};
extern "C" bool attend_forward(const Problem* problem) {
    const Problem& P = *problem;
    int64_t tiles = 1;
    for (int a = 0; a < RANK; a++) tiles *= P.axes[a].pieces;
    const int64_t all = tiles + (P.q_prefix + TILE - 1) / TILE;
    Supply supply{P.batch * P.heads * all, min(P.threads, P.batch * P.heads * all)};
#pragma omp parallel num_threads(supply.threads)
    {
        static thread_local Arena arena;
        Forward work(P, arena);
        const Order& order = work.loads.order;
        for (int64_t item, stop; supply.take(item, stop);) {
            int64_t b, h, tile;
            order.item(P, P.heads, item, all, b, h, tile);
            if (work.here->number != tile) work.here->aim(P, tile, tiles);
            for (; item < stop; item++) {
                const bool more = item + 1 < stop;
                int64_t next_b = b, next_h = h, next_tile = tile;
                if (more) order.item(P, P.heads, item + 1, all, next_b, next_h, next_tile);
                Aimed *const here = work.here, *const other = here == work.aimed ? work.aimed + 1 : work.aimed;
                work.next = next_tile == here->number ? here : other;
                if (work.next->number != next_tile) work.next->aim(P, next_tile, tiles);
                work.run(b, h, more, next_b, next_h);
                work.here = work.next;
                b = next_b; h = next_h; tile = next_tile;
            }
        }
    }
    return true;
}

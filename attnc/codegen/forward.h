// ---- forward: softmax in one pass over the key chunks, with a running maximum and sum per query -----------------------------------
struct Aimed {              // a tile, its first chunk of keys, and where its rows lie
    Tile tile;
    Keys keys;
    int64_t *q_offset, *out_offset, *lse_offset, prefix_from;
    static size_t bytes() { return Tile::bytes() + Keys::bytes() + 3 * (TILE * 8 + 64); }
    void allocate(Arena& arena) {
        tile.allocate(arena); keys.allocate(arena);
        for (int64_t** p : {&q_offset, &out_offset, &lse_offset}) *p = arena.take<int64_t>(TILE);
    }
    // item number `item` of the call
    void aim(const Problem& P, int64_t item, int64_t tiles, int64_t all) {
        int64_t t = item % all, rest = item / all;
        const int64_t b = HEADS_FIRST ? rest % P.batch : rest / P.heads, h = HEADS_FIRST ? rest / P.batch : rest % P.heads;
        prefix_from = 0;
        if (t < tiles) {
            int64_t piece[RANK];
            for (int a = RANK - 1; a >= 0; t /= P.axes[a].pieces, a--) piece[a] = t % P.axes[a].pieces;
            tile.aim(P, b, h, piece);
        } else {
            prefix_from = (t - tiles) * TILE;
            tile.aim_prefix(P, b, h, prefix_from, min(P.q_prefix, prefix_from + TILE));
        }
        tile.place(P, P.q_layout, prefix_from, q_offset);
        tile.place(P, P.out_layout, prefix_from, out_offset);
        tile.place(P, P.lse_layout, prefix_from, lse_offset);
        keys.count = 0;
        if (tile.chunks(P)) keys.aim(P, tile, 0);
    }
};
struct Forward {
    const Problem& P;
    Aimed here, next;
    Tile& tile = here.tile;
    Keys& keys = here.keys;
    Loads loads;
    Masks masks;
    Expansion expansions[LOADS + 1];
    Numbers numbers;
    Panels panels;
    real *q, *k, *v, *scores, *o, *maximum, *total, *log_sum;
    bool* started;
    int next_query, next_key, next_queries, next_keys, pace;       // what of the next tile was prefetched; rows per block

    explicit Forward(const Problem& P, Arena& arena) : P(P) {
        arena.reserve(2 * Aimed::bytes() + Masks::bytes() + LOADS * Expansion::bytes(false) + 64 * 16 + TILE * 25
                      + sizeof(real) * (TILE * (DP + VP + 3) + 3 * L + CHUNK * (2 * DP + VP + ROWS + LOADS * ROWS)));
        here.allocate(arena); next.allocate(arena);
        for (int l = 0; l < LOADS; l++) expansions[l].allocate(arena, false);
        loads.expansion = expansions;
        masks.rows = arena.take<real>(Masks::MOST * CHUNK);
        loads.spare = arena.take<real>(LOADS * ROWS * CHUNK);
        q = arena.take<real>(TILE * DP); o = arena.take<real>(TILE * VP);
        for (real** p : {&maximum, &total, &log_sum}) *p = arena.take<real>(TILE + L);
        started = arena.take<bool>(TILE);
        k = arena.take<real>(CHUNK * DP); panels.data = arena.take<real>(CHUNK * DP); v = arena.take<real>(CHUNK * VP);
        scores = arena.take<real>(ROWS * CHUNK);
    }

    // Scores of one query over the keys [from, to), in place. Gives their maximum.
    template <bool PLAIN> INLINE real row_scores(real* row, int i, int r, int from, int to) {
        const real* elements[LOADS + 1];
        if (!PLAIN) loads.rows(P, numbers, tile, keys, i, r, from, to, elements);
        V best = splat(LOWEST);
        each_score<PLAIN>(P, numbers, tile, keys, masks, elements, row, i, from, to, [&](int j, V, V x, bool masked) __attribute__((always_inline)) {
            best = larger(best, x);
            if (!PLAIN_SCORE || masked) store(row + j, x);
        });
        return PLAIN_SCORE ? largest(best) * numbers.scale_log2e : largest(best);
    }
    // m queries from i on against the packed chunk
    void rows(int i, int m) {
        const Run run = run_of_rows(tile, keys, i, m);
        if (run.begin >= run.end) return;
        real *const rows = scores, *const out = o + i * VP, *const best = maximum + i, *const sums = total + i;
        const int first = run.begin / L, last = (run.end + L - 1) / L, from = first * L, to = last * L;
        const bool plain = tile.prefix || keys.prefix;
        if (USES_SCORE || plain) multiply_panels<D>(m, q + i * DP, panels, first, last, rows, CHUNK);
        else memset(rows, 0, sizeof(real) * m * CHUNK);
        real now[ROWS];
        for (int r = 0; r < m; r++) {
            now[r] = PLAIN_SCORE || plain ? row_scores<true>(rows + r * CHUNK, i + r, r, from, to) : row_scores<false>(rows + r * CHUNK, i + r, r, from, to);
            now[r] = max(best[r], now[r]);
        }
        const V unit = unit_of(numbers);
        V sum_of[ROWS];
        for (int r = 0; r < m; r++) {
            real* row = rows + r * CHUNK;
            V added{};
            const V shift = splat(now[r]);
            for (int j = from; j < to; j += L) {
                const V e = exp2_vector(exponent(load(row + j), shift, unit));
                added += e;
                store(row + j, e);
            }
            sum_of[r] = added;
        }
        if (POST && !plain) for (int r = 0; r < m; r++) {
            real* row = rows + r * CHUNK;
            const real* elements[LOADS + 1];
            loads.rows(P, numbers, tile, keys, i + r, r, from, to, elements);
            for (int j = from; j < to; j += L) store(row + j, load(row + j) * post(P, numbers, tile.terms[i + r], keys.terms, elements, j));
        }
        const bool more = started[i];       // (rows of a block start together)
        for (int r = 0; r < m; r++) {
            real factor = 0;
            if (more) {
                factor = exp2_vector(splat((best[r] - now[r]) * (PLAIN_SCORE ? 1 : LOG2E)))[0];
                for (int d = 0; d < VP; d += L) store(out + r * VP + d, load(out + r * VP + d) * splat(factor));
            }
            sums[r] = sums[r] * factor + sum(sum_of[r]);
            best[r] = now[r];
            started[i + r] = true;
        }
        multiply<DV>(m, {rows + run.begin, CHUNK, 1}, run.end - run.begin, v + run.begin * VP, out, more);
    }
    // A few rows of the next tile at a time: all at once would fill the line buffers.
    INLINE void look_ahead() {
        for (int n = 0; n < pace && next_query < next_queries; n++, next_query++) {
            prefetch<D>(P.q + next.q_offset[next_query], P.q_layout.channel);
            prefetch_for_writing<DV>(P.out + next.out_offset[next_query], P.out_layout.channel);
        }
        const element *next_k = P.k + next.tile.batch * P.k_layout.batch + next.tile.kv_head * P.k_layout.head;
        const element *next_v = P.v + next.tile.batch * P.v_layout.batch + next.tile.kv_head * P.v_layout.head;
        for (int n = 0; n < pace && next_key < next_keys; n++, next_key++) {
            if (PADDED && !next.keys.real_key[next_key]) continue;
            prefetch<D>(next_k + next.keys.k_offset[next_key], P.k_layout.channel);
            prefetch<DV>(next_v + next.keys.v_offset[next_key], P.v_layout.channel);
        }
    }
    void run(bool more) {
        numbers = numbers_of(P, tile);
        for (int i = 0; i < tile.queries; i++) {
            load_query(P, P.q + here.q_offset[i], q + i * DP);
            maximum[i] = LOWEST; total[i] = 0; started[i] = false;
        }
        const int64_t chunks = tile.chunks(P), kv = tile.kv_head;
        next_query = next_key = 0;
        next_queries = more ? next.tile.queries : 0; next_keys = more ? next.keys.count : 0;
        pace = (max(next_queries, next_keys) * ROWS + tile.queries - 1) / tile.queries;
        for (int64_t n = 0; n < chunks; n++) {
            if (n) keys.aim(P, tile, n);
            keys.gather<D>(P.k + tile.batch * P.k_layout.batch + kv * P.k_layout.head, P.k_layout.channel, keys.k_offset, P.pad_k + kv * P.pad_k_head, k);
            keys.gather<DV>(P.v + tile.batch * P.v_layout.batch + kv * P.v_layout.head, P.v_layout.channel, keys.v_offset, P.pad_v + kv * P.pad_v_head, v);
            pack_panels<D>(panels, k, keys.count);
            masks.aim(tile, keys);
            loads.aim(P, tile, keys, nullptr);
            for (int i = 0, m; i < tile.queries; i += m) {
                m = share(tile.queries - i, ROWS);
                rows(i, m);
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
            const bool some = total[i] > 0;
            if (!started[i] || !some) for (int d = 0; d < VP; d++) o[i * VP + d] = 0;
            store_row<DV>(P.out + here.out_offset[i], P.out_layout.channel, o + i * VP, some ? 1 / total[i] : !(total[i] <= 0) ? total[i] : 0);
            P.lse[here.lse_offset[i]] = log_sum[i];
        }
    }
};
extern "C" void attend_forward(const Problem* problem) {
    const Problem& P = *problem;
#ifdef BAND
    if (band_forward(P)) return;
#endif
    int64_t tiles = 1;
    for (int a = 0; a < RANK; a++) tiles *= P.axes[a].pieces;
    const int64_t all = tiles + (P.q_prefix + TILE - 1) / TILE, items = P.batch * P.heads * all;
#pragma omp parallel num_threads(P.threads)
    {
        static thread_local Arena arena;
        Forward work(P, arena);
        const int64_t n = omp_get_num_threads(), me = omp_get_thread_num(), stop = items * (me + 1) / n;
        int64_t item = items * me / n;
        if (item < stop) work.next.aim(P, item, tiles, all);
        for (; item < stop; item++) {
            const Aimed now = work.here;
            work.here = work.next;
            work.next = now;
            if (item + 1 < stop) work.next.aim(P, item + 1, tiles, all);
            work.run(item + 1 < stop);
        }
    }
}

// ---- what a call is told; strides are in elements -----------------------------------------------------------------------------------
struct Layout { int64_t batch, head, channel, prefix, start, merged, axis[GRID]; };  // start: of the grid; prefix: step of prefix tokens
struct Axis {
    int64_t split, columns, queries_before, keys_before, real_keys, pieces, segments, owners;
    const int32_t *lo, *hi;      // [split][columns]: first and last key (index in the residue class) that a query sees
    const int32_t* piece;        // [pieces][3]: residue, first query, last query + 1 (indices in the class): the tiles' sides
    const int32_t* segment;      // [segments][5]: first piece, last + 1; the keys they see: first coordinate, step, count (backward)
    const int32_t* owner;        // [owners][2]: first segment, last + 1: segments whose keys overlap (backward)
@GAPS@    const int32_t *gap_lo, *gap_hi;   // [split][columns]: the keys between lo and hi that a query does not see, or null: none
@LISTS@    int64_t key_pieces;
@LISTS@    const int32_t* key_piece;    // [key_pieces][3]: as pieces, of keys: the blocks' sides
};
struct Table { const real* data; int64_t stride[TABLE_RANK], last; real* gradient; };
struct IntTable { const int32_t* data; int64_t stride[TABLE_RANK], last; };
struct Problem {
    int64_t batch, heads, kv_heads, q_prefix, k_prefix, threads;
    double scale;
    const element *q, *k, *v;
    element* out;
    real* lse;               // a forward may do without
    const element* grad_out;
    const real* grad_lse;
    element *dq, *dk, *dv;
    Layout q_layout, k_layout, v_layout, out_layout, lse_layout, grad_out_layout, grad_lse_layout, dq_layout, dk_layout, dv_layout;
    Axis axes[RANK];
    int64_t q_grid[GRID], k_grid[GRID];       // tokens
    int64_t q_size[GRID], k_size[GRID];       // lengths that expressions may mention
    const real *pad_k, *pad_v;                // rows of virtual keys
    int64_t pad_k_head, pad_v_head;
    int64_t sum_rows, whole, split;           // backward: rows of a segment's sums; one segment holds all keys; segments share keys
    int64_t continues;                        // forward: softmax goes on from what `out` and `lse` hold; backward: what is added to
                                              // what is there, 1: dq, 2: dk and dv
    real *pad_k_gradient, *pad_v_gradient;    // [kv_heads][D], [kv_heads][DV]
    Table tables[TABLES + 1];
    IntTable int_tables[INT_TABLES + 1];
@GAPS@    int64_t gaps;            // what the axes' gaps leave out is all that their intervals do not tell
@LISTS@    const int32_t *list_offset, *list_full, *list_block;   // blocks that each tile visits, the first list_full[tile] in full; or null: its box
};
constexpr int64_t DP = up(D, L), VP = up(DV, L);    // rows of tile buffers are whole vectors

// A box of tokens: on axis a the coordinates first + step * 0 .. extent - 1; tokens are counted row by row.
struct Box {
    int64_t first[RANK], step[RANK], extent[RANK], count;
    INLINE void close() { count = 1; for (int a = 0; a < RANK; a++) count *= extent[a]; }
    // f(n, index, length): runs along the last axis that make up the tokens [from, to)
    template <class F> INLINE void runs(int64_t from, int64_t to, F f) const {
        if (from >= to) return;      // an empty box has an axis without an extent
        int64_t index[RANK];
        for (int64_t a = RANK - 1, rest = from; a >= 0; rest /= extent[a], a--) index[a] = rest % extent[a];
        for (int64_t n = from; n < to;) {
            const int64_t length = min(extent[RANK - 1] - index[RANK - 1], to - n);
            f(n - from, index, length);
            n += length;
            index[RANK - 1] += length;
            for (int a = RANK - 1; a > 0 && index[a] == extent[a]; a--) { index[a] = 0; index[a - 1]++; }
        }
    }
};
// element offsets of the tokens [from, to) of a box
inline void offsets(const Layout& t, const Box& box, const int64_t* before, const int64_t* grid, int64_t from, int64_t to, int64_t* out) {
    box.runs(from, to, [&](int64_t n, const int64_t* index, int64_t length) {
        int64_t at[RANK];
        for (int a = 0; a < RANK; a++) at[a] = box.first[a] + box.step[a] * index[a] - before[a];
        if (RANK == GRID || t.merged) {
            int64_t base = t.start;
            for (int a = 0; a < RANK; a++) base += at[a] * t.axis[GRID - RANK + a];
            const int64_t step = box.step[RANK - 1] * t.axis[GRID - 1];
            for (int64_t i = 0; i < length; i++) out[n + i] = base + i * step;
        } else for (int64_t i = 0; i < length; i++) {      // a flat index on a grid whose rows do not follow each other
            int64_t rest = at[0] + i * box.step[0], place = t.start;
            for (int a = GRID - 1; a >= 0; rest /= grid[a], a--) place += rest % grid[a] * t.axis[a];
            out[n + i] = place;
        }
    });
}
inline void prefix_offsets(const Layout& t, int64_t from, int64_t to, int64_t* out) { for (int64_t i = from; i < to; i++) out[i - from] = i * t.prefix; }
// coordinates of the tokens on axis a: first + step * index
inline void coordinates(const Box& box, int a, int64_t first, int64_t step, int64_t from, int64_t to, integer* out) {
    box.runs(from, to, [&](int64_t n, const int64_t* index, int64_t length) {
        const int64_t base = first + step * index[a], more = a == RANK - 1 ? step : 0;
        for (int64_t i = 0; i < length; i++) out[n + i] = base + i * more;
    });
}

// An element of a table; an offset outside of it (of a pair that is not there) is moved inside.
INLINE real at(const Table& t, int64_t offset) { return t.data[min(max<int64_t>(offset, 0), t.last)]; }
INLINE integer at(const IntTable& t, int64_t offset) { return t.data[min(max<int64_t>(offset, 0), t.last)]; }
inline V at(const Table& t, I offset) { V x; for (int i = 0; i < L; i++) x[i] = at(t, offset[i]); return x; }
inline I at(const IntTable& t, I offset) { I x; for (int i = 0; i < L; i++) x[i] = at(t, offset[i]); return x; }

@SCORE@

// ---- one tile: a box of queries and the box of keys that they see ------------------------------------------------------------------
struct Tile {
    int64_t batch, head, kv_head;
    int queries;
    bool prefix;                 // the queries are prefix tokens
    Box q_box, k_box;
@GAPS@    Box rest;                    // the keys behind a gap: they follow those of k_box
@LISTS@    const int32_t* list;         // the blocks that it visits, or null: the box
@LISTS@    int64_t listed, listed_full;
    bool uniform;                // every query sees the whole box
    bool told;                   // the keys are boxes that each query sees wholly: nothing of the relation is left to ask
    bool checked[RANK];          // axes whose intervals are compared key by key
    int64_t key_index[RANK];     // index in the residue class of the box's first key
    int64_t *begin, *end;        // [queries] the run of keys (in box order) outside of which a query sees none
    integer *low[RANK], *high[RANK];
    QueryTerms* terms;
    int64_t* load_offset[LOADS + 1];
    int way[LOADS + 1], version[LOADS + 1];      // where its table elements are expanded: see Loads
@DROPOUT@    int64_t first_prefix;        // number of the first query, where queries are prefix tokens

    static size_t bytes() { return TILE * ((2 + LOADS) * 8 + sizeof(QueryTerms) + RANK * 2 * sizeof(integer)) + 64 * (5 + LOADS + 2 * RANK); }
    void allocate(Arena& arena) {
        begin = arena.take<int64_t>(TILE); end = arena.take<int64_t>(TILE);
        for (int a = 0; a < RANK; a++) { low[a] = arena.take<integer>(TILE); high[a] = arena.take<integer>(TILE); }
        terms = arena.take<QueryTerms>(TILE);
        for (int l = 0; l < LOADS; l++) load_offset[l] = arena.take<int64_t>(TILE);
    }
    // the product of these pieces, of any batch and head
    void aim(const Problem& P, const int64_t* piece) {
        prefix = told = false; uniform = true;
        int different = 0, lead = -1;
        const int32_t *lo[RANK], *hi[RANK];
        for (int a = 0; a < RANK; a++) {
            const Axis& x = P.axes[a];
            const int32_t* p = x.piece + 3 * piece[a];
            const int64_t r = p[0], from = p[1], to = p[2];
            lo[a] = x.lo + r * x.columns + from; hi[a] = x.hi + r * x.columns + from;
            const int64_t first = lo[a][0], last = hi[a][to - from - 1];
            q_box.first[a] = r + x.split * from; q_box.step[a] = x.split; q_box.extent[a] = to - from;
            k_box.first[a] = r + x.split * first; k_box.step[a] = x.split; k_box.extent[a] = max<int64_t>(last - first + 1, 0);
            key_index[a] = first;
            const bool same = lo[a][to - from - 1] == first && hi[a][0] == last;
            if (lead < 0 && k_box.extent[a] > 1) lead = a;
            checked[a] = !same;
            different += !same;
        }
        q_box.close(); k_box.close();
        queries = q_box.count;
        uniform = different == 0;
        if (lead < 0) lead = RANK - 1;
        int64_t inner = 1;
        for (int a = lead + 1; a < RANK; a++) inner *= k_box.extent[a];
        checked[lead] = false;      // its intervals are runs of keys
        q_box.runs(0, queries, [&](int64_t n, const int64_t* index, int64_t length) {
            for (int64_t i = 0; i < length; i++) {
                const int64_t at = index[lead] + (lead == RANK - 1 ? i : 0);
                begin[n + i] = (lo[lead][at] - key_index[lead]) * inner;
                end[n + i] = (hi[lead][at] + 1 - key_index[lead]) * inner;
            }
        });
        for (int a = 0; a < RANK; a++) if (checked[a]) q_box.runs(0, queries, [&](int64_t n, const int64_t* index, int64_t length) {
            for (int64_t i = 0; i < length; i++) { const int64_t at = index[a] + (a == RANK - 1 ? i : 0); low[a][n + i] = lo[a][at]; high[a][n + i] = hi[a][at]; }
        });
@GAPS@        rest.count = 0;
@GAPS@        if (P.gaps && uniform && !P.list_offset) leave_out(P, piece);
        for (int l = 0; l < LOADS; l++) version[l] = -1;
        if (!TERMS_BY_HEAD) find_terms(P, 0, 0);
@LISTS@        list = nullptr;
@LISTS@        if (P.list_offset) aim_list(P, piece);
    }
@LISTS@    void aim_list(const Problem& P, const int64_t* piece);
@GAPS@    // Where all queries leave out the same keys, of one axis, the keys are two boxes and nothing is left to ask.
@GAPS@    void leave_out(const Problem& P, const int64_t* piece) {
@GAPS@        int axis = -1;
@GAPS@        int64_t before = 0, behind = 0;
@GAPS@        for (int a = 0; a < RANK; a++) {
@GAPS@            const Axis& x = P.axes[a];
@GAPS@            if (!x.gap_lo) continue;
@GAPS@            const int32_t* p = x.piece + 3 * piece[a];
@GAPS@            const int32_t *lo = x.gap_lo + p[0] * x.columns + p[1], *hi = x.gap_hi + p[0] * x.columns + p[1];
@GAPS@            for (int i = 1; i < p[2] - p[1]; i++) if (lo[i] != lo[0] || hi[i] != hi[0]) return;
@GAPS@            const int64_t from = max<int64_t>(lo[0] - key_index[a], 0), to = min<int64_t>(hi[0] + 1 - key_index[a], k_box.extent[a]);
@GAPS@            if (from >= to) continue;
@GAPS@            if (axis >= 0) return;      // a frame of keys is left, not two boxes
@GAPS@            axis = a; before = from; behind = to;
@GAPS@        }
@GAPS@        told = true;
@GAPS@        if (axis < 0) return;
@GAPS@        rest = k_box;
@GAPS@        rest.first[axis] += rest.step[axis] * behind; rest.extent[axis] -= behind; rest.close();
@GAPS@        k_box.extent[axis] = before; k_box.close();
@GAPS@        for (int i = 0; i < queries; i++) { begin[i] = 0; end[i] = box_keys(); }
@GAPS@    }
    bool asks() const { return RESIDUAL && !told; }
    // keys besides prefix tokens; f(box, from, to, n): keys [from, to) of a box are the tile's from number `first` + n on
@BOXES@    int64_t box_keys() const { return k_box.count; }
@BOXES@    template <class F> INLINE void boxes(int64_t first, int64_t last, F f) const { f(k_box, first, last, 0); }
@GAPS@    int64_t box_keys() const { return k_box.count + rest.count; }
@GAPS@    template <class F> INLINE void boxes(int64_t first, int64_t last, F f) const {
@GAPS@        const int64_t middle = min(max(first, k_box.count), last);
@GAPS@        f(k_box, first, middle, 0);
@GAPS@        if (middle < last) f(rest, middle - k_box.count, last - k_box.count, middle - first);
@GAPS@    }
    // from here on the tile is of this batch and head
    void look_at(const Problem& P, int64_t b, int64_t h) {
        batch = b; head = h; kv_head = h / (P.heads / P.kv_heads);
        if (TERMS_BY_HEAD && !prefix) find_terms(P, b, h);
@DROPOUT@        if (prefix) for (int i = 0; i < queries; i++) {
@DROPOUT@            const integer index = first_prefix + i - P.q_prefix;
@DROPOUT@            prefix_query_terms(P, {.batch = b, .head = h}, &index, terms[i]);
@DROPOUT@        }
    }
    void find_terms(const Problem& P, int64_t b, int64_t h) {
        if (!QUERY_TERMS && !LOADS) return;
        const Numbers numbers{.batch = b, .head = h};
        q_box.runs(0, queries, [&](int64_t n, const int64_t* index, int64_t length) {
            integer c[RANK];
            for (int a = 0; a < RANK; a++) c[a] = q_box.first[a] + q_box.step[a] * index[a];
            for (int64_t i = 0; i < length; i++, c[RANK - 1] += q_box.step[RANK - 1]) {
                int64_t at[LOADS + 1];
                query_terms(P, numbers, c, terms[n + i], at);
                for (int l = 0; l < LOADS; l++) load_offset[l][n + i] = at[l];
            }
        });
    }
    // prefix tokens [from, to) as queries: they see every key but virtual ones
    void aim_prefix(const Problem& P, int64_t from, int64_t to) {
        prefix = uniform = told = true; queries = to - from;
@GAPS@        rest.count = 0;
@LISTS@        list = nullptr;
@DROPOUT@        first_prefix = from;
        for (int a = 0; a < RANK; a++) { k_box.first[a] = P.axes[a].keys_before; k_box.step[a] = 1; k_box.extent[a] = P.axes[a].real_keys; checked[a] = false; key_index[a] = 0; }
        k_box.close();
        for (int i = 0; i < queries; i++) { begin[i] = 0; end[i] = k_box.count; }
    }
    // offsets of the queries in one (batch, head) of a tensor
    void place(const Problem& P, const Layout& t, int64_t from, int64_t* out) const {
        int64_t before[RANK];
        for (int a = 0; a < RANK; a++) before[a] = P.axes[a].queries_before;
        if (prefix) prefix_offsets(t, from, from + queries, out);
        else offsets(t, q_box, before, P.q_grid, 0, queries, out);
    }
    // Chunks of keys: the prefix tokens, then the box, CHUNK keys at most each and a whole number of vectors but for the last.
    int64_t prefix_chunks(const Problem& P) const { return (P.k_prefix + CHUNK - 1) / CHUNK; }
    int64_t chunks(const Problem& P) const {
@LISTS@        if (list) return prefix_chunks(P) + listed;
        return prefix_chunks(P) + (box_keys() + CHUNK - 1) / CHUNK;
    }
};

// The scale's sign goes to q, so that a larger product always is a larger score; a scale of 0 makes q 0.
// A scale that `real` rounds to 0 would make NaN of the -inf of a pair that is not there; this one makes as little of a product.
constexpr double LEAST_SCALE = 1e-37;
INLINE Numbers numbers_of(const Problem& P, const Tile& t) {
    const double scale = P.scale == 0 ? 1 : max(P.scale < 0 ? -P.scale : P.scale, LEAST_SCALE);
    Numbers numbers{real(scale), real(scale * 1.4426950408889634), t.batch, t.head};
    head_terms(P, numbers);
    return numbers;
}
// A row of q or k divided by its length, rounded as the backward finds it.
INLINE void unit_row(real* row, real shortest) {
    V squares{};
    for (int d = 0; d < DP; d += L) { const V x = load(row + d); squares += x * x; }
    const real length = sqrt(sum(squares));
    const V divisor = splat(length < shortest ? shortest : length);
    element rounded[L];
    for (int d = 0; d < DP; d += L) {
        store_elements(rounded, load(row + d) / divisor);
        store(row + d, load_elements(rounded));
    }
}
INLINE void load_query(const Problem& P, const element* src, real* dst) {
    load_row<D>(src, P.q_layout.channel, dst);
    if constexpr (UNIT_Q) unit_row(dst, SHORTEST_Q);
    if (!(P.scale > 0)) for (int d = 0; d < D; d++) dst[d] = P.scale < 0 ? -dst[d] : 0;
}
// the same as words
INLINE void load_query_words(const Problem& P, const element* src, real* dst) {
    if constexpr (WORD == 1) return load_query(P, src, dst);
    if (P.scale > 0 && !UNIT_Q) return load_words<D>(src, P.q_layout.channel, dst);
    real row[DP];
    load_query(P, src, row);
    narrow_row<D>(row, dst);
}

// ---- one chunk of keys ----------------------------------------------------------------------------------------------------------------
struct Keys {
    int count;
    int64_t chunk;
    bool prefix;
@LISTS@    bool full;                   // every query of the tile sees every key
@LISTS@    Box box;                     // of a listed block
    int64_t begin, end;          // which keys of the box (or of the prefix)
    int64_t *k_offset, *v_offset;
    integer *index[RANK], *c[RANK];
    KeyTerms terms;
    int64_t* load_offset[LOADS + 1];
    bool* real_key;

    static size_t bytes() { return CHUNK * ((2 + LOADS) * 8 + 2 * RANK * sizeof(integer) + 1 + KEY_TERMS * sizeof(real)) + 64 * (4 + LOADS + 2 * RANK + KEY_TERMS); }
    void allocate(Arena& arena) {
        k_offset = arena.take<int64_t>(CHUNK); v_offset = arena.take<int64_t>(CHUNK);
        for (int a = 0; a < RANK; a++) { index[a] = arena.take<integer>(CHUNK); c[a] = arena.take<integer>(CHUNK); }
        terms.allocate(arena);
        for (int l = 0; l < LOADS; l++) load_offset[l] = arena.take<int64_t>(CHUNK);
        real_key = arena.take<bool>(CHUNK);
    }
    // chunk number `n` of a tile
    void aim(const Problem& P, const Tile& t, int64_t n) {
        chunk = n;
        const int64_t before_box = t.prefix_chunks(P);
        prefix = n < before_box;
@LISTS@        full = false;
@LISTS@        if (t.list && !prefix) return aim_block(P, t, n - before_box);
        const int64_t total = prefix ? P.k_prefix : t.box_keys(), parts = (total + CHUNK - 1) / CHUNK, part = prefix ? n : n - before_box;
        const int64_t vectors = (total + L - 1) / L;
        begin = vectors * part / parts * L; end = min(vectors * (part + 1) / parts * L, total); count = end - begin;
        int64_t key_before[RANK];
        for (int a = 0; a < RANK; a++) key_before[a] = P.axes[a].keys_before;
        if (prefix) {
            prefix_offsets(P.k_layout, begin, end, k_offset);
            prefix_offsets(P.v_layout, begin, end, v_offset);
        } else {
            t.boxes(begin, end, [&](const Box& box, int64_t from, int64_t to, int64_t n) {
                offsets(P.k_layout, box, key_before, P.k_grid, from, to, k_offset + n);
                offsets(P.v_layout, box, key_before, P.k_grid, from, to, v_offset + n);
                if (KEY_TERMS || LOADS || PADDED) for (int a = 0; a < RANK; a++) coordinates(box, a, box.first[a], box.step[a], from, to, c[a] + n);
            });
            for (int a = 0; a < RANK; a++) if (t.checked[a]) {
                coordinates(t.k_box, a, t.key_index[a], 1, begin, end, index[a]);
                for (int i = count; i < up(count, L); i++) index[a][i] = 0;
            }
        }
        for (int i = 0; i < count; i++) real_key[i] = true;
        if (PADDED && !prefix) for (int a = 0; a < RANK; a++) for (int i = 0; i < count; i++) {
            const int64_t position = c[a][i] - key_before[a];
            real_key[i] &= position >= 0 && position < P.axes[a].real_keys;
        }
        if (!TERMS_BY_HEAD) find_terms(P, t, 0, 0);
    }
@LISTS@    void aim_block(const Problem& P, const Tile& t, int64_t n);
    void look_at(const Problem& P, const Tile& t) { if (TERMS_BY_HEAD) find_terms(P, t, t.batch, t.head); }
    // what expressions need of the chunk's keys
    void find_terms(const Problem& P, const Tile& t, int64_t b, int64_t h) {
@DROPOUT@        if (t.prefix || prefix) return find_terms_beside_grid(P, b, h);
        if ((!KEY_TERMS && !LOADS) || t.prefix || prefix) return;
        const Numbers numbers{.batch = b, .head = h};
        for (int i = 0; i < count; i++) {
            integer at[RANK];
            int64_t from[LOADS + 1];
            for (int a = 0; a < RANK; a++) at[a] = c[a][i];
            key_terms(P, numbers, at, terms, i, from);
            for (int l = 0; l < LOADS; l++) load_offset[l][i] = from[l];
        }
        terms.pad(count);
    }
@DROPOUT@    // the same where queries or keys are prefix tokens: only dropout asks for it
@DROPOUT@    void find_terms_beside_grid(const Problem& P, int64_t b, int64_t h) {
@DROPOUT@        const Numbers numbers{.batch = b, .head = h};
@DROPOUT@        for (int i = 0; i < count; i++) {
@DROPOUT@            integer at[RANK];
@DROPOUT@            int64_t from[LOADS + 1];
@DROPOUT@            for (int a = 0; a < RANK; a++) at[a] = prefix ? begin + i - P.k_prefix : c[a][i];
@DROPOUT@            if (prefix) prefix_key_terms(P, numbers, at, terms, i);
@DROPOUT@            else key_terms(P, numbers, at, terms, i, from);
@DROPOUT@        }
@DROPOUT@        terms.pad(count);
@DROPOUT@    }
    // rows of k or v of one (batch, head), `width` reals apart
    template <int W> __attribute__((noinline)) void gather(const element* src, int64_t channel, const int64_t* offset, const real* pad, real* dst) const {
        constexpr int64_t P = up(W, L);
        const int rows = count;      // (a copy: the compiler must think that a store below might change a member)
        const bool* there = real_key;
        for (int i = 0; i < rows; i++) {
            if (PADDED && !there[i]) { for (int d = 0; d < P; d++) dst[i * P + d] = d < W ? pad[d] : 0; }
            else load_row<W>(src + offset[i], channel, dst + i * P);
        }
        memset(dst + rows * P, 0, sizeof(real) * (up(rows, L) - rows) * P);
    }
    // a row of k as words
    INLINE void load_key(const element* src, int64_t channel, real* dst) const {
        if constexpr (!UNIT_K) return load_words<D>(src, channel, dst);
        alignas(REGISTER) real row[DP];
        load_row<D>(src, channel, row);
        unit_row(row, SHORTEST_K);
        if constexpr (WORD == 1) memcpy(dst, row, sizeof row);
        else narrow_row<D>(row, dst);
    }
    // The same as panels, without the last `but` keys. `rows`: memory for rows that are more than read.
    template <int W> __attribute__((noinline)) void pack(const element* src, int64_t channel, const int64_t* offset, const real* pad, real* rows, Panels& panels, int but = 0) const {
        if (!PADDED && !UNIT_K && channel == 1)
            pack_rows<W>(panels, count - but, [&](int i, int d) __attribute__((always_inline)) { return load_part<W>(src + offset[i], d); });
        else {
            gather<W>(src, channel, offset, pad, rows);
            if constexpr (UNIT_K) for (int i = 0; i < count; i++) unit_row(rows + i * DP, SHORTEST_K);
            pack_panels<W>(panels, rows, count - but);
        }
    }
    // Panels of words of k.
    INLINE void pack_words(const element* src, int64_t channel, const int64_t* offset, const real* pad, real* rows, Panels& panels, int but = 0) const {
        if constexpr (WORD == 1) return pack<D>(src, channel, offset, pad, rows, panels, but);
        constexpr int N = words(D), P = up(N, L);
        if (!PADDED && !UNIT_K && D % WORD == 0 && channel == 1)
            return pack_rows<N>(panels, count - but, [&](int i, int d) __attribute__((always_inline)) {
                const real* const from = (const real*)(src + offset[i]) + d;
                return d + L <= N ? load(from) : load_first<N - (N - 1) / L * L>(from);
            });
        const int all = count;
        real pad_row[DP] = {};
        if (PADDED) memcpy(pad_row, pad, sizeof(real) * D);
        if (PADDED && UNIT_K) unit_row(pad_row, SHORTEST_K);
        for (int i = 0; i < all; i++) {
            if (PADDED && !real_key[i]) narrow_row<D>(pad_row, rows + i * P);
            else load_key(src + offset[i], channel, rows + i * P);
        }
        pack_panels<N>(panels, rows, count - but);
    }
    // Rows of words of neighbouring keys, channel by channel.
    template <int W> INLINE void gather_words(const element* src, int64_t channel, const int64_t* offset, const real* pad, real* dst) const {
        if constexpr (WORD == 1) return gather<W>(src, channel, offset, pad, dst);
        constexpr int P = up(W, L);
        const int all = count;
        element copy[2][P] = {};        // of rows that are no whole vectors where they lie
        const bool direct = !PADDED && W % L == 0 && channel == 1;
        for (int i = 0; i < all; i += 2) {
            const element* row[2] = {copy[0], copy[1]};
            for (int t = 0; t < 2; t++) {
                const int key = i + t;
                if (key >= all) { memset(copy[t], 0, sizeof copy[t]); continue; }
                const element* from = src + offset[key];
                if (direct) row[t] = from;
                else if (PADDED && !real_key[key]) for (int d = 0; d < W; d++) copy[t][d] = put(pad[d]);
                else if (channel == 1) memcpy(copy[t], from, W * sizeof(element));
                else for (int d = 0; d < W; d++) copy[t][d] = from[d * channel];
            }
            UNROLL for (int d = 0; d < P; d += L) store(dst + i / 2 * P + d, pair(row[0] + d, row[1] + d));
        }
    }
};

// The part of a chunk that a query sees: keys [begin, end).
struct Run { int begin, end; };
INLINE Run run_of(const Tile& t, const Keys& keys, int i) {
    if (keys.prefix) return {0, keys.count};
    return {int(min<int64_t>(max<int64_t>(t.begin[i] - keys.begin, 0), keys.count)), int(min<int64_t>(max<int64_t>(t.end[i] - keys.begin, 0), keys.count))};
}
// The keys that any query of rows [i, i + m) may see.
INLINE Run run_of_rows(const Tile& t, const Keys& keys, int i, int m) {
    if (t.uniform) return {0, keys.count};
    Run all{keys.count, 0};
    for (int j = i; j < i + m; j++) {
        const Run r = run_of(t, keys, j);
        if (r.begin < r.end) { all.begin = min(all.begin, r.begin); all.end = max(all.end, r.end); }
    }
    return all;
}
// -1 where query i sees key k + lane
INLINE I visible(const Problem& P, const Numbers& numbers, const Tile& t, const Keys& keys, Run run, int i, int k, bool plain) {
    const I at = lanes() + splat_integer(k);
    I ok = (at >= splat_integer(run.begin)) & (at < splat_integer(run.end));
@LISTS@    if (keys.full) return ok;
    if (!keys.prefix && !t.prefix) {
        for (int a = 0; a < RANK; a++) if (t.checked[a]) {
            const I key = load(keys.index[a] + k);
            ok &= (key >= splat_integer(t.low[a][i])) & (key <= splat_integer(t.high[a][i]));
        }
        if (t.asks() && !plain) ok &= allowed(P, numbers, t.terms[i], keys.terms, k);
    }
    return ok;
}

// Which keys of a chunk the axes after the lead one allow, as 0 or -inf to add to a score. Queries that differ on the lead axis only
// share a row, so a tile that is narrow there needs few of them.
struct Masks {
    static constexpr int MOST = 16;
    real* rows;
    int count = 0;              // rows; 0: none are needed, or every key is compared instead
    static size_t bytes() { return MOST * CHUNK * sizeof(real) + 64; }
    void aim(const Tile& t, const Keys& keys) {
        int lead = 0;
        while (lead < RANK - 1 && t.k_box.extent[lead] <= 1) lead++;
        bool any = false, before = false;
        for (int a = 0; a < RANK; a++) { any |= t.checked[a]; before |= t.checked[a] && a <= lead; }
        count = 0;
        if (!any || before || keys.prefix || t.prefix) return;
@LISTS@        if (t.list) return;
        int64_t inner = 1;
        for (int a = lead + 1; a < RANK; a++) inner *= t.q_box.extent[a];
        if (inner > MOST) return;
        count = inner;
        for (int i = 0; i < count; i++) for (int k = 0; k < keys.count; k += L) {
            I ok = lanes() < splat_integer(L);
            for (int a = 0; a < RANK; a++) if (t.checked[a]) {
                const I key = load(keys.index[a] + k);
                ok &= (key >= splat_integer(t.low[a][i])) & (key <= splat_integer(t.high[a][i]));
            }
            store(rows + i * CHUNK + k, select(ok, V{}, splat(-INF)));
        }
    }
    const real* row(int i) const { return count ? rows + i % count * CHUNK : nullptr; }
};

// A plain score stays q . k until it is an exponent, where the scale is one operand of a fused multiply and add; any other score is
// in natural units, so that it is rounded as it would be anywhere.
INLINE V unit_of(const Numbers& numbers) { return splat(PLAIN_SCORE ? numbers.scale_log2e : LOG2E); }
INLINE V exponent(V x, V shift, V unit) { return PLAIN_SCORE ? x * unit - shift : (x - shift) * unit; }
// Weights that no sum divides (not SOFTMAX) and their derivatives, of a score in natural units; -inf has 0.
INLINE V natural(V x, const Numbers& numbers) { return PLAIN_SCORE ? x * splat(numbers.scale) : x; }
INLINE V weight_of(V x) {
    if constexpr (RELU > 0) {
        const V r = x < V{} ? V{} : x;
        V w = r;
        for (int i = 1; i < RELU; i++) w *= r;
        return w;
    } else {
        const V e = exp(-magnitude(x)), y = splat(1) / (splat(1) + e);
        return x < V{} ? e * y : y;
    }
}
INLINE V weight_slope(V x, V weight) {
    if constexpr (RELU > 0) {
        V slope = splat(RELU);
        for (int i = 1; i < RELU; i++) slope *= x;
        return x <= V{} ? V{} : slope;
    } else return weight * (splat(1) - weight);
}
// f(j, s, x, masked) for the vectors of keys [from, to) of query i: s = q . k as found in `row`, x the score, -inf where it sees no key.
template <bool PLAIN, class F>
INLINE void each_score(const Problem& P, const Numbers& numbers, const Tile& tile, const Keys& keys, const Masks& masks, const real* const* elements, const real* row, int i, int from, int to, F f) {
    Run run{0, keys.count};
    const real* allowed_row = nullptr;
    bool checks = false;
    if (!tile.uniform || tile.asks()) {
        run = run_of(tile, keys, i);
        allowed_row = masks.row(i);
        checks = tile.asks() && !PLAIN;
        if (!allowed_row) for (int a = 0; a < RANK; a++) checks |= tile.checked[a] && !keys.prefix;
@LISTS@        checks &= !keys.full;
    }
    const bool all = !checks && !allowed_row && run.begin <= from;      // nothing but the run's end is to be looked at
    const int clear_from = checks ? to : min<int>(up(run.begin, L), to), clear_to = checks ? to : run.end / L * L;
    auto part = [&](int j, int stop, bool ends, bool row_of_masks) __attribute__((always_inline)) {
        for (; j < stop; j += L) {
            const V s = load(row + j);
            V x = PLAIN_SCORE ? s : PLAIN ? s * splat(numbers.scale) : score(P, numbers, tile.terms[i], keys.terms, elements, j, s);
            if (row_of_masks) x += load(allowed_row + j);
            if (ends && all) x = select(lanes() < splat_integer(run.end - j), x, splat(-INF));
            else if (ends) x = select(visible(P, numbers, tile, keys, run, i, j, PLAIN), x, splat(-INF));
            f(j, s, x, ends || row_of_masks);
        }
    };
    part(from, clear_from, true, false);
    if (allowed_row) part(max(clear_from, from), clear_to, false, true);
    else part(max(clear_from, from), clear_to, false, false);
    part(max(max(clear_from, from), clear_to), to, true, false);
}

// ---- looking ahead --------------------------------------------------------------------------------------------------------------------
// The lines of one row, towards the L2 cache (NEAR = 3: the L1 cache). (Functions that only prefetch are deleted as having no effect
// unless inlined.)
template <int W, int NEAR = 2> INLINE void prefetch(const element* row, int64_t channel) {
    if (channel != 1) return;
    UNROLL for (int d = 0; d < W; d += 64 / (int)sizeof(element)) __builtin_prefetch(row + d, 0, NEAR);
    if (((uintptr_t)row & 63) + W * sizeof(element) > up(W * sizeof(element), 64)) __builtin_prefetch(row + W - 1, 0, NEAR);
}
template <int W> INLINE void prefetch_for_writing(const element* row, int64_t channel) {
    if (channel != 1) return;
    UNROLL for (int d = 0; d < W; d += 64 / (int)sizeof(element)) __builtin_prefetch(row + d, 1, 3);
}

// ---- lists of blocks, where no interval says which keys a tile sees -------------------------------------------------------------------
// which blocks of keys it visits; they are whole whatever the queries' intervals are, so every axis that bounds is compared
inline void Tile::aim_list(const Problem& P, const int64_t* piece) {
    int64_t number = 0;
    for (int a = 0; a < RANK; a++) number = number * P.axes[a].pieces + piece[a];
    list = P.list_block + P.list_offset[number];
    listed = P.list_offset[number + 1] - P.list_offset[number]; listed_full = P.list_full[number];
    uniform = false;
    for (int i = 0; i < queries; i++) { begin[i] = 0; end[i] = CHUNK; }
    for (int a = 0; a < RANK; a++) {
        checked[a] = true;
        const Axis& x = P.axes[a];
        const int32_t* p = x.piece + 3 * piece[a];
        const int32_t *lo = x.lo + p[0] * x.columns + p[1], *hi = x.hi + p[0] * x.columns + p[1];
        q_box.runs(0, queries, [&](int64_t n, const int64_t* index, int64_t length) {
            for (int64_t i = 0; i < length; i++) { const int64_t at = index[a] + (a == RANK - 1 ? i : 0); low[a][n + i] = lo[at]; high[a][n + i] = hi[at]; }
        });
    }
}
// block number `n` of a tile's list
inline void Keys::aim_block(const Problem& P, const Tile& t, int64_t n) {
    int64_t rest = t.list[n], first[RANK], key_before[RANK];
    full = n < t.listed_full;
    for (int a = RANK - 1; a >= 0; rest /= P.axes[a].key_pieces, a--) {
        const Axis& x = P.axes[a];
        const int32_t* p = x.key_piece + 3 * (rest % x.key_pieces);
        first[a] = p[1]; key_before[a] = x.keys_before;
        box.first[a] = p[0] + x.split * p[1]; box.step[a] = x.split; box.extent[a] = p[2] - p[1];
    }
    box.close();
    begin = 0; end = count = box.count;
    offsets(P.k_layout, box, key_before, P.k_grid, 0, count, k_offset);
    offsets(P.v_layout, box, key_before, P.k_grid, 0, count, v_offset);
    for (int i = 0; i < count; i++) real_key[i] = true;
    for (int a = 0; a < RANK; a++) {
        coordinates(box, a, first[a], 1, 0, count, index[a]);
        for (int i = count; i < up(count, L); i++) index[a][i] = 0;
        coordinates(box, a, box.first[a], box.step[a], 0, count, c[a]);
        for (int i = 0; PADDED && i < count; i++) real_key[i] &= c[a][i] >= key_before[a] && c[a][i] < key_before[a] + P.axes[a].real_keys;
    }
    if (!TERMS_BY_HEAD) find_terms(P, t, 0, 0);
}

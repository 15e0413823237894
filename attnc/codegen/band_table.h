// ---- bands: the table elements that scores add (a relative bias) -------------------------------------------------------------------
// An element's place depends on key - query per axis. So the pairs of a block with a line need one vector per key, which depends on
// how the line lies to the row (a relation) and, near a clamped border, on the block (a pattern of places). Each is expanded once per
// head; gradients are summed in the same places.
namespace band {
struct Elements {
    struct Pattern { int count; int64_t place[BAND][L]; };       // lanes; what the axis along the row adds to a place
    struct Vectors { int64_t base = -1; bool filled = false; };  // what the other axes add
    const Problem& P;
    int64_t most = 0, relations = 1, used = 0, shift = 0, span[RANK], groups = 0;
    bool started = false;
    Pattern* patterns;
    Vectors* vectors;                        // [pattern][relation]
    real *values, *sums;                     // [pattern][relation][key][L]: elements, gradients
    double* gradient = nullptr;

    Elements(const Problem& P, const Plan& plan) : P(P) {
        if (!LOADS) return;
        most = plan.blocks + 4;
        for (int a = 0; a < RANK; a++) { span[a] = 2 * plan.most[a] - 1; if (a < X) relations *= span[a]; }
    }
    static constexpr int64_t EACH = BAND * L;
    size_t bytes(bool backward) const {
        return most * (sizeof(Pattern) + relations * (sizeof(Vectors) + sizeof(real) * EACH * (backward ? 2 : 1))) + 64 * 5;
    }
    void allocate(Arena& arena, bool backward) {
        patterns = arena.take<Pattern>(most); vectors = arena.take<Vectors>(most * relations);
        values = arena.take<real>(most * relations * EACH); sums = backward ? arena.take<real>(most * relations * EACH) : nullptr;
        forget();
    }
    // An offset has a part per axis of the query and of the key, and the head's.
    int64_t query_place(const integer* c) const {
        int64_t at[LOADS + 1] = {};
        QueryTerms terms;
        query_terms(P, Numbers{}, c, terms, at);
        return at[0];
    }
    int64_t key_place(const integer* c) const {
        int64_t at[LOADS + 1] = {};
        KeyTerms terms;
        key_terms(P, Numbers{}, c, terms, 0, at);
        return at[0];
    }
    int64_t place(const Pattern& p, int64_t base, int t, int i) const {
        return min(max<int64_t>(shift + base + p.place[t][i], 0), P.tables[LOAD_TABLE[0]].last);
    }
    void forget() {
        for (int64_t i = 0; i < most * relations; i++) vectors[i].filled = false;
        if (sums) memset(sums, 0, sizeof(real) * most * relations * EACH);
        groups = 0;
    }
    // adds the sums to the table's gradient: now and then, so that they stay short and exact
    void flush() {
        if (!LOADS || !sums) return;
        for (int64_t n = 0; n < most * relations; n++) if (vectors[n].filled) {
            const Pattern& p = patterns[n / relations];
            for (int t = 0; t < BAND; t++) for (int i = 0; i < p.count; i++)
                gradient[place(p, vectors[n].base, t, i)] += sums[n * EACH + t * L + i];
            memset(sums + n * EACH, 0, sizeof(real) * EACH);
        }
        groups = 0;
    }
    void aim(const Item& item) {
        const int64_t now = head_offset(P, Numbers{.batch = item.b, .head = item.h}, 0);
        if (started && now == shift) return;
        if (started) { flush(); forget(); }
        started = true; shift = now;
    }
    // makes room for the patterns of so many blocks
    void make_room(int64_t blocks) {
        if (used + blocks <= most) return;
        flush();
        forget();
        used = 0;
    }
    int64_t find(const Item& item, const Lanes& lanes, int64_t x) {
        Pattern& p = patterns[used];
        integer zero[RANK] = {}, q[RANK] = {}, k[RANK] = {};
        const int64_t split = P.axes[X].split, origin = query_place(zero) + key_place(zero);
        p.count = lanes.count;
        for (int i = 0; i < L; i++) {
            const int64_t column = x + min(i, lanes.count - 1);
            q[X] = item.residue[X] + split * column;
            for (int t = 0; t < BAND; t++) {
                k[X] = item.residue[X] + split * (item.x_lo[column] + t);
                p.place[t][i] = query_place(q) + key_place(k) - origin;
            }
        }
        for (int64_t n = 0; n < used; n++)
            if (patterns[n].count == p.count && !memcmp(patterns[n].place, p.place, sizeof p.place)) return n;
        return used++;
    }
    // What the axes before X add to the places of a row of queries, of a line of keys; their indices in the class.
    int64_t query_base(const Item& item, int64_t row) const {
        integer c[RANK] = {};
        for (int a = 0; a < X; a++) c[a] = item.residue[a] + P.axes[a].split * (a == Y ? row : item.index[a]);
        return query_place(c);
    }
    int64_t key_base(const Item& item, int64_t line, int64_t plane) const {
        integer c[RANK] = {};
        for (int a = X - 1; a >= 0; a--) {
            const int64_t length = tokens_of(P.k_grid[a], P.axes[a].split, item.residue[a]);
            c[a] = item.residue[a] + P.axes[a].split * (a == Y ? line : plane % length);
            if (a < Y) plane /= length;
        }
        return key_place(c);
    }
    // number of the way that a line lies to a row
    int64_t relation(const Item& item, int64_t row, int64_t line, int64_t plane) const {
        int64_t n = 0, scale = 1;
        for (int a = X - 1; a >= 0; a--) {
            int64_t far = line - row;
            if (a < Y) {
                const int64_t length = tokens_of(P.k_grid[a], P.axes[a].split, item.residue[a]);
                far = plane % length - item.index[a];
                plane /= length;
            }
            n += (far % span[a] + span[a]) % span[a] * scale;
            scale *= span[a];
        }
        return n;
    }
    // the vectors of a pattern and a relation
    int64_t at(int64_t pattern, int64_t relation, int64_t base) {
        const int64_t n = pattern * relations + relation;
        Vectors& v = vectors[n];
        if (v.filled && v.base == base) return n * EACH;
        const Pattern& p = patterns[pattern];
        if (v.filled) flush();
        v.base = base; v.filled = true;
        const real* table = P.tables[LOAD_TABLE[0]].data;
        for (int t = 0; t < BAND; t++) for (int i = 0; i < L; i++)
            values[n * EACH + t * L + i] = table[place(p, base, t, i)];
        return n * EACH;
    }
};
}

// ---- dropout: two words of Philox-4x32-10 for each query, mixed with the numbers of its keys -------------------------------------------
#if REAL_BITS == 64
typedef uint64_t U __attribute__((vector_size(REGISTER)));      // 32 bits in each lane of 64
INLINE U low_half(U x) { return x & 0xffffffffu; }
#else
typedef uint32_t U __attribute__((vector_size(REGISTER)));
INLINE U low_half(U x) { return x; }
#endif
// word 0 .. 3 at the counter (token, batch, head, 0), the seed's halves as its key
inline integer philox(int word, integer low, integer high, integer batch, integer head, integer token) {
    uint32_t x[4] = {uint32_t(token), uint32_t(batch), uint32_t(head), 0}, keys[2] = {uint32_t(low), uint32_t(high)};
    for (int round = 0; round < 10; round++) {
        const uint64_t a = x[0] * uint64_t(0xd2511f53u), b = x[2] * uint64_t(0xcd9e8d57u);
        const uint32_t y[4] = {uint32_t(b >> 32) ^ x[1] ^ keys[0], uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ keys[1], uint32_t(a)};
        for (int i = 0; i < 4; i++) x[i] = y[i];
        keys[0] += 0x9e3779b9u; keys[1] += 0xbb67ae85u;
    }
    return integer(x[word]);
}
// 31 bits of two words and the numbers of L tokens
INLINE I mix(I first, I second, I token) {
    U x = low_half(low_half(U(token)) + low_half(U(first)));
    x = low_half((x ^ x >> 17) * 0xed5ad4bbu);
    x = low_half((x ^ x >> 11 ^ low_half(U(second))) * 0xac4c1b51u);
    x = low_half((x ^ x >> 15) * 0x31848babu);
    return I((x ^ x >> 14) >> 1);
}

// ---- dropout: two words of Philox-4x32-10 for each query, mixed with the numbers of its keys -------------------------------------------
#if REAL_BITS == 64
typedef uint64_t U __attribute__((vector_size(REGISTER)));      // 32 bits in each lane of 64
INLINE U low_half(U x) { return x & 0xffffffffu; }
#else
typedef uint32_t U __attribute__((vector_size(REGISTER)));
INLINE U low_half(U x) { return x; }
#endif
// word 0 .. 3 at the counter (token, batch, head, 0), the seed's halves as its key
INLINE integer philox(int word, integer low, integer high, integer batch, integer head, integer token) {
    uint32_t a = token, b = batch, c = head, d = 0, k = low, l = high;
    UNROLL for (int round = 0; round < 10; round++) {
        const uint64_t x = a * uint64_t(0xd2511f53u), y = c * uint64_t(0xcd9e8d57u);
        a = uint32_t(y >> 32) ^ b ^ k; b = uint32_t(y); c = uint32_t(x >> 32) ^ d ^ l; d = uint32_t(x);
        k += 0x9e3779b9u; l += 0xbb67ae85u;
    }
    return integer(word == 0 ? a : word == 1 ? b : word == 2 ? c : d);
}
// 31 bits of two words and the numbers of L tokens
INLINE I mix(I first, I second, I token) {
    U x = low_half(low_half(U(token)) + low_half(U(first)));
    x = low_half((x ^ x >> 17) * 0xed5ad4bbu);
    x = low_half((x ^ x >> 11 ^ low_half(U(second))) * 0xac4c1b51u);
    x = low_half((x ^ x >> 15) * 0x31848babu);
    return I((x ^ x >> 14) >> 1);
}

// Colors by vectors of bytes, in Pillow's 8-bit arithmetic; included after vectors.h, for each instruction
// set.
namespace DINO_VECTORS {

using Words __attribute__((vector_size(DINO_BYTES))) = int16_t;
using Ints __attribute__((vector_size(DINO_BYTES))) = int32_t;
using Floats __attribute__((vector_size(DINO_BYTES))) = float;

constexpr int64_t kWidth = sizeof(Bytes);

struct Color {
    Bytes r, g, b;
};

DINO_TARGET DINO_INLINE inline Color load_color(const uint8_t* planes, int64_t n, int64_t i) {
    return {(Bytes)load(planes + i), (Bytes)load(planes + n + i), (Bytes)load(planes + 2 * n + i)};
}

// The part of x that lies before to[left]
DINO_TARGET DINO_INLINE inline void store_bytes(Bytes x, uint8_t* to, int64_t left) {
    if (left >= kWidth)
        store((Units)x, to);
    else
        std::memcpy(to, &x, size_t(left));
}

DINO_TARGET DINO_INLINE inline void store_color(const Color& color, uint8_t* planes, int64_t n, int64_t i) {
    store_bytes(color.r, planes + i, n - i);
    store_bytes(color.g, planes + n + i, n - i);
    store_bytes(color.b, planes + 2 * n + i, n - i);
}

// Halves of a vector of bytes as words, quarters of it as floats; to_bytes undoes both.
DINO_TARGET DINO_INLINE inline void to_words(Bytes x, Words* to) {
    to[0] = (Words)zip_low_bytes((Units)x, Units{});
    to[1] = (Words)zip_high_bytes((Units)x, Units{});
}

DINO_TARGET DINO_INLINE inline void to_floats(const Words* x, Floats* to) {  // words without a sign
    for (int i = 0; i < 2; ++i) {
        to[2 * i] = __builtin_convertvector((Ints)zip_low((Units)x[i], Units{}), Floats);
        to[2 * i + 1] = __builtin_convertvector((Ints)zip_high((Units)x[i], Units{}), Floats);
    }
}

DINO_TARGET DINO_INLINE inline void to_floats(Bytes x, Floats* to) {
    Words words[2];
    to_words(x, words);
    to_floats(words, to);
}

// Cut off to whole numbers, and at 0 and 255
DINO_TARGET DINO_INLINE inline Bytes to_bytes(const Floats* x) {
    Units whole[4];
    for (int i = 0; i < 4; ++i) whole[i] = (Units) __builtin_convertvector(x[i], Ints);
    return (Bytes)pack_16(pack_32(whole[0], whole[1]), pack_32(whole[2], whole[3]));
}

template <class T>
DINO_TARGET DINO_INLINE inline T most_of(T a, T b) {
    return a > b ? a : b;
}

template <class T>
DINO_TARGET DINO_INLINE inline T least_of(T a, T b) {
    return a < b ? a : b;
}

// --- brightness, contrast, saturation, grayscale -------------------------------------------------------

// Quarters of 32-bit numbers: (19595 r + 38470 g + 7471 b + 32768) >> 16, with g in two halves that fit 16 bits
DINO_TARGET DINO_INLINE inline void luma(const Color& color, Units* to) {
    const Units rg = Units{} + (19595u | 19235u << 16), gb = Units{} + (19235u | 7471u << 16), half = Units{} + 32768u;
    Words r[2], g[2], b[2];
    to_words(color.r, r);
    to_words(color.g, g);
    to_words(color.b, b);
    for (int i = 0; i < 2; ++i) {
        Units x = (Units)r[i], y = (Units)g[i], z = (Units)b[i];
        to[2 * i] = (half + pair_products(zip_low(x, y), rg) + pair_products(zip_low(y, z), gb)) >> 16;
        to[2 * i + 1] = (half + pair_products(zip_high(x, y), rg) + pair_products(zip_high(y, z), gb)) >> 16;
    }
}

// ImageEnhance: from the degenerate image (factor 0) to the image (1) and beyond
DINO_TARGET DINO_INLINE inline Bytes blend(const Floats* degenerate, Bytes levels, float factor) {
    Floats x[4];
    to_floats(levels, x);
    for (int i = 0; i < 4; ++i) x[i] = degenerate[i] + factor * (x[i] - degenerate[i]);
    return to_bytes(x);
}

DINO_TARGET void blend_with_level(int32_t degenerate, float factor, int64_t n, uint8_t* levels) {
    Floats same[4];
    for (Floats& x : same) x = Floats{} + float(degenerate);
#if DINO_BYTES == 64  // a table of all levels in four registers
    __m512i table[4];
    for (int part = 0; part < 4; ++part) {
        Bytes level;
        for (int i = 0; i < 64; ++i) level[i] = uint8_t(64 * part + i);
        table[part] = (__m512i)blend(same, level, factor);
    }
    for (int64_t i = 0; i < n; i += kWidth) {
        __m512i x = (__m512i)load(levels + i), low = _mm512_permutex2var_epi8(table[0], x, table[1]);
        __m512i high = _mm512_permutex2var_epi8(table[2], x, table[3]);
        store_bytes((Bytes)_mm512_mask_mov_epi8(low, _mm512_movepi8_mask(x), high), levels + i, n - i);
    }
#else
    for (int64_t i = 0; i < n; i += kWidth)
        store_bytes(blend(same, (Bytes)load(levels + i), factor), levels + i, n - i);
#endif
}

DINO_TARGET void blend_with_luma(float factor, int64_t n, uint8_t* planes) {
    for (int64_t i = 0; i < n; i += kWidth) {
        Color x = load_color(planes, n, i);
        Units gray[4];
        luma(x, gray);
        Floats degenerate[4];
        for (int q = 0; q < 4; ++q) degenerate[q] = __builtin_convertvector((Ints)gray[q], Floats);
        store_color({blend(degenerate, x.r, factor), blend(degenerate, x.g, factor), blend(degenerate, x.b, factor)},
                    planes, n, i);
    }
}

DINO_TARGET void to_gray(int64_t n, uint8_t* planes) {
    for (int64_t i = 0; i < n; i += kWidth) {
        Units gray[4];
        luma(load_color(planes, n, i), gray);
        Bytes x = (Bytes)pack_16(pack_32(gray[0], gray[1]), pack_32(gray[2], gray[3]));
        store_color({x, x, x}, planes, n, i);
    }
}

DINO_TARGET int64_t sum_of_luma(int64_t n, const uint8_t* planes) {
    constexpr int64_t kPart = 1 << 20;  // whose sums fit 32 bits
    int64_t total = 0;
    for (int64_t start = 0; start < n; start += kPart) {
        Units sums = {};
        for (int64_t i = start; i < std::min(n, start + kPart); i += kWidth) {
            Units gray[4];
            Color x = load_color(planes, n, i);
            if (n - i < kWidth) {
                Bytes* channels[] = {&x.r, &x.g, &x.b};
                for (Bytes* c : channels)
                    std::memset(reinterpret_cast<uint8_t*>(c) + n - i, 0, size_t(kWidth - (n - i)));
            }
            luma(x, gray);
            sums += gray[0] + gray[1] + gray[2] + gray[3];
        }
        for (size_t i = 0; i < sizeof sums / sizeof sums[0]; ++i) total += sums[i];
    }
    return total;
}

// --- hue ---------------------------------------------------------------------------------------------

struct Hsv {
    Bytes h, s, v;  // h is a full circle
};

DINO_TARGET DINO_INLINE inline Hsv to_hsv(const Color& x) {
    Bytes upper = most_of(x.r, x.g), lower = least_of(x.r, x.g);
    Bytes most = most_of(upper, x.b), least = least_of(lower, x.b), center = most_of(lower, least_of(upper, x.b));
    Bytes range = most - least;
    // From a corner of the circle the middle channel, by its distance to the largest, turns the hue up or down.
    Bytes next = x.r == most ? x.b : x.g == most ? x.r : x.g, down = (Bytes)(next == least);
    Bytes corner = (x.r == most ? Bytes{} : x.g == most ? Bytes{} + 2 : Bytes{} + 4) + (down & 2);  // and 1
    Words distance[2], negative[2];
    to_words(most - center, distance);
    negative[0] = (Words)zip_low_bytes((Units)down, (Units)down);
    negative[1] = (Words)zip_high_bytes((Units)down, (Units)down);
    Floats hue[4], wide[4], saturation[4], value[4];
    to_floats(corner, hue);
    to_floats(most_of(range, Bytes{} + 1), wide);
    to_floats(range, saturation);
    to_floats(most_of(most, Bytes{} + 1), value);
    for (int i = 0; i < 4; ++i) {
        Words turned = (distance[i / 2] ^ negative[i / 2]) - negative[i / 2];
        Units zero = {}, upper_halves = i % 2 ? zip_high(zero, (Units)turned) : zip_low(zero, (Units)turned);
        Floats sixths = (hue[i] - 1.0f) + __builtin_convertvector((Ints)upper_halves >> 16, Floats) / wide[i];
        // Pillow's hue / 6 * 255, rounded each time, is cut off to the same whole number for every color as this is.
        Ints last = sixths >= 3.0f;
        Floats h = (last ? sixths - 2.0f : sixths) * 42.5f;
        h = h < 0.0f ? h + 255.0f : h;
        hue[i] = __builtin_convertvector(__builtin_convertvector(h, Ints) + (last & 85), Floats);
        saturation[i] = 255.0f * saturation[i] / value[i];
    }
    return {to_bytes(hue), to_bytes(saturation), most};
}

// v (1 - s) where the hue is far from the channel's, v where it is near; fallen: 0 to 255, from near to far, or beyond
DINO_TARGET DINO_INLINE inline Bytes channel(const Words* fallen, const Words* s, const Floats* v) {
    Words rest[2];
    for (int i = 0; i < 2; ++i)
        rest[i] = Words{} + int16_t(65025) - s[i] * least_of(most_of(fallen[i], Words{}), Words{} + 255);
    Floats x[4];
    to_floats(rest, x);
    for (int i = 0; i < 4; ++i) x[i] = v[i] * x[i] * (1.0f / 65025.0f) + 0.5f;
    return to_bytes(x);
}

DINO_TARGET DINO_INLINE inline Color to_rgb(const Hsv& x) {
    Words h[2], s[2], red[2], green[2], blue[2];
    Floats v[4];
    to_words(x.h, h);
    to_words(x.s, s);
    to_floats(x.v, v);
    for (int i = 0; i < 2; ++i) {
        Words turn = h[i] * 6, r = turn - 765, g = turn - 510, b = turn - 1020;
        red[i] = 510 - most_of(r, -r);
        green[i] = most_of(g, -g) - 255;
        blue[i] = most_of(b, -b) - 255;
    }
    return {channel(red, s, v), channel(green, s, v), channel(blue, s, v)};
}

DINO_TARGET void turn_hue(uint8_t shift, int64_t n, uint8_t* planes) {
    for (int64_t i = 0; i < n; i += kWidth) {
        Hsv x = to_hsv(load_color(planes, n, i));
        x.h += shift;
        store_color(to_rgb(x), planes, n, i);
    }
}

}  // namespace DINO_VECTORS

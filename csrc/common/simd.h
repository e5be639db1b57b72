// Versions of a function for several instruction sets.
#pragma once

// Compiles a function for the baseline and for each wider instruction set; the loader chooses at run time, so that a
// wheel built on a new machine runs on an old one. DINO_ONE_VERSION: only for what -march says, to measure.
#if defined(DINO_ONE_VERSION)
#define DINO_MULTIVERSION
#elif !defined(__x86_64__) || !defined(__ELF__)  // other formats have no functions that the loader chooses
#define DINO_MULTIVERSION
#elif __GNUC__ >= 12
#define DINO_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else  // older compilers, and clang, know single features only
#define DINO_MULTIVERSION __attribute__((target_clones("default", "avx2", "avx512f")))
#endif

// What a DINO_MULTIVERSION function calls must be inlined, or it is compiled for the baseline only. It must call no
// constructor, and nothing it calls may: clang 19 forgets to emit those that nobody else calls.
#define DINO_INLINE __attribute__((always_inline))

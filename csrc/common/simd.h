// Versions of a function for several instruction sets.
#pragma once

// Compiled once for the baseline and once for each wider instruction set; the loader picks at run time,
// so that a wheel built on a new machine runs on an old one. DINO_ONE_VERSION leaves what -march says, to measure.
#if defined(DINO_ONE_VERSION)
#define DINO_MULTIVERSION
#elif defined(__x86_64__) && __GNUC__ >= 12
#define DINO_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#elif defined(__x86_64__)  // older compilers know no levels here, only single features
#define DINO_MULTIVERSION __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define DINO_MULTIVERSION
#endif

// Into a function compiled for several instruction sets everything must be inlined, to be compiled for them too.
#define DINO_INLINE __attribute__((always_inline))

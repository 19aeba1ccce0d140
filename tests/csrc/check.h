// The checks of a test program, counted: main returns `finish()`.
#pragma once

#include <cstdio>
#include <cstring>

inline long checks = 0, failures = 0;

#define CHECK(condition, ...)                                           \
  do {                                                                  \
    ++checks;                                                           \
    if (!(condition) && ++failures <= 20) {                             \
      std::printf("%s:%d: %s fails: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                         \
      std::printf("\n");                                                \
    }                                                                   \
  } while (false)

// Bit for bit: tells zeros of either sign apart, and NaN is itself.
template <class Number>
bool same(Number a, Number b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// The exit status, after one line about the checks and what they were made with.
inline int finish(const char* with) {
  std::printf("%ld checks, %ld failures, %s\n", checks, failures, with);
  return failures ? 1 : 0;
}

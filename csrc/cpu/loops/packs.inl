// Packs: a vector of the instruction set for float, and as many doubles. Doubles are arrays whose loops
// the compiler turns into vectors: weights in float64 are rare.

using zoext::divide;
using zoext::fused_multiply_add;
using zoext::multiply;
using zoext::sign_of;
using zoext::square_root;

struct Doubles {
  double v[lanes];
};

template <class F>
inline __attribute__((always_inline)) Doubles for_lanes(F f) {
  Doubles a;
  for (int j = 0; j < lanes; ++j) a.v[j] = f(j);
  return a;
}

inline Doubles operator+(const Doubles& a, const Doubles& b) {
  return for_lanes([&](int j) { return a.v[j] + b.v[j]; });
}
inline Doubles multiply(const Doubles& a, const Doubles& b) {
  return for_lanes([&](int j) { return multiply(a.v[j], b.v[j]); });
}
inline Doubles divide(const Doubles& a, const Doubles& b) {
  return for_lanes([&](int j) { return divide(a.v[j], b.v[j]); });
}
inline Doubles square_root(const Doubles& a) {
  return for_lanes([&](int j) { return square_root(a.v[j]); });
}
inline Doubles sign_of(const Doubles& a) {
  return for_lanes([&](int j) { return sign_of(a.v[j]); });
}
inline Doubles fused_multiply_add(const Doubles& a, const Doubles& b, const Doubles& c) {
  return for_lanes([&](int j) { return fused_multiply_add(a.v[j], b.v[j], c.v[j]); });
}
inline Doubles load(const double* p) {
  return for_lanes([&](int j) { return p[j]; });
}
inline void store(double* p, const Doubles& a) {
  for (int j = 0; j < lanes; ++j) p[j] = a.v[j];
}

template <class Number>
using Pack = std::conditional_t<std::is_same_v<Number, float>, Floats, Doubles>;

inline Floats fill(float a) { return Lanes<Floats>::fill(a); }
inline Doubles fill(double a) {
  return for_lanes([&](int) { return a; });
}

template <class Number>
inline Pack<Number> pack_of(Floats a) {
  if constexpr (std::is_same_v<Number, float>) {
    return a;
  } else {
    float single[lanes];
    store(single, a);
    return for_lanes([&](int j) { return double{single[j]}; });
  }
}

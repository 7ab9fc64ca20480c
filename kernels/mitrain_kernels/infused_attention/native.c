/* The arithmetic around attention, each step in one pass over memory; the mathematics is in sdpa.py and gate.py.

   B batch, H query heads, G key/value heads, R = H / G, T tokens (Tq queries, Tk keys), d head width, M modalities.
   Rows are float32 with adjacent columns. Each function is handed its struct as 64-bit words in the order of its
   fields: native.py writes them. Tasks write to places of their own, in one order: the results do not depend on the
   number of threads. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { MOST_SUMS = 64, MOST_COLUMNS = 512 };

typedef struct { float *at; int64_t s[4]; } array; /* strides in elements, 0 for a dimension that is shared */
typedef struct { int64_t M, B, H, G, Tq, Tk, d, threads; } sizes;

/* As many threads as there are, from the pool that torch itself uses: a second pool would fight it for the cores. */
typedef void parallel(void (*)(void *), void *, unsigned, unsigned);
typedef struct { void (*run)(const void *, int64_t, int64_t); const void *what; int64_t tasks, next, slots; } work;

static parallel *pool = NULL;

void use_pool(parallel *torchs) { pool = torchs; }

static void take_tasks(void *given) {
    work *w = given;
    const int64_t slot = __atomic_fetch_add(&w->slots, 1, __ATOMIC_RELAXED);
    for (int64_t i; (i = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->tasks;) w->run(w->what, i, slot);
}

static void share(void (*run)(const void *, int64_t, int64_t), const void *what, int64_t tasks, int64_t threads) {
    work w = {run, what, tasks, 0, 0};
    if (pool && threads > 1 && tasks > 1) pool(take_tasks, &w, (unsigned)(threads < tasks ? threads : tasks), 0);
    else take_tasks(&w);
}

/* A task is a sample and a head, a slot whoever does it; its code is made anew for the usual head widths, whose loops need no counting then. */
#define ALWAYS static inline __attribute__((always_inline))
#define TASK(name, type, heads)                                            \
    static void name##_task(const void *given, int64_t task, int64_t slot) { \
        const type *p = given;                                             \
        const int64_t b = task / p->n.heads, h = task % p->n.heads;        \
        if (p->n.d == 64) name(p, b, h, 64, slot);                               \
        else if (p->n.d == 128) name(p, b, h, 128, slot);                        \
        else name(p, b, h, p->n.d, slot);                                        \
    }                                                                      \
    static void name##_all(const type *p) { share(name##_task, p, p->n.B * p->n.heads, p->n.threads); }

static float *row(array x, int64_t i, int64_t j, int64_t k) { return x.at + i * x.s[0] + j * x.s[1] + k * x.s[2]; }
static float *entry(array x, int64_t i, int64_t j, int64_t k, int64_t l) { return row(x, i, j, k) + l * x.s[3]; }

ALWAYS float dot(const float *restrict x, const float *restrict y, int64_t d) {
    float sum = 0;
    for (int64_t c = 0; c < d; c++) sum += x[c] * y[c];
    return sum;
}

static float sigmoid(float x) { return 1 / (1 + expf(-x)); }

static float base_of(const float *base, float number, int64_t b) { return base ? base[b] : number; }

/* out = x (base + sum_m g_m vector_m) for the query t of sample b and head h */
ALWAYS void scale_row(float *restrict out, const float *restrict x, array gate, array vectors, float base, int64_t M,
                      int64_t b, int64_t h, int64_t t, int64_t d) {
    for (int64_t m = 0; m < M; m++) {
        const float g = *entry(gate, m, b, h, t), *restrict vector = row(vectors, m, b, h);
        if (m == 0)
            for (int64_t c = 0; c < d; c++) out[c] = x[c] * (base + g * vector[c]);
        else
            for (int64_t c = 0; c < d; c++) out[c] += x[c] * (g * vector[c]);
    }
}

/* Forward, before attention: the gate and its sums, and q (base + sum_m g_m k_mul_m). */
typedef struct {
    sizes n;
    int64_t prefix, new_gates; /* gates (M, B, H, new_gates): one per query, or one for all of them */
    const uint8_t *valid, *sees, *present;
    const float *base;
    array q, v, k_mul, v_add, logit, gate, cosine, root, dots, square, count, inner;
    double number, eps;
} inward;

static void gates_of_query(const inward *p, int64_t b, int64_t g, int64_t t, const double *dots, const double *norms,
                           double square, double count) {
    const int64_t R = p->n.H / p->n.G;
    for (int64_t i = 0; i < p->n.M * R; i++) {
        const int64_t m = i / R, h = g * R + i % R;
        const double root = 1 / sqrt(norms[i] * square * count + p->eps * p->eps), cosine = dots[i] * root;
        const int there = !p->present || p->present[m * p->n.B + b];
        const float value = there ? sigmoid((float)cosine + p->logit.at[m * p->logit.s[0] + h * p->logit.s[1]]) : 0;
        *entry(p->root, m, b, h, t) = (float)root;
        *entry(p->cosine, m, b, h, t) = (float)cosine;
        if (p->prefix) {
            *entry(p->gate, m, b, h, t) = p->sees && !p->sees[b * p->n.Tq + t] ? 0 : value;
            continue;
        }
        for (int64_t u = 0; u < p->new_gates; u++)
            *entry(p->gate, m, b, h, u) = p->sees && !p->sees[b * p->n.Tq + u] ? 0 : value;
    }
}

ALWAYS void inward_group(const inward *p, int64_t b, int64_t g, int64_t d, int64_t slot) {
    (void)slot;
    const int64_t M = p->n.M, R = p->n.H / p->n.G;
    double dots[MOST_SUMS] = {0}, norms[MOST_SUMS], square = 0, count = 0;
    for (int64_t i = 0; i < M * R; i++) {
        const float *add = row(p->v_add, i / R, b, g * R + i % R);
        norms[i] = dot(add, add, d);
    }
    for (int64_t t = 0; t < p->n.Tk; t++) {
        const int64_t last = t == p->n.Tk - 1, at = p->prefix ? t : 0;
        if (!p->valid || p->valid[b * p->n.Tk + t]) {
            const float *value = row(p->v, b, g, t);
            for (int64_t i = 0; i < M * R; i++) dots[i] += dot(value, row(p->v_add, i / R, b, g * R + i % R), d);
            square += dot(value, value, d);
            count += 1;
        }
        if (!p->prefix && !last) continue;
        for (int64_t i = 0; i < M * R; i++) *entry(p->dots, i / R, b, g * R + i % R, at) = (float)dots[i];
        *row(p->square, b, g, at) = (float)square;
        if (g == 0) *row(p->count, b, at, 0) = (float)count;
        const int64_t query = p->prefix ? t - (p->n.Tk - p->n.Tq) : 0;
        if (query >= 0) gates_of_query(p, b, g, query, dots, norms, square, count);
    }
    for (int64_t h = g * R; h < (g + 1) * R; h++)
        for (int64_t t = 0; t < p->n.Tq; t++)
            scale_row(row(p->inner, b, h, t), row(p->q, b, h, t), p->gate, p->k_mul,
                      base_of(p->base, (float)p->number, b), M, b, h, p->new_gates > 1 ? t : 0, d);
}

TASK(inward_group, inward, G)
void infuse_query(const inward *p) { inward_group_all(p); }

/* Forward, after attention: base A + sum_m g_m (A v_mul_m + v_add_m) */
typedef struct {
    sizes n;
    const float *base;
    array attended, v_mul, v_add, gate, output;
    double number;
} outward;

ALWAYS void outward_head(const outward *p, int64_t b, int64_t h, int64_t d, int64_t slot) {
    (void)slot;
    const float base = base_of(p->base, (float)p->number, b);
    for (int64_t t = 0; t < p->n.Tq; t++) {
        const float *restrict a = row(p->attended, b, h, t);
        float *restrict out = row(p->output, b, h, t);
        for (int64_t m = 0; m < p->n.M; m++) {
            const float g = *entry(p->gate, m, b, h, t);
            const float *restrict mul = row(p->v_mul, m, b, h), *restrict add = row(p->v_add, m, b, h);
            if (m == 0)
                for (int64_t c = 0; c < d; c++) out[c] = base * a[c] + g * (a[c] * mul[c] + add[c]);
            else
                for (int64_t c = 0; c < d; c++) out[c] += g * (a[c] * mul[c] + add[c]);
        }
    }
}

TASK(outward_head, outward, H)
void infuse_output(const outward *p) { outward_head_all(p); }

#include "native_backward.h"

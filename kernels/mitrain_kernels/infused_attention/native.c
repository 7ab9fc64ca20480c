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
typedef struct { void (*run)(const void *, int64_t); const void *what; int64_t tasks, next; } work;

static parallel *pool = NULL;

void use_pool(parallel *torchs) { pool = torchs; }

static void take_tasks(void *given) {
    work *w = given;
    for (int64_t i; (i = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->tasks;) w->run(w->what, i);
}

static void share(void (*run)(const void *, int64_t), const void *what, int64_t tasks, int64_t threads) {
    work w = {run, what, tasks, 0};
    if (pool && threads > 1 && tasks > 1) pool(take_tasks, &w, (unsigned)(threads < tasks ? threads : tasks), 0);
    else take_tasks(&w);
}

/* A task is a sample and a head; its code is made anew for the usual head widths, whose loops need no counting then. */
#define ALWAYS static inline __attribute__((always_inline))
#define TASK(name, type, heads)                                            \
    static void name##_task(const void *given, int64_t task) {             \
        const type *p = given;                                             \
        const int64_t b = task / p->n.heads, h = task % p->n.heads;        \
        if (p->n.d == 64) name(p, b, h, 64);                               \
        else if (p->n.d == 128) name(p, b, h, 128);                        \
        else name(p, b, h, p->n.d);                                        \
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

ALWAYS void inward_group(const inward *p, int64_t b, int64_t g, int64_t d) {
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

ALWAYS void outward_head(const outward *p, int64_t b, int64_t h, int64_t d) {
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

/* Backward, before attention: dA = dO (base + sum_m g_m v_mul_m), 0 where a query sees no key, and q' once more */
typedef struct {
    sizes n;
    const uint8_t *sees;
    int64_t sees_row;
    const float *base;
    array upstream, q, k_mul, v_mul, gate, dattended, inner;
    double number;
} upstreams;

ALWAYS void upstream_head(const upstreams *p, int64_t b, int64_t h, int64_t d) {
    const float base = base_of(p->base, (float)p->number, b);
    for (int64_t t = 0; t < p->n.Tq; t++) {
        float *da = row(p->dattended, b, h, t);
        scale_row(da, row(p->upstream, b, h, t), p->gate, p->v_mul, base, p->n.M, b, h, t, d);
        if (p->sees && !p->sees[b * p->sees_row + t]) memset(da, 0, (size_t)d * sizeof(float));
        scale_row(row(p->inner, b, h, t), row(p->q, b, h, t), p->gate, p->k_mul, base, p->n.M, b, h, t, d);
    }
}

TASK(upstream_head, upstreams, H)
void infuse_upstream(const upstreams *p) { upstream_head_all(p); }

/* Backward, after attention: dq, the maps' gradients for given gates (added to dmaps), and the gates' gradients */
typedef struct {
    sizes n;
    const float *base;
    array dinner, upstream, q, attended, k_mul, v_mul, v_add, gate, dq, dk_mul, dv_mul, dv_add, dgate;
    double number;
} reductions;

ALWAYS void reduce_modality(const reductions *p, int64_t m, int64_t b, int64_t h, int64_t d) {
    const float *restrict mul_k = row(p->k_mul, m, b, h), *restrict mul_v = row(p->v_mul, m, b, h);
    const float *restrict add = row(p->v_add, m, b, h);
    float of_k[MOST_COLUMNS] = {0}, of_v[MOST_COLUMNS] = {0}, of_add[MOST_COLUMNS] = {0};
    for (int64_t t = 0; t < p->n.Tq; t++) {
        const float *restrict di = row(p->dinner, b, h, t), *restrict q = row(p->q, b, h, t);
        const float *restrict u = row(p->upstream, b, h, t), *restrict a = row(p->attended, b, h, t);
        const float g = *entry(p->gate, m, b, h, t);
        float sum = 0;
        for (int64_t c = 0; c < d; c++) {
            const float through_q = di[c] * q[c], through_a = u[c] * a[c];
            of_k[c] += g * through_q;
            of_v[c] += g * through_a;
            of_add[c] += g * u[c];
            sum += through_q * mul_k[c] + through_a * mul_v[c] + u[c] * add[c];
        }
        *entry(p->dgate, m, b, h, t) = sum;
    }
    float *dk = row(p->dk_mul, m, b, h), *dv = row(p->dv_mul, m, b, h), *dadd = row(p->dv_add, m, b, h);
    for (int64_t c = 0; c < d; c++) {
        dk[c] += of_k[c];
        dv[c] += of_v[c];
        dadd[c] += of_add[c];
    }
}

ALWAYS void reduce_head(const reductions *p, int64_t b, int64_t h, int64_t d) {
    for (int64_t m = 0; m < p->n.M; m++) reduce_modality(p, m, b, h, d);
    for (int64_t t = 0; p->dq.at && t < p->n.Tq; t++)
        scale_row(row(p->dq, b, h, t), row(p->dinner, b, h, t), p->gate, p->k_mul,
                  base_of(p->base, (float)p->number, b), p->n.M, b, h, t, d);
}

TASK(reduce_head, reductions, H)
void reduce_gradients(const reductions *p) { reduce_head_all(p); }

/* Backward, last: from the gates' gradients through the cosine, added to dv and dv_add; dlogit (M, B, H) is per sample.

   dV_j = sum_mr D_j a - S_j V_j and da = sum_j D_j V_j - n a, where D and S sum over the queries from j on. */
typedef struct {
    sizes n;
    int64_t prefix;
    const uint8_t *valid;
    array dgate, gate, cosine, root, square, count, v, v_add, dv, dv_add, dlogit;
} cosines;

typedef struct { double dots[MOST_SUMS], norms[MOST_SUMS], of_norm[MOST_SUMS], logit[MOST_SUMS], square; } so_far;

static void add_query(const cosines *p, so_far *s, int64_t b, int64_t g, int64_t t) {
    const int64_t R = p->n.H / p->n.G, own = p->prefix ? t : 0;
    const double square = *row(p->square, b, g, own), count = *row(p->count, b, own, 0);
    for (int64_t i = 0; i < p->n.M * R; i++) {
        const int64_t m = i / R, h = g * R + i % R;
        const double value = *entry(p->gate, m, b, h, t), root = *entry(p->root, m, b, h, own);
        const double e = *entry(p->dgate, m, b, h, t) * value * (1 - value);
        const double w = e * root * *entry(p->cosine, m, b, h, own) * root;
        s->logit[i] += e;
        s->dots[i] += e * root;
        s->of_norm[i] += w * square * count;
        s->square += w * s->norms[i] * count;
    }
}

ALWAYS void cosine_group(const cosines *p, int64_t b, int64_t g, int64_t d) {
    const int64_t M = p->n.M, R = p->n.H / p->n.G;
    so_far s;
    memset(&s, 0, sizeof s);
    for (int64_t i = 0; i < M * R; i++) {
        const float *a = row(p->v_add, i / R, b, g * R + i % R);
        s.norms[i] = dot(a, a, d);
    }
    for (int64_t t = 0; !p->prefix && t < p->n.Tq; t++) add_query(p, &s, b, g, t);
    for (int64_t j = p->n.Tk - 1; j >= 0; j--) {
        const int64_t query = j - (p->n.Tk - p->n.Tq);
        if (p->prefix && query >= 0) add_query(p, &s, b, g, query);
        if (p->valid && !p->valid[b * p->n.Tk + j]) continue;
        const float *restrict value = row(p->v, b, g, j), minus = -(float)s.square;
        float *restrict dv = p->dv.at ? row(p->dv, b, g, j) : NULL;
        for (int64_t c = 0; dv && c < d; c++) dv[c] += minus * value[c];
        for (int64_t i = 0; i < M * R; i++) {
            const float *restrict a = row(p->v_add, i / R, b, g * R + i % R), w = (float)s.dots[i];
            float *restrict da = row(p->dv_add, i / R, b, g * R + i % R);
            for (int64_t c = 0; c < d; c++) da[c] += w * value[c];
            for (int64_t c = 0; dv && c < d; c++) dv[c] += w * a[c];
        }
    }
    for (int64_t i = 0; i < M * R; i++) {
        const int64_t m = i / R, h = g * R + i % R;
        const float *restrict a = row(p->v_add, m, b, h), minus = -(float)s.of_norm[i];
        float *restrict da = row(p->dv_add, m, b, h);
        for (int64_t c = 0; c < d; c++) da[c] += minus * a[c];
        *row(p->dlogit, m, b, h) = (float)s.logit[i];
    }
}

TASK(cosine_group, cosines, G)
void through_cosine(const cosines *p) { cosine_group_all(p); }

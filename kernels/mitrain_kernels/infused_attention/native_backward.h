/* The backward pass, included by native.c: a task is a sample and a key/value head with its R query heads, of which some
   queries at a time are a tile. A tile stays in the core's own cache; the mathematics is in sdpa.py, tiles.py, gate.py.

   Matrix products are the BLAS's that torch itself computes with. */

typedef void gemm(const char *, const char *, const int64_t *, const int64_t *, const int64_t *, const float *,
                  const float *, const int64_t *, const float *, const int64_t *, const float *, float *, const int64_t *);
static gemm *blas = NULL;

void use_gemm(gemm *torchs) { blas = torchs; }

enum { NO_MASK, BOOL_MASK, ADDED_MASK };

typedef struct {
    sizes n;
    int64_t prefix, causal, window, width, mask_kind, room; /* room: floats of scratch for each thread */
    const uint8_t *valid, *sees, *present;
    const float *base;
    array scratch, mask, upstream, q, k, v, attended, k_mul, v_mul, v_add, logit, cosine, root, square, count;
    array gate, dgate, dq, dk, dv, dk_mul, dv_mul, dv_add, dlogits, dlogit;
    double number, scale;
} backwards;

/* A tile: queries low … high of the task's heads, below each other, against keys start … stop. */
typedef struct {
    int64_t b, g, low, high, start, stop, rows, keys;
    float *inner, *inward, *weights, *dweights; /* (rows, d) twice, (rows, keys) twice; inner becomes dq' */
} tile;

/* c (m, n) = alpha a b + beta c, row by row; a is (m, k), or (k, m) where turned, b likewise. */
static void product(int turn_a, int turn_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t row_a,
                    const float *b, int64_t row_b, float beta, float *c, int64_t row_c) {
    blas(turn_b ? "T" : "N", turn_a ? "T" : "N", &n, &m, &k, &alpha, b, &row_b, a, &row_a, &beta, c, &row_c);
}

/* e^x for x <= 0, to about |x| / 2^25: what the rounding of a score does to it. Terms past the seventh are below that. */
ALWAYS float exp_below(float x) {
    const float n = floorf(x * 1.44269504f + 0.5f), r = x - n * 0.693147181f;
    float p = 1.f / 5040;
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1;
    p = p * r + 1;
    union { int32_t i; float f; } power = {.i = ((int32_t)n + 127) * (1 << 23)};
    return x < -87 ? 0 : p * power.f;
}

enum { LANES = 16 };

static float highest(const float *x, int64_t n) {
    float top[LANES], most = -INFINITY;
    for (int c = 0; c < LANES; c++) top[c] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int c = 0; c < LANES; c++) top[c] = x[i + c] > top[c] ? x[i + c] : top[c];
    for (; i < n; i++) most = x[i] > most ? x[i] : most;
    for (int c = 0; c < LANES; c++) most = top[c] > most ? top[c] : most;
    return most;
}

/* Scores (keys,) of query t to weights, 0 for keys that it does not see: all of them where it sees none. */
static void softmax_row(const backwards *p, const tile *w, int64_t t, float *x) {
    int64_t seen = w->keys;
    if (p->mask_kind == NO_MASK && p->causal && p->n.Tq > 1) {
        seen = t + p->n.Tk - p->n.Tq + 1 - w->start;
        memset(x + seen, 0, (size_t)(w->keys - seen) * sizeof(float));
    } else if (p->mask_kind != NO_MASK) {
        const int64_t at = w->b * p->mask.s[0] + t * p->mask.s[2] + w->start * p->mask.s[3], step = p->mask.s[3];
        const uint8_t *shown = (const uint8_t *)p->mask.at + at;
        const float *added = p->mask.at + at;
        if (p->mask_kind == BOOL_MASK)
            for (int64_t j = 0; j < seen; j++) x[j] = shown[j * step] ? x[j] : -INFINITY;
        else
            for (int64_t j = 0; j < seen; j++) x[j] += added[j * step];
    }
    const float most = highest(x, seen), top = most == -INFINITY ? 0 : most;
    float sum = 0;
    for (int64_t j = 0; j < seen; j++) {
        x[j] = exp_below(x[j] - top);
        sum += x[j];
    }
    const float share = sum == 0 ? 0 : 1 / sum;
    for (int64_t j = 0; j < seen; j++) x[j] *= share;
}

/* What stands around attention: q' = q (base + sum_m g_m k_mul_m) and dA = dO (base + sum_m g_m v_mul_m) */
ALWAYS void infuse_tile(const backwards *p, const tile *w, int64_t d) {
    const float base = base_of(p->base, (float)p->number, w->b);
    const int64_t R = p->n.H / p->n.G, width = w->high - w->low;
    for (int64_t i = 0; i < w->rows; i++) {
        const int64_t h = w->g * R + i / width, t = w->low + i % width;
        float *da = w->inward + i * d;
        scale_row(da, row(p->upstream, w->b, h, t), p->gate, p->v_mul, base, p->n.M, w->b, h, t, d);
        if (p->sees && !p->sees[w->b * p->n.Tq + t]) memset(da, 0, (size_t)d * sizeof(float));
        scale_row(w->inner + i * d, row(p->q, w->b, h, t), p->gate, p->k_mul, base, p->n.M, w->b, h, t, d);
    }
}

/* Attention's own part, the weights computed again: dk and dv grow, q' becomes dq'. */
static void attend_tile(const backwards *p, const tile *w) {
    const int64_t d = p->n.d, rows = w->rows, keys = w->keys, row_k = p->k.s[2], row_v = p->v.s[2];
    const float *k = row(p->k, w->b, w->g, w->start), *v = row(p->v, w->b, w->g, w->start), scale = (float)p->scale;
    product(0, 1, rows, keys, d, scale, w->inner, d, k, row_k, 0, w->weights, keys);
    for (int64_t i = 0; i < rows; i++)
        softmax_row(p, w, w->low + i % (w->high - w->low), w->weights + i * keys);
    if (p->dv.at)
        product(1, 0, keys, d, rows, 1, w->weights, keys, w->inward, d, 1, row(p->dv, w->b, w->g, w->start), d);
    product(0, 1, rows, keys, d, 1, w->inward, d, v, row_v, 0, w->dweights, keys);
    for (int64_t i = 0; i < rows; i++) {
        const float *restrict x = w->weights + i * keys;
        float *restrict dx = w->dweights + i * keys;
        const float mean = dot(x, dx, keys);
        for (int64_t j = 0; j < keys; j++) dx[j] = x[j] * (dx[j] - mean);
    }
    if (p->dk.at)
        product(1, 0, keys, d, rows, scale, w->dweights, keys, w->inner, d, 1, row(p->dk, w->b, w->g, w->start), d);
    product(0, 0, rows, d, keys, scale, w->dweights, keys, k, row_k, 0, w->inner, d);
}

/* After attention: dq, the maps' gradients for given gates (added to), and the gates' gradients */
ALWAYS void reduce_modality(const backwards *p, const tile *w, const float *dinner, int64_t m, int64_t h, int64_t d) {
    const float *restrict mul_k = row(p->k_mul, m, w->b, h), *restrict mul_v = row(p->v_mul, m, w->b, h);
    const float *restrict add = row(p->v_add, m, w->b, h);
    float of_k[MOST_COLUMNS] = {0}, of_v[MOST_COLUMNS] = {0}, of_add[MOST_COLUMNS] = {0};
    for (int64_t t = w->low; t < w->high; t++, dinner += d) {
        const float *restrict di = dinner, *restrict q = row(p->q, w->b, h, t);
        const float *restrict u = row(p->upstream, w->b, h, t), *restrict a = row(p->attended, w->b, h, t);
        const float g = *entry(p->gate, m, w->b, h, t);
        float sum = 0;
        for (int64_t c = 0; c < d; c++) {
            const float through_q = di[c] * q[c], through_a = u[c] * a[c];
            of_k[c] += g * through_q;
            of_v[c] += g * through_a;
            of_add[c] += g * u[c];
            sum += through_q * mul_k[c] + through_a * mul_v[c] + u[c] * add[c];
        }
        *entry(p->dgate, m, w->b, h, t) = sum;
    }
    float *dk = row(p->dk_mul, m, w->b, h), *dv = row(p->dv_mul, m, w->b, h), *dadd = row(p->dv_add, m, w->b, h);
    for (int64_t c = 0; c < d; c++) {
        dk[c] += of_k[c];
        dv[c] += of_v[c];
        dadd[c] += of_add[c];
    }
}

ALWAYS void reduce_tile(const backwards *p, const tile *w, int64_t d) {
    const float base = base_of(p->base, (float)p->number, w->b);
    const int64_t R = p->n.H / p->n.G, width = w->high - w->low;
    for (int64_t r = 0; r < R; r++) {
        const int64_t h = w->g * R + r;
        const float *dinner = w->inner + r * width * d;
        for (int64_t m = 0; m < p->n.M; m++) reduce_modality(p, w, dinner, m, h, d);
        for (int64_t t = w->low; p->dq.at && t < w->high; t++)
            scale_row(row(p->dq, w->b, h, t), dinner + (t - w->low) * d, p->gate, p->k_mul, base, p->n.M, w->b, h, t, d);
    }
}

/* Last: from the gates' gradients through the cosine, added to dv and dv_add; dlogits (M, B, H) are per sample.

   dV_j = sum_mr D_j a - S_j V_j and da = sum_j D_j V_j - n a, where D and S sum over the queries from j on. */
typedef struct { double dots[MOST_SUMS], norms[MOST_SUMS], of_norm[MOST_SUMS], logit[MOST_SUMS], square; } so_far;

static void add_query(const backwards *p, so_far *s, int64_t b, int64_t g, int64_t t) {
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

ALWAYS void cosine_group(const backwards *p, int64_t b, int64_t g, int64_t d) {
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
        *row(p->dlogits, m, b, h) = (float)s.logit[i];
    }
}

/* The gates again from their cosines, as the forward pass had them; what sums start from. */
static void begin(const backwards *p, int64_t b, int64_t g, int64_t d) {
    const int64_t R = p->n.H / p->n.G;
    for (int64_t i = 0; i < p->n.M * R; i++) {
        const int64_t m = i / R, h = g * R + i % R;
        const int there = !p->present || p->present[m * p->n.B + b];
        const float logit = p->logit.at[m * p->logit.s[0] + h * p->logit.s[1]];
        for (int64_t t = 0; t < p->n.Tq; t++)
            *entry(p->gate, m, b, h, t) = there && (!p->sees || p->sees[b * p->n.Tq + t])
                                              ? sigmoid(*entry(p->cosine, m, b, h, p->prefix ? t : 0) + logit) : 0;
        const array sums[] = {p->dk_mul, p->dv_mul, p->dv_add};
        for (int s = 0; s < 3; s++) memset(row(sums[s], m, b, h), 0, (size_t)d * sizeof(float));
    }
    if (p->dk.at) memset(row(p->dk, b, g, 0), 0, (size_t)(p->n.Tk * d) * sizeof(float));
    if (p->dv.at) memset(row(p->dv, b, g, 0), 0, (size_t)(p->n.Tk * d) * sizeof(float));
}

ALWAYS void backward_group(const backwards *p, int64_t b, int64_t g, int64_t d, int64_t slot) {
    const int64_t R = p->n.H / p->n.G, ahead = p->n.Tk - p->n.Tq;
    float *scratch = p->scratch.at + slot * p->room;
    begin(p, b, g, d);
    for (int64_t low = (p->n.Tq - 1) / p->width * p->width; low >= 0; low -= p->width) {
        tile w = {.b = b, .g = g, .low = low, .high = low + p->width < p->n.Tq ? low + p->width : p->n.Tq, .stop = p->n.Tk};
        if (p->causal) w.stop = ahead + w.high;
        if (p->window) {
            const int64_t first = ahead + low - p->window + 1, past = ahead + w.high + p->window - 1;
            w.start = first > 0 ? first : 0;
            w.stop = past < w.stop ? past : w.stop;
        }
        w.rows = R * (w.high - low), w.keys = w.stop - w.start;
        w.inner = scratch, w.inward = w.inner + w.rows * d, w.weights = w.inward + w.rows * d;
        w.dweights = w.weights + w.rows * w.keys;
        infuse_tile(p, &w, d);
        attend_tile(p, &w);
        reduce_tile(p, &w, d);
    }
    cosine_group(p, b, g, d);
}

TASK(backward_group, backwards, G)

void backward(const backwards *p) {
    backward_group_all(p);
    for (int64_t m = 0; m < p->n.M; m++)
        for (int64_t h = 0; h < p->n.H; h++) {
            double sum = 0;
            for (int64_t b = 0; b < p->n.B; b++) sum += *row(p->dlogits, m, b, h);
            *row(p->dlogit, m, h, 0) = (float)sum;
        }
}

/* Steps of RiemannianSGD, RiemannianAdam and AngularAdam on the CPU, row by row in cache: the formulas of products.py,
 * rule.py and reference.py. A weight is a matrix whose rows are its groups. Short rows are stepped in blocks that
 * stay in cache, so that the second pass over them moves no memory; long rows are cut into pieces for all threads, with
 * a barrier between the passes. Sums run over pieces of PIECE entries in the compute type and over pieces in double:
 * equal entries are rounded alike, and a longer chain of additions would be off by more machine epsilons.
 * Other methods have their coefficients computed elsewhere, between a pass that measures and one that writes.
 *
 * Compiled at first use by manifold_nets.optim.backends.native, once a machine. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum { SGD, ADAM, ANGULAR_ADAM, ADAM_ENTRIES, PLAIN_SGD, PLAIN_ADAM, PUT_BACK };
enum { STAYS, CARRIED, ALONE };
enum { PIECE = 256, BLOCK = 16384, ROWS = 64 };
enum { UNKNOWN = 8 }; /* machine epsilons of AngularAdam's directions: see reference.py */

typedef struct { double ww, wg, gg, wb, gb, bb; } Products;
typedef struct { double ww, wb, wg, bw, bb, bg; } Row;

typedef struct {
    void *w;            /* the weight, changed */
    const void *g;      /* its gradient */
    void *b;            /* its moment, changed; null without one */
    void *v, *v_max;    /* second moments, one a row, changed; null for SGD and without AMSGrad. AngularAdam, Adam by
                           entries and plain Adam: one an entry */
    const double *square; /* squared radii: one, or one a row */
    int64_t rows, size, squares;
    double take, first, second; /* share of the new gradient; bias corrections 1/(1 - beta^t) of Adam */
    double rounding;    /* how long a tangential part, relative to its gradient, is nothing but rounding */
    Products *products; /* of each row, in a pass that measures */
    const Row *written; /* of each row, in a pass that writes */
    const uint8_t *far; /* and whether it steps farther than a radian: STAYS, CARRIED with its moment, or ALONE */
    double *norms;      /* of the rows in the run of a plain optimizer, changed; null elsewhere */
} Job;

typedef struct {
    int64_t kind, dtype, nesterov, maximize, follows; /* follows: whether norms go on as in the plain run */
    double lr, keep, beta2, eps; /* keep: momentum, or beta1 */
    double decay, shrink; /* of a plain optimizer: decay in the gradient, and factor of the weight */
} Rule;

/* Numbers of up to ROWS rows, each kind in a run of memory, so that one instruction takes those of several rows. */
typedef struct {
    double ww[ROWS], wg[ROWS], gg[ROWS], wb[ROWS], gb[ROWS], bb[ROWS]; /* inner products */
    double square[ROWS];  /* squared radii */
    double length[ROWS];  /* squared norms of the tangential gradients */
    double second[ROWS];  /* second moments */
    double taken[ROWS];   /* what was taken off the gradients, as multiples of the weight; mostly 0 */
    double counts[ROWS];  /* 1, or 0 where a gradient is nothing but rounding */
} Measured;
typedef struct { double ww[ROWS], wb[ROWS], wg[ROWS], bw[ROWS], bb[ROWS], bg[ROWS], far[ROWS]; } Turned;

static int by_entries(const Rule *rule) {
    return rule->kind == ANGULAR_ADAM || rule->kind == ADAM_ENTRIES || rule->kind == PLAIN_ADAM;
}
/* How a row is put on its sphere whose step is far: the moment of a plain optimizer stays what it is. */
static int kept_as(const Rule *rule) { return rule->kind == PLAIN_SGD ? ALONE : CARRIED; }
static double positive(double x) { return x < 0 ? 0.0 : x; } /* keeps NaN */

static void add_products(Products *sum, const Products *part) {
    sum->ww += part->ww; sum->wg += part->wg; sum->gg += part->gg;
    sum->wb += part->wb; sum->gb += part->gb; sum->bb += part->bb;
}

static double square_of(const Job *job, int64_t row) { return job->square[job->squares > 1 ? row : 0]; }

static void keep_products(Measured *m, int64_t i, const Products *p) {
    m->ww[i] = p->ww; m->wg[i] = p->wg; m->gg[i] = p->gg;
    m->wb[i] = p->wb; m->gb[i] = p->gb; m->bb[i] = p->bb;
    m->taken[i] = 0; m->counts[i] = 1;
}

/* Whether a gradient is mostly radial, so that its tangential part has lost digits in the difference of squares. */
static int is_short(double ww, double wg, double gg) { return wg / ww * wg > 0.75 * gg; }

/* Keep the products of what remains of a gradient without its radial part: zeros where that is nothing but rounding.
 * See products.py. */
static void keep_remainder(const Rule *rule, const Job *job, Measured *m, int64_t i, const Products *p, double taken) {
    double rounding = rule->kind == ADAM ? job->rounding : 0; /* SGD does not magnify it */
    double remains = p->gg - p->wg / p->ww * p->wg;
    int counts = !(remains <= rounding * rounding * m->gg[i]);
    m->wg[i] = counts ? p->wg : 0.0; m->gg[i] = counts ? p->gg : 0.0; m->gb[i] = counts ? p->gb : 0.0;
    m->taken[i] = taken; m->counts[i] = counts;
}

/* The inner products in the coordinates of the unit sphere, of rows from `row` on. */
static void to_unit(Measured *restrict m, const Rule *rule, const Job *job, int64_t row, int64_t n) {
    double sign = rule->maximize ? -1.0 : 1.0;
    for (int64_t i = 0; i < n; i++) m->square[i] = square_of(job, row + i);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        double square = m->square[i], inverse = 1.0 / square;
        m->ww[i] *= inverse; m->wb[i] *= inverse; m->bb[i] *= inverse;
        m->gg[i] *= square; m->wg[i] *= sign; m->gb[i] *= sign;
        m->length[i] = positive(m->gg[i] - m->wg[i] / m->ww[i] * m->wg[i]);
    }
}

/* Whether the tangential gradient of a row has lost digits that matter: for SGD where the step is long, as coefficients
 * of a long row that cancel cannot be mended once they are rounded. */
static int brief_gradient(const Rule *rule, const Job *job, const Measured *m, int64_t i, int64_t row) {
    if (!is_short(m->ww[i], m->wg[i], m->gg[i])) return 0;
    return rule->kind == ADAM || rule->lr * rule->lr * m->gg[i] * square_of(job, row) > 1;
}

/* See rule.py. */
static void coefficients(const Rule *rule, const Job *job, const Measured *restrict m, int64_t n, Turned *restrict r) {
    double keep = job->b ? rule->keep : 0.0, take = job->b ? job->take : 0.0, ahead = 0.0, along = 1.0;
    double lr = rule->lr, first = job->first, correction = job->second, eps = rule->eps;
    double sign = rule->maximize ? -1.0 : 1.0, stays = lr == 0.0;
    int adam = rule->kind == ADAM;
    if (!adam && !job->b) ahead = 1.0;
    else if (!adam && rule->nesterov) along = keep, ahead = 1.0;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        double follow = adam ? first / (sqrt(m->second[i] * correction) + eps) : along;
        double inverse = 1.0 / m->ww[i], g_slope = m->wg[i] * inverse, b_slope = m->wb[i] * inverse;
        double bb = m->bb[i] - b_slope * m->wb[i], gb = m->gb[i] - b_slope * m->wg[i], gg = m->length[i];
        double taken = take * m->counts[i], d_b = follow * keep, d_g = follow * taken + ahead;
        double p_w = -(keep * b_slope + taken * g_slope), d_w = -(d_b * b_slope + d_g * g_slope);
        double length = positive(d_b * d_b * bb + 2.0 * d_b * d_g * gb + d_g * d_g * gg);
        double overlap = d_b * keep * bb + (d_b * taken + d_g * keep) * gb + d_g * taken * gg;
        double scale = (1.0 + 0.0 * length) / sqrt(1.0 + lr * lr * length);
        double root = stays ? 1.0 : sqrt(inverse), turn = -lr * scale * overlap, to_g = sign * m->square[i];
        double ww = scale * (root - lr * d_w), wb = -lr * scale * d_b, wg = -lr * scale * d_g;
        r->ww[i] = ww; r->wb[i] = wb; r->wg[i] = wg * to_g;
        r->far[i] = wb * wb * m->bb[i] + wg * wg * m->gg[i];
        r->bw[i] = p_w - turn * ww; r->bb[i] = keep - turn * wb; r->bg[i] = (taken - turn * wg) * to_g;
    }
}

/* The same of weights that another optimizer has moved, g being where they were: see on_spheres.py. `nesterov` says
 * whether the outward part of the move is halved, instead of all of its radial part being taken off. */
static void put_back_coefficients(const Rule *rule, const Measured *restrict m, int64_t n, Turned *restrict r) {
    double least = 4.0 * (rule->dtype == FLOAT64 ? 0x1p-52 : 0x1p-23);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        double inverse = 1.0 / sqrt(m->gg[i]), xy = m->wg[i] * inverse, outward = xy - 1.0;
        double taken = rule->nesterov ? 0.5 * positive(outward) : outward;
        double norm = m->ww[i] - 2.0 * taken * xy + taken * taken;
        int is_lost = norm <= least * least;
        double ww = is_lost ? 0.0 : 1.0 / sqrt(norm), wg = (is_lost ? 1.0 : -ww * taken) * inverse;
        double overlap = ww * m->wb[i] + wg * m->gb[i], to_g = m->square[i];
        r->ww[i] = ww; r->wb[i] = 0; r->wg[i] = wg * to_g;
        r->bw[i] = -overlap * ww; r->bb[i] = 1; r->bg[i] = -overlap * wg * to_g;
        r->far[i] = 4.0 * taken * taken;
    }
}

/* The step of plain SGD from weights of other norms; see rule.py. */
static void plain_coefficients(const Rule *rule, const Job *job, const Measured *restrict m, int64_t row, int64_t n,
                               Turned *restrict r) {
    double keep = job->b ? rule->keep : 0.0, take = job->b ? job->take : 0.0, lr = rule->lr, decay = rule->decay;
    double along = job->b && rule->nesterov ? keep : 1.0, ahead = !job->b || rule->nesterov ? 1.0 : 0.0;
    double sign = rule->maximize ? -1.0 : 1.0, whole = along * take + ahead, *restrict norms = job->norms + row;
    int stays = lr == 0.0, follows = rule->follows != 0;
    double square[ROWS];
    for (int64_t i = 0; i < n; i++) square[i] = square_of(job, row + i);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        double norm = norms[i], radius = sqrt(square[i]), down = sqrt(m->ww[i]) / norm, up = 1.0 / down;
        double ww = up * (1.0 - lr * whole * decay), wb = -lr * along * keep / radius, wg = -lr * whole * sign * down;
        double rest = norm * (1.0 - lr * whole * decay), moved = wb * wb * m->bb[i] + wg * wg * m->gg[i];
        double squared = rest * rest + moved + 2.0 * (ww * (wb * m->wb[i] + wg * m->wg[i]) + wb * wg * m->gb[i]);
        double end = sqrt(squared), scale = radius / end;
        r->ww[i] = stays ? 1.0 : scale * ww; r->wb[i] = scale * wb; r->wg[i] = scale * wg;
        r->far[i] = moved / squared;
        r->bw[i] = take * radius * decay * up; r->bb[i] = keep; r->bg[i] = take * radius * sign * down;
        norms[i] = follows ? end : norm;
    }
}

static Row row_of(const Turned *r, int64_t i) {
    return (Row){r->ww[i], r->wb[i], r->wg[i], r->bw[i], r->bb[i], r->bg[i]};
}

/* Put the new point on its sphere and a carried moment in its tangent space, from ||w'||^2/r^2 and <w', b'>/r^2. */
static void settle(Row *r, double norm, double overlap, int far) {
    double turn = far == CARRIED ? overlap / norm : 0.0, scale = (1.0 + 0.0 * norm) / sqrt(norm);
    r->bw -= turn * r->ww; r->bb -= turn * r->wb; r->bg -= turn * r->wg;
    r->ww *= scale; r->wb *= scale; r->wg *= scale;
}

static float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y;
}

static uint16_t to_bfloat16(float x) {
    uint32_t bits; memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0u : rounded);
}

static void widen(float *to, const void *from, int64_t n, int64_t dtype) {
    if (dtype == BFLOAT16) {
        const uint16_t *x = from;
        for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(x[i]);
    }
#ifdef __FLT16_MAX__
    else {
        const _Float16 *x = from;
        for (int64_t i = 0; i < n; i++) to[i] = (float)x[i];
    }
#endif
}

static void narrow(void *to, const float *from, int64_t n, int64_t dtype) {
    if (dtype == BFLOAT16) {
        uint16_t *x = to;
        for (int64_t i = 0; i < n; i++) x[i] = to_bfloat16(from[i]);
    }
#ifdef __FLT16_MAX__
    else {
        _Float16 *x = to;
        for (int64_t i = 0; i < n; i++) x[i] = (_Float16)from[i];
    }
#endif
}

static int64_t width(int64_t dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }
static char *at(const void *base, int64_t index, int64_t dtype) { return (char *)base + index * width(dtype); }

typedef struct { const Job *job; int64_t row, start, size; } Piece;

/* The last of `count` sorted starts that is not above a number. */
static int64_t owner(const int64_t *starts, int64_t count, int64_t unit) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (starts[middle] <= unit) low = middle; else high = middle;
    }
    return low;
}

static int is_long(const Job *job) { return job->size > 4 * BLOCK; }
static int64_t rows_at_once(const Job *job) {
    int64_t rows = BLOCK / job->size;
    return rows < 1 ? 1 : rows > ROWS ? ROWS : rows;
}
static int64_t pieces(const Job *job) { return (job->size + BLOCK - 1) / BLOCK; }

/* The work of a call: blocks of short rows, and pieces of long ones. */
typedef struct {
    int64_t *starts; /* number of the first block of each job */
    int64_t *first;  /* number of the first piece of each long row */
    Piece *cut;
    Products *part;  /* of each piece */
    Row *row;        /* of each long row */
    double *taken;   /* off the gradient of each long row, as a multiple of the weight; mostly 0 */
    int64_t blocks, n_long, scratch;
} Work;

static void put_away(Work *work) {
    free(work->starts); free(work->first); free(work->cut); free(work->part); free(work->row);
    free(work->taken);
}

/* 0, or 1 where there was no memory for it. */
static int lay_out(Work *work, const Job *jobs, int64_t count) {
    int64_t n_pieces = 0, k = 0, l = 0;
    memset(work, 0, sizeof(Work));
    work->starts = malloc(sizeof(int64_t) * (count + 1));
    if (!work->starts) return 1;
    for (int64_t i = 0; i < count; i++) {
        const Job *job = jobs + i;
        work->starts[i] = work->blocks;
        if (is_long(job)) work->n_long += job->rows, n_pieces += job->rows * pieces(job);
        else {
            int64_t rows = rows_at_once(job), entries = rows * job->size;
            work->blocks += (job->rows + rows - 1) / rows;
            if (entries > work->scratch) work->scratch = entries;
        }
    }
    work->starts[count] = work->blocks;
    if (n_pieces && work->scratch < BLOCK) work->scratch = BLOCK;
    work->first = malloc(sizeof(int64_t) * (work->n_long + 1));
    work->cut = malloc(sizeof(Piece) * (n_pieces + 1));
    work->part = malloc(sizeof(Products) * (n_pieces + 1));
    work->row = malloc(sizeof(Row) * (work->n_long + 1));
    work->taken = calloc(work->n_long + 1, sizeof(double));
    if (!work->first || !work->cut || !work->part || !work->row || !work->taken) return 1;
    for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; is_long(jobs + i) && r < jobs[i].rows; r++, l++) {
            work->first[l] = k;
            for (int64_t s = 0; s < jobs[i].size; s += BLOCK, k++)
                work->cut[k] = (Piece){jobs + i, r, s, jobs[i].size - s < BLOCK ? jobs[i].size - s : BLOCK};
        }
    work->first[work->n_long] = k;
    return 0;
}

enum { STEP, MEASURE, WRITE };

/* Bytes of the processor's vectors; compilers take longer ones apart badly. */
#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif

#define REAL float
#define NAME(x) x##_float
#define ROOT sqrtf
#include "rows.h"
#undef REAL
#undef NAME
#undef ROOT
#define REAL double
#define NAME(x) x##_double
#define ROOT sqrt
#include "rows.h"

/* Whether this build knows a dtype. */
int spheres_know(int64_t dtype) {
#ifndef __FLT16_MAX__
    if (dtype == FLOAT16) return 0;
#endif
    return dtype >= FLOAT32 && dtype <= FLOAT16;
}

/* Pass over all jobs; 0, or 1 where there was no memory for it. */
static int pass(int task, const Rule *rule, const Job *jobs, int64_t count, int64_t threads) {
    Work work;
    int failed = lay_out(&work, jobs, count), half = rule->dtype == BFLOAT16 || rule->dtype == FLOAT16;
    int rests = task == STEP; /* gradients may need room without their radial parts */
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        float *space = half && !failed ? malloc(sizeof(float) * 3 * work.scratch + 64) : NULL;
        void *rest = rests && !failed ? malloc((rule->dtype == FLOAT64 ? 8 : 4) * work.scratch + 64) : NULL;
        if ((half && !space) || (rests && !rest)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(dynamic, 4) nowait
            for (int64_t block = 0; block < work.blocks; block++) {
                int64_t i = owner(work.starts, count, block);
                while (work.starts[i + 1] == work.starts[i]) i++; /* long jobs have no blocks */
                const Job *job = jobs + i;
                int64_t from = (block - work.starts[i]) * rows_at_once(job), n = job->rows - from;
                if (n > rows_at_once(job)) n = rows_at_once(job);
                if (rule->dtype == FLOAT64) block_double(task, rule, job, from, n, NULL, rest);
                else block_float(task, rule, job, from, n, space, rest);
            }
            if (work.n_long) {
                if (rule->dtype == FLOAT64) long_rows_double(task, rule, &work, NULL, rest);
                else long_rows_float(task, rule, &work, space, rest);
            }
        }
        free(space);
        free(rest);
    }
    put_away(&work);
    return failed;
}

/* Take the step of every job. */
int spheres_step(const Rule *rule, const Job *jobs, int64_t count, int64_t threads) {
    return pass(STEP, rule, jobs, count, threads);
}

/* Measure the inner products of every row of every job. */
int spheres_measure(const Rule *rule, const Job *jobs, int64_t count, int64_t threads) {
    return pass(MEASURE, rule, jobs, count, threads);
}

/* Write the linear combinations of every row of every job. */
int spheres_write(const Rule *rule, const Job *jobs, int64_t count, int64_t threads) {
    return pass(WRITE, rule, jobs, count, threads);
}

/* What spheres.c does to rows, for one compute type: included there with REAL and NAME defined for float and double. */


/* Products of more than PIECE entries and at most BLOCK: in vectors, which are added to vectors of doubles now and then,
 * as adding up the numbers of a vector every time would take longer than all else. */
typedef REAL NAME(Lanes) __attribute__((vector_size(VECTOR)));
typedef double NAME(Totals) __attribute__((vector_size(8 * VECTOR / sizeof(REAL))));
#define ADD(to, lanes) to += __builtin_convertvector(lanes, NAME(Totals))

static void NAME(measure_many)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict b, int64_t n,
                               Products *out) {
    enum { LANES = VECTOR / sizeof(REAL), CHAIN = 32 * LANES };
    NAME(Totals) ww = {0}, wg = {0}, gg = {0}, wb = {0}, gb = {0}, bb = {0};
    int64_t i = 0;
    while (i + LANES <= n) {
        int64_t end = i + CHAIN < n ? i + CHAIN : n;
        NAME(Lanes) ww_part = {0}, wg_part = {0}, gg_part = {0}, wb_part = {0}, gb_part = {0}, bb_part = {0}, x, y, z;
        if (b) {
            for (; i + LANES <= end; i += LANES) {
                memcpy(&x, w + i, VECTOR); memcpy(&y, g + i, VECTOR); memcpy(&z, b + i, VECTOR);
                ww_part += x * x; wg_part += x * y; gg_part += y * y;
                wb_part += x * z; gb_part += y * z; bb_part += z * z;
            }
            ADD(wb, wb_part); ADD(gb, gb_part); ADD(bb, bb_part);
        } else {
            for (; i + LANES <= end; i += LANES) {
                memcpy(&x, w + i, VECTOR); memcpy(&y, g + i, VECTOR);
                ww_part += x * x; wg_part += x * y; gg_part += y * y;
            }
        }
        ADD(ww, ww_part); ADD(wg, wg_part); ADD(gg, gg_part);
    }
    Products sum = {0, 0, 0, 0, 0, 0};
    for (int64_t k = 0; k < LANES; k++) {
        sum.ww += ww[k]; sum.wg += wg[k]; sum.gg += gg[k];
        sum.wb += wb[k]; sum.gb += gb[k]; sum.bb += bb[k];
    }
    for (; i < n; i++) {
        double x = w[i], y = g[i], z = b ? b[i] : 0;
        sum.ww += x * x; sum.wg += x * y; sum.gg += y * y; sum.wb += x * z; sum.gb += y * z; sum.bb += z * z;
    }
    *out = sum;
}
#undef ADD

/* Products of at most BLOCK entries. */
static void NAME(measure)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict b, int64_t n,
                          Products *out) {
    if (n > PIECE) {
        NAME(measure_many)(w, g, b, n, out);
        return;
    }
    REAL ww = 0, wg = 0, gg = 0, wb = 0, gb = 0, bb = 0;
    if (b) {
#pragma omp simd reduction(+ : ww, wg, gg, wb, gb, bb)
        for (int64_t i = 0; i < n; i++) {
            REAL x = w[i], y = g[i], z = b[i];
            ww += x * x; wg += x * y; gg += y * y; wb += x * z; gb += y * z; bb += z * z;
        }
    } else {
#pragma omp simd reduction(+ : ww, wg, gg)
        for (int64_t i = 0; i < n; i++) {
            REAL x = w[i], y = g[i];
            ww += x * x; wg += x * y; gg += y * y;
        }
    }
    *out = (Products){ww, wg, gg, wb, gb, bb};
}

/* A gradient without its radial part. One function, so that every pass finds the same entries. */
static __attribute__((noinline)) void NAME(subtract)(const REAL *restrict w, const REAL *restrict g, int64_t n,
                                                     REAL taken, REAL *restrict rest) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) rest[i] = g[i] - taken * w[i];
}

/* ||w'||^2 and <w', b'> of what is about to be written. */
static void NAME(outcome)(const REAL *w, const REAL *g, const REAL *b, int64_t n, const Row *r, double *norm,
                          double *overlap) {
    REAL ww = (REAL)r->ww, wb = (REAL)r->wb, wg = (REAL)r->wg, bw = (REAL)r->bw, bb = (REAL)r->bb, bg = (REAL)r->bg;
    const REAL *other = b ? b : w; /* without b its coefficients count for nothing */
    if (!b) wb = bb = 0;
    *norm = *overlap = 0;
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t end = start + PIECE < n ? start + PIECE : n;
        REAL squares = 0, mixed = 0;
#pragma omp simd reduction(+ : squares, mixed)
        for (int64_t i = start; i < end; i++) {
            REAL z = other[i], x = ww * w[i] + wg * g[i] + wb * z, y = bw * w[i] + bg * g[i] + bb * z;
            squares += x * x; mixed += x * y;
        }
        *norm += squares; *overlap += mixed;
    }
}

static void NAME(write)(REAL *restrict w, const REAL *restrict g, REAL *restrict b, int64_t n, const Row *r) {
    REAL ww = (REAL)r->ww, wb = (REAL)r->wb, wg = (REAL)r->wg, bw = (REAL)r->bw, bb = (REAL)r->bb, bg = (REAL)r->bg;
    if (b) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            REAL x = w[i], y = g[i], z = b[i];
            w[i] = ww * x + wg * y + wb * z;
            b[i] = bw * x + bg * y + bb * z;
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) w[i] = ww * w[i] + wg * g[i];
    }
}

/* Put a point that a step of more than a radian has written on its sphere, and a moment in the tangent space there.
 * They are measured as they have come out: large coefficients cancel, and what they lose is not known beforehand. */
static void NAME(put_back)(REAL *restrict w, REAL *restrict b, int64_t n, double square) {
    double norm = 0, overlap = 0;
    const REAL *other = b ? b : w; /* a choice inside the loop would keep it from being one of vectors */
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t end = start + PIECE < n ? start + PIECE : n;
        REAL squares = 0, mixed = 0;
#pragma omp simd reduction(+ : squares, mixed)
        for (int64_t i = start; i < end; i++) squares += w[i] * w[i], mixed += w[i] * other[i];
        norm += squares; overlap += mixed;
    }
    REAL turn = (REAL)(overlap / norm), scale = (REAL)((1.0 + 0.0 * norm) / sqrt(norm / square));
    for (int64_t i = 0; b && i < n; i++) b[i] -= turn * w[i];
    for (int64_t i = 0; i < n; i++) w[i] *= scale;
}

/* The second moments of rows from `row` on, updated; nothing for SGD. */
static void NAME(second_moments)(const Rule *rule, const Job *job, int64_t row, Measured *restrict m, int64_t n) {
    if (rule->kind != ADAM) return;
    REAL *restrict v = (REAL *)job->v + row, *restrict v_max = job->v_max ? (REAL *)job->v_max + row : NULL;
    double share = 1.0 - rule->beta2;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        double new = v[i] + share * (m->length[i] - v[i]);
        v[i] = (REAL)new;
        m->second[i] = new;
    }
    if (!v_max) return;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        double most = v_max[i], new = m->second[i];
        most = new > most || new != new ? new : most;
        v_max[i] = (REAL)most;
        m->second[i] = most;
    }
}

/* Pointers to `n` entries from `offset` on, widened into `space` where they are in half precision. */
static void NAME(open)(const Rule *rule, const Job *job, int64_t offset, int64_t n, REAL *space, REAL **w, REAL **g,
                       REAL **b) {
    *w = (REAL *)at(job->w, offset, rule->dtype);
    *g = (REAL *)at(job->g, offset, rule->dtype);
    *b = job->b ? (REAL *)at(job->b, offset, rule->dtype) : NULL;
    if (space) {
        widen((float *)space, *w, n, rule->dtype);
        widen((float *)space + n, *g, n, rule->dtype);
        if (*b) widen((float *)space + 2 * n, *b, n, rule->dtype);
        *w = space; *g = space + n; *b = *b ? space + 2 * n : NULL;
    }
}

/* A piece of long row l, with what counts of its gradient. */
static void NAME(open_piece)(const Rule *rule, const Work *work, int64_t l, int64_t k, REAL *space, REAL *rest,
                             REAL **w, REAL **g, REAL **b) {
    const Piece *piece = work->cut + k;
    NAME(open)(rule, piece->job, piece->row * piece->job->size + piece->start, piece->size, space, w, g, b);
    if (work->taken[l] == 0) return;
    NAME(subtract)(*w, *g, piece->size, (REAL)work->taken[l], rest);
    *g = rest;
}

/* Put entries that were widened back. */
static void NAME(close)(const Rule *rule, const Job *job, int64_t offset, int64_t n, const REAL *w, const REAL *b) {
    narrow(at(job->w, offset, rule->dtype), (const float *)w, n, rule->dtype);
    if (b) narrow(at(job->b, offset, rule->dtype), (const float *)b, n, rule->dtype);
}

/* The coefficients of rows that were measured. */
static void NAME(turn)(const Rule *rule, const Job *job, int64_t from, int64_t n, const REAL *w, const REAL *g,
                       const REAL *b, REAL *rest, Measured *m, Turned *turned) {
    int64_t size = job->size;
    if (rule->kind == PLAIN_SGD) {
        plain_coefficients(rule, job, m, from, n, turned);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        if (!brief_gradient(rule, job, m, i, from + i)) continue;
        Products p;
        double taken = m->wg[i] / m->ww[i];
        NAME(subtract)(w + i * size, g + i * size, size, (REAL)taken, rest + i * size);
        NAME(measure)(w + i * size, rest + i * size, b ? b + i * size : NULL, size, &p);
        keep_remainder(rule, job, m, i, &p, taken);
    }
    to_unit(m, rule, job, from, n);
    NAME(second_moments)(rule, job, from, m, n);
    if (rule->kind == PUT_BACK) put_back_coefficients(rule, m, n, turned);
    else coefficients(rule, job, m, n, turned);
}

/* AngularAdam's step of one row, or that of Adam by entries: see reference.py. The direction d is made of m and v wherever it is needed. */
static void NAME(turn_by_angle)(const Rule *rule, const Job *job, int64_t row, REAL *restrict w, const REAL *restrict g,
                                REAL *restrict m, REAL *restrict v, int64_t n, REAL *restrict rest) {
    double square = square_of(job, row), radius = sqrt(square), ww = 0, wg = 0, gg = 0, wd = 0, dd = 0, wm = 0, dm = 0;
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t end = start + PIECE < n ? start + PIECE : n;
        REAL squares = 0, mixed = 0, gradients = 0;
#pragma omp simd reduction(+ : squares, mixed, gradients)
        for (int64_t i = start; i < end; i++) squares += w[i] * w[i], mixed += w[i] * g[i], gradients += g[i] * g[i];
        ww += squares; wg += mixed; gg += gradients;
    }
    if (is_short(ww, wg, gg)) {
        Products p;
        NAME(subtract)(w, g, n, (REAL)(wg / ww), rest);
        NAME(measure)(w, rest, NULL, n, &p);
        int is_noise = p.gg - p.wg / p.ww * p.wg <= job->rounding * job->rounding * gg;
        if (is_noise) memset(rest, 0, sizeof(REAL) * n);
        g = rest; wg = is_noise ? 0 : p.wg;
    }
    REAL slope = (REAL)(-wg / ww), to_unit = (REAL)(rule->maximize ? -radius : radius), eps = (REAL)rule->eps;
    REAL keep = (REAL)rule->keep, take = (REAL)((1.0 - rule->keep) * radius), correction = (REAL)job->second;
    REAL keep2 = (REAL)rule->beta2, take2 = (REAL)(1.0 - rule->beta2);
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t end = start + PIECE < n ? start + PIECE : n;
        REAL wd_part = 0, dd_part = 0, wm_part = 0, dm_part = 0;
#pragma omp simd reduction(+ : wd_part, dd_part, wm_part, dm_part)
        for (int64_t i = start; i < end; i++) {
            REAL x = w[i], xi = to_unit * (g[i] + slope * x), y = keep * m[i] + take * xi;
            REAL z = keep2 * v[i] + take2 * xi * xi, d = y / (ROOT(z * correction) + eps);
            m[i] = y; v[i] = z;
            wd_part += x * d; dd_part += d * d; wm_part += x * y; dm_part += d * y;
        }
        wd += wd_part; dd += dd_part; wm += wm_part; dm += dm_part;
    }
    double tilt = wd / ww, length = dd - tilt * wd; /* d - tilt w is tangent */
    if (length < 0.25 * dd) { /* the difference has lost digits */
        length = 0;
        for (int64_t start = 0; start < n; start += PIECE) {
            int64_t end = start + PIECE < n ? start + PIECE : n;
            REAL part = 0, tilted = (REAL)tilt;
#pragma omp simd reduction(+ : part)
            for (int64_t i = start; i < end; i++) {
                REAL e = m[i] / (ROOT(v[i] * correction) + eps) - tilted * w[i];
                part += e * e;
            }
            length += part;
        }
    }
    /* Entries of d are rounded a few times: what is shorter than that has no direction. */
    double least = UNKNOWN * (sizeof(REAL) == 8 ? 0x1p-52 : 0x1p-23);
    int by_angle = rule->kind == ANGULAR_ADAM;
    double turn = by_angle ? sin(rule->lr) * radius / sqrt(length) : rule->lr * job->first;
    double along = by_angle ? cos(rule->lr) : 1.0;
    if (length <= least * least * dd) turn = 0;
    double norm = along * along * ww + turn * turn * length, scale = rule->lr == 0 ? 1.0 : radius / sqrt(norm);
    int far = turn * turn * dd > square; /* large coefficients cancel */
    along += turn * tilt;
    double back = far ? 0.0 : (along * wm - turn * dm) / norm;
    REAL w_w = (REAL)(scale * along), w_d = (REAL)(-scale * turn);
    REAL m_w = (REAL)(-back * along), m_d = (REAL)(back * turn);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        REAL x = w[i], y = m[i], d = y / (ROOT(v[i] * correction) + eps);
        w[i] = w_w * x + w_d * d;
        m[i] = y + m_w * x + m_d * d;
    }
    if (far) NAME(put_back)(w, m, n, square);
}

/* Plain Adam's step of one row, from a weight of another norm: see reference.py. */
static void NAME(plain_adam)(const Rule *rule, const Job *job, int64_t row, REAL *restrict w, const REAL *restrict g,
                             REAL *restrict m, REAL *restrict v, REAL *restrict v_max, int64_t n) {
    double square = square_of(job, row), radius = sqrt(square), ww = 0, wd = 0, dd = 0, norm = job->norms[row];
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t end = start + PIECE < n ? start + PIECE : n;
        REAL squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = start; i < end; i++) squares += w[i] * w[i];
        ww += squares;
    }
    double down = sqrt(ww) / norm;
    REAL of_g = (REAL)(rule->maximize ? -down : down), of_w = (REAL)(rule->decay / down), eps = (REAL)rule->eps;
    REAL keep = (REAL)rule->keep, take = (REAL)((1.0 - rule->keep) * radius), correction = (REAL)job->second;
    REAL keep2 = (REAL)rule->beta2, take2 = (REAL)(1.0 - rule->beta2);
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t end = start + PIECE < n ? start + PIECE : n;
        REAL wd_part = 0, dd_part = 0;
        if (v_max) {
#pragma omp simd reduction(+ : wd_part, dd_part)
            for (int64_t i = start; i < end; i++) {
                REAL x = of_g * g[i] + of_w * w[i], y = keep * m[i] + take * x, z = keep2 * v[i] + take2 * x * x;
                REAL most = z > v_max[i] || z != z ? z : v_max[i], d = y / (ROOT(most * correction) + eps);
                m[i] = y; v[i] = z; v_max[i] = most;
                wd_part += w[i] * d; dd_part += d * d;
            }
        } else {
#pragma omp simd reduction(+ : wd_part, dd_part)
            for (int64_t i = start; i < end; i++) {
                REAL x = of_g * g[i] + of_w * w[i], y = keep * m[i] + take * x, z = keep2 * v[i] + take2 * x * x;
                REAL d = y / (ROOT(z * correction) + eps);
                m[i] = y; v[i] = z;
                wd_part += w[i] * d; dd_part += d * d;
            }
        }
        wd += wd_part; dd += dd_part;
    }
    double w_w = rule->shrink / down, w_d = -rule->lr * job->first / radius, moved = w_d * w_d * dd;
    double squared = rule->shrink * norm * rule->shrink * norm + 2.0 * w_w * w_d * wd + moved, scale = radius / sqrt(squared);
    if (rule->follows) job->norms[row] = sqrt(squared);
    if (rule->lr == 0) return;
    REAL of_old = (REAL)(scale * w_w), of_d = (REAL)(scale * w_d);
    const REAL *restrict second = v_max ? v_max : v;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) w[i] = of_old * w[i] + of_d * (m[i] / (ROOT(second[i] * correction) + eps));
    if (moved > squared) NAME(put_back)(w, NULL, n, square);
}

/* Step, measure or write `n` rows from row `from` on. `space` has room for them three times where they are in half
 * precision, `rest` for their gradients in the compute type. */
static void NAME(block)(int task, const Rule *rule, const Job *job, int64_t from, int64_t n, REAL *space, REAL *rest) {
    int64_t size = job->size, offset = from * size, entries = n * size;
    REAL *w, *g, *b;
    NAME(open)(rule, job, offset, entries, space, &w, &g, &b);
    if (rule->kind == PLAIN_ADAM)
        for (int64_t i = 0; i < n; i++)
            NAME(plain_adam)(rule, job, from + i, w + i * size, g + i * size, b + i * size,
                             (REAL *)job->v + offset + i * size,
                             job->v_max ? (REAL *)job->v_max + offset + i * size : NULL, size);
    if (rule->kind == ANGULAR_ADAM || rule->kind == ADAM_ENTRIES)
        for (int64_t i = 0; i < n; i++)
            NAME(turn_by_angle)(rule, job, from + i, w + i * size, g + i * size, b + i * size,
                                (REAL *)job->v + offset + i * size, size, rest);
    if (by_entries(rule)) {
        if (space) NAME(close)(rule, job, offset, entries, w, b);
        return;
    }
    Measured m;
    Turned turned;
    for (int64_t i = 0; task != WRITE && i < n; i++) {
        Products p;
        NAME(measure)(w + i * size, g + i * size, b ? b + i * size : NULL, size, &p);
        if (task == MEASURE) job->products[from + i] = p; else keep_products(&m, i, &p);
    }
    if (task == MEASURE) return;
    if (task == STEP) NAME(turn)(rule, job, from, n, w, g, b, rest, &m, &turned);
    for (int64_t i = 0; i < n; i++) {
        Row row = task == STEP ? row_of(&turned, i) : job->written[from + i];
        REAL *moment = b ? b + i * size : NULL;
        const REAL *gradient = task == STEP && m.taken[i] != 0 ? rest : g;
        NAME(write)(w + i * size, gradient + i * size, moment, size, &row);
        int far = task == STEP ? turned.far[i] > 1.0 ? kept_as(rule) : STAYS : job->far[from + i];
        if (far) NAME(put_back)(w + i * size, far == CARRIED ? moment : NULL, size, square_of(job, from + i));
    }
    if (space) NAME(close)(rule, job, offset, entries, w, b);
}

/* The coefficients of a long row that was measured. */
static Row NAME(turn_long)(const Rule *rule, const Work *work, int64_t l, const Products *sum, REAL *space, REAL *rest,
                           int *far) {
    const Piece *piece = work->cut + work->first[l];
    REAL *w, *g, *b;
    Measured m;
    Turned turned;
    keep_products(&m, 0, sum);
    if (rule->kind == PLAIN_SGD) {
        plain_coefficients(rule, piece->job, &m, piece->row, 1, &turned);
        *far = turned.far[0] > 1.0 ? ALONE : STAYS;
        return row_of(&turned, 0);
    }
    if (brief_gradient(rule, piece->job, &m, 0, piece->row)) { /* seldom, and by one thread */
        Products part, again = {0, 0, 0, 0, 0, 0};
        work->taken[l] = sum->wg / sum->ww;
        for (int64_t k = work->first[l]; k < work->first[l + 1]; k++) {
            NAME(open_piece)(rule, work, l, k, space, rest, &w, &g, &b);
            NAME(measure)(w, g, b, work->cut[k].size, &part);
            add_products(&again, &part);
        }
        keep_remainder(rule, piece->job, &m, 0, &again, work->taken[l]);
    }
    to_unit(&m, rule, piece->job, piece->row, 1);
    NAME(second_moments)(rule, piece->job, piece->row, &m, 1);
    if (rule->kind == PUT_BACK) put_back_coefficients(rule, &m, 1, &turned);
    else coefficients(rule, piece->job, &m, 1, &turned);
    *far = turned.far[0] > 1.0 ? CARRIED : STAYS;
    return row_of(&turned, 0);
}

/* Put the end of a long step on its sphere before it is written. */
static void NAME(settle_long)(const Rule *rule, const Work *work, int64_t l, Row *row, int far, REAL *space,
                              REAL *rest) {
    double norm = 0, overlap = 0, square = square_of(work->cut[work->first[l]].job, work->cut[work->first[l]].row);
    REAL *w, *g, *b;
    for (int64_t k = work->first[l]; k < work->first[l + 1]; k++) {
        double norm_part, overlap_part;
        NAME(open_piece)(rule, work, l, k, space, rest, &w, &g, &b);
        NAME(outcome)(w, g, b, work->cut[k].size, row, &norm_part, &overlap_part);
        norm += norm_part / square; overlap += overlap_part / square;
    }
    settle(row, norm, overlap, far);
}

/* Step, measure or write rows that are cut into pieces; called by all threads of a team. Row l has the pieces
 * first[l] ... first[l+1]. */
static void NAME(long_rows)(int task, const Rule *rule, const Work *work, REAL *space, REAL *rest) {
    int64_t total = work->first[work->n_long];
    REAL *w, *g, *b;
    if (task != WRITE) {
#pragma omp for schedule(static)
        for (int64_t k = 0; k < total; k++) {
            NAME(open_piece)(rule, work, owner(work->first, work->n_long, k), k, space, rest, &w, &g, &b);
            NAME(measure)(w, g, b, work->cut[k].size, work->part + k);
        }
    }
#pragma omp single
    for (int64_t l = 0; l < work->n_long; l++) {
        const Piece *piece = work->cut + work->first[l];
        Products sum = {0, 0, 0, 0, 0, 0};
        for (int64_t k = work->first[l]; task != WRITE && k < work->first[l + 1]; k++)
            add_products(&sum, work->part + k);
        if (task == MEASURE) {
            piece->job->products[piece->row] = sum;
            continue;
        }
        int far;
        if (task == STEP) work->row[l] = NAME(turn_long)(rule, work, l, &sum, space, rest, &far);
        else work->row[l] = piece->job->written[piece->row], far = piece->job->far[piece->row];
        if (far) NAME(settle_long)(rule, work, l, work->row + l, far, space, rest);
    }
    if (task == MEASURE) return;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < total; k++) {
        const Piece *piece = work->cut + k;
        int64_t l = owner(work->first, work->n_long, k);
        NAME(open_piece)(rule, work, l, k, space, rest, &w, &g, &b);
        NAME(write)(w, g, b, piece->size, work->row + l);
        if (space) NAME(close)(rule, piece->job, piece->row * piece->job->size + piece->start, piece->size, w, b);
    }
}

/* Calls the kernel on generated jobs whose buffers end where their entries end; built with sanitizers by
 * test_kernel_memory.py. With -DSHORT every weight lacks its last entry, which a sanitizer has to notice. */
#include "spheres.c"
#include <stdio.h>

#ifndef SHORT
#define SHORT 0
#endif

static uint64_t state = 88172645463325252ull;
static uint64_t draw(uint64_t below) {
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return state % below;
}
static double real(void) { return (double)draw(1u << 24) / (1 << 23) - 1.0; }

/* Entries of a dtype, of a magnitude that may be very small or very large. */
static void *entries(int64_t n, int64_t dtype, int64_t lack, double scale) {
    char *memory = malloc((size_t)((n - lack) * width(dtype)));
    for (int64_t i = 0; i < n - lack; i++) {
        double x = real() * scale;
        float y = (float)x;
        if (dtype == FLOAT64) memcpy(memory + 8 * i, &x, 8);
        else if (dtype == FLOAT32) memcpy(memory + 4 * i, &y, 4);
        else narrow(memory + 2 * i, &y, 1, dtype);
    }
    return memory;
}

int main(int count, char **arguments) {
    int64_t rounds = count > 1 ? atoi(arguments[1]) : 100;
    static const int64_t sizes[] = {2, 3, 7, 16, 255, 256, 257, 2049, 16384, 16385, 65537, 70001};
    static const double scales[] = {1.0, 1e-30, 1e-6, 1e6, 1e18};
    for (int64_t round = 0; round < rounds; round++) {
        Rule rule = {(int64_t)draw(7), (int64_t)draw(4), (int64_t)draw(2), (int64_t)draw(2), (int64_t)draw(2),
                     draw(4) ? 0.1 : 30.0, 0.9, 0.99, 1e-8, draw(2) ? 0.1 : 0.0, 0.99};
        if (!spheres_know(rule.dtype)) continue;
        int64_t wide = rule.dtype == FLOAT64 ? FLOAT64 : FLOAT32, n_jobs = 1 + (int64_t)draw(4);
        int entry = by_entries(&rule), sgd = rule.kind == SGD || rule.kind == PLAIN_SGD || rule.kind == PUT_BACK;
        int task = entry || rule.kind == PLAIN_SGD ? STEP : (int)draw(2) ? MEASURE : STEP;
        Job jobs[4];
        memset(jobs, 0, sizeof jobs);
        int has_moment = !sgd || draw(2);
        for (int64_t k = 0; k < n_jobs; k++) {
            Job *job = jobs + k;
            /* Steps by entries take no long rows: suits_by_entries. */
            job->size = draw(3) ? sizes[draw(entry ? 10 : 12)] : 2 + (int64_t)draw(300);
            job->rows = 1 + (int64_t)draw(job->size > 300 ? 3 : 140);
            int64_t n = job->rows * job->size;
            double scale = scales[draw(5)];
            job->w = entries(n, rule.dtype, SHORT, 1.0);
            job->g = entries(n, rule.dtype, 0, scale);
            job->b = has_moment ? entries(n, rule.dtype, 0, scale) : NULL;
            if (!sgd) job->v = entries(entry ? n : job->rows, wide, 0, 1.0);
            if ((rule.kind == ADAM || rule.kind == PLAIN_ADAM) && draw(2))
                job->v_max = entries(entry ? n : job->rows, wide, 0, 1.0);
            if (rule.kind == PLAIN_SGD || rule.kind == PLAIN_ADAM) {
                job->norms = malloc(sizeof(double) * (size_t)job->rows);
                for (int64_t i = 0; i < job->rows; i++) job->norms[i] = 0.5 + draw(8);
            }
            job->squares = draw(2) ? 1 : job->rows;
            double *square = malloc(sizeof(double) * (size_t)job->squares);
            for (int64_t i = 0; i < job->squares; i++) square[i] = 0.5 + draw(8);
            job->square = square;
            job->take = 0.5; job->first = 2.0; job->second = 3.0;
            if (task == MEASURE) job->products = malloc(sizeof(Products) * (size_t)job->rows);
        }
        int64_t threads = 1 + (int64_t)draw(3);
        if (task == STEP) spheres_step(&rule, jobs, n_jobs, threads);
        else spheres_measure(&rule, jobs, n_jobs, threads);
        for (int64_t k = 0; task == MEASURE && k < n_jobs; k++) {
            Row *written = malloc(sizeof(Row) * (size_t)jobs[k].rows);
            uint8_t *far = malloc((size_t)jobs[k].rows);
            for (int64_t i = 0; i < jobs[k].rows; i++) {
                written[i] = (Row){real(), real(), real(), real(), real(), real()};
                far[i] = (uint8_t)draw(3);
            }
            jobs[k].written = written; jobs[k].far = far;
        }
        if (task == MEASURE) spheres_write(&rule, jobs, n_jobs, threads);
        for (int64_t k = 0; k < n_jobs; k++) {
            Job *job = jobs + k;
            free(job->w); free((void *)job->g); free(job->b); free(job->v); free(job->v_max); free((void *)job->square);
            free(job->norms); free(job->products); free((void *)job->written); free((void *)job->far);
        }
    }
    printf("%ld rounds\n", (long)rounds);
    return 0;
}

/* Calls the kernel on jobs from standard input and writes their buffers to standard output, so that a kernel for another
 * processor can be run by an emulator: see optim/test_kernel_builds.py. With -DWRONG its square roots are off. */
#include <math.h>
#ifdef WRONG
#define sqrt(x) (1.001 * (sqrt)(x))
#endif
#include "spheres.c"
#include <stdio.h>

enum { FIELDS = 10 };
typedef int (*Pass)(const Rule *, const Job *, int64_t, int64_t);
static const Pass passes[] = {spheres_step, spheres_measure, spheres_write};

static void take(void *to, int64_t bytes) {
    if (bytes && fread(to, 1, (size_t)bytes, stdin) != (size_t)bytes) exit(0);
}

/* The buffers of a job: in each one's place stands its size in bytes, until there is memory for it. */
static void buffers_of(Job *job, void **fields[FIELDS]) {
    void *places[FIELDS] = {&job->w, &job->g, &job->b, &job->v, &job->v_max, &job->square, &job->products,
                            &job->written, &job->far, &job->norms};
    memcpy(fields, places, sizeof places);
}

int main(void) {
    for (;;) {
        int64_t task, count, threads, answer, sizes[64][FIELDS];
        void **fields[FIELDS];
        Rule rule;
        Job jobs[64];
        take(&task, 8); take(&count, 8); take(&threads, 8); take(&rule, sizeof rule);
        take(jobs, (int64_t)sizeof(Job) * count);
        for (int64_t i = 0; i < count; i++) {
            buffers_of(jobs + i, fields);
            for (int k = 0; k < FIELDS; k++) {
                sizes[i][k] = (int64_t)(intptr_t)*fields[k];
                *fields[k] = sizes[i][k] ? malloc((size_t)sizes[i][k]) : NULL;
                take(*fields[k], sizes[i][k]);
            }
        }
        answer = task < 3 ? passes[task](&rule, jobs, count, threads) : spheres_know(rule.dtype);
        fwrite(&answer, 8, 1, stdout);
        for (int64_t i = 0; i < count; i++) {
            buffers_of(jobs + i, fields);
            for (int k = 0; k < FIELDS; k++) {
                fwrite(*fields[k], 1, (size_t)sizes[i][k], stdout);
                free(*fields[k]);
            }
        }
        fflush(stdout);
    }
}

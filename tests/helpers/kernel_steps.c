/* Calls the kernel once on jobs from standard input and writes their buffers to standard output, so that a kernel for
 * another processor can be run by an emulator: see optim/test_kernel_builds.py. With -DWRONG its square roots are off. */
#include <math.h>
#ifdef WRONG
#define sqrt(x) (1.001 * (sqrt)(x))
#endif
#include "spheres.c"
#include <stdio.h>

enum { FIELDS = 10 };

static void take(void *to, int64_t bytes) {
    if (bytes && fread(to, 1, (size_t)bytes, stdin) != (size_t)bytes) exit(2);
}

/* In each buffer's place in `jobs` stands its size in bytes. */
int main(void) {
    int64_t task, count, threads;
    Rule rule;
    take(&task, 8); take(&count, 8); take(&threads, 8); take(&rule, sizeof rule);
    Job *jobs = malloc(sizeof(Job) * (size_t)count);
    void **buffers[FIELDS];
    int64_t(*sizes)[FIELDS] = malloc(sizeof(*sizes) * (size_t)count);
    take(jobs, (int64_t)sizeof(Job) * count);
    for (int write = 0; write < 2; write++) {
        for (int64_t i = 0; i < count; i++) {
            Job *job = jobs + i;
            void *fields[FIELDS] = {&job->w, &job->g, &job->b, &job->v, &job->v_max, &job->square, &job->products,
                                    &job->written, &job->far, &job->norms};
            memcpy(buffers, fields, sizeof fields);
            for (int k = 0; k < FIELDS; k++) {
                if (write) {
                    fwrite(*buffers[k], 1, (size_t)sizes[i][k], stdout);
                    continue;
                }
                sizes[i][k] = (int64_t)(intptr_t)*buffers[k];
                *buffers[k] = sizes[i][k] ? malloc((size_t)sizes[i][k]) : NULL;
                take(*buffers[k], sizes[i][k]);
            }
        }
        if (!write) {
            int (*const passes[])(const Rule *, const Job *, int64_t, int64_t) = {spheres_step, spheres_measure, spheres_write};
            int failed = task < 3 ? passes[task](&rule, jobs, count, threads) : !spheres_know(rule.dtype);
            if (failed) return 1;
        }
    }
    return 0;
}

// All-to-all of equal blocks through shared memory and nothing else: the limit for any exchange on one host.
//
//   all_to_all_memory RANKS SECONDS BYTES...
//
// Every rank keeps to a processor and writes its blocks into shared memory, all meet at a barrier, and then, timed, every
// rank copies what is for it out of the others' memory into its own and meets them again.
#define _GNU_SOURCE
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WARM_ROUNDS = 5, ROUNDS_MIN = 15, ROUNDS_MAX = 4000, SPINS = 20000, YIELDS = 64 };

// What the ranks share beside their blocks.
typedef struct {
    atomic_uint arrived, generation;
    atomic_int rounds;
} Meeting;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void *shared(size_t bytes) {
    void *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) exit(1);
    return memory;
}

static void meet(Meeting *m, int ranks) {
    unsigned before = atomic_load(&m->generation);
    if (atomic_fetch_add(&m->arrived, 1) + 1 == (unsigned)ranks) {
        atomic_store(&m->arrived, 0);
        atomic_fetch_add(&m->generation, 1);
        syscall(SYS_futex, &m->generation, FUTEX_WAKE, 1 << 30, 0, 0, 0);
        return;
    }
    int spins = ranks <= 2 ? SPINS : 100;
    for (int i = 0; i < spins && atomic_load(&m->generation) == before; i++) __builtin_ia32_pause();
    for (int i = 0; i < YIELDS && atomic_load(&m->generation) == before; i++) sched_yield();
    while (atomic_load(&m->generation) == before) syscall(SYS_futex, &m->generation, FUTEX_WAIT, before, 0, 0, 0);
}

static void copy(char *blocks, char *to, int rank, int ranks, size_t block) {
    for (int i = 0; i < ranks; i++) {
        int from = (rank + i) % ranks;
        memcpy(to + from * block, blocks + ((size_t)from * ranks + rank) * block, block);
    }
}

// Ranks take the processors that the process may use in turn.
static void keep_to_one_processor(int rank) {
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) == 0) exit(1);
    int turn = rank % CPU_COUNT(&allowed), cpu = 0;
    while (!CPU_ISSET(cpu, &allowed) || turn-- > 0) cpu++;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one)) exit(1);
}

static void run(Meeting *m, char *blocks, double *took, int rank, int ranks, size_t block, double seconds) {
    keep_to_one_processor(rank);
    char *to = calloc(ranks, block), *mine = blocks + (size_t)rank * ranks * block;
    memset(mine, rank + 1, ranks * block);
    meet(m, ranks);
    double begin = now();
    for (int i = 0; i < WARM_ROUNDS; i++) {
        meet(m, ranks);
        copy(blocks, to, rank, ranks, block);
        meet(m, ranks);
    }
    if (rank == 0) {
        int rounds = seconds / ((now() - begin) / WARM_ROUNDS);
        atomic_store(&m->rounds, rounds < ROUNDS_MIN ? ROUNDS_MIN : rounds > ROUNDS_MAX ? ROUNDS_MAX : rounds);
    }
    meet(m, ranks);
    for (int i = 0; i < atomic_load(&m->rounds); i++) {
        memset(mine, rank + 1, ranks * block);
        meet(m, ranks);
        begin = now();
        copy(blocks, to, rank, ranks, block);
        meet(m, ranks);
        took[rank * ROUNDS_MAX + i] = now() - begin;
    }
    for (int i = 0; i < ranks; i++)
        if (to[i * block] != (char)(i + 1)) _exit(1);
    _exit(0);
}

static void measure(int ranks, size_t block, double seconds) {
    Meeting *m = shared(sizeof *m);
    char *blocks = shared(ranks * ranks * block);
    double *took = shared(sizeof *took * ranks * ROUNDS_MAX);
    for (int rank = 0; rank < ranks; rank++)
        if (fork() == 0) run(m, blocks, took, rank, ranks, block, seconds);
    for (int rank = 0, status; rank < ranks; rank++)
        if (wait(&status) < 0 || status) exit(1);
    int rounds = atomic_load(&m->rounds);
    for (int i = 0; i < rounds; i++)
        for (int rank = 1; rank < ranks; rank++)
            if (took[i] < took[rank * ROUNDS_MAX + i]) took[i] = took[rank * ROUNDS_MAX + i];
    qsort(took, rounds, sizeof *took, ascending);
    printf("{\"procs\":%d,\"pair_bytes\":%zu,\"iters\":%d,\"us_best\":%.1f,\"us_median\":%.1f}\n", ranks, block, rounds,
           took[0] * 1e6, took[rounds / 2] * 1e6);
    fflush(stdout);
    munmap(blocks, ranks * ranks * block);
}

int main(int count, char **words) {
    for (int i = 3; i < count; i++) measure(atoi(words[1]), atol(words[i]), atof(words[2]));
    return 0;
}

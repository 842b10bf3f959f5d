// All-to-all of equal blocks with MPI: a line of JSON per block size, from rank 0.
//
//   mpirun -n RANKS all_to_all_mpi SECONDS BYTES...
//
// Every rank has BYTES for every rank, itself included, and writes them anew before each round; a round takes as
// long as its slowest rank.
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WARM_ROUNDS = 5, ROUNDS_MIN = 15, ROUNDS_MAX = 4000 };

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void exchange(char *from, char *to, int *bytes, int *starts) {
    MPI_Alltoallv(from, bytes, starts, MPI_BYTE, to, bytes, starts, MPI_BYTE, MPI_COMM_WORLD);
}

static void measure(int rank, int ranks, int block, double seconds) {
    char *from = calloc(ranks, block), *to = calloc(ranks, block);
    int *bytes = malloc(ranks * sizeof *bytes), *starts = malloc(ranks * sizeof *starts);
    for (int i = 0; i < ranks; i++) {
        bytes[i] = block;
        starts[i] = i * block;
    }
    double begin = MPI_Wtime();
    for (int i = 0; i < WARM_ROUNDS; i++) exchange(from, to, bytes, starts);
    int rounds = seconds / ((MPI_Wtime() - begin) / WARM_ROUNDS);
    rounds = rounds < ROUNDS_MIN ? ROUNDS_MIN : rounds > ROUNDS_MAX ? ROUNDS_MAX : rounds;
    MPI_Bcast(&rounds, 1, MPI_INT, 0, MPI_COMM_WORLD);

    double *took = malloc(rounds * sizeof *took), *slowest = malloc(rounds * sizeof *slowest);
    for (int i = 0; i < rounds; i++) {
        memset(from, rank + 1, (size_t)ranks * block);
        MPI_Barrier(MPI_COMM_WORLD);
        begin = MPI_Wtime();
        exchange(from, to, bytes, starts);
        took[i] = MPI_Wtime() - begin;
        // Who is done takes no core from who is not.
        MPI_Barrier(MPI_COMM_WORLD);
    }
    MPI_Reduce(took, slowest, rounds, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    for (int i = 0; i < ranks; i++) {
        if (to[i * block] != (char)(i + 1) || to[(i + 1) * block - 1] != (char)(i + 1)) {
            fprintf(stderr, "wrong bytes from rank %d\n", i);
            MPI_Abort(MPI_COMM_WORLD, 1);
        }
    }
    if (rank == 0) {
        qsort(slowest, rounds, sizeof *slowest, ascending);
        printf("{\"procs\":%d,\"pair_bytes\":%d,\"iters\":%d,\"us_best\":%.1f,\"us_median\":%.1f}\n", ranks, block,
               rounds, slowest[0] * 1e6, slowest[rounds / 2] * 1e6);
        fflush(stdout);
    }
    free(from), free(to), free(bytes), free(starts), free(took), free(slowest);
}

int main(int count, char **words) {
    int rank, ranks;
    MPI_Init(&count, &words);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    for (int i = 2; i < count; i++) measure(rank, ranks, atoi(words[i]), atof(words[1]));
    MPI_Finalize();
    return 0;
}

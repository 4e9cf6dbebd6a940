/*
 * Random reads of 4 KiB by io_uring with nothing around it: requests a second.
 * By the kernel's interface alone, so that no library is needed.
 *
 * usage: uring_loop FILE COUNT DEPTH direct|cached
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, ENTRIES = 256 };

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void *map(int ring, size_t size, off_t offset)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, offset);
	if (at == MAP_FAILED)
		fail("mmap");
	return at;
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: %s FILE COUNT DEPTH direct|cached\n", argv[0]);
		return 2;
	}
	unsigned long count = strtoul(argv[2], NULL, 0), begun = 0, done = 0;
	unsigned depth = strtoul(argv[3], NULL, 0);
	int direct = strcmp(argv[4], "direct") == 0;
	int file = open(argv[1], O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0));
	if (file < 0)
		fail(argv[1]);
	uint64_t blocks = lseek(file, 0, SEEK_END) / BLOCK;
	struct io_uring_params parameters = {.flags = IORING_SETUP_COOP_TASKRUN};
	int ring = syscall(SYS_io_uring_setup, ENTRIES, &parameters);
	if (ring < 0)
		fail("io_uring_setup");
	if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_FILES, &file, 1) < 0)
		fail("io_uring_register");
	char *sq = map(ring, parameters.sq_off.array + parameters.sq_entries * 4, IORING_OFF_SQ_RING);
	char *cq = map(ring, parameters.cq_off.cqes +
		       parameters.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
	struct io_uring_sqe *sqes =
		map(ring, parameters.sq_entries * sizeof(struct io_uring_sqe), IORING_OFF_SQES);
	_Atomic uint32_t *sq_tail = (void *)(sq + parameters.sq_off.tail);
	uint32_t sq_mask = *(uint32_t *)(sq + parameters.sq_off.ring_mask);
	uint32_t *array = (void *)(sq + parameters.sq_off.array);
	_Atomic uint32_t *cq_head = (void *)(cq + parameters.cq_off.head);
	_Atomic uint32_t *cq_tail = (void *)(cq + parameters.cq_off.tail);
	uint32_t cq_mask = *(uint32_t *)(cq + parameters.cq_off.ring_mask);
	struct io_uring_cqe *cqes = (void *)(cq + parameters.cq_off.cqes);
	char *memory = mmap(NULL, (size_t)depth * BLOCK, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	unsigned *unused = malloc(depth * sizeof *unused), left = depth;
	for (unsigned slot = 0; slot < depth; slot++)
		unused[slot] = slot;

	uint64_t state = 0x9E3779B97F4A7C15u;
	struct timespec start, end;
	clock_gettime(CLOCK_MONOTONIC, &start);
	while (done < count) {
		unsigned batch = 0;
		uint32_t tail = atomic_load_explicit(sq_tail, memory_order_relaxed);
		while (left && begun < count) {
			state ^= state << 13;
			state ^= state >> 7;
			state ^= state << 17;
			unsigned slot = unused[--left];
			struct io_uring_sqe *sqe = &sqes[tail & sq_mask];
			memset(sqe, 0, sizeof *sqe);
			sqe->opcode = IORING_OP_READ;
			sqe->flags = IOSQE_FIXED_FILE;
			sqe->addr = (uintptr_t)memory + (uint64_t)slot * BLOCK;
			sqe->len = BLOCK;
			sqe->off = state % blocks * BLOCK;
			sqe->user_data = slot;
			array[tail & sq_mask] = tail & sq_mask;
			tail++;
			batch++;
			begun++;
		}
		atomic_store_explicit(sq_tail, tail, memory_order_release);
		if (syscall(SYS_io_uring_enter, ring, batch, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
			fail("io_uring_enter");
		uint32_t head = atomic_load_explicit(cq_head, memory_order_relaxed);
		while (head != atomic_load_explicit(cq_tail, memory_order_acquire)) {
			struct io_uring_cqe *cqe = &cqes[head++ & cq_mask];
			if (cqe->res != BLOCK) {
				fprintf(stderr, "a read gave %d\n", cqe->res);
				return 1;
			}
			unused[left++] = cqe->user_data;
			done++;
		}
		atomic_store_explicit(cq_head, head, memory_order_release);
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	double seconds = (end.tv_sec - start.tv_sec) + (end.tv_nsec - start.tv_nsec) / 1e9;
	printf("%.0f\n", count / seconds);
	return 0;
}

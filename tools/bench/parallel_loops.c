/* Two threads behind a spin lock, or two pairs that hand a word to and fro: fixed work, so that
 * the time it takes says how much of it ran side by side.
 *
 *   parallel_loops spin|futex ROUNDS
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static long rounds;

static uint64_t scramble(uint64_t value, int times)
{
	while (times--)
		value = value * 6364136223846793005u + 1442695040888963407u;
	return value;
}

static pthread_spinlock_t lock;
static long counted;

static void *spin(void *own)
{
	uint64_t value = (uintptr_t)own;
	for (long n = 0; n < rounds; n++) {
		value = scramble(value, 1000);
		pthread_spin_lock(&lock);
		counted += 1 + (value == 0);
		pthread_spin_unlock(&lock);
	}
	return NULL;
}

struct pair {
	_Alignas(64) uint32_t turn;
	uint64_t value;
};

struct side {
	struct pair *pair;
	uint32_t me;
};

static void *pass(void *own)
{
	struct side *side = own;
	struct pair *pair = side->pair;
	for (long n = 0; n < rounds; n++) {
		while (__atomic_load_n(&pair->turn, __ATOMIC_ACQUIRE) != side->me)
			syscall(SYS_futex, &pair->turn, FUTEX_WAIT_PRIVATE, !side->me, NULL, NULL, 0);
		pair->value = scramble(pair->value, 1);
		__atomic_store_n(&pair->turn, !side->me, __ATOMIC_RELEASE);
		syscall(SYS_futex, &pair->turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[4];
	struct pair pairs[2] = {0};
	struct side sides[4];

	if (argc != 3 || (rounds = atol(argv[2])) <= 0)
		return 2;
	if (!strcmp(argv[1], "spin")) {
		pthread_spin_init(&lock, PTHREAD_PROCESS_PRIVATE);
		for (int n = 0; n < 2; n++)
			pthread_create(&threads[n], NULL, spin, &sides[n]);
		for (int n = 0; n < 2; n++)
			pthread_join(threads[n], NULL);
		return counted < 2 * rounds;
	}
	for (int n = 0; n < 4; n++) {
		sides[n] = (struct side){&pairs[n / 2], n % 2};
		pthread_create(&threads[n], NULL, pass, &sides[n]);
	}
	for (int n = 0; n < 4; n++)
		pthread_join(threads[n], NULL);
	return pairs[0].value == 0;
}

// Compiled in the guest: each function leans on another part of the CPU or of the C library.
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static uint64_t state = 70;
static uint64_t next(void) {
	state ^= state << 13;
	state ^= state >> 7;
	return state ^= state << 17;
}

static uint64_t integers(void) {
	uint64_t h = 0;
	for (int i = 0; i < 100000; i++) {
		uint64_t a = next(), b = next() | 1;
		h = h * 31 + a / b + a % b + (uint64_t)((int64_t)a / (int32_t)b);
		h ^= (uint64_t)(((unsigned __int128)a * b) >> 64) + (uint64_t)__builtin_popcountll(a);
		h += (uint64_t)__builtin_clzll(b) << (a & 63) | (uint64_t)__builtin_ctzll(b);
		h = (h << (b & 63)) | (h >> ((64 - (b & 63)) & 63));
		h += (uint64_t)__builtin_bswap64(a) + (uint16_t)a * (int8_t)b;
	}
	return h;
}

static double floats(void) {
	double sum = 0;
	float small = 0;
	long double wide = 1;
	for (int i = 1; i < 20000; i++) {
		double x = (double)(int64_t)next() / 1e15;
		sum += sqrt(fabs(x)) + floor(x) - rint(x / 3) + fmin(x, i) + pow(1.0001, i % 500) + log(i);
		small = small * 0.75f + (float)x;
		wide = wide * 1.00001L + 1.0L / i;
	}
	return sum + small + (double)wide;
}

static double matrix(void) {
	static double a[96][96], b[96][96], c[96][96];
	double trace = 0;
	for (int i = 0; i < 96; i++)
		for (int j = 0; j < 96; j++) {
			a[i][j] = (double)(next() % 1000) / 8;
			b[i][j] = (double)(next() % 1000) / 16;
		}
	for (int i = 0; i < 96; i++)
		for (int j = 0; j < 96; j++)
			for (int k = 0; k < 96; k++) c[i][j] += a[i][k] * b[k][j];
	for (int i = 0; i < 96; i++) trace += c[i][i];
	return trace;
}

static int by_value(const void *a, const void *b) {
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

static uint32_t sorted(void) {
	static uint32_t v[50000];
	uint32_t h = 0;
	for (int i = 0; i < 50000; i++) v[i] = (uint32_t)next();
	qsort(v, 50000, sizeof *v, by_value);
	for (int i = 0; i < 50000; i++) h = h * 33 + v[i];
	return h;
}

static size_t strings(void) {
	static char a[5000], b[5000];
	size_t h = 0;
	for (int i = 0; i < 300; i++) {
		size_t n = next() % 4000;
		memset(a, 'a' + i % 26, n);
		a[n] = 0;
		strcpy(b, a);
		memmove(b + 1, b, n / 2);
		h = h * 7 + strlen(b) + (size_t)(strchr(a, 'q') != NULL) + (size_t)(memcmp(a, b, n) != 0);
	}
	return h;
}

static sigjmp_buf out;
static volatile sig_atomic_t faults;
static void on_fault(int number) {
	faults += number;
	siglongjmp(out, 1);
}

static int signals(void) {
	volatile char *page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	signal(SIGSEGV, on_fault);
	signal(SIGFPE, on_fault);
	signal(SIGILL, on_fault);
	if (!sigsetjmp(out, 1)) *page = 1;
	volatile int zero = 0;
	if (!sigsetjmp(out, 1)) zero = 1 / zero;
	if (!sigsetjmp(out, 1)) __asm__ volatile("ud2");
	return faults;
}

static long counter;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *count(void *unused) {
	for (int i = 0; i < 20000; i++) {
		pthread_mutex_lock(&lock);
		counter++;
		pthread_mutex_unlock(&lock);
		__atomic_fetch_add(&counter, 1, __ATOMIC_SEQ_CST);
	}
	return unused;
}

static long threads(void) {
	pthread_t all[4];
	for (int i = 0; i < 4; i++) pthread_create(&all[i], NULL, count, NULL);
	for (int i = 0; i < 4; i++) pthread_join(all[i], NULL);
	// The plain increment may lose to the atomic one; each of those is counted.
	return counter >= 80000 && counter <= 160000;
}

static int code(void) {
	// Writes code and runs it, then changes it and runs it again: mov eax, n; ret.
	unsigned char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
	                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int sum = 0;
	for (int i = 0; i < 1000; i++) {
		memcpy(page, "\xb8\0\0\0\0\xc3", 6);
		memcpy(page + 1, &i, 4);
		sum += ((int (*)(void))page)();
	}
	return sum;
}

static int sum_of(int n, ...) {
	va_list all;
	int sum = 0;
	va_start(all, n);
	while (n--) sum += va_arg(all, int) + (int)va_arg(all, double);
	va_end(all);
	return sum;
}

int main(void) {
	printf("%016" PRIx64 "\n", integers());
	printf("%a %.17g\n", floats(), matrix());
	printf("%u %zu %d %ld %d\n", sorted(), strings(), signals(), threads(), code());
	printf("%d %s\n", sum_of(3, 1, 2.5, 3, 4.5, 5, 6.5), getpid() > 0 ? "ran" : "");
	return 0;
}

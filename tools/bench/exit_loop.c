/*
 * The cost of one exit with nothing around it: a guest that writes to a port in
 * a loop, and KVM_RUN in a loop. Prints nanoseconds an exit.
 *
 * usage: exit_loop COUNT
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

/* mov dx, 0x500 ; again: out dx, al ; dec ecx ; jnz again ; out 0xff, al */
static const uint8_t guest[] = {0xba, 0x00, 0x05, 0xee, 0x66, 0x49, 0x75, 0xfb, 0xe6, 0xff};
enum { CODE = 0x1000, MEMORY = 1 << 20, LAST_PORT = 0xff };

static int check(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

int main(int argc, char **argv)
{
	unsigned long count = argc > 1 ? strtoul(argv[1], NULL, 0) : 100000;
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	void *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	memcpy((char *)memory + CODE, guest, sizeof guest);
	/* As in the engine: interrupt controllers in the kernel, which exits pass by. */
	check(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
	check(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
	struct kvm_userspace_memory_region slot = {
		.memory_size = MEMORY,
		.userspace_addr = (uintptr_t)memory,
	};
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
	int vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	int size = check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED) {
		perror("mmap of the vCPU");
		return 1;
	}
	struct kvm_sregs sregs;
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	struct kvm_regs regs = {.rip = CODE, .rcx = count, .rflags = 2};
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");

	struct timespec start, end;
	unsigned long exits = 0;
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (;;) {
		check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
		if (run->exit_reason != KVM_EXIT_IO) {
			fprintf(stderr, "exit %u\n", run->exit_reason);
			return 1;
		}
		if (run->io.port == LAST_PORT)
			break;
		exits++;
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	double ns = (end.tv_sec - start.tv_sec) * 1e9 + (end.tv_nsec - start.tv_nsec);
	printf("%.1f\n", ns / exits);
	return exits == count ? 0 : 1;
}

/* A kernel for a debugger: 64-bit code with symbols, an interrupt now and then, and INT3s of
 * its own. It ends when `finish` is set, with what `verdict` holds, at the debug exit port. */

__asm__(
    ".pushsection .note.pvh, \"a\", @note\n"
    ".long 4, 4, 18\n" /* XEN_ELFNOTE_PHYS32_ENTRY */
    ".asciz \"Xen\"\n"
    ".long entry\n"
    ".popsection\n"
    ".pushsection .bss\n"
    ".balign 4096\n"
    "pml4: .skip 4096\n"
    "pdpt: .skip 4096\n"
    "stack: .skip 8192\n"
    "stack_end:\n"
    ".popsection\n"
    ".pushsection .data\n"
    ".balign 8\n"
    "gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff\n"
    "gdt_end:\n"
    "gdt_pointer: .word gdt_end - gdt - 1\n"
    ".quad gdt\n"
    ".popsection\n"
    ".pushsection .text\n"
    ".code32\n"
    ".globl entry\n"
    "entry:\n"
    "mov $pdpt + 3, %eax\n"
    "mov %eax, pml4\n"
    "movl $0x83, pdpt\n" /* 1 GiB, mapped to itself */
    "movl $0x83, pdpt + 8\n" /* and at 1 GiB once more */
    "mov $pml4, %eax\n"
    "mov %eax, %cr3\n"
    "mov $0x6a0, %eax\n" /* PAE, PGE, OSFXSR, OSXMMEXCPT */
    "mov %eax, %cr4\n"
    "mov $0xc0000080, %ecx\n"
    "mov $0x100, %eax\n" /* LME */
    "xor %edx, %edx\n"
    "wrmsr\n"
    "mov $0x80000013, %eax\n"
    "mov %eax, %cr0\n"
    "lgdt gdt_pointer\n"
    "ljmp $8, $entry64\n"
    ".code64\n"
    "entry64:\n"
    "mov $16, %eax\n"
    "mov %eax, %ss\n"
    "mov %eax, %ds\n"
    "mov %eax, %es\n"
    "mov $stack_end, %esp\n"
    "xor %ebp, %ebp\n"
    "call main\n"
    ".globl on_timer, on_breakpoint\n"
    "on_timer:\n"
    "push %rax\n"
    "incq ticks\n"
    "mov $0x20, %al\n"
    "out %al, $0x20\n"
    "pop %rax\n"
    "iretq\n"
    "on_breakpoint:\n"
    "incq own_breakpoints\n"
    "iretq\n"
    ".popsection\n");

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

volatile u64 ticks, own_breakpoints, counter, finish, verdict = 7;
volatile double half = 0.5;

static struct gate {
    u16 low, selector, kind, middle;
    u32 high, reserved;
} idt[256];

extern char on_timer[], on_breakpoint[];

static void out(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

static void set_gate(int vector, char *handler) {
    u64 at = (u64)handler;
    idt[vector] = (struct gate){ at, 8, 0x8e00, at >> 16, at >> 32, 0 };
}

static void start_timer(void) {
    struct { u16 limit; u64 base; } __attribute__((packed)) pointer = { sizeof idt - 1, (u64)idt };
    set_gate(3, on_breakpoint);
    set_gate(0x20, on_timer);
    __asm__ volatile("lidt %0" : : "m"(pointer));
    /* PICs: vectors from 0x20 on, line 0 alone. */
    out(0x20, 0x11), out(0x21, 0x20), out(0x21, 4), out(0x21, 1), out(0x21, 0xfe);
    out(0xa0, 0x11), out(0xa1, 0x28), out(0xa1, 2), out(0xa1, 1), out(0xa1, 0xff);
    /* PIT: a thousand times a second. */
    out(0x43, 0x34), out(0x40, 0xa9), out(0x40, 0x04);
    __asm__ volatile("sti");
}

__attribute__((noinline)) u64 add(u64 a, u64 b) {
    u64 sum = a + b;
    return sum;
}

__attribute__((noinline)) void work(u64 amount) {
    counter = add(counter, amount);
    half = half * 1.0;
    __asm__ volatile("int3");
}

void main(void) {
    start_timer();
    while (!finish)
        work(1);
    out(0xf4, (u8)verdict);
}

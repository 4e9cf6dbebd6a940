//! Runs cases on the host CPU, in a child process.
//!
//! The child is one signal handler. It is entered by the exception that ends a
//! case, takes the registers that the kernel saved for it as the result, waits
//! for the next case, puts that case's registers in their place and returns: so
//! the kernel itself loads and saves all state, and no case can get at a stack
//! or a register of ours.

use std::mem::{MaybeUninit, size_of};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, Ordering};

use super::case::{
    AC_FLAG, CODE, CODE_PAGES, Case, DATA, DATA_BYTES, DATA_HIGH, Fault, Fpu, GS_BASE, HOLE, ID,
    NT, Outcome, PAGE, READ_ONLY, State,
};

const IMAGE: usize = 832;
const CODE_BYTES: usize = (CODE_PAGES * PAGE) as usize;
const CODE_AT: usize = PAGE as usize;
const DATA_AT: usize = CODE_AT + CODE_BYTES;
const SHARED_BYTES: usize = DATA_AT + DATA_BYTES;
/// One case may take this much CPU time.
const LIMIT_US: i64 = 200_000;

/// The first page of the shared memory.
#[repr(C)]
struct Control {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    image: [u8; IMAGE],
    /// The case is 32-bit code.
    code32: u64,
    signal: i32,
    vector: u64,
    error: u64,
    cr2: u64,
    /// The child could not do its work, and why.
    broken: u64,
}

const _: () = assert!(size_of::<Control>() <= PAGE as usize);

/// The order of general registers in a ucontext, by encoding number.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Linux's selectors (arch/x86/include/asm/segment.h): 32-bit and 64-bit code, and data. Of a
/// 64-bit process DS and ES are null.
const USER32_CS: i64 = 0x23;
const USER_CS: i64 = 0x33;
const USER_DS: u32 = 0x2B;

/// Set in the child only.
static CONTROL: AtomicPtr<Control> = AtomicPtr::new(null_mut());
static ASK: AtomicI32 = AtomicI32::new(-1);
static ANSWER: AtomicI32 = AtomicI32::new(-1);
/// The base of FS, where libc keeps its data.
static FS_BASE: AtomicU64 = AtomicU64::new(0);

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;

/// arch_prctl(2) without libc, which may need the base of FS on its way.
unsafe fn arch_prctl(what: u64, value: u64) -> i64 {
    let result: i64;
    // SAFETY: sets a base, or stores eight bytes to where the caller points.
    unsafe {
        std::arch::asm!("syscall", inout("rax") libc::SYS_arch_prctl => result,
            in("rdi") what, in("rsi") value, out("rcx") _, out("r11") _, options(nostack));
    }
    result
}

/// The host CPU as an engine.
pub struct HostCpu {
    memfd: i32,
    shared: *mut u8,
    child: libc::pid_t,
    ask: i32,
    answer: i32,
    /// Cases that ended the child or took too long.
    pub lost: u64,
}

fn pipe() -> [i32; 2] {
    let mut ends = [0; 2];
    // SAFETY: the call fills two integers.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    ends
}

impl HostCpu {
    /// `None` where the host lacks AVX: then the kernel's frame has no room for what
    /// cases start with. Says so.
    pub fn new() -> Option<Self> {
        if !std::arch::is_x86_feature_detected!("avx") {
            eprintln!("skipped: the host CPU, or its kernel, has no AVX");
            return None;
        }
        Some(Self::with_avx())
    }

    fn with_avx() -> Self {
        // SAFETY: plain system calls with valid arguments, results checked.
        let (memfd, shared) = unsafe {
            let memfd = libc::memfd_create(c"oracle".as_ptr(), libc::MFD_CLOEXEC);
            assert!(memfd >= 0);
            assert_eq!(libc::ftruncate(memfd, SHARED_BYTES as i64), 0);
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let shared =
                libc::mmap(null_mut(), SHARED_BYTES, protection, libc::MAP_SHARED, memfd, 0);
            assert!(shared != libc::MAP_FAILED);
            (memfd, shared.cast::<u8>())
        };
        let mut native = Self { memfd, shared, child: 0, ask: -1, answer: -1, lost: 0 };
        native.start();
        native
    }

    fn start(&mut self) {
        let (ask, answer) = (pipe(), pipe());
        // SAFETY: the child calls nothing but system calls before it ends.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            ASK.store(ask[0], Ordering::Relaxed);
            ANSWER.store(answer[1], Ordering::Relaxed);
            CONTROL.store(self.shared.cast(), Ordering::Relaxed);
            // SAFETY: the child's own descriptors; `serve` does not return.
            unsafe {
                libc::close(ask[1]);
                libc::close(answer[0]);
                serve(self.memfd);
            }
        }
        // SAFETY: descriptors that the child uses.
        unsafe {
            libc::close(ask[0]);
            libc::close(answer[1]);
        }
        (self.child, self.ask, self.answer) = (child, ask[1], answer[0]);
        assert!(self.wait(), "the native child does not start: {:#x}", self.control().broken);
    }

    fn stop(&mut self) {
        // SAFETY: our own child and descriptors.
        unsafe {
            libc::close(self.ask);
            libc::close(self.answer);
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, null_mut(), 0);
        }
    }

    fn wait(&mut self) -> bool {
        let mut byte = 0u8;
        // SAFETY: reads one byte into a local.
        unsafe { libc::read(self.answer, (&raw mut byte).cast(), 1) == 1 }
    }

    fn control(&mut self) -> &mut Control {
        // SAFETY: the first page of the mapping; the child waits meanwhile.
        unsafe { &mut *self.shared.cast() }
    }

    /// `None` if the case does not end or harms the process.
    pub fn run(&mut self, case: &Case) -> Option<Outcome> {
        let start = &case.start;
        let control = self.control();
        control.gpr = start.gpr;
        control.rip = start.rip;
        control.rflags = start.rflags;
        control.code32 = u64::from(case.code32);
        control.image.copy_from_slice(&start.fpu.image());
        let pages = case.pages();
        // SAFETY: both ranges are inside the mapping; the child waits.
        unsafe {
            let to = self.shared.add(CODE_AT);
            std::ptr::copy_nonoverlapping(pages.as_ptr(), to, pages.len());
            let to = self.shared.add(DATA_AT);
            std::ptr::copy_nonoverlapping(start.data.as_ptr(), to, DATA_BYTES);
        }
        // SAFETY: writes one byte from a constant.
        let asked = unsafe { libc::write(self.ask, b"x".as_ptr().cast(), 1) } == 1;
        if !asked || !self.wait() {
            self.lost += 1;
            self.stop();
            self.start();
            return None;
        }
        let control = self.control();
        assert_eq!(control.broken, 0, "the native child cannot run cases");
        if control.signal == libc::SIGVTALRM {
            self.lost += 1;
            return None;
        }
        let vector = control.vector as u8;
        let page_fault = vector == 14;
        // Linux leaves the values of an earlier fault where there are none.
        let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
        let fault = Fault {
            vector,
            error: if has_error { control.error } else { 0 },
            cr2: if page_fault { control.cr2 } else { 0 },
        };
        let mut state = State {
            gpr: control.gpr,
            rip: control.rip,
            rflags: control.rflags,
            fpu: Fpu::from_image(&control.image),
            data: vec![0; DATA_BYTES],
        };
        // SAFETY: inside the mapping.
        unsafe {
            let from = self.shared.add(DATA_AT);
            std::ptr::copy_nonoverlapping(from, state.data.as_mut_ptr(), DATA_BYTES);
        }
        Some(Outcome { state, fault })
    }
}

impl Drop for HostCpu {
    fn drop(&mut self) {
        self.stop();
        // SAFETY: our own mapping and descriptor.
        unsafe {
            libc::munmap(self.shared.cast(), SHARED_BYTES);
            libc::close(self.memfd);
        }
    }
}

fn control() -> *mut Control {
    CONTROL.load(Ordering::Relaxed)
}

/// Tells the parent and ends the child.
unsafe fn broken(why: u64) -> ! {
    // SAFETY: the control page is mapped.
    unsafe {
        (*control()).broken = why;
        libc::_exit(1);
    }
}

unsafe fn map(memfd: i32, at: u64, offset: u64, pages: u64, protection: i32) {
    // SAFETY: maps only where nothing is; the arguments are valid.
    unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
        let len = (pages * PAGE) as usize;
        let got = libc::mmap(at as *mut _, len, protection, flags, memfd, offset as i64);
        if got as u64 != at {
            broken(at);
        }
        // Every page must be there: a fault's error code shows whether it was.
        for page in 0..pages {
            ((at + page * PAGE) as *const u8).read_volatile();
        }
    }
}

/// The child: prepares its memory and falls into the handler for good.
unsafe fn serve(memfd: i32) -> ! {
    const STACK: usize = 1 << 17;
    // SAFETY: a process of its own, in which these calls have valid arguments.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let read_write = libc::PROT_READ | libc::PROT_WRITE;
        map(memfd, CODE, CODE_AT as u64, CODE_PAGES, read_write | libc::PROT_EXEC);
        for base in [DATA, DATA_HIGH] {
            let offset = DATA_AT as u64;
            map(memfd, base, offset, HOLE, read_write);
            let at = READ_ONLY * PAGE;
            map(memfd, base + at, offset + at, 1, libc::PROT_READ);
            let at = at + PAGE;
            map(memfd, base + at, offset + at, 1, read_write);
        }
        if arch_prctl(ARCH_GET_FS, FS_BASE.as_ptr() as u64) != 0 {
            broken(1);
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let base = libc::mmap(null_mut(), STACK, read_write, flags, -1, 0);
        let stack = libc::stack_t { ss_sp: base, ss_flags: 0, ss_size: STACK };
        if libc::sigaltstack(&stack, null_mut()) != 0 {
            broken(2);
        }
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut action.sa_mask);
        for signal in [
            libc::SIGSEGV,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGBUS,
            libc::SIGTRAP,
            libc::SIGVTALRM,
        ] {
            libc::sigaction(signal, &action, null_mut());
        }
        let mut none: libc::sigset_t = MaybeUninit::zeroed().assume_init();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, null_mut());
        std::arch::asm!("ud2", options(noreturn));
    }
}

unsafe fn set_timer(microseconds: i64) {
    let zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let value = libc::timeval { tv_sec: 0, tv_usec: microseconds };
    let timer = libc::itimerval { it_interval: zero, it_value: value };
    // SAFETY: ITIMER_VIRTUAL is 1; the pointer is valid.
    unsafe { libc::syscall(libc::SYS_setitimer, 1, &raw const timer, 0) };
}

extern "C" fn handler(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's ucontext lives while the handler runs, with the XSAVE
    // image behind its legacy part where the magic says so (Linux
    // arch/x86/include/uapi/asm/sigcontext.h); the control page is mapped.
    unsafe {
        // The case may have set these, and changed the base of FS.
        std::arch::asm!("pushfq", "and dword ptr [rsp], {keep}", "popfq",
            keep = const !(AC_FLAG | NT | ID) as i32);
        arch_prctl(ARCH_SET_FS, FS_BASE.load(Ordering::Relaxed));
        set_timer(0);
        let context = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let control = &mut *control();
        let image = context.fpregs.cast::<u8>();
        let magic = image.add(464).cast::<u32>().read_unaligned();
        let features = image.add(472).cast::<u64>().read_unaligned();
        if magic != 0x4650_5853 || features & 7 != 7 {
            broken(3);
        }
        for (value, &index) in control.gpr.iter_mut().zip(&GREGS) {
            *value = context.gregs[index as usize] as u64;
        }
        control.rip = context.gregs[libc::REG_RIP as usize] as u64;
        control.rflags = context.gregs[libc::REG_EFL as usize] as u64;
        control.vector = context.gregs[libc::REG_TRAPNO as usize] as u64;
        control.error = context.gregs[libc::REG_ERR as usize] as u64;
        control.cr2 = context.gregs[libc::REG_CR2 as usize] as u64;
        control.signal = signal;
        std::ptr::copy_nonoverlapping(image, control.image.as_mut_ptr(), IMAGE);
        if libc::write(ANSWER.load(Ordering::Relaxed), b"x".as_ptr().cast(), 1) != 1 {
            libc::_exit(0);
        }
        let mut byte = 0u8;
        if libc::read(ASK.load(Ordering::Relaxed), (&raw mut byte).cast(), 1) != 1 {
            libc::_exit(0);
        }
        for (value, &index) in control.gpr.iter().zip(&GREGS) {
            context.gregs[index as usize] = *value as i64;
        }
        context.gregs[libc::REG_RIP as usize] = control.rip as i64;
        context.gregs[libc::REG_EFL as usize] = control.rflags as i64;
        let (code, data) = if control.code32 != 0 { (USER32_CS, USER_DS) } else { (USER_CS, 0) };
        let selectors = &mut context.gregs[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xFFFF | code;
        std::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) data,
            options(nostack, preserves_flags));
        // The bytes from 416 to 512 are the kernel's own.
        std::ptr::copy_nonoverlapping(control.image.as_ptr(), image, 28);
        std::ptr::copy_nonoverlapping(control.image.as_ptr().add(32), image.add(32), 384);
        std::ptr::copy_nonoverlapping(control.image.as_ptr().add(512), image.add(512), 8);
        std::ptr::copy_nonoverlapping(control.image.as_ptr().add(576), image.add(576), 256);
        if arch_prctl(ARCH_SET_GS, GS_BASE) != 0 {
            broken(1);
        }
        set_timer(LIMIT_US);
    }
}

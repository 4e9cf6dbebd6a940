//! The guest's first program, for a system that has none of its own: a container image on a disk.
//!
//! It starts the agent and, on the console, the image's command; it takes in processes whose parents
//! have ended; and it switches the machine off when the command has ended or someone asks. It is asked
//! as busybox's init is: SIGUSR2 and SIGUSR1 switch off, SIGTERM and SIGINT start anew.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::command::{set_window, take_terminal};
use crate::protocol::{Run, Window};

/// The image's command, environment and directory, as RUN has them (`protocol.rs`).
const COMMAND: &str = "/etc/tetrarch/command";
/// On the kernel's command line: the host has a command of its own.
const HOST_COMMAND: &str = "tetrarch.command";
/// What says how large the terminal is.
const TERMINAL: &str = "tetrarch.tty=";
/// Processes have so long to end by themselves.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);

const HANDLED: [libc::c_int; 5] =
    [libc::SIGCHLD, libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM, libc::SIGINT];

/// As `poweroff` or `reboot`: asks the first program.
pub fn ask(name: &str) -> io::Result<()> {
    let signal = if name == "reboot" { libc::SIGTERM } else { libc::SIGUSR2 };
    // SAFETY: a plain call.
    if unsafe { libc::kill(1, signal) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Does the work of the first program; comes back only where it cannot.
pub fn run() -> io::Result<()> {
    let signals = block_signals();
    if let Ok(name) = fs::read_to_string("/etc/hostname") {
        set_host_name(name.trim());
    }
    let image = fs::read(COMMAND).ok().and_then(|body| Run::decode(&body).ok());
    let of_host = fs::read_to_string("/proc/cmdline")
        .is_ok_and(|line| line.split_whitespace().any(|word| word == HOST_COMMAND));
    let mut agent = Command::new("/proc/self/exe");
    if let Some(run) = &image {
        set_up(&mut agent, run);
    }
    // Where there is no way to the host it ends at once: the console is the command's.
    let agent = agent.stderr(Stdio::null()).spawn()?.id();
    let command = match &image {
        Some(run) if !of_host => Some(start_on_console(run)),
        _ => None,
    };
    let command = match command {
        Some(Ok(id)) => Some(id),
        Some(Err(error)) => {
            eprintln!("tetrarch-agent: the image's command cannot be run: {error}");
            end(libc::RB_POWER_OFF)
        }
        None => None,
    };
    loop {
        let mut signal = 0;
        // SAFETY: both live as long as the call.
        unsafe { libc::sigwait(&raw const signals, &raw mut signal) };
        match signal {
            libc::SIGUSR1 | libc::SIGUSR2 => end(libc::RB_POWER_OFF),
            libc::SIGTERM | libc::SIGINT => end(libc::RB_AUTOBOOT),
            _ => {}
        }
        while let Some(id) = reap() {
            // Without a way to the host there is the console's command still.
            if Some(id) == command || (id == agent && command.is_none()) {
                end(libc::RB_POWER_OFF);
            }
        }
    }
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: the set is filled in before it is used, and lives as long as the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in HANDLED {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    }
}

fn set_host_name(name: &str) {
    // SAFETY: the bytes live as long as the call.
    unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) };
}

/// The image's environment and directory.
fn set_up(command: &mut Command, run: &Run) {
    command.envs(run.variables());
    if fs::metadata(&run.directory).is_ok_and(|directory| directory.is_dir()) {
        command.current_dir(&run.directory);
    }
}

fn start_on_console(run: &Run) -> io::Result<u32> {
    let console = console()?;
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if let Some(window) = terminal_of(&line) {
        set_window(&console, window);
    }
    let mut command = Command::new(&run.arguments[0]);
    command.args(&run.arguments[1..]);
    set_up(&mut command, run);
    command.stdin(console.try_clone()?).stdout(console.try_clone()?).stderr(console);
    // SAFETY: what it calls is allowed between fork and exec; descriptor 0 is the terminal.
    unsafe { command.pre_exec(take_terminal) };
    Ok(command.spawn()?.id())
}

/// The size of the host's terminal, where the kernel's command line has one.
fn terminal_of(line: &str) -> Option<Window> {
    let size = line.split_whitespace().find_map(|word| word.strip_prefix(TERMINAL))?;
    let (rows, columns) = size.split_once('x')?;
    Some(Window { rows: rows.parse().ok()?, columns: columns.parse().ok()? })
}

/// The device behind /dev/console: that one can control no terminal.
fn console() -> io::Result<File> {
    let active = fs::read_to_string("/sys/class/tty/console/active")?;
    let name = active.split_whitespace().last().unwrap_or("console");
    OpenOptions::new().read(true).write(true).open(format!("/dev/{name}"))
}

/// One process that has ended.
fn reap() -> Option<u32> {
    // SAFETY: a plain call; nobody asks for the status.
    let id = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
    u32::try_from(id).ok().filter(|&id| id != 0)
}

fn end(how: libc::c_int) -> ! {
    // SAFETY: plain calls; the strings are whole and live as long as the call.
    unsafe {
        libc::kill(-1, libc::SIGTERM);
        let mut waited = Duration::ZERO;
        while waited < PATIENCE {
            match libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) {
                0 => {
                    thread::sleep(PAUSE);
                    waited += PAUSE;
                }
                1.. => {}
                // Nobody is left: who has lost its parent is ours.
                _ => break,
            }
        }
        libc::kill(-1, libc::SIGKILL);
        libc::sync();
        let none = std::ptr::null();
        let flags = libc::MS_REMOUNT | libc::MS_RDONLY;
        libc::mount(none, c"/".as_ptr(), none, flags, none.cast());
        libc::reboot(how);
    }
    loop {
        thread::sleep(PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_is_that_of_the_command_line() {
        let window = terminal_of("root=/dev/vda tetrarch.tty=33x111 quiet").unwrap();
        assert_eq!((window.rows, window.columns), (33, 111));
        for none in ["quiet", "tetrarch.tty=none", "tetrarch.tty=1x", "tetrarch.tty=99999x1"] {
            assert!(terminal_of(none).is_none());
        }
    }
}

//! One command: its process, and the ways of its bytes.
//!
//! Each way has a thread: two for output, one for input, one for what the host asks, one for the
//! answers to that. None of them waits for another, so that a command which reads no input still
//! has its signals, and one whose output nobody reads too.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::protocol::{
    ERROR, EXIT, HELLO, INPUT, INPUT_WINDOW, OUTPUT, RUN, Run, SIGNAL, SIGNALLED, TAKEN, VERSION,
    WINDOW, Window, bad, read_frame, write_frame,
};

/// As a shell has it: the command was not found, or cannot be run.
const NOT_FOUND: u32 = 127;
const NOT_RUN: u32 = 126;

type Shared = Arc<Mutex<File>>;

fn send(stream: &Shared, kind: u8, body: &[u8]) -> io::Result<()> {
    write_frame(&mut *stream.lock().unwrap_or_else(PoisonError::into_inner), kind, body)
}

/// Serves one connection to its end.
pub fn serve(mut stream: File) -> io::Result<()> {
    write_frame(&mut stream, HELLO, &VERSION.to_le_bytes())?;
    let (kind, body) = read_frame(&mut stream)?;
    if kind != RUN {
        return Err(bad("a connection begins with a command"));
    }
    let run = Run::decode(&body)?;
    let out: Shared = Arc::new(Mutex::new(stream.try_clone()?));
    let started = match start(&run) {
        Ok(started) => started,
        Err(error) => {
            let text = format!("{}: {}\n", run.arguments[0].display(), cause(&error));
            send(&out, ERROR, text.as_bytes())?;
            let missing = error.kind() == io::ErrorKind::NotFound;
            let code = if missing { NOT_FOUND } else { NOT_RUN };
            return send(&out, EXIT, &code.to_le_bytes());
        }
    };
    let Started { mut child, input, outputs, terminal } = started;
    let group = Arc::new(Group { id: child.id() as libc::pid_t, there: Mutex::new(true) });
    // Each of its outputs has a thread; they end when the last process that has it ends.
    let pumps: Vec<_> = outputs
        .into_iter()
        .map(|(kind, from)| {
            let out = Arc::clone(&out);
            thread::spawn(move || pump(from, kind, &out))
        })
        .collect();
    let (answers, answered) = mpsc::channel();
    let answer_to = Arc::clone(&out);
    thread::spawn(move || answer(&answered, &answer_to));
    let input = Input::start(input, terminal.is_some(), answers.clone());
    let followed = Arc::clone(&group);
    thread::spawn(move || follow(&mut stream, &input, terminal.as_ref(), &followed, &answers));
    // Until it is waited for, its number is nobody else's, as a process and as a group: signals
    // reach what it left running too.
    group.wait_for_leader()?;
    for pump in pumps {
        // Of a panic nothing is known that could be told.
        let _ = pump.join();
    }
    group.close();
    send(&out, EXIT, &code(child.wait()?).to_le_bytes())
}

/// In words alone: the number behind them is the guest's.
fn cause(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.as_str(), |(words, _)| words).to_owned()
}

fn code(status: ExitStatus) -> u32 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u32,
        (None, Some(signal)) => 128 + signal as u32,
        (None, None) => NOT_RUN,
    }
}

struct Started {
    child: Child,
    input: Option<File>,
    outputs: Vec<(u8, File)>,
    /// The side of the terminal that is ours.
    terminal: Option<File>,
}

fn start(run: &Run) -> io::Result<Started> {
    let mut command = Command::new(&run.arguments[0]);
    command.args(&run.arguments[1..]);
    let home = home();
    command.env("HOME", &home).current_dir(if run.directory.is_empty() {
        OsStr::new(&home)
    } else {
        &run.directory
    });
    if std::env::var_os("PATH").is_none() {
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    }
    command.envs(run.variables());
    match run.terminal {
        Some(window) => start_on_terminal(command, window),
        None => {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.process_group(0);
            let mut child = command.spawn()?;
            let file = |fd: OwnedFd| File::from(fd);
            let input = child.stdin.take().map(|pipe| file(pipe.into()));
            let outputs = [
                child.stdout.take().map(|pipe| (OUTPUT, file(pipe.into()))),
                child.stderr.take().map(|pipe| (ERROR, file(pipe.into()))),
            ];
            let outputs = outputs.into_iter().flatten().collect();
            Ok(Started { child, input, outputs, terminal: None })
        }
    }
}

fn home() -> String {
    std::env::var("HOME").ok().filter(|home| std::path::Path::new(home).is_dir()).unwrap_or_else(
        || if std::path::Path::new("/root").is_dir() { "/root".into() } else { "/".into() },
    )
}

fn start_on_terminal(mut command: Command, window: Window) -> io::Result<Started> {
    let (ours, theirs) = open_terminal()?;
    set_window(&ours, window);
    command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs.try_clone()?);
    // SAFETY: what it calls is allowed between fork and exec; descriptor 0 is the terminal.
    unsafe { command.pre_exec(take_terminal) };
    let child = command.spawn()?;
    drop(theirs);
    let outputs = vec![(OUTPUT, ours.try_clone()?)];
    Ok(Started { child, input: Some(ours.try_clone()?), outputs, terminal: Some(ours) })
}

/// Makes descriptor 0 the terminal of a session of its own: for a process that is to be another.
pub fn take_terminal() -> io::Result<()> {
    // SAFETY: plain calls.
    if unsafe { libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 } {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn open_terminal() -> io::Result<(File, File)> {
    // SAFETY: plain calls; the descriptors that they give are nobody else's, and the buffer
    // is as long as is said.
    unsafe {
        let master = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        if master < 0 {
            return Err(io::Error::last_os_error());
        }
        let ours = File::from_raw_fd(master);
        let mut name = [0; 64];
        if libc::grantpt(master) < 0
            || libc::unlockpt(master) < 0
            || libc::ptsname_r(master, name.as_mut_ptr(), name.len()) != 0
        {
            return Err(io::Error::last_os_error());
        }
        let name = CString::from(std::ffi::CStr::from_ptr(name.as_ptr()));
        let slave = libc::open(name.as_ptr(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        if slave < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((ours, File::from_raw_fd(slave)))
    }
}

pub fn set_window(terminal: &File, window: Window) {
    let size =
        libc::winsize { ws_row: window.rows, ws_col: window.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the call reads the structure, which lives as long as it. It fails only for
    // what is no terminal.
    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
}

/// What the command writes goes to the host. A terminal whose last user has gone gives EIO.
fn pump(mut from: File, kind: u8, out: &Shared) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if send(out, kind, &buffer[..length]).is_err() {
            return;
        }
    }
}

type Answer = (u8, Vec<u8>);

fn answer(answers: &Receiver<Answer>, out: &Shared) {
    for (kind, body) in answers {
        if send(out, kind, &body).is_err() {
            return;
        }
    }
}

/// The way of input to the command.
struct Input {
    to: Sender<Vec<u8>>,
    /// Bytes that the command has not taken.
    waiting: Arc<AtomicUsize>,
}

impl Input {
    fn start(to: Option<File>, terminal: bool, answers: Sender<Answer>) -> Self {
        let (sender, input) = mpsc::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&waiting);
        thread::spawn(move || take_input(&input, to, terminal, &left, &answers));
        Self { to: sender, waiting }
    }

    fn push(&self, data: Vec<u8>) -> io::Result<()> {
        let before = self.waiting.fetch_add(data.len(), Ordering::SeqCst);
        if before + data.len() > INPUT_WINDOW {
            return Err(bad("more input than was asked for"));
        }
        // Its thread ends only with the connection.
        let _ = self.to.send(data);
        Ok(())
    }
}

fn take_input(
    input: &Receiver<Vec<u8>>,
    mut to: Option<File>,
    terminal: bool,
    waiting: &AtomicUsize,
    answers: &Sender<Answer>,
) {
    for data in input {
        if let Some(file) = &mut to {
            let done = match (data.is_empty(), terminal) {
                // A terminal's input has no end of its own: the key for it has one.
                (true, true) => file.write_all(&[4]).is_err(),
                (true, false) => true,
                (false, _) => file.write_all(&data).is_err(),
            };
            // A command that reads no more does not mind.
            if done {
                to = None;
            }
        }
        waiting.fetch_sub(data.len(), Ordering::SeqCst);
        if answers.send((TAKEN, (data.len() as u32).to_le_bytes().to_vec())).is_err() {
            return;
        }
    }
}

/// Does what the host asks, until it hangs up or asks nonsense: that ends the command.
fn follow(
    stream: &mut File,
    input: &Input,
    terminal: Option<&File>,
    group: &Group,
    answers: &Sender<Answer>,
) {
    while let Ok((kind, body)) = read_frame(stream) {
        if kind == INPUT {
            match input.push(body) {
                Ok(()) => continue,
                Err(_) => break,
            }
        }
        match (kind, terminal) {
            (WINDOW, Some(terminal)) => {
                if let Ok(window) = Window::decode(&body) {
                    set_window(terminal, window);
                }
            }
            (SIGNAL, _) => {
                if let Some(&number) = body.first() {
                    group.signal(i32::from(number));
                }
                // Who reads them ends with the connection.
                let _ = answers.send((SIGNALLED, Vec::new()));
            }
            _ => {}
        }
    }
    group.signal(libc::SIGHUP);
}

/// The command's processes: it leads a group of its own.
struct Group {
    id: libc::pid_t,
    /// Its leader was not waited for: the number is nobody else's.
    there: Mutex<bool>,
}

impl Group {
    /// Returns when the leader has ended, and leaves it to be waited for.
    fn wait_for_leader(&self) -> io::Result<()> {
        loop {
            // SAFETY: the call writes the structure, which lives as long as it.
            let result = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let options = libc::WEXITED | libc::WNOWAIT;
                libc::waitid(libc::P_PID, self.id as libc::id_t, &raw mut info, options)
            };
            if result == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    fn signal(&self, number: i32) {
        let there = self.there.lock().unwrap_or_else(PoisonError::into_inner);
        if *there {
            // SAFETY: a plain call.
            unsafe { libc::kill(-self.id, number) };
        }
    }

    /// No signal is sent from here on, and none is under way.
    fn close(&self) {
        *self.there.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

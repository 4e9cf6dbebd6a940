use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const LONG: Duration = Duration::from_secs(20);

/// Counts how often it was asked to rest.
struct Asked(u32);

impl Handler for Asked {
    fn ready(&mut self, _source: u32) {}

    fn quiesce(&mut self) -> bool {
        self.0 += 1;
        true
    }
}

#[derive(Default)]
struct Log {
    seen: Mutex<Vec<u32>>,
    changed: Condvar,
    busy: AtomicBool,
}

impl Log {
    fn add(&self, what: u32) {
        self.seen.lock().push(what);
        self.changed.notify_all();
    }

    fn wait(&self, count: usize) -> Vec<u32> {
        let mut seen = self.seen.lock();
        while seen.len() < count {
            assert!(!self.changed.wait_for(&mut seen, LONG).timed_out(), "{seen:?}");
        }
        seen.clone()
    }
}

struct Noting(Arc<Log>);

impl Handler for Noting {
    fn ready(&mut self, source: u32) {
        assert_ne!(source, 13, "a device that fails");
        self.0.add(source);
    }

    fn quiesce(&mut self) -> bool {
        !self.0.busy.load(Ordering::SeqCst)
    }

    fn resume(&mut self) {
        self.0.add(1000);
    }
}

fn attached(thread: &IoThread, name: &str) -> (Arc<Log>, Attachment, Event) {
    let log = Arc::new(Log::default());
    let handler = Arc::new(Mutex::new(Noting(Arc::clone(&log))));
    let attachment = thread.attach(name, handler);
    let event = Event::new().unwrap();
    attachment.add(&event, 7, Trigger::Edge).unwrap();
    (log, attachment, event)
}

#[test]
fn handler_is_called_for_its_descriptors_until_it_is_detached() {
    let thread = IoThread::new("test").unwrap();
    let (log, attachment, event) = attached(&thread, "one");
    for count in 1..10 {
        event.signal();
        assert_eq!(log.wait(count), vec![7; count], "each signal, though none is taken");
    }
    let (other, _kept, other_event) = attached(&thread, "two");
    drop(attachment);
    event.signal();
    other_event.signal();
    other.wait(1);
    assert_eq!(log.wait(9).len(), 9);
}

#[test]
fn pause_waits_for_what_is_in_flight_and_resume_goes_on() {
    let thread = IoThread::new("test").unwrap();
    let (log, _attachment, event) = attached(&thread, "one");
    log.busy.store(true, Ordering::SeqCst);
    let short = Duration::from_millis(30);
    let error = thread.pause(short).unwrap_err().to_string();
    assert!(error.starts_with("one did not come to rest in"), "{error}");
    event.signal();
    // It runs on: the handler was told, and called.
    let mut seen = log.wait(2);
    seen.sort_unstable();
    assert_eq!(seen, [7, 1000]);
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| thread.pause(LONG));
        event.signal();
        log.wait(3);
        // What ends the request in flight is an event too.
        log.busy.store(false, Ordering::SeqCst);
        event.signal();
        pausing.join().unwrap().unwrap();
    });
    thread.pause(LONG).unwrap();
    let before = log.seen.lock().len();
    event.signal();
    thread.resume();
    std::thread::sleep(short);
    assert_eq!(log.seen.lock().len(), before, "one pause is left");
    thread.resume();
    let after = log.wait(before + 2);
    assert!(after[before..].contains(&1000) && after[before..].contains(&7), "{after:?}");
}

/// A vCPU that ran between two pauses may have begun something, however short it ran.
#[test]
fn each_pause_asks_the_handlers() {
    let thread = IoThread::new("test").unwrap();
    let handler = Arc::new(Mutex::new(Asked(0)));
    let _attachment = thread.attach("one", Arc::clone(&handler) as _);
    for pauses in 1..200 {
        thread.pause(LONG).unwrap();
        assert!(handler.lock().0 >= pauses, "pause {pauses} has asked nobody");
        thread.resume();
    }
}

#[test]
fn handler_that_fails_stands_alone() {
    let thread = IoThread::new("test").unwrap();
    let (log, attachment, event) = attached(&thread, "one");
    let (other, _kept, other_event) = attached(&thread, "two");
    let bad = Event::new().unwrap();
    attachment.add(&bad, 13, Trigger::Edge).unwrap();
    bad.signal();
    other_event.signal();
    other.wait(1);
    event.signal();
    other_event.signal();
    other.wait(2);
    thread.pause(LONG).unwrap();
    assert!(log.seen.lock().len() <= 1);
    thread.resume();
}

#[test]
fn what_is_readable_is_told_until_it_is_taken() {
    let thread = IoThread::new("test").unwrap();
    let (log, attachment, event) = attached(&thread, "one");
    let readable = Event::new().unwrap();
    readable.signal();
    attachment.add(&readable, 8, Trigger::Readable).unwrap();
    assert_eq!(log.wait(4)[..4], [8; 4]);
    readable.take();
    // What was ready before is done when the thread rests.
    thread.pause(LONG).unwrap();
    let before = log.seen.lock().len();
    thread.resume();
    event.signal();
    let after = log.wait(before + 2);
    assert!(after[before..].contains(&7) && !after[before..].contains(&8), "{after:?}");
}

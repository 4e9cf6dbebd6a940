//! Threads for workers. A thread has the lists of the one that makes it, and a vCPU, which sets
//! a disk's queues up, has less than a disk needs: so another makes them.

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use crate::{ThreadKind, enter, others};

struct Order {
    name: String,
    work: Box<dyn FnOnce() + Send>,
    made: SyncSender<io::Result<JoinHandle<()>>>,
}

static ORDERS: OnceLock<Sender<Order>> = OnceLock::new();

/// Makes the thread that makes them.
pub(crate) fn prepare() -> io::Result<()> {
    let (sender, orders) = channel::<Order>();
    Builder::new().name("tetrarch-workers".into()).spawn(move || {
        enter(ThreadKind::Worker);
        for Order { name, work, made } in orders {
            let begin = move || {
                others::entered();
                work();
            };
            // Who asked waits for it.
            let _ = made.send(Builder::new().name(name).spawn(begin));
        }
    })?;
    let _ = ORDERS.set(sender);
    Ok(())
}

/// A thread with the lists of [`ThreadKind::Worker`], where this process is confined.
pub fn spawn_worker(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let Some(orders) = ORDERS.get() else {
        return Builder::new().name(name.into()).spawn(work);
    };
    let (made, thread) = sync_channel(1);
    let order = Order { name: name.into(), work: Box::new(work), made };
    let gone = || io::Error::other("the thread that makes others has ended");
    orders.send(order).map_err(|_| gone())?;
    thread.recv().map_err(|_| gone())?
}

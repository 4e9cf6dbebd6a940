//! What is asked of all vCPUs' tables, and done before the asker goes on.
//!
//! TLB, branch table and exec table are each vCPU's own: translated code reads them
//! without a lock, and nobody else writes them. Who needs something out of all of
//! them puts an order into each vCPU's queue and raises the request flag, which
//! translated code tests anyway; the vCPU obeys between two instructions and says
//! so. The asker waits for vCPUs inside `Vcpu::run` alone: one outside, or asleep in
//! HLT, looks into its queue when it enters, before it uses a table. An asker that
//! is a vCPU obeys its own queue while it waits, so two that ask each other both go
//! on; for the same reason no asker holds a lock that a vCPU takes.
//!
//! A vCPU obeys neither between a look at the code map or the dirty log and the
//! fill of the TLB that follows from it, nor between a hit in the TLB and its
//! access. So when [`Rendezvous::ask`] returns, each look of before has its fill
//! undone, each access by such an entry is in memory, and each look from now on
//! sees what the asker stored before it asked.
//!
//! A vCPU can also ask to be [alone](Rendezvous::alone): the others then stand between
//! two instructions until it is no more, and obey while they stand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};

use crate::irqchip::Wake;

/// Looks at the others that cost nothing, before the asker's thread sleeps.
const QUICK_LOOKS: u32 = 256;

/// No vCPU's number.
const NOBODY: usize = usize::MAX;

/// More pages than this are all pages.
const MOST_PAGES: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The write entries of this host page go.
    ProtectPage(usize),
    /// All write entries go.
    ProtectAll,
    /// All translations go.
    ForgetCode,
    /// To look whether another is alone.
    Look,
}

/// What a vCPU has to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// Host pages whose write entries go.
    pub pages: Vec<usize>,
    /// All write entries go.
    pub all_pages: bool,
    /// All translations go.
    pub code: bool,
}

impl Orders {
    fn add(&mut self, order: Order) {
        match order {
            // A vCPU that stays outside shall not gather them for ever.
            Order::ProtectPage(page) if !self.all_pages && self.pages.len() < MOST_PAGES => {
                self.pages.push(page);
            }
            Order::ProtectPage(_) | Order::ProtectAll => {
                self.pages = Vec::new();
                self.all_pages = true;
            }
            Order::ForgetCode => self.code = true,
            Order::Look => {}
        }
    }
}

/// Of one vCPU.
#[derive(Default)]
struct Seat {
    /// In [`Vcpu::run`](tetrarch_engine::Vcpu::run), and not asleep.
    inside: AtomicBool,
    /// The queue is not empty.
    asked: AtomicBool,
    queue: Mutex<Queue>,
    /// Orders that were obeyed.
    done: AtomicU64,
}

#[derive(Default)]
struct Queue {
    orders: Orders,
    /// Orders that were given.
    given: u64,
}

impl Seat {
    /// Queues an order. Returns its number.
    fn put(&self, order: Order) -> u64 {
        let mut queue = self.queue.lock();
        queue.orders.add(order);
        queue.given += 1;
        self.asked.store(true, Ordering::SeqCst);
        queue.given
    }

    fn take(&self) -> Option<(Orders, u64)> {
        if !self.asked.load(Ordering::SeqCst) {
            return None;
        }
        let mut queue = self.queue.lock();
        self.asked.store(false, Ordering::SeqCst);
        Some((std::mem::take(&mut queue.orders), queue.given))
    }

    /// Whether nothing of before the order is left to see. The order was given first:
    /// a vCPU that enters looks for it once it is inside, so one of the two sees the
    /// other.
    fn is_past(&self, order: u64) -> bool {
        !self.inside.load(Ordering::SeqCst) || self.done.load(Ordering::SeqCst) >= order
    }
}

pub struct Rendezvous {
    seats: Box<[Seat]>,
    wake: Arc<dyn Wake>,
    /// The vCPU that is alone, or [`NOBODY`].
    alone: AtomicUsize,
    /// Askers that sleep until something changes.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    changed: Condvar,
}

impl Rendezvous {
    /// `wake` raises a vCPU's request flag.
    pub fn new(vcpus: usize, wake: Arc<dyn Wake>) -> Self {
        Self {
            seats: (0..vcpus).map(|_| Seat::default()).collect(),
            wake,
            alone: AtomicUsize::new(NOBODY),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            changed: Condvar::new(),
        }
    }

    /// Has every vCPU obey, and returns when none can use what is to go. `own` is the
    /// vCPU whose thread asks, if it is one's, and `obey` obeys for it.
    pub fn ask(&self, order: Order, own: Option<usize>, obey: impl FnMut(&Orders)) {
        let given: Box<[u64]> = self.seats.iter().map(|seat| seat.put(order)).collect();
        self.tell();
        let all_past = || self.seats.iter().zip(&given).all(|(seat, &order)| seat.is_past(order));
        if !all_past() {
            for (vcpu, (seat, &order)) in self.seats.iter().zip(&given).enumerate() {
                if !seat.is_past(order) && own != Some(vcpu) {
                    self.wake.wake(vcpu);
                }
            }
        }
        // It has said that it obeyed, so another may be alone by now.
        let may_go = || all_past() && own.is_none_or(|vcpu| !self.is_kept_out(vcpu));
        self.obey_until(may_go, own, obey);
    }

    /// Whether the vCPU has to stand, since another is alone.
    #[inline]
    pub fn is_kept_out(&self, vcpu: usize) -> bool {
        let alone = self.alone.load(Ordering::SeqCst);
        alone != NOBODY && alone != vcpu
    }

    /// Stands until no other vCPU is alone.
    pub fn stand(&self, vcpu: usize, obey: impl FnMut(&Orders)) {
        self.obey_until(|| !self.is_kept_out(vcpu), Some(vcpu), obey);
    }

    /// Returns when no vCPU but `own` runs guest code, and none will until what it
    /// returns is dropped.
    pub fn alone(&self, own: usize, mut obey: impl FnMut(&Orders)) -> Alone<'_> {
        let take = || {
            let taken =
                self.alone.compare_exchange(NOBODY, own, Ordering::SeqCst, Ordering::SeqCst);
            taken.is_ok()
        };
        self.obey_until(take, Some(own), &mut obey);
        let alone = Alone(self);
        self.ask(Order::Look, Some(own), obey);
        alone
    }

    /// Returns when `may_go` says so. The vCPU `own` obeys until then.
    fn obey_until(
        &self,
        may_go: impl Fn() -> bool,
        own: Option<usize>,
        mut obey: impl FnMut(&Orders),
    ) {
        let own_seat = own.and_then(|vcpu| self.seats.get(vcpu));
        let mut looks = 0;
        loop {
            if let Some(vcpu) = own
                && let Some((orders, number)) = self.take(vcpu)
            {
                obey(&orders);
                self.done(vcpu, number);
            }
            if may_go() {
                return;
            }
            looks += 1;
            if looks < QUICK_LOOKS {
                std::hint::spin_loop();
                continue;
            }
            let mut sleep = self.sleep.lock();
            // Announced before the last look: who changes something looks for sleepers
            // behind it.
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let is_asked = own_seat.is_some_and(|own| own.asked.load(Ordering::SeqCst));
            let go = !is_asked && may_go();
            if !is_asked && !go {
                self.changed.wait(&mut sleep);
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            if go {
                return;
            }
        }
    }

    fn tell(&self) {
        if self.sleepers.load(Ordering::SeqCst) != 0 {
            drop(self.sleep.lock());
            self.changed.notify_all();
        }
    }

    /// What was asked of the vCPU meanwhile. It obeys, and then calls
    /// [`done`](Self::done) with the number.
    #[inline]
    pub fn take(&self, vcpu: usize) -> Option<(Orders, u64)> {
        self.seats.get(vcpu)?.take()
    }

    pub fn done(&self, vcpu: usize, number: u64) {
        if let Some(seat) = self.seats.get(vcpu) {
            seat.done.store(number, Ordering::SeqCst);
            self.tell();
        }
    }

    /// The vCPU is about to use its tables and has to [`take`](Self::take) first.
    #[inline]
    pub fn enter(&self, vcpu: usize) {
        if let Some(seat) = self.seats.get(vcpu) {
            seat.inside.store(true, Ordering::SeqCst);
        }
    }

    /// It no longer uses them. Whoever enters sees to it that this follows, a panic or not.
    #[inline]
    pub fn leave(&self, vcpu: usize) {
        if let Some(seat) = self.seats.get(vcpu) {
            seat.inside.store(false, Ordering::SeqCst);
            self.tell();
        }
    }
}

/// While it is there, one vCPU alone runs.
pub struct Alone<'a>(&'a Rendezvous);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.alone.store(NOBODY, Ordering::SeqCst);
        self.0.tell();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// Counts how often each vCPU was woken.
    #[derive(Default)]
    struct Woken([AtomicU32; 2]);

    impl Wake for Woken {
        fn wake(&self, vcpu: usize) {
            self.0[vcpu].fetch_add(1, Ordering::SeqCst);
        }
    }

    fn table() -> (Rendezvous, Arc<Woken>) {
        let woken = Arc::new(Woken::default());
        (Rendezvous::new(2, Arc::clone(&woken) as _), woken)
    }

    #[test]
    fn who_is_outside_is_not_waited_for_and_finds_its_orders() {
        let (table, woken) = table();
        table.ask(Order::ProtectPage(0x1000), None, |_| panic!("no vCPU asks"));
        table.ask(Order::ProtectPage(0x2000), None, |_| panic!("no vCPU asks"));
        assert_eq!(woken.0[0].load(Ordering::SeqCst), 0);
        table.enter(0);
        let orders = Orders { pages: vec![0x1000, 0x2000], ..Orders::default() };
        assert_eq!(table.take(0), Some((orders, 2)));
        assert_eq!(table.take(0), None);
    }

    #[test]
    fn many_pages_become_all() {
        let (table, _) = table();
        for page in 0..1000 {
            table.ask(Order::ProtectPage(page << 12), None, |_| ());
        }
        assert_eq!(table.take(1).unwrap().0, Orders { all_pages: true, ..Orders::default() });
    }

    #[test]
    fn asker_waits_until_who_is_inside_has_obeyed() {
        let (table, woken) = table();
        let (table, woken) = (&table, &woken);
        table.enter(1);
        let obeyed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let asker = scope.spawn(|| {
                table.ask(Order::ProtectPage(0x1000), None, |_| ());
                assert!(obeyed.load(Ordering::SeqCst));
            });
            while woken.0[1].load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            assert!(!asker.is_finished());
            let (_, number) = table.take(1).unwrap();
            obeyed.store(true, Ordering::SeqCst);
            table.done(1, number);
            asker.join().unwrap();
        });
    }

    #[test]
    fn asker_waits_for_nobody_who_leaves() {
        let (table, woken) = table();
        table.enter(1);
        std::thread::scope(|scope| {
            let asker = scope.spawn(|| table.ask(Order::ProtectPage(0x1000), None, |_| ()));
            while woken.0[1].load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            table.leave(1);
            asker.join().unwrap();
        });
    }

    /// Neither looks into its queue but while it asks.
    #[test]
    fn two_that_ask_each_other_both_go_on() {
        const ROUNDS: u64 = 20_000;
        let (table, _) = table();
        let table = &table;
        let start = &std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            for vcpu in 0..2 {
                scope.spawn(move || {
                    table.enter(vcpu);
                    start.wait();
                    for _ in 0..ROUNDS {
                        table.ask(Order::ProtectPage(0), Some(vcpu), |_| ());
                    }
                    table.leave(vcpu);
                });
            }
        });
        for seat in &table.seats {
            assert_eq!(seat.queue.lock().given, 2 * ROUNDS);
        }
    }

    /// Each adds to a counter in two steps, which is right only if it is alone.
    #[test]
    fn who_is_alone_is_so() {
        const ROUNDS: u64 = 5_000;
        let (table, _) = table();
        let table = &table;
        let counter = AtomicU64::new(0);
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            for vcpu in 0..2 {
                let (counter, start) = (&counter, &start);
                scope.spawn(move || {
                    start.wait();
                    for _ in 0..ROUNDS {
                        table.enter(vcpu);
                        table.stand(vcpu, |_| ());
                        let alone = table.alone(vcpu, |_| ());
                        let before = counter.load(Ordering::Relaxed);
                        std::hint::spin_loop();
                        counter.store(before + 1, Ordering::Relaxed);
                        drop(alone);
                        // Not alone: one that is must not meet this.
                        table.stand(vcpu, |_| ());
                        table.leave(vcpu);
                    }
                });
            }
        });
        assert_eq!(counter.load(Ordering::Relaxed), 2 * ROUNDS);
    }
}

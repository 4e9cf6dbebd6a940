//! A machine that lives again by a recording, and goes back and forth in it.

/// Why a replay stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayStop {
    /// Before the instruction at a breakpoint of [`Replay::set_breakpoints`].
    Breakpoint { linear: u64 },
    /// At the count that was asked for.
    Arrived,
    /// At the end of the recording.
    End,
}

/// A way through a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seek {
    /// Where it ends, or at the end of the recording if that comes first.
    pub count: u64,
    /// It begins no later than here: 0 is the start of the recording.
    pub from: u64,
    /// Breakpoints and watchpoints of instructions before this count are noted, not told.
    pub noted_before: u64,
}

/// An instruction that has met a breakpoint or watchpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Met {
    /// Before it.
    pub count: u64,
    /// Hardware breakpoints, as the low bits of DR6 have them; 0: one of
    /// [`Replay::set_breakpoints`].
    pub hits: u8,
}

/// What a seek has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// The count at which it began.
    pub began: u64,
    /// The last that was noted.
    pub last_met: Option<Met>,
}

/// The other side of a machine that replays. A *count* is how many instructions, and ways into a
/// handler, the guest has done. To be called while the machine is held.
pub trait Replay: Send + Sync {
    /// Where the guest stands.
    fn count(&self) -> u64;
    /// Has the machine go there when it runs next; it says [`ReplayStop::Arrived`]. Nothing else
    /// stops it on the way.
    fn seek(&self, seek: Seek);
    /// The machine goes nowhere any more: it runs on from where it is.
    fn give_up(&self);
    /// Of the last seek.
    fn passed(&self) -> Passed;
    /// Linear addresses before whose instructions the guest stops; any number of them. They
    /// change nothing in the guest.
    fn set_breakpoints(&self, linear: &[u64]);
    /// At the end of the recording the machine stands, and can go back; else it ends there.
    fn stay(&self, stay: bool);
}

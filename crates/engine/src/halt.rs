//! Seeing that a machine is halted for good: every vCPU is in HLT with interrupts
//! off, or was never started, so that none can wake another.
//!
//! vCPUs look at themselves one after the other, and one that was dead when it
//! looked may be woken by one that looks later. So they look in rounds. Where all
//! found themselves dead in one round, and all again in the next without life in
//! between, all were dead when that one began, and nothing was on its way to any: its
//! target would have seen it in the second look.

use parking_lot::Mutex;

/// The rounds of one machine.
#[derive(Default)]
pub struct Halts(Mutex<Rounds>);

#[derive(Default)]
struct Rounds {
    round: u64,
    /// By vCPU: the first and the last of the rounds in a row in which it found
    /// itself dead.
    dead: Vec<Option<(u64, u64)>>,
    /// By vCPU: it is not in the machine, and never looks.
    absent: Vec<bool>,
}

/// What a look at one vCPU says of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halted {
    Not,
    /// All are dead in this round: the next one decides.
    Perhaps,
    ForGood,
}

impl Halts {
    /// Adds a vCPU. Returns its number here.
    pub fn add(&self) -> usize {
        let mut rounds = self.0.lock();
        rounds.dead.push(None);
        rounds.absent.push(false);
        rounds.dead.len() - 1
    }

    /// Whether the vCPU is one of those that look. The last of these may have gone when the others
    /// were dead already: they are to look once more.
    pub fn set_present(&self, vcpu: usize, present: bool) {
        let mut rounds = self.0.lock();
        if let Some(absent) = rounds.absent.get_mut(vcpu) {
            *absent = !present;
            rounds.dead[vcpu] = None;
        }
    }

    /// The round of a look that begins now.
    pub fn round(&self) -> u64 {
        self.0.lock().round
    }

    /// What the vCPU found when it looked at itself.
    pub fn report(&self, vcpu: usize, round: u64, dead: bool) -> Halted {
        let mut rounds = self.0.lock();
        let Some(own) = rounds.dead.get_mut(vcpu) else { return Halted::Not };
        *own = match *own {
            _ if !dead => None,
            Some((first, last)) if last + 1 >= round => Some((first, round)),
            _ => Some((round, round)),
        };
        let round = rounds.round;
        if !rounds.all_dead() {
            Halted::Not
        } else if rounds.dead.iter().flatten().any(|&(first, _)| first == round) {
            Halted::Perhaps
        } else {
            Halted::ForGood
        }
    }

    /// Begins a round: the caller has all vCPUs look at themselves. Returns whether
    /// all were dead in the one before.
    pub fn next_round(&self) -> bool {
        let mut rounds = self.0.lock();
        let all_dead = rounds.all_dead();
        rounds.round += 1;
        all_dead
    }
}

impl Rounds {
    fn all_dead(&self) -> bool {
        let now = |dead: &Option<(u64, u64)>| dead.is_some_and(|(_, last)| last == self.round);
        self.dead.iter().zip(&self.absent).all(|(dead, absent)| *absent || now(dead))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(halts: &Halts, vcpu: usize, dead: bool) -> Halted {
        halts.report(vcpu, halts.round(), dead)
    }

    fn two() -> Halts {
        let halts = Halts::default();
        assert_eq!([halts.add(), halts.add()], [0, 1]);
        halts
    }

    #[test]
    fn it_takes_two_rounds_of_all() {
        let halts = two();
        assert_eq!(report(&halts, 0, true), Halted::Not);
        assert_eq!(report(&halts, 1, true), Halted::Perhaps);
        assert!(halts.next_round());
        assert_eq!(report(&halts, 1, true), Halted::Not, "the other has not looked again");
        assert_eq!(report(&halts, 0, true), Halted::ForGood);
        assert_eq!(report(&halts, 0, true), Halted::ForGood, "whoever asks later");
    }

    /// The second halts after it has sent an NMI to the first.
    #[test]
    fn who_lives_between_two_looks_begins_anew() {
        let halts = two();
        report(&halts, 0, true);
        assert_eq!(report(&halts, 1, true), Halted::Perhaps);
        report(&halts, 0, false);
        halts.next_round();
        assert_eq!(report(&halts, 0, true), Halted::Not);
        assert_eq!(report(&halts, 1, true), Halted::Perhaps);
        halts.next_round();
        report(&halts, 1, true);
        assert_eq!(report(&halts, 0, true), Halted::ForGood);
    }

    #[test]
    fn who_was_not_asked_in_a_round_begins_anew() {
        let halts = two();
        report(&halts, 0, true);
        report(&halts, 1, true);
        halts.next_round();
        report(&halts, 0, true);
        assert!(!halts.next_round());
        report(&halts, 0, true);
        assert_eq!(report(&halts, 1, true), Halted::Perhaps);
    }

    /// A look that began before a round does not count in it.
    #[test]
    fn what_was_seen_before_a_round_is_of_the_one_before() {
        let halts = two();
        report(&halts, 0, true);
        let round = halts.round();
        assert_eq!(report(&halts, 1, true), Halted::Perhaps);
        halts.next_round();
        assert_eq!(halts.report(0, round, true), Halted::Not);
        assert_eq!(report(&halts, 1, true), Halted::Not);
        assert_eq!(report(&halts, 0, true), Halted::ForGood);
    }

    #[test]
    fn who_is_not_there_is_not_waited_for() {
        let halts = two();
        halts.set_present(1, false);
        assert_eq!(report(&halts, 0, true), Halted::Perhaps);
        halts.set_present(1, true);
        halts.next_round();
        assert_eq!(report(&halts, 0, true), Halted::Not, "the other has not looked yet");
        assert_eq!(report(&halts, 1, true), Halted::Perhaps);
        halts.next_round();
        halts.set_present(1, false);
        assert_eq!(report(&halts, 0, true), Halted::ForGood);
    }

    #[test]
    fn one_alone_decides_by_itself() {
        let halts = Halts::default();
        halts.add();
        assert_eq!(report(&halts, 0, true), Halted::Perhaps);
        halts.next_round();
        assert_eq!(report(&halts, 0, true), Halted::ForGood);
        assert_eq!(report(&halts, 0, false), Halted::Not);
    }
}

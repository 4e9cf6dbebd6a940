//! One block: decode, classify, find live flags, emit.
//!
//! There is no intermediate form. Most instructions are copied with their
//! registers renamed and their memory operand replaced by a checked host
//! pointer; a few have a sequence of their own; the rest leave for the
//! interpreter. Every instruction either completes or has changed nothing when
//! it leaves, so faults are precise and any leave can be finished elsewhere.
//!
//! Flags: a memory check clobbers the arithmetic flags. Where they are live
//! they are put aside first (`saved_flags`) and brought back only when an
//! instruction needs them, at most once between two writers. A block therefore
//! has two entries, one for each place the flags may be in.
//! What is not needed any more but seen at a fault is made again there: see
//! [`super::sources`].

use iced_x86::InstructionInfoFactory;

use super::block::{Built, Source};
use super::classify::classify;
use super::code32;
use super::emit::Emitter;
use super::job::{Flags, Job};
use super::liveness::{self, ALL, Ahead, Step};
use super::sources;
use super::stubs::Stubs;
use crate::journal::Counting;
use crate::state::mode;

pub const MAX_INSTRUCTIONS: usize = 64;
/// The most guest bytes of a block.
pub const MAX_BLOCK_CODE: usize = MAX_INSTRUCTIONS * 15;

pub struct Builder {
    emitter: Emitter,
    info: InstructionInfoFactory,
    stubs: Stubs,
}

impl Builder {
    pub fn new(stubs: Stubs) -> Self {
        let bmi2 = std::arch::is_x86_feature_detected!("bmi2");
        Self { emitter: Emitter::new(bmi2), info: InstructionInfoFactory::new(), stubs }
    }

    /// Translates from `source.rip`. `None` if not even the first instruction
    /// decodes from the bytes given: it crosses into the next page, or is invalid.
    pub fn build(&mut self, source: &Source<'_>) -> Option<Built> {
        let mut instructions = Vec::with_capacity(MAX_INSTRUCTIONS);
        let mut kinds = Vec::with_capacity(MAX_INSTRUCTIONS);
        let mut steps = Vec::with_capacity(MAX_INSTRUCTIONS);
        let mut decoder = source.decoder(source.bytes, source.rip);
        while instructions.len() < MAX_INSTRUCTIONS && decoder.can_decode() {
            if !instructions.is_empty() && source.breaks_at(decoder.ip()) {
                break;
            }
            let mut instruction = decoder.decode();
            if instruction.is_invalid() {
                break;
            }
            if source.code32() {
                code32::use_common_form(&mut instruction);
            }
            let kind = classify(&instruction, source);
            instructions.push(instruction);
            kinds.push(kind);
            steps.push(Step::of(&instruction, kind, source.counted()));
            if kind.ends_block() {
                break;
            }
            if source.second.is_some() {
                break;
            }
        }
        let last = *instructions.last()?;
        let ends = kinds.last().is_some_and(|kind| kind.ends_block());
        let polls = kinds.last().is_some_and(|&kind| source.polls(source.rip, &last, kind));
        steps[0].shows |= polls || source.counting == Counting::Sought;
        let followed = sources::follow(&instructions, &steps, source.origin, &mut self.info);
        let mut ahead = Ahead { source, sources: &followed.end, info: &mut self.info };
        let ways = liveness::ways(&last, ends, &mut ahead);
        let mut needed = if ways.is_some() { 0 } else { ALL };
        let mut shown = 0;
        let mut ways = ways.unwrap_or_default();
        if ways.iter().filter(|way| way.shown & followed.fresh != 0).count() == 1 {
            // To keep the operand would cost on both ways. The flags themselves are there
            // anyway, and cost more but on the one.
            for way in ways.iter_mut().filter(|way| way.target > source.rip) {
                way.needed |= way.shown & followed.fresh;
            }
        }
        for way in &ways {
            needed |= way.needed;
            shown |= way.shown & !way.needed;
            if way.needed != 0 {
                // They are all in one place: the link brings them with the others.
                needed |= way.shown & followed.end.saved();
            }
        }
        let mut live = liveness::backwards(&steps, needed);
        if source.second.is_some() {
            // Its page check leaves before anything else, and must lose no flag.
            live[0] = ALL;
        }
        sources::keep_lost(&steps, &followed, &mut live);
        let keeps = followed.keeps(&steps, &live, shown);

        let flags_in = live[0];
        self.emitter.clear();
        let mut job = Job {
            e: &mut self.emitter,
            info: &mut self.info,
            stubs: self.stubs,
            source,
            user: source.mode & mode::USER != 0,
            wide: !source.code32(),
            flags: Flags::Host,
            live,
            ways,
            end: followed.end,
            keeps,
            cold: Vec::new(),
            built: Built { flags_in, ..Built::default() },
            current: 0,
            instructions: &instructions,
            kinds: &kinds,
            polls,
            x87_loaded: false,
        };
        job.run(ends);
        let mut built = job.built;
        built.code = std::mem::take(&mut job.e.code);
        built.outward = std::mem::take(&mut job.e.outward);
        built.instructions = instructions.len() as u32;
        built.len = (last.next_ip() - source.rip) as u32;
        Some(built)
    }
}

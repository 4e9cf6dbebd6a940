//! Every opcode of every map, as bytes.

/// Bytes up to the opcode, and how many forms of ModRM are worth a try there.
pub struct Head {
    bytes: Vec<u8>,
    map: Map,
    code32: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Map {
    OneByte,
    /// 0F, 0F 38, 0F 3A.
    Escaped,
    Vex,
    Evex,
    Xop,
}

/// Prefixes of the legacy maps, in the order in which they are written.
const PREFIXES: [&[u8]; 11] = [
    &[],
    &[0x66],
    &[0xF2],
    &[0xF3],
    &[0xF0],
    &[0x48],
    &[0x66, 0x48],
    &[0xF2, 0x48],
    &[0xF3, 0x48],
    &[0x66, 0xF2],
    &[0x66, 0xF3],
];

/// All heads: legacy maps with their prefixes, VEX, EVEX and AMD's XOP (Intel
/// SDM 2A, 2.3 and 2.7; AMD APM 3, 1.2.7).
pub fn heads(code32: bool) -> Vec<Head> {
    let mut heads = Vec::new();
    let mut head = |map, bytes: &[u8]| heads.push(Head { bytes: bytes.to_vec(), map, code32 });
    // Of REX 32-bit code knows nothing; there the address size is another one instead.
    let prefixes = PREFIXES.iter().copied().filter(|prefix| !code32 || !prefix.contains(&0x48));
    for prefix in prefixes.chain(code32.then_some(&[0x67][..])) {
        head(Map::OneByte, prefix);
        for escape in [&[0x0F][..], &[0x0F, 0x38], &[0x0F, 0x3A]] {
            head(Map::Escaped, &[prefix, escape].concat());
        }
    }
    // vvvv is inverted: none, and XMM1 or RCX.
    for last in [0, 1, 2, 3].into_iter().flat_map(|pp| [pp, pp | 4]) {
        for vvvv in [0x78, 0x70] {
            head(Map::Vex, &[0xC5, 0x80 | vvvv | last]);
            for w in [0, 0x80] {
                for map in [1, 2, 3] {
                    head(Map::Vex, &[0xC4, 0xE0 | map, w | vvvv | last]);
                }
            }
        }
    }
    for map in (0..32).filter(|map| !matches!(map, 1..=3)) {
        head(Map::Vex, &[0xC4, 0xE0 | map, 0x78]);
    }
    for map in 0..8 {
        for pp in 0..4 {
            for w in [0, 0x80] {
                for length in [0, 0x20, 0x40] {
                    head(Map::Evex, &[0x62, 0xF0 | map, w | 0x7C | pp, 0x08 | length]);
                }
            }
        }
    }
    for map in 8..=10 {
        for w in [0, 0x80] {
            for length in [0, 4] {
                head(Map::Xop, &[0x8F, 0xE0 | map, w | 0x78 | length]);
            }
        }
    }
    heads
}

/// A ModRM, with the SIB that it asks for. In memory it is [rdi] or [rdi+rcx],
/// the latter for instructions that want a vector of indices.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Form(u8, Option<u8>);

/// All of reg, with all registers or with memory.
pub fn forms() -> Vec<Form> {
    let mut forms = Vec::new();
    for reg in 0..8 {
        forms.push(Form(reg << 3 | 7, None));
        forms.push(Form(reg << 3 | 4, Some(0x0F)));
        forms.extend((0..8).map(|rm| Form(0xC0 | reg << 3 | rm, None)));
    }
    forms
}

impl Head {
    pub fn map(&self) -> Map {
        self.map
    }

    /// `None` where the opcode is a prefix or leads to another map.
    pub fn encode(&self, opcode: u8, form: Form) -> Option<Vec<u8>> {
        let elsewhere = match self.map {
            Map::OneByte if self.code32 => match opcode {
                // BOUND, LES and LDS have their operand in memory; the rest are VEX and EVEX.
                0x62 | 0xC4 | 0xC5 => form.0 >= 0xC0,
                _ => matches!(
                    opcode,
                    0x0F | 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3
                ),
            },
            Map::OneByte => matches!(
                opcode,
                0x0F | 0x26 | 0x2E | 0x36 | 0x3E | 0x40..=0x4F | 0x62 | 0x64..=0x67 | 0xC4 | 0xC5
                    | 0xF0 | 0xF2 | 0xF3
            ),
            Map::Escaped => self.bytes.ends_with(&[0x0F]) && matches!(opcode, 0x38 | 0x3A),
            Map::Vex | Map::Evex | Map::Xop => false,
        };
        let mut bytes = self.bytes.clone();
        bytes.push(opcode);
        if !self.has_modrm(opcode) {
            // Once is enough.
            return (!elsewhere && form == Form(7, None)).then_some(bytes);
        }
        bytes.push(form.0);
        bytes.extend(form.1);
        (!elsewhere).then_some(bytes)
    }

    /// Intel SDM 2D, tables.
    fn has_modrm(&self, opcode: u8) -> bool {
        match self.map {
            Map::OneByte => match opcode {
                0..=0x3F => opcode & 7 < 4,
                0x62 | 0xC4 | 0xC5 => self.code32,
                _ => matches!(
                    opcode,
                    0x63 | 0x69 | 0x6B | 0x80..=0x8F | 0xC0 | 0xC1 | 0xC6 | 0xC7
                        | 0xD0..=0xD3 | 0xD8..=0xDF | 0xF6 | 0xF7 | 0xFE | 0xFF
                ),
            },
            Map::Escaped if self.bytes.ends_with(&[0x0F]) => !matches!(
                opcode,
                0x05..=0x09 | 0x0B | 0x0E | 0x30..=0x37 | 0x77 | 0x80..=0x8F
                    | 0xA0..=0xA2 | 0xA8..=0xAA | 0xC8..=0xCF
            ),
            Map::Vex => opcode != 0x77,
            _ => true,
        }
    }
}

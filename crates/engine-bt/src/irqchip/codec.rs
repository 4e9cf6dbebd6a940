//! The byte format of a saved interrupt chip: little-endian fields inside tagged, sized sections.
//!
//! No outside specification. A section is a four-byte tag, a 32-bit length and the payload, so a
//! reader can name what it does not know and never reads past what it was given.

pub(super) type Tag = [u8; 4];

#[derive(Default)]
pub(super) struct Writer {
    out: Vec<u8>,
}

impl Writer {
    pub fn bytes(&mut self, data: &[u8]) {
        self.out.extend_from_slice(data);
    }

    pub fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    pub fn bool(&mut self, value: bool) {
        self.out.push(u8::from(value));
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn opt_u64(&mut self, value: Option<u64>) {
        self.bool(value.is_some());
        self.u64(value.unwrap_or(0));
    }

    pub fn section(&mut self, tag: Tag, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.bytes(&tag);
        // A section holds one controller's registers: a few hundred bytes.
        self.u32(inner.out.len() as u32);
        self.bytes(&inner.out);
    }

    pub fn finish(self) -> Vec<u8> {
        self.out
    }
}

pub(super) struct Reader<'a> {
    data: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { data }
    }

    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], String> {
        if len > self.data.len() {
            return Err(format!("truncated: {len} bytes wanted, {} left", self.data.len()));
        }
        let (head, tail) = self.data.split_at(len);
        self.data = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub fn u8(&mut self) -> Result<u8, String> {
        Ok(self.array::<1>()?[0])
    }

    pub fn bool(&mut self) -> Result<bool, String> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(format!("{other:#x} is not a truth value")),
        }
    }

    pub fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn opt_u64(&mut self) -> Result<Option<u64>, String> {
        let some = self.bool()?;
        let value = self.u64()?;
        Ok(some.then_some(value))
    }

    /// A value that must not exceed `max`; `what` names it in the error.
    pub fn u8_max(&mut self, max: u8, what: &str) -> Result<u8, String> {
        let value = self.u8()?;
        if value > max {
            return Err(format!("{what} {value} is above {max}"));
        }
        Ok(value)
    }

    pub fn section<T>(
        &mut self,
        tag: Tag,
        parse: impl FnOnce(&mut Reader<'a>) -> Result<T, String>,
    ) -> Result<T, String> {
        let name = String::from_utf8_lossy(&tag).into_owned();
        let found: Tag = self.array()?;
        if found != tag {
            return Err(format!(
                "section {name} expected, found {}",
                String::from_utf8_lossy(&found).escape_default()
            ));
        }
        let len = self.u32()?;
        let mut inner = Reader::new(self.bytes(len as usize)?);
        let value = parse(&mut inner).map_err(|e| format!("section {name}: {e}"))?;
        inner.end().map_err(|e| format!("section {name}: {e}"))?;
        Ok(value)
    }

    pub fn end(&self) -> Result<(), String> {
        if self.data.is_empty() {
            Ok(())
        } else {
            Err(format!("{} bytes too many", self.data.len()))
        }
    }
}

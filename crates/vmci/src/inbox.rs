//! Datagrams for the guest, until it fetches them.

use std::collections::VecDeque;

use crate::layout::{HEADER, MAX_DATAGRAM, PAGE};

/// Beyond so many the guest is not heard, and nothing is taken from programs for it.
const MAX_WAITING: usize = 1024;

#[derive(Default)]
pub struct Inbox {
    /// Each with its padding to 8 bytes.
    waiting: VecDeque<Vec<u8>>,
    /// What is left of the page that is being read byte by byte.
    page: VecDeque<u8>,
    /// Something came since [`Inbox::take_news`].
    news: bool,
}

impl Inbox {
    pub fn push(&mut self, mut datagram: Vec<u8>) {
        datagram.resize(datagram.len().next_multiple_of(8), 0);
        self.waiting.push_back(datagram);
        self.news = true;
    }

    pub fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }

    /// Whether the guest is to be told.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// The datagrams that fit into so many bytes, and behind them, as far as there is room for
    /// that, the head of one for nobody. When some are left the guest is told anew.
    pub fn fetch(&mut self, room: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some(next) = self.waiting.front()
            && next.len() <= room.saturating_sub(bytes.len())
        {
            bytes.extend(next);
            self.waiting.pop_front();
        }
        if room - bytes.len() >= HEADER {
            bytes.extend([0xFF; HEADER]);
        }
        self.news |= !self.waiting.is_empty();
        bytes
    }

    /// The next byte of those that the guest reads one by one. It reads whole pages, and wants a
    /// datagram to begin in one page and, unless it is longer, to end there (Linux,
    /// vmci_guest.c, vmci_dispatch_dgs).
    pub fn next_byte(&mut self) -> u8 {
        if self.page.is_empty() {
            self.turn_page();
        }
        let byte = self.page.pop_front().unwrap_or(0xFF);
        if self.page.is_empty() {
            // It has seen that there are no more, which is true no longer.
            self.news |= !self.waiting.is_empty();
        }
        byte
    }

    fn turn_page(&mut self) {
        let page = PAGE as usize;
        let longer = self.waiting.front().filter(|next| next.len() > page);
        let room = longer.map_or(page, |next| next.len().next_multiple_of(page));
        let bytes = self.fetch(room);
        self.page.extend(bytes);
        self.page.resize(room, 0xFF);
        self.news = false;
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// What is left of the page that is being read. The rest is lost with the machine that had it.
    pub fn save(&self) -> Vec<u8> {
        self.page.iter().copied().collect()
    }

    pub fn load(&mut self, page: &[u8]) {
        self.clear();
        self.page.extend(&page[..page.len().min(MAX_DATAGRAM)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(inbox: &mut Inbox) -> Vec<u8> {
        (0..PAGE).map(|_| inbox.next_byte()).collect()
    }

    #[test]
    fn pages_have_whole_datagrams() {
        let mut inbox = Inbox::default();
        assert_eq!(page(&mut inbox), [0xFF; 4096]);
        for (fill, length) in [(1, 30), (2, 4072), (3, 5000), (4, 3200)] {
            inbox.push(vec![fill; length]);
        }
        assert!(inbox.take_news() && !inbox.take_news());
        let first = page(&mut inbox);
        assert_eq!((&first[..30], &first[30..32], first[32]), (&[1; 30][..], &[0, 0][..], 0xFF));
        assert!(inbox.take_news(), "the guest thinks that there are no more");
        assert_eq!(page(&mut inbox)[..4073], [&[2; 4072][..], &[0xFF]].concat());
        let mut long = page(&mut inbox);
        assert!(!inbox.take_news(), "it is not at an end");
        long.extend(page(&mut inbox));
        assert_eq!(long[..5001], [&[3; 5000][..], &[0xFF]].concat());
        assert!(inbox.take_news());
        assert_eq!(page(&mut inbox)[..3201], [&[4; 3200][..], &[0xFF]].concat());
        assert!(!inbox.take_news());
    }

    #[test]
    fn what_is_fetched_at_once_fits_and_has_an_end() {
        let mut inbox = Inbox::default();
        assert_eq!(inbox.fetch(100), [0xFF; 24]);
        for fill in 1..4 {
            inbox.push(vec![fill; 40]);
        }
        inbox.take_news();
        assert_eq!(inbox.fetch(100), [&[1; 40][..], &[2; 40]].concat());
        assert!(inbox.take_news());
        assert_eq!(inbox.fetch(39), [0xFF; 24]);
        assert!(inbox.take_news());
        assert_eq!(inbox.fetch(MAX_DATAGRAM), [&[3; 40][..], &[0xFF; 24]].concat());
        assert!(!inbox.take_news());
        assert!(inbox.fetch(7).is_empty());
    }
}

//! Finds stop strings in a text that arrives in pieces.
//!
//! The match that *ends* first wins, and of those that end together the longest: so the answer
//! depends on the text alone, not on how it was cut, and is known as soon as the last byte of
//! a stop string arrives. Text that may yet turn out to begin a stop string is held back; no
//! other text is.
//!
//! Each string has its own Knuth-Morris-Pratt automaton over bytes, so the cost per byte is
//! bounded, whatever a client chose as stop strings. Bytes are safe: text and strings are whole
//! characters, and in UTF-8 one character never begins inside another.

/// Whether a matched stop string is part of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopText {
    Hidden,
    Included,
}

/// What a piece of text brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scan {
    /// No stop string so far; this much can be shown.
    Text(String),
    /// A stop string is complete; this is the last text to show.
    Stopped(String),
}

/// Stop strings and how much of each has been seen.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    automata: Vec<Automaton>,
    stop_text: StopText,
    /// Text that may begin a stop string.
    held: String,
}

impl StopMatcher {
    /// A matcher at the beginning of a text.
    ///
    /// # Panics
    ///
    /// If a stop string is empty: it would be found everywhere.
    #[must_use]
    pub fn new(strings: &[String], stop_text: StopText) -> Self {
        let automata = strings.iter().map(|string| Automaton::new(string)).collect();
        Self { automata, stop_text, held: String::new() }
    }

    /// Adds a piece of text. After [`Scan::Stopped`] the matcher must not be used again.
    pub fn push(&mut self, piece: &str) -> Scan {
        let seen = self.held.len();
        self.held.push_str(piece);
        for (index, byte) in piece.bytes().enumerate() {
            let complete = self.automata.iter_mut().filter_map(|automaton| automaton.step(byte));
            if let Some(length) = complete.max() {
                let end = seen + index + 1;
                self.held.truncate(match self.stop_text {
                    StopText::Hidden => end - length,
                    StopText::Included => end,
                });
                return Scan::Stopped(std::mem::take(&mut self.held));
            }
        }
        let begun = self.automata.iter().map(|automaton| automaton.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - begun);
        Scan::Text(std::mem::replace(&mut self.held, rest))
    }

    /// The text held back, once nothing can follow it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[derive(Debug, Clone)]
struct Automaton {
    string: Vec<u8>,
    /// `borders[i]`: length of the longest proper prefix of `string[..=i]` that is its suffix.
    borders: Vec<usize>,
    /// Bytes of the string that the text ends with; less than all of them.
    matched: usize,
}

impl Automaton {
    fn new(string: &str) -> Self {
        assert!(!string.is_empty(), "a stop string is empty");
        let mut automaton =
            Self { string: string.as_bytes().to_vec(), borders: vec![0], matched: 0 };
        for index in 1..automaton.string.len() {
            let next = automaton.advanced(automaton.string[index]);
            automaton.matched = next;
            automaton.borders.push(next);
        }
        automaton.matched = 0;
        automaton
    }

    /// Bytes matched after `byte`, from fewer than all.
    fn advanced(&self, byte: u8) -> usize {
        let mut matched = self.matched;
        while matched != 0 && self.string[matched] != byte {
            matched = self.borders[matched - 1];
        }
        matched + usize::from(self.string[matched] == byte)
    }

    /// The string's length if `byte` completes it.
    fn step(&mut self, byte: u8) -> Option<usize> {
        self.matched = self.advanced(byte);
        (self.matched == self.string.len()).then_some(self.matched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Shown text and whether it stopped, from the whole text at once.
    fn naive(text: &str, strings: &[String], stop_text: StopText) -> (String, bool) {
        for end in 0..=text.len() {
            let ends_here = |s: &&String| text.as_bytes()[..end].ends_with(s.as_bytes());
            if let Some(longest) = strings.iter().filter(ends_here).map(String::len).max() {
                let shown = match stop_text {
                    StopText::Hidden => end - longest,
                    StopText::Included => end,
                };
                return (text[..shown].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn by_pieces(pieces: &[String], strings: &[String], stop_text: StopText) -> (String, bool) {
        let mut matcher = StopMatcher::new(strings, stop_text);
        let mut shown = String::new();
        for piece in pieces {
            match matcher.push(piece) {
                Scan::Text(text) => shown.push_str(&text),
                Scan::Stopped(text) => return (shown + &text, true),
            }
        }
        (shown + &matcher.finish(), false)
    }

    proptest! {
        // Three letters, one of them of two bytes, make matches and near misses frequent.
        #[test]
        fn pieces_give_what_the_whole_text_gives(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            strings in prop::collection::vec("[abé]{1,5}", 0..4),
            included in any::<bool>(),
        ) {
            let stop_text = if included { StopText::Included } else { StopText::Hidden };
            let want = naive(&pieces.concat(), &strings, stop_text);
            prop_assert_eq!(by_pieces(&pieces, &strings, stop_text), want);
        }

        #[test]
        fn nothing_is_held_but_a_beginning_of_a_stop_string(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            strings in prop::collection::vec("[abé]{2,5}", 1..4),
        ) {
            let mut matcher = StopMatcher::new(&strings, StopText::Hidden);
            for piece in pieces {
                if matches!(matcher.push(&piece), Scan::Stopped(_)) {
                    return Ok(());
                }
                let held = matcher.held.as_str();
                prop_assert!(held.is_empty() || strings.iter().any(|s| s.starts_with(held)));
            }
        }
    }

    #[track_caller]
    fn check(pieces: &[&str], strings: &[&str], shown: &[&str]) {
        let strings: Vec<String> = strings.iter().map(|&s| s.to_owned()).collect();
        let mut matcher = StopMatcher::new(&strings, StopText::Hidden);
        let scans = pieces.iter().map(|piece| match matcher.push(piece) {
            Scan::Text(text) => text,
            Scan::Stopped(text) => format!("{text}."),
        });
        assert_eq!(scans.collect::<Vec<_>>(), shown);
    }

    #[test]
    fn match_across_pieces_shows_no_part_of_itself() {
        check(&["one E", "N", "D two"], &["END"], &["one ", "", "."]);
    }

    #[test]
    fn text_is_held_only_while_it_may_match() {
        check(&["xE", "N", "xy"], &["END"], &["x", "", "ENxy"]);
    }

    #[test]
    fn first_end_wins_and_then_the_longest() {
        check(&["abcd"], &["abcd", "bc"], &["a."]);
        check(&["xabc"], &["bc", "abc"], &["x."]);
    }
}

//! What becomes of rows that arrive.

use super::*;

/// Two bytes of a position in layers that attend to all, three in those with chunks of eight.
const ROW: RowBytes = RowBytes { full: 2, chunked: 3, chunk_tokens: Some(8) };
const JOURNAL: u64 = 5;

fn copies(bytes_max: u64) -> Copies {
    let mut copies = Copies::new(ROW, bytes_max);
    copies.follow(JOURNAL, &[]);
    copies
}

/// A byte that is different for every place of every position of some sequences.
fn byte(sequence: u64, position: u32, place: usize) -> u8 {
    (sequence as u8).wrapping_mul(101).wrapping_add(position as u8 * 5 + place as u8)
}

fn full(sequence: u64, positions: std::ops::Range<u32>) -> Vec<u8> {
    positions.flat_map(|p| (0..2).map(move |place| byte(sequence, p, place))).collect()
}

fn chunked(sequence: u64, positions: std::ops::Range<u32>) -> Vec<u8> {
    positions.flat_map(|p| (2..5).map(move |place| byte(sequence, p, place))).collect()
}

/// Rows of positions `start..end`; those of layers with chunks from `chunk` on.
fn rows(sequence: u64, (start, end): (u32, u32), chunk: u32) -> pb::KeepRequest {
    request(JOURNAL, piece(sequence, (start, end), chunk))
}

fn request(journal: u64, rows: pb::BackupRows) -> pb::KeepRequest {
    pb::KeepRequest { journal, rows: vec![rows] }
}

fn piece(sequence: u64, (start, end): (u32, u32), chunk: u32) -> pb::BackupRows {
    let (full, chunked) = (full(sequence, start..end), chunked(sequence, chunk.max(start)..end));
    pb::BackupRows {
        sequence,
        start,
        positions: end - start,
        crc32c: checksum(&full, &chunked),
        full,
        chunked,
    }
}

fn held(sequence: u64, positions: u32, has_gap: bool) -> pb::Held {
    pb::Held { sequence, positions, has_gap }
}

#[track_caller]
fn check(copies: &Copies, sequence: u64, positions: u32, chunk: std::ops::Range<u32>) {
    let (full, chunked) = (full(sequence, 0..positions), chunked(sequence, chunk));
    let want = Restored { full: &full, chunked: &chunked };
    assert_eq!(copies.restored(sequence, positions), Some(want));
}

#[test]
fn sequence_gets_back_what_it_needs_and_no_more() {
    let mut copies = copies(1000);
    for (start, end) in [(0, 6), (6, 7), (7, 12)] {
        copies.keep(&rows(1, (start, end), 0)).unwrap();
    }
    assert_eq!(copies.take_news(), [held(1, 12, false)]);
    assert_eq!(copies.take_news(), []);
    check(&copies, 1, 12, 8..12);
    check(&copies, 1, 6, 0..6);
    // At the start of a chunk nothing of it is needed.
    check(&copies, 1, 8, 8..8);
    assert_eq!(copies.restored(1, 13), None);
    assert_eq!(copies.restored(2, 1), None);
}

#[test]
fn rows_that_do_not_follow_are_said_to_be_missed() {
    let mut copies = copies(1000);
    copies.keep(&rows(1, (2, 4), 0)).unwrap();
    copies.keep(&rows(2, (0, 4), 0)).unwrap();
    copies.keep(&rows(2, (5, 6), 0)).unwrap();
    assert_eq!(copies.take_news(), [held(1, 0, true), held(2, 4, true)]);
    copies.keep(&rows(2, (4, 7), 0)).unwrap();
    assert_eq!(copies.take_news(), [held(2, 7, false)]);
    check(&copies, 2, 7, 0..7);
    assert_eq!(copies.bytes, 7 * 5);
}

#[test]
fn rows_may_come_again() {
    let mut copies = copies(1000);
    for (start, end) in [(0, 10), (3, 6), (9, 12), (0, 2)] {
        copies.keep(&rows(1, (start, end), 0)).unwrap();
    }
    assert_eq!(copies.take_news(), [held(1, 12, false)]);
    check(&copies, 1, 12, 8..12);
    check(&copies, 1, 5, 0..5);
}

#[test]
fn chunks_that_were_over_when_rows_were_sent_cannot_be_gone_on_in() {
    let mut copies = copies(1000);
    copies.keep(&rows(1, (0, 5), 0)).unwrap();
    // The sender was in the third chunk by then.
    copies.keep(&rows(1, (5, 12), 16)).unwrap();
    check(&copies, 1, 8, 8..8);
    assert_eq!(copies.restored(1, 12), None);
    assert_eq!(copies.restored(1, 4), None, "what was there of its chunk is gone");
    copies.keep(&rows(1, (12, 19), 16)).unwrap();
    check(&copies, 1, 18, 16..18);
    // Nothing of the chunk, again, in the middle of what is there.
    copies.keep(&rows(1, (4, 10), 9)).unwrap();
    assert_eq!(copies.restored(1, 18), None);
    copies.keep(&rows(1, (19, 20), 16)).unwrap();
    assert_eq!(copies.restored(1, 20), None);
    check(&copies, 1, 16, 16..16);
}

#[test]
fn what_is_released_or_of_another_journal_goes() {
    let mut copies = copies(1000);
    copies.keep(&rows(1, (0, 5), 0)).unwrap();
    copies.keep(&rows(2, (0, 5), 0)).unwrap();
    copies.follow(JOURNAL, &[1, 9]);
    assert_eq!(copies.take_news(), [held(2, 5, false)]);
    assert_eq!((copies.restored(1, 3), copies.bytes), (None, 25));
    copies.follow(JOURNAL + 1, &[]);
    assert_eq!((copies.restored(2, 3), copies.bytes), (None, 0));
    // Late rows of the old one.
    copies.keep(&rows(2, (0, 5), 0)).unwrap();
    assert_eq!(copies.restored(2, 3), None);
    assert_eq!(copies.take_news(), []);
}

#[test]
fn room_comes_from_what_has_not_changed_for_longest() {
    let mut copies = copies(100);
    for sequence in [1, 2, 3] {
        copies.keep(&rows(sequence, (0, 6), 0)).unwrap();
    }
    copies.keep(&rows(1, (6, 7), 0)).unwrap();
    copies.take_news();
    copies.keep(&rows(1, (7, 10), 0)).unwrap();
    assert_eq!(copies.take_news(), [held(1, 10, false), held(2, 0, true)]);
    // More than all of it.
    copies.keep(&rows(4, (0, 21), 0)).unwrap();
    let gone = [held(1, 0, true), held(3, 0, true), held(4, 0, true)];
    assert_eq!((copies.take_news(), copies.bytes), (gone.to_vec(), 0));
}

#[test]
fn rows_of_another_model_or_that_changed_are_refused() {
    let mut copies = copies(1000);
    let mut changed = piece(1, (0, 5), 0);
    changed.chunked[3] ^= 1;
    assert_eq!(copies.keep(&request(JOURNAL, changed)), Err(RowsError::Checksum(1)));
    let sized = |change: fn(&mut pb::BackupRows)| {
        let mut rows = piece(1, (0, 5), 0);
        change(&mut rows);
        rows.crc32c = checksum(&rows.full, &rows.chunked);
        request(JOURNAL, rows)
    };
    let changes: [fn(&mut pb::BackupRows); 5] = [
        |rows| rows.full.truncate(9),
        |rows| rows.positions = 4,
        |rows| rows.chunked.truncate(14),
        |rows| rows.chunked.extend([0; 3]),
        |rows| rows.start = u32::MAX,
    ];
    for change in changes {
        let error = copies.keep(&sized(change)).unwrap_err();
        assert!(matches!(error, RowsError::Size { sequence: 1, .. }), "{error}");
    }
    assert_eq!((copies.take_news(), copies.bytes), (vec![], 0));
}

#[test]
fn models_without_chunks_have_no_rows_of_them() {
    let mut copies = Copies::new(RowBytes { full: 2, chunked: 0, chunk_tokens: None }, 1000);
    for (start, end) in [(0, 5), (5, 6)] {
        copies.keep(&request(0, piece(1, (start, end), end))).unwrap();
    }
    let full = full(1, 0..6);
    assert_eq!(copies.restored(1, 6), Some(Restored { full: &full, chunked: &[] }));
}

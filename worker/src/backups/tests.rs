//! What becomes of rows that arrive.

use super::*;

/// Two bytes of a position in layers that attend to all, three in those with chunks of eight.
const ROW: RowBytes = RowBytes { full: 2, chunked: 3, chunk_tokens: Some(8) };
const JOURNAL: u64 = 5;

fn copies(bytes_max: u64) -> Backups {
    let copies = Backups::new(ROW, bytes_max);
    copies.lock().follow(JOURNAL, &[]);
    copies
}

/// What a sequence gets back: full rows, and those of its chunk.
fn restored(copies: &Backups, sequence: u64, positions: u32) -> Option<(Vec<u8>, Vec<u8>)> {
    let copy = copies.lock().take(sequence)?;
    let rows = copy.restored(positions, copies.row).map(|r| (r.full.to_vec(), r.chunked.to_vec()));
    copies.lock().put_back(sequence, copy);
    rows
}

fn news(copies: &Backups) -> Vec<pb::Held> {
    copies.lock().take_news()
}

fn bytes(copies: &Backups) -> u64 {
    copies.lock().bytes
}

/// A byte that is different for every place of every position of some sequences.
fn byte(sequence: u64, position: u32, place: usize) -> u8 {
    let place = u64::try_from(place).unwrap();
    (sequence * 101 + u64::from(position) * 5 + place).to_le_bytes()[0]
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

fn request(journal: u64, mut rows: pb::BackupRows) -> pb::KeepRequest {
    rows.crc32c = checksum(&rows, journal);
    pb::KeepRequest { journal, rows: vec![rows] }
}

fn piece(sequence: u64, (start, end): (u32, u32), chunk: u32) -> pb::BackupRows {
    let (full, chunked) = (full(sequence, start..end), chunked(sequence, chunk.max(start)..end));
    pb::BackupRows { sequence, start, positions: end - start, full, chunked, crc32c: 0 }
}

fn held(sequence: u64, positions: u32) -> pb::Held {
    pb::Held { sequence, positions, has_gap: false }
}

fn gap(sequence: u64, positions: u32) -> pb::Held {
    pb::Held { has_gap: true, ..held(sequence, positions) }
}

#[track_caller]
fn check(copies: &Backups, sequence: u64, positions: u32, chunk: std::ops::Range<u32>) {
    let want = (full(sequence, 0..positions), chunked(sequence, chunk));
    assert_eq!(restored(copies, sequence, positions), Some(want));
}

#[test]
fn sequence_gets_back_what_it_needs_and_no_more() {
    let copies = copies(1000);
    for (start, end) in [(0, 6), (6, 7), (7, 12)] {
        copies.keep(&rows(1, (start, end), 0)).unwrap();
    }
    assert_eq!(news(&copies), [held(1, 12)]);
    assert_eq!(news(&copies), []);
    check(&copies, 1, 12, 8..12);
    check(&copies, 1, 6, 0..6);
    // At the start of a chunk nothing of it is needed.
    check(&copies, 1, 8, 8..8);
    assert_eq!(restored(&copies, 1, 13), None);
    assert_eq!(restored(&copies, 2, 1), None);
}

#[test]
fn rows_that_do_not_follow_are_said_to_be_missed() {
    let copies = copies(1000);
    copies.keep(&rows(1, (2, 4), 0)).unwrap();
    copies.keep(&rows(2, (0, 4), 0)).unwrap();
    copies.keep(&rows(2, (5, 6), 0)).unwrap();
    assert_eq!(news(&copies), [gap(1, 0), gap(2, 4)]);
    copies.keep(&rows(2, (4, 7), 0)).unwrap();
    assert_eq!(news(&copies), [held(2, 7)]);
    check(&copies, 2, 7, 0..7);
    assert_eq!(bytes(&copies), 7 * 5);
}

#[test]
fn rows_may_come_again() {
    let copies = copies(1000);
    for (start, end) in [(0, 10), (3, 6), (9, 12), (0, 2)] {
        copies.keep(&rows(1, (start, end), 0)).unwrap();
    }
    assert_eq!(news(&copies), [held(1, 12)]);
    check(&copies, 1, 12, 8..12);
    check(&copies, 1, 5, 0..5);
}

#[test]
fn chunks_that_were_over_when_rows_were_sent_cannot_be_gone_on_in() {
    let copies = copies(1000);
    copies.keep(&rows(1, (0, 5), 0)).unwrap();
    // The sender was in the third chunk by then.
    copies.keep(&rows(1, (5, 12), 16)).unwrap();
    check(&copies, 1, 8, 8..8);
    assert_eq!(restored(&copies, 1, 12), None);
    assert_eq!(restored(&copies, 1, 4), None, "what was there of its chunk is gone");
    copies.keep(&rows(1, (12, 19), 16)).unwrap();
    check(&copies, 1, 18, 16..18);
    // Nothing of the chunk, again, in the middle of what is there.
    news(&copies);
    copies.keep(&rows(1, (4, 10), 9)).unwrap();
    assert_eq!(news(&copies), [held(1, 10)], "what was behind them is gone");
    copies.keep(&rows(1, (19, 20), 16)).unwrap();
    assert_eq!(news(&copies), [gap(1, 10)]);
    check(&copies, 1, 8, 8..8);
    assert_eq!(bytes(&copies), 10 * 2 + 3);
}

#[test]
fn what_is_released_or_of_another_journal_goes() {
    let copies = copies(1000);
    copies.keep(&rows(1, (0, 5), 0)).unwrap();
    copies.keep(&rows(2, (0, 5), 0)).unwrap();
    copies.lock().follow(JOURNAL, &[1, 9]);
    assert_eq!(news(&copies), [held(2, 5)]);
    assert_eq!((restored(&copies, 1, 3), bytes(&copies)), (None, 25));
    copies.lock().follow(JOURNAL + 1, &[]);
    assert_eq!((restored(&copies, 2, 3), bytes(&copies)), (None, 0));
    // Late rows of the old one.
    copies.keep(&rows(2, (0, 5), 0)).unwrap();
    assert_eq!(restored(&copies, 2, 3), None);
    assert_eq!(news(&copies), []);
}

#[test]
fn room_comes_from_what_has_not_changed_for_longest() {
    let copies = copies(100);
    for sequence in [1, 2, 3] {
        copies.keep(&rows(sequence, (0, 6), 0)).unwrap();
    }
    copies.keep(&rows(1, (6, 7), 0)).unwrap();
    news(&copies);
    copies.keep(&rows(1, (7, 10), 0)).unwrap();
    assert_eq!(news(&copies), [held(1, 10), gap(2, 0)]);
    // More than all of it.
    copies.keep(&rows(4, (0, 21), 0)).unwrap();
    let gone = [gap(1, 0), gap(3, 0), gap(4, 0)];
    assert_eq!((news(&copies), bytes(&copies)), (gone.to_vec(), 0));
}

#[test]
fn rows_of_another_model_or_that_changed_are_refused() {
    let copies = copies(1000);
    let on_the_way: [fn(&mut pb::KeepRequest); 5] = [
        |request| request.rows[0].chunked[3] ^= 1,
        |request| request.rows[0].full[0] ^= 1,
        |request| request.rows[0].start += 1,
        |request| request.rows[0].positions += 1,
        |request| request.journal += 1,
    ];
    for change in on_the_way {
        let mut changed = rows(1, (0, 5), 0);
        change(&mut changed);
        assert_eq!(copies.keep(&changed), Err(RowsError::Checksum(1)));
    }
    let mut changed = rows(1, (0, 5), 0);
    changed.rows[0].sequence = 2;
    assert_eq!(copies.keep(&changed), Err(RowsError::Checksum(2)));
    let sized = |change: fn(&mut pb::BackupRows)| {
        let mut rows = piece(1, (0, 5), 0);
        change(&mut rows);
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
    assert_eq!((news(&copies), bytes(&copies)), (vec![], 0));
}

/// The service of a worker that keeps these copies, at this port; it ends with the task.
async fn serve(copies: Backups, port: u16) -> (tokio::task::JoinHandle<()>, u16) {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (stop, stopped) = tokio::sync::watch::channel(());
    let task = tokio::spawn(async move {
        let _stop = stop;
        let served = tonic::transport::Server::builder().add_service(server(copies, stopped));
        served.serve_with_incoming(proto::incoming(listener)).await.unwrap();
    });
    (task, port)
}

#[tokio::test]
async fn rows_reach_a_worker_again_that_was_out_of_reach() {
    let copies = copies(1000);
    let (task, port) = serve(copies.clone(), 0).await;
    let mut sender = Sender::new(tokio::runtime::Handle::current());
    let address = format!("127.0.0.1:{port}");
    let arrives = async |sender: &mut Sender, end: u32| {
        // What is sent before the worker is reached is dropped.
        for _ in 0..1000 {
            sender.send(&address, rows(1, (0, end), 0));
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            if restored(&copies, 1, end).is_some() {
                return;
            }
        }
        panic!("no rows arrive");
    };
    arrives(&mut sender, 2).await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    for _ in 0..10 {
        sender.send(&address, rows(1, (0, 3), 0));
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(restored(&copies, 1, 3), None);
    let (_task, _) = serve(copies.clone(), port).await;
    arrives(&mut sender, 4).await;
    // A worker that is no member is left.
    sender.retain(&["127.0.0.1:9".to_owned()]);
    assert!(!sender.has(&address));
}

#[test]
fn models_without_chunks_have_no_rows_of_them() {
    let copies = Backups::new(RowBytes { full: 2, chunked: 0, chunk_tokens: None }, 1000);
    for (start, end) in [(0, 5), (5, 6)] {
        copies.keep(&request(0, piece(1, (start, end), end))).unwrap();
    }
    assert_eq!(restored(&copies, 1, 6), Some((full(1, 0..6), vec![])));
}

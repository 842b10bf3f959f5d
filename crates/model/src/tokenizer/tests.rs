//! Against the `tokenizers` crate's own decoder, and with text that tries to be a special token.

use super::*;
use proptest::prelude::*;

fn toy() -> Tokenizer {
    Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/toy-maverick"))
        .unwrap()
}

#[test]
fn special_text_is_a_token_only_where_asked() {
    let toy = toy();
    let text = "a<|eot|>b";
    let parsed = toy.encode(text, Special::Parse).unwrap();
    let plain = toy.encode(text, Special::Text).unwrap();
    assert_eq!(parsed.iter().filter(|&&id| id == 2008).count(), 1);
    assert!(plain.iter().all(|&id| !toy.is_special(id)), "{plain:?}");
    assert_eq!(toy.decode(&plain, SkipSpecial::No), text);
    assert_eq!(toy.decode(&parsed, SkipSpecial::No), text);
    assert_eq!(toy.decode(&parsed, SkipSpecial::Yes), "ab");
    assert_eq!(toy.find_special(text).unwrap(), [(2008, 1..8)]);
}

#[test]
fn ids_without_entry_are_nothing() {
    let toy = toy();
    assert_eq!((toy.vocab(), toy.bos()), (2048, Some(2000)));
    for id in [2048, u32::MAX] {
        assert_eq!(toy.token_bytes(id), None);
        assert!(!toy.is_special(id));
        assert_eq!(toy.decode(&[id], SkipSpecial::No), "");
        assert_eq!(Detokenizer::new(SkipSpecial::No).push(&toy, id), "");
    }
}

#[test]
fn bytes_have_distinct_characters() {
    assert_eq!(byte_alphabet().len(), 256);
    assert_eq!((byte_character(b' '), byte_character(b'\n')), ('Ġ', 'Ċ'));
}

#[test]
fn missing_folder_names_the_file() {
    let error = Tokenizer::load(Path::new("/nowhere")).unwrap_err().to_string();
    assert!(error.starts_with("cannot read /nowhere/tokenizer.json: "), "{error}");
}

/// Two beginnings look alike; only the second can still be completed.
#[test]
fn repeated_beginning_of_a_character_is_told_from_the_last() {
    let toy = toy();
    let lead = byte_id(&toy, 0xE2);
    let mut stream = Detokenizer::new(SkipSpecial::Yes);
    assert_eq!(
        (stream.push(&toy, lead), stream.push(&toy, lead)),
        (String::new(), "\u{FFFD}".into())
    );
    assert_eq!(stream.flush(), "\u{FFFD}");
}

#[test]
fn characters_appear_when_their_last_byte_arrives() {
    let toy = toy();
    let ids: Vec<u32> = "é".bytes().map(|byte| byte_id(&toy, byte)).collect();
    let mut stream = Detokenizer::new(SkipSpecial::Yes);
    assert_eq!((stream.push(&toy, ids[0]), stream.push(&toy, ids[1])), (String::new(), "é".into()));
    assert_eq!(stream.push(&toy, ids[0]), "");
    assert_eq!(stream.flush(), "\u{FFFD}");
    assert_eq!(stream.flush(), "");
}

fn byte_id(toy: &Tokenizer, byte: u8) -> u32 {
    (0..2000).find(|&id| toy.token_bytes(id) == Some(vec![byte])).expect("every byte is a token")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Random ids are mostly invalid UTF-8, which is the hard case.
    #[test]
    fn stream_equals_the_reference_decoding_of_the_whole(
        bytes in proptest::collection::vec(any::<u8>(), 0..40),
        ids in proptest::collection::vec(0..2060_u32, 0..40),
    ) {
        let toy = toy();
        let mut all: Vec<u32> = bytes.iter().map(|&byte| byte_id(&toy, byte)).collect();
        all.extend(ids);
        for (skip, skip_reference) in [(SkipSpecial::Yes, true), (SkipSpecial::No, false)] {
            let reference = toy.parse.decode(&all, skip_reference).unwrap();
            prop_assert_eq!(&toy.decode(&all, skip), &reference);
            let mut stream = Detokenizer::new(skip);
            let mut joined: String = all.iter().map(|&id| stream.push(&toy, id)).collect();
            joined.push_str(&stream.flush());
            prop_assert_eq!(&joined, &reference);
        }
    }

    #[test]
    fn text_survives_and_never_becomes_special(text in "(<\\|eot\\|>|<\\|patch\\|>|\\PC|\\s){0,20}") {
        let toy = toy();
        let ids = toy.encode(&text, Special::Text).unwrap();
        prop_assert!(ids.iter().all(|&id| !toy.is_special(id)));
        prop_assert_eq!(toy.decode(&ids, SkipSpecial::Yes), text);
    }
}

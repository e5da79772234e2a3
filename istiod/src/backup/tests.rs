//! What is sealed comes back, and nothing else does.

use proptest::prelude::*;
use zeroize::Zeroizing;

use super::*;

/// Costs nothing, so that tests are quick.
const CHEAP: Cost = Cost { memory_kib: 8, passes: 1, lanes: 1 };

fn passphrase(text: &str) -> Secret {
    Secret::passphrase(Zeroizing::new(text.to_owned())).unwrap()
}

fn seal(plain: &[u8], secret: &Secret, salt: u8) -> Vec<u8> {
    let mut sealer = Sealer::new(Vec::new(), secret, CHEAP, [salt; 32]).unwrap();
    sealer.write_all(plain).unwrap();
    sealer.finish().unwrap()
}

fn open(mut sealed: &[u8], secret: &Secret) -> Result<Vec<u8>, String> {
    let chain = |error: &dyn std::error::Error| match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    let header = header(&mut sealed).map_err(|error| chain(&error))?;
    let mut plain = Vec::new();
    let mut opener = Opener::new(sealed, header, secret).map_err(|error| chain(&error))?;
    opener.read_to_end(&mut plain).map_err(|error| chain(&error))?;
    Ok(plain)
}

#[test]
fn what_was_sealed_comes_back_whatever_its_length() {
    let secret = passphrase("correct horse");
    for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7] {
        let plain: Vec<u8> = (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let sealed = seal(&plain, &secret, 1);
        assert_eq!(open(&sealed, &secret), Ok(plain), "{len} bytes");
    }
}

#[test]
fn a_wrong_secret_opens_nothing() {
    let sealed = seal(b"state", &passphrase("correct horse"), 1);
    assert!(open(&sealed, &passphrase("correct hors3")).unwrap_err().contains("does not open"));
    let key = || Secret::key_file(Zeroizing::new(vec![7; 32])).unwrap();
    assert!(open(&sealed, &key()).unwrap_err().contains("opens with a passphrase, not with a key file"));
    let sealed = seal(b"state", &key(), 1);
    assert_eq!(open(&sealed, &key()), Ok(b"state".to_vec()));
    assert!(open(&sealed, &Secret::key_file(Zeroizing::new(vec![8; 32])).unwrap()).is_err());
    assert!(Secret::passphrase(Zeroizing::new("short".to_owned())).is_err());
    assert!(Secret::key_file(Zeroizing::new(vec![7; 31])).is_err());
}

#[test]
fn chunks_cannot_be_moved_left_out_cut_off_or_taken_from_another_file() {
    let secret = passphrase("correct horse");
    let plain = vec![3; 4 * CHUNK];
    let sealed = seal(&plain, &secret, 1);
    let start = sealed.len() - 4 * (CHUNK + TAG);
    let chunk = |sealed: &[u8], at: usize| sealed[start + at * (CHUNK + TAG)..][..CHUNK + TAG].to_vec();
    let file = |chunks: &[Vec<u8>]| [&sealed[..start], &chunks.concat()].concat();
    let all: Vec<_> = (0..4).map(|at| chunk(&sealed, at)).collect();
    assert_eq!(open(&file(&all), &secret), Ok(plain.clone()));
    let other = seal(&plain, &secret, 2);
    for (what, chunks) in [
        ("moved", vec![all[0].clone(), all[2].clone(), all[1].clone(), all[3].clone()]),
        ("left out", vec![all[0].clone(), all[2].clone(), all[3].clone()]),
        ("cut off", all[..3].to_vec()),
        ("nothing left", Vec::new()),
        ("twice", vec![all[0].clone(), all[0].clone(), all[1].clone(), all[2].clone(), all[3].clone()]),
        ("more after the end", [all.clone(), vec![all[3].clone()]].concat()),
        ("of another file", vec![all[0].clone(), chunk(&other, 1), all[2].clone(), all[3].clone()]),
    ] {
        assert!(open(&file(&chunks), &secret).is_err(), "{what}");
    }
}

#[test]
fn a_header_cannot_ask_for_all_memory() {
    let secret = passphrase("correct horse");
    let huge = Cost { memory_kib: u32::MAX, passes: 1, lanes: 1 };
    let text = serde_json::to_vec(&Header { key: KeySource::Argon2id(huge), salt: hex(&[1; 32]) }).unwrap();
    let file =
        [b"MESHBAK\x01".as_slice(), &u32::try_from(text.len()).unwrap().to_be_bytes(), &text, &[0; 40]]
            .concat();
    assert!(open(&file, &secret).unwrap_err().contains("too much memory"));
    assert!(open(b"MESHBAK\x09", &secret).unwrap_err().contains("version 9"));
}

proptest! {
    #[test]
    fn any_byte_that_changes_is_noticed_and_foreign_bytes_never_panic(
        at in any::<prop::sample::Index>(),
        bit in 0_u8..8,
        foreign in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let secret = passphrase("correct horse");
        let sealed = seal(b"the state of the mesh", &secret, 1);
        let mut damaged = sealed.clone();
        damaged[at.index(sealed.len())] ^= 1 << bit;
        prop_assert!(open(&damaged, &secret).is_err());
        prop_assert!(open(&sealed[..at.index(sealed.len())], &secret).is_err());
        prop_assert!(open(&foreign, &secret).is_err());
        prop_assert!(open(&[b"MESHBAK\x01", &foreign[..]].concat(), &secret).is_err());
    }

    #[test]
    fn a_manifest_comes_back(revision in any::<u64>(), with_authority in any::<bool>()) {
        let files = [("ca-key.pem".to_owned(), Zeroizing::new("key".to_owned()))].into();
        let manifest = Manifest::new(revision, "cluster.local", 5, with_authority.then_some(files));
        let mut bytes = Vec::new();
        manifest.write(&mut bytes).unwrap();
        let mut from = bytes.as_slice();
        let again = Manifest::read(&mut from).unwrap();
        prop_assert_eq!((again.revision, again.authority.is_some()), (revision, with_authority));
        let shown = format!("{again:?}");
        prop_assert!(from.is_empty() && !shown.contains("key\""));
    }
}

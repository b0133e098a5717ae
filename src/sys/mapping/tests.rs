//! Memory that is read, written, filled and populated.

use super::*;

#[test]
fn copies_words_and_odd_ends() {
    for mapping in [
        Mapping::anonymous(8192, HugePages::No).unwrap(),
        Mapping::memfd("test", 8192, HugePages::No).unwrap(),
    ] {
        let bytes: Vec<u8> = (0..201).collect();
        mapping.write(4091, &bytes);
        let mut back = vec![0; 201];
        mapping.read(4091, &mut back);
        assert_eq!(back, bytes);
        assert!(!mapping.is_zero(4096, 4096) && mapping.is_zero(0, 4032));
        mapping.zero(4088, 208);
        assert!(mapping.is_zero(0, 8192));
        assert_eq!(mapping.repeated_byte(0, 8192), Some(0));
        mapping.write(4096, &[0xcc; 4096]);
        assert_eq!((mapping.repeated_byte(4096, 4096), mapping.repeated_byte(0, 8192)), (Some(0xcc), None));
        for (at, other) in [(4096, 0xcd), (8191, 0xcd)] {
            mapping.write(at, &[other]);
            assert_eq!(mapping.repeated_byte(4096, 4096), None);
            mapping.write(at, &[0xcc]);
        }
        // Words that repeat are not enough.
        mapping.write(4096, &[1, 2, 3, 4, 5, 6, 7, 8].repeat(512));
        assert_eq!(mapping.repeated_byte(4096, 4096), None);
        mapping.store(8184, 7);
        assert_eq!(mapping.load(8184), 7);
    }
}

#[test]
#[should_panic(expected = "outside a mapping")]
fn a_range_outside_panics() {
    Mapping::anonymous(4096, HugePages::No).unwrap().read(4095, &mut [0; 2]);
}

#[test]
fn missing_pages_are_filled_through_the_file_or_else_the_mapping() {
    use rustix::fs::{SealFlags, fcntl_add_seals};
    let bytes: Vec<u8> = (0..3 * PAGE_SIZE).map(|n| (n % 251) as u8).collect();
    for seal in [None, Some(SealFlags::FUTURE_WRITE)] {
        let file = memfd_create("fill", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, 8 * PAGE_SIZE).unwrap();
        // Not from the file's beginning.
        let mapping = Mapping::shared_file(file.try_clone().unwrap(), PAGE_SIZE, 7 * PAGE_SIZE).unwrap();
        seal.into_iter().for_each(|seal| fcntl_add_seals(&file, seal).unwrap());
        assert!(mapping.is_missing(2 * PAGE_SIZE));
        mapping.fill(2 * PAGE_SIZE, &bytes);
        let mut read = vec![0; 7 * PAGE_SIZE as usize];
        mapping.read(0, &mut read);
        let (before, rest) = read.split_at(2 * PAGE_SIZE as usize);
        let (filled, after) = rest.split_at(bytes.len());
        assert!(filled == bytes && before.iter().chain(after).all(|byte| *byte == 0));
        assert!(!mapping.is_missing(2 * PAGE_SIZE) && !mapping.is_missing(4 * PAGE_SIZE));
    }
    assert!(
        !Mapping::anonymous(4096, HugePages::No).unwrap().is_missing(0),
        "there is no file to fill it by"
    );
}

#[test]
fn a_file_that_is_too_short_is_named() {
    let file = memfd_create("short", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 4096).unwrap();
    let error = Mapping::shared_file(file, 0, 8192).unwrap_err();
    assert!(error.to_string().contains("4096 bytes"), "{error}");
}

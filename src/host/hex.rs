//! Bytes as hexadecimal digits, which is how identifiers and secrets travel in JSON.

/// So many bytes from hexadecimal digits, and nothing from anything else.
pub(crate) fn decode<const N: usize>(digits: &str) -> Option<[u8; N]> {
    // A sign would be taken as part of a number.
    if digits.len() != 2 * N || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

/// The digits of some bytes.
pub(crate) fn encode(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_digits() {
        assert_eq!(decode::<2>("0aFf"), Some([10, 255]));
        assert_eq!(encode(&[10, 255]), "0aff");
        for wrong in ["", "0a", "0aff0", "+aff", "0ag0", "äöü"] {
            assert_eq!(decode::<2>(wrong), None, "{wrong}");
        }
    }
}

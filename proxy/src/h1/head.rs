//! What the heads of requests and of responses have in common. Without IO.

use bytes::{Bytes, BytesMut};
use http::header::{HeaderMap, HeaderName, HeaderValue};

/// Why a message cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It is no HTTP/1.
    #[error("malformed head: {0}")]
    Syntax(httparse::Error),
    /// It is of a version that is not spoken here.
    #[error("unknown version of HTTP")]
    Version,
    /// Its head has no end.
    #[error("head longer than {0} bytes")]
    TooLong(usize),
    /// Its target has no end.
    #[error("target too long")]
    TargetTooLong,
    /// Its length is no number, or two.
    #[error("invalid content-length")]
    Length,
    /// It tells its length twice: others might believe the other one.
    #[error("two lengths of one body")]
    Ambiguous,
    /// Its body is encoded in a way that is not known.
    #[error("unknown transfer-encoding")]
    Unknown,
    /// Chunks are not known to HTTP/1.0.
    #[error("transfer-encoding in a message of HTTP/1.0")]
    Encoding,
    /// Its target is no URI.
    #[error("invalid target")]
    Target,
    /// A method, a status or a header that cannot be passed on.
    #[error("invalid method, status or header")]
    Value,
    /// Something is wrong with a chunk.
    #[error("malformed chunk")]
    Chunk,
    /// Something is wrong with its trailers.
    #[error("malformed trailers")]
    Trailers,
    /// The connection ended before it did.
    #[error("connection closed in the middle of a message")]
    Cut,
}

/// Whether no line ends with a line feed alone, which some take for an end and others do not.
pub(super) fn lines_end_whole(bytes: &[u8], length: usize) -> bool {
    let head = bytes.get(..length).unwrap_or_default();
    memchr::memchr_iter(b'\n', head).all(|at| at > 0 && head.get(at - 1) == Some(&b'\r'))
}

/// Where a piece of a head begins in its bytes, and its length.
pub(super) type Place = (usize, usize);

/// The headers of a head by name; their values stay where they are until the head's bytes can be shared.
pub(super) type Places = smallvec::SmallVec<[(HeaderName, Place); 24]>;

/// Finds where a piece lies in the bytes that it was read from.
pub(super) fn place(bytes: &[u8], piece: &[u8]) -> Place {
    (piece.as_ptr() as usize - bytes.as_ptr() as usize, piece.len())
}

/// Looks the names up and notes where their values are. Places have a kilobyte, so they are filled where they are.
pub(super) fn find(
    bytes: &[u8],
    lines: &[httparse::Header<'_>],
    places: &mut Places,
) -> Result<(), Malformed> {
    places.reserve(lines.len());
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| Malformed::Value)?;
        places.push((name, place(bytes, line.value)));
    }
    Ok(())
}

/// A part of a head's bytes, which it shares.
pub(super) fn piece(head: &Bytes, (at, length): Place) -> Bytes {
    if length == 0 { Bytes::new() } else { head.slice(at..at + length) }
}

/// The headers of a head, whose values are pieces of its very bytes.
pub(super) fn headers(head: &Bytes, places: &mut Places) -> Result<HeaderMap, Malformed> {
    let mut headers = HeaderMap::with_capacity(places.len());
    for (name, place) in places.drain(..) {
        let value = HeaderValue::from_maybe_shared(piece(head, place)).map_err(|_| Malformed::Value)?;
        headers.append(name, value);
    }
    Ok(headers)
}

/// Takes a head off the front.
pub(super) fn split(bytes: &mut BytesMut, length: usize) -> Bytes {
    if length == bytes.len() { std::mem::take(bytes).freeze() } else { bytes.split_to(length).freeze() }
}

/// Writes one header; `proper_case`: its name `Like-This`.
pub(super) fn write_line(out: &mut Vec<u8>, name: &str, value: &[u8], proper_case: bool) {
    if proper_case {
        let mut begins = true;
        for byte in name.bytes() {
            out.push(if begins { byte.to_ascii_uppercase() } else { byte });
            begins = byte == b'-';
        }
    } else {
        out.extend_from_slice(name.as_bytes());
    }
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// What a message's `connection` headers say about the connection itself: `close`, `keep-alive`.
pub(super) fn connection<'a>(values: impl IntoIterator<Item = &'a HeaderValue>) -> (bool, bool) {
    values.into_iter().fold((false, false), |(closes, keeps), value| {
        (closes || has_token(value, "close"), keeps || has_token(value, "keep-alive"))
    })
}

/// Whether a list has this word, in capitals or not.
pub(super) fn has_token(value: &HeaderValue, token: &str) -> bool {
    value.as_bytes().split(|b| *b == b',').any(|t| t.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// A length, as a number without a sign.
pub(crate) fn length(value: &HeaderValue) -> Option<u64> {
    digits(value.as_bytes())
}

/// A length; several of them in one line must be the same (RFC 9110, section 8.6).
pub(super) fn one_length(value: &HeaderValue) -> Option<u64> {
    let mut all = value.as_bytes().split(|b| *b == b',').map(|part| digits(part.trim_ascii()));
    let first = all.next()??;
    all.all(|other| other == Some(first)).then_some(first)
}

/// A number as text.
pub(super) fn decimal(mut number: u64, room: &mut [u8; 20]) -> &[u8] {
    let mut at = room.len();
    for digit in room.iter_mut().rev() {
        *digit = b'0' + u8::try_from(number % 10).unwrap_or(0);
        (number, at) = (number / 10, at - 1);
        if number == 0 {
            break;
        }
    }
    room.get(at..).unwrap_or_default()
}

fn digits(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() || !bytes.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_be_written_in_proper_case() {
        let mut out = Vec::new();
        write_line(&mut out, "x-request-id", b"1", true);
        assert_eq!(out, b"X-Request-Id: 1\r\n");
    }

    #[test]
    fn numbers_are_written_in_full() {
        for number in [0, 7, 10, 1024, u64::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string().as_bytes());
        }
    }

    #[test]
    fn a_length_is_digits_alone() {
        let length = |text: &'static str| length(&HeaderValue::from_static(text));
        assert_eq!(length("0"), Some(0));
        assert_eq!(length("18446744073709551615"), Some(u64::MAX));
        for text in ["", "+1", "-1", "1 ", "0x1", "1,1", "18446744073709551616"] {
            assert_eq!(length(text), None, "{text:?}");
        }
    }
}

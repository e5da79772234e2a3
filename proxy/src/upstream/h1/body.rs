//! Finds the body of an HTTP/1 response in the bytes of its connection (RFC 9112, sections 6 and 7). Without IO.

use bytes::{Bytes, BytesMut};
use http::header::{HeaderMap, HeaderName, HeaderValue};

use super::head::BadResponse;

/// The longest line before a chunk's data, and the longest trailers, in bytes.
const LONGEST: usize = 16 * 1024;
/// The most trailers.
const MOST_TRAILERS: usize = 100;

/// What is still to come of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoder {
    /// So many bytes.
    Length(u64),
    /// Chunks.
    Chunked(Chunk),
    /// All that comes.
    UntilClose,
}

/// What comes next of a body in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// The line before the next chunk.
    Size,
    /// So many bytes of this one.
    Data(u64),
    /// The end of its data.
    End,
    /// Trailers.
    Trailers,
}

/// The next piece of a body.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// Some of it.
    Data(Bytes),
    /// Its trailers; nothing comes after them.
    Trailers(HeaderMap),
    /// Nothing comes any more.
    Over,
    /// More bytes of the connection are needed.
    NeedMore,
}

impl Decoder {
    /// A body in chunks, before the first.
    #[must_use]
    pub fn chunked() -> Self {
        Self::Chunked(Chunk::Size)
    }

    /// Whether nothing is to come.
    #[must_use]
    pub fn is_over(&self) -> bool {
        *self == Self::Length(0)
    }

    /// How many bytes are to come, if that is known.
    #[must_use]
    pub fn left(&self) -> Option<u64> {
        match self {
            Self::Length(left) => Some(*left),
            Self::Chunked(_) | Self::UntilClose => None,
        }
    }

    /// Takes the next piece off the front of `bytes`. `ended`: nothing comes after these.
    ///
    /// # Errors
    ///
    /// When the bytes are no such body, or end before it does.
    pub fn next(&mut self, bytes: &mut BytesMut, ended: bool) -> Result<Piece, BadResponse> {
        let piece = match self {
            Self::Length(0) => return Ok(Piece::Over),
            Self::Length(left) => data(bytes, left).map_or(Piece::NeedMore, Piece::Data),
            Self::UntilClose if !bytes.is_empty() => Piece::Data(bytes.split().freeze()),
            Self::UntilClose if ended => {
                *self = Self::Length(0);
                return Ok(Piece::Over);
            }
            Self::UntilClose => Piece::NeedMore,
            Self::Chunked(chunk) => {
                let piece = chunk.next(bytes)?;
                if matches!(piece, Piece::Over | Piece::Trailers(_)) {
                    *self = Self::Length(0);
                }
                piece
            }
        };
        if ended && piece == Piece::NeedMore { Err(BadResponse::Cut) } else { Ok(piece) }
    }
}

/// As much as is there of the bytes that are left; `None` when nothing is.
fn data(bytes: &mut BytesMut, left: &mut u64) -> Option<Bytes> {
    if bytes.is_empty() {
        return None;
    }
    let n = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
    *left -= n as u64;
    Some(bytes.split_to(n).freeze())
}

impl Chunk {
    fn next(&mut self, bytes: &mut BytesMut) -> Result<Piece, BadResponse> {
        loop {
            match self {
                Self::Size => {
                    let (length, size) = match httparse::parse_chunk_size(bytes) {
                        Ok(httparse::Status::Complete(found)) => found,
                        Ok(httparse::Status::Partial) if bytes.len() <= LONGEST => {
                            return Ok(Piece::NeedMore);
                        }
                        Ok(httparse::Status::Partial) | Err(_) => return Err(BadResponse::Chunk),
                    };
                    drop(bytes.split_to(length));
                    *self = if size == 0 { Self::Trailers } else { Self::Data(size) };
                }
                Self::Data(left) => {
                    let Some(data) = data(bytes, left) else { return Ok(Piece::NeedMore) };
                    if *left == 0 {
                        *self = Self::End;
                    }
                    return Ok(Piece::Data(data));
                }
                Self::End => match bytes.get(..2) {
                    None => return Ok(Piece::NeedMore),
                    Some(b"\r\n") => {
                        drop(bytes.split_to(2));
                        *self = Self::Size;
                    }
                    Some(_) => return Err(BadResponse::Chunk),
                },
                Self::Trailers => return trailers(bytes),
            }
        }
    }
}

fn trailers(bytes: &mut BytesMut) -> Result<Piece, BadResponse> {
    let mut lines = [httparse::EMPTY_HEADER; MOST_TRAILERS];
    let (length, lines) = match httparse::parse_headers(bytes, &mut lines) {
        Ok(httparse::Status::Complete(found)) => found,
        Ok(httparse::Status::Partial) if bytes.len() <= LONGEST => return Ok(Piece::NeedMore),
        Ok(httparse::Status::Partial) | Err(_) => return Err(BadResponse::Trailers),
    };
    let mut trailers = HeaderMap::with_capacity(lines.len());
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| BadResponse::Trailers)?;
        let value = HeaderValue::from_bytes(line.value).map_err(|_| BadResponse::Trailers)?;
        trailers.append(name, value);
    }
    drop(bytes.split_to(length));
    Ok(if trailers.is_empty() { Piece::Over } else { Piece::Trailers(trailers) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that a decoder finds in bytes that come in pieces of `step`, and what it leaves.
    fn all(
        mut decoder: Decoder,
        text: &str,
        step: usize,
    ) -> Result<(String, HeaderMap, String), BadResponse> {
        let (mut data, mut trailers, mut bytes) = (Vec::new(), HeaderMap::new(), BytesMut::new());
        let mut pieces = text.as_bytes().chunks(step);
        let mut ended = false;
        loop {
            match decoder.next(&mut bytes, ended)? {
                Piece::Data(piece) => data.extend_from_slice(&piece),
                Piece::Trailers(found) => trailers = found,
                Piece::Over => break,
                Piece::NeedMore => match pieces.next() {
                    Some(piece) => bytes.extend_from_slice(piece),
                    None => ended = true,
                },
            }
        }
        bytes.extend(pieces.flatten());
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        Ok((text(&data), trailers, text(&bytes)))
    }

    #[track_caller]
    fn check(decoder: Decoder, text: &str, data: &str, trailers: usize, rest: &str) {
        for step in 1..=text.len().max(1) {
            let (found, told, left) = all(decoder, text, step).unwrap();
            assert_eq!(
                (found.as_str(), told.len(), left.as_str()),
                (data, trailers, rest),
                "{text:?} by {step}"
            );
        }
    }

    #[test]
    fn bodies_end_where_their_framing_says() {
        check(Decoder::Length(0), "next", "", 0, "next");
        check(Decoder::Length(3), "abcnext", "abc", 0, "next");
        check(Decoder::UntilClose, "abc", "abc", 0, "");
        check(Decoder::chunked(), "3\r\nabc\r\n0\r\n\r\nnext", "abc", 0, "next");
        check(Decoder::chunked(), "3;x=y\r\nabc\r\nA\r\n0123456789\r\n00\r\n\r\n", "abc0123456789", 0, "");
        check(Decoder::chunked(), "1\r\na\r\n0\r\nx-sum: 1\r\nx-sum: 2\r\n\r\nnext", "a", 2, "next");
    }

    #[test]
    fn bodies_that_are_cut_or_malformed_are_errors() {
        let bad = |decoder, text: &str| {
            let whole = all(decoder, text, text.len().max(1)).unwrap_err();
            assert_eq!(all(decoder, text, 1).unwrap_err(), whole, "{text:?}");
            whole
        };
        assert_eq!(bad(Decoder::Length(3), "ab"), BadResponse::Cut);
        for text in ["", "3", "3\r\nab", "3\r\nabc", "3\r\nabc\r\n", "0\r\n", "0\r\nx: y\r\n"] {
            assert_eq!(bad(Decoder::chunked(), text), BadResponse::Cut, "{text:?}");
        }
        for text in ["x\r\n", "-1\r\n", "3\r\nabcd\r\n", "3\r\nabc\n\n", "11111111111111111\r\n"] {
            assert_eq!(bad(Decoder::chunked(), text), BadResponse::Chunk, "{text:?}");
        }
        assert_eq!(bad(Decoder::chunked(), "0\r\na b: c\r\n\r\n"), BadResponse::Trailers);
        let endless = format!("3;{}", "x".repeat(2 * LONGEST));
        assert_eq!(bad(Decoder::chunked(), &endless), BadResponse::Chunk);
        let endless = format!("0\r\nx: {}", "y".repeat(2 * LONGEST));
        assert_eq!(bad(Decoder::chunked(), &endless), BadResponse::Trailers);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_the_same_in_any_pieces(
            bytes in proptest::collection::vec(proptest::sample::select(b"0123aAf;=\r\n: x".to_vec()), 0..120),
            step in 1_usize..9,
        ) {
            let text = String::from_utf8(bytes).unwrap();
            let whole = all(Decoder::chunked(), &text, text.len().max(1));
            proptest::prop_assert_eq!(all(Decoder::chunked(), &text, step), whole);
        }
    }
}

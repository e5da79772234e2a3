//! Bodies in the bytes of their connection (RFC 9112, sections 6 and 7). Without IO.

use std::io::Write as _;

use bytes::{Bytes, BytesMut};
use http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TRAILER, TRANSFER_ENCODING,
};
use http_body::Frame;

use super::head::{Malformed, lines_end_whole, write_line};
use super::wire::Outbox;

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
    pub fn next(&mut self, bytes: &mut BytesMut, ended: bool) -> Result<Piece, Malformed> {
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
        if ended && piece == Piece::NeedMore { Err(Malformed::Cut) } else { Ok(piece) }
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
    fn next(&mut self, bytes: &mut BytesMut) -> Result<Piece, Malformed> {
        loop {
            match self {
                Self::Size => {
                    let (length, size) = match httparse::parse_chunk_size(bytes) {
                        Ok(httparse::Status::Complete(found)) if is_line(bytes, found.0) => found,
                        Ok(httparse::Status::Partial)
                            if bytes.len() <= LONGEST && !bytes.contains(&b'\n') =>
                        {
                            return Ok(Piece::NeedMore);
                        }
                        Ok(_) | Err(_) => return Err(Malformed::Chunk),
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
                    Some(_) => return Err(Malformed::Chunk),
                },
                Self::Trailers => return trailers(bytes),
            }
        }
    }
}

/// Whether a line before a chunk says its size, and has no second end in it, which others might take for the first.
fn is_line(bytes: &[u8], length: usize) -> bool {
    let text = bytes.get(..length.saturating_sub(2)).unwrap_or_default();
    text.first().is_some_and(u8::is_ascii_hexdigit) && !text.iter().any(|b| matches!(b, b'\r' | b'\n'))
}

fn trailers(bytes: &mut BytesMut) -> Result<Piece, Malformed> {
    let mut lines = [httparse::EMPTY_HEADER; MOST_TRAILERS];
    let (length, lines) = match httparse::parse_headers(bytes, &mut lines) {
        Ok(httparse::Status::Complete(found)) if lines_end_whole(bytes, found.0) => found,
        Ok(httparse::Status::Partial) if bytes.len() <= LONGEST => return Ok(Piece::NeedMore),
        Ok(_) | Err(_) => return Err(Malformed::Trailers),
    };
    let mut trailers = HeaderMap::with_capacity(lines.len());
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| Malformed::Trailers)?;
        let value = HeaderValue::from_bytes(line.value).map_err(|_| Malformed::Trailers)?;
        trailers.append(name, value);
    }
    drop(bytes.split_to(length));
    Ok(if trailers.is_empty() { Piece::Over } else { Piece::Trailers(trailers) })
}

/// How the reader of a message knows where its body ends (RFC 9112, section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// After so many bytes more.
    Length(u64),
    /// In chunks.
    Chunked,
    /// Where the connection ends.
    UntilClose,
}

/// Writes a body behind its head.
#[derive(Debug)]
pub struct Encoder {
    framing: Framing,
    /// Trailers that the head has announced.
    announced: Vec<HeaderName>,
    proper_case: bool,
    over: bool,
}

impl Encoder {
    /// A body that is to be written like this. `trailers`: those that may follow it.
    #[must_use]
    pub fn new(framing: Framing, trailers: Vec<HeaderName>, proper_case: bool) -> Self {
        Self { framing, announced: trailers, proper_case, over: false }
    }

    /// Whether all of the body is written.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Whether a reader who misses the end of the body would take what came for all of it.
    #[must_use]
    pub fn is_until_close(&self) -> bool {
        self.framing == Framing::UntilClose
    }

    /// Puts the next piece into the outbox, which must have room; `None` is the end of the body. `ends`: nothing comes
    /// after this piece.
    ///
    /// # Errors
    ///
    /// The body is longer or shorter than its head says.
    pub fn put(
        &mut self,
        frame: Option<Frame<Bytes>>,
        ends: bool,
        outbox: &mut Outbox,
    ) -> Result<(), &'static str> {
        let ends = ends || frame.is_none();
        let frame = frame.map(Frame::into_data);
        match &mut self.framing {
            Framing::Length(left) => {
                let data = frame.and_then(Result::ok).unwrap_or_default();
                *left = left.checked_sub(data.len() as u64).ok_or("the body is longer than its length")?;
                if ends && *left > 0 {
                    return Err("the body is shorter than its length");
                }
                outbox.put(data, b"");
            }
            Framing::UntilClose => outbox.put(frame.and_then(Result::ok).unwrap_or_default(), b""),
            Framing::Chunked => match frame {
                Some(Ok(data)) if data.is_empty() && !ends => {}
                Some(Ok(data)) if !data.is_empty() => {
                    write_chunk(outbox.head(), data.len());
                    outbox.put(data, if ends { b"\r\n0\r\n\r\n" } else { b"\r\n" });
                }
                Some(Err(trailers)) => {
                    let trailers = trailers.into_trailers().unwrap_or_default();
                    write_trailers(outbox.head(), &trailers, &self.announced, self.proper_case);
                    self.over = true;
                    return Ok(());
                }
                Some(Ok(_)) | None => outbox.put(Bytes::new(), b"0\r\n\r\n"),
            },
        }
        self.over = ends;
        Ok(())
    }
}

/// Writes the line before the data of a chunk.
fn write_chunk(out: &mut Vec<u8>, length: usize) {
    // a vector takes everything
    let _written: std::io::Result<()> = write!(out, "{length:x}\r\n");
}

/// Writes the end of a body in chunks, with those trailers that the head has announced.
fn write_trailers(out: &mut Vec<u8>, trailers: &HeaderMap, announced: &[HeaderName], proper_case: bool) {
    out.extend_from_slice(b"0\r\n");
    for (name, value) in trailers.iter().filter(|(name, _)| announced.contains(name)) {
        write_line(out, name.as_str(), value.as_bytes(), proper_case);
    }
    out.extend_from_slice(b"\r\n");
}

/// The trailers that a head tells of. What says where a message ends or goes is none (RFC 9110, section 6.5.1).
#[must_use]
pub fn announced(headers: &HeaderMap) -> Vec<HeaderName> {
    let told = headers.get_all(TRAILER).iter();
    told.flat_map(|v| v.as_bytes().split(|b| *b == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .filter(|name| !matches!(*name, CONTENT_LENGTH | TRANSFER_ENCODING | HOST | CONNECTION | TRAILER))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_written_as_its_head_says() {
        let written = |framing, pieces: &[&'static str], ends_with_last: bool| {
            let (mut encoder, mut outbox) = (Encoder::new(framing, Vec::new(), false), Outbox::default());
            for (at, piece) in pieces.iter().enumerate() {
                let ends = ends_with_last && at + 1 == pieces.len();
                encoder.put(Some(Frame::data(Bytes::from_static(piece.as_bytes()))), ends, &mut outbox)?;
                assert_eq!(encoder.is_over(), ends);
            }
            if !ends_with_last {
                encoder.put(None, false, &mut outbox)?;
            }
            assert!(encoder.is_over());
            Ok(String::from_utf8(outbox.head().clone()).unwrap())
        };
        let ok = |text: &str| Ok::<_, &str>(text.to_owned());
        for ends in [true, false] {
            assert_eq!(
                written(Framing::Chunked, &["abc", "de"], ends),
                ok("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
            );
            assert_eq!(written(Framing::Chunked, &["abc", ""], ends), ok("3\r\nabc\r\n0\r\n\r\n"));
            assert_eq!(written(Framing::Length(5), &["abc", "", "de"], ends), ok("abcde"));
            assert_eq!(written(Framing::UntilClose, &["abc", "de"], ends), ok("abcde"));
            assert_eq!(
                written(Framing::Length(6), &["abc"], ends),
                Err("the body is shorter than its length")
            );
            assert_eq!(
                written(Framing::Length(2), &["abc"], ends),
                Err("the body is longer than its length")
            );
        }
    }

    #[test]
    fn only_announced_trailers_are_written() {
        let trailers = HeaderMap::from_iter([
            (HeaderName::from_static("x-sum"), HeaderValue::from_static("1")),
            (HeaderName::from_static("x-other"), HeaderValue::from_static("2")),
        ]);
        let mut out = Vec::new();
        let mut head = HeaderMap::new();
        head.insert(TRAILER, HeaderValue::from_static("x-sum, Content-Length,host, x/y"));
        head.append(TRAILER, HeaderValue::from_static("transfer-encoding"));
        let announced = announced(&head);
        assert_eq!(announced, ["x-sum"]);
        write_trailers(&mut out, &trailers, &announced, false);
        assert_eq!(out, b"0\r\nx-sum: 1\r\n\r\n");
    }

    /// All that a decoder finds in bytes that come in pieces of `step`, and what it leaves.
    fn all(mut decoder: Decoder, text: &str, step: usize) -> Result<(String, HeaderMap, String), Malformed> {
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
        assert_eq!(bad(Decoder::Length(3), "ab"), Malformed::Cut);
        for text in ["", "3", "3\r\nab", "3\r\nabc", "3\r\nabc\r\n", "0\r\n", "0\r\nx: y\r\n"] {
            assert_eq!(bad(Decoder::chunked(), text), Malformed::Cut, "{text:?}");
        }
        for text in [
            "\r\n\r\n",
            ";a\r\n\r\n",
            " 0\r\n\r\n",
            "3;a\nb\r\nabc\r\n",
            "3;\n",
            "3\n\r\nabc",
            "x\r\n",
            "-1\r\n",
            "3\r\nabcd\r\n",
            "3\r\nabc\n\n",
            "11111111111111111\r\n",
        ] {
            assert_eq!(bad(Decoder::chunked(), text), Malformed::Chunk, "{text:?}");
        }
        assert_eq!(bad(Decoder::chunked(), "0\r\na b: c\r\n\r\n"), Malformed::Trailers);
        assert_eq!(bad(Decoder::chunked(), "0\r\na: b\n\r\n"), Malformed::Trailers);
        assert_eq!(bad(Decoder::chunked(), "0\r\n\n"), Malformed::Trailers);
        let endless = format!("3;{}", "x".repeat(2 * LONGEST));
        assert_eq!(bad(Decoder::chunked(), &endless), Malformed::Chunk);
        let endless = format!("0\r\nx: {}", "y".repeat(2 * LONGEST));
        assert_eq!(bad(Decoder::chunked(), &endless), Malformed::Trailers);
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

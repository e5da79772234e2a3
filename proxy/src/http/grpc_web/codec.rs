//! The bytes of gRPC-Web bodies. Pure.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::HeaderMap;

/// The flag of a frame with trailers (gRPC's PROTOCOL-WEB document).
const TRAILERS: u8 = 0x80;
/// Characters that make three bytes in base64.
const QUAD: usize = 4;

/// A body that is not base64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not base64")]
pub struct NotBase64;

/// Reads base64 piece by piece. Pieces end anywhere, and padding may end any group of four: clients encode messages one by
/// one.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The beginning of a group of four.
    ahead: Vec<u8>,
}

impl Decoder {
    /// The bytes of one more piece.
    ///
    /// # Errors
    ///
    /// When it is not base64.
    pub fn piece(&mut self, text: &[u8]) -> Result<Bytes, NotBase64> {
        self.ahead.extend_from_slice(text);
        let whole = self.ahead.len() / QUAD * QUAD;
        let mut bytes = Vec::with_capacity(whole / QUAD * 3);
        let mut rest = self.ahead.get(..whole).unwrap_or_default();
        while !rest.is_empty() {
            // up to the group that is padded, if one is
            let padded = rest.iter().position(|c| *c == b'=').map(|at| (at / QUAD + 1) * QUAD);
            let (now, later) = rest.split_at(padded.unwrap_or(rest.len()).min(rest.len()));
            STANDARD.decode_vec(now, &mut bytes).map_err(|_| NotBase64)?;
            rest = later;
        }
        drop(self.ahead.drain(..whole));
        Ok(bytes.into())
    }

    /// Whether the body may end here.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.ahead.is_empty()
    }
}

/// Writes a body with its trailers in a frame at its end, as it is or as base64.
#[derive(Debug)]
pub struct Encoder {
    text: Option<Text>,
}

/// Writes base64, each frame for itself, so that clients can read it when it has come.
#[derive(Debug, Default)]
struct Text {
    /// Bytes of the frame that make no group yet.
    ahead: Vec<u8>,
    /// What came of the frame's head.
    head: Vec<u8>,
    /// How many bytes of the frame are to come behind its head.
    left: usize,
}

impl Encoder {
    /// For a client that wants base64, or bytes as they are.
    #[must_use]
    pub fn new(text: bool) -> Self {
        Self { text: text.then(Text::default) }
    }

    /// One more piece of the body.
    pub fn piece(&mut self, bytes: Bytes) -> Bytes {
        match &mut self.text {
            None => bytes,
            Some(text) => text.piece(&bytes).into(),
        }
    }

    /// The frame of the trailers.
    pub fn trailers(&mut self, trailers: &HeaderMap) -> Bytes {
        let mut lines = Vec::new();
        for (name, value) in trailers {
            lines.extend_from_slice(name.as_str().as_bytes());
            lines.push(b':');
            lines.extend_from_slice(value.as_bytes());
            lines.extend_from_slice(b"\r\n");
        }
        let length = u32::try_from(lines.len()).unwrap_or(u32::MAX).to_be_bytes();
        let frame = [&[TRAILERS], length.as_slice(), &lines].concat();
        match &self.text {
            None => frame.into(),
            Some(_) => STANDARD.encode(frame).into(),
        }
    }
}

impl Text {
    fn piece(&mut self, mut bytes: &[u8]) -> String {
        let mut text = String::with_capacity(bytes.len().div_ceil(3) * QUAD + QUAD);
        while !bytes.is_empty() {
            let in_head = 5_usize.saturating_sub(self.head.len());
            let wanted = if in_head > 0 { in_head } else { self.left };
            let (now, later) = bytes.split_at(wanted.min(bytes.len()));
            bytes = later;
            if in_head > 0 {
                self.head.extend_from_slice(now);
                if let [_, length @ ..] = self.head.as_slice()
                    && let Ok(length) = length.try_into()
                {
                    self.left = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                }
            } else {
                self.left -= now.len();
            }
            self.encode(now, &mut text);
        }
        text
    }

    /// Encodes what makes whole groups, and the rest at the end of the frame.
    fn encode(&mut self, bytes: &[u8], text: &mut String) {
        self.ahead.extend_from_slice(bytes);
        let is_end = self.head.len() == 5 && self.left == 0;
        let whole = if is_end { self.ahead.len() } else { self.ahead.len() / 3 * 3 };
        STANDARD.encode_string(self.ahead.get(..whole).unwrap_or_default(), text);
        drop(self.ahead.drain(..whole));
        if is_end {
            self.head.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decoded(pieces: &[&str]) -> Result<Vec<u8>, NotBase64> {
        let (mut decoder, mut all) = (Decoder::default(), Vec::new());
        for piece in pieces {
            all.extend_from_slice(&decoder.piece(piece.as_bytes())?);
        }
        if decoder.is_whole() { Ok(all) } else { Err(NotBase64) }
    }

    #[test]
    fn requests_are_read_however_they_are_cut_and_padded() {
        for (pieces, expected) in [
            (&["AAAAAAE="][..], Ok(&[0, 0, 0, 0, 1][..])),
            (&["AAA", "AAAE", "="], Ok(&[0, 0, 0, 0, 1])),
            (&["AAAAAAE=AAAAAAI="], Ok(&[0, 0, 0, 0, 1, 0, 0, 0, 0, 2])),
            (&["AA==", "AQ=="], Ok(&[0, 1])),
            (&[""], Ok(&[])),
            (&["AAAAA"], Err(NotBase64)),
            (&["AA=A"], Err(NotBase64)),
            (&["===="], Err(NotBase64)),
            (&["AAA-"], Err(NotBase64)),
            (&["AB=="], Err(NotBase64)),
        ] {
            assert_eq!(decoded(pieces).as_deref(), expected.as_deref(), "{pieces:?}");
        }
    }

    /// The body and trailers that a client gets of an answer in these pieces.
    fn encoded(text: bool, pieces: &[&[u8]]) -> Vec<u8> {
        let mut encoder = Encoder::new(text);
        let mut all = Vec::new();
        for piece in pieces {
            all.extend_from_slice(&encoder.piece(Bytes::copy_from_slice(piece)));
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", 0.into());
        trailers.insert("grpc-message", "ok".parse().unwrap());
        all.extend_from_slice(&encoder.trailers(&trailers));
        all
    }

    #[test]
    fn trailers_become_the_last_frame() {
        let end = b"\x80\0\0\0\x20grpc-status:0\r\ngrpc-message:ok\r\n";
        let message = b"\0\0\0\0\x02hi";
        assert_eq!(encoded(false, &[message]), [message.as_slice(), end].concat());
        let text = format!("AAAAAAJoaQ=={}", STANDARD.encode(end));
        assert_eq!(encoded(true, &[message]), text.as_bytes());
        assert_eq!(encoded(true, &[b"\0\0\0", b"\0\x02h", b"i"]), text.as_bytes());
    }

    proptest! {
        #[test]
        fn text_is_the_same_however_frames_are_cut(
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..5),
            cuts in proptest::collection::vec(1..9_usize, 1..40),
        ) {
            let mut bytes = Vec::new();
            let mut expected = String::new();
            for frame in &frames {
                let frame = [&[0, 0, 0, 0, u8::try_from(frame.len()).unwrap()], frame.as_slice()].concat();
                expected.push_str(&STANDARD.encode(&frame));
                bytes.extend(frame);
            }
            let (mut encoder, mut decoder) = (Encoder::new(true), Decoder::default());
            let (mut text, mut back, mut rest) = (Vec::new(), Vec::new(), bytes.as_slice());
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                let piece = encoder.piece(Bytes::copy_from_slice(now));
                back.extend_from_slice(&decoder.piece(&piece).unwrap());
                text.extend_from_slice(&piece);
                rest = later;
            }
            prop_assert_eq!(text, expected.into_bytes());
            prop_assert_eq!(back, bytes);
        }

        #[test]
        fn any_text_ends_in_an_answer(text in proptest::collection::vec(any::<u8>(), 0..50)) {
            let bytes = Decoder::default().piece(&text);
            prop_assert!(bytes.is_err() || bytes.unwrap().len() <= text.len());
        }
    }
}

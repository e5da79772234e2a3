//! Limits on what an HTTP/2 client may make us do for nothing. [`Meter`] is pure: it reads the heads of the frames
//! that pass and counts them by kind; [`Resets`] counts requests that their client gave up. [`Metered`] puts the
//! meter in front of the codec.
//!
//! The codec itself bounds header blocks and their continuations, streams at once, and resets of streams that nobody
//! has taken yet. What it answers without a limit is bounded here (RFC 9113, section 10.5). The limits are Envoy's.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// Frames without content in a row, of those that carry a body or a header block.
const EMPTY_IN_A_ROW: u32 = 1;
/// PRIORITY frames for each stream.
const PRIORITY_PER_STREAM: u64 = 100;
/// WINDOW_UPDATE frames for each DATA frame that we may have sent.
const WINDOW_UPDATES_PER_DATA: u64 = 10;
/// Frames that we must answer (PING, SETTINGS) at once.
const CONTROL_BURST: u64 = 1000;
/// The time that earns one more of them.
const CONTROL_EVERY: Duration = Duration::from_millis(10);
/// How many bytes that we sent earn one more of them: clients measure with pings while they receive.
const CONTROL_BYTES: u64 = 64;
/// RST_STREAM frames beyond one for each stream.
const RESETS_BEYOND: u64 = 100;
/// A DATA frame with one byte, the shortest that we send.
const SHORTEST_DATA: u64 = 10;

/// Streams after which the share of resets counts (`overload.premature_reset_total_stream_count`).
const RESETS_AFTER: u64 = 500;
/// A stream that was reset within this time was reset prematurely
/// (`overload.premature_reset_min_stream_lifetime_seconds`).
const SHORTEST_LIFE: Duration = Duration::from_secs(1);

/// What a client sent too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flood {
    /// Frames without content.
    #[error("too many frames without content in a row")]
    Empty,
    /// PRIORITY frames.
    #[error("too many PRIORITY frames")]
    Priority,
    /// WINDOW_UPDATE frames.
    #[error("too many WINDOW_UPDATE frames")]
    WindowUpdate,
    /// PING and SETTINGS frames.
    #[error("too many PING or SETTINGS frames")]
    Control,
    /// RST_STREAM frames.
    #[error("more RST_STREAM frames than streams")]
    Reset,
}

const HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;

/// Counts the frames of one client by kind.
#[derive(Debug)]
pub struct Meter {
    /// Bytes of the client's preface that are still to come.
    preface: usize,
    head: [u8; HEAD],
    have: usize,
    /// Bytes of the frame under way that are still to come.
    body: usize,
    empty: u32,
    streams: u64,
    priorities: u64,
    window_updates: u64,
    resets: u64,
    written: u64,
    control: u64,
    /// When `control` was filled last, and how much had been written then.
    filled: (Instant, u64),
}

impl Meter {
    /// A connection whose preface is still to come.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            preface: crate::listener::detect::H2_PREFACE.len(),
            head: [0; HEAD],
            have: 0,
            body: 0,
            empty: 0,
            streams: 0,
            priorities: 0,
            window_updates: 0,
            resets: 0,
            written: 0,
            control: CONTROL_BURST,
            filled: (now, 0),
        }
    }

    /// Notes bytes that we sent.
    pub fn on_written(&mut self, n: usize) {
        self.written += n as u64;
    }

    /// Reads what came.
    ///
    /// # Errors
    ///
    /// What there was too much of.
    pub fn on_read(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), Flood> {
        let skipped = self.preface.min(bytes.len());
        self.preface -= skipped;
        bytes = bytes.get(skipped..).unwrap_or_default();
        while !bytes.is_empty() {
            if self.body > 0 {
                let skipped = self.body.min(bytes.len());
                self.body -= skipped;
                bytes = bytes.get(skipped..).unwrap_or_default();
                continue;
            }
            let wanted = (HEAD - self.have).min(bytes.len());
            let (part, rest) = bytes.split_at_checked(wanted).unwrap_or((bytes, &[]));
            if let Some(room) = self.head.get_mut(self.have..self.have + wanted) {
                room.copy_from_slice(part);
            }
            self.have += wanted;
            bytes = rest;
            if self.have == HEAD {
                self.have = 0;
                self.frame(now)?;
            }
        }
        Ok(())
    }

    fn frame(&mut self, now: Instant) -> Result<(), Flood> {
        let [a, b, c, kind, flags, ..] = self.head;
        self.body = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        if matches!(kind, DATA | HEADERS | CONTINUATION) {
            if kind == HEADERS {
                self.streams += 1;
            }
            let empty = self.body == 0 && !(kind != CONTINUATION && flags & END_STREAM != 0);
            self.empty = if empty { self.empty + 1 } else { 0 };
            return if self.empty > EMPTY_IN_A_ROW { Err(Flood::Empty) } else { Ok(()) };
        }
        match kind {
            PRIORITY => {
                self.priorities += 1;
                let most = PRIORITY_PER_STREAM * (1 + self.streams);
                if self.priorities > most { Err(Flood::Priority) } else { Ok(()) }
            }
            WINDOW_UPDATE => {
                self.window_updates += 1;
                let data = self.written / SHORTEST_DATA;
                let most = 5 + 2 * (self.streams + WINDOW_UPDATES_PER_DATA * data);
                if self.window_updates > most { Err(Flood::WindowUpdate) } else { Ok(()) }
            }
            PING | SETTINGS if flags & ACK == 0 => self.control(now),
            RST_STREAM => {
                self.resets += 1;
                if self.resets > self.streams + RESETS_BEYOND { Err(Flood::Reset) } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }

    /// A bucket, filled again when it is empty.
    fn control(&mut self, now: Instant) -> Result<(), Flood> {
        if self.control == 0 {
            let (since, written) = std::mem::replace(&mut self.filled, (now, self.written));
            let every = CONTROL_EVERY.as_millis();
            let time = now.saturating_duration_since(since).as_millis() / every;
            let earned = u64::try_from(time).unwrap_or(u64::MAX);
            let sent = (self.written - written) / CONTROL_BYTES;
            self.control = earned.saturating_add(sent).min(CONTROL_BURST);
        }
        self.control = self.control.checked_sub(1).ok_or(Flood::Control)?;
        Ok(())
    }
}

/// How many requests of a connection their client gave up at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resets {
    ended: u64,
    premature: u64,
}

impl Resets {
    /// Notes the end of a request; `reset`: its client gave it up after this time.
    pub fn on_end(&mut self, reset: Option<Duration>) {
        self.ended += 1;
        self.premature += u64::from(reset.is_some_and(|life| life < SHORTEST_LIFE));
    }

    /// Whether at least half of the requests were given up at once, or will have been when enough have ended.
    #[must_use]
    pub fn are_too_many(&self) -> bool {
        self.premature > 0 && self.premature * 2 >= self.ended.max(RESETS_AFTER)
    }
}

/// A client's stream with a meter: reading fails when the client floods.
#[derive(Debug)]
pub struct Metered<S> {
    io: S,
    meter: Meter,
}

impl<S> Metered<S> {
    /// A connection whose preface is still to come.
    pub fn new(io: S, now: Instant) -> Self {
        Self { io, meter: Meter::new(now) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        let new = buf.filled().get(before..).unwrap_or_default();
        if new.is_empty() {
            return read;
        }
        match this.meter.on_read(new, Instant::now()) {
            Ok(()) => read,
            Err(flood) => Poll::Ready(Err(io::Error::other(flood))),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.written(|io| io.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.written(|io| io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl<S: AsyncWrite + Unpin> Metered<S> {
    fn written(
        &mut self,
        write: impl FnOnce(Pin<&mut S>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let outcome = write(Pin::new(&mut self.io));
        if let Poll::Ready(Ok(n)) = &outcome {
            self.meter.on_written(*n);
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
        let length = u32::try_from(length).unwrap();
        let mut bytes = length.to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags, 0, 0, 0, 1]);
        bytes.extend(vec![0; length as usize]);
        bytes
    }

    /// What comes of `frames`, each so many times, one after the other.
    fn outcome(frames: &[(usize, Vec<u8>)]) -> Result<(), Flood> {
        let now = Instant::now();
        let mut meter = Meter::new(now);
        meter.on_read(crate::listener::detect::H2_PREFACE, now).unwrap();
        let bytes: Vec<u8> = frames.iter().flat_map(|(n, frame)| frame.repeat(*n)).collect();
        // in pieces that no frame's end falls together with
        bytes.chunks(7).try_for_each(|piece| meter.on_read(piece, now))
    }

    #[tokio::test(start_paused = true)]
    async fn each_kind_of_flood_is_told_and_what_clients_do_is_not() {
        let request = || frame(HEADERS, END_STREAM, 30);
        for (frames, expected) in [
            (vec![(500, request()), (499, frame(RST_STREAM, 0, 4))], Ok(())),
            (vec![(1, request()), (102, frame(RST_STREAM, 0, 4))], Err(Flood::Reset)),
            (vec![(1000, frame(PING, 0, 8))], Ok(())),
            (vec![(1001, frame(PING, 0, 8))], Err(Flood::Control)),
            (vec![(5000, frame(PING, ACK, 8))], Ok(())),
            (vec![(1001, frame(SETTINGS, 0, 0))], Err(Flood::Control)),
            (vec![(100, frame(PRIORITY, 0, 5))], Ok(())),
            (vec![(101, frame(PRIORITY, 0, 5))], Err(Flood::Priority)),
            (vec![(1, request()), (7, frame(WINDOW_UPDATE, 0, 4))], Ok(())),
            (vec![(1, request()), (8, frame(WINDOW_UPDATE, 0, 4))], Err(Flood::WindowUpdate)),
            (vec![(1, frame(HEADERS, 0, 9)), (1, frame(DATA, 0, 0)), (1, frame(DATA, 1, 0))], Ok(())),
            (vec![(1, frame(HEADERS, 0, 9)), (2, frame(DATA, 0, 0))], Err(Flood::Empty)),
            (vec![(1, frame(HEADERS, 0, 9)), (2, frame(CONTINUATION, 0, 0))], Err(Flood::Empty)),
        ] {
            let told: Vec<_> = frames.iter().map(|(n, f)| (n, f[3], f[4])).collect();
            assert_eq!(outcome(&frames), expected, "{told:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_and_data_earn_control_frames() {
        let t0 = Instant::now();
        let mut meter = Meter::new(t0);
        meter.preface = 0;
        let pings = |n: usize| frame(PING, 0, 8).repeat(n);
        meter.on_read(&pings(1000), t0).unwrap();
        meter.on_read(&pings(200), t0 + Duration::from_secs(2)).unwrap();
        meter.on_written(6400);
        meter.on_read(&pings(100), t0 + Duration::from_secs(2)).unwrap();
        assert_eq!(meter.on_read(&pings(1), t0 + Duration::from_secs(2)), Err(Flood::Control));
    }

    #[test]
    fn half_of_the_requests_given_up_at_once_are_too_many() {
        let (soon, late) = (Some(Duration::from_millis(1)), Some(Duration::from_secs(2)));
        let after = |ends: &[(u64, Option<Duration>)]| {
            let mut resets = Resets::default();
            for (n, reset) in ends {
                (0..*n).for_each(|_| resets.on_end(*reset));
            }
            resets.are_too_many()
        };
        assert!(!after(&[(249, soon)]));
        assert!(after(&[(250, soon)]));
        assert!(!after(&[(1000, late)]));
        assert!(!after(&[(1000, None), (400, soon)]));
        assert!(after(&[(1000, None), (1000, soon)]));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_in_any_pieces_are_counted_the_same(
            bytes in proptest::collection::vec(0_u8..12, 0..2000),
            piece in 1_usize..64,
        ) {
            let now = Instant::now();
            let (mut whole, mut parts) = (Meter::new(now), Meter::new(now));
            let outcome = whole.on_read(&bytes, now);
            let pieces = bytes.chunks(piece).try_for_each(|p| parts.on_read(p, now));
            proptest::prop_assert_eq!(outcome, pieces);
        }
    }
}

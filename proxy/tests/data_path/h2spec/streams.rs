//! Streams: their states, numbers, frames and windows (RFC 9113, sections 5.1 to 5.3, 6.1 to 6.4, 6.6, 6.9, 6.10, 7).

use super::*;

/// A request that stays open: its server does not answer.
fn silent(stream: u32, flags: u8) -> Vec<u8> {
    frame(HEADERS, flags, stream, &with(post(), &[("x-want-silence", "1")]))
}

fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &code.to_be_bytes())
}

fn window(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes())
}

#[tokio::test]
async fn streams_have_states() {
    use Outcome::{Alive, Answer, Connection, Stream};
    let whole = |stream| frame(HEADERS, WHOLE, stream, &get());
    let open = |stream| silent(stream, END_HEADERS);
    let data = |stream| frame(DATA, END_STREAM, stream, b"abc");
    let rows = [
        ("5.1 a request", whole(1), Answer(1, 200)),
        ("5.1 idle: data", data(1), Connection(PROTOCOL_ERROR)),
        ("5.1 idle: a reset", reset(1, 8), Connection(PROTOCOL_ERROR)),
        ("5.1 idle: a window", window(1, 100), Connection(PROTOCOL_ERROR)),
        ("5.1 idle: a continuation", frame(CONTINUATION, END_HEADERS, 1, &get()), Connection(PROTOCOL_ERROR)),
        ("5.1 half closed: data", all(&[silent(1, WHOLE), data(1)]), Connection(COARSE)),
        ("5.1 half closed: a head", all(&[silent(1, WHOLE), whole(1)]), Connection(COARSE)),
        (
            "5.1 half closed: a continuation",
            all(&[silent(1, WHOLE), frame(CONTINUATION, END_HEADERS, 1, &get())]),
            Connection(PROTOCOL_ERROR),
        ),
        (
            "5.1 half closed: a window, a priority, a reset",
            all(&[silent(1, WHOLE), window(1, 1), frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]), reset(1, 8)]),
            Alive,
        ),
        ("5.1 closed by a reset: data", all(&[open(1), reset(1, 8), data(1)]), Stream(1, STREAM_CLOSED)),
        ("5.1 closed by a reset: a head", all(&[open(1), reset(1, 8), whole(1)]), Connection(COARSE)),
        (
            "5.1 closed by a reset: a continuation",
            all(&[open(1), reset(1, 8), frame(CONTINUATION, END_HEADERS, 1, &get())]),
            Connection(PROTOCOL_ERROR),
        ),
        ("5.1 closed by a reset: a window", all(&[open(1), reset(1, 8), window(1, 1)]), Alive),
        ("5.1 closed by a reset: another", all(&[open(1), reset(1, 8), reset(1, 8)]), Alive),
        ("5.1.1 an even number", whole(2), Connection(PROTOCOL_ERROR)),
        ("5.1.1 a smaller number", all(&[whole(5), whole(3)]), Connection(PROTOCOL_ERROR)),
        ("5.1.1 numbers with gaps", all(&[whole(1), whole(99)]), Answer(99, 200)),
        ("5.3 a priority of its own", frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 16]), Alive),
        (
            "5.3 a priority of a stream that is to come",
            all(&[frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 16]), whole(1)]),
            Answer(1, 200),
        ),
        (
            "5.3 a priority in a head",
            frame(HEADERS, WHOLE | PRIORITIZED, 1, &[&[0, 0, 0, 0, 16], &*get()].concat()),
            Answer(1, 200),
        ),
        ("6.1 data of the connection", frame(DATA, END_STREAM, 0, b"abc"), Connection(PROTOCOL_ERROR)),
        (
            "6.1 data with padding",
            all(&[
                frame(HEADERS, END_HEADERS, 1, &post()),
                frame(DATA, END_STREAM | PADDED, 1, &[2, b'a', 0, 0]),
            ]),
            Answer(1, 200),
        ),
        (
            "6.1 more padding than data",
            all(&[open(1), frame(DATA, END_STREAM | PADDED, 1, &[9, b'a'])]),
            Connection(PROTOCOL_ERROR),
        ),
        ("6.2 a head of the connection", frame(HEADERS, WHOLE, 0, &get()), Connection(PROTOCOL_ERROR)),
        (
            "6.2 a head with padding",
            frame(HEADERS, WHOLE | PADDED, 1, &[&[3], &*get(), &[0; 3]].concat()),
            Answer(1, 200),
        ),
        (
            "6.2 more padding than head",
            frame(HEADERS, WHOLE | PADDED, 1, &[&[200], &*get()].concat()),
            Connection(PROTOCOL_ERROR),
        ),
        (
            "6.3 a priority of the connection",
            frame(PRIORITY, 0, 0, &[0, 0, 0, 1, 16]),
            Connection(PROTOCOL_ERROR),
        ),
        ("6.4 a reset of the connection", reset(0, 8), Connection(PROTOCOL_ERROR)),
        ("6.4 a short reset", all(&[open(1), frame(RST_STREAM, 0, 1, &[0, 0, 8])]), Connection(COARSE)),
        ("7 a reset with an error that nobody knows", all(&[open(1), reset(1, 0xff)]), Alive),
    ];
    check(&rows, None).await;
}

#[tokio::test]
async fn heads_come_in_one_piece() {
    use Outcome::{Answer, Connection};
    let (first, second) = (get()[..3].to_vec(), get()[3..].to_vec());
    let begun = || frame(HEADERS, END_STREAM, 1, &first);
    let more = |flags, stream| frame(CONTINUATION, flags, stream, &second);
    let rows = [
        ("6.10 one continuation", all(&[begun(), more(END_HEADERS, 1)]), Answer(1, 200)),
        (
            "6.10 several continuations",
            all(&[
                begun(),
                frame(CONTINUATION, 0, 1, &field("x-a", "1")),
                frame(CONTINUATION, 0, 1, &field("x-b", "2")),
                frame(CONTINUATION, END_HEADERS, 1, &field("x-c", "3")),
            ]),
            // without an authority
            Answer(1, 400),
        ),
        (
            "4.3 a priority in between",
            all(&[begun(), frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]), more(END_HEADERS, 1)]),
            Connection(PROTOCOL_ERROR),
        ),
        (
            "4.3 another head in between",
            all(&[begun(), frame(HEADERS, WHOLE, 3, &get()), more(END_HEADERS, 1)]),
            Connection(PROTOCOL_ERROR),
        ),
        (
            "6.2 data in between",
            all(&[frame(HEADERS, 0, 1, &first), frame(DATA, 0, 1, b"abc"), more(END_HEADERS, 1)]),
            Connection(PROTOCOL_ERROR),
        ),
        (
            "6.10 a window in between",
            all(&[begun(), frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]), more(END_HEADERS, 1)]),
            Connection(PROTOCOL_ERROR),
        ),
        (
            "6.10 a continuation of the connection",
            all(&[begun(), more(END_HEADERS, 0)]),
            Connection(PROTOCOL_ERROR),
        ),
        (
            "6.10 a continuation of another stream",
            all(&[begun(), more(END_HEADERS, 3)]),
            Connection(PROTOCOL_ERROR),
        ),
        (
            "6.10 a continuation of what had ended",
            all(&[frame(HEADERS, WHOLE, 1, &get()), more(END_HEADERS, 1)]),
            Connection(PROTOCOL_ERROR),
        ),
        (
            "6.10 a continuation of a continuation that had ended",
            all(&[begun(), more(END_HEADERS, 1), more(END_HEADERS, 1)]),
            Connection(PROTOCOL_ERROR),
        ),
        (
            "6.10 a continuation of data",
            all(&[frame(HEADERS, END_HEADERS, 1, &post()), frame(DATA, 0, 1, b"abc"), more(END_HEADERS, 1)]),
            Connection(PROTOCOL_ERROR),
        ),
    ];
    check(&rows, None).await;
}

#[tokio::test]
async fn windows_only_grow_so_far() {
    use Outcome::{Alive, Connection, Stream};
    let most = (1 << 31) - 1;
    let rows = [
        ("6.9 by nothing, of the connection", window(0, 0), Connection(PROTOCOL_ERROR)),
        (
            "6.9 by nothing, of a stream",
            all(&[silent(1, END_HEADERS), window(1, 0)]),
            Connection(PROTOCOL_ERROR),
        ),
        ("6.9 a short update", frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1]), Connection(COARSE)),
        ("6.9 the reserved bit", window(0, 1 << 31 | 1), Alive),
        ("6.9.1 beyond 31 bits, of the connection", window(0, most), Connection(FLOW_CONTROL_ERROR)),
        (
            "6.9.1 beyond 31 bits, of a stream",
            all(&[silent(1, END_HEADERS), window(1, most)]),
            Stream(1, FLOW_CONTROL_ERROR),
        ),
        (
            "6.9.2 beyond 31 bits, by a setting",
            all(&[
                silent(1, END_HEADERS),
                window(1, most - 65_535),
                frame(SETTINGS, 0, 0, &[&[0, 4][..], &most.to_be_bytes()].concat()),
            ]),
            Connection(FLOW_CONTROL_ERROR),
        ),
    ];
    check(&rows, None).await;
}

#[tokio::test]
async fn no_more_is_sent_than_the_client_takes() {
    // 6.9.1 and 6.9.2: one byte, none below zero, and the rest when the window has grown
    let (proxy, _backend) = start("").await;
    let mut client = Client::open(proxy.address(), &[0, 4, 0, 0, 0, 1]).await;
    client.send(&frame(HEADERS, WHOLE, 1, &get())).await;
    let mut said = Vec::new();
    while !said.contains(&Said::Data(1, 1, false)) {
        said.push(client.said().await);
        assert_ne!(said.last(), Some(&Said::Closed), "{said:?}");
    }
    // the window is now one below zero, and an update by one makes it nothing
    client
        .send(&all(&[frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]), window(1, 1), frame(PING, 0, 0, &PROBE)]))
        .await;
    while said.last() != Some(&Said::PingAck(PROBE.to_vec())) {
        said.push(client.said().await);
    }
    assert_eq!(said.iter().filter(|s| matches!(s, Said::Data(..))).count(), 1, "{said:?}");
    client.send(&window(1, 100)).await;
    while !matches!(said.last(), Some(Said::Data(1, 11, _))) {
        said.push(client.said().await);
        assert_ne!(said.last(), Some(&Said::Closed), "{said:?}");
    }
    proxy.end().await;
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_and_the_others_live() {
    // 5.1.2
    let (proxy, backend) = start("          http2_protocol_options: {max_concurrent_streams: 3}").await;
    let mut client = Client::open(proxy.address(), &[]).await;
    let mut said = vec![client.said().await];
    while !said.contains(&Said::SettingsAck) {
        said.push(client.said().await);
    }
    client.send(&frame(SETTINGS, ACK, 0, &[])).await;
    let open = all(&[silent(1, WHOLE), silent(3, WHOLE), silent(5, WHOLE), silent(7, WHOLE)]);
    client.send(&[open, frame(PING, 0, 0, &PROBE)].concat()).await;
    let said = client.until(Outcome::Stream(7, REFUSED_STREAM)).await;
    assert!(is_so(&said, Outcome::Stream(7, REFUSED_STREAM)), "{said:?}");
    client.send(&all(&[reset(1, 8), frame(HEADERS, WHOLE, 9, &get()), frame(PING, 0, 0, &PROBE)])).await;
    let said = client.until(Outcome::Answer(9, 200)).await;
    assert!(is_so(&said, Outcome::Answer(9, 200)), "{said:?}");
    assert!(backend.hits() <= 4);
    proxy.end().await;
}

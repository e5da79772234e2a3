//! One request, sent to two proxies, must be answered the same.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use ::http::Version;
use anyhow::ensure;
use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{Empty, Full};
use tests::echo::Seen;
use tests::http::{self, Answer};

/// A malformed request is answered or closed within this time; silence is an answer too.
const QUIET: Duration = Duration::from_millis(1500);

/// Cases that are asked at the same time: few, so that no timeout of a route passes for want of time.
const AT_ONCE: usize = 8;

/// What is sent. `WHO` in a path or host becomes the name of the proxy that is asked, and back in the answer.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    /// HTTP/1.1: method, path, headers, length of the body.
    Http1(&'static str, &'static str, &'static [(&'static str, &'static str)], usize),
    /// HTTP/2 with prior knowledge: method, path, headers, length of the body.
    Http2(&'static str, &'static str, &'static [(&'static str, &'static str)], usize),
    /// A request to leave HTTP, over HTTP/1.1 or over HTTP/2: path, protocol, and whether
    /// the server's end is waited for.
    Upgrade(Version, &'static str, &'static str, bool),
    /// Bytes as they are; only the status line of the answer counts.
    Raw(Vec<u8>),
}

/// One row of a table: a name, and what is sent.
pub(crate) type Case = (&'static str, Ask);

/// `GET`
pub(crate) fn get(name: &'static str, path: &'static str) -> Case {
    (name, Ask::Http1("GET", path, &[], 0))
}

/// `GET` with headers.
pub(crate) fn with(
    name: &'static str,
    path: &'static str,
    headers: &'static [(&'static str, &'static str)],
) -> Case {
    (name, Ask::Http1("GET", path, headers, 0))
}

/// Bytes.
pub(crate) fn raw(name: &'static str, bytes: impl Into<Vec<u8>>) -> Case {
    (name, Ask::Raw(bytes.into()))
}

/// A proxy that is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    /// Its name.
    pub(crate) name: &'static str,
    /// Where it is asked.
    pub(crate) address: SocketAddr,
    /// Host of requests that name none.
    pub(crate) host: &'static str,
}

/// An answer, without what differs from one request to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shown(Vec<String>);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n      "))
    }
}

/// Asks both, and fails when they differ in a case that `differences` does not list, or agree in one that it does.
#[expect(clippy::print_stdout, reason = "the reasons for what differs are part of the result")]
pub(crate) async fn compare(
    ours: Asked,
    theirs: Asked,
    cases: Vec<Case>,
    differences: &[(&str, &str)],
) -> anyhow::Result<()> {
    let count = cases.len();
    let mut unexpected = Vec::new();
    let both = cases.into_iter().map(|(name, ask)| async move {
        let (ours, theirs) = futures::join!(shown(ours, &ask), shown(theirs, &ask));
        (name, ours, theirs)
    });
    let mut told = 0;
    let answers: Vec<_> = futures::stream::iter(both).buffer_unordered(AT_ONCE).collect().await;
    for (name, ours, theirs) in answers {
        let listed = differences.iter().find(|(case, _)| *case == name);
        let (ours, theirs) = (ours?, theirs?);
        match (ours == theirs, listed) {
            (true, None) => {}
            (false, Some((_, reason))) => {
                told += 1;
                println!("{name} differs: {reason}");
            }
            (true, Some(_)) => unexpected.push(format!("{name}: is listed as different and is the same")),
            (false, None) => unexpected.push(difference(name, &ours, &theirs)),
        }
    }
    println!(
        "{count} requests, {} answered the same, {told} differ with a reason",
        count - told - unexpected.len()
    );
    ensure!(unexpected.is_empty(), "{} of {count} differ:\n{}", unexpected.len(), unexpected.join("\n"));
    Ok(())
}

fn difference(name: &str, ours: &Shown, theirs: &Shown) -> String {
    let only = |a: &Shown, b: &Shown| a.0.iter().filter(|l| !b.0.contains(l)).cloned().collect::<Vec<_>>();
    format!("  {name}:\n    ours:   {:?}\n    theirs: {:?}", only(ours, theirs), only(theirs, ours))
}

async fn shown(asked: Asked, ask: &Ask) -> anyhow::Result<Shown> {
    let named = |text: &str| text.replace("WHO", asked.name);
    let lines = match ask {
        Ask::Http1(method, path, headers, body) => {
            let host = headers.iter().find(|(n, _)| *n == "host").map_or(asked.host, |(_, v)| v);
            let rest: Vec<_> = headers.iter().copied().filter(|(n, _)| *n != "host").collect();
            let mut request = http::request(method, &named(host), &named(path), &rest)?;
            *request.body_mut() = Full::new(Bytes::from(vec![b'x'; *body]));
            answer_lines(http::send(asked.address, request).await)
        }
        Ask::Http2(method, path, headers, body) => {
            let uri = format!("http://{}{}", asked.host, named(path));
            let mut request = ::http::Request::builder().method(*method).uri(uri);
            for (name, value) in *headers {
                request = request.header(*name, *value);
            }
            let request = request.body(Full::new(Bytes::from(vec![b'x'; *body])))?;
            answer_lines(http::send_http2(asked.address, request).await)
        }
        Ask::Upgrade(version, path, protocol, end) => {
            let uri = format!("http://{}{}", asked.host, named(path));
            let request = ::http::Request::builder().header("sec-websocket-version", "13");
            let request = if *version == Version::HTTP_2 {
                let leave = hyper::ext::Protocol::from_static(protocol);
                request.method("CONNECT").uri(uri).extension(leave)
            } else {
                let request = request.uri(named(path)).header("host", asked.host);
                request.header("connection", "upgrade").header("upgrade", *protocol)
            };
            answer_lines(
                http::upgrade(asked.address, request.body(Empty::new())?, b"there and back", *end).await,
            )
        }
        Ask::Raw(bytes) => {
            let bytes = String::from_utf8(bytes.clone())
                .map(|t| named(&t).into_bytes())
                .unwrap_or_else(|e| e.into_bytes());
            let answer = http::raw(asked.address, &bytes, QUIET).await?;
            let answer = String::from_utf8_lossy(&answer).into_owned();
            vec![answer.lines().next().unwrap_or("closed without an answer").to_owned()]
        }
    };
    Ok(Shown(lines.into_iter().map(|line| line.replace(asked.name, "WHO")).collect()))
}

pub(crate) fn answer_lines(answer: anyhow::Result<Answer>) -> Vec<String> {
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return vec![format!("no answer: {error:#}")],
    };
    let mut lines = vec![format!("status {}", answer.status.as_u16())];
    let mut headers = BTreeMap::<String, Vec<String>>::new();
    for (name, value) in answer.headers.iter().chain(&answer.trailers) {
        headers
            .entry(name.to_string())
            .or_default()
            .push(String::from_utf8_lossy(value.as_bytes()).into_owned());
    }
    lines.extend(headers.into_iter().filter_map(|(name, values)| match name.as_str() {
        // The body is compared instead, without what differs in it.
        "date" | "content-length" | "transfer-encoding" => None,
        "x-envoy-upstream-service-time" | "x-request-id" => Some(format!("header {name}")),
        _ => Some(format!("header {name}: {}", values.join(" | "))),
    }));
    match answer.json::<Seen>() {
        Ok(seen) => lines.extend(seen_lines(&seen)),
        Err(_) => lines.push(format!("body {}", answer.text())),
    }
    lines
}

fn seen_lines(seen: &Seen) -> Vec<String> {
    let mut lines = vec![
        format!("application {} {} {} {}", seen.name, seen.method, seen.path, seen.version),
        format!("application's body {}", seen.body),
    ];
    lines.extend(seen.headers.iter().map(|(name, value)| match name.as_str() {
        // A generated one, not the client's own.
        "x-request-id" if value.len() == 36 => format!("application's header {name}"),
        "x-forwarded-client-cert" => {
            let stable: Vec<&str> = value.split(';').filter(|part| !part.starts_with("Hash=")).collect();
            format!("application's header {name}: {}", stable.join(";"))
        }
        _ => format!("application's header {name}: {value}"),
    }));
    lines
}

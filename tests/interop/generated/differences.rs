//! What may differ, and why. Pure.

use std::collections::BTreeSet;

use super::pair::Lines;
use super::request::{Named, Request};
use super::scenario::Scenario;

/// A request and what came of it.
struct Asked<'a> {
    scenario: &'a Scenario,
    request: &'a Request,
    ours: &'a Lines,
    theirs: &'a Lines,
}

impl Asked<'_> {
    /// Whether ours refuses it as malformed.
    fn is_refused(&self) -> bool {
        is_refusal(self.ours)
    }

    /// Whether Envoy does.
    fn is_refused_by_envoy(&self) -> bool {
        is_refusal(self.theirs)
    }

    /// Whether Envoy ends the connection instead of an answer.
    fn is_cut_by_envoy(&self) -> bool {
        self.theirs.first().is_some_and(|line| line.starts_with("no answer"))
    }
}

/// Whether an answer says that the request is malformed; a call is told by INTERNAL, which stands for 400.
fn is_refusal(lines: &Lines) -> bool {
    lines.iter().any(|line| line == "status 400" || line == "header grpc-status: 13")
}

/// Whether a request is one of those that a difference is about.
type Which = fn(&Asked<'_>) -> bool;

/// What is compared of a line; `None`: nothing.
type Settled = fn(&Scenario, &Request, &str) -> Option<String>;

/// Requests that ours answers otherwise on purpose: which, and why.
const REQUESTS: [(Which, &str); 11] = [
    (
        |asked| {
            let odd = std::str::from_utf8(&asked.request.target).is_err();
            odd && asked.is_refused() && asked.is_refused_by_envoy()
        },
        "400 from both; the HTTP library gives no body to what it refuses",
    ),
    (
        |asked| asked.request.target.contains(&b'#') && asked.is_refused_by_envoy(),
        "a target ends before a fragment (RFC 9112, section 3.2.1), which goes no further; Envoy answers 400",
    ),
    (
        |asked| {
            let odd = !asked.request.target.is_ascii();
            asked.request.http2.is_some() && odd && asked.is_refused()
        },
        "400: no URI has bytes above 127 (RFC 3986, section 2), over HTTP/2 no more than over HTTP/1; Envoy takes them",
    ),
    (
        |asked| asked.request.path().iter().any(|b| b"<>`".contains(b)) && asked.is_refused(),
        "400: no URI has such characters (RFC 3986, section 2); Envoy takes them",
    ),
    (
        |asked| asked.request.http2.is_none() && asked.request.has_user() && asked.is_refused(),
        "400: no host has user information (RFC 9110, section 7.2); Envoy takes it for a part of the name",
    ),
    (
        |asked| {
            let underscored = asked.scenario.refuses_underscores() && asked.request.has_underscore();
            let malformed = asked.request.http2.is_some() && (asked.request.has_user() || underscored);
            malformed && asked.is_refused() && asked.is_cut_by_envoy()
        },
        "400 to a malformed request over HTTP/2, and the connection goes on; Envoy ends it",
    ),
    (
        |asked| {
            let early = [" absolute_path_rejected ", " path_normalization_failed "];
            let logged = |lines: &Lines| {
                lines.iter().find_map(|line| early.iter().position(|details| line.contains(details)))
            };
            let same = asked.ours.first() == asked.theirs.first();
            same && logged(asked.ours).is_some() && logged(asked.ours) == logged(asked.theirs)
        },
        "a target that is no path, or none that is normal, is answered alike before a route is looked for; Envoy tells its route",
    ),
    (
        |asked| {
            let dropped = asked.request.http2.is_some() && asked.request.has_underscore();
            let told = |line: &String| line.contains(" http2.unexpected_underscore ");
            let same = asked.ours.first() == asked.theirs.first();
            dropped && same && asked.theirs.iter().any(told)
        },
        "the same answer; Envoy logs a header over HTTP/2 that it drops as a violation of the protocol",
    ),
    (
        |asked| {
            let escaped = String::from_utf8_lossy(asked.request.path()).into_owned();
            let rewritten = asked.scenario.routes.to_string().contains("\"regex_rewrite\"");
            rewritten && asked.ours.first() == asked.theirs.first() && with_upper_escapes(&escaped) != escaped
        },
        "what rewrites a path finds escapes in capitals, the one spelling that goes on from here",
    ),
    (
        |asked| asked.scenario.is_on("merge_slashes") && is_two_slashes(asked.request.path()),
        "a path of slashes alone is merged to one; Envoy leaves two, a second spelling of the first",
    ),
    (
        |asked| {
            let routes = asked.scenario.routes.to_string();
            let asks = routes.contains("\":authority\",\"string") || routes.contains("\"host\",\"string");
            asks && asked.request.has_host_in_capitals()
        },
        "conditions on a host hold in capital letters, too (RFC 9110, section 4.2.3), so that no policy is passed by them",
    ),
];

/// Whether a path has nothing but slashes, and several, when its dot segments are resolved.
fn is_two_slashes(path: &[u8]) -> bool {
    let path = String::from_utf8_lossy(path)
        .to_lowercase()
        .replace("%2e", ".")
        .replace("%2f", "/")
        .replace("%5c", "/")
        .replace('\\', "/");
    let mut left: Vec<&str> = Vec::new();
    for segment in path.split('/').skip(1) {
        // parameters make no difference to dots
        let bare = segment.split(';').next().unwrap_or_default();
        let segment = if matches!(bare, "." | "..") { bare } else { segment };
        match segment {
            "." => {}
            ".." => drop(left.pop()),
            segment => left.push(segment),
        }
    }
    path.contains("//") && left.iter().all(|segment| segment.is_empty())
}

/// Lines that ours has otherwise on purpose: what is compared of them, and why.
const LINES: [(Settled, &str); 9] = [
    (
        |_, request, line| {
            let unseen = request.http2 == Some(Named::Host) && request.header("x-forwarded-proto").is_some();
            (!unseen || !line.starts_with("application's header :scheme")).then(|| line.to_owned())
        },
        "the HTTP/2 library forgets the `:scheme` of a request that is named by `host`; what the proxy before says counts",
    ),
    (
        |_, request, line| {
            (request.body.is_some() || line != "application's header content-length: 0")
                .then(|| line.to_owned())
        },
        "a request without content needs no content-length (RFC 9110, section 8.6)",
    ),
    (
        |_, request, line| {
            (request.body.is_none() || line != "header connection: close").then(|| line.to_owned())
        },
        "Envoy closes a connection whose request body it has not read; ours reads it and goes on",
    ),
    (
        |_, request, line| {
            let steers = |name: &str| name.starts_with("x-envoy-") && request.header(name).is_some();
            let name = line.strip_prefix("application's header ").and_then(|l| l.split(':').next());
            (!name.is_some_and(steers)).then(|| line.to_owned())
        },
        "a client's own `x-envoy-` headers, by which it could steer the proxies behind, go no further",
    ),
    (
        |scenario, _, line| {
            let tells = scenario.is_on("use_remote_address");
            let address = line.starts_with("application's header x-forwarded-for");
            (!tells || !address).then(|| line.to_owned())
        },
        "a client on the loopback interface is told by its address; Envoy tells one of the machine's own",
    ),
    (
        |_, request, line| {
            let sent = request.http2.is_some() && line.starts_with("application's header ");
            Some(if sent { line.trim_end() } else { line }.to_owned())
        },
        "white space behind a value goes over HTTP/2 as over HTTP/1, so that policies see what servers see; Envoy sends it on",
    ),
    (
        |_, _, line| Some(with_upper_escapes(line)),
        "escapes have one spelling (RFC 3986, section 6.2.2.1), so that no policy is passed by another",
    ),
    (
        |_, _, line| {
            let ms = line.strip_prefix("application's header x-envoy-expected-rq-timeout-ms: ");
            let seconds = ms.and_then(|ms| ms.parse::<u64>().ok()).map(|ms| ms.div_ceil(1000));
            Some(seconds.map_or_else(|| line.to_owned(), |s| format!("expected within {s} s")))
        },
        "Envoy begins to count when the body has come",
    ),
    (
        |_, _, line| Some(with_flags_in_order(line)),
        "flags come in the order of their list; Envoy's come in the order in which they were set",
    ),
];

/// Lists of flags in the order of the alphabet.
fn with_flags_in_order(line: &str) -> String {
    let in_order = |word: &str| {
        let mut flags: Vec<&str> = word.split(',').collect();
        if flags.iter().all(|flag| !flag.is_empty() && flag.bytes().all(|b| b.is_ascii_uppercase())) {
            flags.sort_unstable();
        }
        flags.join(",")
    };
    line.split(' ').map(in_order).collect::<Vec<_>>().join(" ")
}

/// `%2f` as `%2F`.
fn with_upper_escapes(line: &str) -> String {
    let mut upper = 0;
    let letter = |c: char| {
        upper = if c == '%' { 3 } else { u32::saturating_sub(upper, 1) };
        if upper > 0 { c.to_ascii_uppercase() } else { c }
    };
    line.chars().map(letter).collect()
}

fn settled(scenario: &Scenario, request: &Request, lines: &Lines) -> Lines {
    let settle = |line: &String| {
        LINES.iter().try_fold(line.clone(), |line, (settle, _)| settle(scenario, request, &line))
    };
    lines.iter().filter_map(settle).collect()
}

/// Whether the two answers differ in more than they may.
pub(crate) fn differ(scenario: &Scenario, request: &Request, ours: &Lines, theirs: &Lines) -> bool {
    let asked = Asked { scenario, request, ours, theirs };
    !REQUESTS.iter().any(|(left, _)| left(&asked))
        && settled(scenario, request, ours) != settled(scenario, request, theirs)
}

/// What it is about: the beginnings of the lines that only one of them has. One cause makes few kinds.
pub(crate) fn kind(ours: &Lines, theirs: &Lines) -> String {
    let begins = |line: &String| line.split([':', ' ']).take(2).collect::<Vec<_>>().join(" ");
    let only = |a: &Lines, b: &Lines| {
        let lines: BTreeSet<String> = a.iter().filter(|line| !b.contains(line)).map(begins).collect();
        lines.into_iter().collect::<Vec<_>>().join(", ")
    };
    format!("[{}] instead of [{}]", only(ours, theirs), only(theirs, ours))
}

/// The lines that only one of them has.
pub(crate) fn told(ours: &Lines, theirs: &Lines) -> String {
    let only = |a: &Lines, b: &Lines| {
        a.iter().filter(|line| !b.contains(line)).map(|line| format!("\n  {line}")).collect::<String>()
    };
    format!("only ours:{}\nonly Envoy's:{}", only(ours, theirs), only(theirs, ours))
}

#[test]
fn escapes_are_compared_in_capitals_and_nothing_else_is() {
    assert_eq!(with_upper_escapes("a%2fb%zz%5C.%e2%3"), "a%2Fb%ZZ%5C.%E2%3");
}

#[test]
fn flags_are_compared_as_a_set_and_nothing_else_is() {
    assert_eq!(with_flags_in_order("logged 503 UC,DI b,a x"), "logged 503 DI,UC b,a x");
    assert_eq!(with_flags_in_order("header x: URX,UF c,B"), "header x: UF,URX c,B");
}

//! The state machine with data; each kind of check against servers on loopback addresses and real programs.

use std::path::Path;
use std::sync::Arc;

use hyper::header::HeaderName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use wire::mesh::probe as told;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn pace(successes: u32, failures: u32) -> Pace {
    let second = Duration::from_secs(1);
    Pace { initial_delay: second * 5, timeout: second, period: second * 10, successes, failures }
}

/// What becomes known after each check: `+` is a success, `-` a failure; `H` healthy, `U` not, `.` nothing new.
#[track_caller]
fn check((successes, failures): (u32, u32), found: &str, expected: &str) {
    let mut now = Instant::now();
    let mut checked = Checked::new(pace(successes, failures), now);
    let mut changes = String::new();
    for (number, found) in found.chars().enumerate() {
        now = checked.due();
        let outcome = if found == '+' { Ok(()) } else { Err(format!("failure {number}")) };
        changes.push(match checked.on_outcome(outcome, now, now + MS) {
            None => '.',
            Some(Health { healthy: true, reason }) => {
                assert_eq!(reason, "");
                'H'
            }
            Some(Health { healthy: false, reason }) => {
                assert_eq!(reason, format!("failure {number}"), "the reason is the last failure");
                'U'
            }
        });
    }
    assert_eq!(changes, expected, "{found}");
}

#[test]
fn only_what_changes_is_told_and_only_after_enough_in_a_row() {
    check((1, 3), "+++", "H..");
    check((1, 3), "+--+---+", "H.....UH");
    check((1, 3), "----+", "..U.H");
    check((2, 1), "+-++-", ".U.HU");
    check((3, 2), "++-+++--", ".....H.U");
    check((1, 1), "-+-+", "UHUH");
}

#[test]
fn checks_begin_after_the_delay_and_a_period_apart_however_long_they_take() {
    let start = Instant::now();
    let mut checked = Checked::new(pace(1, 1), start);
    let second = Duration::from_secs(1);
    assert_eq!(checked.due(), start + second * 5);
    checked.on_outcome(Ok(()), start + second * 5, start + second * 6);
    assert_eq!(checked.due(), start + second * 15);
    checked.on_outcome(Err(String::new()), start + second * 15, start + second * 40);
    assert_eq!(checked.due(), start + second * 40, "what was missed is not made up for");
}

fn place() -> Place {
    let forward = [(80, SocketAddr::from(([127, 0, 0, 9], 8080)))].into();
    Place { address: IpAddr::from([10, 0, 0, 7]), captured: false, forward }
}

#[test]
fn the_application_is_asked_and_not_its_proxy() {
    let target = |place: &Place, host: &str, port| {
        let (host, port) = place.target(host, port);
        format!("{host} {port}")
    };
    assert_eq!(target(&place(), "", 80), "127.0.0.9 8080");
    assert_eq!(target(&place(), "", 81), "127.0.0.1 81");
    assert_eq!(target(&place(), "db", 80), "db 80");
    let captured = Place { captured: true, ..place() };
    assert_eq!(target(&captured, "", 81), "10.0.0.7 81");
    let v6 = Place { address: Ipv6Addr::LOCALHOST.into(), ..place() };
    assert_eq!(target(&v6, "", 81), "::1 81");
}

fn readiness(check: Option<told::Check>) -> Option<mesh::Readiness> {
    let probe = mesh::Probe { check, ..mesh::Probe::default() };
    Some(mesh::Readiness { probe: Some(probe) })
}

#[test]
fn a_machines_own_probe_outranks_the_groups_and_commands_need_its_leave() {
    let mut checks = Checks { own: None, exec: false, place: place() };
    assert_eq!(checks.decide(None), None);
    assert_eq!(checks.decide(Some(mesh::Readiness::default())), Some(Readiness::Unchecked));
    let exec = || readiness(Some(told::Check::Exec(told::Exec { command: vec!["/bin/true".into()] })));
    let Some(Readiness::Refused(reason)) = checks.decide(exec()) else { panic!("it would be run") };
    assert!(reason.contains("execProbes"), "{reason}");
    checks.exec = true;
    assert!(matches!(checks.decide(exec()), Some(Readiness::Checked(_))));
    let Some(Readiness::Refused(reason)) = checks.decide(readiness(None)) else { panic!("of a later time") };
    assert!(reason.contains("one that this agent knows"), "{reason}");
    let own = Probe { pace: pace(1, 1), check: Check::Exec(vec!["/bin/false".into()]) };
    let checks = Checks { own: Some(own.clone()), exec: false, place: place() };
    for told in [None, Some(mesh::Readiness::default()), exec()] {
        assert_eq!(checks.decide(told), Some(Readiness::Checked(own.clone())));
    }
}

/// A server on a loopback address that answers each connection in this way.
async fn server<F>(tasks: &TaskTracker, answer: impl Fn(TcpStream) -> F + Send + 'static) -> u16
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let each = tasks.clone();
    tasks.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            each.spawn(answer(stream));
        }
    });
    port
}

/// Reads a request's head, and answers with what is made of it.
async fn serve(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    answer: impl Fn(&str) -> String,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        head.push(byte);
    }
    let answer = answer(&String::from_utf8_lossy(&head));
    // Whoever asks may have heard enough.
    stream.write_all(answer.as_bytes()).await.unwrap_or_default();
    stream.shutdown().await.unwrap_or_default();
}

fn get(port: u16) -> HttpGet {
    HttpGet {
        host: String::new(),
        port,
        path: "/ready?full".parse().unwrap(),
        tls: false,
        headers: Headers::new(),
    }
}

async fn outcome(check: Check, timeout: Duration) -> Outcome {
    once(&place(), &Probe { pace: Pace { timeout, ..pace(1, 1) }, check }).await
}

const LONG: Duration = Duration::from_secs(20);

#[tokio::test]
async fn http_succeeds_from_200_to_399_and_follows_no_redirect() {
    let tasks = TaskTracker::new();
    for (status, good) in
        [(200, true), (204, true), (302, true), (399, true), (199, false), (400, false), (503, false)]
    {
        let text = move |_: &str| {
            format!("HTTP/1.1 {status} x\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n")
        };
        let port = server(&tasks, move |stream| serve(stream, text)).await;
        let found = outcome(Check::Http(get(port)), LONG).await;
        assert_eq!(found.is_ok(), good, "{status}: {found:?}");
        if status == 503 {
            assert_eq!(found.unwrap_err(), format!("GET http://127.0.0.1:{port}/ready?full: status 503"));
        }
    }
}

#[tokio::test]
async fn http_asks_with_its_headers_and_reads_long_and_broken_answers() {
    let tasks = TaskTracker::new();
    let ask = async |answer: fn(&str) -> String, headers: &[(&'static str, &str)]| {
        let mut get = get(server(&tasks, move |stream| serve(stream, answer)).await);
        get.headers.extend(
            headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())),
        );
        outcome(Check::Http(get), LONG).await
    };
    let by_head = |head: &str| {
        let said = ["host: shop.example\r\n", "x-probe: a\r\n", "user-agent: istio-agent/"];
        let good = head.starts_with("GET /ready?full HTTP/1.1\r\n") && said.iter().all(|s| head.contains(s));
        format!("HTTP/1.1 {} x\r\ncontent-length: 0\r\n\r\n", if good { 200 } else { 500 })
    };
    assert_eq!(ask(by_head, &[("host", "shop.example"), ("x-probe", "a")]).await, Ok(()));
    let long = |_: &str| format!("HTTP/1.1 200 x\r\ncontent-length: 300000\r\n\r\n{}", "x".repeat(300_000));
    assert_eq!(ask(long, &[]).await, Ok(()));
    let cut = |_: &str| "HTTP/1.1 200 x\r\ncontent-length: 5\r\n\r\nabc".to_owned();
    assert!(ask(cut, &[]).await.is_err());
    let told = ask(|_| "SSH-2.0-x\r\n".to_owned(), &[]).await.unwrap_err();
    assert!(told.starts_with("GET http://127.0.0.1:"), "{told}");
}

#[tokio::test]
async fn https_takes_any_certificate() {
    let tasks = TaskTracker::new();
    let made = rcgen::generate_simple_self_signed(["elsewhere.example".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(ca::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let port = server(&tasks, move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            serve(stream, |_| "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned()).await;
        }
    })
    .await;
    let tls = |host: &str| Check::Http(HttpGet { tls: true, host: host.to_owned(), ..get(port) });
    assert_eq!(outcome(tls(""), LONG).await, Ok(()));
    assert_eq!(outcome(tls("localhost"), LONG).await, Ok(()));
    let plain = server(&tasks, |stream| serve(stream, |_| String::new())).await;
    let wrong = Check::Http(HttpGet { tls: true, ..get(plain) });
    assert!(outcome(wrong, MS * 300).await.is_err());
}

/// A port where nobody listens.
async fn nobody() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn who_does_not_listen_or_does_not_answer_is_told() {
    let tasks = TaskTracker::new();
    let port = nobody().await;
    let tcp = |host: &str, port| Check::Tcp { host: host.to_owned(), port };
    let grpc = |port| Check::Grpc { port, service: String::new() };
    for check in [tcp("", port), Check::Http(get(port)), grpc(port)] {
        let told = outcome(check, LONG).await.unwrap_err();
        assert!(told.contains("onnection refused") && told.contains(&port.to_string()), "{told}");
    }
    let told = outcome(tcp("no-such-host.invalid", 1), LONG).await.unwrap_err();
    assert!(told.starts_with("connection to no-such-host.invalid:1: "), "{told}");
    let silent = server(&tasks, |mut stream| async move {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap_or_default();
    })
    .await;
    assert_eq!(outcome(tcp("", silent), LONG).await, Ok(()));
    for check in [Check::Http(get(silent)), grpc(silent)] {
        let told = outcome(check, MS * 200).await.unwrap_err();
        assert!(told.contains("no answer within 200ms"), "{told}");
    }
}

#[tokio::test]
async fn a_grpc_server_says_itself_whether_it_serves() {
    let tasks = TaskTracker::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (reporter, service) = tonic_health::server::health_reporter();
    tasks.spawn(Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
    let asked = async |service: &str| outcome(Check::Grpc { port, service: service.to_owned() }, LONG).await;
    assert_eq!(asked("").await, Ok(()));
    let told = asked("pay").await.unwrap_err();
    assert!(told.starts_with(&format!("gRPC health of `pay` at 127.0.0.1:{port}: NotFound")), "{told}");
    reporter.set_service_status("pay", ServingStatus::NotServing).await;
    assert!(asked("pay").await.unwrap_err().ends_with("NOT_SERVING"));
    reporter.set_service_status("pay", ServingStatus::Serving).await;
    assert_eq!(asked("pay").await, Ok(()));
    let http = server(&tasks, |stream| serve(stream, |_| "HTTP/1.1 200 OK\r\n\r\n".to_owned())).await;
    assert!(outcome(Check::Grpc { port: http, service: String::new() }, LONG).await.is_err());
}

fn command(words: &[&str]) -> Check {
    Check::Exec(words.iter().map(|word| (*word).to_owned()).collect())
}

#[tokio::test]
async fn a_command_succeeds_with_0_and_its_first_words_are_told_otherwise() {
    assert_eq!(outcome(command(&["true"]), LONG).await, Ok(()));
    let told = async |words: &[&str]| outcome(command(words), LONG).await.unwrap_err();
    assert_eq!(told(&["false"]).await, "`false`: exit status: 1");
    let failing = ["sh", "-c", "echo to out; echo no database >&2; exit 7"];
    assert!(told(&failing).await.ends_with("exit status: 7: no database\nto out"));
    assert!(told(&["/no/such/program", "-x"]).await.starts_with("`/no/such/program` cannot be run: "));
    assert!(told(&["sh", "-c", "kill -9 $$"]).await.contains("signal: 9"));
    let flood = told(&["sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' x; exit 1"]).await;
    assert!(flood.len() < 400 && flood.ends_with("xxx"), "{flood}");
    let environment = told(&["sh", "-c", "env | grep -v -e ^PATH= -e ^PWD= -e ^_= -e ^SHLVL=; exit 1"]).await;
    assert!(environment.ends_with("exit status: 1"), "nothing of the agent's: {environment}");
    // No shell: what it would make of the words is left alone.
    assert_eq!(outcome(command(&["test", "$HOME", "=", "$HOME"]), LONG).await, Ok(()));
}

/// Whether a process is there and not only its exit code.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid).join("stat"));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
}

async fn gone(pid: &str) {
    let ends = async {
        while runs(pid) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, ends).await.expect("the process ends");
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_killed_with_all_it_has_started() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pids");
    let script = format!("sleep 600 & echo $! $$ > {0}.new; mv {0}.new {0}; wait", file.display());
    let timeout = Duration::from_secs(2);
    let told = outcome(command(&["sh", "-c", &script]), timeout).await.unwrap_err();
    assert!(told.ends_with("no answer within 2s"), "{told}");
    let pids = std::fs::read_to_string(&file).unwrap();
    for pid in pids.split_whitespace() {
        gone(pid).await;
    }
}

#[tokio::test]
async fn what_a_command_leaves_behind_is_killed_at_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pid");
    let script = format!("sleep 600 & echo $! > {}", file.display());
    assert_eq!(outcome(command(&["sh", "-c", &script]), LONG).await, Ok(()));
    gone(std::fs::read_to_string(&file).unwrap().trim()).await;
}

#[tokio::test]
async fn the_latest_probe_counts_and_health_stays_until_it_finds_otherwise() {
    let tasks = TaskTracker::new();
    let (said, readiness) = watch::channel(None);
    let (health, mut found) = watch::channel(None);
    tasks.spawn(async move { match follow(&place(), readiness, &health).await {} });
    let mut becomes = async |healthy: bool| {
        let told = found.wait_for(|h: &Option<Health>| h.as_ref().is_some_and(|h| h.healthy == healthy));
        let told = tokio::time::timeout(LONG, told).await.expect("is told").unwrap();
        told.as_ref().unwrap().reason.clone()
    };
    let quick = Pace { initial_delay: MS, timeout: LONG, period: MS * 5, successes: 2, failures: 2 };
    let tcp = |port| Check::Tcp { host: String::new(), port };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let checked = |check| Some(Readiness::Checked(Probe { pace: quick, check }));
    said.send_replace(checked(tcp(port)));
    becomes(true).await;
    drop(listener);
    assert!(becomes(false).await.contains("onnection refused"));
    said.send_replace(Some(Readiness::Unchecked));
    becomes(true).await;
    said.send_replace(Some(Readiness::Refused("not here".to_owned())));
    assert_eq!(becomes(false).await, "not here");
    said.send_replace(checked(command(&["true"])));
    becomes(true).await;
}

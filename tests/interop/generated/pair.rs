//! Our proxy and a stock Envoy, each with every scenario on a listener of its own.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::ensure;
use futures::{StreamExt, TryStreamExt};
use serde_json::json;
use tempfile::TempDir;
use tests::echo::Echo;
use tests::program::Program;
use tests::workload::{free_block, own_address};
use tests::{PATIENCE, eventually};
use tokio::net::{TcpListener, TcpSocket};

use super::connection::Connection;
use super::request::Request;
use super::resources::{cluster, listener};
use super::scenario::{COPIES, SERVED, SILENT, Scenario};
use crate::alone::{PORT, launch, listens, port};
use crate::oracle::answer_lines;
use crate::scenarios::server::{Book, Server};

/// Scenarios that are asked at the same time.
const AT_ONCE: usize = 8;
/// The name of the request that comes last.
const LAST: &str = "last";
/// Copies come within this time.
const COPIED: Duration = Duration::from_secs(2);
/// Connections that wait for the server that never takes one.
const WAITING: u32 = 4096;

/// A scenario and what is asked of it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) scenario: Scenario,
    pub(crate) requests: Vec<Request>,
}

/// What came of a request: the answer, what the server saw, and the line of the access log.
pub(crate) type Lines = Vec<String>;

/// Asks both proxies everything: for each case and each of its requests, what came from ours and from Envoy.
pub(crate) async fn ask(cases: &[Case]) -> anyhow::Result<Vec<Vec<(Lines, Lines)>>> {
    let scenarios: Vec<&Scenario> = cases.iter().map(|case| &case.scenario).collect();
    let (ours, theirs) = (Seat::start(true, &scenarios).await?, Seat::start(false, &scenarios).await?);
    let books = [ours.copies.clone(), theirs.copies.clone()];
    let (mut ours, mut theirs) = futures::try_join!(ours.ask(cases), theirs.ask(cases))?;
    // copies come when they come
    let same = eventually(COPIED, "both have made the same copies", || async {
        let [ours, theirs] = books.each_ref().map(|book| copies(book).into_keys().collect::<Vec<_>>());
        ensure!(ours == theirs, "{ours:?} {theirs:?}");
        Ok(())
    });
    // where they are not the same, that is a difference of these requests
    same.await.unwrap_or_default();
    for (answers, book) in [&mut ours, &mut theirs].into_iter().zip(books) {
        let copies = copies(&book);
        for (at, answers) in answers.iter_mut().enumerate() {
            for (n, answer) in answers.iter_mut().enumerate() {
                answer.extend(
                    copies.get(&name(at, n)).into_iter().flatten().map(|line| format!("copy: {line}")),
                );
            }
        }
    }
    Ok(ours.into_iter().zip(theirs).map(|(ours, theirs)| ours.into_iter().zip(theirs).collect()).collect())
}

/// What the server of copies saw, by the names of requests: their first lines.
fn copies(book: &Book) -> BTreeMap<String, Vec<String>> {
    let mut copies = BTreeMap::<String, Vec<String>>::new();
    for seen in book.lock().map(|book| book.clone()).unwrap_or_default() {
        copies.entry(seen.case).or_default().extend(seen.lines.into_iter().take(1));
    }
    copies
}

/// One of the two proxies, with servers of its own.
struct Seat {
    copies: Book,
    _copied: Server,
    _silent: TcpListener,
    address: Ipv4Addr,
    program: Program,
    folder: TempDir,
    _servers: Vec<Echo>,
}

impl Seat {
    async fn start(ours: bool, scenarios: &[&Scenario]) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let address = own_address(free_block()?);
        let mut servers = Vec::new();
        let mut clusters = vec![cluster("empty", None)];
        for name in SERVED {
            let server = Echo::start(name).await?;
            clusters.push(cluster(name, Some(server.address)));
            servers.push(server);
        }
        let copies = Book::default();
        let copied = Server::start("copies", &BTreeMap::new(), &copies).await?;
        clusters.push(cluster(COPIES, Some(copied.address)));
        // connections come about, and nobody takes them
        let silent = TcpSocket::new_v4()?;
        silent.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let silent = silent.listen(WAITING)?;
        clusters.push(cluster(SILENT, Some(silent.local_addr()?)));
        // Nobody listens there.
        clusters.push(cluster("closed", Some((address, PORT - 1).into())));
        let listeners = scenarios
            .iter()
            .enumerate()
            .map(|(at, scenario)| listener((address, port(at)?).into(), scenario, folder.path()))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let resources = json!({"listeners": listeners, "clusters": clusters});
        let mut program = launch(ours, folder.path(), &resources)?;
        listens(&mut program, address, scenarios.len()).await?;
        Ok(Self { copies, _copied: copied, _silent: silent, address, program, folder, _servers: servers })
    }

    async fn ask(mut self, cases: &[Case]) -> anyhow::Result<Vec<Vec<Lines>>> {
        let each = cases.iter().enumerate().map(|(at, case)| self.ask_one(at, case));
        let mut answers: Vec<Vec<Lines>> =
            futures::stream::iter(each).buffered(AT_ONCE).try_collect().await?;
        self.program.check()?;
        Connection::new((self.address, PORT).into()).ask(&Request::plain(), LAST).await?;
        let log = eventually(PATIENCE, "the access log is written", || async {
            let log = std::fs::read_to_string(self.folder.path().join("access.log"))?;
            ensure!(log.lines().any(|line| line.starts_with(&format!("{LAST} "))), "{log}");
            Ok(log)
        })
        .await?;
        let logged: BTreeMap<&str, &str> = log.lines().filter_map(|line| line.split_once(' ')).collect();
        for (at, answers) in answers.iter_mut().enumerate() {
            for (n, answer) in answers.iter_mut().enumerate() {
                answer.extend(logged.get(name(at, n).as_str()).map(|line| format!("logged {line}")));
            }
        }
        Ok(answers)
    }

    async fn ask_one(&self, at: usize, case: &Case) -> anyhow::Result<Vec<Lines>> {
        let mut connection = Connection::new((self.address, port(at)?).into());
        let mut answers = Vec::new();
        for (n, request) in case.requests.iter().enumerate() {
            let answer = connection.ask(request, &name(at, n)).await;
            let trailers =
                answer.as_ref().map(|a| a.trailers.keys().map(|name| format!("trailer {name}")).collect());
            let trailers: Lines = trailers.unwrap_or_default();
            // The two listen on different addresses.
            let own = self.address.to_string();
            let lines = answer_lines(answer).into_iter().chain(trailers);
            answers.push(lines.map(|line| line.replace(&own, "OWN")).collect());
        }
        Ok(answers)
    }
}

fn name(case: usize, request: usize) -> String {
    format!("{case}.{request}")
}

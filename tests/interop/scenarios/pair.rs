//! Our proxy and a stock Envoy, each with every scenario on a listener of its own, in front of the same servers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};

use anyhow::ensure;
use futures::{StreamExt, TryStreamExt};
use serde_json::json;
use tempfile::TempDir;
use tests::program::Program;
use tests::workload::{free_block, own_address};
use tests::{PATIENCE, eventually};

use super::client::{self, Told};
use super::resources::resources;
use super::scenario::{Ask, Scenario};
use super::server::{Book, Server, Sighting};
use crate::alone::{PORT, launch, listens, port};

/// Scenarios that are asked at the same time.
const AT_ONCE: usize = 6;
/// What is asked last, so that the log is written.
const LAST: &str = "
- name: last
  routes: [{match: {prefix: /}, direct_response: {status: 204}}]
  asks: [{get: /, shows: '204'}]
";

/// What a proxy did with one ask.
#[derive(Debug, Clone, Default)]
pub(crate) struct Did {
    pub(crate) lines: Vec<String>,
    pub(crate) spread: BTreeMap<String, usize>,
}

/// What both did with the asks of a scenario.
pub(crate) type Both = Vec<(Did, Did)>;

/// The servers of a scenario.
struct Servers {
    book: Book,
    running: BTreeMap<String, Server>,
}

impl Servers {
    async fn start(scenario: &Scenario) -> anyhow::Result<Self> {
        let book = Book::default();
        let mut running = BTreeMap::new();
        for name in scenario.servers()? {
            let server = Server::start(&name, &scenario.bytes, &book).await?;
            running.insert(name, server);
        }
        Ok(Self { book, running })
    }

    fn addresses(&self) -> BTreeMap<String, SocketAddr> {
        self.running.iter().map(|(name, server)| (name.clone(), server.address)).collect()
    }

    fn seen(&self, case: &str) -> Vec<Sighting> {
        let book = self.book.lock().map(|book| book.clone()).unwrap_or_default();
        book.into_iter().filter(|seen| seen.case == case).collect()
    }
}

/// Asks both proxies everything.
pub(crate) async fn ask(scenarios: &[Scenario]) -> anyhow::Result<Vec<Both>> {
    let mut servers = Vec::new();
    for scenario in scenarios {
        servers.push(Servers::start(scenario).await?);
    }
    let last: Vec<Scenario> = serde_saphyr::from_str(LAST)?;
    let ours = Seat::start(true, scenarios, &servers, &last[0]).await?;
    let theirs = Seat::start(false, scenarios, &servers, &last[0]).await?;
    let (ours, theirs) = futures::try_join!(ours.ask(scenarios, &servers), theirs.ask(scenarios, &servers))?;
    Ok(ours.into_iter().zip(theirs).map(|(ours, theirs)| ours.into_iter().zip(theirs).collect()).collect())
}

/// One of the two proxies.
struct Seat {
    /// The first letter of its requests' names.
    letter: char,
    address: Ipv4Addr,
    program: Program,
    folder: TempDir,
}

impl Seat {
    async fn start(
        ours: bool,
        scenarios: &[Scenario],
        servers: &[Servers],
        last: &Scenario,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let address = own_address(free_block()?);
        let (mut listeners, mut clusters) = (Vec::new(), Vec::new());
        let none = Servers { book: Book::default(), running: BTreeMap::new() };
        let all = [last].into_iter().chain(scenarios).zip([&none].into_iter().chain(servers));
        for (at, (scenario, servers)) in all.enumerate() {
            let own = (address, port(at)?).into();
            let (listener, of_it) =
                resources(scenario, &prefix(at), own, &servers.addresses(), folder.path())?;
            listeners.push(listener);
            clusters.extend(of_it);
        }
        let mut program =
            launch(ours, folder.path(), &json!({"listeners": listeners, "clusters": clusters}))?;
        let letter = if ours { 'o' } else { 'e' };
        listens(&mut program, address, scenarios.len() + 1).await?;
        Ok(Self { letter, address, program, folder })
    }

    async fn ask(mut self, scenarios: &[Scenario], servers: &[Servers]) -> anyhow::Result<Vec<Vec<Did>>> {
        let each = scenarios.iter().zip(servers).enumerate();
        let each = each.map(|(at, (scenario, servers))| self.ask_one(at + 1, scenario, servers));
        let told: Vec<Vec<Told>> = futures::stream::iter(each).buffered(AT_ONCE).try_collect().await?;
        self.program.check()?;
        let mut keys = BTreeSet::new();
        for (at, (scenario, told)) in scenarios.iter().zip(&told).enumerate() {
            let with_log = scenario.asks.iter().zip(told).enumerate();
            keys.extend(
                with_log
                    .filter(|(_, (ask, told))| {
                        ask.raw.is_none() && !told.lines.contains(&"silence".to_owned())
                    })
                    .map(|(n, (_, told))| self.key(at + 1, n, told)),
            );
        }
        let log = self.log(&keys).await?;
        let mut did = Vec::new();
        for (at, ((scenario, servers), told)) in scenarios.iter().zip(servers).zip(told).enumerate() {
            let (mut of_it, mut numbers) = (Vec::new(), Vec::new());
            for (n, (ask, told)) in scenario.asks.iter().zip(told).enumerate() {
                let logged = log.get(&self.key(at + 1, n, &told)).cloned().unwrap_or_default();
                let seen = servers.seen(&self.case(at + 1, n));
                let addresses = servers.addresses();
                of_it.push(self.did(at + 1, scenario, ask, told, seen, &logged, &addresses, &mut numbers));
            }
            did.push(of_it);
        }
        Ok(did)
    }

    fn case(&self, at: usize, n: usize) -> String {
        format!("{}.{at}.{n}", self.letter)
    }

    /// The key of a request's lines in the access log.
    fn key(&self, at: usize, n: usize, told: &Told) -> String {
        told.port.map_or_else(|| self.case(at, n), |port| format!("tcp-{}{port}", prefix(at)))
    }

    /// The access log by keys, once it has all of these.
    async fn log(&self, keys: &BTreeSet<String>) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
        let last: Ask = serde_saphyr::from_str("{get: /, shows: ''}")?;
        client::ask(&last, (self.address, PORT).into(), "last").await;
        let read = || {
            let text = std::fs::read_to_string(self.folder.path().join("access.log"))?;
            let mut log = BTreeMap::<String, Vec<String>>::new();
            for line in text.lines() {
                if let Some((key, rest)) = line.split_once('|') {
                    log.entry(key.to_owned()).or_default().push(rest.to_owned());
                }
            }
            anyhow::Ok(log)
        };
        let whole = eventually(PATIENCE, "the access log is written", || async {
            let log = read()?;
            let missing: Vec<_> = keys.iter().filter(|key| !log.contains_key(*key)).collect();
            ensure!(missing.is_empty() && log.contains_key("last"), "no lines of {missing:?}");
            Ok(log)
        });
        // what is missing is a difference like others
        whole.await.or_else(|_| read())
    }

    async fn ask_one(&self, at: usize, scenario: &Scenario, servers: &Servers) -> anyhow::Result<Vec<Told>> {
        let address = (self.address, port(at)?).into();
        let mut all = Vec::new();
        for (n, ask) in scenario.asks.iter().enumerate() {
            let case = self.case(at, n);
            let ask = ask.filled(&prefix(at), &servers.addresses());
            let told = client::ask(&ask, address, &case).await;
            let copies = || servers.seen(&case).iter().filter(|seen| seen.server.starts_with('m')).count();
            let copied = eventually(PATIENCE, "the copies come", || async {
                ensure!(copies() >= ask.copies, "{} copies", copies());
                Ok(())
            });
            // what is missing is a difference like others
            copied.await.unwrap_or_default();
            all.push(told);
        }
        Ok(all)
    }

    #[expect(clippy::too_many_arguments, reason = "everything that is known of one request")]
    fn did(
        &self,
        at: usize,
        scenario: &Scenario,
        ask: &Ask,
        told: Told,
        mut seen: Vec<Sighting>,
        logged: &[String],
        servers: &BTreeMap<String, SocketAddr>,
        numbers: &mut Vec<usize>,
    ) -> Did {
        if ask.until.is_some() {
            return Did { lines: told.lines, spread: BTreeMap::new() };
        }
        let mut lines = Vec::new();
        if ask.times.is_none() {
            // copies come when they come
            seen.sort_by_key(|seen| seen.server.starts_with('m').then(|| seen.server.clone()));
            let mut blocks: Vec<Vec<String>> = Vec::new();
            for seen in seen {
                let mut lines = seen.lines;
                if scenario.connections {
                    // the other proxy has connections, too
                    let number = numbers.iter().position(|known| *known == seen.connection);
                    let number = number.unwrap_or_else(|| {
                        numbers.push(seen.connection);
                        numbers.len() - 1
                    });
                    lines.push(format!("  over connection {}", number + 1));
                }
                blocks.push(lines);
            }
            let mut logged = logged.to_vec();
            if ask.at_once.is_some() {
                blocks.sort();
                logged.sort();
            }
            lines.extend(blocks.into_iter().flatten());
            lines.extend(told.lines);
            lines.extend(logged.iter().flat_map(|line| line.split('|')).map(|part| format!("logged {part}")));
        }
        let own = self.address.to_string();
        for line in &mut lines {
            for (name, address) in servers {
                *line = line.replace(&address.to_string(), &format!("server {name}"));
            }
            *line = line.replace(&own, "OWN").replace(&prefix(at), "");
        }
        let mut spread = told.spread;
        if scenario.any_endpoint {
            in_order_of_appearance(&mut lines, servers.keys());
            let mut counts: Vec<usize> = spread.into_values().collect();
            counts.sort_unstable();
            spread = counts.into_iter().enumerate().map(|(n, count)| (format!("#{n}"), count)).collect();
        }
        Did { lines, spread }
    }
}

/// Tells servers by the order in which they appear.
fn in_order_of_appearance<'a>(lines: &mut [String], names: impl Iterator<Item = &'a String>) {
    let first = |name: &String| lines.iter().position(|line| line.contains(&format!("server {name}")));
    let mut order: Vec<_> = names.filter_map(|name| first(name).map(|at| (at, name))).collect();
    order.sort();
    for (n, (_, name)) in order.into_iter().enumerate() {
        for line in &mut *lines {
            *line = line.replace(&format!("server {name}"), &format!("server #{n}"));
            *line = line.replace(&format!("  {name}'s"), &format!("  #{n}'s"));
        }
    }
}

fn prefix(at: usize) -> String {
    format!("s{at}.")
}

#[test]
fn servers_are_told_by_their_order() {
    let mut lines = ["server b saw GET", "  b's body 0", "body server a"].map(str::to_owned);
    in_order_of_appearance(&mut lines, ["a".to_owned(), "b".to_owned()].iter());
    assert_eq!(lines, ["server #0 saw GET", "  #0's body 0", "body server #1"]);
}

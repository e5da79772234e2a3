//! Asks name servers for addresses and tells how long the answer may be kept, which the system's resolver does not.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

use super::message::{self, Kind, Reply};
use crate::xds::cluster::DnsFamily;

const PORT: u16 = 53;
/// resolv.conf(5): the most that counts of each.
const MOST_SERVERS: usize = 3;
const MOST_DOTS: usize = 15;
const MOST_SECONDS: u64 = 30;
const MOST_ATTEMPTS: u32 = 5;

/// Whom to ask, and for which names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Settings {
    /// Asked one after the other until one knows.
    pub(super) servers: Vec<SocketAddr>,
    /// What short names are completed by.
    search: Vec<String>,
    /// A name with so many dots is asked for as it is, first.
    dots: usize,
    /// How long one server may take.
    timeout: Duration,
    /// How often all are asked.
    attempts: u32,
}

impl Settings {
    /// Reads `resolv.conf(5)`; what it does not say is as there.
    pub(super) fn parse(text: &str) -> Self {
        let mut settings = Self {
            servers: Vec::new(),
            search: Vec::new(),
            dots: 1,
            timeout: Duration::from_secs(5),
            attempts: 2,
        };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") if settings.servers.len() < MOST_SERVERS => {
                    let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                    settings.servers.extend(address.map(|address| SocketAddr::new(address, PORT)));
                }
                Some("search" | "domain") => settings.search = words.map(str::to_owned).collect(),
                Some("options") => words.for_each(|word| settings.option(word)),
                Some(_) | None => {}
            }
        }
        settings
    }

    fn option(&mut self, word: &str) {
        let Some((name, number)) = word.split_once(':') else { return };
        let Ok(number) = number.parse::<u32>() else { return };
        match name {
            "ndots" => self.dots = usize::try_from(number).map_or(MOST_DOTS, |n| n.min(MOST_DOTS)),
            "timeout" => self.timeout = Duration::from_secs(u64::from(number).clamp(1, MOST_SECONDS)),
            "attempts" => self.attempts = number.clamp(1, MOST_ATTEMPTS),
            _ => {}
        }
    }

    /// The names that are asked for in place of one, in order.
    fn names(&self, name: &str) -> Vec<String> {
        if let Some(whole) = name.strip_suffix('.') {
            return vec![whole.to_owned()];
        }
        let mut names: Vec<String> = self.search.iter().map(|domain| format!("{name}.{domain}")).collect();
        let first = name.matches('.').count() >= self.dots;
        names.insert(if first { 0 } else { names.len() }, name.to_owned());
        names
    }
}

/// The addresses of a name in `hosts(5)`.
pub(super) fn in_hosts(text: &str, name: &str) -> Vec<IpAddr> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let of_line = |line: &str| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
    };
    text.lines().filter_map(of_line).collect()
}

/// Addresses, and how long they may be kept if that is known.
pub(super) type Found = (Vec<IpAddr>, Option<Duration>);

/// The addresses of a name; none when the servers know none.
///
/// # Errors
///
/// When no server can say.
pub(super) async fn lookup(settings: &Settings, name: &str, family: DnsFamily) -> io::Result<Found> {
    for name in settings.names(name) {
        let (v4, v6) = match family {
            DnsFamily::V4Only => (ask(settings, &name, Kind::V4).await?, Found::default()),
            DnsFamily::V6Only => (Found::default(), ask(settings, &name, Kind::V6).await?),
            DnsFamily::Auto | DnsFamily::V4Preferred | DnsFamily::All => {
                tokio::try_join!(ask(settings, &name, Kind::V4), ask(settings, &name, Kind::V6))?
            }
        };
        let of = |found: &Found| found.1.filter(|_| !found.0.is_empty());
        let ttl = of(&v4).into_iter().chain(of(&v6)).min();
        let all: Vec<IpAddr> = v4.0.into_iter().chain(v6.0).collect();
        if !all.is_empty() {
            return Ok((all, ttl));
        }
    }
    Ok(Found::default())
}

async fn ask(settings: &Settings, name: &str, kind: Kind) -> io::Result<Found> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no name server is known");
    for _ in 0..settings.attempts {
        for server in &settings.servers {
            // the port is the kernel's by chance, and nobody else's packets are read
            let Some(query) = message::query(fastrand::u16(..), name, kind) else {
                return Ok(Found::default());
            };
            let asked = tokio::time::timeout(settings.timeout, exchange(*server, &query)).await;
            last = match asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(Reply::Addresses(found, ttl)) => return Ok((found, ttl)),
                Ok(Reply::NoSuchName) => return Ok(Found::default()),
                Ok(Reply::Failure(code)) => io::Error::other(format!("{server} answered code {code}")),
                Ok(Reply::Cut) => io::Error::other(format!("{server} cut its answer off, over TCP too")),
                Err(error) => error,
            };
        }
    }
    Err(last)
}

async fn exchange(server: SocketAddr, query: &[u8]) -> io::Result<Reply> {
    let reply = over_udp(server, query).await?;
    if reply == Reply::Cut { over_tcp(server, query).await } else { Ok(reply) }
}

async fn over_udp(server: SocketAddr, query: &[u8]) -> io::Result<Reply> {
    let any: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // what is no reply to this query is somebody's guess
        if let Some(reply) = message::reply(query, buffer.get(..length).unwrap_or_default()) {
            return Ok(reply);
        }
    }
}

async fn over_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Reply> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), query].concat()).await?;
    let mut reply = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut reply).await?;
    message::reply(query, &reply).ok_or_else(|| io::Error::other("not the answer to the query"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_says_whom_to_ask_and_for_what() {
        let text = "# comment\nnameserver 10.0.0.1\nnameserver ::1\nsearch a.b c\noptions ndots:2 timeout:1 attempts:9 x\n";
        let settings = Settings::parse(text);
        assert_eq!(settings.servers, ["10.0.0.1:53", "[::1]:53"].map(|a| a.parse().unwrap()));
        assert_eq!((settings.timeout, settings.attempts), (Duration::from_secs(1), 5));
        assert_eq!(settings.names("x"), ["x.a.b", "x.c", "x"]);
        assert_eq!(settings.names("x.y.z"), ["x.y.z", "x.y.z.a.b", "x.y.z.c"]);
        assert_eq!(settings.names("x.y."), ["x.y"]);
        assert_eq!(Settings::parse("").names("x.y"), ["x.y"]);
    }

    #[test]
    fn hosts_has_every_address_of_a_name() {
        let text = "127.0.0.1 localhost Me\n::1 localhost # Other\nx me\n";
        let all = |name| in_hosts(text, name).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(all("LOCALHOST"), ["127.0.0.1", "::1"]);
        assert_eq!(all("me."), ["127.0.0.1"]);
        assert!(all("other").is_empty());
    }

    fn settings(servers: Vec<SocketAddr>) -> Settings {
        Settings { servers, timeout: Duration::from_secs(60), ..Settings::parse("options attempts:1") }
    }

    /// The records of a reply that has one address, 10.0.0.7, for a second.
    const ONE: [u8; 16] = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 10, 0, 0, 7];

    fn answer(query: &[u8], flags: [u8; 2], records: &[u8]) -> Vec<u8> {
        let mut reply = query[..query.len() - 11].to_vec(); // without EDNS
        (reply[2], reply[3]) = (0x80 | flags[0], flags[1]);
        (reply[7], reply[11]) = (u8::from(!records.is_empty()), 0);
        reply.extend(records);
        reply
    }

    /// A server that answers over UDP by these, one after the other, and over TCP by the last.
    async fn serve(socket: UdpSocket, replies: &[([u8; 2], &[u8])]) {
        let mut buffer = [0; 512];
        for (flags, records) in replies {
            let (n, client) = socket.recv_from(&mut buffer).await.unwrap();
            socket.send_to(b"no reply", client).await.unwrap();
            socket.send_to(&answer(&buffer[..n], *flags, records), client).await.unwrap();
        }
    }

    async fn bound() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    /// Both on one port, which a free one of UDP need not be for TCP.
    async fn bound_for_both() -> (UdpSocket, tokio::net::TcpListener, SocketAddr) {
        loop {
            let (socket, address) = bound().await;
            if let Ok(listener) = tokio::net::TcpListener::bind(address).await {
                return (socket, listener, address);
            }
        }
    }

    #[tokio::test]
    async fn the_next_server_is_asked_when_one_cannot_say() {
        let ((broken, a), (good, b)) = (bound().await, bound().await);
        let settings = settings(vec![a, b]);
        let (found, (), ()) = tokio::join!(
            lookup(&settings, "x.y", DnsFamily::V4Only),
            serve(broken, &[([0, 2], &[])]),
            serve(good, &[([0, 0], &ONE)])
        );
        let expected = ("10.0.0.7".parse().unwrap(), Some(Duration::from_secs(1)));
        assert_eq!(found.unwrap(), (vec![expected.0], expected.1));
    }

    #[tokio::test]
    async fn what_does_not_fit_is_asked_for_over_tcp() {
        let (socket, listener, address) = bound_for_both().await;
        let tcp = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut query = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut query).await.unwrap();
            let reply = answer(&query, [0, 0], &ONE);
            stream.write_u16(u16::try_from(reply.len()).unwrap()).await.unwrap();
            stream.write_all(&reply).await.unwrap();
        };
        let settings = settings(vec![address]);
        let (found, (), ()) =
            tokio::join!(lookup(&settings, "x.y", DnsFamily::V4Only), serve(socket, &[([2, 0], &[])]), tcp);
        assert_eq!(found.unwrap().0.len(), 1);
    }

    #[tokio::test]
    async fn a_name_that_no_server_has_has_no_addresses() {
        let (socket, address) = bound().await;
        let settings = settings(vec![address]);
        let (found, ()) =
            tokio::join!(lookup(&settings, "x.y", DnsFamily::V6Only), serve(socket, &[([0, 3], &[])]));
        assert_eq!(found.unwrap(), Found::default());
    }
}

//! Answers queries over UDP and TCP, and hands on those for names that are not of the mesh.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Dns;
use super::message::{Code, Query};
use super::names::{Found, Table};

/// The largest message (RFC 1035, 4.2.2).
const LARGEST: usize = 65_535;
/// Queries that wait for other servers, and connections, at a time. Full means that queries are not answered, and clients
/// ask again.
const WAITING: usize = 1024;
/// How long another server is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause after a connection could not be accepted, for example because there are too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a connection may say nothing.
const IDLE: Duration = Duration::from_secs(10);

/// A server that has its sockets.
#[derive(Debug)]
pub struct Server {
    udp: Vec<Arc<UdpSocket>>,
    tcp: Vec<TcpListener>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    table: watch::Receiver<Table>,
    upstreams: Vec<SocketAddr>,
    waiting: Arc<Semaphore>,
}

/// How a query came, and goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    Udp,
    Tcp,
}

impl Server {
    /// Binds all addresses. A machine without IPv6 has no address of it.
    ///
    /// # Errors
    ///
    /// An address that cannot be bound.
    pub async fn bind(dns: &Dns, table: watch::Receiver<Table>) -> io::Result<Self> {
        let (mut udp, mut tcp) = (Vec::new(), Vec::new());
        for address in &dns.listen {
            match UdpSocket::bind(address).await {
                Ok(socket) => {
                    let local = socket.local_addr()?;
                    udp.push(Arc::new(socket));
                    tcp.push(TcpListener::bind(local).await?);
                }
                Err(error) if address.is_ipv6() && error.kind() == io::ErrorKind::AddrNotAvailable => {
                    tracing::debug!(%address, "no IPv6 on this machine");
                }
                Err(error) => return Err(error),
            }
        }
        let waiting = Arc::new(Semaphore::new(WAITING));
        let shared = Arc::new(Shared { table, upstreams: dns.upstreams.clone(), waiting });
        Ok(Self { udp, tcp, shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn local(&self) -> Vec<SocketAddr> {
        self.tcp.iter().filter_map(|socket| socket.local_addr().ok()).collect()
    }

    /// Serves until `stop`, on `tasks`.
    pub fn start(self, tasks: &TaskTracker, stop: &CancellationToken) {
        for socket in self.udp {
            let (shared, spawner, stop) = (Arc::clone(&self.shared), tasks.clone(), stop.clone());
            let until = stop.clone();
            tasks.spawn(async move { until.run_until_cancelled(shared.udp(socket, spawner, stop)).await });
        }
        for socket in self.tcp {
            let (shared, spawner, stop) = (Arc::clone(&self.shared), tasks.clone(), stop.clone());
            let until = stop.clone();
            tasks.spawn(async move { until.run_until_cancelled(shared.tcp(socket, spawner, stop)).await });
        }
    }
}

impl Shared {
    async fn udp(self: Arc<Self>, socket: Arc<UdpSocket>, tasks: TaskTracker, stop: CancellationToken) {
        let mut buffer = vec![0; LARGEST];
        loop {
            let (length, client) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                // What an earlier answer met on its way is told here; the next query may come all the same.
                Err(error) => {
                    tracing::debug!(%error, "no query");
                    continue;
                }
            };
            let bytes = buffer.get(..length).unwrap_or_default();
            let query = match self.of_the_mesh(bytes, Over::Udp) {
                Ok(answer) => {
                    reply(&socket, &answer, client).await;
                    continue;
                }
                Err(query) => query,
            };
            let Ok(permit) = Arc::clone(&self.waiting).try_acquire_owned() else { continue };
            let (shared, socket, bytes) = (Arc::clone(&self), Arc::clone(&socket), bytes.to_vec());
            let stop = stop.clone();
            tasks.spawn(async move {
                let _permit = permit;
                if let Some(answer) =
                    stop.run_until_cancelled(shared.elsewhere(&query, &bytes, Over::Udp)).await
                {
                    reply(&socket, &answer, client).await;
                }
            });
        }
    }

    async fn tcp(self: Arc<Self>, socket: TcpListener, tasks: TaskTracker, stop: CancellationToken) {
        loop {
            let stream = match socket.accept().await {
                Ok((stream, _)) => stream,
                // Of one connection, or of too many: the next may be fine.
                Err(error) => {
                    tracing::warn!(%error, "dns connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // An error means that the server has ended, and this with it.
            let Ok(permit) = Arc::clone(&self.waiting).acquire_owned().await else { return };
            let (shared, stop) = (Arc::clone(&self), stop.clone());
            tasks.spawn(async move {
                let _permit = permit;
                if let Some(Err(error)) = stop.run_until_cancelled(shared.converse(stream)).await {
                    tracing::debug!(%error, "dns connection ended");
                }
            });
        }
    }

    async fn converse(&self, mut stream: TcpStream) -> io::Result<()> {
        while let Some(bytes) = tokio::time::timeout(IDLE, read(&mut stream)).await?? {
            let answer = match self.of_the_mesh(&bytes, Over::Tcp) {
                Ok(answer) => answer,
                Err(query) => self.elsewhere(&query, &bytes, Over::Tcp).await,
            };
            tokio::time::timeout(IDLE, write(&mut stream, &answer)).await??;
        }
        Ok(())
    }

    /// The answer to a query for a name of the mesh, or the query; an empty answer is none.
    fn of_the_mesh(&self, bytes: &[u8], over: Over) -> Result<Vec<u8>, Box<Query>> {
        let query = match Query::parse(bytes) {
            Ok(query) => query,
            Err(refused) => return Ok(refused.unwrap_or_default()),
        };
        let table = self.table.borrow();
        match table.find(&query.name) {
            Found::Addresses(addresses) => Ok(query.answer(Code::NoError, addresses, over == Over::Udp)),
            Found::Nothing => Ok(query.answer(Code::NxDomain, &[], over == Over::Udp)),
            Found::Elsewhere => Err(Box::new(query)),
        }
    }

    /// The answer of the first server that has one.
    async fn elsewhere(&self, query: &Query, bytes: &[u8], over: Over) -> Vec<u8> {
        for upstream in &self.upstreams {
            let asking = async {
                match over {
                    Over::Udp => ask_udp(*upstream, bytes).await,
                    Over::Tcp => ask_tcp(*upstream, bytes).await,
                }
            };
            match tokio::time::timeout(PATIENCE, asking).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(error)) => tracing::debug!(%error, %upstream, "no answer"),
                Err(_) => tracing::debug!(%upstream, "no answer in time"),
            }
        }
        query.answer(Code::ServFail, &[], over == Over::Udp)
    }
}

async fn reply(socket: &UdpSocket, answer: &[u8], client: SocketAddr) {
    if !answer.is_empty()
        && let Err(error) = socket.send_to(answer, client).await
    {
        tracing::debug!(%error, %client, "an answer cannot be sent");
    }
}

/// From a port of its own, so that nobody else's answer is taken for this one's.
async fn ask_udp(upstream: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr =
        if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; LARGEST];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = buffer.get(..length).unwrap_or_default();
        if answer.get(..2) == bytes.get(..2) {
            return Ok(answer.to_vec());
        }
    }
}

async fn ask_tcp(upstream: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream).await?;
    write(&mut stream, bytes).await?;
    read(&mut stream).await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// A message with its length in front; `None` at the end of the connection.
async fn read(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = vec![0; length.into()];
    stream.read_exact(&mut bytes).await?;
    Ok(Some(bytes))
}

async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

#[cfg(test)]
mod tests {
    use super::super::message::tests::query;
    use super::super::names::tests::told;
    use super::*;

    /// A server whose answers are its queries, turned into answers: nothing of ours would say that.
    async fn upstream(tasks: &TaskTracker) -> SocketAddr {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = udp.local_addr().unwrap();
        let tcp = TcpListener::bind(address).await.unwrap();
        let answer = |mut query: Vec<u8>| {
            query[2] |= 0x80;
            query
        };
        tasks.spawn(async move {
            let mut buffer = vec![0; LARGEST];
            while let Ok((length, client)) = udp.recv_from(&mut buffer).await {
                udp.send_to(&answer(buffer[..length].to_vec()), client).await.unwrap();
            }
        });
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = tcp.accept().await {
                let asked = read(&mut stream).await.unwrap().unwrap();
                write(&mut stream, &answer(asked)).await.unwrap();
            }
        });
        address
    }

    #[tokio::test]
    async fn names_of_the_mesh_are_answered_and_all_others_handed_on_over_udp_and_tcp() {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let names = watch::Sender::new(Table::new(told(&[("a.default", "10.0.0.1")])));
        let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let upstreams = vec![dead, upstream(&tasks).await];
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        let server = Server::bind(&Dns { listen, upstreams }, names.subscribe()).await.unwrap();
        let address = server.local()[0];
        server.start(&tasks, &stop);

        let address_of = |answer: &[u8]| answer[answer.len() - 4..].to_vec();
        let mesh = query("A.default", 1, None);
        assert_eq!(address_of(&ask_udp(address, &mesh).await.unwrap()), [10, 0, 0, 1]);
        assert_eq!(address_of(&ask_tcp(address, &mesh).await.unwrap()), [10, 0, 0, 1]);
        let nothing = ask_udp(address, &query("b.cluster.local", 1, None)).await.unwrap();
        assert_eq!(nothing[3] & 0xf, Code::NxDomain as u8);
        let other = query("example.com", 1, None);
        for answer in [ask_udp(address, &other).await.unwrap(), ask_tcp(address, &other).await.unwrap()] {
            assert_eq!((answer[2] & 0x80, &answer[3..]), (0x80, &other[3..]), "as the other server said it");
        }
        names.send_replace(Table::new(told(&[("example.com", "10.0.0.2")])));
        assert_eq!(address_of(&ask_udp(address, &other).await.unwrap()), [10, 0, 0, 2]);
        stop.cancel();
    }

    #[tokio::test]
    async fn a_name_that_nobody_can_be_asked_about_is_not_said_to_be_missing() {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let table = watch::Sender::new(Table::default());
        let dns = Dns { listen: vec!["127.0.0.1:0".parse().unwrap()], upstreams: Vec::new() };
        let server = Server::bind(&dns, table.subscribe()).await.unwrap();
        let address = server.local()[0];
        server.start(&tasks, &stop);
        let answer = ask_udp(address, &query("example.com", 1, None)).await.unwrap();
        assert_eq!(answer[3] & 0xf, Code::ServFail as u8);
        stop.cancel();
    }
}

//! DNS as applications see it: queries to a server that does not exist, which the agent of the machine answers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, ensure};
use tests::netns::Machine;
use tests::{PATIENCE, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// Types of records, and the answer that there is no such name.
pub(crate) const A: u16 = 1;
pub(crate) const AAAA: u16 = 28;
pub(crate) const MX: u16 = 15;
const NO_SUCH_NAME: u8 = 3;

/// What the other server answers to every query for an address.
pub(crate) const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
/// An answer over UDP takes no longer than this; then the query is sent again, as resolvers do.
const AGAIN: Duration = Duration::from_millis(500);

/// What came back for a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// These addresses; perhaps none.
    Addresses(Vec<IpAddr>),
    /// There is no such name.
    NoSuchName,
    /// Another code.
    Failed(u8),
}

fn query(name: &str, kind: u16) -> Vec<u8> {
    let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).unwrap_or(0));
        query.extend_from_slice(label.as_bytes());
    }
    query.push(0);
    query.extend([kind, 1].into_iter().flat_map(u16::to_be_bytes));
    query
}

/// Reads an answer whose records follow the question and name it by a pointer.
fn read(query: &[u8], answer: &[u8]) -> anyhow::Result<Answer> {
    let (head, rest) = answer.split_at_checked(12).context("no header")?;
    ensure!(head.first_chunk::<2>() == query.first_chunk::<2>(), "another query's answer");
    match head.get(3).context("no code")? & 0xf {
        0 => {}
        NO_SUCH_NAME => return Ok(Answer::NoSuchName),
        code => return Ok(Answer::Failed(code)),
    }
    let count = head.get(7).copied().context("no count")?;
    let mut records = rest.get(query.len() - 12..).context("no question")?;
    let mut addresses = Vec::new();
    for _ in 0..count {
        let (record, after) = records.split_at_checked(12).context("no record")?;
        let length = usize::from(record.last().copied().context("no length")?);
        let (data, after) = after.split_at_checked(length).context("no data")?;
        if let Ok(octets) = <[u8; 4]>::try_from(data) {
            addresses.push(Ipv4Addr::from(octets).into());
        } else if let Ok(octets) = <[u8; 16]>::try_from(data) {
            addresses.push(Ipv6Addr::from(octets).into());
        }
        records = after;
    }
    Ok(Answer::Addresses(addresses))
}

/// What an application on a machine is answered over UDP, by whoever answers for a server that does not exist.
pub(crate) async fn ask(machine: &Machine, name: &str, kind: u16, v6: bool) -> anyhow::Result<Answer> {
    let server = nowhere(v6);
    eventually(PATIENCE, "a query is answered", || async {
        let any: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let socket = machine.inside(|| {
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })?;
        let socket = tokio::net::UdpSocket::from_std(socket)?;
        socket.connect(server).await?;
        let (query, mut buffer) = (query(name, kind), [0; 512]);
        socket.send(&query).await?;
        let length = tokio::time::timeout(AGAIN, socket.recv(&mut buffer)).await??;
        read(&query, buffer.get(..length).unwrap_or_default())
    })
    .await
}

/// The same over TCP.
pub(crate) async fn ask_tcp(machine: &Machine, name: &str, kind: u16) -> anyhow::Result<Answer> {
    let mut stream = machine.connect(nowhere(false)).await?;
    let query = query(name, kind);
    stream.write_u16(u16::try_from(query.len())?).await?;
    stream.write_all(&query).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    read(&query, &answer)
}

/// A name server of the network that nobody is.
fn nowhere(v6: bool) -> SocketAddr {
    let v4 = IpAddr::from([10, 99, 0, 200]);
    SocketAddr::new(if v6 { Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 200).into() } else { v4 }, 53)
}

/// A DNS server for all names, on a machine; it stops when dropped.
pub(crate) struct Elsewhere {
    _stop: DropGuard,
}

impl Elsewhere {
    pub(crate) fn start(machine: &Machine) -> anyhow::Result<Self> {
        let (udp, tcp) = machine.inside(|| {
            let (udp, tcp) = (UdpSocket::bind("0.0.0.0:53")?, std::net::TcpListener::bind("0.0.0.0:53")?);
            udp.set_nonblocking(true)?;
            tcp.set_nonblocking(true)?;
            Ok((udp, tcp))
        })?;
        let (udp, tcp) = (tokio::net::UdpSocket::from_std(udp)?, tokio::net::TcpListener::from_std(tcp)?);
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let until = stop.clone();
        tasks.spawn(async move {
            let over_udp = async {
                let mut buffer = [0; 512];
                while let Ok((length, client)) = udp.recv_from(&mut buffer).await {
                    let answer = answer(buffer.get(..length).unwrap_or_default());
                    udp.send_to(&answer, client).await.unwrap_or_default();
                }
            };
            let over_tcp = async {
                while let Ok((mut stream, _)) = tcp.accept().await {
                    // Whoever goes away in the middle gets no answer.
                    converse(&mut stream).await.unwrap_or_default();
                }
            };
            tokio::select! {
                () = over_udp => {}
                () = over_tcp => {}
                () = until.cancelled() => {}
            }
        });
        Ok(Self { _stop: stop.drop_guard() })
    }
}

async fn converse(stream: &mut tokio::net::TcpStream) -> anyhow::Result<()> {
    let mut query = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut query).await?;
    let answer = answer(&query);
    stream.write_u16(u16::try_from(answer.len())?).await?;
    Ok(stream.write_all(&answer).await?)
}

/// The same address for every name.
fn answer(query: &[u8]) -> Vec<u8> {
    let mut answer = query.to_vec();
    for (at, byte) in [(2, 0x81), (3, 0x80), (7, 1)] {
        if let Some(place) = answer.get_mut(at) {
            *place = byte;
        }
    }
    answer.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
    answer.extend(ELSEWHERE.octets());
    answer
}

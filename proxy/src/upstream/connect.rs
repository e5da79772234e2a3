//! Makes connections to endpoints: the socket, who called where the endpoint is told, and TLS where it takes it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream, UnixStream};

use super::{Host, Upstream, proxy_protocol};
use crate::listener::connection::Origin;
use crate::tcp::io::{Io, Socket};
use crate::tls::{Connector, Peer};
use crate::xds::cluster::TcpKeepalive;
use crate::xds::decode::Address;
use crate::xds::tls::UpstreamTls;

impl Upstream {
    /// A new connection, with who is at its other end and what names of our own were shown; `origin`: for whom it is.
    pub(super) async fn connect_now(
        &self,
        host: &Host,
        authority: Option<&HeaderValue>,
        origin: Option<&Origin>,
    ) -> std::io::Result<(Io, Option<Peer>, Arc<[String]>)> {
        let (mut socket, ip) = match &host.address {
            Address::Socket(address) => {
                let stream = self.connect_tcp(*address).await?;
                (Socket::tcp(stream), address.ip())
            }
            Address::Pipe(path) => {
                (Socket::unix(UnixStream::connect(path).await?), IpAddr::V4(Ipv4Addr::LOCALHOST))
            }
            Address::Name(name, port) => {
                let stream = TcpStream::connect((&**name, *port)).await?;
                let ip = stream.peer_addr()?.ip();
                (Socket::tcp(stream), ip)
            }
        };
        if let Some(settings) = &host.transport.proxy_protocol {
            let ends = socket.as_tcp().and_then(|s| s.local_addr().ok().zip(s.peer_addr().ok()));
            let header = proxy_protocol::header(settings, origin, ends, &host.endpoint.tlvs);
            socket.write_all(&header).await?;
        }
        let Some(tls) = &host.transport.tls else { return Ok((Io::Plain(socket), None, Arc::default())) };
        let connector = self.connector(tls, authority).map_err(std::io::Error::other)?;
        let (io, peer) = connector.connect(socket, ip).await?;
        Ok((io, Some(peer), connector.own_uris()))
    }

    async fn connect_tcp(&self, address: SocketAddr) -> std::io::Result<TcpStream> {
        let sources = &self.config.source_addresses;
        let fits = sources.iter().find(|source| source.is_ipv4() == address.is_ipv4());
        let stream = match fits.or_else(|| sources.first()) {
            None => TcpStream::connect(address).await?,
            Some(source) => {
                let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
                socket.bind((*source, 0).into())?;
                socket.connect(address).await?
            }
        };
        stream.set_nodelay(true)?;
        if let Some(keepalive) = &self.config.keepalive {
            socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive_of(keepalive))?;
        }
        Ok(stream)
    }

    /// The prepared TLS of an endpoint; made once, unless the server name is the request's.
    fn connector(
        &self,
        tls: &Arc<UpstreamTls>,
        authority: Option<&HeaderValue>,
    ) -> Result<Connector, crate::tls::TlsError> {
        let http = &self.config.http;
        if tls.auto_host_sni || http.auto_sni {
            let name = authority.and_then(|a| a.to_str().ok()).map(crate::router::without_port);
            let check = tls.auto_sni_san || http.auto_san_validation;
            return self.shared.secrets.connector(tls, name, check);
        }
        let mut known = self.connectors.borrow_mut();
        if let Some((_, connector)) = known.iter().find(|(t, _)| Arc::ptr_eq(t, tls)) {
            return Ok(connector.clone());
        }
        let connector = self.shared.secrets.connector(tls, None, tls.auto_sni_san)?;
        known.push((Arc::clone(tls), connector.clone()));
        Ok(connector)
    }
}

fn keepalive_of(config: &TcpKeepalive) -> socket2::TcpKeepalive {
    let mut keepalive = socket2::TcpKeepalive::new();
    keepalive = keepalive.with_time(config.time.unwrap_or(Duration::from_secs(7200)));
    if let Some(interval) = config.interval {
        keepalive = keepalive.with_interval(interval);
    }
    if let Some(probes) = config.probes {
        keepalive = keepalive.with_retries(probes);
    }
    keepalive
}

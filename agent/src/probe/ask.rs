//! Asks the application once, over the network.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hyper::Request;
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{CONNECTION, HOST, HeaderValue, USER_AGENT};
use hyper_util::rt::TokioIo;
use proxy::tls::verify::{Roots, Verifier};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::{HttpGet, Outcome, Place};
use crate::capture::LOOP_BREAKERS;

/// The longest answer that is read, in bytes.
const MOST: usize = 64 * 1024;
/// What probes call themselves.
const AGENT: HeaderValue = HeaderValue::from_static(concat!("istio-agent/", env!("CARGO_PKG_VERSION")));

/// A connection is made.
pub(super) async fn tcp(place: &Place, host: &str, port: u16) -> Outcome {
    let (host, port) = place.target(host, port);
    let made = dial(place, &host, port).await;
    made.map(drop).map_err(|error| format!("connection to {}: {error}", authority(&host, port)))
}

/// A status from 200 to 399 is a success, so a redirect is one, too, and is not followed.
pub(super) async fn http(place: &Place, get: &HttpGet) -> Outcome {
    let (host, port) = place.target(&get.host, get.port);
    let authority = authority(&host, port);
    let url = format!("GET http{}://{authority}{}", if get.tls { "s" } else { "" }, get.path);
    let failed = |error: &dyn std::error::Error| format!("{url}: {}", with_causes(error));
    let stream = dial(place, &host, port).await.map_err(|error| failed(&error))?;
    let status = if get.tls {
        let tls = connector().map_err(|error| failed(&error))?;
        let name = ServerName::try_from(host).map_err(|error| failed(&error))?;
        let stream = tls.connect(name, stream).await.map_err(|error| failed(&error))?;
        exchange(stream, request(get, &authority)).await
    } else {
        exchange(stream, request(get, &authority)).await
    };
    match status.map_err(|error| failed(&error))? {
        200..=399 => Ok(()),
        status => Err(format!("{url}: status {status}")),
    }
}

fn request(get: &HttpGet, authority: &str) -> Request<String> {
    let mut request = Request::new(String::new());
    *request.uri_mut() = get.path.clone().into();
    let headers = request.headers_mut();
    headers.insert(USER_AGENT, AGENT);
    headers.extend(get.headers.clone());
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    if let (false, Ok(authority)) = (headers.contains_key(HOST), HeaderValue::from_str(authority)) {
        headers.insert(HOST, authority);
    }
    request
}

/// The status of the answer, whose body is read so that the application can write it.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<String>,
) -> hyper::Result<u16> {
    let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut asked = std::pin::pin!(async {
        let answer = send.send_request(request).await?;
        let status = answer.status().as_u16();
        read(answer.into_body()).await?;
        Ok(status)
    });
    tokio::select! {
        status = &mut asked => status,
        // All that came is there now.
        _ = connection => asked.await,
    }
}

async fn read(mut body: Incoming) -> hyper::Result<()> {
    let mut length = 0;
    while length <= MOST
        && let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await
    {
        length += frame?.data_ref().map_or(0, Bytes::len);
    }
    Ok(())
}

/// `grpc.health.v1.Health/Check` answers that the service serves.
pub(super) async fn grpc(place: &Place, port: u16, service: &str) -> Outcome {
    let (host, port) = place.target("", port);
    let what = format!("gRPC health of `{service}` at {}", authority(&host, port));
    let endpoint = Endpoint::try_from(format!("http://{}", authority(&host, port)));
    let endpoint = endpoint.map_err(|error| format!("{what}: {}", with_causes(&error)))?;
    let place = place.clone();
    let connector = tower::service_fn(move |_: hyper::Uri| {
        let (place, host) = (place.clone(), host.clone());
        async move { dial(&place, &host, port).await.map(TokioIo::new) }
    });
    let channel = endpoint.connect_with_connector(connector).await;
    let channel = channel.map_err(|error| format!("{what}: {}", with_causes(&error)))?;
    let request = HealthCheckRequest { service: service.to_owned() };
    match HealthClient::new(channel).check(request).await {
        Ok(answer) => match answer.into_inner().status() {
            ServingStatus::Serving => Ok(()),
            status @ (ServingStatus::NotServing | ServingStatus::Unknown | ServingStatus::ServiceUnknown) => {
                Err(format!("{what}: {}", status.as_str_name()))
            }
        },
        Err(status) => Err(format!("{what}: {:?}: {}", status.code(), status.message())),
    }
}

/// Connects. What goes to the workload's own address comes from an address whose calls are not captured, as the proxy's
/// calls of the application do.
async fn dial(place: &Place, host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in tokio::net::lookup_host((host, port)).await? {
        match connect(place, address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn connect(place: &Place, to: SocketAddr) -> io::Result<TcpStream> {
    let (v4, v6) = LOOP_BREAKERS;
    let (socket, breaker) = match to.ip() {
        IpAddr::V4(_) => (TcpSocket::new_v4()?, IpAddr::from(v4)),
        IpAddr::V6(_) => (TcpSocket::new_v6()?, IpAddr::from(v6)),
    };
    if place.captured && to.ip() == place.address {
        // Where nothing is captured yet, the address may not be there.
        if let Err(error) = socket.bind((breaker, 0).into()) {
            tracing::debug!(%error, "the probe may meet the proxy");
        }
    }
    socket.connect(to).await
}

/// TLS as kubelet and Istio probe with it: the certificate may be anybody's.
fn connector() -> Result<TlsConnector, rustls::Error> {
    let builder =
        ClientConfig::builder_with_provider(ca::tls::provider()).with_safe_default_protocol_versions()?;
    let verifier = Verifier::new(Roots::Unverified, Arc::new([]));
    let config =
        builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut told: Vec<String> = causes.map(ToString::to_string).collect();
    told.dedup();
    told.join(": ")
}

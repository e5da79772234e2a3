//! The admin API, over HTTP or HTTPS.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use ca::tls::{
    Anchors, ClientTls, ExpectedIdentities, MinVersion, NameKind, NameMatch, NameMatcher, Own, Trust, Verify,
};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use istiod::api::types::{Page, Problem};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

use crate::cli::Server;
use crate::output::note;

/// A connection is given up after this time without an answer, on top of what a call may wait on purpose.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Identity of the control plane, in whatever trust domain it has.
const CONTROL_PLANE: &str = "spiffe://[^/]+/ns/istio-system/sa/istiod";

/// Characters that need no escape in a path segment (RFC 3986, section 3.3).
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// One control plane.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    base: Uri,
    token: Option<String>,
    tls: Option<Arc<rustls::ClientConfig>>,
}

impl Client {
    /// Reads the token and the CA; connects when first asked.
    ///
    /// # Errors
    ///
    /// A URL, token or CA file that cannot be used.
    pub(crate) fn new(server: &Server) -> anyhow::Result<Self> {
        let base: Uri = server.server.parse().with_context(|| format!("`{}` is not a URL", server.server))?;
        let tls = match base.scheme_str() {
            Some("http") => None,
            Some("https") => Some(tls(server, base.host().unwrap_or_default())?),
            _ => bail!("`{}`: write http://HOST:PORT or https://HOST:PORT", server.server),
        };
        let token = match (&server.token, &server.token_file) {
            (Some(token), _) => Some(token.clone()),
            (None, Some(file)) => Some(
                std::fs::read_to_string(file)
                    .with_context(|| format!("cannot read {}", file.display()))?
                    .trim()
                    .to_owned(),
            ),
            (None, None) => None,
        };
        Ok(Self { base, token, tls })
    }

    /// `GET` of a path below `/api/v1`.
    ///
    /// # Errors
    ///
    /// What the server said, or why it could not be asked.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, None, Duration::ZERO).await
    }

    /// `GET` of all rows of a list.
    ///
    /// # Errors
    ///
    /// As [`Client::get`].
    pub(crate) async fn rows<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<Vec<T>> {
        let page = self.get::<Page<T>>(path).await?;
        if page.metadata.partial {
            note("warning: a member of the control plane did not answer; what it serves is missing");
        }
        Ok(page.items)
    }

    /// `GET` of something the server answers only after up to `patience`.
    ///
    /// # Errors
    ///
    /// As [`Client::get`].
    pub(crate) async fn get_patiently<T: DeserializeOwned>(
        &self,
        path: &str,
        patience: Duration,
    ) -> anyhow::Result<T> {
        self.call(Method::GET, path, None, patience).await
    }

    /// `POST` of a JSON body.
    ///
    /// # Errors
    ///
    /// As [`Client::get`].
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        self.call(Method::POST, path, Some(serde_json::to_vec(body)?), Duration::ZERO).await
    }

    /// `PUT` of a JSON body, answered with nothing.
    ///
    /// # Errors
    ///
    /// As [`Client::get`].
    pub(crate) async fn put(&self, path: &str, body: &impl Serialize) -> anyhow::Result<()> {
        self.call(Method::PUT, path, Some(serde_json::to_vec(body)?), Duration::ZERO).await
    }

    /// `GET` of something large: gives its headers, then each piece as it comes.
    ///
    /// # Errors
    ///
    /// As [`Client::get`]; when nothing comes for a while; what `head` and `take` say.
    pub(crate) async fn download(
        &self,
        path: &str,
        head: impl FnOnce(&http::HeaderMap) -> anyhow::Result<()>,
        mut take: impl FnMut(&Bytes) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let patient = TIMEOUT * 5;
        let late = |_| anyhow!("no answer from {} within {patient:?}", self.base);
        let request = self.request(Method::GET, path, Vec::new())?;
        let stream = tokio::time::timeout(TIMEOUT, self.connect()).await.map_err(late)??;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let exchange = async {
            let response =
                tokio::time::timeout(patient, sender.send_request(request)).await.map_err(late)??;
            let (parts, mut body) = response.into_parts();
            if !parts.status.is_success() {
                return Err(refusal(parts.status, &body.collect().await?.to_bytes()));
            }
            head(&parts.headers)?;
            while let Some(frame) = tokio::time::timeout(patient, body.frame()).await.map_err(late)? {
                if let Ok(piece) = frame?.into_data() {
                    take(&piece)?;
                }
            }
            Ok(())
        };
        let drive = async {
            connection.await.unwrap_or_default();
            std::future::pending().await
        };
        tokio::select! {
            done = exchange => done,
            never = drive => never,
        }
    }

    /// `DELETE`.
    ///
    /// # Errors
    ///
    /// As [`Client::get`].
    pub(crate) async fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::DELETE, path, None, Duration::ZERO).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        patience: Duration,
    ) -> anyhow::Result<T> {
        let exchange = self.exchange(method, path, body.unwrap_or_default());
        let (status, body) = tokio::time::timeout(TIMEOUT + patience, exchange)
            .await
            .map_err(|_| anyhow!("no answer from {} within {:?}", self.base, TIMEOUT + patience))??;
        if status.is_success() {
            let body: &[u8] = if body.is_empty() { b"null" } else { &body };
            return serde_json::from_slice(body)
                .with_context(|| format!("{} answered something else than expected", self.base));
        }
        Err(refusal(status, &body))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let request = self.request(method, path, body)?;
        send(TokioIo::new(self.connect().await?), request).await
    }

    fn host(&self) -> anyhow::Result<&str> {
        self.base.host().context("the URL has no host")
    }

    fn request(&self, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<Request<Full<Bytes>>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("/api/v1{path}"))
            .header("host", self.base.authority().map_or(self.host()?, |a| a.as_str()))
            .header("content-type", "application/json");
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        Ok(request.body(Full::new(Bytes::from(body)))?)
    }

    async fn connect(&self) -> anyhow::Result<Box<dyn Io>> {
        let host = self.host()?;
        let port = self.base.port_u16().unwrap_or(if self.tls.is_some() { 443 } else { 80 });
        let tcp = TcpStream::connect((host.trim_matches(['[', ']']), port)).await.with_context(|| {
            format!(
                "cannot reach the control plane at {}; is it running, and is ISTIOCTL_SERVER right?",
                self.base
            )
        })?;
        tcp.set_nodelay(true)?;
        let Some(config) = &self.tls else { return Ok(Box::new(tcp)) };
        let name = ServerName::try_from(host.to_owned())?;
        Ok(Box::new(tokio_rustls::TlsConnector::from(config.clone()).connect(name, tcp).await?))
    }
}

/// A connection, with TLS or without.
trait Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}

impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Io for T {}

/// A string as one segment of a path.
pub(crate) fn segment(text: &str) -> String {
    utf8_percent_encode(text, SEGMENT).to_string()
}

async fn send<IO>(io: IO, request: Request<Full<Bytes>>) -> anyhow::Result<(StatusCode, Bytes)>
where
    IO: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        Ok::<_, hyper::Error>((status, response.into_body().collect().await?.to_bytes()))
    };
    // The exchange ends with the connection's error, when it has one; so the connection's own end decides nothing.
    let drive = async {
        connection.await.unwrap_or_default();
        std::future::pending().await
    };
    tokio::select! {
        answer = exchange => Ok(answer?),
        never = drive => never,
    }
}

/// TLS towards a member: it shows the control plane's SPIFFE identity and no host name; what stands in front of
/// members may show the host's.
fn tls(server: &Server, host: &str) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let file =
        server.ca.as_ref().context("https needs --ca FILE (ISTIOCTL_CA) with the certificate to trust")?;
    let pem = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let roots = Anchors::from_pem(&pem).with_context(|| format!("{} has no certificates", file.display()))?;
    let control_plane = NameMatcher {
        kind: NameKind::Uri,
        rule: NameMatch::regex(CONTROL_PLANE).context("the pattern of the control plane's identity")?,
        ignore_case: false,
    };
    let expected = ExpectedIdentities::Names(vec![control_plane, NameMatcher::dns(host)]);
    let verify = Verify::Peer { trust: Trust::Fixed(Arc::new(roots)), expected };
    let client = ClientTls { own: Own::Nothing, verify, alpn: Vec::new(), min_version: MinVersion::Tls12 };
    Ok(client.build()?)
}

/// What the server refused, with each mistake on a line of its own.
fn refusal(status: StatusCode, body: &[u8]) -> anyhow::Error {
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) if !problem.errors.is_empty() => {
            let errors: Vec<_> = problem.errors.iter().map(ToString::to_string).collect();
            anyhow!("{}\n{}", problem.detail, errors.join("\n"))
        }
        Ok(problem) => anyhow!("{}", problem.detail),
        Err(_) => anyhow!("{status}: {}", String::from_utf8_lossy(body).trim()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_lists_every_mistake() {
        let body = br#"{"type":"about:blank","title":"x","status":422,"detail":"2 mistakes","errors":[{"detail":"no","file":"a","line":1,"column":2},{"detail":"no","file":"b","field":"spec.c"}]}"#;
        assert_eq!(
            refusal(StatusCode::UNPROCESSABLE_ENTITY, body).to_string(),
            "2 mistakes\na:1:2: no\nb: spec.c: no"
        );
        assert_eq!(refusal(StatusCode::BAD_GATEWAY, b"oops ").to_string(), "502 Bad Gateway: oops");
    }

    #[test]
    fn segments_are_escaped() {
        assert_eq!(segment("sidecar~1.2.3.4~a.b~c/d"), "sidecar~1.2.3.4~a.b~c%2Fd");
    }
}

//! The PROXY protocol as servers get it.

use std::sync::{Arc, OnceLock};

use rustls::ServerConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

/// How a header of version 2 begins.
const BINARY: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// What is told of a connection that is the proxy's own.
pub(super) const OWN: &str = "of nobody";

/// Whether these are the first bytes of a header.
pub(super) fn begins(first: [u8; 3]) -> bool {
    first == *b"PRO" || BINARY.starts_with(&first)
}

/// Takes a header from the start of a connection, and tells what it says.
pub(super) async fn take(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut header = Vec::new();
    if stream.read_u8().await? == b'P' {
        header.push(b'P');
        while !header.ends_with(b"\n") {
            header.push(stream.read_u8().await?);
        }
        let ends = (stream.peer_addr()?, stream.local_addr()?);
        let (ips, ports) = ((ends.0.ip(), ends.1.ip()), (ends.0.port(), ends.1.port()));
        let own = format!("PROXY TCP4 {} {} {} {}\r\n", ips.0, ips.1, ports.0, ports.1);
        return Ok(if header == own.as_bytes() { OWN.to_owned() } else { header.escape_ascii().to_string() });
    }
    header.resize(15, 0);
    stream.read_exact(&mut header).await?;
    let mut rest = vec![0; usize::from(u16::from_be_bytes([header[13], header[14]]))];
    stream.read_exact(&mut rest).await?;
    let (command, family) = (header[11], header[12]);
    if (command, family, rest.is_empty()) == (0x20, 0, true) {
        return Ok(OWN.to_owned());
    }
    Ok(format!("version 2 {command:x} {family:x} {}", rest.escape_ascii()))
}

/// Answers under TLS with what came before it and in it.
pub(super) async fn secure(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    let told = take(&mut stream).await?;
    let mut stream = TlsAcceptor::from(config().clone()).accept(stream).await?;
    let mut got = Vec::new();
    stream.read_buf(&mut got).await?;
    let answer = format!("server {name} got {} told {told}", got.escape_ascii());
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

fn config() -> &'static Arc<ServerConfig> {
    static CONFIG: OnceLock<Arc<ServerConfig>> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let own = rcgen::generate_simple_self_signed(["s.example".to_owned()]).expect("a certificate");
        let key = own.signing_key.serialize_der().try_into().expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.expect("versions").with_no_client_auth();
        Arc::new(config.with_single_cert(vec![own.cert.der().clone()], key).expect("a pair"))
    })
}

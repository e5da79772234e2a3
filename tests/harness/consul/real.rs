//! A real Consul server in development mode, as `tests/run` installs it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use crate::program::Program;
use crate::workload::free_port;
use crate::{PATIENCE, eventually, peers};
use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use registry::source::consul::client::{Client, Credentials, Server, TlsFiles};

/// A server in development mode; it is killed when dropped.
#[derive(Debug)]
pub struct Consul {
    /// Where it listens.
    pub address: SocketAddr,
    _program: Program,
}

impl Consul {
    /// Starts one on loopback ports of its own, with a data folder of its own.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn start(folder: &Path) -> anyhow::Result<Self> {
        let http = free_port()?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, http));
        Self::launch(
            folder,
            address,
            serde_json::json!({"ports": {"http": http, "https": -1}}),
            client(address, "")?,
        )
        .await
    }

    /// Starts one that speaks TLS with clients that show a certificate, and denies everything without a token.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn secured(folder: &Path) -> anyhow::Result<(Self, Secured)> {
        let secured = Secured::new(folder)?;
        let https = free_port()?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, https));
        let [ca, cert, key] =
            ["ca.pem", "cert.pem", "key.pem"].map(|name| folder.join(name).display().to_string());
        let config = serde_json::json!({
            "ports": {"http": -1, "https": https},
            "ca_file": ca, "cert_file": cert, "key_file": key, "verify_incoming": true, "verify_outgoing": true,
            "acl": {"enabled": true, "default_policy": "deny", "tokens": {"master": Secured::TOKEN}},
        });
        let client = secured.client(address)?;
        Ok((Self::launch(folder, address, config, client).await?, secured))
    }

    async fn launch(
        folder: &Path,
        address: SocketAddr,
        mut settings: serde_json::Value,
        client: Client,
    ) -> anyhow::Result<Self> {
        let program = peers::find("consul/consul")?;
        let config = folder.join("consul.json");
        for name in ["server", "serf_lan", "serf_wan"] {
            settings["ports"][name] = free_port()?.into();
        }
        settings["ports"]["dns"] = (-1).into();
        settings["ports"]["grpc"] = (-1).into();
        std::fs::write(&config, settings.to_string())?;
        let args =
            ["agent", "-dev", "-bind=127.0.0.1", "-client=127.0.0.1", "-log-level=warn", "-node=server-1"];
        let mut args = args.map(str::to_owned).to_vec();
        args.push(format!("-config-file={}", config.display()));
        let program = Program::start(&program, folder, "consul", &args)?;
        eventually(PATIENCE, "consul has a leader and is in its own catalog", || async {
            let answer = client.get(0, "/v1/catalog/services").await?;
            let listed = String::from_utf8_lossy(&answer.body).contains("\"consul\"");
            anyhow::ensure!(answer.status == 200 && listed, "{}", answer.reason());
            Ok(())
        })
        .await
        .with_context(|| program.output())?;
        Ok(Self { address, _program: program })
    }
}

/// What a client of a secured server needs.
#[derive(Debug)]
pub struct Secured {
    /// File with the token that may do everything.
    pub token: std::path::PathBuf,
    /// Authority, certificate and key.
    pub tls: TlsFiles,
}

impl Secured {
    pub(super) const TOKEN: &str = "b1gs33cr3t-1111-2222-3333-444444444444";

    /// A new authority, and one certificate for servers and clients.
    ///
    /// # Errors
    ///
    /// When the files cannot be written.
    pub fn new(folder: &Path) -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let root = params.self_signed(&key)?;
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate()?;
        let names = ["server.dc1.consul", "server.dc2.consul", "localhost"];
        let mut params = CertificateParams::new(names.map(str::to_owned).to_vec())?;
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&key, &issuer)?;
        let files = [("ca.pem", root.pem()), ("cert.pem", leaf.pem()), ("key.pem", key.serialize_pem())];
        for (name, text) in files.into_iter().chain([("token", Self::TOKEN.to_owned())]) {
            std::fs::write(folder.join(name), text)?;
        }
        let tls = TlsFiles {
            ca: folder.join("ca.pem"),
            identity: Some((folder.join("cert.pem"), folder.join("key.pem"))),
            server_name: Some("server.dc1.consul".to_owned()),
        };
        Ok(Self { token: folder.join("token"), tls })
    }

    /// A client of the server, over HTTP/2.
    ///
    /// # Errors
    ///
    /// When the files cannot be read.
    pub fn client(&self, address: SocketAddr) -> anyhow::Result<Client> {
        let server = Server { host: address.ip().to_string(), port: address.port() };
        let credentials =
            Credentials::read(Some(&self.token), Some(&self.tls)).map_err(anyhow::Error::msg)?;
        Client::new(&[server], Some(&self.tls), &credentials).map_err(anyhow::Error::msg)
    }
}

/// A client of one server.
///
/// # Errors
///
/// When the token is none.
pub fn client(address: SocketAddr, token: &str) -> anyhow::Result<Client> {
    let server = Server { host: address.ip().to_string(), port: address.port() };
    Client::new(&[server], None, &Credentials::token(token)).map_err(anyhow::Error::msg)
}

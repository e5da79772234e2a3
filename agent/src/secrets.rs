//! The certificate for a stock Envoy: Envoy's secret discovery service on a Unix socket.
//!
//! Secret `default` is the certificate with its key, `ROOTCA` the trust bundle, as with Istio's agent. Each renewal is
//! pushed on the open streams.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;

use anyhow::Context;
use ca::client::Identity;
use ca::tls::IdentityWatch;
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate, secret,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_server::{
    SecretDiscoveryService, SecretDiscoveryServiceServer,
};
use futures::{Stream, StreamExt};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// Name of the secret with certificate and key.
const CERTIFICATE: &str = "default";
/// Name of the secret with the trust bundle.
const ROOTS: &str = "ROOTCA";
/// Type of what is served.
const SECRET_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// Serves secrets on the socket until `stop`.
///
/// # Errors
///
/// When the socket cannot be made.
pub async fn serve(socket: &Path, identity: IdentityWatch, stop: CancellationToken) -> anyhow::Result<()> {
    // What an earlier run left behind would keep the name taken.
    if socket.exists() {
        std::fs::remove_file(socket).with_context(|| format!("cannot replace {}", socket.display()))?;
    }
    let listener =
        UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    tonic::transport::Server::builder()
        .add_service(SecretDiscoveryServiceServer::new(Secrets { identity, stop: stop.clone() }))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
        .await?;
    std::fs::remove_file(socket).with_context(|| format!("cannot remove {}", socket.display()))
}

struct Secrets {
    identity: IdentityWatch,
    stop: CancellationToken,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SecretDiscoveryService for Secrets {
    type StreamSecretsStream = Responses<DiscoveryResponse>;
    type DeltaSecretsStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let conversation = Conversation {
            requests: request.into_inner(),
            identity: self.identity.clone(),
            names: Vec::new(),
            sent: 0,
        };
        let answers = futures::stream::unfold(conversation, Conversation::next);
        Ok(Response::new(Box::pin(answers.take_until(self.stop.clone().cancelled_owned()))))
    }

    async fn delta_secrets(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Err(Status::unimplemented(
            "secrets are served state-of-the-world; set api_type: GRPC in the sds_config",
        ))
    }

    async fn fetch_secrets(
        &self,
        request: Request<DiscoveryRequest>,
    ) -> Result<Response<DiscoveryResponse>, Status> {
        let identity = self.identity.borrow().clone();
        Ok(Response::new(answer(&identity, &request.into_inner().resource_names, 1)))
    }
}

/// One stream: what was asked for, and how often it was answered.
struct Conversation {
    requests: Streaming<DiscoveryRequest>,
    identity: IdentityWatch,
    names: Vec<String>,
    sent: u64,
}

impl Conversation {
    /// Waits for a question or for a new identity, whichever comes first, and answers it.
    async fn next(mut self) -> Option<(Result<DiscoveryResponse, Status>, Self)> {
        loop {
            tokio::select! {
                request = self.requests.message() => {
                    let request = request.ok()??;
                    if let Some(error) = &request.error_detail {
                        tracing::warn!(error = %error.message, "envoy refused a secret");
                    }
                    // The same names again are an acknowledgement of what was sent.
                    if request.resource_names == self.names && !request.response_nonce.is_empty() {
                        continue;
                    }
                    self.names = request.resource_names;
                }
                changed = self.identity.changed() => changed.ok()?,
            }
            if self.names.is_empty() {
                continue;
            }
            self.sent += 1;
            let identity = self.identity.borrow_and_update().clone();
            return Some((Ok(answer(&identity, &self.names, self.sent)), self));
        }
    }
}

/// The secrets that are known among `names`.
fn answer(identity: &Identity, names: &[String], count: u64) -> DiscoveryResponse {
    let resources = names
        .iter()
        .filter_map(|name| secret_named(identity, name))
        .map(|s| wire::canonical::any(&s))
        .collect();
    let version = identity.not_after.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    DiscoveryResponse {
        version_info: version.to_string(),
        resources,
        type_url: SECRET_URL.to_owned(),
        nonce: count.to_string(),
        ..DiscoveryResponse::default()
    }
}

fn secret_named(identity: &Identity, name: &str) -> Option<Secret> {
    let kind = match name {
        CERTIFICATE => secret::Type::TlsCertificate(TlsCertificate {
            certificate_chain: Some(inline(identity.chain_pem().into_bytes())),
            private_key: Some(inline(identity.key.to_pem().as_bytes().to_vec())),
            ..TlsCertificate::default()
        }),
        ROOTS => secret::Type::ValidationContext(CertificateValidationContext {
            trusted_ca: Some(inline(identity.roots_pem().into_bytes())),
            ..CertificateValidationContext::default()
        }),
        _ => return None,
    };
    Some(Secret { name: name.to_owned(), r#type: Some(kind) })
}

fn inline(bytes: Vec<u8>) -> DataSource {
    DataSource { specifier: Some(Specifier::InlineBytes(bytes)), ..DataSource::default() }
}

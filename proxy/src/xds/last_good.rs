//! The configuration that was taken last, on disk, so that a proxy that starts while no control plane answers serves as
//! it did before.
//!
//! It is kept as the responses that bring it, and taken as any response is; what a control plane sends afterwards is what
//! differs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ca::keystore::{KeyStore, KeyStoreError};
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use prost::{DecodeError, Message as _};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::client::Response;
use super::decode::Kind;
use super::transport::Status;
use crate::tables::{Held, TableStore, Tables};

/// Its file in the key store.
const FILE: &str = "configuration";
/// How long changes are gathered before they are written.
const GATHER: Duration = Duration::from_secs(1);
/// Writing takes at most one part in so many of the time, however large the configuration and however often it changes.
const SHARE: u32 = 20;

/// Where the last good configuration is kept, and until when.
#[derive(Debug, Clone)]
pub struct LastGood {
    /// Where; it should be sealed, since it tells the mesh.
    pub store: KeyStore,
    /// What is taken afterwards is not kept: when the workload leaves the mesh, the control plane takes away what it
    /// serves with, and the next start needs just that.
    pub until: CancellationToken,
}

impl LastGood {
    /// Forgets what is kept, because it was told to somebody else.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub fn forget(store: &KeyStore) -> Result<(), KeyStoreError> {
        store.remove(FILE)
    }

    /// The responses that bring what is kept. What cannot be used counts for nothing.
    pub(crate) async fn responses(&self) -> Vec<Response> {
        let store = self.store.clone();
        let loaded = tokio::task::spawn_blocking(move || store.load(FILE)).await;
        let told = match loaded {
            Ok(Ok(None)) => return Vec::new(),
            Ok(Ok(Some(bytes))) => match decode(&bytes) {
                Ok(responses) => return responses,
                Err(error) => error.to_string(),
            },
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(error = told, "the last good configuration cannot be used, going on without");
        Vec::new()
    }

    /// Writes what changes, once all is there that was asked for at the start, until `stop`.
    pub(crate) async fn keep(
        self,
        tables: Arc<TableStore>,
        mut status: watch::Receiver<Status>,
        stop: CancellationToken,
    ) {
        let until = self.until.clone();
        let keeping = async {
            let mut changes = tables.watch();
            // An error means that the proxy has ended, and this with it.
            if status.wait_for(|status| status.initialized).await.is_err() {
                return;
            }
            let mut pause = GATHER;
            loop {
                tokio::time::sleep(pause).await;
                let generation = *changes.borrow_and_update();
                let begun = Instant::now();
                let bytes = encode(&tables.load(), status.borrow().revision);
                self.write(bytes, generation).await;
                pause = GATHER.max(begun.elapsed() * SHARE);
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = until.cancelled() => {}
            () = keeping => {}
        }
    }

    async fn write(&self, bytes: Vec<u8>, generation: u64) {
        let (store, length) = (self.store.clone(), bytes.len());
        let written = tokio::task::spawn_blocking(move || store.store(FILE, &bytes)).await;
        match written.map_err(|e| e.to_string()).and_then(|written| written.map_err(|e| e.to_string())) {
            Ok(()) => tracing::debug!(generation, bytes = length, "configuration kept"),
            Err(error) => {
                tracing::warn!(%error, "the configuration is in use, and not kept for the next start")
            }
        }
    }
}

/// The revision that responses are of.
pub(crate) fn revision(responses: &[Response]) -> Option<u64> {
    responses.iter().filter_map(|response| response.version().parse().ok()).max()
}

/// One response for each type, each with its length in front.
fn encode(tables: &Tables, revision: Option<u64>) -> Vec<u8> {
    let known = &tables.known;
    let mut all = Vec::new();
    for kind in Kind::SUBSCRIBED {
        let head = DeltaDiscoveryResponse {
            type_url: kind.url().into(),
            system_version_info: revision.map(|revision| revision.to_string()).unwrap_or_default(),
            removed_resources: known.absent(kind).map(|name| name.to_string()).collect(),
            ..DeltaDiscoveryResponse::default()
        };
        let mut body = head.encode_to_vec();
        match kind {
            Kind::Cluster => add(&mut body, &known.clusters),
            Kind::Endpoints => add(&mut body, &known.endpoints),
            Kind::Listener => add(&mut body, &known.listeners),
            Kind::Routes => add(&mut body, &known.routes),
            Kind::Secret => {}
        }
        // A vector takes all that is put into it.
        prost::encode_length_delimiter(body.len(), &mut all).unwrap_or_default();
        all.append(&mut body);
    }
    all
}

/// Messages one after the other are one message with the resources of all of them: so no more than one is copied at a
/// time.
fn add<T>(body: &mut Vec<u8>, held: &BTreeMap<Arc<str>, Held<T>>) {
    for (name, held) in held.iter().filter(|(_, held)| !held.is_static) {
        let resource = Resource {
            name: name.to_string(),
            version: held.version.to_string(),
            resource: Some((*held.raw).clone()),
            ..Resource::default()
        };
        let one = DeltaDiscoveryResponse { resources: vec![resource], ..DeltaDiscoveryResponse::default() };
        one.encode(body).unwrap_or_default();
    }
}

fn decode(mut bytes: &[u8]) -> Result<Vec<Response>, DecodeError> {
    let mut responses = Vec::new();
    while !bytes.is_empty() {
        let response = DeltaDiscoveryResponse::decode_length_delimited(&mut bytes)?;
        responses.push(Response::Delta(Box::new(response)));
    }
    Ok(responses)
}

#[cfg(test)]
mod tests;

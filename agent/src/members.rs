//! The members of the control plane, as this agent knows them: told by the join token at first, then by any member,
//! and kept on disk for the next start. Everything that calls the control plane reads the list here, in the order in
//! which this agent prefers them.

use ca::keystore::KeyStore;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use wire::members::{is_address, order};
use wire::mesh::WatchMembersRequest;

use crate::control_plane::{Client, ControlPlane, Listener};

/// File of the key store with the last list that a member told.
const FILE: &str = "members.json";

/// The list of members, and where it is kept.
#[derive(Debug)]
pub struct Followed {
    node: String,
    /// What this agent was set up with; the last resort.
    first: Vec<String>,
    list: watch::Sender<Vec<String>>,
    store: KeyStore,
}

impl Followed {
    /// A list as it was given to this agent (`host:port`). `node` is what the order of preference depends on.
    #[must_use]
    pub fn told(node: &str, first: Vec<String>, store: KeyStore) -> Self {
        let list = watch::Sender::new(preferred(node, &[], &first));
        Self { node: node.to_owned(), first, list, store }
    }

    /// The list that a member told last, and behind it what this agent was set up with.
    ///
    /// # Errors
    ///
    /// When the disk cannot be read; a file that is damaged counts for nothing.
    pub fn remembered(node: &str, first: Vec<String>, store: KeyStore) -> anyhow::Result<Self> {
        let last = match store.load(FILE)? {
            None => Vec::new(),
            Some(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(%error, file = FILE, "the list of members is damaged, going on without");
                Vec::new()
            }),
        };
        let followed = Self::told(node, first, store);
        followed.list.send_replace(preferred(node, &last, &followed.first));
        Ok(followed)
    }

    /// The members, always the latest, the preferred one first.
    #[must_use]
    pub fn list(&self) -> watch::Receiver<Vec<String>> {
        self.list.subscribe()
    }

    /// Asks one member after the other who the members are, and listens to it for as long as it answers; until `stop`.
    pub async fn follow(self, control_plane: ControlPlane, stop: CancellationToken) {
        control_plane.follow(&self, &stop).await;
    }

    async fn on_members(&self, mut told: Vec<String>) {
        told.retain(|address| is_address(address));
        let list = preferred(&self.node, &told, &self.first);
        let changed = self.list.send_if_modified(|held| {
            let differs = !told.is_empty() && *held != list;
            if differs {
                held.clone_from(&list);
            }
            differs
        });
        if !changed {
            return;
        }
        tracing::info!(members = told.join(","), "the control plane tells its members");
        let (store, text) = (self.store.clone(), serde_json::to_vec(&told).unwrap_or_default());
        let stored = tokio::task::spawn_blocking(move || store.store(FILE, &text)).await;
        if !matches!(stored, Ok(Ok(()))) {
            tracing::warn!(file = FILE, "the list of members is known now, but not after a restart");
        }
    }
}

impl Listener for Followed {
    fn what(&self) -> &'static str {
        "members of the control plane"
    }

    async fn listen(&self, mut client: Client, heard: &mut bool) -> Result<(), Status> {
        let mut members = client.watch_members(WatchMembersRequest {}).await?.into_inner();
        while let Some(told) = members.message().await? {
            *heard = true;
            self.on_members(told.addresses).await;
        }
        Ok(())
    }
}

/// What was told in the order of preference, then what was given at first.
fn preferred(node: &str, told: &[String], first: &[String]) -> Vec<String> {
    let of = |list: &[String]| -> Vec<String> {
        order(node, list.iter().map(String::as_str)).into_iter().map(str::to_owned).collect()
    };
    let mut list = of(told);
    let rest = of(first).into_iter().filter(|address| !told.contains(address));
    list.extend(rest);
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(addresses: &[&str]) -> Vec<String> {
        addresses.iter().map(|a| (*a).to_owned()).collect()
    }

    #[tokio::test]
    async fn the_last_list_is_there_at_the_next_start_and_what_was_given_is_the_last_resort() {
        let folder = tempfile::tempdir().unwrap();
        let store = || KeyStore::open(folder.path()).unwrap();
        let first = list(&["istiod.example.com:15012"]);
        let followed = Followed::told("a", first.clone(), store());
        assert_eq!(*followed.list().borrow(), first);
        let told = list(&["10.0.0.1:15012", "10.0.0.2:15012", "no address"]);
        followed.on_members(told.clone()).await;
        let known = followed.list().borrow().clone();
        assert_eq!(known.len(), 3);
        assert_eq!(known[2], first[0]);
        followed.on_members(Vec::new()).await;
        assert_eq!(*followed.list().borrow(), known, "an empty list says nothing");

        let again = Followed::remembered("a", first.clone(), store()).unwrap();
        assert_eq!(*again.list().borrow(), known);
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert_eq!(*Followed::remembered("a", first.clone(), store()).unwrap().list().borrow(), first);
    }

    #[test]
    fn agents_prefer_different_members() {
        let members = list(&["a:1", "b:1", "c:1"]);
        let firsts: std::collections::BTreeSet<String> =
            (0..30).map(|n| preferred(&format!("agent-{n}"), &members, &[])[0].clone()).collect();
        assert_eq!(firsts.len(), 3);
    }
}

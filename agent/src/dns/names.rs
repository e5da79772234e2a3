//! The names of the mesh, as the control plane tells them: followed for as long as the agent runs, and kept for the next
//! start, so that names are answered while no control plane is.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ca::keystore::KeyStore;
use prost::Message as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use wire::mesh::{Names, WatchNamesRequest};

use crate::control_plane::{Client, ControlPlane, Listener};

/// File of the key store with what was told last.
const FILE: &str = "names";

/// The largest message that is taken, in bytes: hundreds of thousands of names are smaller.
const MAX_MESSAGE: usize = 64 << 20;

/// Names with their addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    exact: BTreeMap<String, Vec<IpAddr>>,
    /// By what is behind `*.`.
    wildcards: BTreeMap<String, Vec<IpAddr>>,
    /// What is below it and not in the table does not exist.
    domain: String,
}

/// What a table says of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found<'a> {
    /// Its addresses.
    Addresses(&'a [IpAddr]),
    /// It would be the mesh's, and there is none.
    Nothing,
    /// It is not of the mesh.
    Elsewhere,
}

impl Table {
    /// What the control plane tells. What is no address counts for nothing.
    #[must_use]
    pub fn new(told: Names) -> Self {
        let mut table = Self { domain: told.domain, ..Self::default() };
        for name in told.names {
            let addresses = name.addresses.iter().filter_map(|address| address.parse().ok()).collect();
            match name.host.strip_prefix("*.") {
                Some(suffix) => table.wildcards.insert(suffix.to_owned(), addresses),
                None => table.exact.insert(name.host, addresses),
            };
        }
        table
    }

    /// Looks a name up, in lower case and without the last dot: itself first, then the longest wildcard over it.
    #[must_use]
    pub fn find(&self, name: &str) -> Found<'_> {
        if let Some(addresses) = self.exact.get(name) {
            return Found::Addresses(addresses);
        }
        let above = std::iter::successors(name.split_once('.'), |(_, rest)| rest.split_once('.'));
        let mut above = above.map(|(_, suffix)| suffix);
        match above.find_map(|suffix| self.wildcards.get(suffix)) {
            Some(addresses) => Found::Addresses(addresses),
            None if self.is_ours(name) => Found::Nothing,
            None => Found::Elsewhere,
        }
    }

    fn is_ours(&self, name: &str) -> bool {
        let below = |domain: &str| {
            name.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        !self.domain.is_empty() && below(&self.domain)
    }

    /// How many names.
    #[must_use]
    pub fn len(&self) -> usize {
        self.exact.len() + self.wildcards.len()
    }

    /// Whether there is no name at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The names that are followed, and where they are kept.
#[derive(Debug)]
pub struct Followed {
    asked: WatchNamesRequest,
    table: watch::Sender<Table>,
    store: KeyStore,
}

impl Followed {
    /// Begins with what was told last. `asked` says who asks. What is damaged counts for nothing.
    #[must_use]
    pub fn remembered(asked: WatchNamesRequest, store: KeyStore) -> Self {
        let table = match store.load(FILE) {
            Ok(None) => Table::default(),
            Ok(Some(bytes)) => Names::decode(bytes.as_slice()).map(Table::new).unwrap_or_default(),
            Err(error) => {
                tracing::warn!(%error, "the names that were told last cannot be used, going on without");
                Table::default()
            }
        };
        Self { asked, table: watch::Sender::new(table), store }
    }

    /// The names, always the latest.
    #[must_use]
    pub fn table(&self) -> watch::Receiver<Table> {
        self.table.subscribe()
    }

    /// Asks one member after the other, and listens to it for as long as it answers; until `stop`.
    pub async fn follow(self, control_plane: ControlPlane, stop: CancellationToken) {
        control_plane.follow(&self, &stop).await;
    }

    async fn on_names(&self, told: Names) {
        let bytes = told.encode_to_vec();
        let table = Table::new(told);
        if *self.table.borrow() == table {
            return;
        }
        tracing::info!(names = table.len(), "the control plane tells the names of the mesh");
        self.table.send_replace(table);
        let store = self.store.clone();
        let stored = tokio::task::spawn_blocking(move || store.store(FILE, &bytes)).await;
        if !matches!(stored, Ok(Ok(()))) {
            tracing::warn!(file = FILE, "the names are known now, but not after a restart");
        }
    }
}

impl Listener for Followed {
    fn what(&self) -> &'static str {
        "names of the mesh"
    }

    async fn listen(&self, client: Client, heard: &mut bool) -> Result<(), Status> {
        let mut client = client.max_decoding_message_size(MAX_MESSAGE);
        let mut names = client.watch_names(self.asked.clone()).await?.into_inner();
        while let Some(told) = names.message().await? {
            *heard = true;
            self.on_names(told).await;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use wire::mesh::Name;

    use super::*;

    pub(crate) fn told(names: &[(&str, &str)]) -> Names {
        let name = |(host, address): &(&str, &str)| Name {
            host: (*host).to_owned(),
            addresses: vec![(*address).to_owned(), "no address".to_owned()],
        };
        Names { names: names.iter().map(name).collect(), domain: "cluster.local".to_owned() }
    }

    #[test]
    fn the_closest_name_counts_and_what_is_missing_in_the_meshs_domain_does_not_exist() {
        let table = Table::new(told(&[
            ("a.default.svc.cluster.local", "10.0.0.1"),
            ("*.example.com", "10.0.0.2"),
            ("*.b.example.com", "10.0.0.3"),
            ("c.b.example.com", "10.0.0.4"),
        ]));
        let found = |name: &str| match table.find(name) {
            Found::Addresses(addresses) => format!("{addresses:?}"),
            other @ (Found::Nothing | Found::Elsewhere) => format!("{other:?}"),
        };
        assert_eq!(found("a.default.svc.cluster.local"), "[10.0.0.1]");
        assert_eq!(found("x.example.com"), "[10.0.0.2]");
        assert_eq!(found("x.y.example.com"), "[10.0.0.2]");
        assert_eq!(found("x.b.example.com"), "[10.0.0.3]");
        assert_eq!(found("c.b.example.com"), "[10.0.0.4]");
        for (name, expected) in [
            ("example.com", "Elsewhere"),
            ("b.default.svc.cluster.local", "Nothing"),
            ("cluster.local", "Nothing"),
            ("notcluster.local", "Elsewhere"),
            ("", "Elsewhere"),
        ] {
            assert_eq!(found(name), expected, "{name}");
        }
        assert_eq!(Table::default().find("a"), Found::Elsewhere);
    }

    #[tokio::test]
    async fn what_was_told_last_is_there_at_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let store = || crate::vault::open(folder.path(), None).unwrap();
        let followed = Followed::remembered(WatchNamesRequest::default(), store());
        assert!(followed.table().borrow().is_empty());
        followed.on_names(told(&[("a", "10.0.0.1")])).await;
        let again = Followed::remembered(WatchNamesRequest::default(), store());
        assert_eq!(*again.table().borrow(), *followed.table().borrow());
        assert_eq!(again.table().borrow().len(), 1);
    }
}

//! Nodes: which machines hold certificates, and which of them may not any more.

use std::collections::BTreeMap;

use ca::dormancy::LONGEST_DORMANCY;
use ca::node::{NodeId, Revocation};
use ca::state::CaCommand;
use registry::state::{Batch, Command as Change, Registration};

use super::types::{NodeRevocation, NodeRevoked, NodeRow};
use super::view::rfc3339;
use super::{Api, ApiError, Caller};
use crate::raft::{Command, View};

/// Annotation of a registration with the node whose certificate made it.
pub(crate) const NODE_ANNOTATION: &str = "istio.io/node";

/// Longest reason, in bytes.
const LONGEST_REASON: usize = 256;

/// The node whose agent made a registration.
fn node_of(registration: &Registration) -> Option<NodeId> {
    registration.annotations.get(NODE_ANNOTATION)?.parse().ok()
}

/// All nodes of which something is known: from the tokens they joined with, their workloads, and their revocation.
fn nodes(view: &View) -> BTreeMap<NodeId, NodeRow> {
    let mut nodes = BTreeMap::new();
    let row = |node: NodeId, namespace: &str, service_account: &str| NodeRow {
        id: node.to_string(),
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        ..NodeRow::default()
    };
    for token in view.ca.tokens() {
        for (key, at) in &token.redeemed_by {
            let node = NodeId::of_key(*key);
            let joined =
                nodes.entry(node).or_insert_with(|| row(node, &token.namespace, &token.service_account));
            joined.token = Some(token.id.clone());
            joined.joined = Some(rfc3339(*at));
        }
    }
    for (key, registration) in view.registry.workloads() {
        let Some(node) = node_of(registration) else { continue };
        let known =
            nodes.entry(node).or_insert_with(|| row(node, &key.namespace, &registration.service_account));
        known.workloads.push(key.name.clone());
    }
    for (node, revocation) in view.ca.revoked() {
        let Revocation { namespace, service_account, at, by, reason, .. } = revocation;
        let known = nodes.entry(*node).or_insert_with(|| row(*node, namespace, service_account));
        known.revoked = Some(NodeRevoked { at: rfc3339(*at), by: by.clone(), reason: reason.clone() });
    }
    nodes
}

impl Api {
    /// The nodes of the caller's namespaces.
    ///
    /// # Errors
    ///
    /// When this member has stopped.
    pub async fn nodes(&self, caller: &Caller) -> Result<Vec<NodeRow>, ApiError> {
        let view = self.view().await?;
        Ok(nodes(&view).into_values().filter(|node| caller.covers(&node.namespace)).collect())
    }

    /// Takes a node out of the mesh: it gets no certificates, what it has open ends on every member, and its workloads are
    /// removed.
    ///
    /// # Errors
    ///
    /// A name that no node has, a reason that is too long, or [`ApiError::NotFound`] when the node is not known, or is not
    /// of the caller's namespaces; a caller of all namespaces may force the revocation of one that is not known.
    pub async fn revoke_node(&self, caller: &Caller, request: &NodeRevocation) -> Result<NodeRow, ApiError> {
        let node: NodeId = request
            .node
            .parse()
            .map_err(|e: ca::node::NotANode| ApiError::invalid_field("node", e.to_string()))?;
        if request.reason.len() > LONGEST_REASON || request.reason.contains(char::is_control) {
            let wanted = format!("at most {LONGEST_REASON} bytes in one line");
            return Err(ApiError::invalid_field("reason", wanted));
        }
        // It may have joined at another member a moment ago.
        self.raft.read_index().await?;
        let known = nodes(&self.view().await?).remove(&node);
        let unknown = || {
            ApiError::NotFound(format!(
                "no node `{node}` is known; one that joined long ago and has no workload is revoked with force"
            ))
        };
        let known = match known {
            Some(known) if caller.covers(&known.namespace) => known,
            None if request.force && caller.is_unlimited() => NodeRow::default(),
            Some(_) | None => return Err(unknown()),
        };
        let at = self.seconds();
        let longest = self.issuing.load().longest_lifetime() + LONGEST_DORMANCY;
        let revocation = Revocation {
            node,
            namespace: known.namespace,
            service_account: known.service_account,
            at,
            by: caller.name.clone(),
            reason: request.reason.clone(),
            until: at.saturating_add(longest.as_secs()),
        };
        self.propose(caller, "revoke node", &Command::Ca(CaCommand::RevokeNode(revocation))).await?;
        let view = self.view().await?;
        let of_node =
            view.registry.workloads().filter(|(_, registration)| node_of(registration) == Some(node));
        let commands: Vec<Change> = of_node
            .map(|(key, registration)| Change::RemoveWorkload {
                key: key.clone(),
                session: registration.session.clone(),
            })
            .collect();
        drop(view);
        if !commands.is_empty() {
            let author = format!("revocation of node {node}");
            let batch = Batch { time_ms: self.time_ms(), author, commands };
            self.propose(caller, "remove the workloads of a revoked node", &Command::Registry(batch)).await?;
        }
        nodes(&self.view().await?).remove(&node).ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ca::authn::Hash;
    use ca::state::{CaState, TokenRecord};
    use registry::state::State;

    use super::*;

    #[test]
    fn nodes_are_known_by_their_tokens_workloads_and_revocations() {
        let key = Hash::of(b"key");
        let (joined, other) = (NodeId::of_key(key), NodeId::of_key(Hash::of(b"other")));
        let mut ca = CaState::default();
        ca.apply(CaCommand::AddJoinToken(TokenRecord {
            id: "t".to_owned(),
            hash: Hash::of(b"secret"),
            namespace: "shop".to_owned(),
            service_account: "pay".to_owned(),
            expires_at: 100,
            uses_left: 1,
            workload_group: None,
            created_by: "ann".to_owned(),
            redeemed_by: [(key, 5)].into(),
            cidrs: Vec::new(),
        }));
        for (node, reason) in [(joined, "stolen"), (other, "lost")] {
            ca.apply(CaCommand::RevokeNode(Revocation {
                node,
                namespace: "elsewhere".to_owned(),
                service_account: "x".to_owned(),
                at: 9,
                by: "bob".to_owned(),
                reason: reason.to_owned(),
                until: 99,
            }));
        }
        let view = View {
            revision: registry::state::Revision(1),
            registry: Arc::new(State::default()),
            ca: Arc::new(ca),
            cluster: Arc::default(),
            access: Arc::default(),
            audit: Arc::default(),
        };
        let nodes = nodes(&view);
        assert_eq!(nodes.len(), 2);
        let known = &nodes[&joined];
        assert_eq!((known.namespace.as_str(), known.service_account.as_str()), ("shop", "pay"));
        assert_eq!(
            (known.token.as_deref(), known.joined.as_deref()),
            (Some("t"), Some("1970-01-01T00:00:05Z"))
        );
        assert_eq!(known.revoked.as_ref().map(|revoked| revoked.reason.as_str()), Some("stolen"));
        assert_eq!((nodes[&other].namespace.as_str(), nodes[&other].token.as_deref()), ("elsewhere", None));
    }
}

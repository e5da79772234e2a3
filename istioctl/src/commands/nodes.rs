//! `nodes`: which machines hold certificates, and which of them may not any more.

use std::process::ExitCode;

use anyhow::ensure;
use istiod::api::types::{NodeRevocation, NodeRow};

use crate::cli::{Nodes, Output};
use crate::client::Client;
use crate::output::{Rows, note, print};

/// Runs one of the commands.
pub(super) async fn run(client: &Client, output: Output, command: &Nodes) -> anyhow::Result<ExitCode> {
    match command {
        Nodes::List => {
            let nodes: Vec<NodeRow> = client.rows("/nodes").await?;
            print(output, &nodes, |_| rows(&nodes))?;
        }
        Nodes::Revoke { node, workload, namespace, reason, force } => {
            let node = match (node, workload) {
                (Some(node), _) => node.clone(),
                (None, workload) => {
                    let nodes: Vec<NodeRow> = client.rows("/nodes").await?;
                    of_workload(&nodes, namespace, workload.as_deref().unwrap_or_default())?
                }
            };
            let request = NodeRevocation { node, reason: reason.clone(), force: *force };
            let revoked: NodeRow = client.post("/nodes/revoke", &request).await?;
            print(output, &[&revoked], |_| rows([&revoked]))?;
            note(&format!(
                "node {} revoked; peers accept its last certificate until that ends, ca.leafLifetime at most unless it \
                 asked for more",
                revoked.id
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The node that registered a workload.
fn of_workload(nodes: &[NodeRow], namespace: &str, workload: &str) -> anyhow::Result<String> {
    let found: Vec<&str> = nodes
        .iter()
        .filter(|node| node.namespace == namespace && node.workloads.iter().any(|name| name == workload))
        .map(|node| node.id.as_str())
        .collect();
    ensure!(
        found.len() == 1,
        "{} nodes have registered a workload {namespace}/{workload}; `istioctl nodes list` shows all",
        found.len()
    );
    Ok(found.concat())
}

fn rows<'a>(nodes: impl IntoIterator<Item = &'a NodeRow>) -> Rows {
    let mut rows = Rows::new(["id", "namespace", "service account", "joined", "workloads", "revoked"]);
    for node in nodes {
        let revoked = node.revoked.as_ref().map(|revoked| {
            format!("{} by {} {}", revoked.at, revoked.by, revoked.reason).trim_end().to_owned()
        });
        rows.push([
            node.id.clone(),
            node.namespace.clone(),
            node.service_account.clone(),
            node.joined.clone().unwrap_or_default(),
            node.workloads.join(","),
            revoked.unwrap_or_default(),
        ]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_tells_its_node() {
        let node = |id: &str, workload: &str| NodeRow {
            id: id.to_owned(),
            namespace: "shop".to_owned(),
            workloads: vec![workload.to_owned()],
            ..NodeRow::default()
        };
        let nodes = [node("a", "web"), node("b", "pay")];
        assert_eq!(of_workload(&nodes, "shop", "pay").unwrap(), "b");
        assert!(of_workload(&nodes, "default", "pay").unwrap_err().to_string().starts_with("0 nodes"));
        assert!(of_workload(&[node("a", "x"), node("b", "x")], "shop", "x").is_err());
    }
}

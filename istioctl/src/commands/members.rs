//! `members`: who makes up the control plane.

use std::process::ExitCode;
use std::time::Duration;

use istiod::api::types::members::{LeaderRequest, MemberChange, MemberRequest, MemberTicket};
use istiod::cluster::members::MemberView;

use crate::cli::{Members, Output};
use crate::client::Client;
use crate::output::{Rows, data, note, print};

/// Runs one of the commands.
pub(super) async fn run(client: &Client, output: Output, command: &Members) -> anyhow::Result<ExitCode> {
    match command {
        Members::List => list(client, output).await?,
        Members::Add { learner, ttl } => add(client, output, (!learner, None), *ttl).await?,
        Members::Replace { id, ttl } => add(client, output, (true, Some(*id)), *ttl).await?,
        Members::Remove { ids } => {
            change(client, "remove", ids).await?;
            note("removed; their numbers are never used again");
        }
        Members::Promote { ids } => {
            change(client, "promote", ids).await?;
            note("they will vote");
        }
        Members::Transfer { id } => {
            client.post::<serde_json::Value>("/members/transfer", &LeaderRequest { to: *id }).await?;
            note(&format!("member {id} leads"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn change(client: &Client, what: &str, ids: &[u64]) -> anyhow::Result<()> {
    let change = MemberChange { ids: ids.to_vec() };
    client.post::<serde_json::Value>(&format!("/members/{what}"), &change).await.map(drop)
}

async fn add(
    client: &Client,
    output: Output,
    (voter, replaces): (bool, Option<u64>),
    ttl: Duration,
) -> anyhow::Result<()> {
    let request = MemberRequest { voter, replaces, ttl_seconds: ttl.as_secs() };
    let ticket: MemberTicket = client.post("/members", &request).await?;
    if matches!(output, Output::Json | Output::Yaml) {
        return print(output, &ticket, |_| Rows::new([]));
    }
    data(&format!("{}\n", ticket.command))?;
    note("run it on the new machine with the HOST that others reach it by, then start istiod there");
    Ok(())
}

async fn list(client: &Client, output: Output) -> anyhow::Result<()> {
    let members: Vec<MemberView> = client.rows("/members").await?;
    print(output, &members, |wide| {
        let mut header = vec!["id", "name", "part", "behind", "peer", "program"];
        header.extend(wide.then_some(["xds", "admin", "replaces"]).into_iter().flatten());
        let mut rows = Rows::new(header);
        for member in &members {
            let behind = match (member.behind, member.heard) {
                (_, Some(false)) => "not heard".to_owned(),
                (Some(behind), _) => behind.to_string(),
                (None, _) => "unknown".to_owned(),
            };
            let part = serde_json::to_value(member.part).ok();
            let part = part.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
            let mut row = vec![
                member.id.to_string(),
                member.name.clone(),
                part,
                behind,
                member.peer.clone(),
                member.program.clone(),
            ];
            if wide {
                let replaces = member.replaces.map(|id| id.to_string()).unwrap_or_default();
                row.extend([member.xds.clone(), member.admin.clone(), replaces]);
            }
            rows.push(row);
        }
        rows
    })
}

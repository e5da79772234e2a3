//! `services`, `workloads`, `token`, `version`.

use std::process::ExitCode;

use istiod::api::types::{
    ReleaseRequest, Released, ServiceRow, TokenCreated, TokenRequest, TokenRow, Version, WorkloadRow,
};
use serde::Serialize;

use crate::cli::{Output, Release, Token, Workloads, WorkloadsCommand};
use crate::client::{Client, segment};
use crate::output::{Rows, data, note, print};

/// Shows services.
pub(super) async fn services(client: &Client, output: Output) -> anyhow::Result<ExitCode> {
    let services: Vec<ServiceRow> = client.rows("/services").await?;
    print(output, &services, |wide| {
        let mut header = vec!["host", "namespace", "ports", "endpoints", "source"];
        header.extend(wide.then_some(["addresses", "conflicts"]).into_iter().flatten());
        let mut rows = Rows::new(header);
        for service in &services {
            let mut row = vec![
                service.hostname.clone(),
                service.namespace.clone(),
                service.ports.join(","),
                format!("{}/{}", service.healthy, service.endpoints),
                service.source.clone(),
            ];
            if wide {
                row.extend([service.addresses.join(","), service.conflicts.join("; ")]);
            }
            rows.push(row);
        }
        rows
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Shows workloads, or gives some up.
pub(super) async fn workloads(client: &Client, output: Output, args: &Workloads) -> anyhow::Result<ExitCode> {
    if let Some(WorkloadsCommand::Release(args)) = &args.command {
        return release(client, output, args).await;
    }
    let workloads: Vec<WorkloadRow> = client.rows("/workloads").await?;
    print(output, &workloads, |wide| {
        let mut header = vec!["name", "namespace", "address", "service account", "health", "source", "agent"];
        header.extend(wide.then_some("labels"));
        let mut rows = Rows::new(header);
        for workload in &workloads {
            let mut row = vec![
                workload.name.clone(),
                workload.namespace.clone(),
                workload.address.clone(),
                workload.service_account.clone(),
                health(workload),
                workload.source.clone(),
                agent(workload),
            ];
            if wide {
                row.push(
                    workload.labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(","),
                );
            }
            rows.push(row);
        }
        rows
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Its health, and why it is not healthy.
fn health(workload: &WorkloadRow) -> String {
    if workload.reason.is_empty() {
        workload.health.clone()
    } else {
        format!("{}: {}", workload.health, workload.reason)
    }
}

/// Whether the agent is heard, and since when it is not.
fn agent(workload: &WorkloadRow) -> String {
    if workload.agent_since.is_empty() {
        workload.agent.clone()
    } else {
        format!("{} since {}", workload.agent, workload.agent_since)
    }
}

/// Gives up workloads that are held as unknown.
async fn release(client: &Client, output: Output, args: &Release) -> anyhow::Result<ExitCode> {
    let request = ReleaseRequest { namespace: args.namespace.clone(), name: args.name.clone() };
    let released: Released = client.post("/workloads/release", &request).await?;
    print(output, &released, |_| {
        let mut rows = Rows::new(["released"]);
        released.workloads.iter().for_each(|workload| rows.push([workload.clone()]));
        rows
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Makes, shows and revokes join tokens.
pub(super) async fn token(client: &Client, output: Output, command: &Token) -> anyhow::Result<ExitCode> {
    match command {
        Token::Create { namespace, service_account, ttl, uses, cidrs } => {
            let request = TokenRequest {
                namespace: namespace.clone(),
                service_account: service_account.clone(),
                ttl_seconds: ttl.as_secs(),
                uses: *uses,
                cidrs: cidrs.clone(),
            };
            let created: TokenCreated = client.post("/tokens", &request).await?;
            if matches!(output, Output::Json | Output::Yaml) {
                print(output, &created, |_| Rows::new([]))?;
            } else {
                data(&format!("{}\n", created.token))?;
                note(&format!(
                    "token {} for {namespace}/{service_account}, until {}",
                    created.id, created.expires
                ));
            }
        }
        Token::List => {
            let tokens: Vec<TokenRow> = client.rows("/tokens").await?;
            print(output, &tokens, |_| {
                let mut rows =
                    Rows::new(["id", "namespace", "service account", "expires", "uses left", "from"]);
                for token in &tokens {
                    rows.push([
                        token.id.clone(),
                        token.namespace.clone(),
                        token.service_account.clone(),
                        token.expires.clone(),
                        token.uses_left.to_string(),
                        token.cidrs.join(","),
                    ]);
                }
                rows
            })?;
        }
        Token::Revoke { id } => {
            client.delete::<serde_json::Value>(&format!("/tokens/{}", segment(id))).await?;
            note(&format!("token {id} revoked"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Versions {
    client: &'static str,
    server: Option<Version>,
}

/// Shows the version of both sides.
pub(super) async fn version(client: &Client, output: Output) -> anyhow::Result<ExitCode> {
    let server = client.get::<Version>("/version").await;
    if let Err(error) = &server {
        note(&format!("warning: {error:#}"));
    }
    let versions = Versions { client: env!("CARGO_PKG_VERSION"), server: server.ok() };
    print(output, &versions, |_| {
        let mut rows = Rows::new(["program", "version", "trust domain", "revision", "role"]);
        rows.push([
            "istioctl".to_owned(),
            versions.client.to_owned(),
            String::new(),
            String::new(),
            String::new(),
        ]);
        if let Some(server) = &versions.server {
            rows.push([
                "istiod".to_owned(),
                server.version.clone(),
                server.trust_domain.clone(),
                server.revision.to_string(),
                server.role.clone(),
            ]);
        }
        rows
    })?;
    Ok(ExitCode::SUCCESS)
}

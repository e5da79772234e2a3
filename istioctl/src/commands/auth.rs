//! `auth`: tokens of operators, the roles of certificates, and who one is.

use std::process::ExitCode;

use istiod::access::Role;
use istiod::api::types::{ApiTokenCreated, ApiTokenRequest, ApiTokenRow, BindingRequest, BindingRow, WhoAmI};

use crate::cli::{Auth, AuthRole, AuthToken, Output};
use crate::client::{Client, segment};
use crate::output::{Rows, data, note, print};

/// Shows and changes who may use the admin API.
///
/// # Errors
///
/// What was refused.
pub(super) async fn auth(client: &Client, output: Output, command: &Auth) -> anyhow::Result<ExitCode> {
    match command {
        Auth::Whoami => whoami(client, output).await?,
        Auth::Token(command) => token(client, output, command).await?,
        Auth::Role(command) => role(client, output, command).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn whoami(client: &Client, output: Output) -> anyhow::Result<()> {
    let me: WhoAmI = client.get("/whoami").await?;
    print(output, &me, |_| {
        let mut rows = Rows::new(["name", "role", "namespaces", "from"]);
        rows.push([me.name.clone(), me.role.to_string(), listed(&me.namespaces), me.from.clone()]);
        rows
    })
}

async fn token(client: &Client, output: Output, command: &AuthToken) -> anyhow::Result<()> {
    match command {
        AuthToken::Create { name, role, namespaces, ttl } => {
            let request = ApiTokenRequest {
                name: name.clone(),
                role: Role::from(*role),
                namespaces: namespaces.clone(),
                ttl_seconds: ttl.as_secs(),
            };
            let created: ApiTokenCreated = client.post("/access/tokens", &request).await?;
            if matches!(output, Output::Json | Output::Yaml) {
                return print(output, &created, |_| Rows::new([]));
            }
            data(&format!("{}\n", created.token))?;
            let scope = listed(namespaces);
            note(&format!("token {}: {} of {scope}, until {}", created.id, request.role, created.expires));
            Ok(())
        }
        AuthToken::List => {
            let tokens: Vec<ApiTokenRow> = client.rows("/access/tokens").await?;
            print(output, &tokens, |wide| {
                let mut header = vec!["id", "name", "role", "namespaces", "expires", "last used"];
                header.extend(wide.then_some(["created", "created by"]).into_iter().flatten());
                let mut rows = Rows::new(header);
                for token in &tokens {
                    let used = if token.last_used.is_empty() { "never" } else { &token.last_used };
                    let mut row = vec![
                        token.id.clone(),
                        token.name.clone(),
                        token.role.to_string(),
                        listed(&token.namespaces),
                        token.expires.clone(),
                        used.to_owned(),
                    ];
                    if wide {
                        row.extend([token.created.clone(), token.created_by.clone()]);
                    }
                    rows.push(row);
                }
                rows
            })
        }
        AuthToken::Revoke { id } => {
            client.delete::<serde_json::Value>(&format!("/access/tokens/{}", segment(id))).await?;
            note(&format!("token {id} revoked"));
            Ok(())
        }
    }
}

async fn role(client: &Client, output: Output, command: &AuthRole) -> anyhow::Result<()> {
    match command {
        AuthRole::Bind { identity, role, namespaces } => {
            let request = BindingRequest {
                identity: identity.clone(),
                role: Role::from(*role),
                namespaces: namespaces.clone(),
            };
            let bound: BindingRow = client.post("/access/bindings", &request).await?;
            note(&format!("{} is {} of {} now", bound.identity, bound.role, listed(&bound.namespaces)));
            Ok(())
        }
        AuthRole::List => {
            let bindings: Vec<BindingRow> = client.rows("/access/bindings").await?;
            print(output, &bindings, |_| {
                let mut rows = Rows::new(["identity", "role", "namespaces", "created", "created by"]);
                for binding in &bindings {
                    rows.push([
                        binding.identity.clone(),
                        binding.role.to_string(),
                        listed(&binding.namespaces),
                        binding.created.clone(),
                        binding.created_by.clone(),
                    ]);
                }
                rows
            })
        }
        AuthRole::Unbind { identity } => {
            let path = format!("/access/bindings?identity={}", segment(identity));
            client.delete::<serde_json::Value>(&path).await?;
            note(&format!("{identity} has no role any more"));
            Ok(())
        }
    }
}

/// Namespaces in a row.
fn listed(namespaces: &[String]) -> String {
    if namespaces.is_empty() { "all namespaces".to_owned() } else { namespaces.join(",") }
}

//! The identity: with a token the first time, from the key store after that.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use ca::authn::JoinToken;
use ca::client::{CertificateSource, Remote};
use ca::identity::{SpiffeId, TrustDomain};
use ca::keystore::KeyStore;
use ca::seal::SealingKey;
use ca::tls::IdentityWatch;
use proxy::xds::last_good::LastGood;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::members::Followed;
use crate::vault;

/// File of the key store that says where the control plane is and who we are, for starts without a token.
const MEMBERSHIP_FILE: &str = "membership.json";

/// What joining gives.
#[derive(Debug)]
pub struct Joined {
    /// The members of the control plane.
    pub members: Followed,
    /// Who we are; renewed in the background.
    pub identity: IdentityWatch,
    /// Where key, certificate and membership are.
    pub store: KeyStore,
}

/// What a join token told that is needed after it was used up. Not secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Membership {
    endpoints: Vec<String>,
    trust_domain: TrustDomain,
    namespace: String,
    service_account: String,
}

impl Membership {
    fn of(token: &JoinToken) -> Self {
        Self {
            endpoints: token.endpoints.clone(),
            trust_domain: token.trust_domain.clone(),
            namespace: token.namespace.clone(),
            service_account: token.service_account.clone(),
        }
    }

    fn is_of_the_same(&self, other: &Self) -> bool {
        let identity =
            |of: &Self| (of.trust_domain.clone(), of.namespace.clone(), of.service_account.clone());
        identity(self) == identity(other)
    }
}

/// Whether an earlier start with this folder joined.
#[must_use]
pub fn is_member(data_dir: &Path) -> bool {
    data_dir.join(MEMBERSHIP_FILE).exists()
}

/// Where the control plane was when this folder's agent joined, `host:port`.
///
/// # Errors
///
/// It has not joined, or the folder cannot be read.
pub fn endpoints(data_dir: &Path, key: Option<SealingKey>) -> anyhow::Result<Vec<String>> {
    Ok(remembered(&vault::open(data_dir, key)?)?.endpoints)
}

/// Gets the identity and keeps renewing it on `tasks` until `stop`.
///
/// # Errors
///
/// When there is neither a token nor an earlier membership, or the control plane refuses the token.
pub async fn identity(
    config: &Config,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> anyhow::Result<Joined> {
    let store = vault::open(&config.data_dir, config.key.clone())?;
    let membership = match &config.token {
        Some(token) => {
            let membership = Membership::of(token);
            // What another identity was told is not this one's.
            if !remembered(&store).is_ok_and(|before| before.is_of_the_same(&membership)) {
                LastGood::forget(&store)?;
            }
            store.store(MEMBERSHIP_FILE, &serde_json::to_vec_pretty(&membership)?)?;
            membership
        }
        None => remembered(&store)?,
    };
    let expected =
        SpiffeId::workload(&membership.trust_domain, &membership.namespace, &membership.service_account)?;
    let members = match (&config.token, config.endpoints.as_slice()) {
        (None, []) => Followed::remembered(&config.node, membership.endpoints, store.clone())?,
        (Some(_), []) => Followed::told(&config.node, membership.endpoints, store.clone()),
        (_, given) => Followed::told(&config.node, given.to_vec(), store.clone()),
    };
    let issuance = match &config.token {
        Some(token) => Remote::with_token(token.clone()),
        None => Remote::renew_only(Vec::new()),
    };
    let issuance = issuance.following(members.list());
    let source = CertificateSource {
        issuance,
        clock: clock(),
        store: Some(store.clone()),
        lifetime: config.certificate_lifetime,
        expected: Some(expected),
        rng: fastrand::Rng::new(),
    };
    let identity = source.start(tasks, stop).await.context("cannot get a certificate")?;
    tracing::info!(peer = %identity.borrow().spiffe_id, "joined the mesh");
    Ok(Joined { members, identity, store })
}

fn remembered(store: &KeyStore) -> anyhow::Result<Membership> {
    let bytes = store.load(MEMBERSHIP_FILE)?.with_context(|| {
        format!(
            "{} has no membership; join first, with `istio-agent join TOKEN` or `--token TOKEN`",
            store.dir().display()
        )
    })?;
    serde_json::from_slice(&bytes)
        .with_context(|| format!("{MEMBERSHIP_FILE} is damaged; join again with a new token"))
}

/// The agent's one clock for certificates.
#[expect(clippy::disallowed_methods, reason = "the agent's one clock; everything else is given the time")]
fn clock() -> ca::renewal::Clock {
    Arc::new(SystemTime::now)
}

//! Getting and renewing an identity: one loop for the control plane, the proxy and the agent.
//!
//! [`CertificateSource`] makes a key, asks for a certificate, and asks again at half-life; what it has is published
//! in a `watch`, from which [`crate::tls`] reads. [`Issuance`] is whom it asks: a certificate service over the network
//! ([`Remote`]), or the authority in the same process ([`Local`]). When to ask is decided by [`crate::renewal`].

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::CertificateSigningRequestDer;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zeroize::Zeroizing;

use crate::identity::SpiffeId;
use crate::keystore::{KeyStore, KeyStoreError};
use crate::renewal::{Clock, Credential, Schedule, Step, Validity};
use crate::svid::{Chain, IdentityMismatch, PrivateKey};
use crate::tls::IdentityWatch;
use crate::x509;

mod issuance;
pub use crate::svid::Identity;
pub use issuance::{ConnectError, Local, Remote, bootstrap_tls, connect};

/// The identity with its key, chain and roots, in one file, so that it is always whole.
const IDENTITY_FILE: &str = "identity";
/// The key that the next certificate is asked for. Kept, so that a repeated request is the same request.
const PENDING_KEY_FILE: &str = "pending-key";
/// Longest sleep: a clock that was set, or a machine that slept, is noticed after this time.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// With what a request proves who is calling.
#[derive(Debug, Clone)]
pub enum Presented {
    /// What the workload was given to join with.
    Initial,
    /// The identity that it holds.
    Certificate(Arc<Identity>),
    /// The identity that it held until its certificate ended; the request is for the key of that certificate.
    Ended(Arc<Identity>),
}

/// Why a request was not answered with a certificate.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The authority has decided: trying again with the same credential does not help.
    #[error("the certificate request was refused: {0}")]
    Refused(String),
    /// The authority could not be asked, or could not decide; trying again may help.
    #[error("the certificate service cannot be used: {0}")]
    Unavailable(String),
}

/// Whom certificates are asked of.
pub trait Issuance: Send + 'static {
    /// Asks for a certificate. May be repeated with the same request.
    ///
    /// # Errors
    ///
    /// When there is no certificate in the answer, or no answer.
    fn request(
        &mut self,
        csr: &CertificateSigningRequestDer<'static>,
        presented: &Presented,
        lifetime: Option<Duration>,
    ) -> impl Future<Output = Result<Chain, RequestError>> + Send;

    /// Whether there is something to join with, should the identity be lost.
    fn can_join(&self) -> bool;
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The authority refuses, and there is no identity to go on with.
    #[error("no certificate: {0}")]
    Refused(String),
    /// The program is ending.
    #[error("stopped before there was a certificate")]
    Stopped,
    /// A key could not be made or used.
    #[error("no key")]
    Key(#[from] rcgen::Error),
    /// The key store cannot be used.
    #[error("the key store cannot be used")]
    KeyStore(#[from] KeyStoreError),
    /// What was issued is not for us.
    #[error("the certificate that was issued cannot be used")]
    Mismatch(#[from] IdentityMismatch),
    /// The authority gave somebody else's identity.
    #[error("issued for `{found}`, expected was `{expected}`")]
    Identity {
        /// What was issued.
        found: SpiffeId,
        /// What was expected.
        expected: SpiffeId,
    },
    /// The request failed.
    #[error(transparent)]
    Request(#[from] RequestError),
}

/// Obtains an identity and renews it for as long as the program runs.
pub struct CertificateSource<I> {
    /// Whom certificates are asked of.
    pub issuance: I,
    /// What time it is.
    pub clock: Clock,
    /// Where the identity survives a restart; in memory only when `None`.
    pub store: Option<KeyStore>,
    /// Lifetime to ask for; the authority's default when `None`.
    pub lifetime: Option<Duration>,
    /// Identity that must come of it. A stored one with another name is not used.
    pub expected: Option<SpiffeId>,
    /// Chance, for the jitter of renewals.
    pub rng: fastrand::Rng,
}

impl<I: Issuance> CertificateSource<I> {
    /// Waits for the first identity, then goes on renewing it on `tasks` until `stop`.
    ///
    /// A valid identity in the key store is the first one; nobody is asked then. With one that has ended the authority
    /// is asked for another, and only if it refuses, what the workload was given to join with is used. While the
    /// authority cannot be reached, this waits and tries again.
    ///
    /// # Errors
    ///
    /// When the authority refuses for good, the key store cannot be used, or `stop` comes first.
    pub async fn start(
        self,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Result<IdentityWatch, SourceError> {
        let mut renewing = Renewing::open(self).await?;
        let first = tokio::select! {
            () = stop.cancelled() => return Err(SourceError::Stopped),
            first = renewing.first() => first?,
        };
        let (publish, identities) = watch::channel(first);
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = renewing.run(&publish) => {}
            }
        });
        Ok(identities)
    }
}

/// The driver: moves what the schedule says.
struct Renewing<I> {
    source: CertificateSource<I>,
    schedule: Schedule,
    current: Option<Arc<Identity>>,
    /// The stored identity, if it has ended.
    ended: Option<Arc<Identity>>,
    pending: Option<PrivateKey>,
}

impl<I: Issuance> Renewing<I> {
    async fn open(mut source: CertificateSource<I>) -> Result<Self, SourceError> {
        let now = (source.clock)();
        let stored = match source.store.clone() {
            Some(store) => on_disk(move || load(&store)).await?,
            None => Stored::default(),
        };
        let fits = |found: &Identity| source.expected.as_ref().is_none_or(|id| *id == found.spiffe_id);
        let found = stored.identity.filter(fits).map(Arc::new);
        let (current, ended) = match found {
            Some(found) if now < found.not_after => (Some(found), None),
            found => (None, found),
        };
        let schedule = Schedule::new(current.as_deref().map(validity), now, &mut source.rng);
        Ok(Self { source, schedule, current, ended, pending: stored.pending })
    }

    async fn first(&mut self) -> Result<Arc<Identity>, SourceError> {
        let mut last = String::new();
        loop {
            if let Some(identity) = &self.current {
                return Ok(Arc::clone(identity));
            }
            match self.schedule.step((self.source.clock)()) {
                Step::GiveUp => return Err(SourceError::Refused(last)),
                Step::Wait(until) => sleep_until(&self.source.clock, until).await,
                Step::Request(credential) => match self.attempt(credential).await {
                    Ok(_) => {}
                    Err(error @ SourceError::KeyStore(_)) => return Err(error),
                    Err(error) => last = self.failed(&error),
                },
            }
        }
    }

    async fn run(&mut self, publish: &watch::Sender<Arc<Identity>>) {
        loop {
            match self.schedule.step((self.source.clock)()) {
                // there was an identity once: what is refused now may be granted later
                Step::GiveUp => tokio::time::sleep(LONGEST_SLEEP).await,
                Step::Wait(until) => sleep_until(&self.source.clock, until).await,
                Step::Request(credential) => match self.attempt(credential).await {
                    Ok(identity) => drop(publish.send_replace(identity)),
                    Err(error) => drop(self.failed(&error)),
                },
            }
        }
    }

    async fn attempt(&mut self, credential: Credential) -> Result<Arc<Identity>, SourceError> {
        if let (Credential::Certificate, Some(current)) = (credential, &self.current) {
            let presented = Presented::Certificate(Arc::clone(current));
            let key = self.pending_key().await?;
            return self.ask(&presented, key).await;
        }
        if let Some(ended) = self.current.as_ref().or(self.ended.as_ref()).cloned() {
            let key = ended.key.clone();
            match self.ask(&Presented::Ended(ended), key).await {
                Err(SourceError::Request(RequestError::Refused(why))) if self.source.issuance.can_join() => {
                    tracing::info!(%why, "the certificate that has ended brings no other, joining again");
                }
                answered => return answered,
            }
        }
        let key = self.pending_key().await?;
        self.ask(&Presented::Initial, key).await
    }

    /// Asks for a certificate of `key`.
    async fn ask(&mut self, presented: &Presented, key: PrivateKey) -> Result<Arc<Identity>, SourceError> {
        let csr = key.request()?;
        let chain = self.source.issuance.request(csr.der(), presented, self.source.lifetime).await?;
        let identity = Identity::new(chain, key, (self.source.clock)())?;
        if let Some(expected) = self.source.expected.as_ref().filter(|id| **id != identity.spiffe_id) {
            let found = identity.spiffe_id;
            return Err(SourceError::Identity { found, expected: expected.clone() });
        }
        self.obtained(Arc::new(identity)).await
    }

    async fn obtained(&mut self, identity: Arc<Identity>) -> Result<Arc<Identity>, SourceError> {
        self.schedule.on_obtained(validity(&identity), &mut self.source.rng);
        self.current = Some(Arc::clone(&identity));
        self.pending = None;
        tracing::info!(identity = %identity.spiffe_id, lifetime_s = validity_secs(&identity), "certificate obtained");
        if let Some(store) = self.source.store.clone() {
            let text = to_text(&identity);
            let saved = on_disk(move || {
                store.store(IDENTITY_FILE, text.as_bytes())?;
                store.remove(PENDING_KEY_FILE)
            });
            if let Err(error) = saved.await {
                tracing::warn!(%error, "the certificate is in use, but will not survive a restart");
            }
        }
        Ok(identity)
    }

    /// The key of the next certificate: stored before it is used, so that a request repeated after a crash is the
    /// same request.
    async fn pending_key(&mut self) -> Result<PrivateKey, SourceError> {
        if let Some(key) = &self.pending {
            return Ok(key.clone());
        }
        let key = PrivateKey::generate()?;
        if let Some(store) = self.source.store.clone() {
            let pem = key.to_pem();
            on_disk(move || store.store(PENDING_KEY_FILE, pem.as_bytes())).await?;
        }
        self.pending = Some(key.clone());
        Ok(key)
    }

    fn failed(&mut self, error: &SourceError) -> String {
        let refused =
            matches!(error, SourceError::Request(RequestError::Refused(_)) | SourceError::Identity { .. });
        self.schedule.on_failed(refused, (self.source.clock)(), &mut self.source.rng);
        let text = match std::error::Error::source(error) {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        };
        tracing::warn!(error = %text, "no certificate, trying again");
        text
    }
}

async fn sleep_until(clock: &Clock, until: SystemTime) {
    let left = until.duration_since(clock()).unwrap_or_default();
    // a millisecond more than nothing, so that a clock that stands still does not make this spin
    tokio::time::sleep(left.clamp(Duration::from_millis(1), LONGEST_SLEEP)).await;
}

fn validity(identity: &Identity) -> Validity {
    Validity { obtained_at: identity.obtained_at, not_after: identity.not_after }
}

fn validity_secs(identity: &Identity) -> u64 {
    identity.not_after.duration_since(identity.obtained_at).unwrap_or_default().as_secs()
}

#[derive(Default)]
struct Stored {
    identity: Option<Identity>,
    pending: Option<PrivateKey>,
}

fn load(store: &KeyStore) -> Result<Stored, KeyStoreError> {
    let pending = store.load(PENDING_KEY_FILE)?.and_then(|pem| PrivateKey::from_pem(&pem).ok());
    let text = store.load(IDENTITY_FILE)?;
    let identity = text.and_then(|text| {
        let identity = from_text(&text);
        if identity.is_none() {
            tracing::warn!(file = %store.dir().join(IDENTITY_FILE).display(), "stored identity cannot be used");
        }
        identity
    });
    Ok(Stored { identity, pending })
}

/// Runs file operations where they may block.
async fn on_disk<T: Send + 'static>(
    operation: impl FnOnce() -> Result<T, KeyStoreError> + Send + 'static,
) -> Result<T, KeyStoreError> {
    match tokio::task::spawn_blocking(operation).await {
        Ok(result) => result,
        Err(error) => Err(KeyStoreError::Io {
            doing: "use",
            path: "the key store".into(),
            source: std::io::Error::other(error),
        }),
    }
}

const OBTAINED: &str = "obtained-at: ";
const ROOTS: &str = "roots:\n";

/// PEM of key, chain and roots, with two lines between the blocks that PEM readers skip.
fn to_text(identity: &Identity) -> Zeroizing<String> {
    let obtained = identity.obtained_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let key = identity.key.to_pem();
    let (chain, roots) = (identity.chain_pem(), identity.roots_pem());
    Zeroizing::new(format!("{OBTAINED}{obtained}\n{}{chain}{ROOTS}{roots}", key.as_str()))
}

fn from_text(text: &[u8]) -> Option<Identity> {
    let text = std::str::from_utf8(text).ok()?;
    let (first, rest) = text.strip_prefix(OBTAINED)?.split_once('\n')?;
    let (own, roots) = rest.split_once(ROOTS)?;
    let obtained_at = UNIX_EPOCH.checked_add(Duration::from_secs(first.parse().ok()?))?;
    let mut chain = x509::certificates_from_pem(own.as_bytes()).ok()?.into_iter();
    let chain = Chain {
        leaf: chain.next()?,
        intermediates: chain.collect(),
        roots: x509::certificates_from_pem(roots.as_bytes()).ok()?,
    };
    Identity::new(chain, PrivateKey::from_pem(own.as_bytes()).ok()?, obtained_at).ok()
}

#[cfg(test)]
#[path = "client/tests.rs"]
mod tests;
